//! Takes and keeps the locks that restic honours.
//!
//! A lock is a file. Writers hold non-exclusive ones, whoever deletes holds an exclusive one. Who
//! takes a lock looks for conflicting ones, writes its own, and looks again: of two that begin at
//! once at least one sees the other. A lock is refreshed every five minutes by writing it anew, and
//! counts no more when it is 30 minutes old or when its process is known to be dead.
//!
//! A machine that sleeps refreshes nothing. So a holder believes in its lock only while its file is
//! there and the last refresh is young by a clock that runs on during sleep.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use stillpoint_core::error::{Error, Kind, Result};

use crate::Repository;
use crate::format::id::Id;
use crate::format::lock::LockJson;
use crate::key::hostname;
use crate::unpacked::{self, FileKind};

/// How often a lock is written anew, as restic does.
const REFRESH_EVERY: Duration = Duration::from_secs(5 * 60);
/// How soon a failed refresh is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(20);
/// The age at which a lock is taken for the remains of a dead process, as restic does.
const STALE_AFTER: Duration = Duration::from_secs(30 * 60);
/// The age of the last refresh at which the holder itself stops to believe in its lock.
const LOST_AFTER: Duration = Duration::from_secs(25 * 60);
/// For how long a look at the own file is good, so that whoever asks before each of many deletions
/// does not pay for a look each time.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Whether a lock is held alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Together with other writers and readers.
    Shared,
    /// Alone.
    Exclusive,
}

/// A lock that is held until [`HeldLock::release`] or drop.
#[derive(Debug)]
pub(crate) struct HeldLock {
    shared: Arc<Shared>,
    refresher: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    repository: Repository,
    mode: Mode,
    /// `None` once released.
    held: Mutex<Option<Held>>,
    wake: Condvar,
    lost: AtomicBool,
}

/// The file that is the lock now.
#[derive(Debug, Clone, Copy)]
struct Held {
    file: Id,
    /// When its writing began.
    refreshed: Awake,
    /// When [`HeldLock::check`] last saw that it is there.
    seen: Option<Awake>,
}

/// An instant of the clock that runs on while the machine sleeps.
#[derive(Debug, Clone, Copy)]
struct Awake(Duration);

impl Awake {
    fn now() -> Self {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default()))
    }

    fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

impl HeldLock {
    /// Takes a lock, or fails with `Locked` and says who holds the one in the way.
    pub(crate) fn acquire(repository: &Repository, mode: Mode) -> Result<Self> {
        refuse_conflicts(repository, mode, None)?;
        let refreshed = Awake::now();
        let file = write(repository, mode)?;
        if let Err(error) = refuse_conflicts(repository, mode, Some(file)) {
            repository.depot().delete(&FileKind::Lock.name(&file))?;
            return Err(error);
        }
        let shared = Arc::new(Shared {
            repository: repository.clone(),
            mode,
            held: Mutex::new(Some(Held { file, refreshed, seen: None })),
            wake: Condvar::new(),
            lost: AtomicBool::new(false),
        });
        let refreshed = shared.clone();
        let refresher = std::thread::Builder::new()
            .name("lock".into())
            .spawn(move || refreshed.keep())
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { shared, refresher: Some(refresher) })
    }

    /// Fails with `Locked` if others may have taken the lock for stale: its file is gone, or it was not
    /// refreshed for long. Asked before anything is made to refer to what was written, and before
    /// anything is deleted.
    pub(crate) fn check(&self) -> Result<()> {
        let shared = &self.shared;
        let mut held = shared.lock();
        let Some(held) = held.as_mut() else { return Err(Error::internal("a lock that was released is asked for")) };
        if shared.lost.load(Ordering::Acquire) || held.refreshed.elapsed() > LOST_AFTER {
            shared.lost.store(true, Ordering::Release);
            return Err(lost());
        }
        if held.seen.is_none_or(|seen| seen.elapsed() > LOOK_EVERY) {
            let looked = Awake::now();
            if !shared.is_there(&held.file)? {
                shared.lost.store(true, Ordering::Release);
                return Err(lost());
            }
            held.seen = Some(looked);
        }
        Ok(())
    }

    /// Removes the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<()> {
        let Some(refresher) = self.refresher.take() else { return Ok(()) };
        let held = self.shared.lock().take();
        self.shared.wake.notify_all();
        let joined = refresher.join().map_err(|_| Error::internal("the thread that keeps the lock panicked"));
        if let Some(held) = held {
            self.shared.repository.depot().delete(&FileKind::Lock.name(&held.file))?;
        }
        joined
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        // On this path another error is on its way already; a lock that stays becomes stale.
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "the repository's lock could not be removed");
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_there(&self, file: &Id) -> Result<bool> {
        Ok(self.repository.depot().stat(&FileKind::Lock.name(file))?.is_some())
    }

    /// Refreshes until the lock is released. A lock that was lost once is never believed in again.
    fn keep(&self) {
        let mut wait = REFRESH_EVERY;
        let mut held = self.lock();
        while held.is_some() {
            let (guard, timeout) = self.wake.wait_timeout(held, wait).unwrap_or_else(PoisonError::into_inner);
            held = guard;
            let Some(old) = *held else { return };
            if !timeout.timed_out() || self.lost.load(Ordering::Acquire) {
                continue;
            }
            match self.refresh(&old) {
                Ok(new) => {
                    *held = Some(new);
                    wait = REFRESH_EVERY;
                }
                Err(error) => {
                    tracing::warn!(%error, "the repository's lock could not be refreshed");
                    wait = RETRY_EVERY;
                }
            }
        }
    }

    /// Writes the lock anew. The new file is there before it is asked whether the old one still is: so
    /// at every instant one of them was, or the lock is lost.
    fn refresh(&self, old: &Held) -> Result<Held> {
        if old.refreshed.elapsed() > LOST_AFTER {
            self.lost.store(true, Ordering::Release);
            return Err(lost());
        }
        let refreshed = Awake::now();
        let file = write(&self.repository, self.mode)?;
        let new = FileKind::Lock.name(&file);
        match self.is_there(&old.file) {
            Ok(true) => {}
            Ok(false) => {
                self.lost.store(true, Ordering::Release);
                self.repository.depot().delete(&new)?;
                return Err(lost());
            }
            Err(error) => {
                self.repository.depot().delete(&new)?;
                return Err(error);
            }
        }
        if let Err(error) = self.repository.depot().delete(&FileKind::Lock.name(&old.file)) {
            // The new one holds. Whether the old one went cannot be told; it becomes stale by itself.
            tracing::warn!(%error, "the repository's former lock could not be removed");
        }
        Ok(Held { file, refreshed, seen: None })
    }
}

