//! The restic format 2 repository: written and read by our own hot path, kept in a [`depot`].
//!
//! What others need is re-exported here; the rooms behind are private. `format` knows bytes and
//! performs no I/O, `backup` writes, `tree`, `restore` and `check` read, `prune`, `copy` and `keys`
//! maintain. docs/formats.md describes what lies in the bucket.

mod backup;
mod check;
mod chunk;
mod compress;
mod copy;
mod crypto;
pub mod depot;
pub mod format;
mod index;
mod key;
mod keys;
mod lock;
mod pack;
mod prune;
mod repository;
mod restore;
mod simd;
mod tree;
mod unpacked;

pub use backup::{Backup, BackupOptions, BackupSummary, Compression, SnapshotMeta, StoreSink, StoreSummary};
pub use check::{CheckReport, CheckRequest, Data, Suffering};
pub use copy::CopyReport;
pub use format::id::Id;
pub use format::snapshot::{Snapshot, SnapshotId};
pub use key::{KeyFile, Unlock};
pub use keys::{KeyInfo, recovery_sheet};
pub use prune::{PruneReport, PruneRequest};
pub use repository::{InitOptions, Repository};
