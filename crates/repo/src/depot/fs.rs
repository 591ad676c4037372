//! A depot in a directory.
//!
//! What is durable when: `write` puts the bytes under a temporary name in the target's directory,
//! fsyncs the file, moves it into place and fsyncs the directory, and each directory that had to
//! be made. Those are all the fsyncs there are. Deletions are not forced to disk: after a crash a
//! deleted object may be back, never a written one gone.
//!
//! How races are decided: `Create` moves without replacing, so the kernel picks the one winner.
//! `Update` and `Replace` of an existing object hold an advisory lock (`flock`) on one lock file
//! at the root while they compare and move; the kernel drops the lock when its holder dies.
//!
//! An object's version is its inode, modification time and size. Every write sets the time from
//! the nanosecond clock, and later than its predecessor's, so that no two versions are alike even
//! when the inode is used again. A file system with unstable inodes therefore sees conflicts that
//! are none, never an update lost.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, FlockOperation, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, check_name, check_prefix, total_bytes};

/// Begins the name of everything in the directory that is not an object.
const TEMPORARY_PREFIX: &str = ".stillpoint-";
/// The lock file at the root; it stays, because removing a lock file is a race of its own.
const LOCK_NAME: &str = ".stillpoint-lock";
/// Temporary files older than this belong to nobody any more.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Linux takes at most this many parts in one `writev`.
const PARTS_PER_CALL_MAX: usize = 1024;

/// A directory that holds objects as files. See the module for what it promises.
#[derive(Debug)]
pub struct FsDepot {
    root: PathBuf,
    /// Directories known to exist and to be durable, so that a write need not ask again.
    known: Mutex<HashSet<PathBuf>>,
}

impl FsDepot {
    /// Opens the directory; nothing is read or made. A missing directory is an empty depot, and
    /// the first write makes it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let root = std::path::absolute(&path).or_io(|| format!("cannot make {} absolute", path.display()))?;
        match fs::metadata(&root) {
            Ok(found) if !found.is_dir() => {
                return Err(Error::new(Kind::Config, format!("{} is not a directory", root.display())));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot open {}", root.display()), error));
            }
            _ => {}
        }
        Ok(Self { root, known: Mutex::default() })
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        if name.split('/').any(|part| part.starts_with(TEMPORARY_PREFIX)) {
            return Err(Error::new(Kind::Config, format!("object name `{name}` is reserved")));
        }
        Ok(self.root.join(name))
    }

    /// Makes `directory` and what is missing above it, each durable in its parent.
    fn make_directory(&self, directory: &Path) -> Result<()> {
        let mut missing = Vec::new();
        let mut current = directory;
        while !current.exists() {
            missing.push(current);
            match current.parent() {
                Some(parent) => current = parent,
                None => break,
            }
        }
        for path in missing.into_iter().rev() {
            match fs::DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("cannot make directory {}", path.display()), error));
                }
                _ => {}
            }
            if let Some(parent) = path.parent() {
                sync_directory(parent)?;
            }
        }
        Ok(())
    }

    /// Opens a new temporary file beside `target`, making the directory when it is missing.
    fn temporary(&self, directory: &Path) -> Result<(PathBuf, File)> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).contains(directory);
        if !known {
            self.make_directory(directory)?;
            self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(directory.to_owned());
        }
        let path = directory.join(format!("{TEMPORARY_PREFIX}{}", random_text()?));
        let open = || File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = match open() {
            // Someone removed the directory since: a cleaner, or the last deletion in it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_directory(directory)?;
                open()
            }
            other => other,
        };
        let file = file.or_io(|| format!("cannot write in {}", directory.display()))?;
        Ok((path, file))
    }

    /// Holds the depot's one lock until the file is dropped.
    fn lock(&self) -> Result<File> {
        let path = self.root.join(LOCK_NAME);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .or_io(|| format!("cannot open the lock file {}", path.display()))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .or_io(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }

    /// Moves the finished temporary file to its name, as `mode` asks.
    fn place(&self, name: &str, temporary: &Path, file: &File, target: &Path, mode: &WriteMode) -> Result<()> {
        let replace = || fs::rename(temporary, target).or_io(|| format!("cannot move into place {}", target.display()));
        match mode {
            WriteMode::Create => {
                set_modified(file, None)?;
                move_without_replacing(temporary, target, || self.lock())
                    .map_err(|error| error.unwrap_or_else(|| already_exists(name)))
            }
            WriteMode::Replace => match version_of(target)? {
                None => {
                    set_modified(file, None)?;
                    replace()
                }
                Some(_) => {
                    let _lock = self.lock()?;
                    set_modified(file, modified_of(target)?)?;
                    replace()
                }
            },
            WriteMode::Update(expected) => {
                let _lock = self.lock()?;
                let found = version_of(target)?;
                if found.as_ref() != Some(expected) {
                    return Err(Error::new(Kind::Conflict, format!("`{name}` was changed by someone else"))
                        .context("expected version", &expected.0)
                        .context("found", found.map_or("nothing".to_owned(), |version| version.0)));
                }
                set_modified(file, modified_of(target)?)?;
                replace()
            }
        }
    }
}

