//! The conformance suite on directory trees, and the quirks that only they have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};
use stillpoint_core::Result;
use stillpoint_core::capability::PinKind;
use stillpoint_core::driver::{Context, Drained, Driver, EdgeQuery, RestoreMode, Validity};
use stillpoint_core::error::{IoContext, Kind};
use stillpoint_core::tree::{Tree, TreePath};
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};
use stillpoint_testkit::{CountingSink, Drain, MemoryTree, skip};

use super::{Files, PHASES, REGISTRATION};
use crate::phases::Phased;
use crate::trial::{self, cut_id, drain, pin, restore, run};

/// Makes stores below one folder, with one way of holding the view.
struct Folders {
    home: PathBuf,
    snapshot: &'static str,
    several: bool,
}

struct Folder {
    path: PathBuf,
    scratch: tempfile::TempDir,
    settings: Value,
    several: bool,
}

impl Folders {
    fn folder(&self) -> Folder {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let path = self.home.join(format!("store-{}", MADE.fetch_add(1, Ordering::Relaxed)));
        let several = ["deep", "large", "small"].map(|name| (name, path.join(name)));
        let settings = match self.several {
            true => json!({ "snapshot": self.snapshot, "paths": BTreeMap::from(several) }),
            false => json!({ "snapshot": self.snapshot, "path": path }),
        };
        Folder { path, scratch: tempfile::tempdir().expect("scratch"), settings, several: self.several }
    }
}

impl Harness for Folders {
    fn source(&self) -> Result<Box<dyn Subject>> {
        let folder = self.folder();
        fs::create_dir_all(&folder.path).or_io(|| "mkdir".to_owned())?;
        Ok(Box::new(folder))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(self.folder()))
    }

    fn part_of(&self, _: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        Ok(Some(TreePath::parse(key)?))
    }
}

impl Folder {
    fn files(&self) -> Arc<dyn Driver> {
        trial::open(&REGISTRATION, self.settings.clone(), self.scratch.path()).expect("settings")
    }
}

impl Subject for Folder {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        Ok(self.files())
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        let path = self.path.join(key);
        fs::create_dir_all(path.parent().expect("a parent")).or_io(|| "mkdir".to_owned())?;
        // Renamed into place: a file cut off and not yet written again would be half a write.
        let beside = self.path.with_extension("being-written");
        fs::write(&beside, value).or_io(|| "write".to_owned())?;
        fs::rename(beside, path).or_io(|| "rename".to_owned())
    }

    fn delete(&self, key: &str) -> Result<()> {
        fs::remove_file(self.path.join(key)).or_io(|| "remove".to_owned())
    }

    fn read(&self) -> Result<Content> {
        let mut content = Content::new();
        read_below(&self.path, "", &mut content);
        Ok(content)
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::Held("paths".to_owned()), keys)))
    }
}

fn read_below(folder: &Path, prefix: &str, content: &mut Content) {
    for entry in fs::read_dir(folder).into_iter().flatten().map(|entry| entry.expect("an entry")) {
        let name = entry.file_name().into_string().expect("utf-8");
        if name.starts_with(".stillpoint-") {
            continue;
        }
        match entry.path().is_dir() {
            true => read_below(&entry.path(), &format!("{prefix}{name}/"), content),
            false => drop(content.insert(format!("{prefix}{name}"), fs::read(entry.path()).expect("read"))),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).ok();
    }
}

fn suite(home: &Path, snapshot: &'static str) {
    let folders = Folders { home: home.to_owned(), snapshot, several: false };
    conformance::run(&folders).assert_clean(&format!("files ({snapshot})"));
}

#[test]
fn the_contract_holds_without_snapshots() {
    let home = tempfile::tempdir().expect("a folder");
    suite(home.path(), "none");
}

