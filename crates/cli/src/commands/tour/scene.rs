//! The tour's scene: platform, configuration, bucket, writer, and what is done to them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_engine::config::{self, Config};
use stillpoint_engine::effects::Surroundings;
use stillpoint_engine::open::Session;
use stillpoint_engine::ops::backup::{self, BackupOutcome, BackupRequest};
use stillpoint_engine::ops::init::{self, InitRequest};
use stillpoint_engine::progress::Silent;

use super::platform::{self, BRANCH, Places, SEEDED};
use super::proof::Write;
use crate::app::App;
use crate::render;

/// How long the writer may take to begin and to end.
const WRITER_WITHIN: Duration = Duration::from_secs(20);

/// Everything the tour works with.
pub struct Scene {
    /// The original.
    pub source: Places,
    /// The copy.
    pub restored: Places,
    /// The configuration, read back from the file.
    pub config: Config,
    /// Where all of it lies.
    pub folder: PathBuf,
    writer: Writer,
}

struct Writer {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Closing its input ends it; killing makes sure, also when the tour fails half-way.
        drop(self.child.stdin.take());
        if matches!(self.child.try_wait(), Ok(None)) && self.child.kill().is_ok() {
            // Reaped, or gone already; nobody waits for it any more.
            let _reaped = self.child.wait();
        }
    }
}

impl Scene {
    /// Makes platform, configuration and bucket, and starts the writer.
    pub fn create(folder: &Path) -> Result<Self> {
        let original = folder.join("platform");
        let rehearsal = folder.join("rehearsal");
        for folder in [&original, &rehearsal] {
            std::fs::create_dir_all(folder).or_io(|| format!("cannot create `{}`", folder.display()))?;
        }
        let (source, restored) = (Places::below(&original), Places::below(&rehearsal));
        platform::create(&source)?;
        let (writer, port) = Writer::start(&original)?;
        let file = folder.join(config::FILE_NAME);
        let text = platform_yaml(folder, &source, &restored, port);
        std::fs::write(&file, text).or_io(|| format!("cannot write `{}`", file.display()))?;
        init::run(&InitRequest { file: file.clone(), ..InitRequest::default() })?;
        let config = config::load(&file)?;
        Ok(Self { source, restored, config, folder: folder.to_owned(), writer })
    }

    /// Lets the writer work for a while.
    pub fn write_for(&mut self, time: Duration) -> Result<()> {
        std::thread::sleep(time);
        match self.writer.child.try_wait().or_io(|| "cannot look after the writer".to_owned())? {
            None => Ok(()),
            Some(status) => Err(Error::internal(format!("the tour's writer ended too early: {status}"))),
        }
    }

    /// The state of this machine that belongs to the tour, so that a user's own stays untouched.
    pub fn surroundings(&self) -> Result<Surroundings> {
        let mut surroundings = Surroundings::of_this_machine()?;
        surroundings.progress = std::sync::Arc::new(Silent);
        surroundings.state_folder = self.folder.join("state");
        Ok(surroundings)
    }

    /// Takes a point, exactly as `stillpoint backup` does.
    pub fn backup(&self, app: &App) -> Result<BackupOutcome> {
        let mut request = BackupRequest::new(Session::open(&self.config)?)?;
        request.surroundings = self.surroundings()?;
        request.cancel = app.cancel.clone();
        app.block_on(backup::backup(request))
    }

    /// Ends the writer and returns what it said: the log of begun and acknowledged writes.
    pub fn stop_writer(&mut self) -> Result<Vec<Write>> {
        drop(self.writer.child.stdin.take());
        let begin = Instant::now();
        let mut writes: Vec<Write> = Vec::new();
        loop {
            let left = WRITER_WITHIN.saturating_sub(begin.elapsed());
            match self.writer.lines.recv_timeout(left) {
                Ok(line) => note_write(&mut writes, &line)?,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(Error::new(Kind::TimedOut, "the tour's writer does not end"));
                }
            }
        }
        let status = self.writer.child.wait().or_io(|| "cannot wait for the tour's writer".to_owned())?;
        if !status.success() || writes.is_empty() {
            return Err(Error::internal(format!("the tour's writer failed: {status}, {} writes", writes.len())));
        }
        Ok(writes)
    }

    /// Damages the original as operators have seen it happen: every second row and object is gone,
    /// and the branch of the repository too.
    pub fn damage(&self) -> Result<String> {
        let registry = platform::open_registry(&self.source.registry)?;
        let rows = registry
            .execute("DELETE FROM models WHERE id % 2 = 0", [])
            .map_err(|error| platform::sqlite_error("cannot damage the registry", error))?;
        let mut objects = 0;
        for model in (1..=SEEDED).filter(|model| model % 2 == 1) {
            let path = self.source.objects.join(platform::object_key(model));
            std::fs::remove_file(&path).or_io(|| format!("cannot remove `{}`", path.display()))?;
            objects += 1;
        }
        platform::git(&self.source.code, &["update-ref", "-d", BRANCH], "")?;
        Ok(format!(
            "{} deleted, {} deleted, the only branch of the repository removed",
            render::plural(rows as u64, "row", "rows"),
            render::plural(objects, "object", "objects"),
        ))
    }
}

