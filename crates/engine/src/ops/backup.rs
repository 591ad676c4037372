//! `backup`: takes one recovery point of the whole platform.
//!
//! First ends whatever an earlier run left unfinished, then runs; the coordinator decides, this
//! file only sets the scene and tells what came of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use stillpoint_core::coordinator::{Conclusion, Coordinator, Failure, Happening};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{PointId, RunId, StoreName};
use stillpoint_core::plan::BackupPlan;
use stillpoint_core::statefile::Statefile;

use crate::cancel::CancelToken;
use crate::effects::{Hands, Role, Surroundings};
use crate::journal::{self, Entry, Head, Journal};
use crate::open::Session;
use crate::progress::{Phase, Update};
use crate::recover::{self, Recovered, is_resume, remove_scratch};
use crate::run::{Finished, PhaseTime, Run};

/// What is asked for.
#[derive(Clone)]
pub struct BackupRequest {
    /// The configuration, the bucket and the repository.
    pub session: Session,
    /// Clocks, watchers, folders.
    pub surroundings: Surroundings,
    /// Stops the run.
    pub cancel: CancelToken,
    /// Take the platform's lease although another engine seems to hold it. Safe for every point;
    /// the other run fails.
    pub take_over: bool,
}

impl BackupRequest {
    /// A backup of the session's platform, on this machine, that nobody watches.
    pub fn new(session: Session) -> Result<Self> {
        let surroundings = Surroundings::of_this_machine()?;
        Ok(Self { session, surroundings, cancel: CancelToken::default(), take_over: false })
    }
}

/// What one store brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreOutcome {
    /// The driver's name.
    pub driver: String,
    /// Files in the store's tree.
    pub files: u64,
    /// Bytes in the store's tree.
    pub bytes: u64,
    /// Bytes that were read from the store; the rest was reused from the parent point.
    pub bytes_read: u64,
    /// Bytes that this store added to the bucket.
    pub bytes_stored: u64,
    /// The store's own count.
    pub items: u64,
    /// What `items` counts.
    pub unit: String,
    /// Known losses.
    pub losses: usize,
}

/// A point that was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BackupOutcome {
    /// The commit: id, level, skew, tries, pause, references, totals.
    pub statefile: Statefile,
    /// Where it lies.
    pub bucket: String,
    /// What each store brought.
    pub stores: BTreeMap<StoreName, StoreOutcome>,
    /// How long each phase took, in order.
    pub phases: Vec<PhaseTime>,
    /// The whole run, in milliseconds.
    pub elapsed_millis: u64,
    /// Earlier runs that were ended first.
    pub recovered: Vec<Recovered>,
    /// Things that people should know, without harm to the point.
    pub warnings: Vec<String>,
}

/// Takes one recovery point.
///
/// # Errors
/// Any error means that no point was made, unless its message says that this is not known. Nothing
/// is held any more when it returns; where writers may still be held back, the hint says so.
pub async fn backup(request: BackupRequest) -> Result<BackupOutcome> {
    let BackupRequest { session, surroundings, cancel, take_over } = request;
    let began = surroundings.clock.monotonic();
    let recovered = recover::recover(&surroundings, &session).await?;
    for run in &recovered {
        surroundings.progress.update(Update::PhaseBegan { phase: Phase::Recover });
        surroundings.message(format!("run {} had not ended; what it held is released now", run.run));
    }
    cancel.check()?;
    let head = head(&surroundings, &session)?;
    let hands = Hands::new(surroundings.clone(), session.clone(), head.clone(), Role::Own { take_over })?;
    let journal = Journal::begin(&surroundings.state_folder, &head)?;
    hands.copier.keep(Entry::Head(Box::new(head.clone())));
    let coordinator = Coordinator::new(head.spec.clone());
    let run = Run::new(Arc::clone(&hands), coordinator, Some(journal)).cancelled_by(cancel);
    let finished = run.drive(Happening::Begin).await?;
    let Finished { conclusion, statefile, phases, journal, journal_error } = finished;
    // A run whose writers may still be held back stays unfinished: the next start undoes that first.
    let held = warnings_of(&conclusion).iter().any(|warning| is_resume(warning.operation.as_deref()));
    if held {
        hands.leave_to_watchdog();
    } else {
        end(&hands, journal, &conclusion).await;
    }
    match conclusion {
        Conclusion::Sealed { warnings, .. } => {
            let statefile = statefile.ok_or_else(|| Error::internal("a point was sealed without a statefile"))?;
            let mut told = hands.warnings();
            told.extend(warnings.into_iter().map(|warning| warning.into_error().to_string()));
            let elapsed = surroundings.clock.monotonic().saturating_sub(began);
            Ok(BackupOutcome {
                stores: stores(&hands, &statefile),
                bucket: session.bucket().location(),
                phases,
                elapsed_millis: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                recovered,
                warnings: told,
                statefile,
            })
        }
        Conclusion::Failed { failure, warnings, commit_unknown } => {
            Err(journal_error.unwrap_or_else(|| failed(&hands, failure, &warnings, commit_unknown)))
        }
    }
}

