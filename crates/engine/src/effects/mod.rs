//! Performs what the coordinator asks for, and turns what comes of it into outcomes.
//!
//! Each effect is a task of its own; drains and references run on threads of their own, where
//! drivers may block. Every other call on a driver has a deadline. Nothing here decides what comes
//! next: that is the coordinator's. `stores` calls drivers, `pausing` holds writers back and lets
//! them go, `bucket` takes the lease and commits.

mod bucket;
pub(crate) mod pausing;
mod stores;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stillpoint_core::capability::Probe;
use stillpoint_core::coordinator::{Action, Effect, EffectId, Failure, Outcome};
use stillpoint_core::driver::{Context, Driver, Pin};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::{PointId, StoreName};
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::Backup;
use tokio::sync::{mpsc, watch};

use crate::budget::Budget;
use crate::clock::{Clock, SystemClock};
use crate::journal::{Authenticate, BucketJournal, Copier, Head};
use crate::lease::Lease;
use crate::open::{self, Session};
use crate::pause::{Performer, Step};
use crate::points::Listing;
use crate::progress::{Progress, Silent, Update};
use crate::watchdog::{Watchdog, WatchdogProgram};

/// How long an interrupted call may take to come back by itself. After it the run goes on without
/// it: an orderly stop has 10 s in all.
const GRACE: Duration = Duration::from_secs(5);

/// Opens a store's driver with a folder for its temporary files.
pub type OpenStore = Arc<dyn Fn(&Session, &StoreName, &Path) -> Result<Arc<dyn Driver>> + Send + Sync>;

/// Told what is about to happen and what just did, by name. Tests kill the process there, or let what
/// is named fail.
pub type Checkpoint = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

/// What surrounds a run and is the same for every run of a process.
#[derive(Clone)]
pub struct Surroundings {
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// Who watches.
    pub progress: Arc<dyn Progress>,
    /// The program that serves as the watchdog.
    pub watchdog: WatchdogProgram,
    /// Opens drivers.
    pub open_store: OpenStore,
    /// Where journals and temporary files of this machine lie.
    pub state_folder: PathBuf,
    /// For tests; does nothing in the product.
    pub checkpoint: Option<Checkpoint>,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("state_folder", &self.state_folder).finish_non_exhaustive()
    }
}

impl Surroundings {
    /// The real ones: this machine's clocks, this program as the watchdog, drivers from the
    /// registry.
    pub fn of_this_machine() -> Result<Self> {
        Ok(Self {
            clock: Arc::new(SystemClock::default()),
            progress: Arc::new(Silent),
            watchdog: WatchdogProgram::own()?,
            open_store: Arc::new(|session, store, scratch| open::driver(session.config(), store, scratch)),
            state_folder: open::state_folder(),
            checkpoint: None,
        })
    }

    pub(crate) fn checkpoint(&self, name: &str) -> Result<()> {
        self.checkpoint.as_ref().map_or(Ok(()), |checkpoint| checkpoint(name))
    }

    pub(crate) fn message(&self, text: impl Into<String>) {
        self.progress.update(Update::Message { text: text.into() });
    }
}

/// What an effect came to.
pub(crate) struct Answer {
    pub(crate) effect: EffectId,
    pub(crate) outcome: Outcome,
}

/// Whose run it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Our own.
    Own {
        /// Take the lease although it looks alive.
        take_over: bool,
    },
    /// A dead engine's, which left its journal on this machine.
    DeadHere,
    /// A run of another machine, whose lease we hold now.
    TakenOver,
}

/// Everything that the effects of one run share.
pub(crate) struct Hands {
    pub(crate) surroundings: Surroundings,
    pub(crate) session: Session,
    pub(crate) head: Head,
    role: Role,
    steps: Vec<Step>,
    performer: Performer,
    budget: Budget,
    /// Cancelled when any drain is: the repository's workers stop with it.
    repository_context: Context,
    drivers: Mutex<BTreeMap<StoreName, Arc<dyn Driver>>>,
    probes: Mutex<BTreeMap<StoreName, Probe>>,
    /// The pins of the latest try, for references.
    pins: Mutex<BTreeMap<StoreName, Pin>>,
    drains: Mutex<BTreeMap<StoreName, DrainView>>,
    running: Mutex<BTreeMap<EffectId, Running>>,
    lease: Mutex<Option<Arc<Lease>>>,
    lost: watch::Sender<Option<String>>,
    watchdog: Mutex<Option<Arc<Watchdog>>>,
    /// Pause steps that were begun and did not answer cleanly.
    unclean: Mutex<BTreeSet<u32>>,
    backup: Mutex<Option<Backup>>,
    points: tokio::sync::OnceCell<Arc<Listing>>,
    parent: Mutex<Option<PointId>>,
    pub(crate) copier: Copier,
    warnings: Mutex<Vec<String>>,
}

