//! One suite for every depot: what the trait promises is tried on directories, memory, layers and
//! on real servers where `cargo xtask test` has started them.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::time::{Duration, SystemTime};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Kind, Result};
use stillpoint_repo::depot::contended::Contended;
use stillpoint_repo::depot::fs::FsDepot;
use stillpoint_repo::depot::layers::{Bandwidth, Chaos, ChaosPolicy, Retry, RetryPolicy, TimeOut, Trace, Verb};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{self, Depot, DepotCapability, Prefixed, WriteMode};

/// Runs every promise of the trait on one depot, which must be empty and is left empty.
pub fn conforms(depot: &dyn Depot) {
    reads_back_what_was_written(depot);
    ranges_end_with_the_object(depot);
    creation_is_refused_for_a_taken_name(depot);
    one_of_many_racing_creators_wins(depot);
    an_outdated_update_conflicts(depot);
    racing_updates_lose_nothing(depot);
    listing_shows_whole_names_below_a_prefix(depot);
    what_is_absent_is_absent(depot);
    names_cannot_leave_the_depot(depot);
    assert_eq!(names(depot, ""), [""; 0], "the suite cleans up after itself");
}

fn names(depot: &dyn Depot, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    let listed = depot.list(prefix, &mut |object| {
        names.push(object.name);
        Ok(true)
    });
    listed.expect("list");
    names.sort();
    names
}

fn reads_back_what_was_written(depot: &dyn Depot) {
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let parts: Vec<&[u8]> = large.chunks(1_234).collect();
    let written = depot.write("a/large", &parts, &WriteMode::Replace).expect("write");
    let (bytes, read) = depot.read("a/large").expect("read");
    assert!(bytes == large, "the parts are one object");
    assert_eq!(read, written, "write and read agree on the version");
    let found = depot.stat("a/large").expect("stat").expect("there");
    assert_eq!((found.name.as_str(), found.size, found.version), ("a/large", 3_000_000, read));
    let age = SystemTime::now().duration_since(found.modified).unwrap_or_default();
    assert!(age < Duration::from_secs(120), "{age:?}");
    depot.write("a/large", &[], &WriteMode::Replace).expect("replace");
    assert!(depot.read("a/large").expect("read").0.is_empty(), "empty objects are objects");
    depot.delete("a/large").expect("delete");
}

fn ranges_end_with_the_object(depot: &dyn Depot) {
    depot.write("range", &[b"0123", b"456789"], &WriteMode::Replace).expect("write");
    let range = |offset, length| depot.read_range("range", offset, length).expect("range");
    assert_eq!(range(0, 10), "0123456789".as_bytes());
    assert_eq!(range(3, 4), "3456".as_bytes());
    assert_eq!(range(8, 100), "89".as_bytes());
    assert!(range(10, 5).is_empty() && range(5, 0).is_empty());
    depot.delete("range").expect("delete");
}

fn creation_is_refused_for_a_taken_name(depot: &dyn Depot) {
    depot.write("points/x/statefile.json", &[b"first"], &WriteMode::Create).expect("free");
    let error = depot.write("points/x/statefile.json", &[b"second"], &WriteMode::Create).expect_err("taken");
    assert_eq!((error.kind(), error.is_temporary()), (Kind::AlreadyExists, false), "{error:?}");
    assert_eq!(depot.read("points/x/statefile.json").expect("read").0, "first".as_bytes());
    depot.delete("points/x/statefile.json").expect("delete");
    depot.write("points/x/statefile.json", &[b"third"], &WriteMode::Create).expect("free again");
    depot.delete("points/x/statefile.json").expect("delete");
}

fn race<T: Send>(racers: usize, run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let line = Barrier::new(racers);
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..racers)
            .map(|racer| {
                let (line, run) = (&line, &run);
                scope.spawn(move || {
                    line.wait();
                    run(racer)
                })
            })
            .collect();
        started.into_iter().map(|racer| racer.join().expect("no panic")).collect()
    })
}

fn one_of_many_racing_creators_wins(depot: &dyn Depot) {
    for round in 0..3 {
        let name = format!("race/{round}");
        let results = race(8, |racer| depot.write(&name, &[format!("racer {racer}").as_bytes()], &WriteMode::Create));
        let winners: Vec<usize> =
            results.iter().enumerate().filter_map(|(racer, result)| result.is_ok().then_some(racer)).collect();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(matches!(error.kind(), Kind::AlreadyExists | Kind::Conflict | Kind::Locked), "{error:?}");
        }
        assert_eq!(winners.len(), 1, "{results:?}");
        assert_eq!(depot.read(&name).expect("read").0, format!("racer {}", winners[0]).as_bytes());
        depot.delete(&name).expect("delete");
    }
}

