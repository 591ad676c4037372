//! The only I/O on repositories: finds them, reads their refs from files, and calls git.
//!
//! Refs are read without git, because a cut of thousands of repositories must not start thousands
//! of programs. Git is called for what it alone should do: packing, indexing, walking history. It
//! is called so that nothing in the environment, in the user's configuration or in a repository's
//! hooks can change what it does, and so that it never asks anyone.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::wire::{self, Refs, Target};

/// A lock file of this age was left by a program that died; it stands for no update in progress.
const LOCK_AGE_MAX: Duration = Duration::from_secs(60);
/// A directory that changed so shortly before it was read may change again without its time telling:
/// clocks of file systems tick every few milliseconds.
const SETTLED_AFTER: Duration = Duration::from_millis(100);
/// How often reading refs is tried while someone updates them.
const READ_TRIES: u32 = 50;
const READ_PAUSE: Duration = Duration::from_millis(10);

/// One repository of the store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Repository {
    /// Where it lies within the store, `.` for the store itself. A working tree's path names the
    /// tree, not its `.git`.
    pub(super) path: Vec<u8>,
    /// The directory that holds `HEAD`, `refs` and `objects`.
    pub(super) git_dir: PathBuf,
    /// Whether `git_dir` is the `.git` of a working tree.
    pub(super) working_tree: bool,
}

/// What a repository's refs were at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) refs: Refs,
    /// Changes with every update, also with one that is taken back.
    pub(super) freshness: [u8; 32],
}

/// Finds the repositories at and below `root`, sorted by path.
pub(super) fn discover(root: &Path) -> Result<Vec<Repository>> {
    let metadata = std::fs::metadata(root).or_io(|| format!("cannot open {}", root.display()))?;
    if !metadata.is_dir() {
        return Err(Error::new(Kind::Config, format!("{} is not a directory", root.display())));
    }
    let mut found = Vec::new();
    walk(root, root, &mut found)?;
    found.sort();
    Ok(found)
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<Repository>) -> Result<()> {
    let inner = folder.join(".git");
    let (git_dir, working_tree) = if is_git_dir(folder) {
        (folder.to_owned(), false)
    } else if is_git_dir(&inner) {
        (inner, true)
    } else {
        return walk_below(root, folder, found);
    };
    let relative = folder.strip_prefix(root).unwrap_or(folder).as_os_str().as_bytes();
    let path = if relative.is_empty() { b".".to_vec() } else { relative.to_vec() };
    // Submodules keep their repositories here.
    let modules = git_dir.join("modules");
    found.push(Repository { path, git_dir, working_tree });
    if modules.is_dir() { walk_below(root, &modules, found) } else { Ok(()) }
}

fn walk_below(root: &Path, folder: &Path, found: &mut Vec<Repository>) -> Result<()> {
    for entry in std::fs::read_dir(folder).or_io(|| format!("cannot list {}", folder.display()))? {
        let entry = entry.or_io(|| format!("cannot list {}", folder.display()))?;
        // Links are not followed: they may lead out, or in circles.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(root, &entry.path(), found)?;
        }
    }
    Ok(())
}

/// Whether git would take the directory for a repository.
pub(super) fn is_git_dir(path: &Path) -> bool {
    path.join("objects").is_dir()
        && (path.join("refs").is_dir() || path.join("reftable").is_dir())
        && path.join("HEAD").symlink_metadata().is_ok()
}

/// A file's content, or `None` if there is none.
pub(super) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
    }
}

/// The repository's own configuration file as text.
pub(super) fn config_text(repository: &Repository) -> Result<String> {
    Ok(String::from_utf8_lossy(&read_optional(&repository.git_dir.join("config"))?.unwrap_or_default()).into_owned())
}

