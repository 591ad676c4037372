//! Everything that touches the file system: opening, listing, looking, reading, the clock.
//!
//! Nothing here follows a symbolic link below the top of a tree, also not one that someone puts in
//! the way while we look: paths are resolved by the kernel with links forbidden.

use std::ffi::{CStr, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    Advice, AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags, StatxFlags, fadvise, openat, openat2, statx,
};
use rustix::io::Errno;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd, FileTime, NodeKind};

const TYPE_MASK: u32 = 0o170_000;
const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const FIFO: u32 = 0o010_000;
const SOCKET: u32 = 0o140_000;
const CHARACTER: u32 = 0o020_000;
const BLOCK: u32 = 0o060_000;

/// From this size on the kernel is told that a file is read from begin to end.
const SEQUENTIAL_BYTES_MIN: u64 = 1 << 20;

/// What `lstat` says of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) mode: u32,
    pub(super) size: u64,
    pub(super) inode: u64,
    pub(super) device: u64,
    pub(super) links: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) special: u64,
    pub(super) mtime: FileTime,
    pub(super) ctime: FileTime,
    /// When the inode was made, where the file system knows.
    pub(super) born: Option<FileTime>,
}

impl Stat {
    pub(super) fn is_dir(&self) -> bool {
        self.mode & TYPE_MASK == DIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.mode & TYPE_MASK == FILE
    }

    /// Whether content and inode are the same as `other` saw them.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.inode, self.size, self.mtime, self.ctime) == (other.inode, other.size, other.mtime, other.ctime)
    }

    /// The kind of node; `target` reads a link's target.
    pub(super) fn kind(&self, target: impl FnOnce() -> Result<Vec<u8>>) -> Result<NodeKind> {
        Ok(match self.mode & TYPE_MASK {
            FILE => NodeKind::File { size: self.size },
            DIR => NodeKind::Dir,
            LINK => NodeKind::Symlink { target: target()? },
            FIFO => NodeKind::Fifo,
            SOCKET => NodeKind::Socket,
            CHARACTER => NodeKind::CharDevice { device: self.special },
            BLOCK => NodeKind::BlockDevice { device: self.special },
            other => return Err(Error::new(Kind::Unsupported, format!("a file of the unknown type {other:o}"))),
        })
    }
}

/// Opens a top directory; this one path may hold links.
pub(super) fn open_top(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(std::io::Error::from).or_io(|| match path.is_dir() {
        true => format!("cannot open `{}`", path.display()),
        false => format!("`{}` is not a directory that can be read", path.display()),
    })
}

/// Opens a directory within another one; `None` if it vanished or is none any more.
pub(super) fn open_below(above: BorrowedFd<'_>, name: &OsStr) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(above, name, flags, Mode::empty()) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(errno) => Err(Error::io(format!("cannot open the directory `{}`", name.display()), errno.into())),
    }
}

/// Looks at an entry without following it; `None` if it is not there.
pub(super) fn look<P: rustix::path::Arg>(at: BorrowedFd<'_>, name: P) -> std::io::Result<Option<Stat>> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    match statx(at, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, mask) {
        Ok(found) => Ok(Some(stat_of(&found))),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Looks at what is open.
pub(super) fn look_at(fd: BorrowedFd<'_>) -> std::io::Result<Stat> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    Ok(stat_of(&statx(fd, c"", AtFlags::EMPTY_PATH, mask)?))
}

fn stat_of(found: &rustix::fs::Statx) -> Stat {
    let time = |time: rustix::fs::StatxTimestamp| FileTime { seconds: time.tv_sec, nanos: time.tv_nsec };
    let born = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    Stat {
        mode: found.stx_mode.into(),
        size: found.stx_size,
        inode: found.stx_ino,
        device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
        links: found.stx_nlink.into(),
        uid: found.stx_uid,
        gid: found.stx_gid,
        special: rustix::fs::makedev(found.stx_rdev_major, found.stx_rdev_minor),
        mtime: time(found.stx_mtime),
        ctime: time(found.stx_ctime),
        born: born.then(|| time(found.stx_btime)),
    }
}

/// The names of one directory in ascending byte order, in one piece of memory: a directory may
/// hold millions.
#[derive(Debug, Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    /// Begin and length, sorted by what they point at.
    spans: Vec<(u32, u8)>,
}

