//! What the tests of this binary share: real restic, difficult trees, and a strict comparison.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::error::Result;
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{
    Existing, ExtractOptions, Extracted, FileTime, Metadata, Node, NodeKind, Reader, Sink, TreePath,
};
use stillpoint_repo::depot::Depot;
use stillpoint_repo::depot::fs::FsDepot;
use stillpoint_repo::{BackupOptions, InitOptions, Repository, SnapshotId, SnapshotMeta, Unlock};

/// The password of every test repository that restic opens too.
pub const PASSWORD: &str = "rosebud";

/// Real restic on one repository.
pub struct Restic {
    program: PathBuf,
    pub repository: PathBuf,
}

impl Restic {
    /// Real restic, or `None` with a printed reason.
    pub fn find(test: &str, repository: &Path) -> Option<Self> {
        let program = std::env::var_os("STILLPOINT_TEST_RESTIC").map_or_else(|| "restic".into(), PathBuf::from);
        match Command::new(&program).arg("version").output() {
            Ok(output) if output.status.success() => Some(Self { program, repository: repository.to_owned() }),
            _ => {
                stillpoint_testkit::skip(test, "restic is not installed");
                None
            }
        }
    }

    /// Runs restic and returns what it said, whatever became of it.
    pub fn try_run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("restic was found before")
    }

    /// Starts restic with an open standard input.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("restic was found before")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(["--no-cache", "-r"]).arg(&self.repository);
        command.env("RESTIC_PASSWORD", PASSWORD).env("GOMAXPROCS", "2");
        command
    }

    /// Runs restic, which must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {arguments:?}: {text}\n{errors}");
        text
    }

    /// Backs up `path`; returns nothing, as the newest snapshot is the one made.
    pub fn backup(&self, path: &Path) {
        self.run(&["backup", path.to_str().expect("scratch paths are text")]);
    }

    /// Checks everything, data included.
    pub fn check(&self) {
        let said = self.run(&["check", "--read-data"]);
        assert!(said.contains("no errors were found"), "{said}");
    }

    /// Restores a snapshot (or `latest`) into `to`.
    pub fn restore(&self, snapshot: &str, to: &Path) {
        self.run(&["restore", snapshot, "--target", to.to_str().expect("scratch paths are text")]);
    }
}

/// The depot of a repository in a directory.
pub fn depot(at: &Path) -> Arc<dyn Depot> {
    Arc::new(FsDepot::open(at).expect("depot opens"))
}

/// Opens a test repository.
pub fn open(at: &Path) -> Repository {
    Repository::open(depot(at), &Unlock::Password(PASSWORD.into())).expect("repository opens")
}

/// The newest snapshot.
pub fn latest(repository: &Repository) -> SnapshotId {
    repository.snapshots().expect("snapshots load").last().expect("there is a snapshot").id.clone()
}

/// Extracts `path` of a snapshot to a new directory.
pub fn extract(repository: &Repository, snapshot: &SnapshotId, path: &str, to: &Path) -> Extracted {
    let tree = repository.tree(snapshot, None).expect("tree opens").expect("tree is there");
    let options = ExtractOptions { existing: Existing::Refuse, owners: rustix::process::geteuid().is_root() };
    tree.extract(&TreePath::parse(path).expect("path"), to, &options, &Context::default()).expect("extracts")
}

/// Deterministic bytes that do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

