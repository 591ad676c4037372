//! Crashes: a depot that fails at the n-th change for every n, locks on objects, killed processes.
//!
//! After each of them every snapshot is whole, and the next run cleans up and ends well.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};
use stillpoint_repo::{CheckRequest, Data, InitOptions, KeyFile, PruneRequest, Repository, Unlock};
use stillpoint_testkit::chaos::{Ending, kill_at_random};

use crate::support::{Restic, assert_same_below, backup, depot, difficult_tree, extract, init, latest, noise, open};

/// What happens to the change that fails.
#[derive(Debug, Clone, Copy)]
enum Failing {
    /// It has no effect.
    Before,
    /// It has its effect, and the answer is lost.
    After,
    /// It has no effect, and nothing works any more.
    Dead,
    /// Deletions are refused, as an object lock does.
    Locked,
}

/// A depot whose n-th write or deletion fails.
#[derive(Debug)]
struct Faulty {
    inner: Arc<MemoryDepot>,
    failing: Failing,
    at: u64,
    changes: AtomicU64,
}

impl Faulty {
    fn new(inner: &Arc<MemoryDepot>, failing: Failing, at: u64) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), failing, at, changes: AtomicU64::new(0) })
    }

    fn reached(&self) -> bool {
        self.changes.load(Ordering::Relaxed) > self.at
    }

    fn change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let number = self.changes.fetch_add(1, Ordering::Relaxed);
        let broken = Error::new(Kind::Unreachable, "the depot failed by plan");
        match self.failing {
            Failing::Before if number == self.at => Err(broken),
            Failing::After if number == self.at => change().and(Err(broken)),
            Failing::Dead if number >= self.at => Err(broken),
            _ => change(),
        }
    }

    fn alive(&self) -> Result<()> {
        match self.failing {
            Failing::Dead if self.reached() => Err(Error::new(Kind::Unreachable, "the depot is dead by plan")),
            _ => Ok(()),
        }
    }
}

impl Depot for Faulty {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.alive()?;
        self.inner.read(name)
    }
    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.alive()?;
        self.inner.read_range(name, offset, length)
    }
    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.change(|| self.inner.write(name, parts, mode))
    }
    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.alive()?;
        self.inner.list(prefix, visit)
    }
    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.alive()?;
        self.inner.stat(name)
    }
    fn delete(&self, name: &str) -> Result<()> {
        let protected = name.starts_with("data/") || name.starts_with("index/");
        if matches!(self.failing, Failing::Locked) && protected && self.change(|| Ok(())).is_ok() && !self.free(name) {
            return Err(Error::new(Kind::PermissionDenied, format!("{name} is locked until 2099")));
        }
        self.change(|| self.inner.delete(name))
    }
    fn capability(&self) -> DepotCapability {
        self.inner.capability()
    }
    fn location(&self) -> String {
        self.inner.location()
    }
    fn waits(&self) -> bool {
        false
    }
}

impl Faulty {
    /// With `at` as a selector, an object lock holds all, only index files, or only packs.
    fn free(&self, name: &str) -> bool {
        match self.at {
            0 => false,
            1 => name.starts_with("data/"),
            _ => name.starts_with("index/"),
        }
    }
}

fn twin(of: &MemoryDepot) -> Arc<MemoryDepot> {
    let twin = MemoryDepot::new();
    for name in of.names() {
        let (bytes, _) = of.read(&name).unwrap();
        twin.write(&name, &[&bytes], &WriteMode::Replace).unwrap();
    }
    Arc::new(twin)
}

/// Removes the locks of a process that is taken to be dead; ours lives on, so nobody else would.
fn unlock(depot: &MemoryDepot) {
    for name in depot.names().into_iter().filter(|name| name.starts_with("locks/")) {
        depot.delete(&name).unwrap();
    }
}

fn assert_sound(case: &str, depot: &Arc<MemoryDepot>, key: &Unlock, snapshots: usize) {
    let repository = Repository::open(depot.clone(), key).unwrap();
    let request = CheckRequest { data: Data::All, snapshots: None };
    let report = repository.check(&request, &Context::default()).unwrap();
    assert_eq!(report.errors, [""; 0], "{case}");
    assert_eq!(report.snapshots, snapshots as u64, "{case}");
}

