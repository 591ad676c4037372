//! The loop of a run: write the event down, step, perform, and the answers are the next events.
//!
//! Decides nothing. What it adds to the coordinator is the world: the clock, the journal, the
//! operator's request to stop, the loss of the lease, and a view for those who watch.

mod phases;

use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::coordinator::{
    Action, Conclusion, Coordinator, Effect, Event, Failure, Happening, Micros, Outcome, State, StatefileHead,
};
use stillpoint_core::error::{Error, Result};
use stillpoint_core::statefile::Statefile;
use tokio::sync::{mpsc, watch};

use crate::cancel::CancelToken;
use crate::effects::{Answer, Hands};
use crate::journal::{Entry, Journal};
use crate::points;

pub use phases::PhaseTime;
use phases::Phases;

/// How often the drains' progress is told.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// One run on its way.
pub(crate) struct Run {
    hands: Arc<Hands>,
    coordinator: Coordinator,
    /// `None` for a run of another machine: its journal is not ours to write.
    journal: Option<Journal>,
    /// What is added to our monotonic clock: a replayed run goes on where its own clock stood.
    clock_offset: u64,
    cancel: Option<CancelToken>,
    /// The journal could not be written any more; the run is being ended.
    journal_error: Option<Error>,
    statefile: Option<Statefile>,
    phases: Phases,
}

/// A run that is over.
pub(crate) struct Finished {
    pub(crate) conclusion: Conclusion,
    pub(crate) statefile: Option<Statefile>,
    pub(crate) phases: Vec<PhaseTime>,
    pub(crate) journal: Option<Journal>,
    /// Why the journal could not be written, if it could not.
    pub(crate) journal_error: Option<Error>,
}

/// What the loop waits for.
enum Wake {
    Answer(Answer),
    Cancel,
    LeaseLost(String),
    Time,
    Tell,
}

impl Run {
    pub(crate) fn new(hands: Arc<Hands>, coordinator: Coordinator, journal: Option<Journal>) -> Self {
        let phases = Phases::new(Arc::clone(&hands));
        Self {
            hands,
            coordinator,
            journal,
            clock_offset: 0,
            cancel: None,
            journal_error: None,
            statefile: None,
            phases,
        }
    }

    /// Lets `cancel` stop the run.
    pub(crate) fn cancelled_by(mut self, cancel: CancelToken) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// Goes on where a replayed journal's clock stood.
    pub(crate) fn after(mut self, latest: Micros) -> Self {
        self.clock_offset = latest.0;
        self
    }

    fn now(&self) -> Micros {
        let elapsed = u64::try_from(self.hands.surroundings.clock.monotonic().as_micros()).unwrap_or(u64::MAX);
        Micros(elapsed.saturating_add(self.clock_offset))
    }

    /// Leads the run from `first` to its conclusion.
    pub(crate) async fn drive(mut self, first: Happening) -> Result<Finished> {
        let (sender, mut answers) = mpsc::unbounded_channel();
        let mut lost = self.hands.lost();
        let mut cancel_told = false;
        let mut lost_told = false;
        let mut conclusion = self.take(first, &sender)?;
        while conclusion.is_none() {
            let wake = self.wait(&mut answers, &mut lost, cancel_told, lost_told).await?;
            let happening = match wake {
                Wake::Answer(answer) => Happening::Answer { effect: answer.effect, outcome: answer.outcome },
                Wake::Cancel => {
                    cancel_told = true;
                    self.hands.surroundings.message("stopping: letting go of everything that is held");
                    Happening::Cancel { reason: "stopped on request".to_owned() }
                }
                Wake::LeaseLost(reason) => {
                    lost_told = true;
                    Happening::LeaseLost { reason }
                }
                Wake::Time => Happening::Tick,
                Wake::Tell => {
                    self.phases.tell_stores();
                    continue;
                }
            };
            conclusion = self.take(happening, &sender)?;
        }
        let Some(conclusion) = conclusion else { return Err(Error::internal("a run ended without a conclusion")) };
        Ok(Finished {
            conclusion,
            statefile: self.statefile,
            phases: self.phases.end(&self.coordinator),
            journal: self.journal,
            journal_error: self.journal_error,
        })
    }

    async fn wait(
        &self,
        answers: &mut mpsc::UnboundedReceiver<Answer>,
        lost: &mut watch::Receiver<Option<String>>,
        cancel_told: bool,
        lost_told: bool,
    ) -> Result<Wake> {
        let wake_at = self.coordinator.wake_at();
        let sleep = wake_at.map(|at| Duration::from_micros(at.since(self.now())));
        let draining = matches!(self.coordinator.state(), State::Draining);
        tokio::select! {
            // Answers first: what has happened is taken in before anything is decided about it.
            biased;
            answer = answers.recv() => match answer {
                Some(answer) => Ok(Wake::Answer(answer)),
                None => Err(Error::internal("the effects of a run are gone")),
            },
            () = asked_to_stop(self.cancel.as_ref()), if !cancel_told => Ok(Wake::Cancel),
            reason = lost_reason(lost), if !lost_told => Ok(Wake::LeaseLost(reason)),
            () = tokio::time::sleep(sleep.unwrap_or_default()), if sleep.is_some() => Ok(Wake::Time),
            () = tokio::time::sleep(TELL_EVERY), if draining => Ok(Wake::Tell),
        }
    }

