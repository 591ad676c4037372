//! The server's own programs, `pg_dump`, `pg_dumpall` and `pg_restore`: found, checked, and run.
//!
//! Apart from the phases, so that one page shows what a child process is told: the connection by
//! environment, the password by a file that only we may read, nothing secret in its arguments. Says
//! nothing of what the programs are asked to do.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::config::{Settings, Tls};
use super::session::{Address, Endpoint};

/// How often a running program is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a program that is asked to end may take.
const ENDED_WITHIN: Duration = Duration::from_secs(2);

/// Variables of libpq that would change what we say: whoever started us may have set them.
const FOREIGN_VARIABLES: &[&str] = &[
    "PGHOSTADDR",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGOPTIONS",
    "PGREQUIREAUTH",
    "PGCHANNELBINDING",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGSSLCRL",
    "PGTARGETSESSIONATTRS",
    "PGLOADBALANCEHOSTS",
    "PGPASSWORD",
    "PGCLIENTENCODING",
    "PGTZ",
    "PGDATESTYLE",
    "PGGEQO",
    "PG_COLOR",
];

/// A folder of programs of one version, and the server that they are to talk to.
pub(super) struct Tools {
    folder: PathBuf,
    /// Their major version.
    pub(super) major: u32,
    variables: BTreeMap<&'static str, std::ffi::OsString>,
    /// Gone with this value.
    _password: Option<tempfile::TempPath>,
}

impl std::fmt::Debug for Tools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tools").field("folder", &self.folder).field("major", &self.major).finish_non_exhaustive()
    }
}

impl Tools {
    /// Finds the programs of major version `least`, or else of the next newer one: older ones refuse the
    /// server, newer ones may write what it cannot read. `scratch` takes the password's file, which lives as long as the value.
    pub(super) fn find(settings: &Settings, endpoint: &Endpoint, scratch: &Path, least: u32) -> Result<Self> {
        let installed = installed(settings);
        let chosen = installed.iter().find(|(major, _)| *major >= least);
        let (major, folder) = chosen.ok_or_else(|| missing(settings, &installed, least))?.clone();
        let password = endpoint.password.as_deref().map(|password| password_file(scratch, password)).transpose()?;
        let variables = variables(settings, endpoint, password.as_deref());
        Ok(Self { folder, major, variables, _password: password })
    }

    /// A program that will talk to `database` of the server.
    pub(super) fn command(&self, program: &str, database: &str) -> Command {
        let mut command = self.offline(program);
        command.envs(&self.variables).env("PGDATABASE", database);
        command
    }

    /// A program that talks to no server.
    pub(super) fn offline(&self, program: &str) -> Command {
        let mut command = Command::new(self.folder.join(program));
        for name in FOREIGN_VARIABLES {
            command.env_remove(name);
        }
        // Its messages are read here, not only by people.
        command.env("LC_ALL", "C").env("PGAPPNAME", "stillpoint");
        command
    }
}

/// The connection as libpq wants it.
fn variables(
    settings: &Settings,
    endpoint: &Endpoint,
    password: Option<&Path>,
) -> BTreeMap<&'static str, std::ffi::OsString> {
    let mut all: BTreeMap<&'static str, std::ffi::OsString> = BTreeMap::new();
    match &endpoint.address {
        Address::Tcp { host, port } => {
            all.insert("PGHOST", host.into());
            all.insert("PGPORT", port.to_string().into());
        }
        Address::Unix { folder, port } => {
            all.insert("PGHOST", folder.into());
            all.insert("PGPORT", port.to_string().into());
        }
    }
    all.insert("PGUSER", (&endpoint.user).into());
    all.insert("PGCONNECT_TIMEOUT", settings.connect_time_max().as_secs().max(2).to_string().into());
    // A file that does not exist: else the one in the home folder would be asked.
    all.insert("PGPASSFILE", password.unwrap_or(Path::new("/nonexistent/pgpass")).into());
    let mode = match settings.tls() {
        Tls::Disable => "disable",
        Tls::Prefer => "prefer",
        Tls::Require => "require",
        Tls::VerifyFull => "verify-full",
    };
    all.insert("PGSSLMODE", mode.into());
    let of_system = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
    let authorities =
        settings.ca_file.clone().or_else(|| of_system.iter().map(PathBuf::from).find(|path| path.exists()));
    if let (Tls::VerifyFull, Some(path)) = (settings.tls(), authorities) {
        all.insert("PGSSLROOTCERT", path.into());
    }
    all
}

