//! Who works on a platform now: `leases/<platform>.json`, with a number that grows with every holder.
//!
//! Time never decides about a point. A lease that looks expired is taken over at once by raising its
//! number; whoever takes over first occupies the name that the old holder would commit its point
//! to ([`Statefile::void_mark`]), so of an engine that was only slow and its successor exactly one
//! can write it. Clocks that disagree, or jump, can therefore cost a run, never correctness.
//!
//! The lease is renewed from a thread of its own. Losing it is reported through
//! [`Lease::lost`]; [`Lease::check`] asks the bucket itself, right before the commit.

mod register;

use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::{PlatformName, PointId, RunId};
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::depot::{Depot, WriteMode};
use tokio::sync::watch;

use crate::clock::Clock;
use crate::journal::whole_seconds;
use register::{Entry, Register};

/// The schema of a lease.
pub const SCHEMA: &str = "stillpoint.dev/lease/v1";

/// Where the leases lie in a bucket.
const FOLDER: &str = "leases/";

/// How long a lease lasts without being renewed, in seconds.
pub const LEASE_SECONDS: i64 = 60;

/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(15);

/// How often taking the lease is tried while others take it at the same moment.
const RACES_MAX: u32 = 5;

/// Who holds a lease, and for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The run.
    pub run: RunId,
    /// The point that the run will commit, if it makes one.
    pub point: Option<PointId>,
    /// What it does, as the operator would say it: `backup`.
    pub purpose: String,
    /// The host.
    pub host: String,
    /// The process on that host.
    pub process: u32,
}

/// A run whose lease was taken over and whose remains are not yet cleaned up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// The run; its journal may be in the bucket.
    pub run: RunId,
    /// The point that it would have committed.
    pub point: Option<PointId>,
    /// Where it ran.
    pub host: String,
}

/// What lies in the bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The platform.
    pub platform: PlatformName,
    /// Grows by one with every holder.
    pub fencing: u64,
    /// The holder; `None` once it gave the lease back.
    pub holder: Option<Holder>,
    /// When the holder took it.
    pub since: Timestamp,
    /// When it counts as given up, by the holder's clock.
    pub expires_at: Timestamp,
    /// Runs that died or were taken over, and nobody has cleaned up after yet.
    #[serde(default)]
    pub unfinished: Vec<Unfinished>,
}

/// What is asked of [`Lease::acquire`].
pub struct LeaseRequest<'a> {
    /// The bucket, whole.
    pub bucket: Arc<dyn Depot>,
    /// The platform.
    pub platform: &'a PlatformName,
    /// Who asks.
    pub holder: Holder,
    /// The clock that labels the lease.
    pub clock: Arc<dyn Clock>,
    /// Whether an engine is known to be dead, because it ran on this machine.
    pub is_dead: &'a dyn Fn(&Holder) -> bool,
    /// Take the lease although it looks alive. Safe for every point; the other run fails.
    pub take_over: bool,
}

/// A lease that is held and being renewed. Dropping it stops the renewal without giving it back.
#[derive(Debug)]
pub struct Lease {
    shared: Arc<Shared>,
    lost: watch::Receiver<Option<String>>,
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    register: Register,
    clock: Arc<dyn Clock>,
    fencing: u64,
    run: RunId,
    current: Mutex<Entry>,
}

impl Lease {
    /// Takes the lease, or says who has it (`Locked`). Blocks on the bucket.
    ///
    /// The runs in [`unfinished`](Self::unfinished) can no longer commit a point when this returns.
    pub fn acquire(request: &LeaseRequest<'_>) -> Result<Self> {
        let register = Register::new(Arc::clone(&request.bucket), request.platform);
        for _ in 0..RACES_MAX {
            let found = register.read()?;
            let record = next_record(request, found.as_ref())?;
            match register.swap(found.as_ref(), record) {
                Ok(entry) => {
                    void_points(request.bucket.as_ref(), &entry.record)?;
                    return Self::hold(register, request, entry);
                }
                Err(error) if matches!(error.kind(), Kind::Conflict | Kind::AlreadyExists) => {}
                Err(error) => return Err(error.operation("take the lease")),
            }
        }
        Err(Error::new(Kind::Locked, format!("other engines take the lease of `{}` all the time", request.platform))
            .hint("see which engines use this bucket for this platform; one is enough"))
    }

