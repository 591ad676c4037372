//! The quirks of objects: odd keys, writers that rename, objects that go between cut and drain.
//! Common duties are proven by the conformance suite at the end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::ObjectStoreExt;
use serde_json::json;
use stillpoint_core::capability::{Capability, PinKind};
use stillpoint_core::driver::{Context, Drained, Driver, EdgeQuery, Pin, RestoreMode, RestoreRequest};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::TreePath;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};
use stillpoint_testkit::{CountingSink, MemoryTree, skip};

use super::bucket::generic::Bucket;
use super::{Objects, PHASES, REGISTRATION, Settings, Where};
use crate::phases::Phased;
use crate::trial::{self, back_up, cut_id, differences, drain, edges, pin, restore, run};

fn open(path: &Path) -> Arc<dyn Driver> {
    let mut scratch = path.as_os_str().to_owned();
    scratch.push("-scratch");
    trial::open(&REGISTRATION, json!({ "path": path }), Path::new(&scratch)).unwrap()
}

/// A driver on a bucket in memory.
fn open_bucket(store: &Arc<object_store::memory::InMemory>, prefix: &str, scratch: &Path) -> Arc<dyn Driver> {
    let settings: Settings = serde_json::from_value(
        json!({ "url": format!("s3://bucket/{prefix}"), "connections": 3, "clockDifference": "0s" }),
    )
    .unwrap();
    let bucket = Bucket::new(store.clone(), object_store::path::Path::from(prefix), 3).unwrap();
    let place = Where::Bucket(bucket);
    let objects = Objects { settings, scratch: scratch.to_owned(), place, state: Mutex::default() };
    Arc::new(Phased::new(objects, &PHASES))
}

fn held(driver: &Arc<dyn Driver>, pin: Option<&Pin>) -> Vec<String> {
    let found = edges(driver, pin, &EdgeQuery::Held("keys".to_owned())).unwrap();
    found.into_iter().map(|edge| String::from_utf8_lossy(&edge.referent).into_owned()).collect()
}

fn put(root: &Path, key: &str, value: &str) {
    let path = root.join(key);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value).unwrap();
}

/// Writes as object stores do: beside, then renamed.
fn put_by_rename(root: &Path, key: &str, value: &str) {
    let path = root.join(key);
    let beside = path.with_file_name(format!(".tmp-{}", fastrand::u64(..)));
    std::fs::write(&beside, value).unwrap();
    std::fs::rename(beside, path).unwrap();
}

fn losses(drained: &Drained) -> Vec<(&str, &str)> {
    drained.losses.iter().map(|loss| (loss.what.as_str(), loss.why.as_str())).collect()
}

fn scratch_root() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("objects");
    std::fs::create_dir(&root).unwrap();
    (folder, root)
}

