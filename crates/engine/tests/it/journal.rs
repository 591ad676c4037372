//! The journal: what was synced is read back, a torn end is passed over, damage is told.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillpoint_core::Kind;
use stillpoint_core::coordinator::{Event, Happening, Micros};
use stillpoint_core::platform::Platform;
use stillpoint_engine::journal::{
    Authenticate, BucketJournal, Entry, Journal, find_unfinished, forget_ended, forget_ended_copies, read_copy,
};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{Depot, WriteMode};

use crate::world::{head, platform};

fn event(at: u64) -> Entry {
    Entry::Event(Event::new(Micros(at), if at == 0 { Happening::Begin } else { Happening::Tick }))
}

/// Writes a journal of a head and `events` events and drops it, as a crash would.
fn crashed(state: &Path, platform: &Platform, number: u8, events: u64) -> PathBuf {
    let head = head(platform, number, &state.join("scratch"));
    let mut journal = Journal::begin(state, &head).expect("writable");
    for at in 0..events {
        journal.append(&event(at)).expect("writable");
    }
    journal.sync().expect("writable");
    state.join("churn").join(format!("{}.journal", head.run))
}

#[test]
fn what_was_written_is_read_back_and_ended_journals_are_passed_over() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    let path = crashed(state.path(), &platform, 2, 3);
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).expect("there"));
    assert_eq!(mode & 0o777, 0o600, "hooks may name secrets");
    crashed(state.path(), &platform, 1, 1);
    let found = find_unfinished(state.path(), &platform.platform).expect("readable");
    let events: Vec<_> = found.iter().map(|found| found.replay.events.len()).collect();
    assert_eq!(events, [1, 3], "oldest first");
    assert_eq!(found[1].replay.head, head(&platform, 2, &state.path().join("scratch")));
    for found in found {
        found.journal.end("recovered").expect("writable");
    }
    assert!(find_unfinished(state.path(), &platform.platform).expect("readable").is_empty());
}

#[test]
fn a_journal_torn_at_any_byte_gives_every_whole_line_and_goes_on_from_there() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    let path = crashed(state.path(), &platform, 1, 3);
    let whole = std::fs::read(&path).expect("readable");
    let ends: Vec<_> = whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
    for length in ends[0]..whole.len() {
        std::fs::write(&path, &whole[..length]).expect("writable");
        let mut found = find_unfinished(state.path(), &platform.platform).expect("readable");
        let mut found = found.pop().expect("unfinished");
        let lines = ends.iter().filter(|end| **end <= length).count();
        assert_eq!((found.replay.events.len(), &found.replay.damage), (lines - 1, &None), "cut at {length}");
        found.journal.append(&event(9)).and_then(|()| found.journal.sync()).expect("writable");
        drop(found);
        let again = find_unfinished(state.path(), &platform.platform).expect("readable");
        assert_eq!(again[0].replay.events.len(), lines, "cut at {length}");
    }
}

#[test]
fn a_flipped_byte_in_the_middle_is_damage_and_what_came_before_counts() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    let path = crashed(state.path(), &platform, 1, 4);
    let mut bytes = std::fs::read(&path).expect("readable");
    let second = bytes.iter().position(|byte| *byte == b'\n').expect("lines") + 1;
    bytes[second + 30] ^= 1;
    std::fs::write(&path, &bytes).expect("writable");
    let found = find_unfinished(state.path(), &platform.platform).expect("readable");
    assert!(found[0].replay.events.is_empty());
    let damage = found[0].replay.damage.clone().expect("told");
    assert!(damage.starts_with("a damaged line at byte"), "{damage}");
}

#[test]
fn a_journal_whose_engine_is_alive_is_locked_and_says_who_runs_since_when() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    let head = head(&platform, 1, state.path());
    let _alive = Journal::begin(state.path(), &head).expect("writable");
    let error = find_unfinished(state.path(), &platform.platform).expect_err("it is held");
    assert_eq!(error.kind(), Kind::Locked);
    let run = &head.run;
    let expected = format!(
        "platform `churn` is being backed up already: run {run} on elsewhere, process 4711, since 2023-11-14 22:13:21 UTC"
    );
    assert_eq!((error.to_string(), error.hint_text()), (expected, Some("wait until it ends, or stop process 4711")));
}

#[test]
fn old_ended_journals_are_forgotten_and_unfinished_ones_never() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    for number in 0..25 {
        let head = head(&platform, number, state.path());
        Journal::begin(state.path(), &head).and_then(|journal| journal.end("sealed")).expect("writable");
    }
    crashed(state.path(), &platform, 0x40, 1);
    forget_ended(state.path(), &platform.platform).expect("writable");
    let left = std::fs::read_dir(state.path().join("churn")).expect("readable").count();
    assert_eq!(left, 21);
    assert_eq!(find_unfinished(state.path(), &platform.platform).expect("readable").len(), 1);
}

fn keyed() -> Authenticate {
    // Any function of all the bytes will do for a test.
    Arc::new(|bytes| {
        let mut hash = [7u8; 32];
        for (at, byte) in bytes.iter().enumerate() {
            hash[at % 32] = hash[at % 32].wrapping_mul(31).wrapping_add(*byte);
        }
        hash
    })
}