fn warnings_of(conclusion: &Conclusion) -> &[Failure] {
    match conclusion {
        Conclusion::Sealed { warnings, .. } | Conclusion::Failed { warnings, .. } => warnings,
    }
}

/// Closes the books. What fails here costs the next start a moment, and harms nothing.
async fn end(hands: &Arc<Hands>, journal: Option<Journal>, conclusion: &Conclusion) {
    let outcome = match conclusion {
        Conclusion::Sealed { .. } => "sealed",
        Conclusion::Failed { .. } => "failed",
    };
    hands.copier.keep(Entry::Ended { outcome: outcome.to_owned() });
    let copied = hands.copier.copy_if_begun().await;
    let removed = remove_scratch(&hands.head.scratch);
    let ended = journal.map_or(Ok(()), |journal| journal.end(outcome));
    for error in [copied, removed, ended].into_iter().filter_map(Result::err) {
        hands.warn(error.to_string());
    }
}

fn failed(hands: &Hands, failure: Failure, warnings: &[Failure], commit_unknown: bool) -> Error {
    for warning in warnings {
        hands.warn(format!("while cleaning up: {}", warning.clone().into_error()));
    }
    let mut error = failure;
    if let Some(held) = warnings.iter().find(|warning| is_resume(warning.operation.as_deref())) {
        error.hint = held.hint.clone();
        error.causes.push(held.clone().into_error().to_string());
    } else if commit_unknown {
        let point = &hands.head.point;
        error.hint = Some(format!(
            "whether point {point} was made is not known; `stillpoint list` tells once the bucket answers"
        ));
    }
    error.into_error()
}

fn stores(hands: &Hands, statefile: &Statefile) -> BTreeMap<StoreName, StoreOutcome> {
    let drains = hands.drains();
    let each = statefile.stores.iter().map(|(name, store)| {
        let view = drains.get(name);
        let outcome = StoreOutcome {
            driver: store.driver.clone(),
            files: store.files,
            bytes: store.bytes,
            bytes_read: view.map_or(0, |view| view.bytes_read),
            bytes_stored: view.map_or(0, |view| view.bytes_stored),
            items: store.items,
            unit: store.unit.clone(),
            losses: store.losses.len(),
        };
        (name.clone(), outcome)
    });
    each.collect()
}

fn head(surroundings: &Surroundings, session: &Session) -> Result<Head> {
    let platform = session.platform();
    let mut random = [[0; 8]; 2];
    for bytes in &mut random {
        getrandom::fill(bytes)
            .map_err(|error| Error::new(Kind::Io, format!("the system gives no random numbers: {error}")))?;
    }
    let run = RunId::from_random(random[0]);
    let scratch = std::path::absolute(surroundings.state_folder.join("scratch").join(run.as_str()))
        .or_io(|| "cannot tell where temporary files go".to_owned())?;
    Ok(Head {
        schema: journal::SCHEMA.to_owned(),
        point: PointId::from_random(random[1]),
        spec: BackupPlan::new(platform)?.spec(run.clone()),
        platform: platform.clone(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        process: std::process::id(),
        began_at: surroundings.clock.utc(),
        run,
        scratch,
    })
}
