//! The conformance suite on real repositories, and the quirks that only git has.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::json;
use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Driver, EdgeQuery, RestoreMode, Restored, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_testkit::MemoryTree;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};

use super::REGISTRATION;
use crate::trial::{self, back_up, differences, drain, edges, pin, run};

/// Runs git as a user would, not as the driver does.
fn git(folder: &Path, args: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new("git");
    command.args(["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main"]);
    command.args(["-c", "gc.auto=0"]).current_dir(folder).args(args);
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| Error::io("git", error))?;
    let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_vec());
    // Fed aside, because git answers before it has read everything.
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().map_err(|error| Error::io("git", error))?;
    // A git that needs no input closes it early; its exit code is what counts.
    drop(feeder.join().expect("no panic"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(output.stdout) } else { Err(Error::new(Kind::Io, format!("git {args:?}: {text}"))) }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("text").trim().to_owned()
}

/// Whether git is there; says what is skipped if not.
fn has_git(test: &str) -> bool {
    let found = Command::new("git").arg("version").output().is_ok_and(|output| output.status.success());
    if !found {
        stillpoint_testkit::skip(test, "git is not installed");
    }
    found
}

fn open(path: &Path) -> Result<Arc<dyn Driver>> {
    open_with(path, &[])
}

fn open_with(path: &Path, more: &[(&str, serde_json::Value)]) -> Result<Arc<dyn Driver>> {
    let mut settings = json!({ "path": path });
    more.iter().for_each(|(name, value)| settings[*name] = value.clone());
    trial::open(&REGISTRATION, settings, Path::new("/"))
}

/// Each key is a branch whose newest commit holds the value.
fn put(git_dir: &Path, key: &str, value: &[u8]) -> Result<()> {
    let mut script = format!("commit refs/heads/{key}\ncommitter test <test@localhost> 1 +0000\ndata 0\n").into_bytes();
    if git(git_dir, &["rev-parse", "--verify", "--quiet", &format!("refs/heads/{key}")], b"").is_ok() {
        script.extend(format!("from refs/heads/{key}^0\n").into_bytes());
    }
    script.extend(format!("M 644 inline value\ndata {}\n", value.len()).into_bytes());
    script.extend(value);
    script.push(b'\n');
    git(git_dir, &["fast-import", "--quiet"], &script).map(drop)
}

/// The same without starting a program, in repositories with sha256: the suite puts thousands of
/// values. Objects are written as git would, but for the compression, which is left out.
fn put_by_hand(git_dir: &Path, key: &str, value: &[u8]) -> std::io::Result<()> {
    let name = format!("refs/heads/{key}");
    let place = git_dir.join(&name);
    let packed = std::fs::read_to_string(git_dir.join("packed-refs")).unwrap_or_default();
    let packed = packed.lines().find_map(|line| line.strip_suffix(&format!(" {name}")).map(str::to_owned));
    let before = std::fs::read_to_string(&place).ok().map(|text| text.trim().to_owned()).or(packed);
    let blob = write_object(git_dir, "blob", value)?;
    let mut tree = b"100644 value\0".to_vec();
    tree.extend(hex::decode(blob).expect("an id"));
    let tree = write_object(git_dir, "tree", &tree)?;
    let parent = before.map(|id| format!("parent {id}\n")).unwrap_or_default();
    let who = "test <test@localhost> 1 +0000";
    let commit = format!("tree {tree}\n{parent}author {who}\ncommitter {who}\n\n");
    let commit = write_object(git_dir, "commit", commit.as_bytes())?;
    std::fs::create_dir_all(place.parent().expect("below refs"))?;
    let lock = git_dir.join(format!("{name}.lock"));
    std::fs::write(&lock, commit + "\n")?;
    std::fs::rename(lock, place)
}

