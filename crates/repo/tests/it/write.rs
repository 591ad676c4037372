//! Backups as others see them: what they leave, what they never leave, and who they wait for.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{self, Content, ContentEnd, Metadata, NodeKind, Sink, Tree, TreePath};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};
use stillpoint_repo::{
    Backup, BackupOptions, BackupSummary, CheckRequest, Compression, Data, InitOptions, KeyFile, Repository,
    SnapshotMeta, StoreSink, Unlock,
};

use crate::support::{self, Restic, assert_same, difficult_tree, noise};

fn repository_at(depot: Arc<dyn Depot>) -> Repository {
    let unlock = Unlock::KeyFile(KeyFile::generate().unwrap());
    Repository::init(depot, &unlock, &InitOptions::default()).unwrap()
}

fn memory() -> (Arc<MemoryDepot>, Repository) {
    let depot = Arc::new(MemoryDepot::new());
    (depot.clone(), repository_at(depot))
}

fn store(name: &str) -> StoreName {
    StoreName::new(name).unwrap()
}

fn meta() -> SnapshotMeta {
    SnapshotMeta {
        time: jiff::Timestamp::now(),
        hostname: "h".into(),
        tags: vec!["t".into()],
        paths: vec!["/p".into()],
    }
}

fn options() -> BackupOptions {
    BackupOptions { threads: 3, ..BackupOptions::default() }
}

/// One store written by `fill`, and the snapshot.
fn back_up(
    repository: &Repository,
    options: BackupOptions,
    parent: Option<Arc<dyn Tree>>,
    fill: impl FnOnce(&mut StoreSink),
) -> BackupSummary {
    let backup = repository.begin(options).unwrap();
    let mut sink = backup.store(&store("data"), parent).unwrap();
    fill(&mut sink);
    sink.finish().unwrap();
    backup.finish(meta()).unwrap()
}

fn newest(repository: &Repository) -> Arc<dyn Tree> {
    let newest = repository.snapshots().unwrap().pop().unwrap();
    repository.tree(&newest.id, Some(&store("data"))).unwrap().unwrap()
}

fn read(tree: &dyn Tree, path: &str) -> Vec<u8> {
    let mut data = Vec::new();
    tree.open(&TreePath::parse(path).unwrap()).unwrap().read_to_end(&mut data).unwrap();
    data
}

fn names(depot: &MemoryDepot, folder: &str) -> usize {
    depot.names().iter().filter(|name| name.starts_with(folder)).count()
}

fn put(sink: &mut StoreSink, name: &str, data: impl Into<Vec<u8>>) {
    let data = data.into();
    sink.file(name.as_bytes(), &Metadata::default(), Some(data.len() as u64), tree::bytes(data)).unwrap();
}

fn assert_sound(repository: &Repository) {
    let request = CheckRequest { data: Data::All, ..CheckRequest::default() };
    assert_eq!(repository.check(&request, &Context::default()).unwrap().errors, [""; 0]);
}

/// Text, numbers and noise by turns, so that every way to store a chunk is taken.
fn mixed(seed: u64, length: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(length);
    while data.len() < length {
        let turn = seed.wrapping_add(data.len() as u64);
        match turn % 3 {
            0 => data.extend(noise(turn, 700_000)),
            1 => data.extend(format!("line {turn} of text\n").repeat(30_000).into_bytes()),
            _ => data.extend((0..150_000_u32).flat_map(|number| ((number % 1000) as f32 / 8.0).to_le_bytes())),
        }
    }
    data.truncate(length);
    data
}

#[test]
fn restic_restores_what_we_write() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("repo");
    let Some(restic) = Restic::find("restic_restores_what_we_write", &at) else { return };
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    difficult_tree(&source);
    let repository = support::init(support::depot(&at));
    support::backup(&repository, &source).unwrap();
    restic.check();
    restic.restore("latest", &scratch.path().join("target"));
    let files = scratch.path().join("target/files");
    // The store's folder is ours and has no time of its own.
    let top = std::fs::File::open(&files).unwrap();
    top.set_modified(source.metadata().unwrap().modified().unwrap()).unwrap();
    assert_same(&source, &files);
    // And by turns: restic's own backup into the same repository, then ours again.
    restic.backup(&source);
    support::backup(&repository, &source).unwrap();
    restic.check();
    assert_eq!(repository.snapshots().unwrap().len(), 3);
    assert!(restic.run(&["list", "locks"]).trim().is_empty());
}

