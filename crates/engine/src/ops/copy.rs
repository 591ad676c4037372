//! `copy`: points to a second bucket, incrementally, verifying what is copied.
//!
//! The copy is a bucket of its own: its points are authenticated with its own key, so it stays
//! readable when the first bucket and its key are gone. A point is there only once its statefile is.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::PointId;
use stillpoint_core::platform::Secret;
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::depot::{self, Depot, WriteMode};
use stillpoint_repo::{InitOptions, Repository, SnapshotId};

use super::init;
use crate::open::{Session, repository_depot, unlock, unlock_from};
use crate::points;

/// Where to copy, and what.
#[derive(Debug, Clone, Default)]
pub struct CopyRequest {
    /// The target bucket's address.
    pub url: String,
    /// As `bucket.options` in `platform.yaml`.
    pub options: BTreeMap<String, String>,
    /// As `bucket.credentials`.
    pub credentials: BTreeMap<String, Secret>,
    /// What unlocks the target; the source's key if `None`.
    pub key: Option<Secret>,
    /// Points by id, prefix or `latest`; all of the platform's if empty.
    pub points: Vec<String>,
}

/// What `copy` did.
#[derive(Debug, Serialize)]
pub struct CopySummary {
    /// Where the points were read.
    pub from: String,
    /// Where they went.
    pub to: String,
    /// Whether the target was created.
    pub created: bool,
    /// Points that are new at the target, oldest first.
    pub copied: Vec<PointId>,
    /// Points that were there already.
    pub present: Vec<PointId>,
    /// Blobs that the target had lost although points there need them, and that were copied again.
    pub blobs_healed: u64,
    /// Bytes written to the target.
    pub bytes_stored: u64,
}

/// Copies points, oldest first, so that what is interrupted leaves the older ones whole.
pub fn run(session: &Session, request: &CopyRequest, context: &Context) -> Result<CopySummary> {
    let bucket = open_target(session, request)?;
    let (target, created) = open_repository(session, request, &bucket)?;
    if target.id() == session.repository().id() {
        return Err(Error::new(Kind::Config, "the target is the bucket that is copied from")
            .hint("name another address with --to"));
    }
    let chosen = choose(session, &request.points)?;
    let known = points::list(bucket.as_ref(), &target)?;
    if let Some((name, error)) =
        known.damaged.into_iter().find(|(name, _)| chosen.iter().any(|p| p.point.as_str() == name))
    {
        return Err(error.context("at the target, point", name));
    }
    let (present, missing): (Vec<_>, Vec<_>) =
        chosen.into_iter().partition(|point| known.points.iter().any(|there| there.point == point.point));
    let mut summary = CopySummary {
        from: session.bucket().location(),
        to: bucket.location(),
        created,
        copied: Vec::new(),
        present: present.iter().map(|point| point.point.clone()).collect(),
        blobs_healed: 0,
        bytes_stored: 0,
    };
    heal(session, &target, &present, &mut summary, context)?;
    for point in missing.into_iter().rev() {
        context.check()?;
        summary.bytes_stored += copy_one(session, &target, bucket.as_ref(), &point, context)?;
        summary.copied.push(point.point);
    }
    Ok(summary)
}