fn write_object(git_dir: &Path, kind: &str, content: &[u8]) -> std::io::Result<String> {
    let mut bytes = format!("{kind} {}\0", content.len()).into_bytes();
    bytes.extend(content);
    let id = hex::encode(Sha256::digest(&bytes));
    let folder = git_dir.join("objects").join(&id[..2]);
    std::fs::create_dir_all(&folder)?;
    // A zlib stream of stored blocks.
    let mut stream = vec![0x78, 0x01];
    let blocks = bytes.chunks(65_535);
    let last = blocks.len() - 1;
    for (number, block) in blocks.enumerate() {
        let length = block.len() as u16;
        stream.push(u8::from(number == last));
        stream.extend(length.to_le_bytes());
        stream.extend((!length).to_le_bytes());
        stream.extend(block);
    }
    let (mut low, mut high) = (1u32, 0u32);
    for byte in &bytes {
        low = (low + u32::from(*byte)) % 65_521;
        high = (high + low) % 65_521;
    }
    stream.extend((high << 16 | low).to_be_bytes());
    std::fs::write(folder.join("new"), stream)?;
    std::fs::rename(folder.join("new"), folder.join(&id[2..]))?;
    Ok(id)
}

fn read(git_dir: &Path) -> Result<Content> {
    let names = text(git(git_dir, &["for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads"], b"")?);
    let asked: String = names.lines().map(|name| format!("refs/heads/{name}:value\n")).collect();
    let answers = git(git_dir, &["cat-file", "--batch"], asked.as_bytes())?;
    let (mut content, mut rest) = (Content::new(), answers.as_slice());
    for name in names.lines() {
        let line_end = rest.iter().position(|&b| b == b'\n').expect("a head line");
        let head = std::str::from_utf8(&rest[..line_end]).expect("text");
        let size: usize = head.rsplit(' ').next().and_then(|size| size.parse().ok()).expect(head);
        content.insert(name.to_owned(), rest[line_end + 1..][..size].to_vec());
        rest = &rest[line_end + 1 + size + 1..];
    }
    Ok(content)
}

struct Stores {
    working_tree: bool,
}

struct Kept {
    folder: tempfile::TempDir,
    working_tree: bool,
}

impl Kept {
    fn path(&self) -> PathBuf {
        self.folder.path().join("project")
    }

    fn git_dir(&self) -> PathBuf {
        if self.working_tree { self.path().join(".git") } else { self.path() }
    }
}

impl Harness for Stores {
    fn source(&self) -> Result<Box<dyn Subject>> {
        let kept = self.kept();
        let mut args = vec!["init", "--quiet", "--template=", "--object-format=sha256", "project"];
        if !self.working_tree {
            args.push("--bare");
        }
        git(kept.folder.path(), &args, b"")?;
        Ok(Box::new(kept))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(self.kept()))
    }
}

impl Stores {
    fn kept(&self) -> Kept {
        Kept { folder: tempfile::tempdir().expect("folder"), working_tree: self.working_tree }
    }
}

impl Subject for Kept {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        open(&self.path())
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        put_by_hand(&self.git_dir(), key, value).map_err(|error| Error::io("put", error))
    }

    fn delete(&self, key: &str) -> Result<()> {
        git(&self.git_dir(), &["update-ref", "-d", &format!("refs/heads/{key}")], b"").map(drop)
    }

    fn read(&self) -> Result<Content> {
        read(&self.git_dir())
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let commits = text(git(&self.git_dir(), &["rev-list", "--all"], b"")?);
        let commits = commits.lines().map(|line| line.as_bytes().to_vec()).collect();
        Ok(Some((EdgeQuery::Held("commits".to_owned()), commits)))
    }
}

#[test]
fn the_contract_holds_for_a_bare_repository() {
    if has_git("the_contract_holds_for_a_bare_repository") {
        conformance::run(&Stores { working_tree: false }).assert_clean("git, bare");
    }
}

#[test]
fn the_contract_holds_for_a_working_tree() {
    if has_git("the_contract_holds_for_a_working_tree") {
        conformance::run(&Stores { working_tree: true }).assert_clean("git, working tree");
    }
}