#[test]
fn restic_opens_with_a_generated_key_and_reads_raw_and_split_trees() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("repo");
    let name = "restic_opens_with_a_generated_key_and_reads_raw_and_split_trees";
    if Restic::find(name, &at).is_none() {
        return;
    }
    let key = KeyFile::generate().unwrap();
    let key_path = scratch.path().join("key");
    std::fs::write(&key_path, format!("{}\n", key.text())).unwrap();
    let repository = Repository::init(support::depot(&at), &Unlock::KeyFile(key), &InitOptions::default()).unwrap();
    let raw = BackupOptions { compression: Compression::None, ..options() };
    back_up(&repository, raw, None, |sink| {
        sink.enter(b"huge", &Metadata::default()).unwrap();
        for number in 0..60_000 {
            put(sink, &format!("{number:06}"), "");
        }
        sink.leave().unwrap();
        put(sink, "mixed", mixed(1, 9_000_000));
    });
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new("restic");
        command.args(arguments).args(["--no-cache", "-r"]).arg(&at).env("RESTIC_PASSWORD_FILE", &key_path);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["check", "--read-data"]);
    let target = scratch.path().join("target");
    run(&["restore", "latest", "--target", target.to_str().unwrap()]);
    assert_eq!(std::fs::read(target.join("data/mixed")).unwrap(), mixed(1, 9_000_000));
    let parts: Vec<_> = std::fs::read_dir(target.join("data/huge")).unwrap().map(|part| part.unwrap().path()).collect();
    assert!(parts.len() > 1);
    let files: usize = parts.iter().map(|part| std::fs::read_dir(part).unwrap().count()).sum();
    assert_eq!(files, 60_000);
}

#[test]
fn a_huge_directory_and_names_like_its_parts_come_back_plain() {
    let (_, repository) = memory();
    let odd = [".stillpoint-part-00000001", ".stillpoint-part-=x", ".stillpoint-part-"];
    let mut expected: Vec<String> = (0..60_000).map(|number| format!("{number:06}")).collect();
    expected.extend(odd.map(String::from));
    expected.sort();
    back_up(&repository, options(), None, |sink| expected.iter().for_each(|name| put(sink, name, name.as_str())));
    let tree = newest(&repository);
    let mut found = Vec::new();
    tree.list(&TreePath::root(), &mut |node| {
        found.push(String::from_utf8(node.name).unwrap());
        Ok(true)
    })
    .unwrap();
    assert_eq!(found, expected);
    assert_eq!(read(&*tree, odd[0]), odd[0].as_bytes());
    // The same again with a parent: everything is found there, and nothing is written.
    let summary = back_up(&repository, options(), Some(tree), |sink| {
        for name in &expected {
            assert!(sink.parent(name.as_bytes()).unwrap().is_some(), "{name}");
            sink.reuse(name.as_bytes(), &Metadata::default()).unwrap();
        }
    });
    assert_eq!(summary.blobs_new, 0);
}

#[test]
fn a_backup_without_changes_writes_its_snapshot_and_nothing_else() {
    let (depot, repository) = memory();
    let fill = |sink: &mut StoreSink| {
        sink.enter(b"a", &Metadata::default()).unwrap();
        put(sink, "big", mixed(2, 5_000_000));
        sink.leave().unwrap();
        put(sink, "small", "small");
    };
    back_up(&repository, options(), None, fill);
    let (packs, indexes) = (names(&depot, "data/"), names(&depot, "index/"));
    assert!(packs >= 2 && indexes == 1);
    let tree = newest(&repository);
    let again = back_up(&repository, options(), Some(tree), |sink| {
        assert_eq!(sink.parent(b"nothing").unwrap(), None);
        assert_eq!(sink.reuse(b"nothing", &Metadata::default()).unwrap_err().kind(), Kind::NotFound);
        sink.reuse(b"a", &Metadata::default()).unwrap();
        assert_eq!(sink.parent(b"small").unwrap().unwrap().kind, NodeKind::File { size: 5 });
        sink.reuse(b"small", &Metadata::default()).unwrap();
    });
    let read_anew = back_up(&repository, options(), None, fill);
    for summary in [again, read_anew] {
        assert_eq!((summary.blobs_new, summary.bytes_stored), (0, 0));
    }
    assert_eq!((names(&depot, "data/"), names(&depot, "index/")), (packs, indexes));
    assert_eq!((names(&depot, "snapshots/"), names(&depot, "locks/")), (3, 0));
    assert_eq!(read(&*newest(&repository), "a/big"), mixed(2, 5_000_000));
    assert_sound(&repository);
}

