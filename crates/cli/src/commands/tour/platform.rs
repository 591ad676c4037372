//! The scratch platform of the tour: a registry, a folder of objects, a repository of code.
//!
//! Everything is made from the number of a model, so that the proof can compute what must be
//! there without asking anyone. Shared by the tour and by its writer, which is another process.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rusqlite::Connection;
use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

/// Models that are there before the writer begins.
pub const SEEDED: u64 = 400;

/// Sizes of an object, in bytes.
const OBJECT_BYTES: std::ops::Range<usize> = 8 << 10..120 << 10;

/// The branch that every commit is on.
pub const BRANCH: &str = "refs/heads/main";

/// Where the three stores of one environment lie.
#[derive(Debug, Clone)]
pub struct Places {
    /// The SQLite database.
    pub registry: PathBuf,
    /// The folder of objects.
    pub objects: PathBuf,
    /// The bare git repository.
    pub code: PathBuf,
}

impl Places {
    /// The usual names below `folder`.
    pub fn below(folder: &Path) -> Self {
        Self { registry: folder.join("registry.db"), objects: folder.join("objects"), code: folder.join("code.git") }
    }

    /// Where objects are written before they are renamed into place; outside of the store.
    pub fn incoming(&self) -> PathBuf {
        self.objects.with_file_name("incoming")
    }
}

/// The key of a model's object.
pub fn object_key(model: u64) -> String {
    format!("models/{:03}/weights-{model:06}.bin", model % 100)
}

/// The bytes of a model's object: half text-like, half noise, the same every time.
pub fn object_bytes(model: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(model);
    let length = random.usize(OBJECT_BYTES);
    let mut bytes = format!("model {model}\n").repeat(length / 24).into_bytes();
    while bytes.len() < length {
        bytes.extend_from_slice(&random.u64(..).to_le_bytes());
    }
    bytes
}

/// The SHA-256 of a model's object, hex.
pub fn object_hash(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// What a model's commit says.
pub fn commit_subject(model: u64) -> String {
    format!("train model {model}")
}

/// The file that a model's commit holds.
pub fn commit_content(model: u64) -> String {
    format!("seed = {model}\nepochs = {}\n", 10 + model % 90)
}

/// Makes the platform with its first models.
pub fn create(places: &Places) -> Result<()> {
    for folder in [&places.objects, &places.incoming()] {
        std::fs::create_dir_all(folder).or_io(|| format!("cannot create `{}`", folder.display()))?;
    }
    for model in 1..=SEEDED {
        write_object(places, model)?;
    }
    let commits = seed_code(places)?;
    let mut registry = open_registry(&places.registry)?;
    let failed = |error| sqlite_error("cannot fill the registry", error);
    registry
        .execute_batch(
            "CREATE TABLE models (id INTEGER PRIMARY KEY, object_key TEXT NOT NULL, sha256 TEXT NOT NULL, \
             commit_id TEXT NOT NULL)",
        )
        .map_err(failed)?;
    let transaction = registry.transaction().map_err(failed)?;
    for (model, commit) in (1..=SEEDED).zip(&commits) {
        insert_row(&transaction, model, commit)?;
    }
    transaction.commit().map_err(failed)
}

/// Opens the registry in WAL mode.
pub fn open_registry(path: &Path) -> Result<Connection> {
    let open = || {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        Ok(connection)
    };
    open().map_err(|error| sqlite_error("cannot open the registry", error))
}

/// Adds a model's row.
pub fn insert_row(registry: &Connection, model: u64, commit: &str) -> Result<()> {
    let hash = object_hash(&object_bytes(model));
    registry
        .prepare_cached("INSERT INTO models VALUES (?1, ?2, ?3, ?4)")
        .and_then(|mut insert| insert.execute((model as i64, object_key(model), hash, commit)))
        .map_err(|error| sqlite_error("cannot add a row to the registry", error))?;
    Ok(())
}

/// Writes a model's object beside the store and renames it in, as a careful writer does.
pub fn write_object(places: &Places, model: u64) -> Result<()> {
    let target = places.objects.join(object_key(model));
    let beside = places.incoming().join(model.to_string());
    let folder = target.parent().unwrap_or(&places.objects);
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&beside, object_bytes(model)))
        .and_then(|()| std::fs::rename(&beside, &target))
        .or_io(|| format!("cannot write `{}`", target.display()))
}