#[test]
fn what_happens_after_the_cut_is_left_out_or_named() {
    let (_folder, root) = scratch_root();
    for key in ["kept", "overwritten", "renamed-over", "deleted", "moved", "touched", "appended", "dir/gone", "twice"] {
        put(&root, key, "old");
    }
    let driver = open(&root);
    run(driver.prepare(&Context::default())).unwrap();
    put(&root, "early", "before the cut, after prepare");
    put_by_rename(&root, "early-renamed", "too");
    std::fs::remove_file(root.join("twice")).unwrap();
    put(&root, "brief", "never seen by a listing");
    std::fs::remove_file(root.join("brief")).unwrap();
    put(&root, "early-deleted", "x");
    let pinned = run(driver.cut(&Context::default(), &cut_id(1))).unwrap();
    put(&root, "late", "new");
    put_by_rename(&root, "late-renamed", "new");
    put(&root, "overwritten", "newer content");
    put_by_rename(&root, "renamed-over", "newer");
    put_by_rename(&root, "twice", "new again");
    std::fs::remove_file(root.join("deleted")).unwrap();
    std::fs::remove_file(root.join("early-deleted")).unwrap();
    std::fs::rename(root.join("moved"), root.join("moved-to")).unwrap();
    std::fs::rename(root.join("dir"), root.join("dir-elsewhere")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(root.join("touched"), mode).unwrap();
    {
        use std::io::Write;
        std::fs::OpenOptions::new().append(true).open(root.join("appended")).unwrap().write_all(b"more").unwrap();
    }
    let (drain, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!(drain.torn, []);
    let keys: BTreeSet<_> = held(&driver, Some(&pinned)).into_iter().collect();
    let expected = ["appended", "early", "early-renamed", "kept", "overwritten", "renamed-over", "touched"];
    assert_eq!(keys, expected.map(str::to_owned).into());
    let mut named: Vec<_> = losses(&drained).into_iter().map(|(what, _)| what).collect();
    named.sort_unstable();
    assert_eq!(named, ["appended", "deleted", "dir/gone", "early-deleted", "moved", "overwritten", "renamed-over"]);
    assert_eq!(drain.tree.files()["objects/kept"], b"old");
    assert_eq!(drained.items, 7);
    assert!(drained.notes.iter().any(|note| note.contains("came after the cut")), "{:?}", drained.notes);
}

#[test]
fn without_a_watch_the_times_decide() {
    let (_folder, root) = scratch_root();
    for key in ["kept", "overwritten", "deleted"] {
        put(&root, key, "old");
    }
    let settings: Settings = serde_json::from_value(json!({ "path": root })).unwrap();
    let place = Where::Directory(super::client::Directory::new(root.clone(), settings.clone()));
    let objects = Objects { settings, scratch: root.with_file_name("scratch"), place, state: Mutex::default() };
    let driver: Arc<dyn Driver> = Arc::new(Phased::new(objects, &PHASES));
    run(driver.prepare(&Context::default())).unwrap();
    // More changes than are kept by name.
    for _ in 0..11_000 {
        put(&root, "noise", "x");
        std::fs::remove_file(root.join("noise")).unwrap();
    }
    put(&root, "noise", "x");
    let pinned = run(driver.cut(&Context::default(), &cut_id(1))).unwrap();
    put(&root, "late", "new");
    put(&root, "overwritten", "newer");
    std::fs::remove_file(root.join("deleted")).unwrap();
    let (_, drained) = drain(&driver, &pinned, None).unwrap();
    let named: BTreeSet<_> = losses(&drained).into_iter().map(|(what, _)| what).collect();
    assert_eq!(named, ["deleted", "overwritten"].into());
    let keys: BTreeSet<_> = held(&driver, Some(&pinned)).into_iter().collect();
    assert_eq!(keys, ["kept", "noise", "overwritten"].map(str::to_owned).into());
    assert!(drained.notes.iter().any(|note| note.contains("not watched")), "{:?}", drained.notes);
}

#[test]
fn acknowledged_objects_are_in_the_point_and_later_ones_are_not() {
    let (_folder, root) = scratch_root();
    let (begun, acknowledged) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let shared = (root.clone(), begun.clone(), acknowledged.clone(), stop.clone());
    let writer = std::thread::spawn(move || {
        let (root, begun, acknowledged, stop) = shared;
        let mut n = 0;
        while !stop.load(Ordering::SeqCst) {
            n += 1;
            begun.store(n, Ordering::SeqCst);
            put_by_rename(&root, &format!("{n:08}"), &n.to_string());
            acknowledged.store(n, Ordering::SeqCst);
        }
    });
    let driver = open(&root);
    let mut parent: Option<MemoryTree> = None;
    for round in 1..=5 {
        run(driver.prepare(&Context::default())).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let acknowledged = acknowledged.load(Ordering::SeqCst);
        let pinned = run(driver.cut(&Context::default(), &cut_id(round))).unwrap();
        let begun = begun.load(Ordering::SeqCst);
        let (drain, drained) = drain(&driver, &pinned, parent.as_ref()).unwrap();
        assert_eq!((drain.torn.len(), drained.losses.len()), (0, 0), "{drained:?}");
        let numbers: Vec<u64> =
            drain.tree.files().keys().filter_map(|path| path.strip_prefix("objects/")?.parse().ok()).collect();
        let last = *numbers.last().unwrap();
        assert_eq!(numbers.len() as u64, last, "none is missing in between");
        assert!(last >= acknowledged && last <= begun, "{acknowledged} <= {last} <= {begun}");
        parent = Some(drain.tree);
        run(driver.release(&Context::default(), &[])).unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    writer.join().unwrap();
}

#[test]
fn unchanged_objects_are_not_read_again() {
    let (_folder, root) = scratch_root();
    for number in 0..50 {
        put(&root, &format!("a/{number}"), "content");
    }
    let driver = open(&root);
    let (first, drained) = back_up(&driver, None);
    assert_eq!(drained.bytes_read, 350);
    // As long, at once, by another content: only inode and times tell.
    put(&root, "a/7", "CONTENT");
    put(&root, "a/new", "!");
    let (second, drained) = back_up(&driver, Some(&first));
    assert_eq!((drained.bytes_read, drained.items, drained.bytes), (8, 51, 351));
    assert_eq!(second.files()["objects/a/7"], b"CONTENT");
    assert_eq!(second.files()["objects/a/8"], b"content");
    let (_, drained) = back_up(&driver, Some(&second));
    assert_eq!(drained.bytes_read, 0);
}

#[test]
fn odd_names_of_a_directory_come_back() {
    use std::os::unix::ffi::OsStrExt;
    let (folder, root) = scratch_root();
    let odd: Vec<Vec<u8>> = vec![
        b"%41".to_vec(),
        b"100%/of it".to_vec(),
        b"tab\there".to_vec(),
        b"latin\xe9/\xff\xfe".to_vec(),
        b"new\nline".to_vec(),
        "\u{7f}é日".as_bytes().to_vec(),
        b"x".repeat(255),
        b"\x01".repeat(255),
        [&b"d/"[..], &b"\xff".repeat(200), b"/deep"].concat(),
        b"-rf".to_vec(),
        b"a!".to_vec(),
        b"a/b".to_vec(),
        b"a0".to_vec(),
    ];
    for key in &odd {
        let path = root.join(std::ffi::OsStr::from_bytes(key));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, key).unwrap();
    }
    let (tree, drained) = back_up(&open(&root), None);
    assert_eq!(drained.items, odd.len() as u64);
    assert_eq!(drained.losses, []);
    let target = open(&folder.path().join("target"));
    restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
    for key in &odd {
        let path = folder.path().join("target").join(std::ffi::OsStr::from_bytes(key));
        assert_eq!(std::fs::read(path).unwrap(), *key);
    }
    assert_eq!(differences(&target, &tree), Vec::<String>::new());
    std::fs::write(folder.path().join("target/%41"), "%4x").unwrap();
    assert_eq!(differences(&target, &tree), ["`%41` differs from byte 2 on"]);
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains(".tmp")), "{names:?}");
}