#[test]
fn what_lay_in_a_lost_or_short_pack_is_stored_anew() {
    let (depot, repository) = memory();
    let (big, small) = (noise(2, 3_000_000), noise(9, 200_000));
    back_up(&repository, options(), None, |sink| {
        sink.enter(b"a", &Metadata::default()).unwrap();
        put(sink, "big", big.clone());
        sink.leave().unwrap();
    });
    let old: Vec<String> = depot.names().into_iter().filter(|name| name.starts_with("data/")).collect();
    let lost = old.iter().max_by_key(|name| depot.stat(name).unwrap().unwrap().size).unwrap().clone();
    back_up(&repository, options(), None, |sink| put(sink, "small", small.clone()));
    let tree = repository.tree(&repository.snapshots().unwrap()[0].id, Some(&store("data"))).unwrap().unwrap();
    for is_short in [true, false] {
        let bytes = depot.read(&lost).unwrap().0;
        match is_short {
            true => drop(depot.write(&lost, &[&bytes[..bytes.len() / 2]], &WriteMode::Replace).unwrap()),
            false => depot.delete(&lost).unwrap(),
        }
        let summary = back_up(&repository, options(), Some(tree.clone()), |sink| {
            assert_eq!(sink.parent(b"a").unwrap(), None);
            sink.enter(b"a", &Metadata::default()).unwrap();
            if is_short {
                assert_eq!(sink.parent(b"big").unwrap(), None);
                assert_eq!(sink.reuse(b"big", &Metadata::default()).unwrap_err().kind(), Kind::NotFound);
            }
            put(sink, "big", big.clone());
            sink.leave().unwrap();
            put(sink, "small", small.clone());
        });
        // Stored anew once, beside small trees; the other pack and the new one are believed.
        assert_eq!(summary.bytes_stored > 500_000, is_short);
        assert_eq!(read(&*newest(&repository), "a/big"), big);
    }
}

#[test]
fn a_parent_of_another_repository_is_passed_over() {
    let (_, other) = memory();
    back_up(&other, options(), None, |sink| put(sink, "a", "there"));
    let (_, repository) = memory();
    back_up(&repository, options(), Some(newest(&other)), |sink| {
        assert_eq!(sink.parent(b"a").unwrap(), None);
        put(sink, "a", "here");
    });
    assert_eq!(read(&*newest(&repository), "a"), b"here");
}

#[test]
fn several_stores_at_once_and_streams_in_pieces_keep_their_bytes() {
    let (_, repository) = memory();
    let backup = repository.begin(options()).unwrap();
    std::thread::scope(|scope| {
        for number in 0..4_u64 {
            let backup = &backup;
            scope.spawn(move || {
                let mut sink = backup.store(&store(&format!("s{number}")), None).unwrap();
                // The size is unknown, wrong, or right; reads come in odd pieces.
                let content =
                    Pieces { data: mixed(number, 14_000_000), at: 0, random: fastrand::Rng::with_seed(number) };
                let hint = [None, Some(10), Some(14_000_000), Some(u64::MAX)][number as usize];
                sink.file(b"a", &Metadata::default(), hint, Box::new(content)).unwrap();
                sink.enter(b"b", &Metadata::default()).unwrap();
                for file in 0..500 {
                    put(&mut sink, &format!("{file:04}"), format!("{number} {file}"));
                }
                sink.leave().unwrap();
                let summary = sink.finish().unwrap();
                assert_eq!((summary.files, summary.torn.len()), (501, 0));
                assert!(summary.bytes_read >= 14_000_000);
            });
        }
    });
    let summary = backup.finish(meta()).unwrap();
    for number in 0..4 {
        let tree = repository.tree(&summary.snapshot, Some(&store(&format!("s{number}")))).unwrap().unwrap();
        assert!(read(&*tree, "a") == mixed(number, 14_000_000), "store {number}");
        assert_eq!(read(&*tree, "b/0499"), format!("{number} 499").into_bytes());
    }
    assert_sound(&repository);
}

