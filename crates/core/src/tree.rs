//! Named streams: how a driver hands a store's content out, and how it takes it back.
//!
//! A driver writes one tree of plain files per store into a [`Sink`] and reads it from a [`Tree`].
//! It knows nothing of repositories; the repository knows nothing of drivers. All calls here are
//! synchronous and may block: the engine runs every drain and restore on a thread of its own.

use std::fmt;
use std::io::Read;
use std::path::Path;

use crate::driver::Context;
use crate::error::{Error, Kind, Result};

/// Seconds since 1970-01-01 UTC and nanoseconds within the second, as `stat(2)` gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FileTime {
    /// Whole seconds; negative before 1970.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// What `lstat(2)` and the extended attributes say of one entry.
///
/// Drivers whose streams are not files leave everything but `mode` and `mtime` at the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits with set-uid, set-gid and sticky, without the file type: `0o7777`.
    pub mode: u32,
    /// Last change of content.
    pub mtime: FileTime,
    /// Last access.
    pub atime: FileTime,
    /// Last change of content or inode.
    pub ctime: FileTime,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name where known, else empty.
    pub user: String,
    /// Group's name where known, else empty.
    pub group: String,
    /// Inode number; 0 when there is none.
    pub inode: u64,
    /// Device that the inode lies on; with `inode` it names a hard-linked file.
    pub device: u64,
    /// Hard links to the inode; 0 when unknown.
    pub links: u64,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Metadata {
    /// Metadata for a stream that is no file: mode 0644 and the given time.
    pub fn stream(mtime: FileTime) -> Self {
        Self { mode: 0o644, mtime, atime: mtime, ctime: mtime, ..Self::default() }
    }

    /// Metadata for a directory that is no directory of the store's: mode 0755 and the given time.
    pub fn folder(mtime: FileTime) -> Self {
        Self { mode: 0o755, ..Self::stream(mtime) }
    }
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file or stream of `size` bytes.
    File {
        /// Length in bytes.
        size: u64,
    },
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink {
        /// Where it points, as stored, any bytes.
        target: Vec<u8>,
    },
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice {
        /// `st_rdev`.
        device: u64,
    },
    /// A block device.
    BlockDevice {
        /// `st_rdev`.
        device: u64,
    },
}

/// One entry of a stored directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name within its directory, any bytes but `/` and NUL, never empty, `.` or `..`.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: NodeKind,
    /// What `lstat(2)` said.
    pub meta: Metadata,
}

/// Bytes of one stream, pulled by a worker of the repository when its turn comes.
///
/// `read` follows `std::io::Read`: 0 means end. A content that waits for another content of the
/// same drain deadlocks: streams must make progress on their own.
pub trait Content: Send {
    /// Reads the next bytes into `buffer`; 0 at the end.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize>;

    /// Called once after the end was read. The driver checks that what was read is what the cut
    /// shows; a torn stream is reported here as [`ContentEnd::Torn`], never as a success.
    fn finish(&mut self) -> Result<ContentEnd> {
        Ok(ContentEnd::Whole)
    }
}

/// What became of a stream once it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContentEnd {
    /// The bytes are those of the cut.
    Whole,
    /// The bytes are not, or not all, those of the cut; the reason is for people.
    /// The sink keeps what it read and lists the stream as torn.
    Torn(String),
}

/// A [`Content`] over any reader.
pub struct Reader<R>(pub R);

impl<R: Read + Send> Content for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other.map_err(|error| Error::io("cannot read the stream", error)),
            }
        }
    }
}

/// A [`Content`] over bytes in memory, for small files such as `HOW-TO-RESTORE.txt`.
pub fn bytes(data: impl Into<Vec<u8>>) -> Box<dyn Content> {
    Box::new(Reader(std::io::Cursor::new(data.into())))
}

/// Where a drain puts its tree.
///
/// # Flow
/// The sink stands in the store's top folder. `enter`/`leave` move; `file`, `node` and `reuse` add
/// to the current directory. Names within one directory come in ascending byte order, folders
/// included; out of order is an error, because a directory of any size must be written as it comes.
///
/// # Guarantees (duty of the sink)
/// Memory stays bounded; a call blocks while the pipeline is full. Content is read later and in
/// parallel, on other threads. `finish` of the whole drain waits for all of it.
pub trait Sink: Send {
    /// Enters a new directory of the current one.
    fn enter(&mut self, name: &[u8], meta: &Metadata) -> Result<()>;

    /// Ends the current directory and returns to the one around it.
    fn leave(&mut self) -> Result<()>;

    /// Adds a file. `size_hint` helps to schedule; the true size is counted while reading.
    fn file(&mut self, name: &[u8], meta: &Metadata, size_hint: Option<u64>, content: Box<dyn Content>) -> Result<()>;

    /// Adds an entry without content: link, pipe, socket, device.
    fn node(&mut self, node: &Node) -> Result<()>;

    /// The entry of the same name in the same directory of the parent point, if there is one.
    ///
    /// Calls with ascending names cost no search.
    fn parent(&mut self, name: &[u8]) -> Result<Option<Node>>;

