//! Sinks for tests: one that keeps the tree in memory, one that only counts.
//!
//! Both are stricter than any repository: they fail at the first broken duty of the driver, with
//! the place named, and they read content late and on other threads, as the contract allows.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd, Metadata, Node, NodeKind, Sink, check_name};

use crate::tree::{Body, Entry, Folder, MemoryTree};

/// How many contents may wait for a worker; small, so that drivers feel a full pipeline.
const CONTENTS_WAITING_MAX: usize = 16;
const WORKERS: usize = 2;

/// Keeps what a drain yields. Enforces ascending valid names and balanced `enter`/`leave`.
pub struct MemorySink {
    stack: Vec<Level>,
    parents: Vec<Option<Arc<Folder>>>,
    files: Vec<Arc<Mutex<Slot>>>,
    queue: Option<SyncSender<Job>>,
    workers: Vec<JoinHandle<()>>,
    reused: u64,
}

/// What a drain left in a [`MemorySink`].
#[derive(Debug, Clone)]
pub struct Drain {
    /// The tree.
    pub tree: MemoryTree,
    /// Streams whose content said that it is torn, by path.
    pub torn: Vec<Loss>,
    /// Bytes that were read from contents.
    pub bytes_read: u64,
    /// Entries that were taken over from the parent.
    pub reused: u64,
}

struct Level {
    node: Node,
    entries: BTreeMap<Vec<u8>, Building>,
    last: Option<Vec<u8>>,
}

/// An entry whose content may still be on its way.
enum Building {
    Done(Entry),
    File(Node, usize),
    Dir(Node, BTreeMap<Vec<u8>, Building>),
}

#[derive(Default)]
struct Slot {
    path: String,
    data: Vec<u8>,
    end: Option<Result<ContentEnd>>,
}

struct Job {
    content: Box<dyn Content>,
    slot: Arc<Mutex<Slot>>,
}

impl MemorySink {
    /// A sink without a parent point.
    pub fn new() -> Self {
        Self::with_parent(None)
    }

    /// A sink whose `parent` and `reuse` look into `parent`.
    pub fn with_parent(parent: Option<&MemoryTree>) -> Self {
        let (queue, jobs) = sync_channel(CONTENTS_WAITING_MAX);
        let jobs = Arc::new(Mutex::new(jobs));
        let workers = (0..WORKERS)
            .map(|_| {
                let jobs = Arc::clone(&jobs);
                std::thread::spawn(move || read_contents(&jobs))
            })
            .collect();
        let root = Node { name: Vec::new(), kind: NodeKind::Dir, meta: Metadata::default() };
        Self {
            stack: vec![Level { node: root, entries: BTreeMap::new(), last: None }],
            parents: vec![parent.map(|tree| Arc::clone(&tree.root))],
            files: Vec::new(),
            queue: Some(queue),
            workers,
            reused: 0,
        }
    }

    /// Waits for all content and returns the tree; fails if a content failed or a directory is open.
    pub fn finish(mut self) -> Result<Drain> {
        self.queue = None;
        for worker in self.workers.drain(..) {
            worker.join().map_err(|_| Error::internal("a content panicked while it was read"))?;
        }
        if self.stack.len() != 1 {
            return Err(Error::internal(format!("{} directories were not left", self.stack.len() - 1)));
        }
        let mut drain = Drain { tree: MemoryTree::new(), torn: Vec::new(), bytes_read: 0, reused: self.reused };
        let mut contents = Vec::new();
        for slot in &self.files {
            let slot = std::mem::take(&mut *slot.lock().expect("no holder panics"));
            drain.bytes_read += slot.data.len() as u64;
            match slot.end.expect("workers took every job") {
                Ok(ContentEnd::Whole) => {}
                Ok(ContentEnd::Torn(why)) => drain.torn.push(Loss { what: slot.path, why }),
                Err(error) => return Err(error.context("stream", slot.path)),
            }
            contents.push(Arc::new(slot.data));
        }
        let level = self.stack.pop().expect("checked above");
        drain.tree.root = Arc::new(settle(level.entries, &contents));
        Ok(drain)
    }

    fn path(&self, name: &[u8]) -> String {
        let names = self.stack[1..].iter().map(|level| level.node.name.as_slice()).chain([name]);
        names.map(String::from_utf8_lossy).collect::<Vec<_>>().join("/")
    }

