//! `check`: is the bucket sound? The repository's structure or data, and every point against it.

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_repo::{CheckRequest, Data, Suffering};

use crate::open::Session;
use crate::points;

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

impl From<Suffering> for SufferingPoint {
    fn from(suffering: Suffering) -> Self {
        let point = suffering.tags.iter().find_map(|tag| tag.strip_prefix("point:")).map(str::to_owned);
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
    let snapshots = session.repository().snapshots()?;
    let mut errors = report.errors;
    for (name, error) in &listing.damaged {
        errors.push(format!("point {name}: {error}"));
    }
    let mut sound = 0;
    for point in &listing.points {
        if snapshots.iter().any(|snapshot| snapshot.id.to_string() == point.snapshot) {
            sound += 1;
        } else {
            errors.push(format!("point {}: its snapshot {} is not in the repository", point.point, point.snapshot));
        }
    }
    let mut leftovers = report.notes;
    let unused = snapshots
        .iter()
        .filter(|snapshot| snapshot.tags.iter().any(|tag| tag == "stillpoint"))
        .filter(|snapshot| listing.points.iter().all(|point| point.snapshot != snapshot.id.to_string()))
        .map(|snapshot| format!("snapshot {} belongs to no point", snapshot.id));
    leftovers.extend(unused);
    Ok(CheckSummary {
        bucket: session.bucket().location(),
        errors,
        suffering: report.suffering.into_iter().map(SufferingPoint::from).collect(),
        leftovers,
        points: sound,
        packs: report.packs,
        blobs: report.blobs,
        bytes_read: report.bytes_read,
    })
}