/// Bytes that come in pieces of odd lengths.
struct Pieces {
    data: Vec<u8>,
    at: usize,
    random: fastrand::Rng,
}

impl Content for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let length = self.random.usize(1..200_000).min(buffer.len()).min(self.data.len() - self.at);
        buffer[..length].copy_from_slice(&self.data[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// A content that does something else than to yield bytes.
struct Act<F>(F);

impl<F: FnMut(&mut [u8]) -> Result<usize> + Send> Content for Act<F> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        (self.0)(buffer)
    }
}

#[test]
fn slow_streams_stop_no_other() {
    let (_, repository) = memory();
    let backup = repository.begin(BackupOptions { threads: 2, ..BackupOptions::default() }).unwrap();
    let go_on = Arc::new(AtomicBool::new(false));
    let mut slow = backup.store(&store("slow"), None).unwrap();
    for number in 0..3 {
        let go_on = go_on.clone();
        let wait = Act(move |_: &mut [u8]| {
            while !go_on.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(0)
        });
        slow.file(format!("{number}").as_bytes(), &Metadata::default(), None, Box::new(wait)).unwrap();
    }
    let mut fast = backup.store(&store("fast"), None).unwrap();
    for number in 0..1_000 {
        put(&mut fast, &format!("{number:04}"), "x");
    }
    put(&mut fast, "big", mixed(3, 9_000_000));
    assert_eq!(fast.finish().unwrap().files, 1_001);
    go_on.store(true, Ordering::Relaxed);
    slow.finish().unwrap();
    backup.finish(meta()).unwrap();
    assert_sound(&repository);
}

#[test]
fn torn_streams_are_named_and_failed_ones_fail_the_store() {
    struct Torn;
    impl Content for Torn {
        fn read(&mut self, _: &mut [u8]) -> Result<usize> {
            Ok(0)
        }
        fn finish(&mut self) -> Result<ContentEnd> {
            Ok(ContentEnd::Torn("it grew".into()))
        }
    }
    let (depot, repository) = memory();
    let backup = repository.begin(options()).unwrap();
    let mut sink = backup.store(&store("torn"), None).unwrap();
    sink.enter(b"d", &Metadata::default()).unwrap();
    sink.file(b"f", &Metadata::default(), Some(0), Box::new(Torn)).unwrap();
    sink.leave().unwrap();
    let torn = sink.finish().unwrap().torn;
    assert_eq!((torn[0].what.as_str(), torn[0].why.as_str()), ("d/f", "it grew"));
    for hint in [Some(1), None] {
        let mut sink = backup.store(&store(if hint.is_some() { "small" } else { "large" }), None).unwrap();
        let failing = Act(|_: &mut [u8]| Err(Error::new(Kind::PermissionDenied, "no")));
        // Told at once or at the end, whichever comes first.
        let outcome =
            sink.file(b"f", &Metadata::default(), hint, Box::new(failing)).and_then(|()| sink.finish().map(drop));
        assert_eq!(outcome.unwrap_err().kind(), Kind::PermissionDenied);
    }
    assert!(backup.finish(meta()).is_err(), "two stores are not whole");
    assert_eq!((names(&depot, "snapshots/"), names(&depot, "locks/")), (0, 0));
}

#[test]
fn a_panicking_content_fails_the_backup_and_hangs_nobody() {
    let (depot, repository) = memory();
    let backup = repository.begin(options()).unwrap();
    let mut sink = backup.store(&store("data"), None).unwrap();
    let panics = Act(|_: &mut [u8]| -> Result<usize> { panic!("a driver's bug, on purpose") });
    sink.file(b"f", &Metadata::default(), None, Box::new(panics)).unwrap();
    assert_eq!(sink.finish().unwrap_err().kind(), Kind::Internal);
    backup.abandon().unwrap();
    assert_eq!(names(&depot, "locks/"), 0);
}

