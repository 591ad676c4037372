//! Reading: what it costs in calls, what torn transfers do to it, how trees answer.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{
    Existing, ExtractOptions, FileTime, Metadata, Node, NodeKind, Sink, Tree, TreePath, bytes,
};
use stillpoint_repo::depot::Depot;
use stillpoint_repo::depot::layers::{Before, Chaos, ChaosPolicy, Trace, Verb};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::{
    BackupOptions, CheckRequest, Data, InitOptions, KeyFile, Repository, SnapshotId, SnapshotMeta, Unlock,
};

use crate::support::{assert_same_below, backup, noise};

struct Sample {
    scratch: tempfile::TempDir,
    depot: Arc<MemoryDepot>,
    key: Unlock,
    snapshot: SnapshotId,
}

impl Sample {
    /// 500 small files in five folders, and one of 9 MB.
    fn make() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let source = scratch.path().join("source");
        for folder in 0..5 {
            std::fs::create_dir_all(source.join(format!("folder-{folder}"))).unwrap();
            for file in 0..100 {
                let data = noise(folder * 100 + file, 3_000);
                std::fs::write(source.join(format!("folder-{folder}/file-{file:03}")), data).unwrap();
            }
        }
        std::fs::write(source.join("large"), noise(77, 9_000_000)).unwrap();
        let depot = Arc::new(MemoryDepot::new());
        let key = Unlock::KeyFile(KeyFile::generate().unwrap());
        let repository = Repository::init(depot.clone(), &key, &InitOptions::default()).unwrap();
        let snapshot = backup(&repository, &source).unwrap();
        Self { scratch, depot, key, snapshot }
    }

    fn tree(&self, depot: Arc<dyn Depot>) -> Arc<dyn Tree> {
        let repository = Repository::open(depot, &self.key).unwrap();
        repository.tree(&self.snapshot, Some(&StoreName::new("files").unwrap())).unwrap().unwrap()
    }
}

fn options() -> ExtractOptions {
    ExtractOptions { existing: Existing::Refuse, owners: false }
}

#[test]
fn a_restore_asks_for_large_ranges_and_reads_each_byte_once() {
    let sample = Sample::make();
    let trace = Arc::new(Trace::new(sample.depot.clone()));
    let tree = sample.tree(trace.clone());
    trace.reset();
    let target = sample.scratch.path().join("target");
    let extracted = tree.extract(&TreePath::root(), &target, &options(), &Context::default()).unwrap();
    assert_eq!((extracted.files, extracted.bytes), (501, 10_500_000));
    assert_same_below(&sample.scratch.path().join("source"), &target);
    let counts = trace.reset();
    let reads = counts.within(Verb::Read, "data");
    assert!(reads <= 20, "{reads} reads for 501 files");
    assert!(counts.bytes_down < 13_000_000, "{} bytes read", counts.bytes_down);
    assert_eq!(tree.compare(&TreePath::root(), &target, &Context::default()).unwrap(), []);
    let counts = trace.reset();
    assert_eq!(counts.within(Verb::Read, "data"), 0, "a comparison needs the directories only, which were read before");
}

#[test]
fn torn_transfers_are_read_again_or_fail_and_never_pass() {
    let sample = Sample::make();
    let (mut right, mut failed) = (0, 0);
    for seed in 0..30 {
        let policy = ChaosPolicy { torn_read: 0.08, ..ChaosPolicy::default() };
        let Ok(repository) = Repository::open(Arc::new(Chaos::new(sample.depot.clone(), seed, policy)), &sample.key)
        else {
            continue;
        };
        let target = sample.scratch.path().join(format!("target-{seed}"));
        let store = StoreName::new("files").unwrap();
        let tree = repository.tree(&sample.snapshot, Some(&store));
        match tree.and_then(|tree| tree.unwrap().extract(&TreePath::root(), &target, &options(), &Context::default())) {
            Ok(_) => {
                assert_same_below(&sample.scratch.path().join("source"), &target);
                right += 1;
            }
            Err(error) => {
                assert!(matches!(error.kind(), Kind::Corrupt | Kind::Io), "{error:?}");
                failed += 1;
            }
        }
    }
    assert!(right > 5, "{right} right, {failed} failed");
}

