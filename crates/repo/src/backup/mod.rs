//! Writes a snapshot: several stores at once, every core at work, memory bounded.

use std::sync::Arc;

use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{Content, Metadata, Node, Sink, Tree};

use crate::{Repository, SnapshotId};

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
#[derive(Debug)]
pub struct Backup {
    _repository: Repository,
}

impl Backup {
    pub(crate) fn begin(repository: &Repository, _options: BackupOptions) -> Result<Self> {
        Ok(Self { _repository: repository.clone() })
    }

    /// Starts a store's top folder. `parent` is the store's tree in an earlier snapshot of the same
    /// repository, from [`Repository::tree`]; other trees are of no use and are passed over.
    pub fn store(&self, _name: &StoreName, _parent: Option<Arc<dyn Tree>>) -> Result<StoreSink> {
        Err(Error::internal("not built yet"))
    }

    /// Writes what is left, the index and, last, the snapshot. All sinks must be finished.
    pub fn finish(self, _meta: SnapshotMeta) -> Result<BackupSummary> {
        Err(Error::internal("not built yet"))
    }

    /// Stops the workers and lets go of the lock. What was written stays for the next prune.
    pub fn abandon(self) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
}

/// Where one store's drain writes its tree.
pub struct StoreSink {
    _private: (),
}

impl StoreSink {
    /// Waits for all content and ends the store's tree.
    pub fn finish(self) -> Result<StoreSummary> {
        Err(Error::internal("not built yet"))
    }
}

impl Sink for StoreSink {
    fn enter(&mut self, _name: &[u8], _meta: &Metadata) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
    fn leave(&mut self) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
    fn file(&mut self, _: &[u8], _: &Metadata, _: Option<u64>, _: Box<dyn Content>) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
    fn node(&mut self, _node: &Node) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
    fn parent(&mut self, _name: &[u8]) -> Result<Option<Node>> {
        Err(Error::internal("not built yet"))
    }
    fn reuse(&mut self, _name: &[u8], _meta: &Metadata) -> Result<()> {
        Err(Error::internal("not built yet"))
    }
}
