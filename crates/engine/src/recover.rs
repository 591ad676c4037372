//! What comes before every run: an earlier one that did not end is ended now, its pause first.
//!
//! The journal is replayed through the coordinator, which then leads out of wherever the dead engine
//! stood; the same hands as in a run do the work. Nothing is decided here about points: whether the
//! dead run had committed is read from the bucket.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use stillpoint_core::coordinator::{Conclusion, Coordinator, Happening, Micros, State};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{PointId, RunId};

use crate::config::Config;
use crate::effects::{Hands, Role, Surroundings, authenticate, on_thread, pausing};
use crate::journal::{self, Found, Replay};
use crate::open::Session;
use crate::points;
use crate::run::Run;
use crate::watchdog;

/// How long an older run's watchdog may take to end after its pause was undone.
const WATCHDOG_WITHIN: Duration = Duration::from_secs(15);

/// An earlier run that was ended now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// The run.
    pub run: RunId,
    /// Its point, if it had been committed.
    pub point: Option<PointId>,
    /// What could not be cleaned up, for people.
    pub warnings: Vec<String>,
}

/// Ends every unfinished run of the session's platform on this machine.
///
/// # Errors
/// `Locked` if such a run is alive; `Unproven` if writers that an earlier run held back cannot be let
/// go.
pub async fn recover(surroundings: &Surroundings, session: &Session) -> Result<Vec<Recovered>> {
    let platform = &session.platform().platform;
    let mut recovered = Vec::new();
    for found in journal::find_unfinished(&surroundings.state_folder, platform)? {
        recovered.push(end_dead_run(surroundings, session, found).await?);
    }
    journal::forget_ended(&surroundings.state_folder, platform)?;
    Ok(recovered)
}

async fn end_dead_run(surroundings: &Surroundings, session: &Session, found: Found) -> Result<Recovered> {
    let Found { replay, journal } = found;
    let report = pausing::watchdog_report(surroundings, &replay.head);
    let hands = hands_for(surroundings, session, &replay, Role::DeadHere)?;
    let Replayed { coordinator, latest, whole } = replayed(&replay);
    // A run that concluded and yet did not end could not let its writers go.
    if !whole || coordinator.state() == State::Concluded {
        let_writers_go(&hands).await?;
    }
    let mut warnings = Vec::new();
    let mut point = None;
    let mut journal = Some(journal);
    if coordinator.state() == State::Concluded {
        point = committed(&hands).await?;
    } else if coordinator.state() != State::New {
        let run = Run::new(Arc::clone(&hands), coordinator, journal.take()).after(latest);
        let finished = run.drive(Happening::Recovered).await?;
        (point, warnings) = judge(&hands, finished.conclusion)?;
        journal = finished.journal;
    }
    let waiting = report.clone();
    if !on_thread("watchdog", move || watchdog::wait_until_gone(&waiting, WATCHDOG_WITHIN)).await? {
        return Err(Error::new(Kind::Locked, "the watchdog of an earlier run still tries to let writers go")
            .context("run", &replay.head.run)
            .hint(format!("see what keeps it in `{}`", report.display())));
    }
    remove_scratch(&replay.head.scratch)?;
    hands.copier.copy_if_begun().await?;
    if let Some(journal) = journal {
        journal.end("recovered")?;
    }
    Ok(Recovered { run: replay.head.run.clone(), point, warnings })
}

