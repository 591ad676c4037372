//! PREPARE, CUT, the observation of writes, and release.
//!
//! Every database has an observer, a connection that lives as long as the driver value and is
//! never inside a transaction, and, from the cut on, a connection whose read transaction is the pin.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;
use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;
use stillpoint_core::tree::Metadata;

use super::config::Rollback;
use super::{Sqlite, client, wire};

/// Connections stay usable for as long as the process lives.
const SAFE_FOR: Duration = Duration::from_secs(3600);

/// How often a view is taken again because a commit fell beside it. A view is right without; only
/// its position is exact when no commit did.
const PIN_TRIES: u32 = 8;

/// File times come from a clock that ticks every 1 to 10 ms. What changed less than this before
/// the view was fixed may change again without a new time.
const SETTLED_NANOS: i128 = 20_000_000;

/// First byte of the lock that a WAL writer holds, and the range of the locks of its readers.
const WAL_WRITE_LOCK: u64 = 120;
const WAL_READ_LOCKS: (u64, u64) = (123, 127);
/// The range of bytes that readers of a rollback-journal database lock.
const SHARED_LOCKS: (u64, u64) = (0x4000_0002, 0x4000_0002 + 509);

/// How often the kernel's list of locks is read before a lock is believed to be absent.
const LOCK_READINGS: u32 = 20;

/// How the names of cloned databases begin.
const CLONE_PREFIX: &str = ".stillpoint-clone-";

/// One database of the store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// The names below `directory`; empty for a store with one `path`.
    pub below: Vec<Vec<u8>>,
    /// The file, links resolved.
    pub path: PathBuf,
}

/// A database with its observer.
struct Opened {
    target: Target,
    inode: (u64, u64),
    observer: Connection,
    /// Opened while there was time, to become the pin.
    standby: Option<Connection>,
    /// Makes positions of this observer unlike those of any other one: `data_version` counts per
    /// connection.
    observer_id: String,
}

/// How a pinned view is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// By a read mark in the write-ahead log.
    Wal,
    /// By a shared lock on the database; writers wait.
    SharedLock,
    /// As a clone of the file.
    Clone,
}

/// One pinned database.
pub(super) struct View {
    /// Which database.
    pub target: Target,
    /// How it is held.
    pub held: Held,
    /// The connection whose read transaction is the view; `None` once released.
    connection: Mutex<Option<Connection>>,
    /// Inode that carries the lock.
    lock_inode: u64,
    /// Since when it is held.
    pub since: Instant,
    /// `(size, mtime)` of the file while the shared lock holds it.
    frozen: Option<(u64, i64, i64)>,
    /// The state of the files that goes with the view; see `Description::files_state`.
    pub files_state: Option<String>,
    /// Owner, mode and times of the database file.
    pub meta: Metadata,
    /// The clone, to be deleted on release.
    clone: Option<PathBuf>,
    /// The file that was to be cloned. It must close after the connection, because closing it drops
    /// the connection's lock; fields are dropped in order.
    file: Option<File>,
}

impl View {
    /// Works with the view's connection. Fails with `PinLost` once it was released.
    pub fn with<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let guard = self.connection.lock().expect("no holder panics");
        let lost = || Error::new(Kind::PinLost, "the view was released");
        work(guard.as_ref().ok_or_else(lost)?)
    }
}

/// What a driver value holds between calls.
#[derive(Default)]
pub(super) struct State {
    opened: Vec<Opened>,
    pinned: Option<(Pin, Vec<Arc<View>>)>,
}

impl Sqlite {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// The views of a pin; `PinLost` if this value does not hold it.
    pub(super) fn views(&self, pin: &Pin) -> Result<Vec<Arc<View>>> {
        match &self.state().pinned {
            Some((held, views)) if held.cut == pin.cut => Ok(views.clone()),
            _ => Err(Error::new(Kind::PinLost, "no view of this cut is held")
                .hint("the process that took the cut is gone; take a new point")),
        }
    }