/// A file system of its own in a file, unmounted at the end.
struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    /// `None` after a printed skip, where that cannot be had.
    fn make(test: &str, kind: &str, options: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        fs::File::create(&image).expect("an image").set_len(400 << 20).expect("a sparse image");
        fs::create_dir(&mount).expect("a mount point");
        let run = |program: &str, arguments: &[&str]| -> std::result::Result<(), String> {
            let output =
                Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            output.status.success().then_some(()).ok_or(format!("{program}: {said}"))
        };
        let (image, mount) = (image.to_str().expect("utf-8"), mount.to_str().expect("utf-8"));
        let made = run(&format!("mkfs.{kind}"), &[options, &[image]].concat())
            .and_then(|()| run("mount", &["-o", "loop", "-t", kind, image, mount]));
        match made {
            Ok(()) => Some(Self { folder }),
            Err(why) => {
                skip(test, &format!("no {kind} in a file: {why}"));
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the suite plays crashes, and what a crash leaves open ends with this process.
        Command::new("umount").arg("-l").arg(self.path()).status().ok();
    }
}

fn ours_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).expect("list").map(|entry| entry.expect("an entry").file_name());
    names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name.starts_with(".stillpoint-")).collect()
}

#[test]
fn the_contract_holds_on_btrfs_snapshots() {
    let Some(mounted) = Mounted::make("the_contract_holds_on_btrfs_snapshots", "btrfs", &["-q"]) else { return };
    suite(&mounted.path(), "btrfs");
    assert_eq!(ours_in(&mounted.path()), Vec::<String>::new(), "released snapshots are gone");
}

#[test]
fn the_contract_holds_on_xfs_clones() {
    let options = ["-q", "-m", "reflink=1"];
    let Some(mounted) = Mounted::make("the_contract_holds_on_xfs_clones", "xfs", &options) else { return };
    suite(&mounted.path(), "reflink");
    assert_eq!(ours_in(&mounted.path()), Vec::<String>::new(), "released clones are gone");
}

#[test]
fn lvm_snapshots_are_taken_where_there_are_volumes() {
    if !Path::new("/sbin/lvs").exists() && !Path::new("/usr/sbin/lvs").exists() {
        skip("lvm_snapshots_are_taken_where_there_are_volumes", "lvm2 is not installed");
        return;
    }
    skip("lvm_snapshots_are_taken_where_there_are_volumes", "no test volume group is set up on this machine");
}

// ---- helpers for the quirks ----

fn store() -> (tempfile::TempDir, Folder) {
    let home = tempfile::tempdir().expect("a folder");
    let folders = Folders { home: home.path().to_owned(), snapshot: "none", several: false };
    let folder = folders.folder();
    fs::create_dir_all(&folder.path).expect("mkdir");
    (home, folder)
}

/// What is lost, by its path in the tree.
fn named(drained: &Drained, drain: &Drain) -> BTreeSet<String> {
    drained.losses.iter().map(|loss| loss.what.clone()).chain(drain.torn.iter().map(|loss| loss.what.clone())).collect()
}

#[test]
fn everything_that_changes_after_the_cut_is_named_or_left_out() {
    for watched in [true, false] {
        let (_home, mut folder) = store();
        if !watched {
            folder.settings["watchDirectoriesMax"] = 0.into();
        }
        for key in ["kept", "changed", "deleted", "renamed", "replaced", "gone/a", "gone/b", "moved/a", "mode"] {
            folder.put(key, b"before").expect("put");
        }
        let files = folder.files();
        run(files.prepare(&Context::default())).expect("prepare");
        // Between the list and the cut: all of this is in, and none of it is a loss.
        folder.put("early", b"early").expect("put");
        folder.put("early-folder/a", b"early").expect("put");
        folder.delete("deleted").expect("delete");
        folder.put("deleted-again", b"x").expect("put");
        folder.delete("deleted-again").expect("delete");
        let pin = run(files.cut(&Context::default(), &cut_id(1))).expect("cut");
        let at = |name: &str| folder.path.join(name);
        fs::write(at("changed"), "after!").expect("write");
        fs::rename(at("renamed"), at("renamed-to")).expect("rename");
        fs::write(at("temporary"), "after").expect("write");
        fs::rename(at("temporary"), at("replaced")).expect("rename");
        fs::remove_dir_all(at("gone")).expect("remove");
        fs::rename(at("moved"), at("moved-to")).expect("rename");
        fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o600)).expect("chmod");
        folder.put("late", b"late").expect("put");
        folder.put("late-folder/a", b"late").expect("put");
        if watched {
            fs::rename(at("early"), at("early-moved")).expect("rename");
        }
        let (drain, drained) = drain(&files, &pin, None).expect("drain");
        let named = named(&drained, &drain);
        let mut expected = BTreeSet::from(
            ["changed", "renamed", "replaced", "gone", "moved", "mode"].map(|name| format!("data/{name}")),
        );
        if watched {
            expected.insert("data/early".to_owned());
        }
        // Without a watch it is not known whether a name went before or after the cut, nor where
        // something that was renamed came from: then it is named, rather once too often.
        let unsure = |name: &&String| !watched && (name.ends_with("-to") || name.ends_with("deleted"));
        let surplus: Vec<_> = named.difference(&expected).filter(|name| !unsure(name)).collect();
        assert!(surplus.is_empty() && named.is_superset(&expected), "watched {watched}: {named:?}");
        let held: Vec<_> = drain.tree.files().into_keys().collect();
        assert!(!held.iter().any(|path| path.contains("late") || (watched && path.contains("-to"))), "{held:?}");
        assert!(held.contains(&"data/early-folder/a".to_owned()), "{held:?}");
        assert_eq!(drain.tree.files()["data/kept"], b"before");
    }
}