/// Ends a run of another machine whose lease we have taken over, as far as the bucket tells of it.
pub(crate) fn take_over<'a>(
    ours: &'a Arc<Hands>,
    run: &'a RunId,
) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
    Box::pin(async move {
        let (bucket, keyed, wanted) = (Arc::clone(ours.session.bucket()), authenticate(&ours.session), run.clone());
        let read = on_thread("read journal", move || journal::read_copy(bucket.as_ref(), &keyed, &wanted));
        // Without a head in the bucket the run had not yet touched anything.
        let Some(mut replay) = read.await.map_err(|error| {
            error.hint(format!("see that the platform's writers run, then remove `journal/{run}/` from the bucket"))
        })?
        else {
            return Ok(());
        };
        ours.surroundings.message(format!("ending run {run} of {}, whose lease has run out", replay.head.host));
        // Its folders are on its own machine; ours are below ours.
        replay.head.scratch = ours.head.scratch.join("taken-over").join(run.as_str());
        let hands = hands_for(&ours.surroundings, &ours.session, &replay, Role::TakenOver)?;
        // The copy lags behind by design: whether writers are held back is not known.
        let_writers_go(&hands).await?;
        let Replayed { coordinator, latest, .. } = replayed(&replay);
        if !matches!(coordinator.state(), State::New | State::Concluded) {
            let finished = Run::new(Arc::clone(&hands), coordinator, None).after(latest).drive(Happening::Recovered);
            let (_, warnings) = judge(&hands, finished.await?.conclusion)?;
            for warning in warnings {
                ours.warn(format!("run {run}: {warning}"));
            }
        }
        remove_scratch(&replay.head.scratch)
    })
}

/// The hands for a dead run: its own platform as it was then, our bucket and secrets.
fn hands_for(surroundings: &Surroundings, session: &Session, replay: &Replay, role: Role) -> Result<Arc<Hands>> {
    let config = Config { platform: replay.head.platform.clone(), ..session.config().clone() };
    let session = Session::from_parts(config, Arc::clone(session.bucket()), session.repository().clone());
    Hands::new(surroundings.clone(), session, replay.head.clone(), role)
        .map_err(|error| error.operation(format!("end run {}", replay.head.run)))
}

/// The run's point, if it is in the bucket.
async fn committed(hands: &Arc<Hands>) -> Result<Option<PointId>> {
    let (session, point) = (hands.session.clone(), hands.head.point.clone());
    on_thread("read commit", move || match points::get(session.bucket().as_ref(), session.repository(), &point) {
        Ok(_) => Ok(Some(point)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    })
    .await
}

/// Undoes every pause step, whatever the journal says. One that fails does not keep the others from
/// being undone; the first failure is told afterwards.
async fn let_writers_go(hands: &Arc<Hands>) -> Result<()> {
    let mut first_failure = None;
    for step in (0..hands.head.spec.pause_steps).rev() {
        if let Err(error) = hands.resume(step).await {
            tracing::warn!(run = %hands.head.run, step = step + 1, %error, "a pause step cannot be undone");
            first_failure.get_or_insert(error);
        }
    }
    first_failure.map_or(Ok(()), Err)
}

/// A journal that went through the coordinator.
struct Replayed {
    coordinator: Coordinator,
    latest: Micros,
    /// Whether it went through to its end.
    whole: bool,
}

fn replayed(replay: &Replay) -> Replayed {
    let mut coordinator = Coordinator::new(replay.head.spec.clone());
    let mut latest = Micros(0);
    let mut whole = replay.damage.is_none();
    for event in &replay.events {
        latest = latest.max(event.at);
        if let Err(error) = coordinator.step(event.clone()) {
            tracing::warn!(run = %replay.head.run, %error, "the journal cannot be replayed to its end");
            whole = false;
            break;
        }
    }
    Replayed { coordinator, latest, whole }
}

/// Whether the dead run had committed, and what is left to tell. Writers that could not be let go are
/// an error: nothing else may begin then.
fn judge(hands: &Hands, conclusion: Conclusion) -> Result<(Option<PointId>, Vec<String>)> {
    let (point, warnings) = match conclusion {
        Conclusion::Sealed { warnings, .. } => (Some(hands.head.point.clone()), warnings),
        Conclusion::Failed { warnings, .. } => (None, warnings),
    };
    if let Some(held) = warnings.iter().find(|warning| is_resume(warning.operation.as_deref())) {
        return Err(held.clone().into_error());
    }
    Ok((point, warnings.into_iter().map(|warning| warning.into_error().to_string()).collect()))
}

/// Whether a failed operation was the undo of a pause step.
pub(crate) fn is_resume(operation: Option<&str>) -> bool {
    operation.is_some_and(|operation| operation.starts_with("resume"))
}

/// Removes a run's temporary files; none is fine.
pub(crate) fn remove_scratch(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.or_io(|| format!("cannot remove the temporary folder `{}`", folder.display())),
    }
}
