//! Deletes what no snapshot needs.

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Result};

use crate::Repository;

/// What to prune.
#[derive(Debug, Clone, Default)]
pub struct PruneRequest {
    /// Say what would be done and do nothing.
    pub dry_run: bool,
    /// Unused bytes that may stay, in percent of the used ones.
    pub max_unused_percent: f64,
}

/// What a prune did.
#[derive(Debug, Clone, Default)]
pub struct PruneReport {
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Packs rewritten.
    pub packs_rewritten: u64,
    /// Bytes freed.
    pub bytes_freed: u64,
}

impl Repository {
    /// Deletes what no snapshot needs.
    pub fn prune(&self, _request: &PruneRequest, _context: &Context) -> Result<PruneReport> {
        Err(Error::internal("not built yet"))
    }
}