#[test]
fn links_and_unfinished_files_are_no_objects_and_are_counted() {
    let (_folder, root) = scratch_root();
    put(&root, "a", "1");
    put(&root, "b.partial", "half");
    std::os::unix::fs::symlink("/etc/passwd", root.join("link")).unwrap();
    let (tree, drained) = back_up(&open(&root), None);
    assert_eq!(drained.items, 1);
    assert_eq!(tree.files().keys().filter(|path| path.starts_with("objects/")).count(), 1);
    assert_eq!(drained.notes.len(), 2, "{:?}", drained.notes);
}

#[test]
fn in_place_exchanges_and_keeps_the_old() {
    let (folder, root) = scratch_root();
    put(&root, "a/1", "one");
    put(&root, "b", "two");
    let driver = open(&root);
    let (tree, _) = back_up(&driver, None);
    put(&root, "b", "changed");
    put(&root, "c", "new");
    assert_eq!(restore(&driver, &tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::AlreadyExists);
    let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    assert_eq!(differences(&driver, &tree), Vec::<String>::new());
    assert_eq!(std::fs::read(Path::new(&restored.kept_old[0]).join("b")).unwrap(), b"changed");
    std::fs::remove_dir_all(&restored.kept_old[0]).unwrap();
    // A part alone leaves the rest alone.
    put(&root, "a/1", "broken");
    put(&root, "b", "stays");
    let restored = restore(&driver, &tree, RestoreMode::InPlace, Some("a")).unwrap();
    assert_eq!((restored.items, std::fs::read(root.join("a/1")).unwrap()), (1, b"one".to_vec()));
    assert_eq!(std::fs::read(root.join("b")).unwrap(), b"stays");
    std::fs::remove_file(root.join("b")).unwrap();
    restore(&driver, &tree, RestoreMode::Fresh, Some("objects/b")).unwrap();
    assert_eq!(std::fs::read(root.join("b")).unwrap(), b"two");
    // What a crash between the two renames leaves may be the original: it is refused, and stays.
    restore_leaves_an_original_alone(&driver, &tree, &root);
    let elsewhere = open(&folder.path().join("x/y/z"));
    restore(&elsewhere, &tree, RestoreMode::Fresh, Some("a")).unwrap();
    assert_eq!(held(&elsewhere, None), ["a/1"]);
    let none = restore(&elsewhere, &tree, RestoreMode::Fresh, Some("nothing")).unwrap_err();
    assert_eq!(none.kind(), Kind::NotFound);
}

fn restore_leaves_an_original_alone(driver: &Arc<dyn Driver>, tree: &MemoryTree, root: &Path) {
    use sha2::{Digest, Sha256};
    let mark = hex::encode(&Sha256::digest(root.as_os_str().as_encoded_bytes())[..6]);
    let left = root.with_file_name(format!(".tmp-stillpoint-restore-r1-{mark}"));
    put(&left, "b", "the original");
    let refused = restore(driver, tree, RestoreMode::InPlace, None).unwrap_err();
    assert_eq!(refused.kind(), Kind::AlreadyExists);
    assert!(refused.hint_text().unwrap_or_default().contains("old content"), "{refused:?}");
    assert_eq!(std::fs::read(left.join("b")).unwrap(), b"the original");
    std::fs::remove_dir_all(left).unwrap();
}

#[test]
fn what_earlier_tries_left_beside_a_directory_is_removed_or_left_alone() {
    use sha2::{Digest, Sha256};
    let (_folder, root) = scratch_root();
    put(&root, "a", "1");
    let driver = open(&root);
    let (tree, _) = back_up(&driver, None);
    let mark = hex::encode(&Sha256::digest(root.as_os_str().as_encoded_bytes())[..6]);
    let beside = |what: &str| root.with_file_name(format!(".tmp-stillpoint-{what}-{mark}"));
    let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: "r1-try3".to_owned() };
    let restore = || run(driver.restore(&Context::default(), &tree, &request));
    let (swapping, loading) = (beside("restore-r1"), beside("loading-r1-try2"));
    put(&swapping, "a", "the original");
    put(&loading, "a", "half");
    let refused = restore().unwrap_err();
    assert_eq!(refused.kind(), Kind::AlreadyExists);
    assert!(refused.hint_text().unwrap_or_default().contains("old content"), "{refused:?}");
    assert_eq!(std::fs::read(swapping.join("a")).unwrap(), b"the original");
    std::fs::remove_dir_all(&swapping).unwrap();
    assert_eq!((restore().unwrap().items, loading.exists()), (1, false));
}