fn open_target(session: &Session, request: &CopyRequest) -> Result<Arc<dyn Depot>> {
    let secrets = &session.config().secrets;
    let credentials = request
        .credentials
        .iter()
        .map(|(name, secret)| Ok((name.clone(), secrets.resolve(secret)?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    depot::open(&request.url, &request.options, &credentials)
}

fn open_repository(session: &Session, request: &CopyRequest, bucket: &Arc<dyn Depot>) -> Result<(Repository, bool)> {
    let unlock = match &request.key {
        Some(secret) => unlock_from(&session.config().secrets, secret)?,
        None => unlock(session.config())?,
    };
    match Repository::open(repository_depot(bucket), &unlock) {
        Ok(repository) => Ok((repository, false)),
        Err(error) if error.kind() == Kind::NotFound => {
            // Cut alike, or nothing that is copied would ever match what is backed up there.
            let chunker_polynomial = Some(session.repository().chunker_polynomial());
            let options = InitOptions { chunker_polynomial, ..InitOptions::default() };
            let created = init::create_bucket(bucket, &unlock, &options)?;
            Ok((created.repository, true))
        }
        Err(error) => Err(error.hint("check the key of the target: --key env:NAME")),
    }
}

/// Newest first.
fn choose(session: &Session, names: &[String]) -> Result<Vec<Statefile>> {
    let platform = session.platform();
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    if names.is_empty() {
        // A copy that leaves out a point without saying so is a copy that nobody can trust.
        if let Some((name, error)) = listing.damaged.into_iter().next() {
            return Err(error.context("point", name).hint("name the points to copy, to leave this one out"));
        }
        let all = listing.points.into_iter();
        return Ok(all.filter(|p| p.platform == platform.platform && p.environment == platform.environment).collect());
    }
    let mut chosen: Vec<Statefile> = Vec::new();
    for name in names {
        let point = listing.find(name, &platform.platform, &platform.environment)?;
        if chosen.iter().all(|other| other.point != point.point) {
            chosen.push(point.clone());
        }
    }
    chosen.sort_by_key(|point| std::cmp::Reverse(point.cut_at));
    Ok(chosen)
}

/// Copies again what the target has lost of points that it should have.
fn heal(
    session: &Session,
    target: &Repository,
    present: &[Statefile],
    summary: &mut CopySummary,
    context: &Context,
) -> Result<()> {
    // The listing at the target was of the same points; here they name snapshots of the source.
    let snapshots = present.iter().map(|point| SnapshotId::parse(&point.snapshot)).collect::<Result<Vec<_>>>()?;
    if snapshots.is_empty() {
        return Ok(());
    }
    let report = session.repository().copy_to(target, &snapshots, context)?;
    summary.blobs_healed = report.blobs;
    summary.bytes_stored += report.bytes_stored;
    Ok(())
}

fn copy_one(
    session: &Session,
    target: &Repository,
    bucket: &dyn Depot,
    point: &Statefile,
    context: &Context,
) -> Result<u64> {
    let name = points::object_name(point.point.as_str());
    let mode = place(target, bucket, point, &name)?;
    let source = SnapshotId::parse(&point.snapshot)?;
    let report = session.repository().copy_to(target, std::slice::from_ref(&source), context)?;
    let (_, copied) = report
        .snapshots
        .iter()
        .find(|(from, _)| *from == source)
        .ok_or_else(|| Error::internal("a copy did not say what became of its snapshot"))?;
    let mut statefile = Statefile { snapshot: copied.to_string(), ..point.clone() };
    statefile.authentication = points::authentication(target, &statefile)?;
    let bytes = serde_json::to_vec_pretty(&statefile)
        .map_err(|error| Error::internal("a statefile does not serialize").source(error))?;
    bucket.write(&name, &[&bytes], &mode)?;
    Ok(report.bytes_stored)
}

/// How the point's place at the target is taken. After an interrupted copy a prune there may have
/// marked it as given up, and may be about to forget the snapshot that the copy had left: that one is
/// not built on, a new one is written.
fn place(target: &Repository, bucket: &dyn Depot, point: &Statefile, name: &str) -> Result<WriteMode> {
    let version = match bucket.read(name) {
        Ok((bytes, version)) if Statefile::is_void(&bytes) => version,
        // What else is there makes the write fail.
        Ok(_) => return Ok(WriteMode::Create),
        Err(error) if error.kind() == Kind::NotFound => return Ok(WriteMode::Create),
        Err(error) => return Err(error),
    };
    let tag = format!("point:{}", point.point);
    let left = target.snapshots()?.into_iter().filter(|snapshot| snapshot.tags.contains(&tag));
    target.forget(&left.map(|snapshot| snapshot.id).collect::<Vec<_>>())?;
    match version {
        Some(version) if bucket.capability().conditional_update => Ok(WriteMode::Update(version)),
        // Nobody but a copy of the same point writes here, and it writes as good a statefile.
        _ => Ok(WriteMode::Replace),
    }
}