/// A folder for stores, and for what is restored from them.
struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn init(&self, path: &str, more: &[&str]) -> PathBuf {
        let place = self.path(path);
        std::fs::create_dir_all(&place).expect("folder");
        git(&place, &[&["init", "--quiet"], more].concat(), b"").expect("init");
        place
    }
}

fn restore(to: &Path, tree: &MemoryTree, part: Option<&str>) -> Result<Restored> {
    trial::restore(&open(to)?, tree, RestoreMode::Fresh, part)
}

#[test]
fn a_folder_of_repositories_comes_back_whole_and_in_parts() {
    if !has_git("a_folder_of_repositories_comes_back_whole_and_in_parts") {
        return;
    }
    let world = World::new();
    for (path, bare) in
        [("all/a.git", true), ("all/group/b.git", true), ("all/group/work", false), ("all/empty.git", true)]
    {
        let place = world.init(path, if bare { &["--bare"] } else { &[] });
        if !path.contains("empty") {
            put(&place, "main", path.as_bytes()).expect("put");
            put(&place, "feature/x", b"x").expect("put");
        }
    }
    let driver = open(&world.path("all")).expect("open");
    let probe = run(driver.probe(&Context::default())).expect("probe");
    assert!(probe.capability.partial_restore && probe.capability.observes_writes);
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, drained.unit.as_str()), (6, "refs"));
    restore(&world.path("back"), &tree, None).expect("restore");
    for path in ["a.git", "group/b.git", "group/work/.git"] {
        let (one, two) = (world.path("all").join(path), world.path("back").join(path));
        assert_eq!(read(&one).expect("read"), read(&two).expect("read"), "{path}");
    }
    assert!(world.path("back/empty.git/HEAD").exists());
    let back = open(&world.path("back")).expect("open");
    assert_eq!(differences(&back, &tree), [""; 0]);
    restore(&world.path("part"), &tree, Some("group/b.git")).expect("part");
    assert!(world.path("part/group/b.git/HEAD").exists() && !world.path("part/a.git").exists());
    assert_eq!(restore(&world.path("none"), &tree, Some("no/such")).expect_err("absent").kind(), Kind::NotFound);
}

#[test]
fn generations_are_thin_restore_in_order_and_are_consolidated() {
    if !has_git("generations_are_thin_restore_in_order_and_are_consolidated") {
        return;
    }
    let world = World::new();
    let place = world.init("a.git", &["--bare"]);
    let base: Vec<u8> = (0..200_000).map(|_| fastrand::u8(..)).collect();
    let driver = open_with(&place, &[("generationsMax", 3.into())]).expect("open");
    let mut parent: Option<MemoryTree> = None;
    let mut packs = Vec::new();
    for turn in 0..5u8 {
        let mut value = base.clone();
        value[..10].fill(turn);
        put(&place, "main", &value).expect("put");
        let (tree, drained) = back_up(&driver, parent.as_ref());
        let count = tree.files().keys().filter(|name| name.ends_with(".pack")).count();
        packs.push(count);
        if count > 1 {
            assert!(drained.bytes_read < 20_000, "a delta against the parent: {}", drained.bytes_read);
        }
        let to = world.path(&format!("back-{turn}"));
        restore(&to, &tree, None).expect("restore");
        assert_eq!(read(&to).expect("read"), read(&place).expect("read"));
        parent = Some(tree);
    }
    assert_eq!(packs, [1, 2, 3, 1, 2]);
    let (same, drained) = back_up(&driver, parent.as_ref());
    assert_eq!(same.files().keys().filter(|name| name.ends_with(".pack")).count(), 2, "nothing new, no pack");
    assert!(drained.bytes_read < 2_000, "{}", drained.bytes_read);
}