#[test]
fn later_tries_go_on_in_a_bucket_without_versions() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(object_store::memory::InMemory::new());
    run(async {
        for number in 0..30 {
            let key = object_store::path::Path::from(format!("p/{number}"));
            store.put(&key, vec![number; 1000].into()).await.unwrap();
        }
    });
    let (tree, _) = back_up(&open_bucket(&store, "p", &folder.path().join("s")), None);
    let copy = open_bucket(&store, "copy", &folder.path().join("s"));
    let try_again = |tree: &dyn stillpoint_core::tree::Tree, restore: &str| {
        let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: restore.to_owned() };
        run(copy.restore(&Context::default(), tree, &request))
    };
    let failing = stillpoint_testkit::fault::FailingTree::new(&tree, 12);
    restore(&copy, &failing, RestoreMode::Fresh, None).unwrap_err();
    let begun = held(&copy, None).len();
    assert!(begun > 0 && begun < 30, "{begun}");
    // Another restore is told which one was begun.
    assert_eq!(try_again(&tree, "r2").unwrap_err().kind(), Kind::Unsupported);
    assert_eq!(try_again(&tree, "r1-try2").unwrap().items, 30);
    assert_eq!(differences(&copy, &tree), Vec::<String>::new());
    assert_eq!(try_again(&tree, "r1-try3").unwrap_err().kind(), Kind::Unsupported);
    // What another wrote there is not taken for an earlier try.
    let other = open_bucket(&store, "other", &folder.path().join("s"));
    restore(&other, &stillpoint_testkit::fault::FailingTree::new(&tree, 12), RestoreMode::Fresh, None).unwrap_err();
    run(async {
        for number in 0..30 {
            let key = object_store::path::Path::from(format!("other/{number}"));
            store.put(&key, vec![99; 1000].into()).await.unwrap();
        }
    });
    assert_eq!(restore(&other, &tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::AlreadyExists);
}

