//! Sees every write to a directory tree as it happens, so that a store made of files can say
//! whether anything was written between two moments.
//!
//! Shared by the drivers `files` and `objects`. Built on inotify: the kernel queues an event before
//! the call that wrote returns, so that a position read after an acknowledged write differs from
//! one read before it. Reading a position costs as much as there were writes since the last one,
//! whatever the tree holds.
//!
//! What it cannot see, and the drivers' READMEs say: writes through memory maps, writes by other
//! machines, and writes through a hard link that lies outside the tree (unless the file itself is
//! watched, see [`Watch::add_file`]). Where it loses sight (queue overflow, unmount, too many
//! directories), it says so for good and never reports a position again.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::position::Position;

/// How often the queue is emptied in between, so that it does not overflow. The kernel's default
/// queue holds 16,384 events.
const EMPTY_EVERY: Duration = Duration::from_millis(20);

/// One watch costs the kernel about a kilobyte.
const DIRECTORIES_MAX_DEFAULT: usize = 100_000;

/// What happened to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A file or directory appeared, or was found in a directory that appeared.
    Created,
    /// Content was written or cut off.
    Written,
    /// Mode, owner, times, link count or extended attributes changed.
    Attributes,
    /// A file or directory was deleted.
    Removed,
    /// Something was renamed to this name.
    MovedIn,
    /// Something was renamed away from this name.
    MovedOut,
}

/// One change, in the order in which the kernel reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Relative to the watched root; empty for the root itself.
    pub path: PathBuf,
    /// What happened.
    pub change: Change,
    /// Whether the name is, or was, that of a directory.
    pub is_dir: bool,
}

/// Says by the path relative to the root whether something is left out of sight.
pub type Exclude = Arc<dyn Fn(&Path) -> bool + Send + Sync>;

/// What to watch, and how.
#[derive(Clone)]
pub struct Options {
    /// Whether directories on other file systems are left out.
    pub one_file_system: bool,
    /// Directories above this number make the watch fail with `Exhausted`.
    pub directories_max: usize,
    /// Names kept for [`Watch::take`]; 0 keeps none. Above it the names are lost, the count is not.
    pub events_max: usize,
    /// Left out, with all below.
    pub exclude: Option<Exclude>,
}

impl Default for Options {
    fn default() -> Self {
        Self { one_file_system: false, directories_max: DIRECTORIES_MAX_DEFAULT, events_max: 0, exclude: None }
    }
}

/// A running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    emptier: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    state: Mutex<State>,
}

struct State {
    queue: OwnedFd,
    root: PathBuf,
    root_device: u64,
    options: Options,
    /// Tells the positions of different watches apart.
    instance: String,
    directories: HashMap<i32, Directory>,
    below: HashMap<(i32, Vec<u8>), i32>,
    count: u64,
    events: VecDeque<Event>,
    events_lost: bool,
    /// Why nothing more can be said, once that is so.
    blind: Option<String>,
}

/// A watched directory: where it hangs. A directory that was moved out of the tree hangs nowhere.
#[derive(Debug, Clone)]
struct Directory {
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Root,
    In(i32, Vec<u8>),
    Gone,
    /// A single file, watched for the sake of its other hard links.
    File(PathBuf),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} directories below {}, {} events", self.directories.len(), self.root.display(), self.count)
    }
}