    /// Adds the parent's entry of this name again, with `meta`, without reading any content.
    /// Works for files and for whole directories. Fails with `NotFound` if the parent lacks it.
    fn reuse(&mut self, name: &[u8], meta: &Metadata) -> Result<()>;
}

/// A path inside a store's tree: the names from its top folder down.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TreePath(Vec<Vec<u8>>);

impl TreePath {
    /// The store's top folder.
    pub fn root() -> Self {
        Self::default()
    }

    /// Splits `text` at `/`. Empty parts are left out; `.` and `..` are refused.
    pub fn parse(text: &str) -> Result<Self> {
        let mut path = Self::root();
        for part in text.split('/').filter(|part| !part.is_empty()) {
            path.push(part.as_bytes())?;
        }
        Ok(path)
    }

    /// Appends a name; refuses what could leave the tree.
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        check_name(name)?;
        self.0.push(name.to_vec());
        Ok(())
    }

    /// The path one level down.
    pub fn join(&self, name: &[u8]) -> Result<Self> {
        let mut path = self.clone();
        path.push(name)?;
        Ok(path)
    }

    /// The names, outermost first.
    pub fn names(&self) -> &[Vec<u8>] {
        &self.0
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("/")?;
            }
            f.write_str(&String::from_utf8_lossy(name))?;
        }
        Ok(())
    }
}

/// Refuses names that are no plain directory entry: empty, `.`, `..`, with `/` or NUL.
///
/// Names come from stores and from buckets; both may be hostile.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        let shown = String::from_utf8_lossy(name).into_owned();
        return Err(Error::new(Kind::Corrupt, format!("`{shown}` is not a valid file name")));
    }
    Ok(())
}

/// What to do with what is found in a directory that a tree is extracted into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Fail if the directory is there and not empty. The default of every restore.
    Refuse,
    /// Make the directory equal to the tree: change what differs, delete what is not in the tree.
    Replace,
}

/// How a tree is extracted into a local directory.
#[derive(Debug, Clone)]
pub struct ExtractOptions {
    /// What to do with what is there.
    pub existing: Existing,
    /// Whether owner and group are set; needs privileges. Off when not root.
    pub owners: bool,
}

/// Counts of an extraction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Regular files written.
    pub files: u64,
    /// Bytes of content written, holes included.
    pub bytes: u64,
    /// Things that could not be reproduced exactly (an owner, an attribute), each for people.
    pub losses: Vec<String>,
}

/// One difference between a tree and a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where, from the top of the compared tree.
    pub path: String,
    /// What differs, for people.
    pub what: String,
}

/// What is stored of one store in one point, for reading.
pub trait Tree: Send + Sync + fmt::Debug {
    /// The entry at `path`, or `None`. The root is a directory.
    fn get(&self, path: &TreePath) -> Result<Option<Node>>;

    /// Calls `visit` for each entry of the directory at `path`, in ascending order of names,
    /// until it returns `false`. Memory does not grow with the directory.
    fn list(&self, path: &TreePath, visit: &mut dyn FnMut(Node) -> Result<bool>) -> Result<()>;

    /// Opens the file at `path` for reading from its begin. Every byte is verified before it is
    /// handed out.
    fn open(&self, path: &TreePath) -> Result<Box<dyn Read + Send>>;

    /// Writes the directory at `path` to the local directory `to`, at full speed, verified:
    /// content, holes, hard links, links, special files, modes, times, attributes, owners.
    ///
    /// Counts what it writes in `context`, and stops with `Cancelled` soon after that is cancelled;
    /// what was written by then stays.
    fn extract(&self, path: &TreePath, to: &Path, options: &ExtractOptions, context: &Context) -> Result<Extracted>;

    /// Re-reads the local directory and compares names, types and every byte with the directory
    /// at `path`. At most 100 differences are returned; an empty list means equal. Stops with
    /// `Cancelled` soon after `context` is cancelled.
    fn compare(&self, path: &TreePath, with: &Path, context: &Context) -> Result<Vec<Difference>>;

    /// The concrete tree, for a repository that recognises its own as a parent of a new backup.
    /// Trees that are no such parent answer `None`.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }
}

/// Reads a small file whole; refuses files above `limit_bytes`.
pub fn read_small(tree: &dyn Tree, path: &TreePath, limit_bytes: u64) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    let reader = tree.open(path)?;
    reader
        .take(limit_bytes + 1)
        .read_to_end(&mut data)
        .map_err(|error| Error::io(format!("cannot read `{path}`"), error))?;
    if data.len() as u64 > limit_bytes {
        return Err(Error::new(Kind::Corrupt, format!("`{path}` is larger than {limit_bytes} bytes")));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_tree_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in [&b"..."[..], b"a b", b"\xff\xfe", b"..a", b"-rf"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        assert!(TreePath::parse("a/../b").is_err());
        assert_eq!(TreePath::parse("/a//b/").expect("valid").to_string(), "a/b");
    }
}