/// Adds a model's commit with git's own commands and returns its id.
pub fn write_commit(places: &Places, model: u64, parent: &str) -> Result<String> {
    let blob = git(&places.code, &["hash-object", "-w", "--stdin"], &commit_content(model))?;
    let tree = git(&places.code, &["mktree"], &format!("100644 blob {blob}\ttrain.toml\n"))?;
    let subject = commit_subject(model);
    let commit = git(&places.code, &["commit-tree", &tree, "-p", parent, "-m", &subject], "")?;
    git(&places.code, &["update-ref", BRANCH, &commit, parent], "")?;
    Ok(commit)
}

/// The commit that the branch is at.
pub fn head(places: &Places) -> Result<String> {
    git(&places.code, &["rev-parse", BRANCH], "")
}

fn seed_code(places: &Places) -> Result<Vec<String>> {
    std::fs::create_dir_all(&places.code).or_io(|| format!("cannot create `{}`", places.code.display()))?;
    git(&places.code, &["init", "--quiet", "--bare", "."], "")?;
    let mut stream = String::new();
    let failed = |_| Error::internal("writing to a text failed");
    for model in 1..=SEEDED {
        let (subject, content) = (commit_subject(model), commit_content(model));
        write!(
            stream,
            "commit {BRANCH}\nmark :{model}\ncommitter Tour <tour@example.invalid> {} +0000\ndata {}\n{subject}\n\
             M 100644 inline train.toml\ndata {}\n{content}\n",
            1_700_000_000 + model,
            subject.len(),
            content.len()
        )
        .map_err(failed)?;
    }
    git(&places.code, &["fast-import", "--quiet", "--export-marks=marks"], &stream)?;
    let path = places.code.join("marks");
    let marks = std::fs::read_to_string(&path).or_io(|| "cannot read what git imported".to_owned())?;
    std::fs::remove_file(&path).or_io(|| "cannot remove git's list of marks".to_owned())?;
    let mut commits: Vec<(u64, String)> = marks
        .lines()
        .filter_map(|line| line.strip_prefix(':')?.split_once(' '))
        .filter_map(|(mark, commit)| Some((mark.parse().ok()?, commit.to_owned())))
        .collect();
    commits.sort();
    if commits.len() as u64 != SEEDED {
        return Err(Error::internal("git imported another number of commits"));
    }
    Ok(commits.into_iter().map(|(_, commit)| commit).collect())
}

/// Runs git in the bare repository `code`, away from the user's own configuration.
pub fn git(code: &Path, arguments: &[&str], input: &str) -> Result<String> {
    let name = arguments.first().copied().unwrap_or_default();
    let mut child = Command::new("git")
        .args(arguments)
        .current_dir(code)
        .env("GIT_DIR", ".")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .envs(["AUTHOR", "COMMITTER"].map(|who| (format!("GIT_{who}_NAME"), "Tour")))
        .envs(["AUTHOR", "COMMITTER"].map(|who| (format!("GIT_{who}_EMAIL"), "tour@example.invalid")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io("cannot run git", error).hint("the tour needs git on PATH"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).or_io(|| format!("cannot talk to git {name}"))?;
    }
    let output = child.wait_with_output().or_io(|| format!("cannot wait for git {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::new(Kind::Io, format!("git {name} failed: {said}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// An error of SQLite as one of ours.
pub fn sqlite_error(message: &str, error: rusqlite::Error) -> Error {
    Error::new(Kind::Io, message).source(error)
}