/// Reads all refs so that they are those of one moment: nobody was updating them, and two readings
/// agree. Updates wait for nobody; the reading is what is repeated.
pub(super) fn read_refs(repository: &Repository) -> Result<Seen> {
    if repository.git_dir.join("reftable").is_dir() {
        return read_refs_by_git(repository);
    }
    for _ in 0..READ_TRIES {
        let before = Reading::take(&repository.git_dir, None)?;
        let after = Reading::take(&repository.git_dir, None)?;
        if before.seen == after.seen && !before.locked && !after.locked {
            return Ok(after.seen);
        }
        std::thread::sleep(READ_PAUSE);
    }
    Err(Error::new(Kind::Conflict, format!("refs of {} are updated all the time", repository.git_dir.display()))
        .temporary()
        .hint("declare a pause step that holds pushes back"))
}

/// Reads all refs once, whatever happens meanwhile: enough to tell whether anything was updated.
/// Directories of refs that did not change since they were read are not read again.
pub(super) fn glance(repository: &Repository, known: &Known) -> Result<Seen> {
    if repository.git_dir.join("reftable").is_dir() {
        return read_refs_by_git(repository);
    }
    Ok(Reading::take(&repository.git_dir, Some(known))?.seen)
}

/// One pass over the files that hold refs.
struct Reading {
    seen: Seen,
    /// Whether some program is updating refs right now.
    locked: bool,
}

impl Reading {
    fn take(git_dir: &Path, known: Option<&Known>) -> Result<Self> {
        let mut freshness = Sha256::new();
        let mut locked = false;
        let mut refs = Refs::default();
        let packed = git_dir.join("packed-refs");
        // Packed first, loose over it: what is packed meanwhile shows in the second reading.
        if let Some(text) = read_optional(&packed)? {
            mark(&packed, &mut freshness);
            for (name, id) in wire::parse_packed(&text).map_err(|e| e.context("in", packed.display()))? {
                refs.0.insert(name, Target::Object(id));
            }
        }
        locked |= is_fresh_lock(&git_dir.join("packed-refs.lock")) || is_fresh_lock(&git_dir.join("HEAD.lock"));
        loose(git_dir, "refs", known, &mut |folder| {
            refs.0.extend(folder.refs.iter().cloned());
            freshness.update(folder.digest);
            locked |= folder.locked;
        })?;
        let head = git_dir.join("HEAD");
        let target = match std::fs::read_link(&head) {
            Ok(link) => Some(Target::Symbolic(link.to_string_lossy().into_owned())),
            Err(_) => read_optional(&head)?.as_deref().and_then(wire::parse_loose),
        };
        mark(&head, &mut freshness);
        let target = target.ok_or_else(|| Error::new(Kind::Corrupt, format!("{} is no HEAD", head.display())))?;
        refs.0.insert("HEAD".to_owned(), target);
        Ok(Self { seen: Seen { refs, freshness: freshness.finalize().into() }, locked })
    }
}

/// Directories of refs as they were read last.
///
/// Git puts every new value in place by a rename, which changes the directory's time. So a directory
/// whose time is the same, and lay back far enough when it was read, holds the same.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<PathBuf, Arc<Folder>>>);

/// One directory of loose refs, without those below it.
#[derive(Debug)]
struct Folder {
    /// Inode and times of the directory before it was read.
    stamp: [i64; 5],
    /// Whether the times were old enough to tell every later change.
    settled: bool,
    refs: Vec<(String, Target)>,
    folders: Vec<String>,
    digest: [u8; 32],
    locked: bool,
}

