//! `verify`: re-reads what a point holds from the bucket, and proves it against the point's own words.

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::{CheckRequest, Data, SnapshotId};

use crate::open::Session;
use crate::points;

/// What `verify` found.
#[derive(Debug, Serialize)]
pub struct VerifyReport {
    /// The point, authenticated.
    pub statefile: Statefile,
    /// How much of its data was re-read, in percent.
    pub percent: f64,
    /// Everything that is wrong, for people. Empty means proven.
    pub errors: Vec<String>,
    /// What of the point is concerned: paths from the top, the first part is the store.
    pub suffering: Vec<String>,
    /// Bytes read from the bucket.
    pub bytes_read: u64,
}

/// Verifies the point that `name` means.
///
/// # Errors
/// Those of reading; what is wrong with the data is in the report.
pub fn run(session: &Session, name: &str, data: Data, context: &Context) -> Result<VerifyReport> {
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    let platform = session.platform();
    let statefile = listing.find(name, &platform.platform, &platform.environment)?.clone();
    let id = SnapshotId::parse(&statefile.snapshot)?;
    // Only this one: another point's damaged snapshot says nothing about this point.
    let snapshot = session.repository().snapshot(&id).map_err(|error| match error.kind() {
        Kind::NotFound => Error::new(Kind::Corrupt, format!("the snapshot {id} of the point is not in the repository"))
            .context("point", &statefile.point)
            .hint("someone forgot it with another tool; older points are not concerned"),
        _ => error.context("point", &statefile.point),
    })?;
    let mut errors = Vec::new();
    for store in statefile.stores.keys() {
        if session.repository().tree(&snapshot.id, Some(store))?.is_none() {
            errors.push(format!("store `{store}`: its folder is not in the snapshot"));
        }
    }
    let request = CheckRequest { data, snapshots: Some(vec![snapshot.id.clone()]) };
    let report = session.repository().check(&request, context)?;
    errors.extend(report.errors);
    let percent = match data {
        Data::None => 0.0,
        Data::All => 100.0,
        Data::Sample { percent, .. } => percent,
    };
    let suffering = report.suffering.into_iter().flat_map(|suffering| suffering.paths).collect();
    Ok(VerifyReport { statefile, percent, errors, suffering, bytes_read: report.bytes_read })
}