#[test]
fn odd_repositories_come_back() {
    if !has_git("odd_repositories_come_back") {
        return;
    }
    let world = World::new();
    let place = world.init("odd.git", &["--bare"]);
    put(&place, "main", b"1").expect("put");
    put(&place, "main", b"2").expect("put");
    let tip = text(git(&place, &["rev-parse", "refs/heads/main"], b"").expect("tip"));
    git(&place, &["update-ref", "refs/keep-around/hidden", &tip], b"").expect("hidden");
    git(&place, &["config", "transfer.hideRefs", "refs/keep-around"], b"").expect("config");
    git(&place, &["tag", "-a", "-m", "annotated", "v1", "main"], b"").expect("tag");
    git(&place, &["pack-refs", "--all"], b"").expect("pack");
    git(&place, &["symbolic-ref", "refs/remotes/origin/HEAD", "refs/heads/main"], b"").expect("symbolic");
    git(&place, &["update-ref", "--no-deref", "HEAD", &tip], b"").expect("detached");
    put(&place, "loose", b"3").expect("put");
    std::fs::create_dir_all(place.join("hooks")).expect("hooks");
    std::fs::write(place.join("hooks/post-receive"), "#!/bin/sh\ntouch /tmp/should-never-exist\n").expect("hook");
    std::fs::create_dir_all(place.join("lfs/objects/ab/cd")).expect("lfs");
    std::fs::write(place.join("lfs/objects/ab/cd/abcd"), b"large").expect("lfs");
    let borrower = world.init("borrower.git", &["--bare"]);
    std::fs::write(borrower.join("objects/info/alternates"), format!("{}/objects\n", place.display())).expect("write");
    git(&borrower, &["update-ref", "refs/heads/borrowed", &tip], b"").expect("borrowed");
    git(
        world.folder.path(),
        &["clone", "--quiet", "--bare", "--depth=1", &format!("file://{}", place.display()), "shallow.git"],
        b"",
    )
    .expect("shallow");
    for name in ["odd.git", "borrower.git", "shallow.git"] {
        let driver = open(&world.path(name)).expect("open");
        let (tree, _) = back_up(&driver, None);
        let to = world.path(&format!("back/{name}"));
        restore(&to, &tree, None).expect(name);
        let list = |at: &Path| text(git(at, &["show-ref", "--head", "--dereference"], b"").expect("refs"));
        assert_eq!(list(&world.path(name)), list(&to), "{name}");
    }
    let back = world.path("back/odd.git");
    assert_eq!(text(std::fs::read(back.join("HEAD")).expect("HEAD")), tip);
    assert!(text(std::fs::read(back.join("config")).expect("config")).contains("hideRefs"));
    assert!(back.join("hooks.restored/post-receive").exists() && !back.join("hooks").exists());
    assert_eq!(std::fs::read(back.join("lfs/objects/ab/cd/abcd")).expect("lfs"), b"large");
    assert!(!world.path("back/borrower.git/objects/info/alternates").exists());
    git(&world.path("back/borrower.git"), &["fsck"], b"").expect("stands alone");
}

#[test]
fn pruned_objects_lose_the_pin_and_make_no_point() {
    if !has_git("pruned_objects_lose_the_pin_and_make_no_point") {
        return;
    }
    let world = World::new();
    let place = world.init("a.git", &["--bare"]);
    put(&place, "main", b"stays").expect("put");
    put(&place, "doomed", b"goes").expect("put");
    let driver = open(&place).expect("open");
    let pin = pin(&driver, 1);
    git(&place, &["update-ref", "-d", "refs/heads/doomed"], b"").expect("delete");
    git(&place, &["-c", "gc.reflogExpire=now", "gc", "--quiet", "--prune=now"], b"").expect("gc");
    let lost = run(driver.still_valid(&Context::default(), &pin)).expect("asked");
    assert!(matches!(lost, Validity::Lost(_)), "{lost:?}");
    let error = drain(&driver, &pin, None).expect_err("gone");
    assert_eq!(error.kind(), Kind::PinLost, "{error:?}");
    assert!(error.hint_text().is_some());
}