/// Shows the directory `prefix` and all below it, in a fixed order.
fn loose(git_dir: &Path, prefix: &str, known: Option<&Known>, show: &mut dyn FnMut(&Folder)) -> Result<()> {
    let path = git_dir.join(prefix);
    let found = match std::fs::symlink_metadata(&path) {
        Ok(found) => found,
        // Git removes directories that became empty.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
    };
    let stamp = [found.ino().cast_signed(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
    let remembered = known.and_then(|known| {
        let folders = known.0.lock().unwrap_or_else(PoisonError::into_inner);
        folders.get(&path).filter(|folder| folder.settled && !folder.locked && folder.stamp == stamp).cloned()
    });
    let folder = match remembered {
        Some(folder) => folder,
        None => {
            let age = found.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            let settled = age.is_some_and(|age| age > SETTLED_AFTER);
            let Some(folder) = read_folder(&path, prefix, stamp, settled)? else { return Ok(()) };
            let folder = Arc::new(folder);
            if let Some(known) = known {
                known.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path, Arc::clone(&folder));
            }
            folder
        }
    };
    show(&folder);
    folder.folders.iter().try_for_each(|name| loose(git_dir, name, known, show))
}

fn read_folder(path: &Path, prefix: &str, stamp: [i64; 5], settled: bool) -> Result<Option<Folder>> {
    let mut entries = Vec::new();
    match std::fs::read_dir(path) {
        Ok(found) => {
            for entry in found {
                entries.push(entry.or_io(|| format!("cannot list {}", path.display()))?);
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("cannot list {}", path.display()), error)),
    }
    entries.sort_by_key(std::fs::DirEntry::file_name);
    let mut freshness = Sha256::new();
    let (mut refs, mut folders, mut locked) = (Vec::new(), Vec::new(), false);
    for entry in entries {
        let path = entry.path();
        let file_name = entry.file_name();
        let part = file_name
            .to_str()
            .ok_or_else(|| Error::new(Kind::Unsupported, format!("{} has a name that is not UTF-8", path.display())))?;
        let name = format!("{prefix}/{part}");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders.push(name);
        } else if part.ends_with(".lock") {
            locked |= is_fresh_lock(&path);
        } else if wire::is_ref_name(&name)
            && let Some(text) = read_optional(&path)?
        {
            mark(&path, &mut freshness);
            let target = wire::parse_loose(&text);
            let broken = || Error::new(Kind::Corrupt, format!("{} is no ref", path.display()));
            refs.push((name, target.ok_or_else(broken)?));
        }
    }
    Ok(Some(Folder { stamp, settled, refs, folders, digest: freshness.finalize().into(), locked }))
}

/// Adds what changes when a file is replaced, even by the same content.
fn mark(path: &Path, freshness: &mut Sha256) {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        freshness.update(path.as_os_str().as_bytes());
        for number in [found.ino(), found.size(), found.mtime().cast_unsigned(), found.mtime_nsec().cast_unsigned()] {
            freshness.update(number.to_le_bytes());
        }
    }
}

fn is_fresh_lock(path: &Path) -> bool {
    let modified = std::fs::metadata(path).and_then(|found| found.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age < LOCK_AGE_MAX))
}

/// The same through git, for formats of refs that only git reads.
fn read_refs_by_git(repository: &Repository) -> Result<Seen> {
    let format = "--format=%(objectname) %(refname) %(symref)";
    let text = output(git(&repository.git_dir).args(["for-each-ref", format]), "cannot read refs")?;
    let mut refs = Refs::default();
    for line in String::from_utf8_lossy(&text).lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(id), Some(name)) = (words.next(), words.next()) else { continue };
        let target = match words.next().filter(|symbolic| !symbolic.is_empty()) {
            Some(symbolic) => Target::Symbolic(symbolic.to_owned()),
            None => Target::Object(id.to_owned()),
        };
        refs.0.insert(name.to_owned(), target);
    }
    let head = match output(git(&repository.git_dir).args(["symbolic-ref", "HEAD"]), "cannot read HEAD") {
        Ok(name) => Target::Symbolic(String::from_utf8_lossy(&name).trim().to_owned()),
        Err(_) => {
            let id = output(git(&repository.git_dir).args(["rev-parse", "--verify", "HEAD"]), "cannot read HEAD")?;
            Target::Object(String::from_utf8_lossy(&id).trim().to_owned())
        }
    };
    refs.0.insert("HEAD".to_owned(), head);
    let freshness = Sha256::digest(refs.hash()).into();
    Ok(Seen { refs, freshness })
}