/// How far a drain is, for those who watch.
#[derive(Debug, Clone)]
pub(crate) struct DrainView {
    pub(crate) context: Context,
    pub(crate) bytes_estimate: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_stored: u64,
    pub(crate) done: bool,
}

struct Running {
    context: Context,
    stop: watch::Sender<bool>,
    /// Whether the repository's workers are to stop with it.
    writes: bool,
}

/// A lock that survives a panic elsewhere: what it guards is whole between statements.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hands {
    pub(crate) fn new(surroundings: Surroundings, session: Session, head: Head, role: Role) -> Result<Arc<Self>> {
        let platform = &head.platform;
        let budget = Budget::new(&platform.limits);
        let secrets = session.config().secrets.clone();
        let steps = crate::pause::resolve_steps(&platform.pause, &|secret| secrets.resolve(secret))?;
        let performer = Performer::new(pausing::databases(&surroundings, &session, &head))?;
        let copy = BucketJournal::new(Arc::clone(session.bucket()), authenticate(&session), head.run.clone());
        Ok(Arc::new(Self {
            surroundings,
            session,
            role,
            steps,
            performer,
            budget,
            repository_context: Context::default(),
            drivers: Mutex::default(),
            probes: Mutex::default(),
            pins: Mutex::default(),
            drains: Mutex::default(),
            running: Mutex::default(),
            lease: Mutex::default(),
            lost: watch::Sender::new(None),
            watchdog: Mutex::default(),
            unclean: Mutex::default(),
            backup: Mutex::default(),
            points: tokio::sync::OnceCell::new(),
            parent: Mutex::default(),
            copier: Copier::start(copy)?,
            warnings: Mutex::default(),
            head,
        }))
    }

    /// Becomes `Some(reason)` when the lease is lost.
    pub(crate) fn lost(&self) -> watch::Receiver<Option<String>> {
        self.lost.subscribe()
    }

    /// How far the drains are.
    pub(crate) fn drains(&self) -> BTreeMap<StoreName, DrainView> {
        locked(&self.drains).clone()
    }

    /// Things that people should know and that did not stop the run.
    pub(crate) fn warnings(&self) -> Vec<String> {
        locked(&self.warnings).clone()
    }

    pub(crate) fn warn(&self, text: String) {
        self.surroundings.message(text.clone());
        locked(&self.warnings).push(text);
    }

    /// Whether the lease is held: nothing is copied to the bucket before.
    pub(crate) fn has_lease(&self) -> bool {
        locked(&self.lease).is_some()
    }

    /// The number of the lease; 0 without one.
    pub(crate) fn fencing(&self) -> u64 {
        locked(&self.lease).as_ref().map_or(0, |lease| lease.fencing())
    }

    /// Leaves writers that could not be let go to the watchdog: it acts when its pipe closes.
    pub(crate) fn leave_to_watchdog(&self) {
        drop(locked(&self.watchdog).take());
    }

    /// The point whose content served as the parent of most stores.
    pub(crate) fn parent(&self) -> Option<PointId> {
        locked(&self.parent).clone()
    }

    /// Begins an effect; its answer comes through `answers`. `statefile` goes with `WriteStatefile`.
    pub(crate) fn begin(
        self: &Arc<Self>,
        effect: Effect,
        statefile: Option<Statefile>,
        answers: mpsc::UnboundedSender<Answer>,
    ) {
        let Effect { id, action } = effect;
        if let Action::Interrupt { effect } = action {
            return self.interrupt(effect);
        }
        let name = action.name();
        let (stop, stopped) = watch::channel(false);
        let context = Context::default();
        let writes = matches!(action, Action::Drain { .. } | Action::WriteSnapshot);
        let running = Running { context: context.clone(), stop, writes };
        locked(&self.running).insert(id, running);
        let hands = Arc::clone(self);
        tokio::spawn(async move {
            let working = Arc::clone(&hands);
            let work = tokio::spawn(async move {
                let surroundings = working.surroundings.clone();
                surroundings.checkpoint(&format!("before {name}"))?;
                let outcome = working.perform(action, context, stopped, statefile).await;
                surroundings.checkpoint(&format!("after {name}"))?;
                outcome
            });
            let outcome = match work.await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(error)) => Outcome::Failed(Box::new(Failure::from(&error.operation(spoken(name))))),
                Err(panic) => {
                    let error = Error::internal(format!("a step of the run broke: {panic}")).operation(name);
                    Outcome::Failed(Box::new(Failure::from(&error)))
                }
            };
            locked(&hands.running).remove(&id);
            if answers.send(Answer { effect: id, outcome }).is_err() {
                tracing::debug!(effect = name, "the run does not wait for this answer any more");
            }
        });
    }

    fn interrupt(&self, effect: EffectId) {
        if let Some(running) = locked(&self.running).get(&effect) {
            running.context.cancel();
            if running.writes {
                self.repository_context.cancel();
            }
            running.stop.send_replace(true);
        }
    }

    async fn perform(
        self: Arc<Self>,
        action: Action,
        context: Context,
        stopped: watch::Receiver<bool>,
        statefile: Option<Statefile>,
    ) -> Result<Outcome> {
        let grace = if action.is_pause() { Duration::ZERO } else { GRACE };
        let hands = Arc::clone(&self);
        let work = async move {
            match action {
                Action::AcquireLease => hands.acquire_lease().await,
                Action::Prepare { store } => hands.prepare(&store, &context).await,
                Action::Observe { store, .. } => hands.observe(&store, &context).await,
                Action::Pin { store, cut } => hands.pin(&store, &cut, &context).await,
                Action::StartWatchdog { deadline } => hands.start_watchdog(deadline).await,
                Action::Pause { step } => hands.pause(step).await,
                Action::Resume { step } => hands.resume(step).await,
                Action::StopWatchdog => hands.stop_watchdog().await,
                Action::Drain { store, pin } => hands.drain(store, *pin, context).await,
                Action::CheckReference { reference } => hands.check_reference(reference, context).await,
                Action::CheckPin { store, pin } => hands.check_pin(&store, &pin, &context).await,
                Action::WriteSnapshot => hands.write_snapshot().await,
                Action::WriteStatefile => hands.write_statefile(statefile).await,
                Action::ReadStatefile => hands.read_statefile().await,
                Action::Release { store, remains } => hands.release(&store, &remains, &context).await,
                Action::AbandonBackup => hands.abandon_backup().await,
                Action::RemoveSnapshot => hands.remove_snapshot().await,
                Action::ReleaseLease => hands.release_lease().await,
                Action::Interrupt { .. } | Action::Conclude { .. } => {
                    Err(Error::internal("an effect without an answer was performed"))
                }
            }
        };
        tokio::select! {
            result = work => result,
            () = out_of_grace(stopped, grace) => Err(Error::new(Kind::Cancelled, "stopped before it came to an end")),
        }
    }
}

/// What an operator would call it.
fn spoken(action: &str) -> &str {
    match action {
        "acquire_lease" => "prepare",
        "pin" => "cut",
        "start_watchdog" => "pause",
        "check_pin" | "write_snapshot" | "write_statefile" | "read_statefile" => "seal",
        other => other,
    }
}

/// The keyed hash under which journals lie in the bucket.
pub(crate) fn authenticate(session: &Session) -> Authenticate {
    let repository = session.repository().clone();
    Arc::new(move |bytes| repository.authenticate("journal", bytes))
}

/// Returns `grace` after the stop was asked for, and never without one.
async fn out_of_grace(mut stopped: watch::Receiver<bool>, grace: Duration) {
    if stopped.wait_for(|stopped| *stopped).await.is_err() {
        return std::future::pending().await;
    }
    tokio::time::sleep(grace).await;
}

/// Runs blocking work outside the runtime's own threads, on a thread with a name.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if sender.send(work()).is_err() {
                tracing::debug!("nobody waits for this thread any more");
            }
        })
        .map_err(|error| Error::io("cannot start a thread", error))?;
    receiver.await.unwrap_or_else(|_| Err(Error::internal(format!("the thread `{name}` broke"))))
}
