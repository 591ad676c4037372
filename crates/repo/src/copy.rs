//! Replicates snapshots to another repository.

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Result};

use crate::{Repository, SnapshotId};

/// What a copy did.
#[derive(Debug, Clone, Default)]
pub struct CopyReport {
    /// The id of each snapshot at the source and at the target.
    pub snapshots: Vec<(SnapshotId, SnapshotId)>,
    /// Bytes written to the target.
    pub bytes_stored: u64,
}

impl Repository {
    /// Copies `snapshots` and all that they need to `target`.
    pub fn copy_to(&self, _target: &Repository, _snapshots: &[SnapshotId], _context: &Context) -> Result<CopyReport> {
        Err(Error::internal("not built yet"))
    }
}
