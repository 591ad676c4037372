//! `list`: the points of a bucket, newest first.

use jiff::Timestamp;
use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::id::{EnvironmentName, PlatformName, PointId};
use stillpoint_core::statefile::{Level, Statefile, Verdict};

use crate::open::Session;
use crate::points;

/// What `list` found.
#[derive(Debug, Serialize)]
pub struct ListReport {
    /// Where the bucket is.
    pub bucket: String,
    /// Whose points these are; `None` when all platforms were asked for.
    pub platform: Option<PlatformName>,
    /// Their environment; `None` when all were asked for.
    pub environment: Option<EnvironmentName>,
    /// Authenticated points, newest first.
    pub points: Vec<PointLine>,
    /// What lies where a point should and cannot be believed.
    pub damaged: Vec<DamagedPoint>,
    /// Points of other platforms or environments that were left out.
    pub others: usize,
}

/// One point in a list.
#[derive(Debug, Serialize)]
pub struct PointLine {
    /// Its id.
    pub point: PointId,
    /// Its platform.
    pub platform: PlatformName,
    /// Its environment.
    pub environment: EnvironmentName,
    /// The moment it shows.
    pub cut_at: Timestamp,
    /// What it is worth.
    pub verdict: Verdict,
    /// How consistent it is.
    pub level: Level,
    /// How many stores it holds.
    pub stores: usize,
    /// Bytes it holds.
    pub bytes: u64,
    /// Bytes it added to the bucket.
    pub bytes_stored: u64,
}

/// A point that cannot be believed.
#[derive(Debug, Serialize)]
pub struct DamagedPoint {
    /// The name of its folder.
    pub point: String,
    /// Why it cannot be believed.
    pub reason: String,
}

impl From<&Statefile> for PointLine {
    fn from(point: &Statefile) -> Self {
        Self {
            point: point.point.clone(),
            platform: point.platform.clone(),
            environment: point.environment.clone(),
            cut_at: point.cut_at,
            verdict: point.verdict,
            level: point.level,
            stores: point.stores.len(),
            bytes: point.totals.bytes,
            bytes_stored: point.totals.bytes_stored,
        }
    }
}

/// Lists the points of the session's platform and environment, or of `all` in the bucket.
pub fn run(session: &Session, all: bool) -> Result<ListReport> {
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    let platform = session.platform();
    let chosen: Vec<PointLine> = match all {
        true => listing.points.iter().map(PointLine::from).collect(),
        false => listing.of(&platform.platform, &platform.environment).map(PointLine::from).collect(),
    };
    Ok(ListReport {
        bucket: session.bucket().location(),
        platform: (!all).then(|| platform.platform.clone()),
        environment: (!all).then(|| platform.environment.clone()),
        others: listing.points.len() - chosen.len(),
        points: chosen,
        damaged: listing
            .damaged
            .into_iter()
            .map(|(point, error)| DamagedPoint { point, reason: error.to_string() })
            .collect(),
    })
}
