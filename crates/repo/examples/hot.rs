//! The repository's hot path alone, for measuring and profiling: no engine, no drivers.
//!
//! ```text
//! hot corpus DIR [SCALE]        write the benches' input
//! hot backup REPO DIR [none]    first backup of a directory, made if it is absent
//! hot nochange REPO DIR         backup against the newest snapshot
//! hot stream REPO [DIR]         backup of standard input, or of all large files of the input as one
//! hot restore REPO DIR          the newest snapshot into an empty directory
//! hot check REPO                re-reads everything
//! hot small DIR COUNT           write small files
//! hot change DIR                change one percent of the input
//! ```

#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

#[path = "../../testkit/src/corpus.rs"]
mod corpus;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{Content, Existing, ExtractOptions, FileTime, Metadata, NodeKind, Reader, Sink, TreePath};
use stillpoint_repo::depot::fs::FsDepot;
use stillpoint_repo::{
    BackupOptions, CheckRequest, Compression, Data, InitOptions, KeyFile, Repository, SnapshotMeta, Unlock,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let begin = Instant::now();
    match words.as_slice() {
        ["corpus", dir, rest @ ..] => {
            let scale = rest.first().map_or(1.0, |scale| scale.parse().unwrap());
            corpus::generate(Path::new(dir), scale).unwrap();
        }
        ["small", dir, count] => {
            corpus::small_files(Path::new(dir), count.parse().unwrap()).unwrap();
        }
        ["change", dir] => corpus::change(Path::new(dir), 1).unwrap(),
        ["backup", repo, dir, rest @ ..] => backup(repo, Some(Path::new(dir)), rest.first() == Some(&"none"), false),
        ["nochange", repo, dir] => backup(repo, Some(Path::new(dir)), false, true),
        ["stream", repo] => backup(repo, None, false, false),
        ["stream", repo, dir] => {
            let content = Reader(corpus::stream(Path::new(dir)).unwrap());
            backup_with(repo, false, |sink| sink.file(b"stream", &Metadata::default(), None, Box::new(content)));
        }
        ["restore", repo, to] => restore(repo, Path::new(to)),
        ["check", repo] => check(repo),
        _ => println!("see the top of the source"),
    }
    let usage = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = usage.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!("{} {:.3} s, {}", words.join(" "), begin.elapsed().as_secs_f64(), peak.replace('\t', " "));
}

fn open(repo: &str) -> Repository {
    let depot = Arc::new(FsDepot::open(repo).unwrap());
    let key = format!("{repo}.key");
    match std::fs::read_to_string(&key) {
        Ok(text) => Repository::open(depot, &Unlock::KeyFile(KeyFile::parse(&text).unwrap())).unwrap(),
        Err(_) => {
            let unlock = KeyFile::generate().unwrap();
            std::fs::write(&key, unlock.text()).unwrap();
            Repository::init(depot, &Unlock::KeyFile(unlock), &InitOptions::default()).unwrap()
        }
    }
}

fn backup(repo: &str, dir: Option<&Path>, raw: bool, parent: bool) {
    if parent {
        return nochange(repo, dir.unwrap());
    }
    backup_with(repo, raw, |sink| match dir {
        Some(dir) => walk(sink, dir),
        None => sink.file(b"stdin", &Metadata::default(), None, Box::new(Reader(std::io::stdin()))),
    });
}

fn options(raw: bool) -> BackupOptions {
    let compression = if raw { Compression::None } else { Compression::Auto };
    BackupOptions { compression, ..BackupOptions::default() }
}

fn meta() -> SnapshotMeta {
    SnapshotMeta { time: jiff::Timestamp::now(), hostname: "bench".into(), tags: vec![], paths: vec!["/bench".into()] }
}

fn backup_with(repo: &str, raw: bool, fill: impl FnOnce(&mut dyn Sink) -> Result<()>) {
    let backup = open(repo).begin(options(raw)).unwrap();
    let mut sink = backup.store(&StoreName::new("data").unwrap(), None).unwrap();
    fill(&mut sink).unwrap();
    println!("{:?}", sink.finish().unwrap());
    println!("{:?}", backup.finish(meta()).unwrap());
}

fn nochange(repo: &str, dir: &Path) {
    let repository = open(repo);
    let name = StoreName::new("data").unwrap();
    let begin = Instant::now();
    let newest = repository.snapshots().unwrap().pop().unwrap();
    let parent = repository.tree(&newest.id, Some(&name)).unwrap();
    println!("parent {:.3} s", begin.elapsed().as_secs_f64());
    let backup = repository.begin(options(false)).unwrap();
    let mut sink = backup.store(&name, parent).unwrap();
    println!("begun {:.3} s", begin.elapsed().as_secs_f64());
    walk(&mut sink, dir).unwrap();
    println!("walked {:.3} s", begin.elapsed().as_secs_f64());
    println!("{:?}", sink.finish().unwrap());
    println!("{:?}", backup.finish(meta()).unwrap());
}

fn restore(repo: &str, to: &Path) {
    let repository = open(repo);
    let newest = repository.snapshots().unwrap().pop().unwrap();
    let tree = repository.tree(&newest.id, None).unwrap().unwrap();
    let options = ExtractOptions { existing: Existing::Refuse, owners: true };
    println!("{:?}", tree.extract(&TreePath::root(), to, &options, &Context::default()).unwrap());
}

fn check(repo: &str) {
    let request = CheckRequest { data: Data::All, ..CheckRequest::default() };
    println!("{:?}", open(repo).check(&request, &Context::default()).unwrap());
}

fn walk(sink: &mut dyn Sink, dir: &Path) -> Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().into_encoded_bytes();
        let stat = entry.metadata().unwrap();
        let meta = metadata(&stat);
        if stat.is_dir() {
            sink.enter(&name, &meta)?;
            walk(sink, &entry.path())?;
            sink.leave()?;
            continue;
        }
        let old = sink.parent(&name)?;
        let unchanged = old.is_some_and(|old| {
            old.kind == NodeKind::File { size: stat.len() }
                && (old.meta.mtime, old.meta.ctime) == (meta.mtime, meta.ctime)
        });
        match unchanged {
            true => sink.reuse(&name, &meta)?,
            false => sink.file(&name, &meta, Some(stat.len()), Box::new(Lazy { path: entry.path(), file: None }))?,
        }
    }
    Ok(())
}

fn metadata(stat: &std::fs::Metadata) -> Metadata {
    let time = |seconds, nanos: i64| FileTime { seconds, nanos: nanos as u32 };
    let mtime = time(stat.mtime(), stat.mtime_nsec());
    Metadata {
        mode: stat.mode() & 0o7777,
        mtime,
        atime: mtime,
        ctime: time(stat.ctime(), stat.ctime_nsec()),
        uid: stat.uid(),
        gid: stat.gid(),
        inode: stat.ino(),
        device: stat.dev(),
        links: stat.nlink(),
        ..Metadata::default()
    }
}

/// Opens the file when its turn comes, so that a long queue holds no descriptors.
struct Lazy {
    path: PathBuf,
    file: Option<File>,
}

impl Content for Lazy {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let file = self.file.get_or_insert_with(|| File::open(&self.path).unwrap());
        Ok(file.read(buffer).unwrap())
    }
}