/// Git on one repository, with nothing inherited that could change what it does.
pub(super) fn git(git_dir: &Path) -> Command {
    let mut command = Command::new("git");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"GIT_")) {
        command.env_remove(name);
    }
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_TERMINAL_PROMPT", "0");
    command.env("GIT_OPTIONAL_LOCKS", "0").env("GIT_NO_REPLACE_OBJECTS", "1").env("LC_ALL", "C");
    // Objects of a partial clone are never fetched: a backup reads, and only here.
    command.env("GIT_NO_LAZY_FETCH", "1").env("GIT_PAGER", "cat");
    for setting in ["safe.directory=*", "core.hooksPath=/dev/null", "core.fsmonitor=false", "gc.auto=0"] {
        command.args(["-c", setting]);
    }
    let mut option = std::ffi::OsString::from("--git-dir=");
    option.push(git_dir);
    command.arg(option).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs to the end and returns what was written to the output.
pub(super) fn output(command: &mut Command, what: &str) -> Result<Vec<u8>> {
    let output = command.output().map_err(|error| no_git(what, error))?;
    if output.status.success() { Ok(output.stdout) } else { Err(failed(what, &output.stderr)) }
}

/// Runs to the end with `input` on the standard input.
pub(super) fn feed(command: &mut Command, what: &str, mut input: impl Read) -> Result<Vec<u8>> {
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(|error| no_git(what, error))?;
    let mut stdin = child.stdin.take().ok_or_else(|| Error::internal("a child without input"))?;
    // Answers are read at the same time, so that neither side waits for the other.
    let answers = read_aside(&mut child)?;
    let fed = std::io::copy(&mut input, &mut stdin).and_then(|_| stdin.flush());
    drop(stdin);
    let (stdout, stderr) = answers.join().map_err(|_| Error::internal("reading git's answers panicked"))?;
    let status = child.wait().or_io(|| what.to_owned())?;
    match fed {
        // Git gave up early; its own words say why.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io(what, error)),
        _ if status.success() => Ok(stdout),
        _ => Err(failed(what, &stderr)),
    }
}

type Answers = std::thread::JoinHandle<(Vec<u8>, Vec<u8>)>;

fn read_aside(child: &mut Child) -> Result<Answers> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        // A broken pipe ends the text; the exit code tells of the failure.
        drop(stderr.as_mut().map(|stream| stream.read_to_end(&mut text)));
        text
    });
    Ok(std::thread::spawn(move || {
        let mut text = Vec::new();
        drop(stdout.as_mut().map(|stream| stream.read_to_end(&mut text)));
        (text, errors.join().unwrap_or_default())
    }))
}

/// A git that could not be started.
pub(super) fn no_git(what: &str, error: std::io::Error) -> Error {
    Error::io(format!("{what}: git cannot be run"), error).hint("install git 2.31 or newer")
}

/// A git that failed, with its own last words.
pub(super) fn failed(what: &str, stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let last =
        text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("git gave no reason").trim().to_owned();
    let missing = ["bad object", "missing", "unable to read", "could not parse", "not a valid object", "bad revision"];
    let kind = if missing.iter().any(|word| text.contains(word)) { Kind::Corrupt } else { Kind::Io };
    Error::new(kind, what).source(Error::new(kind, last))
}

/// Which of the object ids the repository holds.
pub(super) fn present(repository: &Repository, ids: &[String]) -> Result<Vec<String>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let input = ids.join("\n") + "\n";
    let mut command = git(&repository.git_dir);
    command.args(["cat-file", "--batch-check=%(objectname) %(objecttype)"]);
    let text = feed(&mut command, "cannot look objects up", input.as_bytes())?;
    let text = String::from_utf8_lossy(&text);
    let held = text.lines().filter(|line| !line.ends_with(" missing")).filter_map(|line| line.split(' ').next());
    Ok(held.map(str::to_owned).collect())
}

/// A path from the bytes of its name.
pub(super) fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

/// Whether a directory is absent or holds nothing but what `ignored` names.
pub(super) fn is_vacant(path: &Path, ignored: &str) -> Result<bool> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(Error::io(format!("cannot list {}", path.display()), error)),
    };
    for entry in entries {
        let entry = entry.or_io(|| format!("cannot list {}", path.display()))?;
        if entry.file_name() != OsStr::new(ignored) {
            return Ok(false);
        }
    }
    Ok(true)
}