    fn hold(register: Register, request: &LeaseRequest<'_>, entry: Entry) -> Result<Self> {
        let shared = Arc::new(Shared {
            register,
            clock: Arc::clone(&request.clock),
            fencing: entry.record.fencing,
            run: request.holder.run.clone(),
            current: Mutex::new(entry),
        });
        let (stop, stopped) = channel();
        let (report, lost) = watch::channel(None);
        let renewing = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(RENEW_EVERY) {
                    // Anything but a lost lease may pass; the check before the commit decides.
                    if let Err(error) = renewing.renew()
                        && error.kind() == Kind::Locked
                    {
                        report.send_replace(Some(error.to_string()));
                        return;
                    }
                }
            })
            .map_err(|error| Error::io("cannot start the thread that renews the lease", error))?;
        Ok(Self { shared, lost, stop: Some(stop), thread: Some(thread) })
    }

    /// The number of this lease.
    pub fn fencing(&self) -> u64 {
        self.shared.fencing
    }

    /// Runs of other machines that were taken over and still have to be cleaned up after.
    pub fn unfinished(&self) -> Vec<Unfinished> {
        self.shared.lock().record.unfinished.clone()
    }

    /// Becomes `Some(reason)` when the lease is lost.
    pub fn lost(&self) -> watch::Receiver<Option<String>> {
        self.lost.clone()
    }

    /// Asks the bucket whether the lease is still ours; `Locked` if not. Blocks.
    pub fn check(&self) -> Result<()> {
        self.shared.check()
    }

    /// Writes that nothing is left to clean up after `run`. Blocks.
    pub fn mark_cleaned(&self, run: &RunId) -> Result<()> {
        self.shared.change(|record| record.unfinished.retain(|unfinished| unfinished.run != *run))
    }

    /// Gives the lease back. Without effect if it was lost. Blocks.
    pub fn release(mut self) -> Result<()> {
        self.stop_thread();
        match self.shared.change(|record| record.holder = None) {
            Err(error) if error.kind() == Kind::Locked => Ok(()),
            other => other,
        }
    }

    fn stop_thread(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread that renews the lease had panicked");
        }
    }
}