impl Depot for FsDepot {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        let path = self.path(name)?;
        let mut file = File::open(&path).or_io(|| format!("cannot read {}", path.display()))?;
        let metadata = file.metadata().or_io(|| format!("cannot read {}", path.display()))?;
        if metadata.is_dir() {
            return Err(Error::new(Kind::NotFound, format!("{} is a directory, not an object", path.display())));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut bytes).or_io(|| format!("cannot read {}", path.display()))?;
        Ok((bytes.into(), Some(version(&metadata))))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let path = self.path(name)?;
        let file = File::open(&path).or_io(|| format!("cannot read {}", path.display()))?;
        let mut bytes = Vec::with_capacity(usize::try_from(length).map_err(|_| too_long(name, length))?);
        while (bytes.len() as u64) < length {
            let at = offset + bytes.len() as u64;
            let left = length as usize - bytes.len();
            // The capacity may exceed what was asked for, so the rest is cut off below.
            match rustix::io::pread(&file, rustix::buffer::spare_capacity(&mut bytes), at) {
                Ok(0) => break,
                Ok(read) if read > left => bytes.truncate(length as usize),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error.into())),
            }
        }
        Ok(bytes.into())
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        let target = self.path(name)?;
        if *mode == WriteMode::Create && target.exists() {
            return Err(already_exists(name));
        }
        let directory = target.parent().unwrap_or(&self.root);
        let (temporary, file) = self.temporary(directory)?;
        let placed = write_parts(&file, parts)
            .and_then(|()| file.sync_data())
            .or_io(|| format!("cannot write {}", target.display()))
            .map_err(|error| error.context("bytes", total_bytes(parts)))
            .and_then(|()| self.place(name, &temporary, &file, &target, mode));
        if let Err(error) = placed {
            // The file may be gone or the disk broken; the error that matters is the first one.
            drop(fs::remove_file(&temporary));
            return Err(error);
        }
        sync_directory(directory)?;
        let metadata = file.metadata().or_io(|| format!("cannot read {}", target.display()))?;
        Ok(Some(version(&metadata)))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        let folder = prefix.rfind('/').map_or("", |slash| &prefix[..=slash]);
        let mut walk = Walk { prefix, visit, ancestors: Vec::new(), now: SystemTime::now() };
        walk.directory(&self.root.join(folder), folder)?;
        Ok(())
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        let path = self.path(name)?;
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(info(name.to_owned(), &metadata))),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(Error::io(format!("cannot look at {}", path.display()), error)),
        }
    }

    fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(Error::io(format!("cannot delete {}", path.display()), error)),
        }
        // Object stores have no empty folders, so they do not stay here either. A folder that is
        // not empty refuses, which ends the climb.
        let mut current = path.parent();
        while let Some(directory) = current.filter(|directory| *directory != self.root) {
            if fs::remove_dir(directory).is_err() {
                break;
            }
            self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(directory);
            current = directory.parent();
        }
        Ok(())
    }

    fn capability(&self) -> DepotCapability {
        DepotCapability { conditional_create: true, conditional_update: true, versioning: false, object_lock: false }
    }

    fn waits(&self) -> bool {
        false
    }

    fn location(&self) -> String {
        self.root.display().to_string()
    }
}

/// One listing: walks directories, skips what is not an object, removes what a crash left.
struct Walk<'a> {
    prefix: &'a str,
    visit: &'a mut dyn FnMut(ObjectInfo) -> Result<bool>,
    /// Device and inode of each directory above, because links may lead back into them.
    ancestors: Vec<(u64, u64)>,
    now: SystemTime,
}

