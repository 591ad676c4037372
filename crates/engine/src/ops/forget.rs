//! `forget`: lets go of points by the rules, or by name. Never of the newest restorable one.
//!
//! Frees nothing by itself: `prune` does. A point ends with its statefile, which goes first; what
//! an interruption leaves behind is an unused snapshot, which `prune` collects.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::PointId;
use stillpoint_core::platform::RetentionPolicy;
use stillpoint_core::retention::{self, Candidate, Decision};
use stillpoint_core::statefile::{Statefile, Verdict};
use stillpoint_repo::SnapshotId;
use stillpoint_repo::depot::Depot;

use crate::open::Session;
use crate::points;

/// Where the time zones of the system are.
const ZONES: &str = "/usr/share/zoneinfo";

/// What to forget.
#[derive(Debug, Clone, Default)]
pub struct ForgetRequest {
    /// Points by name; the platform's retention decides if empty.
    pub points: Vec<String>,
    /// Decide, and do nothing.
    pub dry_run: bool,
}

/// What `forget` decided and did.
#[derive(Debug, Serialize)]
pub struct ForgetReport {
    /// Where the bucket is.
    pub bucket: String,
    /// Whether nothing was done but deciding.
    pub dry_run: bool,
    /// Every point of the platform's environment, newest first, with why it is kept.
    pub decisions: Vec<Decision>,
    /// Points that were forgotten, or would be.
    pub forgotten: Vec<PointId>,
}

/// Decides, and forgets unless it is a dry run.
///
/// # Errors
/// `Config` without rules, with a zone that is unknown, or if a point that is named is another
/// platform's or environment's; `Unproven` if a point that is named is
/// the newest restorable one; `Corrupt` if a point is damaged: what it is worth cannot be told.
pub fn run(session: &Session, request: &ForgetRequest, now: Timestamp) -> Result<ForgetReport> {
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    let platform = session.platform();
    let points: Vec<&Statefile> = listing.of(&platform.platform, &platform.environment).collect();
    let decisions = if request.points.is_empty() {
        if let Some((name, error)) = listing.damaged.first() {
            return Err(Error::new(error.kind(), format!("the point `{name}` cannot be read: {}", error.message()))
                .hint("points are forgotten by rule only if all can be read; name those that may go"));
        }
        by_rule(session, &points, now)?
    } else {
        let named = request
            .points
            .iter()
            .map(|name| {
                let point = listing.find(name, &platform.platform, &platform.environment)?;
                if points.iter().any(|ours| ours.point == point.point) {
                    Ok(point.point.clone())
                } else {
                    Err(foreign(point))
                }
            })
            .collect::<Result<Vec<PointId>>>()?;
        let newest = listing.newest(&platform.platform, &platform.environment).or(points.first().copied());
        // A point of some stores only is all that these have, if it is newer.
        let restorable = points.iter().find(|point| point.verdict == Verdict::Restorable).copied();
        by_name(&points, &[newest, restorable], &named)?
    };
    let leaving: Vec<&Statefile> = decisions
        .iter()
        .filter(|decision| !decision.keeps())
        .filter_map(|decision| points.iter().find(|point| point.point == decision.point).copied())
        .collect();
    if !request.dry_run {
        forget(session, &leaving)?;
    }
    Ok(ForgetReport {
        bucket: session.bucket().location(),
        dry_run: request.dry_run,
        forgotten: leaving.iter().map(|point| point.point.clone()).collect(),
        decisions,
    })
}

fn by_rule(session: &Session, points: &[&Statefile], now: Timestamp) -> Result<Vec<Decision>> {
    let Some(policy) = &session.platform().retention else {
        return Err(Error::new(Kind::Config, "platform.yaml has no `retention`, so nothing is ever forgotten")
            .hint("add for example `retention: { last: 3, daily: 7, weekly: 5, monthly: 12 }`, or name the points"));
    };
    let zone = zone(policy)?;
    let stores = &session.platform().stores;
    let candidates: Vec<Candidate> = points
        .iter()
        .map(|point| Candidate {
            point: point.point.clone(),
            at: point.cut_at,
            verdict: point.verdict,
            // A store that was added to the platform later does not make older points partial.
            whole: point.is_whole() && point.stores.len() >= known_then(points, point, stores.len()),
        })
        .collect();
    retention::decide(policy, &candidates, now, &|at| at.to_zoned(zone.clone()).datetime())
}

/// How many stores a whole point had at that time: as many as the richest point up to it, at most
/// as many as there are now.
fn known_then(points: &[&Statefile], point: &Statefile, now: usize) -> usize {
    let until = points.iter().filter(|other| other.cut_at <= point.cut_at);
    until.map(|other| other.stores.len()).max().unwrap_or(now).min(now)
}

/// The bucket may hold points of others, with rules of their own.
fn foreign(point: &Statefile) -> Error {
    let message = format!("the point `{}` belongs to `{}` · `{}`", point.point, point.platform, point.environment);
    Error::new(Kind::Config, message).hint("nothing was forgotten; forget it with the configuration of its platform")
}

fn by_name(points: &[&Statefile], newest: &[Option<&Statefile>], named: &[PointId]) -> Result<Vec<Decision>> {
    if let Some(newest) = newest.iter().flatten().find(|newest| named.contains(&newest.point)) {
        return Err(Error::new(Kind::Unproven, format!("`{}` is the newest restorable point", newest.point))
            .hint("make a newer one first: `stillpoint backup`"));
    }
    let decide = |point: &&Statefile| Decision {
        point: point.point.clone(),
        at: point.cut_at,
        reasons: if named.contains(&point.point) { Vec::new() } else { vec!["not named".to_owned()] },
    };
    Ok(points.iter().map(decide).collect())
}

/// The zone in which hours and days begin, from the system's own table.
fn zone(policy: &RetentionPolicy) -> Result<TimeZone> {
    let name = policy.time_zone.as_deref().unwrap_or("UTC");
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    let unknown = || {
        Error::new(Kind::Config, format!("the time zone `{name}` is not known on this machine"))
            .hint("an IANA name such as Europe/Berlin; Debian has them in the package tzdata")
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_+-".contains(c);
    if !name.chars().all(plain) || name.starts_with('/') {
        return Err(unknown());
    }
    let data = std::fs::read(format!("{ZONES}/{name}")).map_err(|error| unknown().source(error))?;
    TimeZone::tzif(name, &data).map_err(|error| unknown().source(error))
}

fn forget(session: &Session, leaving: &[&Statefile]) -> Result<()> {
    let bucket = session.bucket().as_ref();
    for point in leaving {
        bucket.delete(&points::object_name(point.point.as_str()))?;
        delete_all(bucket, &format!("points/{}/", point.point))?;
    }
    let snapshots = leaving.iter().map(|point| SnapshotId::parse(&point.snapshot)).collect::<Result<Vec<_>>>()?;
    session.repository().forget(&snapshots)
}

fn delete_all(bucket: &dyn Depot, prefix: &str) -> Result<()> {
    let mut names = Vec::new();
    bucket.list(prefix, &mut |object| {
        names.push(object.name);
        Ok(true)
    })?;
    names.iter().try_for_each(|name| bucket.delete(name))
}
