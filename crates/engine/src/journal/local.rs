//! The journal on this machine's disk.
//!
//! One file per run, held under an exclusive lock while its engine lives: whoever gets the lock
//! knows that the engine is dead, without asking for process ids, which are used again.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{PlatformName, RunId};

use super::{Entry, Head, Replay};

/// Ended journals that are kept for people, per platform.
const ENDED_KEPT: usize = 20;

/// How often, and how far apart, a lock is looked at before it counts as held.
const LOCK_LOOKS: u32 = 20;
const LOCK_LOOK_EVERY: Duration = Duration::from_millis(20);

/// Length of the frame before each line: 8 hex digits of length, 16 of checksum, two spaces.
const FRAME_BYTES: usize = 8 + 1 + 16 + 1;

/// A run's journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    unsynced: bool,
}

/// A journal whose engine is dead. Holds the lock until dropped.
#[derive(Debug)]
pub struct Found {
    /// What it says.
    pub replay: Replay,
    /// The file, ready for the events of the clean-up.
    pub journal: Journal,
}

fn folder(state: &Path, platform: &PlatformName) -> PathBuf {
    state.join(platform.as_str())
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).or_io(|| format!("cannot sync `{}`", path.display()))
}

/// Takes the lock; `false` if another process holds it, and not only for the instant in which a
/// child that is being started still has all the descriptors of its parent.
fn lock(file: &File, path: &Path) -> Result<bool> {
    for _ in 0..LOCK_LOOKS {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_LOOK_EVERY),
            Err(error) => return Err(Error::io(format!("cannot lock `{}`", path.display()), error.into())),
        }
    }
    Ok(false)
}

impl Journal {
    /// Begins a journal for the run of `head` under the folder `state`; on disk when it returns.
    pub fn begin(state: &Path, head: &Head) -> Result<Self> {
        let folder = folder(state, &head.platform.platform);
        std::fs::create_dir_all(&folder)
            .or_io(|| format!("cannot make the state folder `{}`", folder.display()))
            .map_err(|error| error.hint("choose another one with `--state` or XDG_STATE_HOME"))?;
        // Locked and with its head before it gets its name: nobody ever sees half a begin.
        let fresh = folder.join(format!("{}.new", head.run));
        let path = folder.join(format!("{}.journal", head.run));
        // Its head holds the platform as configured: hooks, endpoints. Nobody else reads that.
        let file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(&fresh)
            .or_io(|| format!("cannot make the journal `{}`", fresh.display()))?;
        if !lock(&file, &fresh)? {
            return Err(Error::internal("a new journal is locked by another process"));
        }
        let mut journal = Self { file, path, unsynced: false };
        journal.append(&Entry::Head(Box::new(head.clone())))?;
        journal.sync()?;
        std::fs::rename(&fresh, &journal.path).or_io(|| format!("cannot name the journal `{}`", fresh.display()))?;
        sync_folder(&folder)?;
        Ok(journal)
    }

    /// Appends one line. It is safe only after [`sync`](Self::sync).
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        let text =
            serde_json::to_string(entry).map_err(|e| Error::internal("a journal entry has no JSON").source(e))?;
        let line = format!("{:08x} {} {text}\n", text.len(), checksum(text.as_bytes()));
        self.unsynced = true;
        self.file.write_all(line.as_bytes()).or_io(|| format!("cannot write the journal `{}`", self.path.display()))
    }

    /// Returns once every appended line survives a crash. Free if nothing was appended since.
    pub fn sync(&mut self) -> Result<()> {
        if self.unsynced {
            self.file.sync_data().or_io(|| format!("cannot sync the journal `{}`", self.path.display()))?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Writes that nothing is held any more. A later start passes over this journal.
    pub fn end(mut self, outcome: &str) -> Result<()> {
        self.append(&Entry::Ended { outcome: outcome.to_owned() })?;
        self.sync()
    }
}

fn checksum(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes)[..8])
}

/// Reads frames up to the first bad one. The second value is the length of the good part.
fn parse(bytes: &[u8]) -> (Vec<Entry>, usize, Option<String>) {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match frame(&bytes[at..]) {
            Ok((entry, length)) => {
                entries.push(entry);
                at += length;
            }
            // A torn last line is how a crash looks. Good lines behind a bad one are not.
            Err(reason) => {
                let rest = &bytes[at..];
                let next = rest.iter().position(|byte| *byte == b'\n').map(|end| &rest[end + 1..]);
                let more = next.is_some_and(|next| frame(next).is_ok());
                return (entries, at, more.then(|| format!("{reason} at byte {at}")));
            }
        }
    }
    (entries, at, None)
}