#[test]
fn a_file_torn_under_a_writer_is_always_named() {
    let (_home, folder) = store();
    let size = 4 << 20;
    folder.put("log", &vec![0; size]).expect("put");
    folder.put("quiet", &vec![0; size]).expect("put");
    let files = folder.files();
    let stop = AtomicBool::new(false);
    let pin = pin(&files, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::os::unix::fs::FileExt;
            let file = fs::OpenOptions::new().write(true).open(folder.path.join("log")).expect("open");
            for turn in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                file.write_all_at(&[turn as u8; 4096], (turn * 4096) % size as u64).expect("write");
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(5));
        let (drain, drained) = drain(&files, &pin, None).expect("drain");
        stop.store(true, Ordering::Relaxed);
        assert_eq!(named(&drained, &drain), BTreeSet::from(["data/log".to_owned()]));
        // What was read torn is never reused, even if nothing changes any more.
        let path = TreePath::parse("data/log").expect("valid");
        let node = drain.tree.get(&path).expect("get").expect("there");
        assert_eq!(node.meta.ctime, stillpoint_core::tree::FileTime::default());
    });
}

#[test]
fn a_clock_that_was_set_loses_the_pin() {
    let (_home, folder) = store();
    folder.put("a", b"1").expect("put");
    let files = trial::request(folder.settings.clone(), folder.scratch.path(), Files::open).expect("settings");
    let files = Arc::new(Phased::new(files, &PHASES));
    let driver: Arc<dyn Driver> = files.clone();
    let pin = pin(&driver, 1);
    let valid = || run(driver.still_valid(&Context::default(), &pin)).expect("an answer");
    assert_eq!(valid(), Validity::Valid);
    files.store.lock().prepared.as_ref().expect("prepared").clock.pretend_set();
    assert!(matches!(valid(), Validity::Lost(why) if why.contains("clock")));
}

#[test]
fn a_directory_that_was_swapped_loses_the_pin() {
    let (_home, folder) = store();
    folder.put("a", b"1").expect("put");
    let files = folder.files();
    let pin = pin(&files, 1);
    fs::rename(&folder.path, folder.path.with_extension("old")).expect("rename");
    fs::create_dir(&folder.path).expect("mkdir");
    let validity = run(files.still_valid(&Context::default(), &pin)).expect("an answer");
    assert!(matches!(validity, Validity::Lost(_)));
}