impl Walk<'_> {
    /// Visits everything below `path`, whose objects' names begin with `folder`. Returns `false`
    /// once the visitor has seen enough.
    fn directory(&mut self, path: &Path, folder: &str) -> Result<bool> {
        let entries = match fs::metadata(path).and_then(|found| Ok((found, fs::read_dir(path)?))) {
            Ok((found, entries)) => {
                let identity = (found.dev(), found.ino());
                if self.ancestors.contains(&identity) {
                    return Ok(true);
                }
                self.ancestors.push(identity);
                entries
            }
            Err(error) if is_absent(&error) => return Ok(true),
            Err(error) => return Err(Error::io(format!("cannot list {}", path.display()), error)),
        };
        let mut go_on = true;
        for entry in entries {
            let entry = entry.or_io(|| format!("cannot list {}", path.display()))?;
            go_on = self.entry(&entry, folder)?;
            if !go_on {
                break;
            }
        }
        self.ancestors.pop();
        Ok(go_on)
    }

    fn entry(&mut self, entry: &fs::DirEntry, folder: &str) -> Result<bool> {
        let file_name = entry.file_name();
        let Some(part) = file_name.to_str() else {
            tracing::debug!(path = %entry.path().display(), "left out: its name is not text, so it is not ours");
            return Ok(true);
        };
        let name = format!("{folder}{part}");
        let related = name.starts_with(self.prefix) || self.prefix.starts_with(&format!("{name}/"));
        if !related {
            return Ok(true);
        }
        let path = entry.path();
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if is_absent(&error) => return Ok(true),
            Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
        };
        if metadata.is_dir() {
            return self.directory(&path, &format!("{name}/"));
        }
        if part.starts_with(TEMPORARY_PREFIX) {
            self.remove_leftover(&path, &file_name, &metadata);
            return Ok(true);
        }
        if metadata.is_file() { (self.visit)(info(name, &metadata)) } else { Ok(true) }
    }

    /// Removes a temporary file whose writer must have died long ago.
    fn remove_leftover(&self, path: &Path, file_name: &OsStr, metadata: &fs::Metadata) {
        let age = metadata.modified().ok().and_then(|modified| self.now.duration_since(modified).ok());
        if file_name != LOCK_NAME && age.is_some_and(|age| age > TEMPORARY_AGE_MAX) {
            match fs::remove_file(path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed what an interrupted write left"),
                Err(error) => tracing::debug!(path = %path.display(), %error, "an interrupted write's file stays"),
            }
        }
    }
}

fn info(name: String, metadata: &fs::Metadata) -> ObjectInfo {
    ObjectInfo {
        name,
        size: metadata.len(),
        modified: metadata.modified().unwrap_or(UNIX_EPOCH),
        version: Some(version(metadata)),
    }
}

fn version(metadata: &fs::Metadata) -> Version {
    let nanoseconds = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    Version(format!("{:x}-{nanoseconds:x}-{:x}", metadata.ino(), metadata.len()))
}

fn metadata_of(path: &Path) -> Result<Option<fs::Metadata>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(Error::io(format!("cannot look at {}", path.display()), error)),
    }
}

fn version_of(path: &Path) -> Result<Option<Version>> {
    Ok(metadata_of(path)?.map(|metadata| version(&metadata)))
}

fn modified_of(path: &Path) -> Result<Option<SystemTime>> {
    Ok(metadata_of(path)?.and_then(|metadata| metadata.modified().ok()))
}

/// Sets the file's time from the nanosecond clock, and later than its predecessor's in any case.
fn set_modified(file: &File, predecessor: Option<SystemTime>) -> Result<()> {
    let mut time = SystemTime::now();
    if let Some(earlier) = predecessor.filter(|earlier| *earlier >= time) {
        time = earlier + Duration::from_nanos(1);
    }
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = Timespec { tv_sec: since.as_secs() as i64, tv_nsec: since.subsec_nanos().into() };
    rustix::fs::futimens(file, &Timestamps { last_access: stamp, last_modification: stamp })
        .map_err(io::Error::from)
        .or_io(|| "cannot set the time of a new object".to_owned())
}

/// Moves so that exactly one of many racing writers wins; `Err(None)` means that the name is taken.
fn move_without_replacing(
    temporary: &Path,
    target: &Path,
    lock: impl Fn() -> Result<File>,
) -> Result<(), Option<Error>> {
    let failed = |error: Errno| Some(Error::io(format!("cannot move into place {}", target.display()), error.into()));
    match rustix::fs::renameat_with(CWD, temporary, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => return Err(None),
        // The file system does not know the flag; a hard link decides as well.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(failed(error)),
    }
    match rustix::fs::linkat(CWD, temporary, CWD, target, AtFlags::empty()) {
        Ok(()) => return rustix::fs::unlink(temporary).map_err(failed),
        Err(Errno::EXIST) => return Err(None),
        // Nor hard links: then our own lock decides, among those who take it.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {}
        Err(error) => return Err(failed(error)),
    }
    let _lock = lock().map_err(Some)?;
    if target.exists() {
        return Err(None);
    }
    rustix::fs::rename(temporary, target).map_err(failed)
}

/// Writes all parts in as few system calls as there can be.
fn write_parts(mut file: &File, parts: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> =
        parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)).collect();
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        let count = left.len().min(PARTS_PER_CALL_MAX);
        match file.write_vectored(&left[..count]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn sync_directory(path: &Path) -> Result<()> {
    match File::open(path).and_then(|directory| directory.sync_all()) {
        // Some file systems (network ones among them) cannot sync directories; they write through.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        other => other.or_io(|| format!("cannot sync the directory {}", path.display())),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn already_exists(name: &str) -> Error {
    Error::new(Kind::AlreadyExists, format!("`{name}` exists already"))
}

fn too_long(name: &str, length: u64) -> Error {
    Error::new(Kind::Unsupported, format!("cannot read {length} bytes of `{name}` at once"))
}

fn random_text() -> Result<String> {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(Kind::Io, format!("the system gives no random bytes: {error}")))?;
    Ok(hex::encode(bytes))
}