impl Watch {
    /// Watches the directory `root` and everything below. Takes as long as listing the directories.
    ///
    /// Fails with `Exhausted` if there are more directories than `options` or the kernel
    /// (`fs.inotify.max_user_watches`) allow; the driver then reports no positions.
    pub fn begin(root: &Path, options: Options) -> Result<Self> {
        static INSTANCES: AtomicU64 = AtomicU64::new(0);
        let queue =
            inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|errno| no_watch(root, errno))?;
        let meta = std::fs::metadata(root).or_io(|| format!("cannot look at `{}`", root.display()))?;
        let instance = format!("{}-{}", std::process::id(), INSTANCES.fetch_add(1, Ordering::Relaxed));
        let mut state = State {
            queue,
            root: root.to_owned(),
            root_device: meta.dev(),
            options,
            instance,
            directories: HashMap::new(),
            below: HashMap::new(),
            count: 0,
            events: VecDeque::new(),
            events_lost: false,
            blind: None,
        };
        state.add_tree(Place::Root, false)?;
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), state: Mutex::new(state) });
        let emptier = Arc::clone(&shared);
        let emptier = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || empty_until_stopped(&emptier))
            .or_io(|| "cannot start the thread of a watch".to_owned())?;
        Ok(Self { shared, emptier: Some(emptier) })
    }

    /// Also watches one file by its inode, so that writes through any of its hard links count.
    pub fn add_file(&self, path: &Path) -> Result<()> {
        let mut state = self.lock();
        let full = state.root.join(path);
        let flags = WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::DONT_FOLLOW | WatchFlags::MASK_CREATE;
        match inotify::add_watch(&state.queue, &full, flags) {
            Ok(number) => {
                state.directories.insert(number, Directory { place: Place::File(path.to_owned()) });
                Ok(())
            }
            Err(Errno::EXIST | Errno::NOENT) => Ok(()),
            Err(errno) => Err(no_watch(&full, errno)),
        }
    }

    /// Where the tree stands: equal answers promise that no write became visible in between.
    /// `None` once sight was lost.
    pub fn position(&self) -> Option<Position> {
        let mut state = self.lock();
        state.empty();
        let text = format!("{}.{}", state.instance, state.count);
        state.blind.is_none().then(|| Position::new("inotify", text))
    }

    /// The changes since the last call, in order; `None` if some were lost, which stays so.
    ///
    /// Several writes to one file may be reported as one. A directory that appeared with content
    /// reports the content as `Created`, possibly twice.
    pub fn take(&self) -> Option<Vec<Event>> {
        let mut state = self.lock();
        state.empty();
        let whole = state.blind.is_none() && !state.events_lost;
        whole.then(|| state.events.drain(..).collect())
    }

    /// Why no position is reported any more, for people; `None` while it is.
    pub fn blind(&self) -> Option<String> {
        self.lock().blind.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no holder panics")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(emptier) = self.emptier.take() {
            emptier.thread().unpark();
            // A panic there was already reported by the panic hook, and nothing is left to do.
            drop(emptier.join());
        }
    }
}

fn empty_until_stopped(shared: &Shared) {
    while !shared.stop.load(Ordering::Relaxed) {
        shared.state.lock().expect("no holder panics").empty();
        std::thread::park_timeout(EMPTY_EVERY);
    }
}

fn no_watch(path: &Path, errno: Errno) -> Error {
    let message = format!("cannot watch `{}`", path.display());
    match errno {
        Errno::NOSPC | Errno::MFILE => Error::new(Kind::Exhausted, message)
            .hint("raise fs.inotify.max_user_watches and fs.inotify.max_user_instances")
            .source(std::io::Error::from(errno)),
        _ => Error::io(message, errno.into()),
    }
}

