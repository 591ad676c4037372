//! Compares a stored directory with a local one: names, types, links and every byte.
//!
//! Apart from the restore because it trusts nothing that the restore did: what is on disk is read
//! again, cut where the stored blobs were cut, and hashed; what is in the repository is not read,
//! since its hashes are known. The walk lists both sides; workers hash.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use stillpoint_core::driver::Context;
use stillpoint_core::tree::{Difference, NodeKind};
use stillpoint_core::{Error, Kind, Result};

use super::blobs::Loader;
use super::entries::Entries;
use crate::Id;
use crate::format::pack::BlobKind;
use crate::format::tree::TreeNode;
use crate::restore::place::{Place, TOP, names_in, os_error};
use crate::simd::sha256::hash_many;

/// Most differences that are returned.
const DIFFERENCES_MAX: usize = 100;
/// Files waiting for a worker.
const JOBS_AHEAD: usize = 64;
/// Local bytes read before they are hashed together.
const BATCH_BYTES: usize = 4 << 20;

/// Compares the directory whose tree is `tree` with the local directory `with`.
pub(super) fn compare(loader: &Arc<Loader>, tree: &Id, with: &Path, context: &Context) -> Result<Vec<Difference>> {
    let found = Findings::default();
    let (sender, receiver) = sync_channel::<Job>(JOBS_AHEAD);
    let receiver = Mutex::new(receiver);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| work(loader, &receiver, &found, context));
        }
        let mut walk = Walk { loader, place: Place::existing_at(with)?, found: &found, sender, context };
        walk.all(tree)
    })?;
    found.into_list()
}

/// A file to be hashed.
struct Job {
    path: String,
    file: File,
    content: Vec<Id>,
}

#[derive(Default)]
struct Findings {
    inner: Mutex<(Vec<Difference>, Option<Error>)>,
}

impl Findings {
    fn lock(&self) -> MutexGuard<'_, (Vec<Difference>, Option<Error>)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, path: &str, what: impl Into<String>) {
        let mut inner = self.lock();
        if inner.0.len() < DIFFERENCES_MAX {
            inner.0.push(Difference { path: path.to_owned(), what: what.into() });
        }
    }

    fn fail(&self, error: Error) {
        self.lock().1.get_or_insert(error);
    }

    fn is_enough(&self) -> bool {
        let inner = self.lock();
        inner.1.is_some() || inner.0.len() >= DIFFERENCES_MAX
    }

    fn into_list(self) -> Result<Vec<Difference>> {
        let (mut list, failure) = self.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        list.sort_by(|a, b| a.path.cmp(&b.path));
        failure.map_or(Ok(list), Err)
    }
}

struct Walk<'a> {
    loader: &'a Arc<Loader>,
    place: Place,
    found: &'a Findings,
    sender: std::sync::mpsc::SyncSender<Job>,
    context: &'a Context,
}

/// A directory that is being compared; names are removed from `local` as they are met.
struct Level {
    folder: u32,
    path: String,
    entries: Entries,
    local: BTreeSet<Vec<u8>>,
}