    fn admit(&mut self, name: &[u8]) -> Result<()> {
        let path = self.path(name);
        let level = self.stack.last_mut().expect("the root is never left");
        admit(&mut level.last, name, &path)
    }

    fn add(&mut self, name: &[u8], building: Building) {
        self.stack.last_mut().expect("the root is never left").entries.insert(name.to_vec(), building);
    }
}

impl Sink for MemorySink {
    fn enter(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        self.admit(name)?;
        let parent = self.parents.last().expect("one per level").as_ref().and_then(|p| match p.entries.get(name) {
            Some(Entry { body: Body::Folder(below), .. }) => Some(Arc::clone(below)),
            _ => None,
        });
        self.parents.push(parent);
        let node = Node { name: name.to_vec(), kind: NodeKind::Dir, meta: meta.clone() };
        self.stack.push(Level { node, entries: BTreeMap::new(), last: None });
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        if self.stack.len() == 1 {
            return Err(Error::internal("the top folder was left"));
        }
        let level = self.stack.pop().expect("checked above");
        self.parents.pop();
        let name = level.node.name.clone();
        self.add(&name, Building::Dir(level.node, level.entries));
        Ok(())
    }

    fn file(&mut self, name: &[u8], meta: &Metadata, _: Option<u64>, content: Box<dyn Content>) -> Result<()> {
        self.admit(name)?;
        let slot = Arc::new(Mutex::new(Slot { path: self.path(name), ..Slot::default() }));
        let node = Node { name: name.to_vec(), kind: NodeKind::File { size: 0 }, meta: meta.clone() };
        self.add(name, Building::File(node, self.files.len()));
        self.files.push(Arc::clone(&slot));
        let queue = self.queue.as_ref().expect("only finish takes it");
        queue.send(Job { content, slot }).map_err(|_| Error::internal("a content panicked while it was read"))
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        self.admit(&node.name)?;
        if matches!(node.kind, NodeKind::File { .. } | NodeKind::Dir) {
            return Err(Error::internal(format!("`{}` has content and is no plain node", self.path(&node.name))));
        }
        self.add(&node.name, Building::Done(Entry { node: node.clone(), body: Body::Nothing }));
        Ok(())
    }

    fn parent(&mut self, name: &[u8]) -> Result<Option<Node>> {
        let parent = self.parents.last().expect("one per level").as_ref();
        Ok(parent.and_then(|folder| folder.entries.get(name)).map(|entry| entry.node.clone()))
    }

    fn reuse(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        let parent = self.parents.last().expect("one per level").as_ref();
        let Some(entry) = parent.and_then(|folder| folder.entries.get(name)).cloned() else {
            return Err(Error::new(Kind::NotFound, format!("the parent lacks `{}`", self.path(name))));
        };
        self.admit(name)?;
        self.reused += 1;
        let node = Node { meta: meta.clone(), ..entry.node };
        self.add(name, Building::Done(Entry { node, body: entry.body }));
        Ok(())
    }
}

impl Default for MemorySink {
    fn default() -> Self {
        Self::new()
    }
}

/// Turns what was built into the folder, once all contents are there.
fn settle(entries: BTreeMap<Vec<u8>, Building>, contents: &[Arc<Vec<u8>>]) -> Folder {
    let mut folder = Folder::default();
    for (name, building) in entries {
        let entry = match building {
            Building::Done(entry) => entry,
            Building::File(mut node, index) => {
                node.kind = NodeKind::File { size: contents[index].len() as u64 };
                Entry { node, body: Body::Data(Arc::clone(&contents[index])) }
            }
            Building::Dir(node, below) => Entry { node, body: Body::Folder(Arc::new(settle(below, contents))) },
        };
        folder.entries.insert(name, entry);
    }
    folder
}

fn admit(last: &mut Option<Vec<u8>>, name: &[u8], path: &str) -> Result<()> {
    check_name(name)?;
    if last.as_deref().is_some_and(|last| last >= name) {
        return Err(Error::internal(format!("`{path}` comes after a name that is not smaller")));
    }
    *last = Some(name.to_vec());
    Ok(())
}

fn read_contents(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().expect("no holder panics").recv();
        let Ok(Job { mut content, slot }) = job else { return };
        let mut data = Vec::new();
        let end = read_whole(content.as_mut(), |bytes| data.extend_from_slice(bytes));
        let mut slot = slot.lock().expect("no holder panics");
        slot.data = data;
        slot.end = Some(end);
    }
}