    /// The databases of the store, as they are now, in the order of the tree.
    pub(super) fn targets(&self) -> Result<Vec<Target>> {
        if let Some(path) = &self.settings.path {
            return Ok(vec![Target { below: Vec::new(), path: client::resolve(path)? }]);
        }
        let directory = self.settings.directory.as_deref().unwrap_or(Path::new("/"));
        let mut found = Vec::new();
        self.search(directory, &mut Vec::new(), &mut found)?;
        if found.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("no database matches below {}", directory.display()))
                .context("include", self.settings.include.join(" ")));
        }
        found.sort();
        Ok(found)
    }

    fn search(&self, folder: &Path, below: &mut Vec<Vec<u8>>, found: &mut Vec<Target>) -> Result<()> {
        use std::os::unix::ffi::OsStringExt;
        let what = || format!("cannot list {}", folder.display());
        for entry in std::fs::read_dir(folder).or_io(what)? {
            let entry = entry.or_io(what)?;
            let kind = entry.file_type().or_io(what)?;
            below.push(entry.file_name().into_vec());
            let name = below.last().expect("pushed above");
            if kind.is_dir() {
                self.search(&entry.path(), below, found)?;
            } else if kind.is_file()
                && !wire::is_companion(name)
                && self.settings.include.iter().any(|pattern| wire::matches(pattern, below))
            {
                found.push(Target { below: below.clone(), path: client::resolve(&entry.path())? });
            }
            below.pop();
        }
        Ok(())
    }

    /// Opens what is new, keeps what is the same file as before, lets go of what is gone.
    fn refresh(&self, state: &mut State) -> Result<()> {
        let mut old = std::mem::take(&mut state.opened);
        for target in self.targets()? {
            let inode = client::inode(&target.path)?;
            let opened = match old.iter().position(|opened| opened.target == target && opened.inode == inode) {
                Some(index) => old.swap_remove(index),
                None => Opened {
                    observer: self.connect(&target)?,
                    observer_id: observer_id(),
                    standby: None,
                    target,
                    inode,
                },
            };
            state.opened.push(opened);
        }
        Ok(())
    }

    fn connect(&self, target: &Target) -> Result<Connection> {
        client::open_reader(&target.path, self.settings.busy_timeout())
    }
}

fn observer_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{:x}-{:x}-{:x}", std::process::id(), now, COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Connects to every database, twice: to observe, and to pin.
pub(super) fn prepare(driver: &Sqlite, context: &Context) -> Result<Hold> {
    let mut guard = driver.state();
    let state = &mut *guard;
    driver.refresh(state)?;
    let mut bytes = 0;
    for opened in &mut state.opened {
        context.check()?;
        if opened.standby.is_none() {
            opened.standby = Some(driver.connect(&opened.target)?);
        }
        let pages: i64 = client::pragma(&opened.observer, "page_count")?;
        let page_bytes: i64 = client::pragma(&opened.observer, "page_size")?;
        bytes += (pages * page_bytes) as u64;
    }
    Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) })
}

/// Asks every observer whether another connection committed.
pub(super) fn observe(driver: &Sqlite) -> Result<Option<Position>> {
    let mut guard = driver.state();
    let state = &mut *guard;
    driver.refresh(state)?;
    let mut parts = Vec::with_capacity(state.opened.len());
    for opened in &state.opened {
        parts.push(position_part(opened, &client::data_version(&opened.observer)?.to_string()));
    }
    Ok(Some(position(&parts)))
}

fn position_part(opened: &Opened, version: &str) -> String {
    let file = opened.target.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (device, inode) = opened.inode;
    format!("{file} inode {device}:{inode} observer {} data_version {version}", opened.observer_id)
}

/// One database speaks for itself; many are told by count and hash.
fn position(parts: &[String]) -> Position {
    let text = match parts {
        [one] => one.clone(),
        many => format!("{} databases {}", many.len(), hex::encode(&Sha256::digest(many.join("\n"))[..16])),
    };
    Position::new("sqlite-data-version", text)
}

/// Fixes the view of every database, one after the other, each in well below a millisecond.
pub(super) fn cut(driver: &Sqlite, context: &Context, cut: &CutId) -> Result<Pin> {
    context.check()?;
    let mut guard = driver.state();
    let state = &mut *guard;
    if let Some((pin, _)) = &state.pinned
        && pin.cut == *cut
    {
        return Ok(pin.clone());
    }
    driver.refresh(state)?;
    recycle(state);
    let mut views = Vec::with_capacity(state.opened.len());
    let mut parts = Vec::with_capacity(state.opened.len());
    for opened in &mut state.opened {
        let (view, part) = pin_one(driver, opened, cut)?;
        views.push(view);
        parts.push(part);
    }
    let locks = client::kernel_locks();
    for view in &mut views {
        settle(view, locks.as_deref())?;
    }
    let remains = views.iter().filter_map(|view| view.clone.as_ref()).map(|path| path.display().to_string()).collect();
    let pin = Pin { cut: cut.clone(), position: position(&parts), remains };
    state.pinned = Some((pin.clone(), views.into_iter().map(Arc::new).collect()));
    Ok(pin)
}