#[test]
fn a_cancelled_or_dropped_backup_leaves_no_lock_and_no_snapshot() {
    for how in ["cancel", "drop", "abandon"] {
        let (depot, repository) = memory();
        let context = Context::default();
        let backup = repository.begin(BackupOptions { context: context.clone(), ..options() }).unwrap();
        let mut sink = backup.store(&store("data"), None).unwrap();
        // A stream without end.
        let mut random = fastrand::Rng::with_seed(1);
        let endless = Act(move |buffer: &mut [u8]| {
            random.fill(buffer);
            Ok(buffer.len())
        });
        sink.file(b"f", &Metadata::default(), None, Box::new(endless)).unwrap();
        while names(&depot, "data/") == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let begin = Instant::now();
        match how {
            "cancel" => {
                context.cancel();
                assert_eq!(sink.finish().unwrap_err().kind(), Kind::Cancelled);
                drop(backup);
            }
            "drop" => {
                drop(sink);
                drop(backup);
            }
            _ => backup.abandon().unwrap(),
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{how}");
        assert_eq!((names(&depot, "locks/"), names(&depot, "snapshots/"), names(&depot, "index/")), (0, 0, 0), "{how}");
        back_up(&repository, options(), None, |sink| put(sink, "f", "next"));
        assert_sound(&repository);
    }
}

#[test]
fn mistakes_of_a_drain_are_refused() {
    let (_, repository) = memory();
    let backup = repository.begin(options()).unwrap();
    let mut sink = backup.store(&store("data"), None).unwrap();
    put(&mut sink, "b", "");
    for bad in ["a", "b", "c/d", "..", ""] {
        assert!(sink.file(bad.as_bytes(), &Metadata::default(), None, tree::bytes("")).is_err(), "{bad:?}");
    }
    assert!(sink.leave().is_err());
    sink.enter(b"open", &Metadata::default()).unwrap();
    assert!(sink.finish().is_err(), "a directory is open");
    assert_eq!(backup.store(&store("data"), None).err().map(|error| error.kind()), Some(Kind::AlreadyExists));
    assert!(backup.finish(meta()).is_err());
}

#[test]
fn an_index_file_is_written_on_the_way_and_used_by_the_next_backup() {
    let (depot, repository) = memory();
    // Packs of 11 MB, of which three are full before the end.
    let small = || BackupOptions { threads: 1, memory_bytes_max: 32 << 20, ..BackupOptions::default() };
    let backup = repository.begin(small()).unwrap();
    let mut sink = backup.store(&store("data"), None).unwrap();
    for number in 0..60_000 {
        put(&mut sink, &format!("{number:06}"), noise(number, 600));
    }
    assert_eq!(names(&depot, "index/"), 1, "after 50,000 blobs");
    // As if it had been killed: the sink and the backup go, the snapshot never comes.
    drop((sink, backup));
    let summary = back_up(&repository, small(), None, |sink| {
        for number in 0..60_000 {
            put(sink, &format!("{number:06}"), noise(number, 600));
        }
    });
    assert!(summary.blobs_new < 12_000, "{} blobs were written again", summary.blobs_new);
    assert_sound(&repository);
}

/// A depot that counts writes of packs at the same time, takes its time, and may fail.
#[derive(Debug)]
struct Remote {
    inner: MemoryDepot,
    writing: AtomicUsize,
    writing_most: AtomicUsize,
    fails: AtomicBool,
}

impl Depot for Remote {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.inner.read(name)
    }
    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.inner.read_range(name, offset, length)
    }
    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        if name.starts_with("data/") {
            if self.fails.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Exhausted, "the quota is used up"));
            }
            let now = self.writing.fetch_add(1, Ordering::SeqCst) + 1;
            self.writing_most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            self.writing.fetch_sub(1, Ordering::SeqCst);
        }
        self.inner.write(name, parts, mode)
    }
    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, visit)
    }
    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.inner.stat(name)
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }
    fn capability(&self) -> DepotCapability {
        self.inner.capability()
    }
    fn waits(&self) -> bool {
        true
    }
    fn location(&self) -> String {
        "remote".into()
    }
}