fn an_outdated_update_conflicts(depot: &dyn Depot) {
    assert!(depot.capability().conditional_update);
    let first = depot.write("lease", &[b"1"], &WriteMode::Create).expect("create").expect("version");
    let second = depot.write("lease", &[b"2"], &WriteMode::Update(first.clone())).expect("current").expect("version");
    assert_ne!(first, second);
    let error = depot.write("lease", &[b"3"], &WriteMode::Update(first.clone())).expect_err("outdated");
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
    assert_eq!(depot.read("lease").expect("read").0, "2".as_bytes());
    depot.delete("lease").expect("delete");
    let error = depot.write("lease", &[b"4"], &WriteMode::Update(second)).expect_err("gone");
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
    assert!(depot.stat("lease").expect("stat").is_none());
}

fn racing_updates_lose_nothing(depot: &dyn Depot) {
    const RACERS: usize = 4;
    depot.write("counter", &[b"0 nobody"], &WriteMode::Create).expect("create");
    race(RACERS, |racer| {
        // The racer's number makes its bytes its own, as conditional writes must.
        while let Err(error) = count_up(depot, racer) {
            assert!(matches!(error.kind(), Kind::Conflict | Kind::Locked), "{error:?}");
        }
    });
    // Where answers are lost, a racer may count twice, because someone else overwrote its write
    // before it could recognise it; nobody is ever left out.
    let (bytes, _) = depot.read("counter").expect("read");
    let count = std::str::from_utf8(&bytes).expect("text").split(' ').next().expect("a word").to_owned();
    assert!(count.parse::<usize>().expect("a number") >= RACERS, "{bytes:?}");
    depot.delete("counter").expect("delete");
}

fn count_up(depot: &dyn Depot, writer: usize) -> Result<()> {
    let (bytes, version) = depot.read("counter")?;
    let text = std::str::from_utf8(&bytes).expect("text");
    let count: u64 = text.split(' ').next().expect("a word").parse().expect("a number");
    let next = format!("{} writer {writer}", count + 1);
    depot.write("counter", &[next.as_bytes()], &WriteMode::Update(version.expect("version"))).map(drop)
}

fn listing_shows_whole_names_below_a_prefix(depot: &dyn Depot) {
    let all = ["d/aa/1", "d/aa/2", "d/ab/3", "dd", "e"];
    for name in all {
        depot.write(name, &[name.as_bytes()], &WriteMode::Replace).expect("write");
    }
    assert_eq!(names(depot, ""), all);
    assert_eq!(names(depot, "d/"), all[..3]);
    assert_eq!(names(depot, "d/aa/"), all[..2]);
    assert_eq!(names(depot, "nothing/"), [""; 0]);
    let mut seen = 0;
    let stopped = depot.list("d/", &mut |_| {
        seen += 1;
        Ok(false)
    });
    assert!(stopped.is_ok() && seen == 1, "a visitor may stop");
    let refused: Result<()> = depot.list("d/", &mut |_| Err(stillpoint_core::Error::internal("visitor")));
    assert_eq!(refused.expect_err("the visitor's error").kind(), Kind::Internal);
    for name in all {
        depot.delete(name).expect("delete");
    }
}

fn what_is_absent_is_absent(depot: &dyn Depot) {
    assert_eq!(depot.read("absent").expect_err("absent").kind(), Kind::NotFound);
    assert_eq!(depot.read_range("absent", 0, 1).expect_err("absent").kind(), Kind::NotFound);
    assert!(depot.stat("absent").expect("stat").is_none());
    assert!(depot.stat("absent/below").expect("stat").is_none());
    depot.delete("absent").expect("deleting nothing is fine");
}

fn names_cannot_leave_the_depot(depot: &dyn Depot) {
    for name in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "a\0b"] {
        assert_eq!(depot.read(name).expect_err(name).kind(), Kind::Config, "{name:?}");
        assert!(depot.write(name, &[], &WriteMode::Replace).is_err(), "{name:?}");
        assert!(depot.stat(name).is_err() && depot.delete(name).is_err(), "{name:?}");
    }
    assert!(depot.list("../", &mut |_| Ok(true)).is_err());
}

#[test]
fn a_directory_conforms() {
    let folder = tempfile::tempdir().expect("folder");
    conforms(&FsDepot::open(folder.path().join("made/later")).expect("open"));
}

#[test]
fn memory_conforms() {
    conforms(&MemoryDepot::new());
}

#[test]
fn a_part_of_a_depot_conforms_and_does_not_see_the_rest() {
    let memory = Arc::new(MemoryDepot::new());
    memory.write("outside", &[], &WriteMode::Replace).expect("write");
    memory.write("repository/outside", &[], &WriteMode::Replace).expect("write");
    conforms(&Prefixed::new(memory.clone(), "repo"));
    assert_eq!(memory.names(), ["outside", "repository/outside"]);
}

