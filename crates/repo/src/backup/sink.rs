//! One store's tree as the drain hands it in: files go to the workers, and everything waits in line
//! until the files before it are done, so that directories are written in order.
//!
//! The line is bounded, and so is the memory of a drain, whatever the size of its tree.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{Content, ContentEnd, Metadata, Node, NodeKind, Sink, check_name};

use super::StoreSummary;
use super::parent::ParentDirectory;
use super::pipeline::Pipeline;
use super::slot::{Job, Slot, StoreCounters};
use super::stores::Stores;
use crate::format::id::Id;
use crate::format::pack::BlobKind;
use crate::format::tree::{Entry, TreeNode};
use crate::format::tree_write::DirectoryWriter;

/// Entries that may stand in line behind a file that is being read.
const LINE_MAX: usize = 16_384;

/// Where one store's drain writes its tree. Made by [`Backup::store`](super::Backup::store).
pub struct StoreSink {
    pipeline: Arc<Pipeline>,
    stores: Arc<Stores>,
    name: StoreName,
    counters: Arc<StoreCounters>,
    line: VecDeque<Step>,
    /// Directories that are being written, outermost first: as far as the line was taken.
    writing: Vec<WritingDirectory>,
    /// Directories that the drain stands in, outermost first: where the line ends.
    entered: Vec<EnteredDirectory>,
    summary: StoreSummary,
}

/// One thing to do when its turn comes.
enum Step {
    Enter { name: Vec<u8>, meta: Metadata },
    Leave,
    Add(Box<TreeNode>),
    File { name: Vec<u8>, meta: Metadata, slot: Arc<Slot> },
}

struct WritingDirectory {
    name: Vec<u8>,
    meta: Metadata,
    writer: DirectoryWriter,
}

#[derive(Default)]
struct EnteredDirectory {
    parent: Option<ParentDirectory>,
    last_name: Option<Vec<u8>>,
}

impl StoreSink {
    pub(super) fn new(
        pipeline: Arc<Pipeline>,
        stores: Arc<Stores>,
        name: StoreName,
        parent: Option<Id>,
    ) -> Result<Self> {
        let parent = open_parent(&pipeline, parent)?;
        let top = WritingDirectory { name: Vec::new(), meta: Metadata::default(), writer: DirectoryWriter::default() };
        Ok(Self {
            pipeline,
            stores,
            name,
            counters: Arc::default(),
            line: VecDeque::new(),
            writing: vec![top],
            entered: vec![EnteredDirectory { parent, last_name: None }],
            summary: StoreSummary::default(),
        })
    }

    /// Waits for all content and ends the store's tree.
    pub fn finish(mut self) -> Result<StoreSummary> {
        if self.entered.len() != 1 {
            return Err(Error::internal("the drain ended inside a directory"));
        }
        self.take_line(0)?;
        let top = self.writing.pop().ok_or_else(|| Error::internal("the drain left its top folder"))?;
        let pipeline = self.pipeline.clone();
        let tree = top.writer.finish(&mut |json| pipeline.store_tree(json))?;
        self.summary.bytes_read = self.counters.bytes_read.load(Ordering::Relaxed);
        self.summary.bytes_stored = self.counters.bytes_stored.load(Ordering::Relaxed);
        self.stores.done(&self.name, tree);
        Ok(std::mem::take(&mut self.summary))
    }

    /// Checks a name that is about to be added.
    fn admit(&mut self, name: &[u8]) -> Result<()> {
        self.pipeline.failure.check()?;
        check_name(name)?;
        let here = self.here()?;
        if here.last_name.as_deref().is_some_and(|last| name <= last) {
            let shown = String::from_utf8_lossy(name).into_owned();
            return Err(Error::internal(format!("`{shown}` comes after a name that is not smaller")));
        }
        here.last_name = Some(name.to_vec());
        Ok(())
    }

    fn here(&mut self) -> Result<&mut EnteredDirectory> {
        self.entered.last_mut().ok_or_else(|| Error::internal("the drain left its top folder"))
    }

    fn parent_entry(&mut self, name: &[u8]) -> Result<Option<TreeNode>> {
        let pipeline = self.pipeline.clone();
        match &mut self.here()?.parent {
            Some(parent) => Ok(parent.find(&pipeline, name)?.cloned()),
            None => Ok(None),
        }
    }

    /// Whether all that the parent's entry needs is stored.
    fn is_whole(&self, entry: &TreeNode) -> bool {
        let known = &self.pipeline.known;
        entry.content.iter().all(|id| known.stored().contains(BlobKind::Data, id))
            && entry.subtree.iter().all(|id| known.is_whole() && known.stored().contains(BlobKind::Tree, id))
    }

    fn append(&mut self, step: Step) -> Result<()> {
        self.line.push_back(step);
        self.take_line(LINE_MAX)
    }