fn lost() -> Error {
    let message = "the repository's lock was lost, others may have pruned since";
    Error::new(Kind::Locked, message).status(stillpoint_core::Status::Temporary).hint(
        "the machine slept, the bucket could not be reached for 25 minutes, or someone removed the lock; run it again",
    )
}

fn write(repository: &Repository, mode: Mode) -> Result<Id> {
    let lock = LockJson {
        time: jiff::Timestamp::now().to_string(),
        exclusive: mode == Mode::Exclusive,
        hostname: hostname(),
        username: "stillpoint".into(),
        pid: i64::from(std::process::id()),
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
    };
    repository.save(FileKind::Lock, &lock.to_json())
}

/// Fails if a living lock other than `own` stands in the way; removes dead ones.
fn refuse_conflicts(repository: &Repository, mode: Mode, own: Option<Id>) -> Result<()> {
    for id in unpacked::list(repository.depot(), FileKind::Lock)? {
        if own == Some(id) {
            continue;
        }
        let lock = match repository.load(FileKind::Lock, &id) {
            Ok(json) => LockJson::parse(&json)?,
            // Released or refreshed since it was listed. Refreshed, its successor may be missing
            // from the list; a lock in the way is seen by its holder's own second look at the latest.
            Err(error) if error.kind() == Kind::NotFound => continue,
            Err(error) => return Err(error.context("file", FileKind::Lock.name(&id))),
        };
        if is_stale(&lock) {
            repository.depot().delete(&FileKind::Lock.name(&id))?;
        } else if lock.exclusive || mode == Mode::Exclusive {
            return Err(conflict(&lock));
        }
    }
    Ok(())
}

fn conflict(lock: &LockJson) -> Error {
    let how = if lock.exclusive { "exclusively " } else { "" };
    Error::new(Kind::Locked, format!("the repository is locked {how}by process {} on {}", lock.pid, lock.hostname))
        .context("since", &lock.time)
        .status(stillpoint_core::Status::Temporary)
        .hint("wait for it; a lock whose process died counts no more after 30 minutes, or `restic unlock` removes it")
}

/// Whether the lock's holder is gone: too old, or a process of this machine that does not exist.
fn is_stale(lock: &LockJson) -> bool {
    let age = lock.time.parse::<jiff::Timestamp>().map(|time| jiff::Timestamp::now().duration_since(time));
    if age.is_ok_and(|age| age.unsigned_abs() > STALE_AFTER && age.is_positive()) {
        return true;
    }
    lock.hostname == hostname() && !process_exists(lock.pid)
}