/// A small tree with most things that file systems can hold.
pub fn difficult_tree(at: &Path) {
    let file = |name: &str, data: &[u8]| std::fs::write(at.join(name), data).expect("file");
    std::fs::create_dir_all(at.join("deep/er/still")).expect("folders");
    file("empty", b"");
    file("small", b"hello\n");
    file("big", &noise(1, 5_000_000));
    file("text", "all work and no play makes jack a dull boy\n".repeat(100_000).as_bytes());
    file("deep/er/still/leaf", b"leaf");
    file("no-mode", b"nobody may read this");
    file("setuid", b"#!/bin/true\n");
    file("line\nbreak \"quoted\" \\back", b"odd name");
    std::fs::write(at.join(OsStr::from_bytes(b"not-\xff\xfe-utf8")), b"raw").expect("raw name");
    file(&"n".repeat(255), b"long name");
    sparse(&at.join("sparse"));
    std::fs::hard_link(at.join("small"), at.join("deep/hard")).expect("hard link");
    std::fs::hard_link(at.join("small"), at.join("zz-hard")).expect("hard link");
    symlink("../nowhere/at all", at.join("dangling")).expect("symlink");
    symlink("small", at.join("link")).expect("symlink");
    let fifo = at.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o640), 0)
        .expect("fifo");
    let _ = xattr::set(at.join("small"), "user.colour", b"green\0binary\xff");
    let _ = xattr::set(at.join("deep"), "user.folder", b"yes");
    mode(&at.join("setuid"), 0o4755);
    mode(&at.join("no-mode"), 0o000);
    std::fs::create_dir(at.join("sticky")).expect("folder");
    mode(&at.join("sticky"), 0o1777);
    std::fs::create_dir(at.join("closed")).expect("folder");
    mode(&at.join("closed"), 0o500);
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(981_173_106_123_456_789);
    for name in ["small", "deep/er"] {
        std::fs::File::open(at.join(name)).expect("opens").set_modified(old).expect("time");
    }
}

/// 20 MB of which 4 KB are data.
fn sparse(at: &Path) {
    use std::io::{Seek, SeekFrom, Write};
    let mut file = std::fs::File::create(at).expect("sparse");
    file.seek(SeekFrom::Start(10 << 20)).expect("seek");
    file.write_all(&[7; 4096]).expect("data");
    file.set_len(20 << 20).expect("length");
}

/// Sets permission bits.
pub fn mode(at: &Path, mode: u32) {
    std::fs::set_permissions(at, std::fs::Permissions::from_mode(mode)).expect("mode");
}

/// Everything that must survive, by relative path, in a form that prints well.
pub fn describe(top: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut links: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
    let mut waiting = vec![top.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = path.symlink_metadata().expect("lstat");
        let relative = path.strip_prefix(top).expect("below the top").as_os_str().as_bytes().to_vec();
        let kind = meta.file_type();
        let mut text =
            format!("{:o} {}:{} {}.{:09}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
        for name in xattr::list(&path).into_iter().flatten() {
            let value = xattr::get(&path, &name).expect("xattr").unwrap_or_default();
            text.push_str(&format!(" {name:?}={value:?}"));
        }
        if kind.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("lists").map(|entry| entry.expect("entry").path()));
        } else if kind.is_symlink() {
            text.push_str(&format!(" -> {:?}", path.read_link().expect("link")));
        } else if kind.is_file() {
            let data = std::fs::read(&path).expect("reads");
            text.push_str(&format!(" {} bytes {:x}", data.len(), fingerprint(&data)));
            if meta.nlink() > 1 {
                let first = links.entry((meta.dev(), meta.ino())).or_insert_with(|| relative.clone());
                if relative < *first {
                    first.clone_from(&relative);
                }
                text.push_str(&format!(" {} names", meta.nlink()));
            }
        } else if kind.is_char_device() || kind.is_block_device() {
            text.push_str(&format!(" device {}", meta.rdev()));
        }
        found.insert(relative, text);
    }
    found
}