    /// Takes the line as far as it is ready, and waits until no more than `length_max` is left.
    fn take_line(&mut self, length_max: usize) -> Result<()> {
        while let Some(first) = self.line.front() {
            let ready = match first {
                Step::File { slot, .. } => slot.is_done(),
                _ => true,
            };
            if !ready && self.line.len() <= length_max {
                return Ok(());
            }
            let first = self.line.pop_front().expect("the line has a front");
            self.take(first)?;
        }
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Enter { name, meta } => {
                self.writing.push(WritingDirectory { name, meta, writer: DirectoryWriter::default() });
                Ok(())
            }
            Step::Leave => {
                let done = self.writing.pop().ok_or_else(|| Error::internal("the drain left its top folder"))?;
                let pipeline = self.pipeline.clone();
                let tree = done.writer.finish(&mut |json| pipeline.store_tree(json))?;
                let (kind, content, subtree) = (&NodeKind::Dir, &[][..], Some(tree));
                self.write(&Entry { name: &done.name, kind, meta: &done.meta, content, subtree })
            }
            Step::Add(entry) => self.write(&entry.as_entry()),
            Step::File { name, meta, slot } => {
                let finished = slot.wait(&self.pipeline.failure)?;
                if let ContentEnd::Torn(why) = finished.end {
                    self.summary.torn.push(Loss { what: self.path_of(&name), why });
                }
                self.summary.files += 1;
                self.summary.bytes += finished.bytes;
                let kind = NodeKind::File { size: finished.bytes };
                self.write(&Entry { name: &name, kind: &kind, meta: &meta, content: &finished.content, subtree: None })
            }
        }
    }

    fn write(&mut self, entry: &Entry<'_>) -> Result<()> {
        let pipeline = &self.pipeline;
        let directory = self.writing.last_mut().ok_or_else(|| Error::internal("the drain left its top folder"))?;
        directory.writer.push(entry, &mut |json| pipeline.store_tree(json))
    }

    fn path_of(&self, name: &[u8]) -> String {
        let names = self.writing.iter().skip(1).map(|directory| directory.name.as_slice()).chain([name]);
        names.map(String::from_utf8_lossy).collect::<Vec<_>>().join("/")
    }
}

impl Sink for StoreSink {
    fn enter(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        self.admit(name)?;
        let subtree = self.parent_entry(name)?.filter(|entry| entry.node.kind == NodeKind::Dir).and_then(|e| e.subtree);
        let parent = open_parent(&self.pipeline, subtree)?;
        self.entered.push(EnteredDirectory { parent, last_name: None });
        self.append(Step::Enter { name: name.to_vec(), meta: meta.clone() })
    }

    fn leave(&mut self) -> Result<()> {
        if self.entered.len() <= 1 {
            return Err(Error::internal("the drain left its top folder"));
        }
        self.entered.pop();
        self.append(Step::Leave)
    }

    fn file(&mut self, name: &[u8], meta: &Metadata, size_hint: Option<u64>, content: Box<dyn Content>) -> Result<()> {
        self.admit(name)?;
        let slot = Slot::new(self.counters.clone());
        let bytes_expected = size_hint.and_then(|size| usize::try_from(size).ok()).unwrap_or(usize::MAX);
        let job = Job { slot: slot.clone(), content, bytes_expected };
        self.pipeline.schedule.submit(job, &self.pipeline.failure)?;
        self.append(Step::File { name: name.to_vec(), meta: meta.clone(), slot })
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        if matches!(node.kind, NodeKind::File { .. } | NodeKind::Dir) {
            return Err(Error::internal("files and directories have calls of their own"));
        }
        self.admit(&node.name)?;
        self.append(Step::Add(Box::new(TreeNode { node: node.clone(), content: Vec::new(), subtree: None })))
    }

    fn parent(&mut self, name: &[u8]) -> Result<Option<Node>> {
        // What cannot be reused is as good as absent: the drain reads it anew.
        Ok(self.parent_entry(name)?.filter(|entry| self.is_whole(entry)).map(|entry| entry.node))
    }

    fn reuse(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        let missing = || {
            let shown = String::from_utf8_lossy(name).into_owned();
            Error::new(Kind::NotFound, format!("`{shown}` is not in the parent snapshot, or not whole"))
        };
        let mut entry = self.parent_entry(name)?.ok_or_else(missing)?;
        if !self.is_whole(&entry) {
            return Err(missing());
        }
        self.admit(name)?;
        if let NodeKind::File { size } = entry.node.kind {
            self.summary.files += 1;
            self.summary.bytes += size;
        }
        entry.node.meta = meta.clone();
        self.append(Step::Add(Box::new(entry)))
    }
}

/// A directory of the parent that is lost is stored anew, with all that lies below it. One that is
/// there and damaged is an error: what is written anew would be taken for stored already.
fn open_parent(pipeline: &Pipeline, blob: Option<Id>) -> Result<Option<ParentDirectory>> {
    let stored = pipeline.known.stored();
    let there = blob.filter(|blob| stored.contains(BlobKind::Tree, blob));
    there.map(|blob| ParentDirectory::open(pipeline, blob)).transpose()
}

impl Drop for StoreSink {
    fn drop(&mut self) {
        self.counters.abandoned.store(true, Ordering::Relaxed);
    }
}
