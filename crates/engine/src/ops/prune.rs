//! `prune`: frees what no point needs any more. Never decides which points are kept.

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_repo::PruneRequest;

use crate::open::Session;

/// Unused bytes that may stay, in percent of the used ones, when nothing else is said.
pub const UNUSED_PERCENT_DEFAULT: f64 = 5.0;

/// What `prune` did, or would do.
#[derive(Debug, Serialize)]
pub struct PruneSummary {
    /// Where the bucket is.
    pub bucket: String,
    /// Whether nothing was done but looking.
    pub dry_run: bool,
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Packs rewritten.
    pub packs_rewritten: u64,
    /// Bytes freed.
    pub bytes_freed: u64,
}

/// Prunes the repository.
///
/// # Errors
/// `Locked` while a backup of ours or of restic runs.
pub fn run(session: &Session, dry_run: bool, max_unused_percent: f64, context: &Context) -> Result<PruneSummary> {
    let request = PruneRequest { dry_run, max_unused_percent, ..PruneRequest::default() };
    let report = session.repository().prune(&request, context)?;
    Ok(PruneSummary {
        bucket: session.bucket().location(),
        dry_run,
        packs_deleted: report.packs_deleted,
        packs_rewritten: report.packs_rewritten,
        bytes_freed: report.bytes_freed,
    })
}