#[test]
fn a_distant_depot_is_read_rightly() {
    let sample = Sample::make();
    let delay = Duration::from_millis(30);
    let policy = ChaosPolicy { delay: 1.0, delay_for: delay, ..ChaosPolicy::default() };
    let trace = Arc::new(Trace::new(Arc::new(Chaos::new(sample.depot.clone(), 1, policy))));
    let repository = Repository::open(trace.clone(), &sample.key).unwrap();
    let request = CheckRequest { data: Data::All, snapshots: None };
    assert_eq!(repository.check(&request, &Context::default()).unwrap().errors, [""; 0]);
    let tree = sample.tree(trace);
    let target = sample.scratch.path().join("target");
    tree.extract(&TreePath::root(), &target, &options(), &Context::default()).unwrap();
    assert_same_below(&sample.scratch.path().join("source"), &target);
}

#[test]
fn a_restore_reads_several_ranges_at_once() {
    let sample = Sample::make();
    let (readers, met) = (Mutex::new(0), Condvar::new());
    // The first reader of a large range waits for a second one.
    let meeting = Before::new(sample.depot.clone(), move |call| {
        if call.range_bytes == 1 {
            // The question how far away the depot is; a distant one gets several readers on any machine.
            std::thread::sleep(Duration::from_millis(5));
        } else if call.range_bytes > 1 << 20 {
            let mut readers = readers.lock().unwrap();
            *readers += 1;
            met.notify_all();
            let (_readers, waited) =
                met.wait_timeout_while(readers, Duration::from_secs(30), |readers| *readers < 2).unwrap();
            assert!(!waited.timed_out(), "nobody else read while this one did");
        }
        Ok(())
    });
    let target = sample.scratch.path().join("target");
    sample.tree(Arc::new(meeting)).extract(&TreePath::root(), &target, &options(), &Context::default()).unwrap();
    assert_same_below(&sample.scratch.path().join("source"), &target);
}

#[test]
fn files_are_read_from_their_begin_and_look_ups_answer() {
    let sample = Sample::make();
    let trace = Arc::new(Trace::new(sample.depot.clone()));
    let tree = sample.tree(trace.clone());
    let path = |text: &str| TreePath::parse(text).unwrap();
    let mut data = Vec::new();
    tree.open(&path("large")).unwrap().read_to_end(&mut data).unwrap();
    assert_eq!(data, noise(77, 9_000_000));
    trace.reset();
    for file in 0..100 {
        let node = tree.get(&path(&format!("folder-3/file-{file:03}"))).unwrap().unwrap();
        assert_eq!(node.name, format!("file-{file:03}").as_bytes());
        assert!(tree.get(&path(&format!("folder-3/file-{file:03}-not"))).unwrap().is_none());
    }
    assert_eq!(trace.reset().of(Verb::Read), 0, "directories that were read stay at hand");
    // Not before the count: whoever reads ahead may still do so when the reader is gone.
    let mut first = [0; 10];
    tree.open(&path("large")).unwrap().read_exact(&mut first).unwrap();
    assert_eq!(first, data[..10]);
    assert!(tree.get(&path("folder-3/file-000/below-a-file")).unwrap().is_none());
    assert_eq!(tree.open(&path("folder-9/x")).map(|_| ()).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(tree.open(&path("folder-1")).map(|_| ()).unwrap_err().kind(), Kind::Config);
    let mut names = Vec::new();
    tree.list(&TreePath::root(), &mut |node| {
        names.push(String::from_utf8(node.name).unwrap());
        Ok(names.len() < 3)
    })
    .unwrap();
    assert_eq!(names, ["folder-0", "folder-1", "folder-2"]);
    let target = sample.scratch.path().join("part");
    tree.extract(&path("folder-2"), &target, &options(), &Context::default()).unwrap();
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 100);
    let refused = tree.extract(&path("folder-2"), &target, &options(), &Context::default()).unwrap_err();
    assert_eq!(refused.kind(), Kind::AlreadyExists);
}