#[test]
fn an_empty_mount_point_is_filled_and_a_full_one_not_replaced() {
    let (folder, root) = scratch_root();
    put(&root, "a/1", "one");
    put(&root, "b", "two");
    let (tree, _) = back_up(&open(&root), None);
    let target = folder.path().join("mount");
    std::fs::create_dir(&target).unwrap();
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&target).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return skip("an_empty_mount_point_is_filled_and_a_full_one_not_replaced", "needs root to mount");
    }
    let driver = open(&target);
    let filled = restore(&driver, &tree, RestoreMode::Fresh, None);
    let (differences, again) = (differences(&driver, &tree), restore(&driver, &tree, RestoreMode::InPlace, None));
    drop(driver);
    std::process::Command::new("umount").arg(&target).status().unwrap();
    assert_eq!(filled.unwrap().items, 2);
    assert_eq!(differences, Vec::<String>::new());
    assert!(again.unwrap_err().hint_text().unwrap_or_default().contains("mount point"));
}

#[test]
fn differences_are_named_by_key() {
    let (_folder, root) = scratch_root();
    for key in ["a", "b/c", "d"] {
        put(&root, key, "value");
    }
    let driver = open(&root);
    let (tree, _) = back_up(&driver, None);
    put(&root, "a", "valve");
    std::fs::remove_file(root.join("d")).unwrap();
    put(&root, "b/extra", "x");
    assert_eq!(
        differences(&driver, &tree),
        ["`a` differs from byte 3 on", "`b/extra` is not in the point", "`d` is missing"]
    );
}

#[test]
fn the_stamp_is_no_object() {
    let (folder, root) = scratch_root();
    put(&root, "a", "1");
    let driver = open(&root);
    let context = Context::default();
    let stamp = Stamp {
        platform: "churn".to_owned(),
        environment: "staging".to_owned(),
        point: "0123456789".to_owned(),
        restore: "r1".to_owned(),
        at: jiff::Timestamp::UNIX_EPOCH,
    };
    let (tree, _) = back_up(&driver, None);
    let before = run(driver.observe(&context)).unwrap();
    run(driver.stamp(&context, &stamp)).unwrap();
    assert_eq!(run(driver.observe(&context)).unwrap(), before);
    assert_eq!(run(driver.read_stamp(&context)).unwrap(), Some(stamp.clone()));
    assert_eq!(differences(&driver, &tree), Vec::<String>::new());
    assert_eq!(back_up(&driver, None).1.items, 1);
    assert_eq!(held(&driver, None), ["a"]);
    let absent = open(&folder.path().join("absent"));
    assert_eq!(run(absent.read_stamp(&context)).unwrap(), None);
    // A directory with nothing but a stamp is empty.
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = open(&empty);
    run(empty.stamp(&context, &stamp)).unwrap();
    assert_eq!(run(empty.occupied(&context)).unwrap(), None);
    assert_eq!(restore(&empty, &tree, RestoreMode::Fresh, None).unwrap().kept_old, Vec::<String>::new());
    assert!(run(empty.occupied(&context)).unwrap().is_some());
}