#[test]
fn the_copy_in_the_bucket_is_read_by_another_machine_and_forgery_is_refused() {
    let state = tempfile::tempdir().expect("a folder");
    let head = head(&platform("journal", &["a"], state.path()), 1, state.path());
    let bucket: Arc<dyn Depot> = Arc::new(MemoryDepot::new());
    let mut copy = BucketJournal::new(Arc::clone(&bucket), keyed(), head.run.clone());
    copy.push(Entry::Head(Box::new(head.clone())));
    copy.copy().expect("writable");
    copy.push(event(0));
    copy.push(event(1));
    copy.copy().expect("writable");
    copy.copy().expect("nothing waits");
    let replay = read_copy(bucket.as_ref(), &keyed(), &head.run).expect("authentic").expect("there");
    assert_eq!((replay.head.clone(), replay.events.len(), replay.ended), (head.clone(), 2, false));

    let name = format!("journal/{}/0001.json", head.run);
    let (bytes, _) = bucket.read(&name).expect("there");
    let forged = String::from_utf8(bytes.to_vec()).expect("text").replace("tick", "recovered");
    bucket.write(&name, &[forged.as_bytes()], &WriteMode::Replace).expect("writable");
    let error = read_copy(bucket.as_ref(), &keyed(), &head.run).expect_err("forged");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().starts_with("a journal part in the bucket was not written with this repository's key"));

    bucket.delete(&format!("journal/{}/0000.json", head.run)).expect("writable");
    bucket.write(&name, &[&bytes], &WriteMode::Replace).expect("writable");
    let error = read_copy(bucket.as_ref(), &keyed(), &head.run).expect_err("the first part is gone");
    assert!(error.to_string().starts_with("the parts of a journal in the bucket do not follow each other"));
}

#[test]
fn a_half_line_of_a_crash_does_not_hide_what_is_appended_later() {
    let state = tempfile::tempdir().expect("a folder");
    let platform = platform("journal", &["a"], state.path());
    let path = crashed(state.path(), &platform, 1, 1);
    let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("there");
    file.write_all(b"0000ffff 0123456789abcdef {\"eve").expect("writable");
    let found = find_unfinished(state.path(), &platform.platform).expect("readable").pop().expect("unfinished");
    found.journal.end("recovered").expect("writable");
    assert!(find_unfinished(state.path(), &platform.platform).expect("readable").is_empty());
}

/// A journal in the bucket of two parts; the second one may say that the run ended.
fn copied(bucket: &Arc<dyn Depot>, number: u8, ended: bool) -> stillpoint_core::id::RunId {
    let state = tempfile::tempdir().expect("a folder");
    let head = head(&platform("journal", &["a"], state.path()), number, state.path());
    let mut copy = BucketJournal::new(Arc::clone(bucket), keyed(), head.run.clone());
    copy.push(Entry::Head(Box::new(head.clone())));
    copy.copy().expect("writable");
    copy.push(event(1));
    if ended {
        copy.push(Entry::Ended { outcome: "sealed".to_owned() });
    }
    copy.copy().expect("writable");
    head.run
}

#[test]
fn only_journals_of_runs_that_ended_long_ago_leave_the_bucket() {
    let bucket: Arc<dyn Depot> = Arc::new(MemoryDepot::new());
    let ended = copied(&bucket, 1, true);
    let unfinished = copied(&bucket, 2, false);
    let leased = copied(&bucket, 3, true);
    let forged = copied(&bucket, 4, false);
    let name = format!("journal/{forged}/0001.json");
    let (bytes, _) = bucket.read(&name).expect("there");
    let text = String::from_utf8(bytes.to_vec()).expect("text").replace("tick", "ended");
    bucket.write(&name, &[text.as_bytes()], &WriteMode::Replace).expect("writable");
    let torn = copied(&bucket, 5, true);
    bucket.delete(&format!("journal/{torn}/0000.json")).expect("a removal was cut off here");

    let spared = [leased.clone()].into();
    let forget = |before: std::time::SystemTime, dry_run| {
        forget_ended_copies(bucket.as_ref(), &keyed(), &spared, before, dry_run).expect("works")
    };
    let (past, future) = (std::time::UNIX_EPOCH, std::time::SystemTime::now() + std::time::Duration::from_secs(60));
    assert_eq!(forget(past, false), stillpoint_engine::journal::OldCopies::default(), "all are young");
    let mut gone = vec![ended.clone(), torn];
    gone.sort();
    assert_eq!(forget(future, true).removed, gone);
    assert!(read_copy(bucket.as_ref(), &keyed(), &ended).expect("readable").is_some(), "it was a dry run");
    let found = forget(future, false);
    assert_eq!(found.removed, gone);
    assert_eq!(found.unreadable.iter().map(|(run, _)| run.clone()).collect::<Vec<_>>(), [forged.to_string()]);
    let mut left = std::collections::BTreeSet::new();
    let mut note = |object: stillpoint_repo::depot::ObjectInfo| {
        left.insert(object.name.split('/').nth(1).expect("a run").to_owned());
        Ok(true)
    };
    bucket.list("journal/", &mut note).expect("readable");
    assert_eq!(left, [unfinished, leased, forged].iter().map(ToString::to_string).collect());
}