#[test]
fn all_layers_together_conform() {
    let trace = Trace::new(Arc::new(MemoryDepot::new()));
    let timed = TimeOut::new(Arc::new(trace.clone()), Duration::from_secs(10));
    let narrow = Bandwidth::new(Arc::new(timed), 1 << 30, 1 << 30);
    conforms(&Retry::new(Arc::new(narrow), RetryPolicy::default(), Context::default()));
    assert!(trace.counts().of(Verb::Write) > 20);
}

#[test]
fn a_depot_that_fails_all_the_time_conforms_behind_repetition() {
    let policy = ChaosPolicy { error_before: 0.1, error_after: 0.1, busy: 0.1, ..ChaosPolicy::default() };
    let chaos = Chaos::new(Arc::new(MemoryDepot::new()), 42, policy);
    let pause = RetryPolicy {
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(4),
        elapsed_max: Duration::from_secs(30),
    };
    conforms(&Retry::new(Arc::new(chaos), pause, Context::default()));
}

#[test]
fn turns_make_up_for_missing_conditional_writes() {
    let memory: Arc<dyn Depot> = Arc::new(MemoryDepot::with_capability(DepotCapability::default()));
    let bare = depot::probe(memory.as_ref()).expect("probe");
    assert_eq!((bare.conditional_create, bare.conditional_update), (false, false));
    let turns = Contended::with_times(memory, Duration::from_millis(200), Duration::from_secs(60));
    let pause = RetryPolicy { pause_first: Duration::from_millis(20), ..RetryPolicy::default() };
    conforms(&Retry::new(Arc::new(turns), pause, Context::default()));
}

#[test]
fn a_probe_finds_what_works_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let depot = FsDepot::open(folder.path()).expect("open");
    let found = depot::probe(&depot).expect("probe");
    assert!(found.conditional_create && found.conditional_update && !found.versioning);
    assert_eq!(names(&depot, ""), [""; 0]);
}

#[test]
fn writers_of_one_directory_in_several_processes_agree() {
    // Two depots on one directory stand for two processes: they share nothing but the directory.
    let folder = tempfile::tempdir().expect("folder");
    let depots = [FsDepot::open(folder.path()).expect("open"), FsDepot::open(folder.path()).expect("open")];
    depots[0].write("counter", &[b"0 nobody"], &WriteMode::Create).expect("create");
    race(8, |racer| {
        for _ in 0..10 {
            while let Err(error) = count_up(&depots[racer % 2], racer) {
                assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
            }
        }
    });
    assert!(depots[1].read("counter").expect("read").0.starts_with(b"80 "));
}

#[test]
fn what_an_interrupted_write_left_is_no_object_and_goes_when_it_is_old() {
    let folder = tempfile::tempdir().expect("folder");
    let depot = FsDepot::open(folder.path()).expect("open");
    depot.write("data/object", &[b"x"], &WriteMode::Replace).expect("write");
    let fresh = folder.path().join("data/.stillpoint-fresh");
    let old = folder.path().join("data/.stillpoint-old");
    for path in [&fresh, &old] {
        std::fs::write(path, b"half").expect("write");
    }
    let yesterday = SystemTime::now() - Duration::from_secs(2 * 24 * 3600);
    std::fs::File::options().write(true).open(&old).expect("open").set_modified(yesterday).expect("time");
    assert_eq!(names(&depot, ""), ["data/object"]);
    assert!(fresh.exists() && !old.exists());
    assert!(depot.read("data/.stillpoint-fresh").is_err());
}

#[test]
fn links_that_lead_in_circles_end_a_listing_all_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let depot = FsDepot::open(folder.path()).expect("open");
    depot.write("a/b/object", &[], &WriteMode::Replace).expect("write");
    std::os::unix::fs::symlink("../..", folder.path().join("a/b/up")).expect("link");
    std::os::unix::fs::symlink("nowhere", folder.path().join("a/dangling")).expect("link");
    assert_eq!(names(&depot, ""), ["a/b/object"]);
}

#[test]
fn addresses_that_make_no_sense_say_what_would() {
    let none = BTreeMap::new();
    for address in ["relative/path", "ftp://x", "s3:/x", "file://relative"] {
        let error = depot::open(address, &none, &none).expect_err(address);
        assert_eq!(error.kind(), Kind::Config, "{address}");
        assert!(error.hint_text().is_some(), "{address}");
    }
    let error = depot::open("s3://ab", &none, &none).expect_err("too short");
    assert!(!error.is_temporary() && error.to_string().contains("`ab`"), "{error}");
}