fn read_whole(content: &mut dyn Content, mut take: impl FnMut(&[u8])) -> Result<ContentEnd> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = content.read(&mut buffer)?;
        if count == 0 {
            return content.finish();
        }
        take(&buffer[..count]);
    }
}

/// Counts what a drain yields and keeps nothing but a name per open directory: for drains whose
/// own memory is measured. As strict as [`MemorySink`]; reads content in place.
#[derive(Default)]
pub struct CountingSink {
    depth: Vec<Option<Vec<u8>>>,
    last: Option<Vec<u8>>,
    /// Entries that are no directories.
    pub entries: u64,
    /// Directories.
    pub folders: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Streams that said that they are torn.
    pub torn: u64,
    /// Whether a `HOW-TO-RESTORE.txt` stands at the top.
    pub is_explained: bool,
}

impl CountingSink {
    /// A sink that counts from zero.
    pub fn new() -> Self {
        Self::default()
    }

    fn admit(&mut self, name: &[u8]) -> Result<()> {
        admit(&mut self.last, name, &String::from_utf8_lossy(name))
    }
}

impl Sink for CountingSink {
    fn enter(&mut self, name: &[u8], _: &Metadata) -> Result<()> {
        self.admit(name)?;
        self.depth.push(self.last.take());
        self.folders += 1;
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        self.last = self.depth.pop().ok_or_else(|| Error::internal("the top folder was left"))?;
        Ok(())
    }

    fn file(&mut self, name: &[u8], _: &Metadata, _: Option<u64>, mut content: Box<dyn Content>) -> Result<()> {
        self.admit(name)?;
        let mut bytes = 0;
        if let ContentEnd::Torn(_) = read_whole(content.as_mut(), |data| bytes += data.len() as u64)? {
            self.torn += 1;
        }
        self.is_explained |= self.depth.is_empty() && name == b"HOW-TO-RESTORE.txt" && bytes > 0;
        self.bytes += bytes;
        self.entries += 1;
        Ok(())
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        self.entries += 1;
        self.admit(&node.name)
    }

    fn parent(&mut self, _: &[u8]) -> Result<Option<Node>> {
        Ok(None)
    }

    fn reuse(&mut self, name: &[u8], _: &Metadata) -> Result<()> {
        Err(Error::new(Kind::NotFound, format!("there is no parent for `{}`", String::from_utf8_lossy(name))))
    }
}

#[cfg(test)]
mod tests {
    use stillpoint_core::tree::{Tree, TreePath, bytes};

    use super::*;

    #[test]
    fn a_drain_becomes_a_tree_and_the_tree_a_parent() {
        let meta = Metadata::default();
        let mut sink = MemorySink::new();
        sink.enter(b"d", &meta).expect("enter");
        sink.file(b"a", &meta, None, bytes("one")).expect("file");
        sink.leave().expect("leave");
        sink.file(b"e", &meta, None, bytes("two")).expect("file");
        let first = sink.finish().expect("finish").tree;
        assert_eq!(first.files()["d/a"], b"one");
        assert_eq!(first.get(&TreePath::parse("e").expect("valid")).expect("get").expect("there").name, b"e");

        let mut sink = MemorySink::with_parent(Some(&first));
        assert!(sink.parent(b"d").expect("parent").is_some());
        sink.reuse(b"d", &meta).expect("whole directory");
        assert_eq!(sink.reuse(b"f", &meta).expect_err("absent").kind(), Kind::NotFound);
        let drain = sink.finish().expect("finish");
        assert_eq!((drain.reused, drain.bytes_read), (1, 0));
        assert_eq!(drain.tree.files()["d/a"], b"one");
    }

    #[test]
    fn broken_duties_of_a_driver_are_named() {
        let meta = Metadata::default();
        let mut sink = MemorySink::new();
        sink.file(b"b", &meta, None, bytes("")).expect("file");
        assert!(sink.file(b"a", &meta, None, bytes("")).is_err(), "descending");
        assert!(sink.file(b"b", &meta, None, bytes("")).is_err(), "twice");
        assert!(sink.enter(b"../x", &meta).is_err(), "leaves the tree");
        assert!(sink.leave().is_err(), "the root");
        sink.enter(b"c", &meta).expect("enter");
        assert!(sink.finish().is_err(), "not left");
    }
}