/// Modes, times, attributes, links, pipes, holes and odd names come back as they were.
#[test]
fn everything_a_directory_can_hold_comes_back() {
    use std::os::unix::ffi::OsStrExt;
    let (home, folder) = store();
    let at = |name: &str| folder.path.join(name);
    folder.put("plain", b"plain").expect("put");
    fs::set_permissions(at("plain"), fs::Permissions::from_mode(0o4751)).expect("chmod");
    fs::hard_link(at("plain"), at("second-name")).expect("link");
    std::os::unix::fs::symlink("../../nowhere", at("dangling")).expect("symlink");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o640),
        0,
    )
    .expect("mkfifo");
    let sparse = fs::File::create(at("sparse")).expect("create");
    sparse.set_len(64 << 20).expect("a hole");
    fs::write(folder.path.join(std::ffi::OsStr::from_bytes(b"\xff\xfe odd\n")), "odd").expect("write");
    fs::create_dir(at("empty")).expect("mkdir");
    fs::set_permissions(at("empty"), fs::Permissions::from_mode(0o1700)).expect("chmod");
    let has_xattrs = xattr::set(at("plain"), "user.note", b"kept").is_ok();
    let files = folder.files();
    let pin = pin(&files, 1);
    let (drain, drained) = drain(&files, &pin, None).expect("drain");
    assert_eq!(named(&drained, &drain), BTreeSet::new());

    let target = Folders { home: home.path().to_owned(), snapshot: "none", several: false }.folder();
    restore(&target.files(), &drain.tree, RestoreMode::Fresh, None).expect("restore");
    let back = |name: &str| target.path.join(name);
    let plain = fs::metadata(back("plain")).expect("plain");
    assert_eq!(plain.mode() & 0o7777, 0o4751);
    assert_eq!(plain.ino(), fs::metadata(back("second-name")).expect("link").ino());
    assert_eq!(plain.mtime_nsec(), fs::metadata(at("plain")).expect("plain").mtime_nsec());
    assert_eq!(fs::read_link(back("dangling")).expect("link"), Path::new("../../nowhere"));
    assert_eq!(fs::metadata(back("sparse")).expect("sparse").len(), 64 << 20);
    assert_eq!(fs::metadata(back("empty")).expect("empty").mode() & 0o7777, 0o1700);
    assert!(
        fs::read_dir(&target.path).expect("list").any(|e| e.expect("e").file_name().as_bytes() == b"\xff\xfe odd\n")
    );
    if has_xattrs {
        assert_eq!(xattr::get(back("plain"), "user.note").expect("get").as_deref(), Some(&b"kept"[..]));
    }
}

#[test]
fn several_directories_make_one_store() {
    let home = tempfile::tempdir().expect("a folder");
    let folders = Folders { home: home.path().to_owned(), snapshot: "none", several: true };
    let folder = folders.folder();
    for (key, value) in [("deep/a", "1"), ("large/b", "2"), ("small/c/d", "3")] {
        folder.put(key, value.as_bytes()).expect("put");
    }
    assert!(folder.several);
    let files = folder.files();
    let (drain, _) = drain(&files, &pin(&files, 1), None).expect("drain");
    assert_eq!(drain.tree.files()["roots/small/c/d"], b"3");
    let target = folders.folder();
    restore(&target.files(), &drain.tree, RestoreMode::Fresh, None).expect("restore");
    assert_eq!(target.read().expect("read"), folder.read().expect("read"));
    let single = Folders { home: home.path().to_owned(), snapshot: "none", several: false }.folder();
    let refused = restore(&single.files(), &drain.tree, RestoreMode::Fresh, None).expect_err("another shape");
    assert_eq!(refused.kind(), Kind::NotFound);
}

#[test]
fn excluded_files_and_our_own_names_are_left_out() {
    let (_home, mut folder) = store();
    folder.settings["exclude"] = json!(["*.tmp", "cache/**"]);
    for key in ["a", "b.tmp", "deep/c.tmp", "cache/x/y", ".stillpoint-stamp.json", "deep/.stillpoint-mine"] {
        folder.put(key, b"1").expect("put");
    }
    let files = folder.files();
    let (drain, _) = drain(&files, &pin(&files, 1), None).expect("drain");
    let paths: Vec<_> = drain.tree.files().into_keys().collect();
    assert_eq!(paths, ["HOW-TO-RESTORE.txt", "data/a", "data/deep/.stillpoint-mine"]);
}

