//! Secrets by reference: `env:NAME`, `file:PATH`, `command:PROGRAM ARGUMENTS`.
//!
//! Kept apart from everything that reads configuration, so that there is one place where a secret
//! enters the process. No error, log line or `Debug` here ever holds a secret's value; what a
//! command writes to its standard error is not shown either, because it may repeat the secret.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stillpoint_core::Result;
use stillpoint_core::error::{Error, IoContext, Kind};
use stillpoint_core::platform::Secret;

/// What every reference looks like; the hint of every mistake.
const FORMS: &str = "write `env:NAME`, `file:/path` or `command:program arguments`";

/// Longest secret, in bytes. A larger answer is a wrong file.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// How long a command may take.
const COMMAND_SECONDS_MAX: u64 = 30;

/// Resolves references for one configuration file.
#[derive(Clone, Debug)]
pub struct Secrets {
    folder: PathBuf,
}

enum Reference<'a> {
    Environment(&'a str),
    File(&'a Path),
    Command(&'a str),
}

/// Checks that `text` is a reference, without resolving it. The error never repeats the text,
/// which may be the secret itself.
pub fn check_form(text: &str) -> Result<()> {
    parse(text).map(|_| ())
}

/// Whether `text` looks like a reference; for fields that may hold either.
pub fn is_reference(text: &str) -> bool {
    parse(text).is_ok()
}

fn parse(text: &str) -> Result<Reference<'_>> {
    let bad = |message: &str| Error::new(Kind::Config, message).hint(FORMS);
    let Some((scheme, rest)) = text.split_once(':') else {
        return Err(bad("a secret may not stand here in plain text"));
    };
    match scheme {
        "env" | "file" | "command" if rest.trim().is_empty() => Err(bad(&format!("nothing follows `{scheme}:`"))),
        "env" if rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') => Ok(Reference::Environment(rest)),
        "env" => Err(bad("the name behind `env:` may hold letters, digits and `_` only")),
        "file" => Ok(Reference::File(Path::new(rest))),
        "command" => Ok(Reference::Command(rest)),
        _ => Err(bad("a secret may not stand here in plain text")),
    }
}

impl Secrets {
    /// Relative `file:` paths and commands are looked up from `folder`, where the configuration lies.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The secret's value, white space around it removed. Fails if it is absent or empty.
    pub fn resolve(&self, secret: &Secret) -> Result<String> {
        let value = match parse(&secret.0)? {
            Reference::Environment(name) => environment(name)?,
            Reference::File(path) => file(&self.folder.join(path))?,
            Reference::Command(line) => command(line, &self.folder)?,
        };
        let value = value.trim();
        if value.is_empty() {
            return Err(Error::new(Kind::Config, format!("the secret `{}` is empty", secret.0)));
        }
        Ok(value.to_owned())
    }

    /// The file behind a `file:` reference, for those who write it; `None` for other references.
    pub fn file_path(&self, secret: &Secret) -> Option<PathBuf> {
        match parse(&secret.0) {
            Ok(Reference::File(path)) => Some(self.folder.join(path)),
            _ => None,
        }
    }
}

fn environment(name: &str) -> Result<String> {
    match std::env::var(name) {
        Ok(value) => Ok(value),
        Err(std::env::VarError::NotPresent) => {
            Err(Error::new(Kind::Config, format!("the environment variable `{name}` is not set"))
                .hint(format!("export {name}=…, or name another source for this secret")))
        }
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(Error::new(Kind::Config, format!("the environment variable `{name}` is not valid UTF-8")))
        }
    }
}

fn file(path: &Path) -> Result<String> {
    let shown = path.display().to_string();
    let open = File::open(path).map_err(|error| {
        Error::new(Kind::Config, format!("cannot read the secret file `{shown}`"))
            .hint("check the path and that this user may read it")
            .source(error)
    })?;
    let mut value = Vec::new();
    open.take(SECRET_BYTES_MAX + 1).read_to_end(&mut value).or_io(|| format!("cannot read `{shown}`"))?;
    text(value, &format!("the secret file `{shown}`"))
}