/// Ends the views of an earlier try and keeps their connections for the next one.
fn recycle(state: &mut State) {
    let Some((_, views)) = state.pinned.take() else { return };
    for view in views {
        let connection = view.connection.lock().expect("no holder panics").take();
        remove_clone(&view);
        let Some(connection) = connection.filter(|_| view.held != Held::Clone) else { continue };
        client::end_view(&connection);
        if let Some(opened) = state.opened.iter_mut().find(|opened| opened.target == view.target) {
            opened.standby.get_or_insert(connection);
        }
    }
}

fn remove_clone(view: &View) {
    if let Some(path) = &view.clone {
        // A clone that is gone already needs no removal; one that stays is swept at the next release.
        std::fs::remove_file(path).ok();
    }
}

fn pin_one(driver: &Sqlite, opened: &mut Opened, cut: &CutId) -> Result<(View, String)> {
    let path = &opened.target.path;
    let connection = match opened.standby.take() {
        // A database that was replaced since has another inode, and its opened value is new.
        Some(connection) => connection,
        None => driver.connect(&opened.target)?,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as i128;
    let (before, newest) = client::files_state(path)?;
    let mut version = client::data_version(&opened.observer)?;
    let mut tries = 1;
    let part = loop {
        client::begin_view(&connection)?;
        // Without waiting: a writer of a rollback journal that wants to commit waits for our view, and
        // lets no new reader in, not even ours.
        let after = client::data_version_at_once(&mut opened.observer, driver.settings.busy_timeout())?;
        if after == Some(version) {
            break position_part(opened, &version.to_string());
        }
        if tries == PIN_TRIES {
            let after = after.map_or_else(|| "?".to_owned(), |after| after.to_string());
            break position_part(opened, &format!("{version}..{after}"));
        }
        client::end_view(&connection);
        version = match after {
            Some(after) => after,
            None => client::data_version(&opened.observer)?,
        };
        tries += 1;
    };
    let journal: String = client::pragma(&connection, "journal_mode")?;
    let is_wal = journal == "wal";
    let settled = newest + SETTLED_NANOS < now && client::network_file_system(path).is_none();
    let meta = client::stream_metadata(path)?;
    let stat = std::fs::metadata(path).or_io(|| format!("cannot look at {}", path.display()))?;
    let lock_inode =
        if is_wal { std::fs::metadata(client::beside(path, "-shm")).map_or(0, |file| file.ino()) } else { stat.ino() };
    let mut view = View {
        target: opened.target.clone(),
        held: if is_wal { Held::Wal } else { Held::SharedLock },
        connection: Mutex::new(Some(connection)),
        lock_inode,
        since: Instant::now(),
        frozen: (!is_wal).then(|| (stat.len(), stat.mtime(), stat.mtime_nsec())),
        files_state: settled.then_some(before),
        meta,
        clone: None,
        file: None,
    };
    if !is_wal && driver.settings.rollback != Rollback::Hold {
        clone_view(driver, &mut view, cut)?;
    }
    Ok((view, part))
}

/// Replaces a shared lock by a clone of the file, where the file system can.
fn clone_view(driver: &Sqlite, view: &mut View, cut: &CutId) -> Result<()> {
    let path = view.target.path.clone();
    let hash = hex::encode(&Sha256::digest(path.as_os_str().as_encoded_bytes())[..6]);
    let name = format!("{CLONE_PREFIX}{hash}-{cut}");
    let mut refused = None;
    let file = view.file.insert(File::open(&path).or_io(|| format!("cannot open {}", path.display()))?);
    for folder in [Some(driver.scratch.as_path()), path.parent()].into_iter().flatten() {
        let to = folder.join(&name);
        if let Err(error) = clone_file(file, &to) {
            refused = Some(error);
            continue;
        }
        view.clone = Some(to.clone());
        let cloned = client::open_reader(&to, driver.settings.busy_timeout())?;
        client::begin_view(&cloned)?;
        let old = view.connection.get_mut().expect("no holder panics").replace(cloned);
        if let Some(old) = old {
            client::end_view(&old);
        }
        (view.held, view.frozen) = (Held::Clone, None);
        return Ok(());
    }
    match refused {
        Some(error) if driver.settings.rollback == Rollback::Clone => {
            Err(Error::io(format!("cannot clone {}", path.display()), error)
                .hint("cloning needs btrfs, XFS or another file system with reflinks; or use `rollback: hold`"))
        }
        _ => Ok(()),
    }
}

fn clone_file(from: &File, to: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(folder) = to.parent()
        && std::fs::metadata(folder)?.dev() != from.metadata()?.dev()
    {
        return Err(std::io::ErrorKind::CrossesDevices.into());
    }
    let target = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    rustix::fs::ioctl_ficlone(&target, from).map_err(|error| {
        std::fs::remove_file(to).ok();
        error.into()
    })
}

/// Keeps the files' state only if it surely goes with the view: nothing moved while it was fixed,
/// and no writer had written into the log what it had not yet published.
fn settle(view: &mut View, locks: Option<&str>) -> Result<()> {
    let Some(before) = view.files_state.take() else { return Ok(()) };
    let (after, _) = client::files_state(&view.target.path)?;
    let quiet = match (view.held, locks) {
        (Held::Wal, Some(locks)) => {
            let is_free = |locks: &str| !wire::is_write_locked(locks, view.lock_inode, WAL_WRITE_LOCK);
            // One reading may skip a lock; a second one hardly the same.
            is_free(locks) && client::kernel_locks().is_some_and(|locks| is_free(&locks))
        }
        (Held::Wal, None) => false,
        (Held::SharedLock | Held::Clone, _) => true,
    };
    view.files_state = (quiet && after == before).then_some(after);
    Ok(())
}

/// Checks that every view is still held by what held it at the cut.
pub(super) fn still_valid(driver: &Sqlite, pin: &Pin) -> Result<Validity> {
    let views = match driver.views(pin) {
        Ok(views) => views,
        Err(error) if error.kind() == Kind::PinLost => return Ok(Validity::Lost(error.message().to_owned())),
        Err(error) => return Err(error),
    };
    let locks = client::kernel_locks();
    for view in views {
        if let Some(reason) = lost(&view, locks.as_deref())? {
            return Ok(Validity::Lost(format!("{}: {reason}", view.target.path.display())));
        }
    }
    Ok(Validity::Valid)
}

fn lost(view: &View, locks: Option<&str>) -> Result<Option<&'static str>> {
    let open = view.with(|connection| Ok(!connection.is_autocommit()));
    if !matches!(open, Ok(true)) {
        return Ok(Some("the read transaction has ended"));
    }
    let range = match view.held {
        Held::Wal => WAL_READ_LOCKS,
        Held::SharedLock => SHARED_LOCKS,
        Held::Clone => return Ok(None),
    };
    let process = std::process::id();
    // No inode: the log is read without shared memory, from media that nobody can write.
    let is_missing = |locks: &str| !wire::holds_lock(locks, process, "READ", view.lock_inode, range.0, range.1);
    // The kernel's list is read in pieces while others lock and unlock, and may skip a lock that is
    // there: only one that no reading shows is gone.
    if view.lock_inode != 0
        && locks.is_some_and(is_missing)
        && (0..LOCK_READINGS).all(|_| client::kernel_locks().is_some_and(|locks| is_missing(&locks)))
    {
        return Ok(Some(
            "its lock is gone, because another part of this process opened and closed the same file: leave the \
             database out of the store that holds its folder",
        ));
    }
    if let Some(frozen) = view.frozen {
        let stat = std::fs::metadata(&view.target.path).or_io(|| "cannot look at the database".to_owned())?;
        // A file that took the place of the pinned one says nothing about it.
        if stat.ino() == view.lock_inode && frozen != (stat.len(), stat.mtime(), stat.mtime_nsec()) {
            return Ok(Some("the file was changed by a program that ignores SQLite's locks"));
        }
    }
    Ok(None)
}

/// Ends all views, closes all connections, deletes clones, also those of a process that died.
pub(super) fn release(driver: &Sqlite, remains: &[String]) -> Result<()> {
    let mut state = driver.state();
    let pinned = state.pinned.take();
    for view in pinned.iter().flat_map(|(_, views)| views) {
        drop(view.connection.lock().expect("no holder panics").take());
        remove_clone(view);
    }
    state.opened.clear();
    for path in remains.iter().map(Path::new) {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if !name.starts_with(CLONE_PREFIX.as_bytes()) {
            continue;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot delete {}", path.display()), error));
            }
            _ => {}
        }
    }
    Ok(())
}