#[test]
fn an_ordinary_collection_between_cut_and_drain_loses_nothing() {
    if !has_git("an_ordinary_collection_between_cut_and_drain_loses_nothing") {
        return;
    }
    let world = World::new();
    let place = world.init("a.git", &["--bare"]);
    put(&place, "main", b"old").expect("put");
    let driver = open(&place).expect("open");
    let pin = pin(&driver, 1);
    git(&place, &["update-ref", "-d", "refs/heads/main"], b"").expect("delete");
    put(&place, "main", b"rewritten").expect("put");
    git(&place, &["gc", "--quiet"], b"").expect("gc");
    let (drain, _) = drain(&driver, &pin, None).expect("drain");
    let to = world.path("back");
    restore(&to, &drain.tree, None).expect("restore");
    assert_eq!(read(&to).expect("read")["main"], b"old");
}

#[test]
fn an_update_that_is_taken_back_is_seen() {
    if !has_git("an_update_that_is_taken_back_is_seen") {
        return;
    }
    let world = World::new();
    let place = world.init("a.git", &["--bare"]);
    put(&place, "main", b"1").expect("put");
    let one = text(git(&place, &["rev-parse", "main"], b"").expect("one"));
    put(&place, "main", b"2").expect("put");
    let two = text(git(&place, &["rev-parse", "main"], b"").expect("two"));
    let driver = open(&place).expect("open");
    let observe = || run(driver.observe(&Context::default())).expect("observe").expect("position");
    let before = observe();
    assert_eq!(before, observe());
    git(&place, &["update-ref", "refs/heads/main", &one], b"").expect("there");
    git(&place, &["update-ref", "refs/heads/main", &two], b"").expect("back");
    let after = observe();
    assert_ne!(before, after);
    assert_eq!(before.text.split('.').next(), after.text.split('.').next(), "the refs themselves are the same");
}

#[test]
fn commits_are_looked_up_among_what_refs_reach() {
    if !has_git("commits_are_looked_up_among_what_refs_reach") {
        return;
    }
    let world = World::new();
    let place = world.init("a.git", &["--bare"]);
    put(&place, "main", b"1").expect("put");
    put(&place, "main", b"2").expect("put");
    let reached = text(git(&place, &["rev-parse", "main^"], b"").expect("id"));
    put(&place, "gone", b"3").expect("put");
    let unreached = text(git(&place, &["rev-parse", "gone"], b"").expect("id"));
    git(&place, &["update-ref", "-d", "refs/heads/gone"], b"").expect("delete");
    let driver = open(&place).expect("open");
    let pin = pin(&driver, 1);
    let referents = [reached.as_str(), unreached.as_str(), &"0".repeat(40), "no id"].map(|id| id.as_bytes().to_vec());
    let query = EdgeQuery::Which { kind: "commits".to_owned(), referents: referents.to_vec() };
    let found = edges(&driver, Some(&pin), &query).expect("edges");
    assert_eq!(found.into_iter().map(|edge| text(edge.referent)).collect::<Vec<_>>(), [reached]);
}

#[test]
fn settings_that_cannot_be_are_named() {
    let relative = open(Path::new("relative")).expect_err("relative");
    assert_eq!(relative.kind(), Kind::Config);
    let unknown = open_with(Path::new("/x"), &[("colour", "red".into())]).expect_err("unknown");
    assert!(unknown.to_string().contains("colour"));
}

#[test]
fn the_readme_states_the_capability_of_one_repository() {
    if !has_git("the_readme_states_the_capability_of_one_repository") {
        return;
    }
    let world = World::new();
    let driver = open(&world.init("a.git", &["--bare"])).expect("open");
    let found = run(driver.probe(&Context::default())).expect("probe").capability;
    let word = |yes| if yes { "yes" } else { "no" };
    for (row, value) in [
        ("observes writes", word(found.observes_writes)),
        ("incremental", word(found.incremental)),
        ("edges", word(found.edges)),
        ("swaps in place", word(found.swaps_in_place)),
        ("partial restore", word(found.partial_restore)),
    ] {
        assert!(REGISTRATION.readme.contains(&format!("| {row} | {value} |")), "{row}");
    }
}