/// Writes what libpq reads a password from.
fn password_file(scratch: &Path, password: &str) -> Result<tempfile::TempPath> {
    let what = || format!("cannot write the password for the server's programs into {}", scratch.display());
    std::fs::create_dir_all(scratch).or_io(what)?;
    let path = tempfile::Builder::new()
        .prefix("pgpass-")
        .make_in(scratch, |path| std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path))
        .or_io(what)?;
    let (mut file, path) = path.into_parts();
    let escaped = password.replace('\\', "\\\\").replace(':', "\\:");
    writeln!(file, "*:*:*:*:{escaped}").or_io(what)?;
    Ok(path)
}

/// The folders that hold the programs, by version, the oldest first.
fn installed(settings: &Settings) -> Vec<(u32, PathBuf)> {
    let mut folders: Vec<PathBuf> = match &settings.tools {
        Some(folder) => vec![folder.clone()],
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
            // Where Debian and the packages of the project put each version; PATH has wrappers for one.
            for (home, end) in [("/usr/lib/postgresql", "bin"), ("/usr", "bin"), ("/opt", "bin")] {
                let entries = std::fs::read_dir(home).into_iter().flatten().flatten();
                let versions = entries.filter(|entry| {
                    home.ends_with("postgresql") || entry.file_name().to_string_lossy().starts_with("pgsql")
                });
                folders.extend(versions.map(|entry| entry.path().join(end)));
            }
            folders
        }
    };
    folders.retain(|folder| folder.join("pg_dump").is_file() && folder.join("pg_restore").is_file());
    let mut found: Vec<(u32, PathBuf)> =
        folders.into_iter().filter_map(|folder| Some((major_of(&folder.join("pg_dump"))?, folder))).collect();
    found.sort();
    found
}

/// What `pg_dump --version` says: `pg_dump (PostgreSQL) 15.18 (Debian …)`.
fn major_of(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    major_in(&String::from_utf8_lossy(&output.stdout))
}

/// The major version in what a program says of itself.
pub(super) fn major_in(text: &str) -> Option<u32> {
    let after = text.split_once("(PostgreSQL) ")?.1;
    after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn missing(settings: &Settings, installed: &[(u32, PathBuf)], least: u32) -> Error {
    let hint =
        format!("install postgresql-client-{least} or newer, or name the folder of its programs: tools: /path/bin");
    let seen: Vec<String> =
        installed.iter().map(|(major, folder)| format!("{major} in {}", folder.display())).collect();
    match (installed.is_empty(), &settings.tools) {
        (true, Some(folder)) => {
            Error::new(Kind::NotFound, format!("there is no working pg_dump in {}", folder.display())).hint(hint)
        }
        (true, None) => Error::new(Kind::NotFound, "pg_dump and pg_restore are not installed").hint(hint),
        (false, _) => Error::new(Kind::Unsupported, format!("pg_dump is older than version {least}"))
            .context("found", seen.join(", "))
            .hint(hint),
    }
}

/// Runs a program to its end; what it wrote comes back whole. Killed when someone asks to stop.
pub(super) fn run(command: &mut Command, context: &Context) -> Result<Output> {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: what it starts itself must end with it.
        .process_group(0)
        .spawn()
        .or_io(|| format!("cannot start {name}"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        // Both at once: a full pipe that nobody reads stops the program.
        let stdout = scope.spawn(move || read_all(stdout));
        let stderr = scope.spawn(move || read_all(stderr));
        let status = wait(&mut child, context, &name);
        let died = |_| Error::internal("a thread that reads a program's output died");
        let stdout = stdout.join().map_err(died)?.or_io(|| format!("cannot read what {name} says"))?;
        let stderr = stderr.join().map_err(died)?.or_io(|| format!("cannot read what {name} says"))?;
        Ok(Output { status: status?, stdout, stderr })
    })
}

fn wait(child: &mut Child, context: &Context, name: &str) -> Result<std::process::ExitStatus> {
    let outcome = loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => break Error::io(format!("cannot wait for {name}"), error),
        }
        if let Err(stop) = context.check() {
            break stop;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    end(child);
    Err(outcome)
}

/// Ends a program and what it started: first by asking, so that it tells the server to stop as well.
fn end(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let signal = |signal| group.is_some_and(|group| kill_process_group(group, signal).is_ok());
    let asked = std::time::Instant::now();
    signal(Signal::TERM);
    while asked.elapsed() < ENDED_WITHIN && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(LOOK_EVERY);
    }
    // Also when the program itself is gone: others of its group may hold its output open.
    signal(Signal::KILL);
    drop(child.wait());
}