/// FNV-1a, the same on every machine and with every compiler.
fn fingerprint(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Fails with the differences between two directories.
pub fn assert_same(expected: &Path, actual: &Path) {
    assert_equal(&describe(expected), &describe(actual));
}

/// As [`assert_same`], leaving out the top directories themselves: the top of a store is the writer's.
pub fn assert_same_below(expected: &Path, actual: &Path) {
    let below = |top: &Path| describe(top).into_iter().filter(|(name, _)| !name.is_empty()).collect();
    assert_equal(&below(expected), &below(actual));
}

/// Fails with the differences between two descriptions.
pub fn assert_equal(expected: &BTreeMap<Vec<u8>, String>, actual: &BTreeMap<Vec<u8>, String>) {
    let mut differences = Vec::new();
    for name in expected.keys().chain(actual.keys()).collect::<std::collections::BTreeSet<_>>() {
        if expected.get(name) != actual.get(name) {
            let shown = String::from_utf8_lossy(name);
            differences.push(format!(
                "{shown}\n  expected {:?}\n  found    {:?}",
                expected.get(name),
                actual.get(name)
            ));
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

/// A new repository in memory or wherever `depot` is.
pub fn init(depot: Arc<dyn Depot>) -> Repository {
    Repository::init(depot, &Unlock::Password(PASSWORD.into()), &InitOptions::default()).expect("init")
}

/// Backs a directory up as the store `files`, with our own writer.
pub fn backup(repository: &Repository, from: &Path) -> Result<SnapshotId> {
    let backup = repository.begin(BackupOptions::default())?;
    let mut sink = backup.store(&StoreName::new("files").expect("name"), None)?;
    walk(&mut sink, from)?;
    sink.finish()?;
    let meta = SnapshotMeta {
        time: jiff::Timestamp::now(),
        hostname: "test".into(),
        tags: vec!["point:k3f9".into()],
        paths: vec!["/files".into()],
    };
    Ok(backup.finish(meta)?.snapshot)
}

fn walk(sink: &mut dyn Sink, from: &Path) -> Result<()> {
    let mut entries: Vec<_> =
        std::fs::read_dir(from).expect("lists").map(|entry| entry.expect("entry").path()).collect();
    entries.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    for path in entries {
        let name = path.file_name().expect("has a name").as_bytes().to_vec();
        let stat = path.symlink_metadata().expect("lstat");
        let meta = metadata(&path, &stat);
        let kind = stat.file_type();
        if kind.is_dir() {
            sink.enter(&name, &meta)?;
            walk(sink, &path)?;
            sink.leave()?;
        } else if kind.is_file() {
            let file = std::fs::File::open(&path).expect("opens");
            sink.file(&name, &meta, Some(stat.len()), Box::new(Reader(file)))?;
        } else if kind.is_symlink() {
            let target = path.read_link().expect("link").as_os_str().as_bytes().to_vec();
            sink.node(&Node { name, kind: NodeKind::Symlink { target }, meta })?;
        } else if kind.is_fifo() {
            sink.node(&Node { name, kind: NodeKind::Fifo, meta })?;
        }
    }
    Ok(())
}

fn metadata(path: &Path, stat: &std::fs::Metadata) -> Metadata {
    let time = FileTime { seconds: stat.mtime(), nanos: stat.mtime_nsec() as u32 };
    let xattrs = xattr::list(path).into_iter().flatten();
    let mut xattrs: Vec<_> = xattrs
        .map(|name| {
            let value = xattr::get(path, &name).expect("xattr").unwrap_or_default();
            (name.as_bytes().to_vec(), value)
        })
        .collect();
    xattrs.sort();
    Metadata {
        mode: stat.mode() & 0o7777,
        mtime: time,
        atime: time,
        ctime: time,
        uid: stat.uid(),
        gid: stat.gid(),
        inode: stat.ino(),
        device: stat.dev(),
        links: stat.nlink(),
        xattrs,
        ..Metadata::default()
    }
}

/// All files below a directory, relative, sorted.
pub fn files(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![top.to_owned()];
    while let Some(path) = waiting.pop() {
        for entry in std::fs::read_dir(&path).expect("lists") {
            let entry = entry.expect("entry").path();
            if entry.is_dir() {
                waiting.push(entry)
            } else {
                found.push(entry.strip_prefix(top).expect("below").to_owned())
            }
        }
    }
    found.sort();
    found
}

/// Copies a directory of plain files.
pub fn copy_all(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(&file);
        std::fs::create_dir_all(target.parent().expect("has a folder")).expect("folder");
        std::fs::copy(from.join(&file), target).expect("copies");
    }
}