impl State {
    /// Reads everything that the kernel has queued.
    fn empty(&mut self) {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 16 * 1024];
        while self.blind.is_none() {
            let mut found = Vec::new();
            let mut reader = Reader::new(&self.queue, &mut buffer);
            let end = loop {
                match reader.next() {
                    Ok(event) => {
                        let name = event.file_name().map(|name| name.to_bytes().to_vec());
                        found.push((event.wd(), event.events(), name.unwrap_or_default()));
                        if reader.is_buffer_empty() {
                            break Ok(());
                        }
                    }
                    Err(errno) => break Err(errno),
                }
            };
            for (number, flags, name) in found {
                self.handle(number, flags, name);
            }
            match end {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => self.go_blind(format!("the kernel's queue failed: {errno}")),
            }
        }
    }

    fn go_blind(&mut self, why: String) {
        self.blind.get_or_insert(why);
        self.events = VecDeque::new();
    }

    fn handle(&mut self, number: i32, flags: ReadFlags, name: Vec<u8>) {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.go_blind("more writes than the kernel's queue holds".to_owned());
        }
        if flags.contains(ReadFlags::UNMOUNT) {
            return self.go_blind("a watched file system was unmounted".to_owned());
        }
        if flags.contains(ReadFlags::IGNORED) {
            return self.forget(number);
        }
        let is_dir = flags.contains(ReadFlags::ISDIR);
        let Some(path) = self.path_of(number, &name) else { return };
        if self.is_excluded(&path) {
            return;
        }
        self.count += 1;
        let appeared = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
        let moved_away = flags.contains(ReadFlags::MOVED_FROM);
        if is_dir
            && moved_away
            && let Some(gone) = self.below.remove(&(number, name.clone()))
        {
            self.directories.insert(gone, Directory { place: Place::Gone });
        }
        if let Some(change) = change_of(flags) {
            self.keep(Event { path, change, is_dir });
        }
        if is_dir
            && appeared
            && let Err(error) = self.add_tree(Place::In(number, name), true)
        {
            self.go_blind(error.to_string());
        }
    }

    fn keep(&mut self, event: Event) {
        if self.options.events_max == 0 {
            return;
        }
        if self.events.len() >= self.options.events_max {
            self.events_lost = true;
            self.events = VecDeque::new();
        }
        if !self.events_lost {
            self.events.push_back(event);
        }
    }

    fn forget(&mut self, number: i32) {
        if let Some(Directory { place: Place::In(above, name) }) = self.directories.remove(&number)
            && self.below.get(&(above, name.clone())) == Some(&number)
        {
            self.below.remove(&(above, name));
        }
    }

    fn is_excluded(&self, path: &Path) -> bool {
        self.options.exclude.as_ref().is_some_and(|exclude| !path.as_os_str().is_empty() && exclude(path))
    }

    /// Where a watched directory's `name` is, relative to the root; `None` when it left the tree.
    fn path_of(&self, number: i32, name: &[u8]) -> Option<PathBuf> {
        let mut names = vec![name];
        let mut at = number;
        loop {
            match &self.directories.get(&at)?.place {
                Place::Root => break,
                Place::In(above, name) => {
                    names.push(name);
                    at = *above;
                }
                Place::Gone => return None,
                Place::File(path) => return Some(path.clone()),
            }
        }
        Some(names.iter().rev().filter(|name| !name.is_empty()).map(|name| OsStr::from_bytes(name)).collect())
    }

    /// Watches the directory at `top` and all below; with `report`, what is found counts as
    /// created, because it may have come before the watch did.
    fn add_tree(&mut self, top: Place, report: bool) -> Result<()> {
        let mut waiting = vec![top];
        while let Some(place) = waiting.pop() {
            let Some(number) = self.add_directory(place)? else { continue };
            let Some(path) = self.path_of(number, b"") else { continue };
            // A directory that vanishes while it is listed reported its end itself.
            let Ok(entries) = std::fs::read_dir(self.root.join(&path)) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let below = path.join(&name);
                if self.is_excluded(&below) {
                    continue;
                }
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_dir {
                    waiting.push(Place::In(number, name.as_bytes().to_vec()));
                }
                if report {
                    self.count += 1;
                    self.keep(Event { path: below, change: Change::Created, is_dir });
                }
            }
        }
        Ok(())
    }

    /// Watches one directory; `None` if it vanished or is left out.
    fn add_directory(&mut self, place: Place) -> Result<Option<i32>> {
        let path = match &place {
            Place::In(above, name) => match self.path_of(*above, name) {
                Some(path) => self.root.join(path),
                None => return Ok(None),
            },
            _ => self.root.clone(),
        };
        if place != Place::Root && self.options.one_file_system {
            match std::fs::symlink_metadata(&path) {
                Ok(meta) if meta.dev() == self.root_device => {}
                _ => return Ok(None),
            }
        }
        if self.directories.len() >= self.options.directories_max {
            let max = self.options.directories_max;
            return Err(Error::new(Kind::Exhausted, format!("more than {max} directories to watch")));
        }
        let flags = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let flags = if place == Place::Root { flags } else { flags | WatchFlags::DONT_FOLLOW };
        match inotify::add_watch(&self.queue, &path, flags) {
            Ok(number) => {
                // The kernel gives one number per inode: a directory that moved keeps its own.
                self.forget(number);
                if let Place::In(above, name) = &place {
                    self.below.insert((*above, name.clone()), number);
                }
                self.directories.insert(number, Directory { place });
                Ok(Some(number))
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if place != Place::Root => Ok(None),
            Err(errno) => Err(no_watch(&path, errno)),
        }
    }
}