impl Names {
    /// Reads a directory, without `.` and `..`.
    pub(super) fn read(fd: BorrowedFd<'_>, buffer: &mut [MaybeUninit<u8>]) -> Result<Self> {
        let mut names = Self::default();
        let mut entries = RawDir::new(fd, buffer);
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(std::io::Error::from).or_io(|| "cannot list a directory".to_owned())?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.add(name)?;
            }
        }
        let bytes = &names.bytes;
        let name = |(begin, length): (u32, u8)| &bytes[begin as usize..begin as usize + length as usize];
        names.spans.sort_unstable_by(|a, b| name(*a).cmp(name(*b)));
        // A name that is deleted and made again while we list may be listed twice.
        names.spans.dedup_by(|a, b| name(*a) == name(*b));
        Ok(names)
    }

    fn add(&mut self, name: &[u8]) -> Result<()> {
        let span = u32::try_from(self.bytes.len()).ok().zip(u8::try_from(name.len()).ok());
        let span = span.ok_or_else(|| Error::new(Kind::Unsupported, "a directory with more than 4 GiB of names"))?;
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.spans.push(span);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// The name at `index`, ready for the kernel.
    pub(super) fn get(&self, index: usize) -> &CStr {
        let (begin, length) = self.spans[index];
        let bytes = &self.bytes[begin as usize..=begin as usize + length as usize];
        CStr::from_bytes_with_nul(bytes).expect("the kernel's names hold no NUL, and one was added")
    }
}

/// Where a link points.
pub(super) fn link_target(at: BorrowedFd<'_>, name: &CStr) -> Result<Vec<u8>> {
    rustix::fs::readlinkat(at, name, Vec::new())
        .map(std::ffi::CString::into_bytes)
        .map_err(std::io::Error::from)
        .or_io(|| format!("cannot read the link `{}`", name.to_string_lossy()))
}

/// An entry's extended attributes, sorted. None where the file system has none.
pub(super) fn xattrs(at: BorrowedFd<'_>, name: &CStr) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    use std::os::fd::AsRawFd;
    // The kernel has no `llistxattrat` before 6.13; this path names the directory we hold.
    let path = format!("/proc/self/fd/{}/", at.as_raw_fd());
    let path = Path::new(&path).join(OsStr::from_bytes(name.to_bytes()));
    let names = match xattr::list(&path) {
        Ok(names) => names,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("cannot list the attributes of `{}`", path.display()), error)),
    };
    let mut found = Vec::new();
    for name in names {
        match xattr::get(&path, &name) {
            Ok(Some(value)) => found.push((name.as_bytes().to_vec(), value)),
            Ok(None) => {}
            Err(error) if is_absent(&error) => {}
            Err(error) => {
                return Err(Error::io(format!("cannot read an attribute of `{}`", path.display()), error)
                    .context("attribute", name.display()));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// No such attribute, no such file any more, or a file system without attributes.
fn is_absent(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NODATA | Errno::NOENT | Errno::NOTSUP | Errno::NOSYS))
}

/// The top of a tree, as readers of its files share it.
#[derive(Debug)]
pub(super) struct Top {
    pub(super) fd: OwnedFd,
    /// Whether the kernel lets us read without touching access times; off after the first refusal.
    leaves_atime: AtomicBool,
}

impl Top {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Ok(Self { fd: open_top(path)?, leaves_atime: AtomicBool::new(true) })
    }

    /// Opens a file by its path from the top, following no link on the way; `None` if it vanished.
    pub(super) fn open_file(&self, path: &[u8]) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        if self.leaves_atime.load(Ordering::Relaxed) {
            match self.resolve(path, flags | OFlags::NOATIME) {
                Err(Errno::PERM) => self.leaves_atime.store(false, Ordering::Relaxed),
                other => return opened(path, other),
            }
        }
        opened(path, self.resolve(path, flags))
    }

    fn resolve(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match openat2(&self.fd, path, flags, Mode::empty(), resolve) {
            Err(Errno::NOSYS) => self.resolve_by_parts(path, flags),
            // Raced with a rename; the kernel asks to try again.
            Err(Errno::AGAIN) => openat2(&self.fd, path, flags, Mode::empty(), resolve),
            other => other,
        }
    }

    /// What `openat2` does, for kernels and sandboxes without it.
    fn resolve_by_parts(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let mut parts = path.split(|byte| *byte == b'/').peekable();
        let mut at: Option<OwnedFd> = None;
        while let Some(part) = parts.next() {
            let above = at.as_ref().map_or(self.fd.as_fd(), OwnedFd::as_fd);
            let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let flags = if parts.peek().is_some() { folder } else { flags };
            at = Some(openat(above, part, flags, Mode::empty())?);
        }
        at.ok_or(Errno::NOENT)
    }
}

