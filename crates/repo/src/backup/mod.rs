//! Writes a snapshot: several stores at once, every core at work, memory bounded.
//!
//! A drain hands its tree to a `sink`, which queues the contents at the `schedule`. The threads of
//! `worker` read, cut, hash, compress, seal and pack them, and tell each file's `slot` what became of
//! it; the `sink` writes directories in order behind them. `outlet` writes packs and index files.
//!
//! Order of writes: packs, then the index files that name them, then the snapshot. Whatever is
//! killed in between leaves packs that nothing names, or index files that no snapshot needs: the
//! next backup uses them, the next prune deletes them.

mod failure;
mod known;
mod outlet;
mod parent;
mod pipeline;
mod schedule;
mod sink;
mod slot;
mod stores;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{FileTime, Metadata, NodeKind, Tree};

use crate::format::snapshot::{Snapshot, SnapshotJson};
use crate::format::tree::Entry;
use crate::format::tree_write::DirectoryWriter;
use crate::lock::{HeldLock, Mode};
use crate::tree::StoredTree;
use crate::unpacked::FileKind;
use crate::{Id, Repository, SnapshotId};

use failure::Failure;
use outlet::Outlet;
use pipeline::{Pipeline, Plan};
pub use sink::StoreSink;
use stores::Stores;

/// Whether blobs are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// zstd with parameters chosen file by file; what does not compress is stored as it is.
    #[default]
    Auto,
    /// Nothing but trees and index files is compressed.
    None,
}

/// How a backup is made.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// What the pipeline may hold in memory, in bytes, beside the index. Less than 32 MiB is taken
    /// for 32 MiB.
    pub memory_bytes_max: u64,
    /// Threads that cut, hash, compress and encrypt; 0 for one each core.
    pub threads: usize,
    /// Whether blobs are compressed.
    pub compression: Compression,
    /// Stops the backup when cancelled.
    pub context: Context,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self { memory_bytes_max: 256 << 20, threads: 0, compression: Compression::Auto, context: Context::default() }
    }
}

/// What the snapshot says of itself.
#[derive(Debug, Clone)]
pub struct SnapshotMeta {
    /// The time of the cut.
    pub time: jiff::Timestamp,
    /// Where.
    pub hostname: String,
    /// Labels: `stillpoint`, `point:<id>` and the like.
    pub tags: Vec<String>,
    /// What was backed up, as restic shows it.
    pub paths: Vec<String>,
}

/// What one store brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreSummary {
    /// Files in the tree, reused ones included.
    pub files: u64,
    /// Bytes of their content, reused ones included; those in reused directories are not counted.
    pub bytes: u64,
    /// Bytes of content that were read.
    pub bytes_read: u64,
    /// Bytes that this store's new blobs take in the depot.
    pub bytes_stored: u64,
    /// Streams that are not what the cut showed.
    pub torn: Vec<Loss>,
}

/// What a backup left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSummary {
    /// The new snapshot.
    pub snapshot: SnapshotId,
    /// Bytes written to the depot.
    pub bytes_stored: u64,
    /// New blobs, trees included.
    pub blobs_new: u64,
}

/// A backup under way. Several stores may be written at once, each through its own sink.
///
/// Dropped without [`Backup::finish`] it leaves packs that nothing refers to, for the next prune.
pub struct Backup {
    pipeline: Arc<Pipeline>,
    stores: Arc<Stores>,
    workers: Vec<JoinHandle<()>>,
    uploaders: Vec<JoinHandle<()>>,
    lock: Option<HeldLock>,
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backup({:?})", self.pipeline.repository)
    }
}

impl Backup {
    pub(crate) fn begin(repository: &Repository, options: BackupOptions) -> Result<Self> {
        let lock = HeldLock::acquire(repository, Mode::Shared)?;
        let cores = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let plan = Plan::new(options.memory_bytes_max, cores, repository.depot().waits());
        let failure = Arc::new(Failure::new(options.context.clone()));
        let (outlet, uploaders) = Outlet::new(repository, failure.clone(), plan.uploaders, plan.packs)?;
        let pipeline = Pipeline::new(repository, &options, failure, outlet.clone(), plan);
        let pipeline = Arc::new(pipeline.inspect_err(|_| outlet.close())?);
        let mut backup = Self { pipeline, stores: Arc::default(), workers: Vec::new(), uploaders, lock: Some(lock) };
        for number in 0..plan.workers + plan.spares {
            let pipeline = backup.pipeline.clone();
            let thread = std::thread::Builder::new().name(format!("backup-{number}"));
            let started = thread.spawn(move || worker::run(&pipeline, number));
            backup.workers.push(started.map_err(|error| Error::io("cannot start a thread", error))?);
        }
        Ok(backup)
    }