fn change_of(flags: ReadFlags) -> Option<Change> {
    let pairs = [
        (ReadFlags::CREATE, Change::Created),
        (ReadFlags::MODIFY, Change::Written),
        (ReadFlags::ATTRIB, Change::Attributes),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF, Change::Removed),
        (ReadFlags::MOVED_TO, Change::MovedIn),
        (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, Change::MovedOut),
    ];
    pairs.into_iter().find(|(flag, _)| flags.intersects(*flag)).map(|(_, change)| change)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn watched(events_max: usize) -> (tempfile::TempDir, Watch) {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("a/b")).expect("folders");
        fs::write(folder.path().join("a/b/f"), "1").expect("a file");
        let watch = Watch::begin(folder.path(), Options { events_max, ..Options::default() }).expect("a watch");
        (folder, watch)
    }

    #[test]
    fn positions_are_equal_without_writes_and_differ_after_each_kind_of_write() {
        let (folder, watch) = watched(0);
        let at = |path: &str| folder.path().join(path);
        let steps: [(&str, &dyn Fn()); 8] = [
            ("write", &|| fs::write(at("a/b/f"), "2").expect("write")),
            ("create", &|| fs::write(at("a/g"), "").expect("create")),
            ("rename", &|| fs::rename(at("a/g"), at("a/b/g")).expect("rename")),
            ("chmod", &|| {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(at("a/b/g"), fs::Permissions::from_mode(0o600)).expect("chmod");
            }),
            ("new directory", &|| fs::create_dir_all(at("n/m")).expect("mkdir")),
            ("in the new directory", &|| fs::write(at("n/m/x"), "x").expect("write")),
            ("link", &|| fs::hard_link(at("n/m/x"), at("n/y")).expect("link")),
            ("delete", &|| fs::remove_file(at("n/m/x")).expect("delete")),
        ];
        for (what, step) in steps {
            let before = watch.position().expect("sight");
            assert_eq!(watch.position().expect("sight"), before, "before {what}");
            step();
            assert_ne!(watch.position().expect("sight"), before, "after {what}");
        }
    }

    #[test]
    fn names_come_in_order_and_survive_a_moved_directory() {
        let (folder, watch) = watched(100);
        let at = |path: &str| folder.path().join(path);
        fs::rename(at("a/b"), at("c")).expect("rename");
        watch.position().expect("sight");
        fs::write(at("c/f"), "2").expect("write");
        let names: Vec<_> = watch.take().expect("whole").into_iter().map(|e| (e.path, e.change)).collect();
        let moved: Vec<_> = names.iter().take(2).cloned().collect();
        assert_eq!(moved, [(PathBuf::from("a/b"), Change::MovedOut), (PathBuf::from("c"), Change::MovedIn)]);
        assert!(names.contains(&(PathBuf::from("c/f"), Change::Written)), "{names:?}");
        assert!(watch.take().expect("whole").is_empty());
    }

    #[test]
    fn a_write_through_a_hard_link_outside_counts_once_the_file_is_watched() {
        let (folder, watch) = watched(0);
        let outside = tempfile::tempdir_in(folder.path().parent().expect("a parent")).expect("a folder");
        fs::hard_link(folder.path().join("a/b/f"), outside.path().join("l")).expect("link");
        watch.add_file(Path::new("a/b/f")).expect("watch");
        let before = watch.position();
        fs::write(outside.path().join("l"), "3").expect("write");
        assert_ne!(watch.position(), before);
    }

    #[test]
    fn excluded_paths_are_out_of_sight() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("skip")).expect("mkdir");
        let exclude: Exclude = Arc::new(|path| path.starts_with("skip"));
        let options = Options { exclude: Some(exclude), ..Options::default() };
        let watch = Watch::begin(folder.path(), options).expect("a watch");
        let before = watch.position();
        fs::write(folder.path().join("skip/f"), "1").expect("write");
        assert_eq!(watch.position(), before);
        fs::write(folder.path().join("f"), "1").expect("write");
        assert_ne!(watch.position(), before);
    }

    #[test]
    fn too_many_directories_fail_and_a_full_queue_ends_the_sight() {
        let (folder, _) = watched(0);
        let options = Options { directories_max: 2, ..Options::default() };
        assert_eq!(Watch::begin(folder.path(), options).expect_err("3 directories").kind(), Kind::Exhausted);
        let watch = Watch::begin(folder.path(), Options { events_max: 2, ..Options::default() }).expect("a watch");
        for name in 0..5 {
            fs::write(folder.path().join(name.to_string()), "").expect("write");
        }
        assert!(watch.take().is_none() && watch.position().is_some(), "names are lost, the count is not");
        watch.lock().handle(0, ReadFlags::QUEUE_OVERFLOW, Vec::new());
        assert!(watch.position().is_none() && watch.blind().is_some());
    }
}