fn process_exists(pid: i64) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return false;
    };
    // Not permitted to signal it means that it is there.
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::depot::memory::MemoryDepot;
    use crate::{InitOptions, KeyFile, Unlock};

    fn repository() -> Repository {
        let unlock = Unlock::KeyFile(KeyFile::generate().unwrap());
        Repository::init(Arc::new(MemoryDepot::new()), &unlock, &InitOptions::default()).unwrap()
    }

    fn locks(repository: &Repository) -> usize {
        unpacked::list(repository.depot(), FileKind::Lock).unwrap().len()
    }

    fn plant(repository: &Repository, change: impl Fn(&mut LockJson)) {
        let mut lock = LockJson {
            time: jiff::Timestamp::now().to_string(),
            exclusive: true,
            hostname: "elsewhere".into(),
            username: String::new(),
            pid: 1,
            uid: 0,
            gid: 0,
        };
        change(&mut lock);
        repository.save(FileKind::Lock, &lock.to_json()).unwrap();
    }

    #[test]
    fn writers_share_and_an_exclusive_lock_shuts_all_out() {
        let repository = repository();
        let first = HeldLock::acquire(&repository, Mode::Shared).unwrap();
        let second = HeldLock::acquire(&repository, Mode::Shared).unwrap();
        let refused = HeldLock::acquire(&repository, Mode::Exclusive).unwrap_err();
        assert_eq!((refused.kind(), refused.is_temporary()), (Kind::Locked, true));
        first.release().unwrap();
        drop(second);
        assert_eq!(locks(&repository), 0);
        let alone = HeldLock::acquire(&repository, Mode::Exclusive).unwrap();
        for mode in [Mode::Shared, Mode::Exclusive] {
            assert_eq!(HeldLock::acquire(&repository, mode).unwrap_err().kind(), Kind::Locked);
        }
        assert_eq!(locks(&repository), 1);
        alone.check().unwrap();
    }

    #[test]
    fn locks_of_the_dead_are_removed_and_those_of_the_living_are_not() {
        let repository = repository();
        plant(&repository, |lock| lock.time = "2020-01-01T00:00:00Z".into());
        plant(&repository, |lock| (lock.hostname, lock.pid) = (hostname(), i64::from(i32::MAX)));
        HeldLock::acquire(&repository, Mode::Exclusive).unwrap().release().unwrap();
        assert_eq!(locks(&repository), 0);
        plant(&repository, |lock| (lock.hostname, lock.pid) = (hostname(), 1));
        assert!(HeldLock::acquire(&repository, Mode::Shared).is_err());
        // A clock that runs ahead makes no lock stale.
        plant(&repository, |lock| lock.time = "2090-01-01T00:00:00Z".into());
        assert!(HeldLock::acquire(&repository, Mode::Shared).is_err());
        assert_eq!(locks(&repository), 2);
    }

    #[test]
    fn a_refreshed_lock_is_one_lock() {
        let repository = repository();
        let lock = HeldLock::acquire(&repository, Mode::Shared).unwrap();
        let old = lock.shared.lock().unwrap();
        *lock.shared.lock() = Some(lock.shared.refresh(&old).unwrap());
        assert_eq!(locks(&repository), 1);
        assert_ne!(lock.shared.lock().unwrap().file, old.file);
        lock.check().unwrap();
        drop(lock);
        assert_eq!(locks(&repository), 0);
    }

    #[test]
    fn a_lock_that_others_removed_is_lost_for_good() {
        let repository = repository();
        let lock = HeldLock::acquire(&repository, Mode::Shared).unwrap();
        let old = lock.shared.lock().unwrap();
        repository.depot().delete(&FileKind::Lock.name(&old.file)).unwrap();
        assert_eq!(lock.shared.refresh(&old).unwrap_err().kind(), Kind::Locked);
        assert_eq!(locks(&repository), 0);
        assert_eq!(lock.check().unwrap_err().kind(), Kind::Locked);
    }

    #[test]
    fn a_lock_that_was_not_refreshed_for_long_is_lost_even_if_its_file_is_there() {
        let repository = repository();
        let lock = HeldLock::acquire(&repository, Mode::Shared).unwrap();
        let mut old = lock.shared.lock().unwrap();
        let slept = LOST_AFTER + Duration::from_secs(1);
        let Some(before) = old.refreshed.0.checked_sub(slept) else { return }; // The machine is younger.
        old.refreshed = Awake(before);
        *lock.shared.lock() = Some(old);
        assert_eq!(lock.check().unwrap_err().kind(), Kind::Locked);
        assert_eq!(lock.shared.refresh(&old).unwrap_err().kind(), Kind::Locked);
    }

    #[test]
    fn a_backup_whose_lock_was_removed_writes_no_snapshot() {
        let repository = repository();
        let backup = repository.begin(crate::BackupOptions::default()).unwrap();
        let name = stillpoint_core::id::StoreName::new("meta").unwrap();
        backup.store(&name, None).unwrap().finish().unwrap();
        for id in unpacked::list(repository.depot(), FileKind::Lock).unwrap() {
            repository.depot().delete(&FileKind::Lock.name(&id)).unwrap();
        }
        let (tags, paths) = (Vec::new(), Vec::new());
        let meta = crate::SnapshotMeta { time: jiff::Timestamp::now(), hostname: String::new(), tags, paths };
        assert_eq!(backup.finish(meta).unwrap_err().kind(), Kind::Locked);
        assert!(repository.snapshots().unwrap().is_empty());
    }
}