fn remote() -> (Arc<Remote>, Repository) {
    let depot = Arc::new(Remote {
        inner: MemoryDepot::new(),
        writing: AtomicUsize::new(0),
        writing_most: AtomicUsize::new(0),
        fails: AtomicBool::new(false),
    });
    (depot.clone(), repository_at(depot))
}

#[test]
fn writes_to_a_slow_depot_overlap_and_end_before_the_index() {
    let (depot, repository) = remote();
    let small = BackupOptions { memory_bytes_max: 40 << 20, threads: 2, ..BackupOptions::default() };
    back_up(&repository, small, None, |sink| put(sink, "a", noise(1, 60_000_000)));
    assert!(depot.writing_most.load(Ordering::SeqCst) > 1);
    assert_eq!(read(&*newest(&repository), "a"), noise(1, 60_000_000));
    assert_sound(&repository);
}

#[test]
fn a_failing_depot_fails_the_backup_with_its_reason() {
    for large in [false, true] {
        let (depot, repository) = remote();
        let begun = repository.begin(BackupOptions { memory_bytes_max: 40 << 20, ..options() });
        let backup: Backup = begun.unwrap();
        let mut sink = backup.store(&store("data"), None).unwrap();
        depot.fails.store(true, Ordering::Relaxed);
        let data = noise(1, if large { 40_000_000 } else { 1_000 });
        let outcome = sink
            .file(b"a", &Metadata::default(), None, tree::bytes(data))
            .and_then(|()| sink.finish().map(drop))
            .and_then(|()| backup.finish(meta()).map(drop));
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted, "{error:?}");
        assert_eq!(repository.snapshots().unwrap(), []);
        assert!(depot.inner.names().iter().all(|name| !name.starts_with("index/") && !name.starts_with("locks/")));
    }
}

#[test]
fn two_backups_at_once_both_count() {
    let (_, repository) = memory();
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for number in 0..2_u64 {
            let (repository, barrier) = (&repository, &barrier);
            scope.spawn(move || {
                back_up(repository, options(), None, |sink| {
                    barrier.wait();
                    put(sink, "same", mixed(9, 3_000_000));
                    put(sink, "zown", noise(number, 2_000_000));
                });
            });
        }
    });
    assert_eq!(repository.snapshots().unwrap().len(), 2);
    assert_sound(&repository);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Trees of any shape come back as they were, whatever the reads and the threads.
    #[test]
    fn any_tree_survives(
        files in proptest::collection::btree_map("[a-c]{1,2}(/[a-c]{1,2}){0,3}", (0..40_000_usize, any::<u64>()), 0..40),
        threads in 1..4_usize,
    ) {
        // A name is a file or a folder, not both.
        let paths: Vec<String> = files.keys().cloned().collect();
        let is_folder = |path: &str| paths.iter().any(|other| other.starts_with(&format!("{path}/")));
        let files: BTreeMap<Vec<Vec<u8>>, (usize, u64)> = files
            .into_iter()
            .filter(|(path, _)| !is_folder(path))
            .map(|(path, what)| (path.split('/').map(|part| part.as_bytes().to_vec()).collect(), what))
            .collect();
        let (_, repository) = memory();
        back_up(&repository, BackupOptions { threads, ..BackupOptions::default() }, None, |sink| {
            let mut inside: Vec<Vec<u8>> = Vec::new();
            for (path, (length, seed)) in &files {
                let (name, folders) = path.split_last().unwrap();
                while !folders.starts_with(&inside) {
                    sink.leave().unwrap();
                    inside.pop();
                }
                for folder in &folders[inside.len()..] {
                    sink.enter(folder, &Metadata::default()).unwrap();
                    inside.push(folder.clone());
                }
                put(sink, std::str::from_utf8(name).unwrap(), noise(*seed, *length));
            }
            inside.iter().for_each(|_| sink.leave().unwrap());
        });
        let tree = newest(&repository);
        for (path, (length, seed)) in &files {
            let text = String::from_utf8(path.join(&b'/')).unwrap();
            prop_assert_eq!(read(&*tree, &text), noise(*seed, *length));
        }
    }
}