#[test]
fn a_check_of_one_snapshot_or_of_a_sample_reads_less() {
    let sample = Sample::make();
    let repository = Repository::open(sample.depot.clone(), &sample.key).unwrap();
    let other = sample.scratch.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("file"), noise(5, 30_000_000)).unwrap();
    let second = backup(&repository, &other).unwrap();
    let check = |data, snapshots| {
        let report = repository.check(&CheckRequest { data, snapshots }, &Context::default()).unwrap();
        assert_eq!(report.errors, [""; 0]);
        (report.snapshots, report.packs_read, report.bytes_read)
    };
    let (all, one) = (check(Data::All, None), check(Data::All, Some(vec![second])));
    assert_eq!((all.0, one.0), (2, 1));
    assert!(one.2 > 30_000_000 && one.2 < all.2 - 9_000_000, "{one:?} {all:?}");
    let sampled = check(Data::Sample { percent: 1.0, seed: 7 }, None);
    assert_eq!((sampled.0, sampled.1), (2, 1));
    assert_eq!(check(Data::Sample { percent: 100.0, seed: 7 }, None), all);
    assert_eq!(check(Data::None, None), (2, 0, 0));
}

#[test]
fn special_files_and_paths_longer_than_any_limit_come_back() {
    let depot = Arc::new(MemoryDepot::new());
    let key = Unlock::KeyFile(KeyFile::generate().unwrap());
    let repository = Repository::init(depot, &key, &InitOptions::default()).unwrap();
    let backup = repository.begin(BackupOptions::default()).unwrap();
    let store = StoreName::new("files").unwrap();
    let mut sink = backup.store(&store, None).unwrap();
    let meta = Metadata::folder(FileTime { seconds: 1_000_000_000, nanos: 5 });
    let name = [b'd'; 250];
    for _ in 0..40 {
        sink.enter(&name, &meta).unwrap();
    }
    sink.file(b"leaf", &Metadata::stream(meta.mtime), None, bytes(b"deep".to_vec())).unwrap();
    for _ in 0..40 {
        sink.leave().unwrap();
    }
    let null = rustix::fs::makedev(1, 3);
    for (name, kind) in [
        ("e-char", NodeKind::CharDevice { device: null }),
        ("f-block", NodeKind::BlockDevice { device: rustix::fs::makedev(7, 0) }),
        ("g-fifo", NodeKind::Fifo),
        ("h-socket", NodeKind::Socket),
        ("i-link", NodeKind::Symlink { target: b"\xff/../nowhere".to_vec() }),
    ] {
        let meta = Metadata { mode: 0o640, ..Metadata::stream(meta.mtime) };
        sink.node(&Node { name: name.into(), kind, meta }).unwrap();
    }
    sink.finish().unwrap();
    let time = jiff::Timestamp::now();
    let meta = SnapshotMeta { time, hostname: "test".into(), tags: vec![], paths: vec!["/files".into()] };
    let snapshot = backup.finish(meta).unwrap().snapshot;

    let tree = repository.tree(&snapshot, Some(&store)).unwrap().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("target");
    let extracted = tree.extract(&TreePath::root(), &target, &options(), &Context::default()).unwrap();
    let devices = extracted.losses.is_empty();
    if !devices {
        stillpoint_testkit::skip("device files", &format!("not permitted here: {:?}", extracted.losses));
    }
    let different: Vec<_> = tree.compare(&TreePath::root(), &target, &Context::default()).unwrap();
    assert!(!devices || different.is_empty(), "{different:?}");
    let link = std::fs::read_link(target.join("i-link")).unwrap();
    assert_eq!(std::os::unix::ffi::OsStrExt::as_bytes(link.as_os_str()), b"\xff/../nowhere");
    let replaced = ExtractOptions { existing: Existing::Replace, owners: false };
    tree.extract(&TreePath::root(), &target, &replaced, &Context::default()).unwrap();
    let second = TreePath::parse(&format!("{0}/{0}", "d".repeat(250))).unwrap();
    assert_eq!(tree.get(&second).unwrap().unwrap().meta.mtime.nanos, 5);
    // What is not in the tree is removed, also where it is deeper than any path can say.
    let inner = TreePath::parse(&vec!["d".repeat(250); 40].join("/")).unwrap();
    tree.extract(&inner, &target, &replaced, &Context::default()).unwrap();
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
    assert_eq!(std::fs::read(target.join("leaf")).unwrap(), b"deep");
}