/// Reads `begun MODEL TIME` and `done MODEL TIME`.
fn note_write(writes: &mut Vec<Write>, line: &str) -> Result<()> {
    let strange = || Error::internal(format!("the tour's writer said `{line}`"));
    let mut words = line.split_whitespace();
    let (what, model, time) = (words.next(), words.next(), words.next());
    let model: u64 = model.and_then(|word| word.parse().ok()).ok_or_else(strange)?;
    let time: i128 = time.and_then(|word| word.parse().ok()).ok_or_else(strange)?;
    match what {
        Some("begun") => writes.push(Write { model, begun: time, done: None }),
        Some("done") => {
            let write = writes.last_mut().filter(|write| write.model == model).ok_or_else(strange)?;
            write.done = Some(time);
        }
        _ => return Err(strange()),
    }
    Ok(())
}

impl Writer {
    /// Starts this program again as the writer, and returns the port of its pause.
    fn start(platform: &Path) -> Result<(Self, u16)> {
        let program = std::env::current_exe().or_io(|| "cannot tell which program this is".to_owned())?;
        let mut child = Command::new(program)
            .arg("__tour-writer")
            .arg(platform)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .or_io(|| "cannot start the tour's writer".to_owned())?;
        let stdout = child.stdout.take().ok_or_else(|| Error::internal("a piped child has no standard output"))?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let writer = Self { child, lines };
        let first = writer.lines.recv_timeout(WRITER_WITHIN).unwrap_or_default();
        let port = first.strip_prefix("port ").and_then(|port| port.parse().ok());
        let port = port.ok_or_else(|| Error::internal("the tour's writer does not begin"))?;
        Ok((writer, port))
    }
}

/// The scratch platform as an operator would describe it.
fn platform_yaml(folder: &Path, source: &Places, restored: &Places, port: u16) -> String {
    let store = |places: &Places, indent: &str| {
        let Places { registry, objects, code } = places;
        format!(
            "{indent}registry: {{ path: {} }}\n{indent}objects: {{ path: {} }}\n{indent}code: {{ path: {} }}\n",
            quoted(registry),
            quoted(objects),
            quoted(code)
        )
    };
    let with_driver = store(source, "  ")
        .replacen("registry: {", "registry: { driver: sqlite,", 1)
        .replacen("objects: {", "objects: { driver: objects,", 1)
        .replacen("code: {", "code: { driver: git,", 1);
    format!(
        "apiVersion: stillpoint.dev/v1\n\
         platform: tour\n\
         environment: original\n\
         bucket: {{ url: {bucket}, key: \"file:stillpoint.key\" }}\n\
         stores:\n{with_driver}\
         cut: {{ level: strict, optimisticTries: 2, pauseBudget: 5s }}\n\
         pause:\n\
         \x20 - kind: http\n\
         \x20   pause: {{ url: \"http://127.0.0.1:{port}/pause\" }}\n\
         \x20   resume: {{ url: \"http://127.0.0.1:{port}/resume\" }}\n\
         references:\n\
         \x20 - {{ from: registry, query: \"SELECT object_key, id FROM models\", to: objects, kind: keys }}\n\
         \x20 - {{ from: registry, query: \"SELECT commit_id, id FROM models\", to: code, kind: commits }}\n\
         targets:\n\
         \x20 rehearsal:\n\
         \x20   stores:\n{target}\
         \x20 # A mistake that the fence must find: the stores of the original under another name.\n\
         \x20 mistake:\n\
         \x20   stores:\n{mistake}",
        bucket = quoted(&folder.join("bucket")),
        target = store(restored, "      "),
        mistake = store(source, "      "),
    )
}

/// A path as a JSON text, which is a YAML text too.
fn quoted(path: &Path) -> String {
    serde_json::Value::String(path.display().to_string()).to_string()
}