fn command(line: &str, folder: &Path) -> Result<String> {
    let words = split(line)?;
    let program = words.first().ok_or_else(|| Error::new(Kind::Config, "nothing follows `command:`").hint(FORMS))?;
    let mut child = Command::new(program)
        .args(&words[1..])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| {
            Error::io(format!("cannot run `{program}` for a secret"), error)
                .hint("the program is run without a shell; name it with its full path")
        })?;
    let stdout = child.stdout.take().ok_or_else(|| Error::internal("a piped child has no standard output"))?;
    let reader = std::thread::spawn(move || {
        let mut value = Vec::new();
        stdout.take(SECRET_BYTES_MAX + 1).read_to_end(&mut value).map(|_| value)
    });
    let status = wait(&mut child, program)?;
    let value = reader
        .join()
        .map_err(|_| Error::internal("the thread that reads a secret panicked"))?
        .or_io(|| format!("cannot read what `{program}` prints"))?;
    if !status.success() {
        return Err(Error::new(Kind::Config, format!("the secret command `{program}` failed: {status}"))
            .hint("run it by hand to see why; its output is never shown here"));
    }
    text(value, &format!("what the secret command `{program}` prints"))
}

fn wait(child: &mut std::process::Child, program: &str) -> Result<std::process::ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().or_io(|| format!("cannot wait for `{program}`"))? {
            return Ok(status);
        }
        if begin.elapsed() > Duration::from_secs(COMMAND_SECONDS_MAX) {
            child.kill().or_io(|| format!("cannot stop `{program}`"))?;
            child.wait().or_io(|| format!("cannot wait for `{program}`"))?;
            return Err(Error::new(
                Kind::TimedOut,
                format!("the secret command `{program}` took longer than {COMMAND_SECONDS_MAX} s"),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn text(value: Vec<u8>, what: &str) -> Result<String> {
    if value.len() as u64 > SECRET_BYTES_MAX {
        return Err(Error::new(Kind::Config, format!("{what} is longer than {SECRET_BYTES_MAX} bytes")));
    }
    // The error of `from_utf8` would hold the bytes; it is dropped on purpose.
    String::from_utf8(value).map_err(|_| Error::new(Kind::Config, format!("{what} is not valid UTF-8")))
}

/// Splits a command line at spaces; single and double quotes keep words together. No shell, no
/// variables, no escapes.
pub(crate) fn split(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(Error::new(Kind::Config, "a quote in the command is not closed"));
    }
    words.extend(word);
    Ok(words)
}

impl fmt::Display for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secrets relative to {}", self.folder.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str) -> Result<String> {
        Secrets::new("/").resolve(&Secret(text.to_owned()))
    }

    #[test]
    fn plain_text_is_refused_and_never_repeated() {
        for plain in ["hunter2", "https://hunter2", "env:", "env:HUNTER2=hunter2 x"] {
            let error = resolve(plain).expect_err("refused");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
            assert!(error.hint_text().is_some_and(|hint| hint.contains("env:NAME")));
        }
    }

    #[test]
    fn files_and_commands_are_trimmed_and_errors_keep_quiet() {
        let folder = tempfile::tempdir().expect("temp");
        std::fs::write(folder.path().join("pass"), "  s3cret\n").expect("write");
        let secrets = Secrets::new(folder.path());
        assert_eq!(secrets.resolve(&Secret("file:pass".into())).expect("value"), "s3cret");
        assert_eq!(resolve("command:printf '%s\n' 's3 cret'").expect("value"), "s3 cret");
        let failed = resolve("command:sh -c 'echo s3cret; echo s3cret >&2; exit 3'").expect_err("fails");
        assert!(!format!("{failed:?}").contains("s3cret"), "{failed:?}");
        assert!(resolve("command:true").expect_err("empty").message().contains("empty"));
        let absent = resolve("env:STILLPOINT_SURELY_NOT_SET").expect_err("absent");
        assert_eq!(absent.kind(), Kind::Config);
    }

    #[test]
    fn command_lines_split_without_a_shell() {
        assert_eq!(split("a 'b c' \"d\"e ''").expect("valid"), ["a", "b c", "de", ""]);
        assert!(split("a 'b").is_err());
        assert_eq!(resolve("command:echo $HOME").expect("value"), "$HOME");
    }
}
