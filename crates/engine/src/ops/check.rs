//! `check`: is the bucket sound? The repository's structure or data, and every point against it.

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;
use stillpoint_repo::{CheckRequest, Data, Suffering};

use crate::open::Session;
use crate::points::{self, Listing};

/// What `check` found.
#[derive(Debug, Serialize)]
pub struct CheckSummary {
    /// Where the bucket is.
    pub bucket: String,
    /// Everything that is wrong, for people. Empty means sound.
    pub errors: Vec<String>,
    /// The points that what is wrong concerns.
    pub suffering: Vec<SufferingPoint>,
    /// What is left over from failed runs and does no harm; `prune` collects it.
    pub leftovers: Vec<String>,
    /// Points whose statefile is authentic and whose data the repository knows.
    pub points: usize,
    /// Packs looked at.
    pub packs: u64,
    /// Pieces of data looked at.
    pub blobs: u64,
    /// Bytes read from the bucket.
    pub bytes_read: u64,
}

/// A point that cannot be restored whole.
#[derive(Debug, Serialize)]
pub struct SufferingPoint {
    /// The point's id, or the snapshot's if it belongs to no point.
    pub point: String,
    /// What is concerned, from the top: the first part is the store. At most 100.
    pub paths: Vec<String>,
    /// How many more there are.
    pub paths_more: u64,
}

impl SufferingPoint {
    /// A snapshot that cannot be read shows no tags; its point is found by its statefile.
    fn new(suffering: Suffering, listing: &Listing) -> Self {
        let point = suffering.tags.iter().find_map(|tag| tag.strip_prefix("point:")).map(str::to_owned);
        let by_statefile = || listing.points.iter().find(|point| point.snapshot == suffering.snapshot.0);
        let point = point.or_else(|| by_statefile().map(|point| point.point.to_string()));
        Self {
            point: point.unwrap_or_else(|| suffering.snapshot.to_string()),
            paths: suffering.paths,
            paths_more: suffering.paths_more,
        }
    }
}

/// Checks the bucket; `data` says how much content is re-read. Never reads a cache.
pub fn run(session: &Session, data: Data, context: &Context) -> Result<CheckSummary> {
    let request = CheckRequest { data, ..CheckRequest::default() };
    let report = session.repository().check(&request, context)?;
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    let ids = session.repository().snapshot_ids()?;
    let mut errors = report.errors;
    for (name, error) in &listing.damaged {
        errors.push(format!("point {name}: {error}"));
    }
    let mut sound = 0;
    for point in &listing.points {
        let suffers = |suffering: &Suffering| suffering.snapshot.0 == point.snapshot && suffering.paths.is_empty();
        if ids.iter().any(|id| id.0 == point.snapshot) {
            // One whose snapshot cannot be read is among the errors already.
            sound += usize::from(!report.suffering.iter().any(suffers));
        } else {
            errors.push(format!("point {}: its snapshot {} is not in the repository", point.point, point.snapshot));
        }
    }
    let mut leftovers = report.notes;
    for id in ids.iter().filter(|id| listing.points.iter().all(|point| point.snapshot != id.0)) {
        match session.repository().snapshot(id) {
            Ok(snapshot) if snapshot.tags.iter().any(|tag| tag == "stillpoint") => {
                leftovers.push(format!("snapshot {id} belongs to no point"));
            }
            Ok(_) => {}
            // Forgotten meanwhile, or damaged, which is among the errors already.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Corrupt | Kind::Unsupported) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(CheckSummary {
        bucket: session.bucket().location(),
        errors,
        suffering: report.suffering.into_iter().map(|suffering| SufferingPoint::new(suffering, &listing)).collect(),
        leftovers,
        points: sound,
        packs: report.packs,
        blobs: report.blobs,
        bytes_read: report.bytes_read,
    })
}
