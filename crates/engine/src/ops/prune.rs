//! `prune`: frees what no point needs any more. Never decides which points are kept.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;
use stillpoint_core::id::RunId;
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::depot::WriteMode;
use stillpoint_repo::{PruneRequest, Snapshot};

use crate::effects::authenticate;
use crate::journal::{self, OldCopies};
use crate::lease;
use crate::open::Session;
use crate::points;

/// How long a snapshot without a point is left alone: its run may still be at work on the commit.
const ABANDONED_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// How long the journal of a run that ended is kept for people, in the bucket.
const JOURNALS_KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);

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
    /// Bytes freed: deleted less written.
    pub bytes_freed: u64,
    /// Bytes that points need.
    pub bytes_used: u64,
    /// Bytes that nothing needs and that stay, as the limit allows.
    pub bytes_unused: u64,
    /// What an object lock keeps from being deleted; a later prune gets it.
    pub kept_by_object_lock: Vec<String>,
    /// Snapshots of runs that died before their point was made, removed now.
    pub abandoned: Vec<String>,
    /// Runs that ended long ago and whose journals were removed.
    pub journals: Vec<RunId>,
    /// Old journals that cannot be believed, with why; they stay.
    pub journals_unreadable: Vec<String>,
}

/// Prunes the repository.
///
/// # Errors
/// `Locked` while a backup of ours or of restic runs.
pub fn run(
    session: &Session,
    dry_run: bool,
    max_unused_percent: f64,
    now: Timestamp,
    context: &Context,
) -> Result<PruneSummary> {
    // Read first: what cannot be read must not spoil the report of what was deleted.
    let spared = lease::runs_in_leases(session.bucket());
    let abandoned = abandoned(session, now)?;
    if !dry_run {
        give_up(session, &abandoned)?;
    }
    let abandoned = abandoned.into_iter().map(|snapshot| snapshot.id.to_string()).collect();
    let request = PruneRequest { dry_run, max_unused_percent };
    let mut report = session.repository().prune(&request, context)?;
    let journals = match spared {
        Ok(spared) => old_journals(session, &spared, dry_run, now)?,
        Err(error) => OldCopies { unreadable: vec![("*".to_owned(), error.to_string())], ..OldCopies::default() },
    };
    report.kept_by_object_lock.extend(journals.locked);
    let unreadable = journals.unreadable.into_iter();
    Ok(PruneSummary {
        bucket: session.bucket().location(),
        dry_run,
        packs_deleted: report.packs_deleted,
        packs_rewritten: report.packs_rewritten,
        bytes_freed: report.bytes_freed,
        bytes_used: report.bytes_used,
        bytes_unused: report.bytes_unused,
        kept_by_object_lock: report.kept_by_object_lock,
        abandoned,
        journals: journals.removed,
        journals_unreadable: unreadable.map(|(run, why)| format!("journal/{run}/: {why}")).collect(),
    })
}

/// Removes the journals of runs that ended long ago, but for those that a lease names.
fn old_journals(session: &Session, spared: &BTreeSet<RunId>, dry_run: bool, now: Timestamp) -> Result<OldCopies> {
    let before = SystemTime::from(now).checked_sub(JOURNALS_KEPT).unwrap_or(SystemTime::UNIX_EPOCH);
    journal::forget_ended_copies(session.bucket().as_ref(), &authenticate(session), spared, before, dry_run)
}

/// Snapshots of ours that have no point and are old enough.
fn abandoned(session: &Session, now: Timestamp) -> Result<Vec<Snapshot>> {
    let mut found = Vec::new();
    for snapshot in session.repository().snapshots()? {
        let ours = snapshot.tags.iter().any(|tag| tag == "stillpoint");
        if ours && now.duration_since(made(session, &snapshot)?) > ABANDONED_AFTER && !has_point(session, &snapshot)? {
            found.push(snapshot);
        }
    }
    Ok(found)
}

/// When the snapshot came here: a copy's own time is that of its original.
fn made(session: &Session, snapshot: &Snapshot) -> Result<Timestamp> {
    let written = session.repository().snapshot_written(&snapshot.id)?.and_then(|at| Timestamp::try_from(at).ok());
    Ok(written.map_or(snapshot.time, |written| written.max(snapshot.time)))
}

/// Whether anything but the mark of a lost run lies where the snapshot's point would be, readable
/// or not: what cannot be read may be mended.
fn has_point(session: &Session, snapshot: &Snapshot) -> Result<bool> {
    let Some(point) = point_of(snapshot) else { return Ok(false) };
    match session.bucket().read(&points::object_name(point)) {
        Ok((bytes, _)) => Ok(!Statefile::is_void(&bytes)),
        Err(error) if error.kind() == Kind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn point_of(snapshot: &Snapshot) -> Option<&str> {
    snapshot.tags.iter().find_map(|tag| tag.strip_prefix("point:"))
}

/// Takes the place of each commit before its snapshot goes, so that a run that wakes up after a day
/// cannot commit a point without data.
fn give_up(session: &Session, abandoned: &[Snapshot]) -> Result<()> {
    let nobody = RunId::from_random([0; 8]);
    let mut gone = Vec::new();
    for snapshot in abandoned {
        let taken = match point_of(snapshot) {
            Some(point) => {
                let mark = Statefile::void_mark(&nobody);
                match session.bucket().write(&points::object_name(point), &[&mark], &WriteMode::Create) {
                    Ok(_) => true,
                    Err(error) if error.kind() == Kind::AlreadyExists => !has_point(session, snapshot)?,
                    Err(error) => return Err(error),
                }
            }
            None => true,
        };
        if taken {
            gone.push(snapshot.id.clone());
        }
    }
    session.repository().forget(&gone)
}