    /// Starts a store's top folder. `parent` is the store's tree in an earlier snapshot of the same
    /// repository, from [`Repository::tree`]; other trees are of no use and are passed over.
    pub fn store(&self, name: &StoreName, parent: Option<Arc<dyn Tree>>) -> Result<StoreSink> {
        self.pipeline.failure.check()?;
        let parent = parent.as_ref().and_then(|tree| tree.as_any()?.downcast_ref::<StoredTree>());
        let parent =
            parent.filter(|tree| tree.repository().id() == self.pipeline.repository.id()).map(StoredTree::root);
        self.stores.begin(name)?;
        StoreSink::new(self.pipeline.clone(), self.stores.clone(), name.clone(), parent).inspect_err(|_| {
            self.stores.forget(name);
        })
    }

    /// Writes what is left, the index and, last, the snapshot. All sinks must be finished.
    pub fn finish(mut self, meta: SnapshotMeta) -> Result<BackupSummary> {
        let trees = self.stores.trees()?;
        let pipeline = self.pipeline.clone();
        pipeline.schedule.close();
        join(&mut self.workers)?;
        pipeline.failure.check()?;
        let root = write_root(&pipeline, &trees)?;
        pipeline.write_rest()?;
        pipeline.outlet.close();
        join(&mut self.uploaders)?;
        pipeline.outlet.finish_index()?;
        self.lock.as_ref().map_or(Ok(()), HeldLock::check)?;
        let snapshot = Snapshot {
            id: SnapshotId(String::new()),
            time: meta.time,
            tree: root,
            paths: meta.paths,
            hostname: meta.hostname,
            username: "stillpoint".into(),
            tags: meta.tags,
            program_version: concat!("stillpoint ", env!("CARGO_PKG_VERSION")).into(),
        };
        let id = pipeline.repository.save(FileKind::Snapshot, &SnapshotJson::from(&snapshot).to_json())?;
        // From here on the snapshot exists. A lock that cannot be removed becomes stale by itself.
        if let Some(Err(error)) = self.lock.take().map(HeldLock::release) {
            tracing::warn!(%error, "the repository's lock could not be removed");
        }
        let (bytes_stored, blobs_new) = (pipeline.outlet.bytes_stored(), pipeline.outlet.blobs_new());
        Ok(BackupSummary { snapshot: id.into(), bytes_stored, blobs_new })
    }

    /// Stops the workers and lets go of the lock. What was written stays for the next prune.
    pub fn abandon(mut self) -> Result<()> {
        self.stop();
        self.lock.take().map_or(Ok(()), HeldLock::release)
    }

    /// Ends all threads, soon.
    fn stop(&mut self) {
        self.pipeline.failure.set(Error::new(stillpoint_core::Kind::Cancelled, "the backup was abandoned"));
        self.pipeline.schedule.close();
        self.pipeline.outlet.close();
        for thread in self.workers.drain(..).chain(self.uploaders.drain(..)) {
            // A panic was recorded as the failure already, and the backup is given up anyway.
            drop(thread.join());
        }
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.stop();
    }
}

fn join(threads: &mut Vec<JoinHandle<()>>) -> Result<()> {
    for thread in threads.drain(..) {
        thread.join().map_err(|_| Error::internal("a thread of the backup panicked"))?;
    }
    Ok(())
}

/// The snapshot's root: one folder for each store. The folders have no time of their own, so that
/// a backup without changes has the root of the one before.
fn write_root(pipeline: &Pipeline, trees: &[(StoreName, Id)]) -> Result<Id> {
    let meta = Metadata::folder(FileTime::default());
    let mut root = DirectoryWriter::default();
    for (name, tree) in trees {
        let name = name.as_str().as_bytes();
        let entry = Entry { name, kind: &NodeKind::Dir, meta: &meta, content: &[], subtree: Some(*tree) };
        root.push(&entry, &mut |json| pipeline.store_tree(json))?;
    }
    root.finish(&mut |json| pipeline.store_tree(json))
}
