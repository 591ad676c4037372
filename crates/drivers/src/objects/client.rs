//! The only page that touches a directory of objects, and the interface that buckets share with it.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd};

use super::config::Settings;
use super::wire::{Record, STAMP_KEY};

/// What a listing passed over.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Links, pipes, sockets, devices.
    pub special: u64,
    /// Files that are no objects yet, by their name.
    pub unfinished: u64,
}

/// Extended attributes, as they stand in a tree.
pub(super) type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// What became of an object between the listing and the reading.
pub(super) enum Fetched {
    /// It is there, and will be read as it was listed or be called torn.
    Found(Box<dyn Content>, Attributes),
    /// It is gone.
    Gone,
}

/// Waits for an object that was asked for.
pub(super) type Waiting = Box<dyn FnOnce() -> Result<Fetched> + Send>;

/// Waits for what is kept of an object beside its bytes; `None` if it is gone.
pub(super) type WaitingFacts = Box<dyn FnOnce() -> Result<Option<Attributes>> + Send>;

/// Where objects lie.
pub(super) trait Place: Send + Sync {
    /// Calls `visit` for every object, in any order; the stamp is none.
    fn list(&self, context: &Context, visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>) -> Result<Skipped>;

    /// Asks for one object; what is returned waits for it.
    fn begin(&self, key: &[u8], record: &Record) -> Result<Waiting>;

    /// Asks for what is kept of an object beside its bytes, where that may change and its bytes not, and is to be
    /// followed.
    fn begin_facts(&self, _key: &[u8], _record: &Record) -> Option<WaitingFacts> {
        None
    }

    /// Whether an object of this key can be asked for.
    fn can_ask_for(&self, _key: &[u8]) -> bool {
        true
    }

    /// How many objects are worth asking for ahead.
    fn ahead_max(&self) -> usize;

    /// Opens one object as it is now; `None` if it is absent.
    fn open(&self, key: &[u8]) -> Result<Option<Box<dyn Read + Send>>>;

    /// Whether anything is there but the stamp; what it is, for people.
    fn occupied(&self) -> Result<Option<String>>;

    /// The bytes of the stamp.
    fn read_stamp(&self) -> Result<Option<Vec<u8>>>;

    /// Replaces the stamp.
    fn write_stamp(&self, bytes: &[u8]) -> Result<()>;
}

/// A directory whose files are objects.
#[derive(Debug)]
pub(super) struct Directory {
    /// The directory.
    pub root: PathBuf,
    settings: Settings,
}

impl Directory {
    /// Touches nothing yet.
    pub fn new(root: PathBuf, settings: Settings) -> Self {
        Self { root, settings }
    }

    fn path_of(&self, key: &[u8]) -> Result<PathBuf> {
        if !super::keys::fits_directory(key) {
            return Err(Error::new(Kind::Corrupt, format!("`{}` is the key of no file", super::keys::shown(key))));
        }
        Ok(self.root.join(std::ffi::OsStr::from_bytes(key)))
    }

    fn walk(
        &self,
        context: &Context,
        folder: &Path,
        prefix: &[u8],
        skipped: &mut Skipped,
        visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>,
    ) -> Result<()> {
        context.check()?;
        let what = || format!("cannot list {}", folder.display());
        let entries = match std::fs::read_dir(folder) {
            // Removed while its parent was listed: it holds no objects.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !prefix.is_empty() => return Ok(()),
            other => other.or_io(what)?,
        };
        for entry in entries {
            let entry = entry.or_io(what)?;
            let name = entry.file_name().into_vec();
            let kind = entry.file_type().or_io(what)?;
            let mut key = prefix.to_vec();
            key.extend_from_slice(&name);
            if kind.is_dir() {
                key.push(b'/');
                self.walk(context, &entry.path(), &key, skipped, visit)?;
            } else if !kind.is_file() {
                skipped.special += 1;
            } else if self.settings.is_unfinished(&name) {
                skipped.unfinished += 1;
            } else if key != STAMP_KEY.as_bytes() {
                match std::fs::symlink_metadata(entry.path()) {
                    Ok(meta) if meta.is_file() => visit(key, record(&meta))?,
                    Ok(_) => skipped.special += 1,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(Error::io(format!("cannot look at {}", entry.path().display()), error)),
                }
            }
        }
        Ok(())
    }
}