fn read_all(pipe: Option<impl Read>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: serde_json::Value) -> Settings {
        let mut all = serde_json::json!({ "host": "127.0.0.1", "user": "backup" });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    fn endpoint() -> Endpoint {
        Endpoint {
            address: Address::Tcp { host: "127.0.0.1".to_owned(), port: 5433 },
            user: "backup".to_owned(),
            password: Some("a:b\\c".to_owned()),
            tls: None,
            tls_required: false,
            connect_time_max: Duration::from_secs(5),
        }
    }

    /// Programs that say they are of this version.
    fn pretend(folder: &Path, version: &str) {
        std::fs::create_dir_all(folder).unwrap();
        for name in ["pg_dump", "pg_restore"] {
            let text = format!("#!/bin/sh\necho \"{name} (PostgreSQL) {version}\"\n");
            std::fs::write(folder.join(name), text).unwrap();
            std::fs::set_permissions(folder.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn programs_that_are_absent_or_too_old_are_refused_with_what_helps() {
        let home = tempfile::tempdir().unwrap();
        let settings = settings(serde_json::json!({ "tools": home.path().join("bin") }));
        let find = |least| Tools::find(&settings, &endpoint(), home.path(), least);
        let absent = find(15).unwrap_err();
        assert_eq!(absent.kind(), Kind::NotFound);
        assert!(absent.hint_text().unwrap().contains("postgresql-client-15"), "{absent:?}");
        pretend(&home.path().join("bin"), "14.2 (Debian 14.2-1)");
        let old = find(15).unwrap_err();
        assert_eq!(old.kind(), Kind::Unsupported);
        assert!(old.to_string().contains("found 14 in"), "{old}");
        assert_eq!(find(13).unwrap().major, 14);
    }

    #[test]
    fn a_program_is_told_the_server_but_no_secret() {
        let home = tempfile::tempdir().unwrap();
        pretend(&home.path().join("bin"), "18beta1");
        let settings = settings(serde_json::json!({ "tools": home.path().join("bin") }));
        let tools = Tools::find(&settings, &endpoint(), home.path(), 18).unwrap();
        let command = tools.command("pg_dump", "app");
        let shown = format!("{command:?}");
        assert!(!shown.contains("a:b"), "{shown}");
        let variable = |name: &str| {
            command.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value).unwrap().to_owned()
        };
        assert_eq!((variable("PGPORT"), variable("PGDATABASE")), ("5433".into(), "app".into()));
        let path = PathBuf::from(variable("PGPASSFILE"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "*:*:*:*:a\\:b\\\\c\n");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        drop(tools);
        assert!(!path.exists());
    }

    #[test]
    fn a_program_can_be_stopped_and_may_say_much() {
        let output = run(
            Command::new("sh").arg("-c").arg("head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2"),
            &Context::default(),
        );
        let output = output.unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (300_000, 300_000));
        let context = Context::default();
        context.cancel();
        // The shell's own child holds the pipe, too.
        let stopped = run(Command::new("sh").arg("-c").arg("sleep 600; true"), &context).unwrap_err();
        assert_eq!(stopped.kind(), Kind::Cancelled);
        assert_eq!(major_in("pg_dump (PostgreSQL) 15.18 (Debian)"), Some(15));
    }
}