fn frame(bytes: &[u8]) -> std::result::Result<(Entry, usize), &'static str> {
    let head = bytes.get(..FRAME_BYTES).ok_or("a short line")?;
    let head = std::str::from_utf8(head).map_err(|_| "a damaged line")?;
    let length = usize::from_str_radix(&head[..8], 16).map_err(|_| "a damaged length")?;
    let text = bytes.get(FRAME_BYTES..FRAME_BYTES.saturating_add(length)).ok_or("a short line")?;
    if checksum(text) != head[9..25] || bytes.get(FRAME_BYTES + length) != Some(&b'\n') {
        return Err("a damaged line");
    }
    let entry = serde_json::from_slice(text).map_err(|_| "a line of another version")?;
    Ok((entry, FRAME_BYTES + length + 1))
}

/// Finds the journals of `platform` that did not end, oldest first.
///
/// A journal whose engine is alive is `Locked`: two engines of one platform on one machine.
pub fn find_unfinished(state: &Path, platform: &PlatformName) -> Result<Vec<Found>> {
    let folder = folder(state, platform);
    let mut found = Vec::new();
    for path in journals(&folder)? {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(&path)
            .or_io(|| format!("cannot open the journal `{}`", path.display()))?;
        let alive = !lock(&file, &path)?;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.read_to_end(&mut bytes))
            .or_io(|| format!("cannot read the journal `{}`", path.display()))?;
        let (entries, good, damage) = parse(&bytes);
        match Replay::collect(entries, damage) {
            Some(replay) if replay.ended => {}
            Some(replay) if alive => return Err(already_running(&replay.head)),
            Some(replay) => {
                // What is appended now must not stick to half a line.
                file.set_len(good as u64).or_io(|| format!("cannot cut the journal `{}`", path.display()))?;
                found.push(Found { replay, journal: Journal { file, path, unsynced: true } });
            }
            // A journal gets its name with its head in it; without one it was damaged from outside.
            None => {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("the journal `{}` has no readable head", path.display()),
                )
                .hint("see that the platform's writers run, then remove the file"));
            }
        }
    }
    found.sort_by_key(|found| found.replay.head.began_at);
    Ok(found)
}

/// Whether the engine of `run` is known to be dead on this machine: its journal is here, unlocked.
pub(crate) fn is_dead_here(state: &Path, platform: &PlatformName, run: &RunId) -> bool {
    let path = folder(state, platform).join(format!("{run}.journal"));
    File::open(&path).is_ok_and(|file| lock(&file, &path).unwrap_or(false))
}

fn already_running(head: &Head) -> Error {
    Error::new(
        Kind::Locked,
        format!(
            "platform `{}` is being backed up already: run {} on {}, process {}, since {}",
            head.platform.platform,
            head.run,
            head.host,
            head.process,
            whole_seconds(head.began_at)
        ),
    )
    .hint(format!("wait until it ends, or stop process {}", head.process))
}

/// A time as people read it: whole seconds, UTC.
pub(crate) fn whole_seconds(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

fn journals(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.or_io(|| format!("cannot list the state folder `{}`", folder.display()))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.or_io(|| format!("cannot list the state folder `{}`", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "journal") {
            paths.push(path);
        }
    }
    Ok(paths)
}

/// Removes all but the newest ended journals. Unfinished and living ones stay.
pub fn forget_ended(state: &Path, platform: &PlatformName) -> Result<()> {
    let mut ended = Vec::new();
    for path in journals(&folder(state, platform))? {
        let bytes = std::fs::read(&path).or_io(|| format!("cannot read the journal `{}`", path.display()))?;
        if let Some(replay) = Replay::collect(parse(&bytes).0, None).filter(|replay| replay.ended) {
            ended.push((replay.head.began_at, path));
        }
    }
    ended.sort();
    for (_, path) in ended.iter().rev().skip(ENDED_KEPT) {
        for path in [path, &path.with_extension("watchdog")] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.or_io(|| format!("cannot remove `{}`", path.display()))?,
            }
        }
    }
    Ok(())
}