#[test]
fn hostile_points_write_nothing_outside() {
    let folder = tempfile::tempdir().unwrap();
    let summary = |escaped: u64| {
        json!({ "schema": "stillpoint.dev/objects/v1", "kind": "bucket", "objects": 1, "bytes": 1,
                "escaped": escaped, "bucket_only": 0, "cut_nanos": 0 })
        .to_string()
    };
    for path in [&[&b"objects"[..], b"%2E%2E", b"%2E%2E", b"evil"][..], &[b"objects", b"%_", b"evil"]] {
        let tree = MemoryTree::new().with_file(&[b"bucket.json"], summary(1)).with_file(path, "x");
        let driver = open(&folder.path().join("in/target"));
        let error = restore(&driver, &tree, RestoreMode::Fresh, None).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    }
    assert!(!folder.path().join("evil").exists() && !folder.path().join("in/evil").exists());
    assert_eq!(std::fs::read_dir(folder.path().join("in")).unwrap().count(), 0);
}

#[test]
fn a_bucket_comes_back_with_its_attributes_and_its_folder_keys() {
    use object_store::{Attribute, AttributeValue, Attributes, ObjectStore, PutOptions};
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(object_store::memory::InMemory::new());
    let path = |key: &str| object_store::path::Path::from(key);
    run(async {
        for key in ["p/a", "p/a/b", "p/a!", "p/a/%=", "p/z/y/x", "p/z/y", "elsewhere", "pp"] {
            store.put(&object_store::path::Path::parse(key).unwrap(), key.to_owned().into()).await.unwrap();
        }
        let attributes = Attributes::from_iter([
            (Attribute::ContentType, AttributeValue::from("text/plain")),
            (Attribute::Metadata("team".into()), AttributeValue::from("ml")),
        ]);
        let options = PutOptions { attributes, ..PutOptions::default() };
        store.put_opts(&path("p/with"), vec![7; 3 << 20].into(), options).await.unwrap();
    });
    let driver = open_bucket(&store, "p", &folder.path().join("s"));
    let (tree, drained) = back_up(&driver, None);
    assert_eq!(drained.items, 7);
    let files = tree.files();
    let paths: Vec<_> = files.keys().filter_map(|path| path.strip_prefix("objects/")).collect();
    assert_eq!(paths, ["a!", "a/%25=", "a/%=", "a/b", "with", "z/y/%=", "z/y/x"]);
    assert!(String::from_utf8_lossy(&files["bucket.json"]).contains("\"bucket_only\": 2"));
    let (_, again) = back_up(&driver, Some(&tree));
    assert_eq!(again.bytes_read, 0);
    let copy = open_bucket(&store, "copy", &folder.path().join("s"));
    assert_eq!(restore(&copy, &tree, RestoreMode::Fresh, None).unwrap().items, 7);
    assert_eq!(differences(&copy, &tree), Vec::<String>::new());
    let attributes = run(store.get(&path("copy/with"))).unwrap().attributes;
    assert_eq!(attributes.get(&Attribute::ContentType).map(AsRef::as_ref), Some("text/plain"));
    assert_eq!(attributes.get(&Attribute::Metadata("team".into())).map(AsRef::as_ref), Some("ml"));
    assert_eq!(restore(&copy, &tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::AlreadyExists);
    assert_eq!(restore(&copy, &tree, RestoreMode::InPlace, None).unwrap_err().kind(), Kind::Unsupported);
    let directory = open(&folder.path().join("directory"));
    assert_eq!(restore(&directory, &tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn a_bucket_without_versions_names_what_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(object_store::memory::InMemory::new());
    let path = |key: &str| object_store::path::Path::from(key);
    let write = |key: &str, value: &'static str| run(store.put(&path(key), value.into())).unwrap();
    write("p/kept", "1");
    write("p/overwritten", "1");
    write("p/new-to-the-parent", "1");
    write("p/deleted", "1");
    let driver = open_bucket(&store, "p", folder.path());
    let (parent, _) = back_up(&driver, None);
    let pinned = pin(&driver, 2);
    std::thread::sleep(Duration::from_millis(5));
    write("p/overwritten", "2");
    write("p/late", "2");
    run(store.delete(&path("p/deleted"))).unwrap();
    let (first, drained) = drain(&driver, &pinned, Some(&parent)).unwrap();
    assert_eq!(losses(&drained).iter().map(|(what, _)| *what).collect::<Vec<_>>(), ["deleted", "overwritten"]);
    assert_eq!(first.tree.files().keys().filter(|path| path.starts_with("objects/")).count(), 3);
    // Without a parent, the listing before the cut tells them apart as well.
    let pinned = pin(&driver, 3);
    std::thread::sleep(Duration::from_millis(5));
    write("p/new-to-the-parent", "3");
    run(store.delete(&path("p/overwritten"))).unwrap();
    let (_, drained) = drain(&driver, &pinned, None).unwrap();
    let named: Vec<_> = losses(&drained).into_iter().map(|(what, _)| what).collect();
    assert_eq!(named, ["new-to-the-parent", "overwritten"]);
}

/// `STILLPOINT_TEST_KEYS=1000000` makes it the million that a flat bucket may hold.
#[test]
fn many_keys_take_bounded_memory() {
    let count: u64 = std::env::var("STILLPOINT_TEST_KEYS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let (_folder, root) = scratch_root();
    for number in 0..count {
        std::fs::write(root.join(format!("{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15))), b"").unwrap();
    }
    let driver = open(&root);
    let before = resident_bytes();
    let pinned = pin(&driver, 1);
    let mut sink = CountingSink::new();
    let drained = run(driver.drain(&Context::default(), &pinned, &mut sink, None)).unwrap();
    assert_eq!((drained.items, sink.torn), (count, 0));
    let mut keys = 0;
    run(driver.edges(&Context::default(), Some(&pinned), &EdgeQuery::Held("keys".to_owned()), &mut |_| {
        keys += 1;
        Ok(())
    }))
    .unwrap();
    assert_eq!(keys, count);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 96 << 20, "{} MiB more for {count} keys", grown >> 20);
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn create_bucket(endpoint: &str, bucket: &str, key: &str, secret: &str) {
    use object_store::signer::Signer;
    drop(rustls::crypto::ring::default_provider().install_default());
    let builder = object_store::aws::AmazonS3Builder::new().with_bucket_name(bucket).with_endpoint(endpoint);
    let client = builder.with_allow_http(true).with_access_key_id(key).with_secret_access_key(secret).build().unwrap();
    run(async {
        let whole = object_store::path::Path::default();
        let url = client.signed_url(reqwest::Method::PUT, &whole, Duration::from_secs(60)).await.unwrap();
        let answer = reqwest::Client::new().put(url).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
    });
}

#[test]
fn a_real_bucket_comes_back() {
    let name = "a_real_bucket_comes_back";
    let variable = |part: &str| std::env::var(format!("STILLPOINT_RIG_S3_{part}")).ok();
    let (Some(endpoint), Some(key), Some(secret)) =
        (variable("ENDPOINT"), variable("ACCESS_KEY_ID"), variable("SECRET_ACCESS_KEY"))
    else {
        return skip(name, "rig s3 does not run");
    };
    let bucket = format!("objects-{:016x}", fastrand::u64(..));
    create_bucket(&endpoint, &bucket, &key, &secret);
    let folder = tempfile::tempdir().unwrap();
    let settings = |prefix: &str| {
        json!({
            "url": format!("s3://{bucket}/some/{prefix}"),
            "options": { "endpoint": endpoint, "region": "us-east-1", "allow_http": "true" },
            "credentials": { "access_key_id": key, "secret_access_key": secret },
        })
    };
    let open = |prefix: &str| trial::open(&REGISTRATION, settings(prefix), &folder.path().join("s")).unwrap();
    let (source, copy) = (open("source"), open("copy"));
    let mut tree = MemoryTree::new().with_file(
        &[b"bucket.json"],
        json!({ "schema": "stillpoint.dev/objects/v1", "kind": "bucket", "objects": 0, "bytes": 0,
                "escaped": 0, "bucket_only": 0, "cut_nanos": 0 })
        .to_string(),
    );
    for number in 0..40u8 {
        let name = format!("{number}");
        let size = if number == 7 { 20 << 20 } else { usize::from(number) * 1000 };
        tree = tree.with_file(&[b"objects", b"a", name.as_bytes()], vec![number; size]);
    }
    restore(&source, &tree, RestoreMode::Fresh, None).unwrap();
    // Times of S3 have a resolution of a second.
    std::thread::sleep(Duration::from_millis(1100));
    let (point, drained) = back_up(&source, None);
    assert_eq!((drained.items, drained.losses.len()), (40, 0));
    restore(&copy, &point, RestoreMode::Fresh, None).unwrap();
    assert_eq!(differences(&copy, &tree), Vec::<String>::new());
    assert_eq!(back_up(&source, Some(&point)).1.bytes_read, 0);
}

#[test]
fn the_readme_states_the_capability() {
    let (folder, root) = scratch_root();
    let store = Arc::new(object_store::memory::InMemory::new());
    let bucket = open_bucket(&store, "p", folder.path());
    let directory = run(open(&root).probe(&Context::default())).unwrap().capability;
    let bucket = run(bucket.probe(&Context::default())).unwrap().capability;
    let shown = |of: fn(&Capability) -> bool| {
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        match (yes(of(&directory)), yes(of(&bucket))) {
            (one, other) if one == other => one.to_owned(),
            (one, other) => format!("directory: {one}. Bucket: {other}"),
        }
    };
    assert_eq!((directory.pin, bucket.pin), (PinKind::Watched, PinKind::Watched));
    for (row, value) in [
        ("pin", "S3 with versions: set. Others: watched".to_owned()),
        ("incremental", shown(|capability| capability.incremental)),
        ("edges", shown(|capability| capability.edges)),
        ("swaps in place", shown(|capability| capability.swaps_in_place)),
        ("partial restore", shown(|capability| capability.partial_restore)),
    ] {
        assert!(REGISTRATION.readme.contains(&format!("| {row} | {value} |")), "{row}: {value}");
    }
    assert!(directory.observes_writes && !bucket.observes_writes);
}

/// Makes directories of objects.
struct ObjectsHarness {
    folder: tempfile::TempDir,
    count: Mutex<u32>,
}

struct ObjectsSubject {
    root: PathBuf,
}

impl ObjectsHarness {
    fn place(&self) -> PathBuf {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        self.folder.path().join(count.to_string()).join("objects")
    }
}

impl Harness for ObjectsHarness {
    fn source(&self) -> Result<Box<dyn Subject>> {
        let root = self.place();
        std::fs::create_dir_all(&root).map_err(|error| Error::io("the harness failed", error))?;
        Ok(Box::new(ObjectsSubject { root }))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(ObjectsSubject { root: self.place() }))
    }

    fn part_of(&self, _: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        TreePath::parse(&format!("objects/{key}")).map(Some)
    }
}

impl Subject for ObjectsSubject {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        Ok(open(&self.root))
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        let path = self.root.join(key);
        let write = || {
            std::fs::create_dir_all(path.parent().expect("below the root"))?;
            let beside = path.with_file_name(".tmp-harness");
            std::fs::write(&beside, value)?;
            std::fs::rename(beside, &path)
        };
        write().map_err(|error| Error::io("the harness failed", error))
    }

    fn delete(&self, key: &str) -> Result<()> {
        std::fs::remove_file(self.root.join(key)).map_err(|error| Error::io("the harness failed", error))
    }

    fn read(&self) -> Result<Content> {
        let mut found = Content::new();
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for path in entries.map(|entry| entry.unwrap().path()) {
                let key = path.strip_prefix(&self.root).expect("below the root").to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if key != ".stillpoint-stamp.json" {
                    found.insert(key, std::fs::read(&path).map_err(|error| Error::io("the harness failed", error))?);
                }
            }
        }
        Ok(found)
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::Held("keys".to_owned()), keys)))
    }
}

#[test]
fn conformance() {
    let harness = ObjectsHarness { folder: tempfile::tempdir().unwrap(), count: Mutex::new(0) };
    conformance::run(&harness).assert_clean("objects");
}