    /// Takes one happening in and begins what follows from it. Returns the conclusion, if this was
    /// the end.
    fn take(&mut self, happening: Happening, answers: &mpsc::UnboundedSender<Answer>) -> Result<Option<Conclusion>> {
        let event = Event::new(self.now(), happening);
        let at = event.at;
        if let Err(error) = self.write_down(&event) {
            // Without a journal nothing new may begin. Undoing needs none: it can be repeated.
            let effects = self.stop_without_journal(at, error)?;
            self.begin(effects, answers)?;
            self.hands.copier.keep(Entry::Event(event.clone()));
        }
        let asked = self.step(event)?;
        if let Some(journal) = &mut self.journal
            && !asked.is_empty()
            && let Err(error) = self.hands.surroundings.checkpoint("before sync").and_then(|()| journal.sync())
        {
            return self.begin_without_journal(asked, at, error, answers);
        }
        self.begin(asked, answers)
    }

    /// Lets the coordinator end the run because its journal cannot be written any more.
    fn stop_without_journal(&mut self, at: Micros, error: Error) -> Result<Vec<Effect>> {
        if self.coordinator.state() == State::New {
            return Err(error);
        }
        let stop = Event::new(at, Happening::Cancel { reason: error.to_string() });
        self.journal_error = Some(error);
        self.journal = None;
        self.hands.copier.keep(Entry::Event(stop.clone()));
        self.step(stop)
    }

    /// Ends the run after an event that may not survive a crash. Of what it `asked` for, only what
    /// needs no journal begins; the rest is answered as failed, so that the coordinator goes on.
    fn begin_without_journal(
        &mut self,
        asked: Vec<Effect>,
        at: Micros,
        error: Error,
        answers: &mpsc::UnboundedSender<Answer>,
    ) -> Result<Option<Conclusion>> {
        let refused = Failure { certain: true, ..Failure::from(&error) };
        let (harmless, never_begun): (Vec<_>, Vec<_>) =
            asked.into_iter().partition(|effect| needs_no_journal(&effect.action));
        if let Some(conclusion) = self.begin(harmless, answers)? {
            self.journal_error = Some(error);
            self.journal = None;
            return Ok(Some(conclusion));
        }
        let effects = self.stop_without_journal(at, error)?;
        let conclusion = self.begin(effects, answers)?;
        for effect in never_begun {
            let outcome = Outcome::Failed(Box::new(refused.clone()));
            if answers.send(Answer { effect: effect.id, outcome }).is_err() {
                return Err(Error::internal("a run does not listen to its own answers"));
            }
        }
        Ok(conclusion)
    }

    fn write_down(&mut self, event: &Event) -> Result<()> {
        let entry = Entry::Event(event.clone());
        if let Some(journal) = &mut self.journal {
            self.hands.surroundings.checkpoint("before append")?;
            journal.append(&entry)?;
            self.hands.surroundings.checkpoint("after append")?;
        }
        self.hands.copier.keep(entry);
        Ok(())
    }

    fn step(&mut self, event: Event) -> Result<Vec<Effect>> {
        let before = self.coordinator.state();
        let illegal = |error| Error::internal("an event came that cannot come now").source(error);
        let effects = self.coordinator.step(event).map_err(illegal)?;
        let after = self.coordinator.state();
        self.phases.moved(before, &self.coordinator);
        // Nobody waits for a bucket while writers are held back.
        let held = |state| matches!(state, State::Pausing { .. } | State::Resuming);
        if before.phase() != after.phase() && !held(after) && self.hands.has_lease() {
            self.hands.copier.copy_soon();
        }
        Ok(effects)
    }

    fn begin(&mut self, effects: Vec<Effect>, answers: &mpsc::UnboundedSender<Answer>) -> Result<Option<Conclusion>> {
        for effect in effects {
            let statefile = match &effect.action {
                Action::Conclude { conclusion } => return Ok(Some((**conclusion).clone())),
                Action::WriteStatefile => Some(self.make_statefile()?),
                _ => None,
            };
            self.hands.begin(effect, statefile, answers.clone());
        }
        Ok(None)
    }

    fn make_statefile(&mut self) -> Result<Statefile> {
        let head = &self.hands.head;
        let mut statefile = self.coordinator.statefile(StatefileHead {
            point: head.point.clone(),
            platform: head.platform.platform.clone(),
            environment: head.platform.environment.clone(),
            platform_stores: head.platform.stores.keys().cloned().collect(),
            parent: self.hands.parent(),
            started_at: head.began_at,
            sealed_at: self.hands.surroundings.clock.utc(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            fencing: self.hands.fencing(),
        })?;
        statefile.authentication = points::authentication(self.hands.session.repository(), &statefile)?;
        self.statefile = Some(statefile.clone());
        Ok(statefile)
    }
}

/// Whether an action may begin although the event that asked for it may be forgotten: it lets
/// something go and can be repeated, only reads, or stops and ends what is there.
fn needs_no_journal(action: &Action) -> bool {
    match action {
        Action::Resume { .. }
        | Action::StopWatchdog
        | Action::Release { .. }
        | Action::AbandonBackup
        | Action::RemoveSnapshot
        | Action::ReleaseLease
        | Action::ReadStatefile
        | Action::Interrupt { .. }
        | Action::Conclude { .. } => true,
        Action::AcquireLease
        | Action::Prepare { .. }
        | Action::StartWatchdog { .. }
        | Action::Pause { .. }
        | Action::Observe { .. }
        | Action::Pin { .. }
        | Action::Drain { .. }
        | Action::CheckReference { .. }
        | Action::CheckPin { .. }
        | Action::WriteSnapshot
        | Action::WriteStatefile => false,
    }
}

async fn asked_to_stop(cancel: Option<&CancelToken>) {
    match cancel {
        Some(cancel) => cancel.cancelled().await,
        None => std::future::pending().await,
    }
}

async fn lost_reason(lost: &mut watch::Receiver<Option<String>>) -> String {
    if let Ok(reason) = lost.wait_for(Option::is_some).await
        && let Some(reason) = reason.clone()
    {
        return reason;
    }
    std::future::pending().await
}