/// Gives back the lease of a run whose engine is known to be dead. Without effect if the run does
/// not hold it. Blocks.
pub fn release_dead(bucket: Arc<dyn Depot>, platform: &PlatformName, run: &RunId) -> Result<()> {
    let register = Register::new(bucket, platform);
    let Some(entry) = register.read()? else { return Ok(()) };
    let held = entry.record.holder.as_ref().is_some_and(|holder| holder.run == *run);
    if !held && !entry.record.unfinished.iter().any(|unfinished| unfinished.run == *run) {
        return Ok(());
    }
    let mut record = entry.record.clone();
    record.unfinished.retain(|unfinished| unfinished.run != *run);
    if held {
        record.holder = None;
    }
    match register.swap(Some(&entry), record) {
        // Somebody else took it meanwhile, and has taken note of the dead run.
        Err(error) if matches!(error.kind(), Kind::Conflict | Kind::AlreadyExists) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// The runs that any lease of the bucket names: those that hold one, and those that somebody still has
/// to clean up after. Blocks.
///
/// # Errors
/// `Corrupt` or `Unsupported` if a lease cannot be read: then nobody knows whose runs are over.
pub fn runs_in_leases(bucket: &Arc<dyn Depot>) -> Result<BTreeSet<RunId>> {
    let mut platforms = Vec::new();
    bucket.list(FOLDER, &mut |object| {
        let platform = object.name.strip_prefix(FOLDER).and_then(|rest| rest.strip_suffix(".json"));
        platforms.extend(platform.and_then(|platform| PlatformName::new(platform).ok()));
        Ok(true)
    })?;
    let mut runs = BTreeSet::new();
    for platform in platforms {
        let Some(Entry { record, .. }) = Register::new(Arc::clone(bucket), &platform).read()? else { continue };
        runs.extend(record.holder.map(|holder| holder.run));
        runs.extend(record.unfinished.into_iter().map(|unfinished| unfinished.run));
    }
    Ok(runs)
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop_thread();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Entry> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renew(&self) -> Result<()> {
        self.change(|_| {})
    }

    /// Changes our own record, which also renews it.
    fn change(&self, change: impl Fn(&mut LeaseRecord)) -> Result<()> {
        let mut current = self.lock();
        for _ in 0..2 {
            let mut record = current.record.clone();
            change(&mut record);
            record.expires_at = expiry(self.clock.utc());
            match self.register.swap(Some(&*current), record) {
                Ok(entry) => {
                    *current = entry;
                    return Ok(());
                }
                // An answer of an earlier renewal was lost, or the lease is: look.
                Err(error) if matches!(error.kind(), Kind::Conflict | Kind::AlreadyExists) => {
                    *current = self.still_ours()?;
                }
                Err(error) => return Err(error.operation("renew the lease")),
            }
        }
        Err(Error::new(Kind::Conflict, "the lease changes under our hands").temporary())
    }

    fn check(&self) -> Result<()> {
        self.still_ours().map(|_| ())
    }

    fn still_ours(&self) -> Result<Entry> {
        let found = self.register.read()?;
        let ours = |record: &LeaseRecord| {
            record.fencing == self.fencing && record.holder.as_ref().is_some_and(|holder| holder.run == self.run)
        };
        match found {
            Some(entry) if ours(&entry.record) => Ok(entry),
            Some(entry) => Err(lost_to(&entry.record)),
            None => Err(Error::new(Kind::Locked, "the lease was removed from the bucket while the run held it")
                .hint("start the backup again; leave `leases/` to stillpoint")),
        }
    }
}

fn lost_to(record: &LeaseRecord) -> Error {
    let who = match &record.holder {
        Some(holder) => format!("run {} on {}, process {}", holder.run, holder.host, holder.process),
        None => "another run, which has ended".to_owned(),
    };
    Error::new(Kind::Locked, format!("the lease was taken over by {who}, since {}", whole_seconds(record.since)))
        .hint("this run cannot make a point any more; the other one can")
}

fn expiry(now: Timestamp) -> Timestamp {
    now.checked_add(SignedDuration::from_secs(LEASE_SECONDS)).unwrap_or(Timestamp::MAX)
}

/// The record that the asker would write over what was found, or why it may not.
fn next_record(request: &LeaseRequest<'_>, found: Option<&Entry>) -> Result<LeaseRecord> {
    let now = request.clock.utc();
    let mut unfinished = Vec::new();
    let mut fencing = 1;
    if let Some(Entry { record, .. }) = found {
        unfinished.clone_from(&record.unfinished);
        fencing = record.fencing + 1;
        if let Some(holder) = &record.holder {
            let free = request.take_over || now > record.expires_at || (request.is_dead)(holder);
            if !free {
                return Err(held(request.platform, record, holder));
            }
            unfinished.push(Unfinished {
                run: holder.run.clone(),
                point: holder.point.clone(),
                host: holder.host.clone(),
            });
        }
    }
    Ok(LeaseRecord {
        schema: SCHEMA.to_owned(),
        platform: request.platform.clone(),
        fencing,
        holder: Some(request.holder.clone()),
        since: now,
        expires_at: expiry(now),
        unfinished,
    })
}

fn held(platform: &PlatformName, record: &LeaseRecord, holder: &Holder) -> Error {
    let message = format!(
        "another engine works on platform `{platform}` in this bucket: {} {} on {}, process {}, since {}",
        holder.purpose,
        holder.run,
        holder.host,
        holder.process,
        whole_seconds(record.since)
    );
    Error::new(Kind::Locked, message).hint(format!(
        "wait until it ends; if that engine is gone, its lease ends at {}, or take it over now with `--take-over`",
        whole_seconds(record.expires_at)
    ))
}

/// Occupies the names that taken-over runs would commit to. One of the two writes wins.
fn void_points(bucket: &dyn Depot, record: &LeaseRecord) -> Result<()> {
    for unfinished in &record.unfinished {
        let Some(point) = &unfinished.point else { continue };
        let mark = Statefile::void_mark(&unfinished.run);
        match bucket.write(&format!("points/{point}/statefile.json"), &[&mark], &WriteMode::Create) {
            Ok(_) => {}
            // Committed before we came, or marked by an earlier try: both are fine.
            Err(error) if error.kind() == Kind::AlreadyExists => {}
            Err(error) => return Err(error.operation("take over the lease")),
        }
    }
    Ok(())
}