fn opened(path: &[u8], outcome: rustix::io::Result<OwnedFd>) -> Result<Option<OwnedFd>> {
    match outcome {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => Ok(None),
        Err(errno) => {
            let shown = String::from_utf8_lossy(path);
            Err(Error::io(format!("cannot open `{shown}`"), errno.into()))
        }
    }
}

/// The content of one file, opened when its turn comes.
pub(super) struct FileContent {
    pub(super) context: Context,
    pub(super) top: Arc<Top>,
    /// From the top.
    pub(super) path: Vec<u8>,
    /// What the walk saw after the cut.
    pub(super) seen: Stat,
    /// Why this is not what the cut showed, if the walk knows already.
    pub(super) torn: Option<String>,
    pub(super) state: Reading,
}

/// How far reading went.
pub(super) enum Reading {
    NotOpened,
    Open(OwnedFd, u64),
    Vanished,
}

impl Content for FileContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.context.check()?;
        if matches!(self.state, Reading::NotOpened) {
            self.state = match self.top.open_file(&self.path)? {
                Some(fd) => Reading::Open(fd, 0),
                None => Reading::Vanished,
            };
            if let Reading::Open(fd, _) = &self.state
                && self.seen.size >= SEQUENTIAL_BYTES_MIN
            {
                // Only advice: a file system that does not take it reads as well.
                fadvise(fd, 0, None, Advice::Sequential).ok();
            }
        }
        let Reading::Open(fd, done) = &mut self.state else { return Ok(0) };
        // The end is known: asking for it would cost one more call per file. Growth shows in `finish`.
        if *done == self.seen.size {
            return Ok(0);
        }
        let room = usize::try_from(self.seen.size - *done).unwrap_or(usize::MAX).min(buffer.len());
        let count = loop {
            match rustix::io::read(&mut *fd, &mut buffer[..room]) {
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let shown = String::from_utf8_lossy(&self.path);
                    return Err(Error::io(format!("cannot read `{shown}`"), errno.into()));
                }
                Ok(count) => break count,
            }
        };
        *done += count as u64;
        self.context.advance(count as u64, 0);
        Ok(count)
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        self.context.advance(0, 1);
        if let Some(why) = self.torn.take() {
            return Ok(ContentEnd::Torn(why));
        }
        let Reading::Open(fd, done) = &self.state else {
            return Ok(ContentEnd::Torn("deleted between the cut and its turn to be read".to_owned()));
        };
        let shown = || format!("cannot look at `{}`", String::from_utf8_lossy(&self.path));
        let now = look_at(fd.as_fd()).or_io(shown)?;
        Ok(if now.is_same(&self.seen) && *done == self.seen.size {
            ContentEnd::Whole
        } else {
            ContentEnd::Torn("changed while it was read, after the cut".to_owned())
        })
    }
}