#[test]
fn a_restore_in_place_into_a_mount_point_swaps_the_entries() {
    let test = "a_restore_in_place_into_a_mount_point_swaps_the_entries";
    let (_home, folder) = store();
    folder.put("a", b"new").expect("put");
    let files = folder.files();
    let (drain, _) = drain(&files, &pin(&files, 1), None).expect("drain");
    let mount = tempfile::tempdir().expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(mount.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skip(test, "no tmpfs can be mounted here");
    }
    fs::write(mount.path().join("old"), "old").expect("write");
    let target = trial::open(&REGISTRATION, json!({ "path": mount.path() }), folder.scratch.path()).expect("settings");
    let restored = restore(&target, &drain.tree, RestoreMode::InPlace, None);
    let kept = fs::read(mount.path().join(".stillpoint-before-r1/old"));
    let mut content = Content::new();
    read_below(mount.path(), "", &mut content);
    let left: Vec<_> = fs::read_dir(mount.path()).expect("list").map(|e| e.expect("e").file_name()).collect();
    Command::new("umount").arg(mount.path()).status().expect("umount");
    assert_eq!(restored.expect("restore").kept_old.len(), 1);
    assert_eq!(kept.expect("the old"), b"old");
    assert_eq!(content, Content::from([("a".to_owned(), b"new".to_vec())]));
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn remains_that_no_cut_leaves_are_refused() {
    let (home, folder) = store();
    let victim = home.path().join("victim");
    fs::create_dir(&victim).expect("mkdir");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let far = elsewhere.path().join(".stillpoint-clone-x");
    fs::create_dir(&far).expect("mkdir");
    for remain in [format!("clone:{}", victim.display()), format!("clone:{}", far.display()), "lvm:vg/root".to_owned()]
    {
        let outcome = run(folder.files().release(&Context::default(), std::slice::from_ref(&remain)));
        assert_eq!(outcome.expect_err(&remain).kind(), Kind::Corrupt);
    }
    assert!(victim.exists() && far.exists());
}

#[test]
fn a_btrfs_snapshot_names_the_subvolumes_it_lacks() {
    let test = "a_btrfs_snapshot_names_the_subvolumes_it_lacks";
    let Some(mounted) = Mounted::make(test, "btrfs", &["-q"]) else { return };
    let store = mounted.path().join("store");
    fs::create_dir(&store).expect("mkdir");
    fs::write(store.join("a"), "1").expect("write");
    let made = Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(store.join("inner")).status();
    assert!(made.is_ok_and(|status| status.success()));
    fs::write(store.join("inner/b"), "1").expect("write");
    let scratch = tempfile::tempdir().expect("scratch");
    let files = trial::open(&REGISTRATION, json!({ "path": store }), scratch.path()).expect("settings");
    let probe = run(files.probe(&Context::default())).expect("probe");
    assert_eq!((probe.capability.pin, probe.version.as_str()), (PinKind::Snapshot, "btrfs"));
    let pin = pin(&files, 1);
    let (drain, drained) = drain(&files, &pin, None).expect("drain");
    run(files.release(&Context::default(), &[])).expect("release");
    assert!(drain.tree.files().contains_key("data/a"));
    assert!(drained.notes.iter().any(|note| note.contains("inner")), "{:?}", drained.notes);
}

/// Run with `--ignored --nocapture` in release mode: a walk of a million files, its time and memory.
#[test]
#[ignore = "makes a million files; a measurement, run by hand"]
#[allow(clippy::print_stderr)]
fn a_million_files_are_walked_in_bounded_memory() {
    let (_home, folder) = store();
    let count: u64 = std::env::var("FILES_COUNT").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    let per_folder: u64 = std::env::var("FILES_PER_FOLDER").ok().and_then(|t| t.parse().ok()).unwrap_or(count);
    for number in 0..count {
        let inner = folder.path.join((number / per_folder).to_string());
        if number % per_folder == 0 {
            fs::create_dir(&inner).expect("mkdir");
        }
        fs::write(inner.join(format!("file-{number}")), "x").expect("write");
    }
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").expect("status");
        status.lines().find(|line| line.starts_with("VmHWM")).expect("VmHWM").to_owned()
    };
    eprintln!("before: {}", peak());
    let files = folder.files();
    let begun = std::time::Instant::now();
    run(files.prepare(&Context::default())).expect("prepare");
    eprintln!("prepare: {:?}, {}", begun.elapsed(), peak());
    let begun = std::time::Instant::now();
    let pin = run(files.cut(&Context::default(), &cut_id(1))).expect("cut");
    eprintln!("cut: {:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    let mut sink = CountingSink::new();
    let drained = run(files.drain(&Context::default(), &pin, &mut sink, None)).expect("drain");
    eprintln!("drain: {:?}, {}, {} files", begun.elapsed(), peak(), drained.items);
    assert_eq!(drained.items, count);
}