fn record(meta: &std::fs::Metadata) -> Record {
    Record {
        size: meta.len(),
        modified: (meta.mtime(), meta.mtime_nsec() as u32),
        changed: Some((meta.ctime(), meta.ctime_nsec() as u32)),
        file: Some((meta.ino(), meta.mode() & 0o7777, meta.uid(), meta.gid())),
        ..Record::default()
    }
}

fn open_file(path: &Path) -> std::io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    std::fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

impl Place for Directory {
    fn list(&self, context: &Context, visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>) -> Result<Skipped> {
        let mut skipped = Skipped::default();
        self.walk(context, &self.root, b"", &mut skipped, visit)?;
        Ok(skipped)
    }

    fn begin(&self, key: &[u8], record: &Record) -> Result<Waiting> {
        let path = self.path_of(key)?;
        let fetched = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Fetched::Gone,
            Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
            Ok(_) => {
                let content = FileContent { path, record: record.clone(), file: None, why: None };
                Fetched::Found(Box::new(content), Vec::new())
            }
        };
        Ok(Box::new(move || Ok(fetched)))
    }

    fn ahead_max(&self) -> usize {
        1
    }

    fn open(&self, key: &[u8]) -> Result<Option<Box<dyn Read + Send>>> {
        let path = self.path_of(key)?;
        match open_file(&path) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot open {}", path.display()), error)),
        }
    }

    fn occupied(&self) -> Result<Option<String>> {
        let what = || format!("cannot list {}", self.root.display());
        let entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.or_io(what)?,
        };
        for entry in entries {
            let name = entry.or_io(what)?.file_name();
            if name != STAMP_KEY {
                return Ok(Some(format!("`{}` and what is beside it", name.to_string_lossy())));
            }
        }
        Ok(None)
    }

    fn read_stamp(&self) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(STAMP_KEY);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }

    fn write_stamp(&self, bytes: &[u8]) -> Result<()> {
        use std::io::Write;
        let what = || format!("cannot write the stamp to {}", self.root.display());
        let mut file = tempfile::Builder::new().prefix(".tmp-stamp-").tempfile_in(&self.root).or_io(what)?;
        file.write_all(bytes).and_then(|()| file.as_file().sync_all()).or_io(what)?;
        file.persist(self.root.join(STAMP_KEY)).map_err(|error| Error::io(what(), error.error))?;
        File::open(&self.root).and_then(|folder| folder.sync_all()).or_io(what)
    }
}

/// A file that is read as it was listed, or called torn.
struct FileContent {
    path: PathBuf,
    record: Record,
    file: Option<File>,
    /// Why the content is not that of the listing.
    why: Option<String>,
}

impl Content for FileContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let what = || format!("cannot read {}", self.path.display());
        if self.file.is_none() && self.why.is_none() {
            match open_file(&self.path) {
                Ok(file) => {
                    let meta = file.metadata().or_io(what)?;
                    let inode = self.record.file.map(|(inode, ..)| inode);
                    if inode != Some(meta.ino()) {
                        self.why = Some("was replaced while the point was taken".to_owned());
                    }
                    self.file = Some(file);
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    self.why = Some("was deleted before it was read".to_owned());
                }
                Err(error) => return Err(Error::io(what(), error)),
            }
        }
        let Some(file) = &mut self.file else { return Ok(0) };
        loop {
            match file.read(buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other.or_io(what),
            }
        }
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        if let (None, Some(file)) = (&self.why, &self.file) {
            let meta = file.metadata().or_io(|| format!("cannot look at {}", self.path.display()))?;
            let now = record(&meta);
            let same_content = (now.size, now.modified) == (self.record.size, self.record.modified);
            // A file without a name left was replaced or deleted: its content is still that of the
            // listing, and only its inode's time moved.
            if !same_content || (now.changed != self.record.changed && meta.nlink() > 0) {
                self.why = Some("was written while it was read".to_owned());
            }
        }
        Ok(self.why.take().map_or(ContentEnd::Whole, ContentEnd::Torn))
    }
}