impl Walk<'_> {
    fn all(&mut self, tree: &Id) -> Result<()> {
        let mut levels = vec![self.level(TOP, String::new(), tree)?];
        while let Some(level) = levels.last_mut() {
            self.context.check()?;
            if self.found.is_enough() {
                break;
            }
            let Some(entry) = level.entries.next()? else {
                let level = levels.pop().expect("a last level was seen");
                for name in &level.local {
                    self.found.add(&join(&level.path, name), "is there, but not in the point");
                }
                if level.folder != TOP {
                    self.place.leave(level.folder);
                }
                continue;
            };
            let path = join(&level.path, &entry.node.name);
            let (folder, there) = (level.folder, level.local.remove(&entry.node.name));
            if !there {
                self.found.add(&path, "is missing");
            } else if let Some(tree) = self.entry(folder, &path, entry)? {
                levels.push(tree);
            }
        }
        Ok(())
    }

    fn level(&self, folder: u32, path: String, tree: &Id) -> Result<Level> {
        let local = names_in(&*self.place.folder(folder)?, usize::MAX)?.into_iter().collect();
        Ok(Level { folder, path, entries: Entries::open(self.loader, tree)?, local })
    }

    /// Compares one entry that is on both sides; a directory is returned to be walked next.
    fn entry(&mut self, folder: u32, path: &str, entry: TreeNode) -> Result<Option<Level>> {
        let around = self.place.folder(folder)?;
        let name = entry.node.name.as_slice();
        let stat = rustix::fs::statat(&*around, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| os_error(format!("cannot look at `{path}`"), errno))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let expected = file_type(&entry.node.kind);
        if kind != expected {
            self.found.add(path, format!("is a {}, not a {}", word(kind), word(expected)));
            return Ok(None);
        }
        match &entry.node.kind {
            NodeKind::Dir => {
                let tree = entry.subtree.ok_or_else(|| Error::new(Kind::Corrupt, format!("`{path}` has no tree")))?;
                let inner = self.place.look(folder, name)?;
                return self.level(inner, path.to_owned(), &tree).map(Some);
            }
            NodeKind::File { .. } => self.file(&around, &stat, path, entry)?,
            NodeKind::Symlink { target } => {
                let local = rustix::fs::readlinkat(&*around, name, Vec::new())
                    .map_err(|errno| os_error(format!("cannot read the link `{path}`"), errno))?;
                if local.as_bytes() != target.as_slice() {
                    self.found.add(path, format!("points at `{}`", local.to_string_lossy()));
                }
            }
            NodeKind::CharDevice { device } | NodeKind::BlockDevice { device } => {
                if stat.st_rdev != *device {
                    self.found.add(path, "is another device");
                }
            }
            NodeKind::Fifo | NodeKind::Socket => {}
        }
        Ok(None)
    }

    fn file(&self, around: &OwnedFd, stat: &Stat, path: &str, entry: TreeNode) -> Result<()> {
        let mut length = 0;
        for id in &entry.content {
            length += u64::from(plain_length(self.loader, path, id)?);
        }
        let local = u64::try_from(stat.st_size).unwrap_or_default();
        if local != length {
            self.found.add(path, format!("is {local} bytes long, not {length}"));
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let handle = rustix::fs::openat(around, entry.node.name.as_slice(), flags, Mode::empty())
            .map_err(|errno| os_error(format!("cannot open `{path}`"), errno))?;
        let job = Job { path: path.to_owned(), file: handle.into(), content: entry.content };
        self.sender.send(job).map_err(|_| Error::internal("the threads that compare are gone"))
    }
}

fn plain_length(loader: &Loader, path: &str, id: &Id) -> Result<u32> {
    let location = loader.index().get(BlobKind::Data, id).ok_or_else(|| {
        Error::new(Kind::Corrupt, format!("a part of `{path}` is not in the repository")).context("blob", id)
    })?;
    Ok(location.entry.plain_length())
}

fn work(loader: &Loader, jobs: &Mutex<Receiver<Job>>, found: &Findings, context: &Context) {
    let mut buffer = Vec::new();
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        if found.is_enough() {
            continue;
        }
        match same(loader, job, &mut buffer, context) {
            Ok(None) => {}
            Ok(Some((path, what))) => found.add(&path, what),
            Err(error) => found.fail(error),
        }
    }
}

/// Hashes the pieces of a local file; `Some` names the first difference.
fn same(loader: &Loader, job: Job, buffer: &mut Vec<u8>, context: &Context) -> Result<Option<(String, String)>> {
    let Job { path, mut file, content } = job;
    let mut rest = content.as_slice();
    let mut offset = 0_u64;
    while !rest.is_empty() {
        context.check()?;
        let mut spans = Vec::new();
        let mut end = 0;
        for id in rest {
            let length = plain_length(loader, &path, id)? as usize;
            if !spans.is_empty() && end + length > BATCH_BYTES {
                break;
            }
            spans.push(end..end + length);
            end += length;
        }
        if buffer.len() < end {
            buffer.resize(end, 0);
        }
        match file.read_exact(&mut buffer[..end]) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Ok(Some((path, "became shorter while it was read".to_owned())));
            }
            Err(error) => return Err(Error::io(format!("cannot read `{path}`"), error)),
        }
        let pieces: Vec<&[u8]> = spans.iter().map(|span| &buffer[span.clone()]).collect();
        let mut ids = vec![Id([0; 32]); pieces.len()];
        hash_many(&pieces, &mut ids);
        if let Some(at) = ids.iter().zip(rest).position(|(local, stored)| local != stored) {
            let (from, to) = (offset + spans[at].start as u64, offset + spans[at].end as u64);
            return Ok(Some((path, format!("differs between bytes {from} and {to}"))));
        }
        offset += end as u64;
        rest = &rest[spans.len()..];
    }
    Ok(None)
}

fn join(path: &str, name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") }
}

fn file_type(kind: &NodeKind) -> FileType {
    match kind {
        NodeKind::File { .. } => FileType::RegularFile,
        NodeKind::Dir => FileType::Directory,
        NodeKind::Symlink { .. } => FileType::Symlink,
        NodeKind::Fifo => FileType::Fifo,
        NodeKind::Socket => FileType::Socket,
        NodeKind::CharDevice { .. } => FileType::CharacterDevice,
        NodeKind::BlockDevice { .. } => FileType::BlockDevice,
    }
}

fn word(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "thing of unknown type",
    }
}