/// The kernel's clock for file times, and whether someone set it.
#[derive(Debug)]
pub(super) struct Clock {
    /// The kernel fails a read of this timer once the clock was set.
    timer: Option<OwnedFd>,
    set: AtomicBool,
}

impl Clock {
    /// Begins to notice whether the clock is set.
    pub(super) fn watch() -> Self {
        use rustix::time::{
            Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Far enough never to ring; i64::MAX would overflow in the kernel.
        let never = Itimerspec { it_interval: zero, it_value: Timespec { tv_sec: 1 << 40, tv_nsec: 0 } };
        let armed = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC).and_then(
            |timer| {
                let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
                timerfd_settime(&timer, flags, &never).map(|_| timer)
            },
        );
        Self { timer: armed.ok(), set: AtomicBool::new(false) }
    }

    /// Now, as finely as there is.
    pub(super) fn now(&self) -> FileTime {
        file_time(rustix::time::clock_gettime(rustix::time::ClockId::Realtime))
    }

    /// The time that a file changed right now would get, at least.
    pub(super) fn coarse(&self) -> FileTime {
        file_time(rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse))
    }

    /// Whether the clock was set since `watch`, or nobody can say. Slow corrections do not count:
    /// under them time never goes back.
    pub(super) fn was_set(&self) -> bool {
        let Some(timer) = &self.timer else { return true };
        if matches!(rustix::io::read(timer, &mut [0; 8]), Err(Errno::CANCELED)) {
            self.set.store(true, Ordering::Relaxed);
        }
        self.set.load(Ordering::Relaxed)
    }

    /// Pretends that someone set the clock.
    #[cfg(test)]
    pub(super) fn pretend_set(&self) {
        self.set.store(true, Ordering::Relaxed);
    }
}

fn file_time(time: rustix::time::Timespec) -> FileTime {
    FileTime { seconds: time.tv_sec, nanos: u32::try_from(time.tv_nsec).unwrap_or(0) }
}

/// What a file system is called, and whether its file times come from this machine's clock.
pub(super) fn file_system(fd: BorrowedFd<'_>) -> Result<(String, bool, u64)> {
    let failed = || "cannot ask the file system for its kind".to_owned();
    let found = rustix::fs::fstatfs(fd).map_err(std::io::Error::from).or_io(failed)?;
    let (name, is_local) = match u32::try_from(found.f_type).unwrap_or(0) {
        0xef53 => ("ext4", true),
        0x5846_5342 => ("xfs", true),
        BTRFS => ("btrfs", true),
        0x0102_1994 => ("tmpfs", true),
        0x794c_7630 => ("overlay", true),
        0xf2f5_2010 => ("f2fs", true),
        0xca45_1a4e => ("bcachefs", true),
        0x2fc1_2fc1 => ("zfs", true),
        0x6969 => ("nfs", false),
        0xff53_4d42 | 0xfe53_4d42 => ("smb", false),
        0x6573_5546 => ("fuse", false),
        0x0102_1997 => ("9p", false),
        0x00c3_6400 => ("ceph", false),
        _ => ("unknown", false),
    };
    let id = rustix::fs::fstatvfs(fd).map_err(std::io::Error::from).or_io(failed)?.f_fsid;
    Ok((name.to_owned(), is_local, id))
}

/// `f_type` of btrfs.
pub(super) const BTRFS: u32 = 0x9123_683e;

/// Names of users and groups as the machine's own lists give them.
#[derive(Debug, Default)]
pub(super) struct Owners {
    users: std::collections::HashMap<u32, String>,
    groups: std::collections::HashMap<u32, String>,
}

impl Owners {
    /// Reads the lists. Without them, numbers are all that is kept.
    pub(super) fn read() -> Self {
        Self { users: names_by_id("/etc/passwd"), groups: names_by_id("/etc/group") }
    }

    pub(super) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_default()
    }

    pub(super) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_default()
    }
}

fn names_by_id(list: &str) -> std::collections::HashMap<u32, String> {
    let text = std::fs::read_to_string(list).unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    text.lines().filter_map(entry).collect()
}
