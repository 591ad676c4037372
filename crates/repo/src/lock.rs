//! Takes and keeps the locks that restic honours.
//!
//! A lock is a file. Writers hold non-exclusive ones, whoever deletes holds an exclusive one. Who
//! takes a lock looks for conflicting ones, writes its own, and looks again: of two that begin at
//! once at least one sees the other. A lock is refreshed every five minutes by writing it anew, and
//! counts no more when it is 30 minutes old or when its process is known to be dead.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    /// The file that is the lock now; `None` once released.
    file: Mutex<Option<Id>>,
    wake: Condvar,
    lost: AtomicBool,
}

impl HeldLock {
    /// Takes a lock, or fails with `Locked` and says who holds the one in the way.
    pub(crate) fn acquire(repository: &Repository, mode: Mode) -> Result<Self> {
        refuse_conflicts(repository, mode, None)?;
        let file = write(repository, mode)?;
        if let Err(error) = refuse_conflicts(repository, mode, Some(file)) {
            repository.depot().delete(&FileKind::Lock.name(&file))?;
            return Err(error);
        }
        let shared = Arc::new(Shared {
            repository: repository.clone(),
            mode,
            file: Mutex::new(Some(file)),
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

    /// Fails with `Locked` if the lock could not be refreshed for so long that others may have
    /// taken it for stale. Asked before anything is made to refer to what was written.
    pub(crate) fn check(&self) -> Result<()> {
        if self.shared.lost.load(Ordering::Acquire) {
            let message = "the repository's lock could not be refreshed for 25 minutes, others may have pruned since";
            return Err(Error::new(Kind::Locked, message));
        }
        Ok(())
    }

    /// Removes the lock.
    pub(crate) fn release(mut self) -> Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<()> {
        let Some(refresher) = self.refresher.take() else { return Ok(()) };
        let file = self.shared.lock_file().take();
        self.shared.wake.notify_all();
        let joined = refresher.join().map_err(|_| Error::internal("the thread that keeps the lock panicked"));
        if let Some(file) = file {
            self.shared.repository.depot().delete(&FileKind::Lock.name(&file))?;
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
    fn lock_file(&self) -> std::sync::MutexGuard<'_, Option<Id>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refreshes until the file is taken away.
    fn keep(&self) {
        let mut refreshed = Instant::now();
        let mut wait = REFRESH_EVERY;
        let mut file = self.lock_file();
        while file.is_some() {
            let (guard, timeout) = self.wake.wait_timeout(file, wait).unwrap_or_else(PoisonError::into_inner);
            file = guard;
            let Some(old) = *file else { return };
            if !timeout.timed_out() {
                continue;
            }
            match self.refresh(&old) {
                Ok(new) => {
                    *file = Some(new);
                    refreshed = Instant::now();
                    wait = REFRESH_EVERY;
                }
                Err(error) => {
                    tracing::warn!(%error, "the repository's lock could not be refreshed");
                    wait = RETRY_EVERY;
                }
            }
            if refreshed.elapsed() > LOST_AFTER {
                self.lost.store(true, Ordering::Release);
            }
        }
    }

    fn refresh(&self, old: &Id) -> Result<Id> {
        let new = write(&self.repository, self.mode)?;
        self.repository.depot().delete(&FileKind::Lock.name(old))?;
        Ok(new)
    }
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
        let old = lock.shared.lock_file().unwrap();
        *lock.shared.lock_file() = Some(lock.shared.refresh(&old).unwrap());
        assert_eq!(locks(&repository), 1);
        assert_ne!(*lock.shared.lock_file(), Some(old));
        drop(lock);
        assert_eq!(locks(&repository), 0);
    }
}