/// A repository of which a part is no longer needed: whole packs and parts of packs.
fn untidy(key: &Unlock) -> Arc<MemoryDepot> {
    let depot = Arc::new(MemoryDepot::new());
    let repository = Repository::init(depot.clone(), key, &InitOptions::default()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut snapshots = Vec::new();
    for number in 0..4 {
        for part in 0..3 {
            let keep = part == 0 && number > 0;
            if !keep {
                std::fs::write(scratch.path().join(format!("file-{part}")), noise(number * 3 + part, 60_000)).unwrap();
            }
        }
        snapshots.push(backup(&repository, scratch.path()).unwrap());
    }
    repository.forget(&[snapshots[0].clone(), snapshots[2].clone()]).unwrap();
    depot.write("data/00/left-by-another-tool", &[b"x"], &WriteMode::Replace).unwrap();
    depot
}

fn prune(depot: Arc<dyn Depot>, key: &Unlock) -> Result<stillpoint_repo::PruneReport> {
    let request = PruneRequest { dry_run: false, max_unused_percent: 0.0 };
    Repository::open(depot, key)?.prune(&request, &Context::default())
}

#[test]
fn prune_may_be_cut_off_at_every_change() {
    let key = Unlock::KeyFile(KeyFile::generate().unwrap());
    let base = untidy(&key);
    let clean = twin(&base);
    let report = prune(clean.clone(), &key).unwrap();
    assert!(report.packs_deleted > 2 && report.packs_rewritten > 0, "{report:?}");
    assert_sound("clean", &clean, &key, 2);
    for failing in [Failing::Before, Failing::After, Failing::Dead] {
        for at in 0.. {
            let case = format!("{failing:?} change {at}");
            let depot = twin(&base);
            let faulty = Faulty::new(&depot, failing, at);
            let result = prune(faulty.clone(), &key);
            let reached = faulty.reached();
            assert!(result.is_err() == reached || !reached, "{case}: {result:?}");
            unlock(&depot);
            assert_sound(&case, &depot, &key, 2);
            prune(depot.clone(), &key).unwrap_or_else(|error| panic!("{case}: second prune: {error:?}"));
            assert_sound(&case, &depot, &key, 2);
            let third = prune(depot.clone(), &key).unwrap();
            assert_eq!((third.packs_deleted, third.packs_rewritten), (0, 0), "{case}: the second prune left work");
            assert!(depot.names().contains(&"data/00/left-by-another-tool".to_owned()), "{case}");
            if !reached {
                break;
            }
        }
    }
}

#[test]
fn an_object_lock_keeps_what_it_holds_and_nothing_breaks() {
    let key = Unlock::KeyFile(KeyFile::generate().unwrap());
    let base = untidy(&key);
    for which in 0..3 {
        let depot = twin(&base);
        let report = prune(Faulty::new(&depot, Failing::Locked, which), &key).unwrap();
        assert!(!report.kept_by_object_lock.is_empty(), "{which}: {report:?}");
        assert_sound(&format!("lock {which}"), &depot, &key, 2);
        prune(depot.clone(), &key).unwrap();
        assert_sound(&format!("after lock {which}"), &depot, &key, 2);
        let third = prune(depot.clone(), &key).unwrap();
        assert_eq!((third.packs_deleted, third.packs_rewritten), (0, 0), "{which}");
    }
}

#[test]
fn a_copy_may_be_cut_off_at_every_change() {
    let key = Unlock::KeyFile(KeyFile::generate().unwrap());
    let source = Repository::open(untidy(&key), &key).unwrap();
    let ids: Vec<_> = source.snapshots().unwrap().into_iter().map(|snapshot| snapshot.id).collect();
    for failing in [Failing::Before, Failing::After, Failing::Dead] {
        for at in 0.. {
            let case = format!("{failing:?} change {at}");
            let depot = Arc::new(MemoryDepot::new());
            Repository::init(depot.clone(), &key, &InitOptions::default()).unwrap();
            let faulty = Faulty::new(&depot, failing, at);
            let target = Repository::open(faulty.clone(), &key).unwrap();
            let _ = source.copy_to(&target, &ids, &Context::default());
            unlock(&depot);
            let whole = Repository::open(depot.clone(), &key).unwrap();
            let there = whole.snapshots().unwrap().len();
            assert_sound(&case, &depot, &key, there);
            let report = source.copy_to(&whole, &ids, &Context::default()).unwrap();
            let copies: BTreeSet<_> = report.snapshots.iter().map(|(_, copy)| copy.clone()).collect();
            assert_eq!(copies.len(), ids.len(), "{case}");
            assert_sound(&case, &depot, &key, 2);
            if !faulty.reached() {
                break;
            }
        }
    }
}

/// Set for the child that is killed: the repository's directory.
const CHILD: &str = "STILLPOINT_TEST_CHILD";

/// Backs up and prunes without end; does nothing unless started by the test below.
#[test]
fn child_that_is_killed() {
    let Some(at) = std::env::var_os(CHILD) else { return };
    let at = Path::new(&at);
    let repository = open(&at.join("repo"));
    for round in 0_u64.. {
        std::fs::write(at.join("source/changing"), noise(u64::from(std::process::id()) * 1000 + round, 3_000_000))
            .unwrap();
        backup(&repository, &at.join("source")).unwrap();
        let snapshots = repository.snapshots().unwrap();
        let old: Vec<_> = snapshots.iter().rev().skip(2).map(|snapshot| snapshot.id.clone()).collect();
        repository.forget(&old).unwrap();
        let request = PruneRequest { dry_run: false, max_unused_percent: 0.0 };
        repository.prune(&request, &Context::default()).unwrap();
    }
}

#[test]
fn processes_killed_in_backup_and_prune_leave_a_sound_repository() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    difficult_tree(&source);
    let at = scratch.path().join("repo");
    init(depot(&at));
    let restic = Restic::find("processes_killed_in_backup_and_prune_leave_a_sound_repository", &at);
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["crash::child_that_is_killed", "--exact"]).env(CHILD, scratch.path());
        child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let ending = kill_at_random(&mut child, Duration::from_millis(700)..Duration::from_secs(4)).unwrap();
        assert!(matches!(ending, Ending::Killed(_)), "the child ended by itself: {ending:?}");
        let repository = open(&at);
        let request = CheckRequest { data: Data::All, snapshots: None };
        let report = repository.check(&request, &Context::default()).unwrap();
        assert_eq!(report.errors, [""; 0]);
        if let Some(restic) = &restic {
            restic.run(&["unlock"]);
            restic.check();
        }
    }
    let repository = open(&at);
    backup(&repository, &source).unwrap();
    repository.prune(&PruneRequest::default(), &Context::default()).unwrap();
    let target = scratch.path().join("target");
    extract(&repository, &latest(&repository), "files", &target);
    assert_same_below(&source, &target);
    if let Some(restic) = restic {
        restic.check();
    }
}
