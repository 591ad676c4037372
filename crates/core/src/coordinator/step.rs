//! Takes events in: refuses the illegal ones, notes what they say, and hands on to the phase.
//!
//! A refused event changes nothing, not even the clock.

use super::effect::{Action, Effect, EffectId};
use super::event::{Event, Failure, Happening, Outcome};
use super::{Coordinator, State};
use crate::error::Kind;
use crate::id::StoreName;

/// An event that cannot happen in the state that the machine is in. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IllegalEvent {
    /// The first event must be `Begin`.
    #[error("the run has not begun")]
    NotBegun,
    /// `Begin` came twice.
    #[error("the run has begun already")]
    AlreadyBegun,
    /// The run is over.
    #[error("the run is over")]
    Concluded,
    /// No effect of this number waits for an answer: never asked for, or answered before.
    #[error("effect {} does not wait for an answer", .0.0)]
    NotAsked(EffectId),
    /// The outcome is none of those that the effect can have.
    #[error("effect {} ({action}) cannot end that way", effect.0)]
    WrongOutcome {
        /// The effect.
        effect: EffectId,
        /// What it was asked to do.
        action: &'static str,
    },
}

impl Coordinator {
    /// Takes one event and returns the effects to perform now.
    ///
    /// The caller has made the event durable before it performs any of them.
    pub fn step(&mut self, event: Event) -> Result<Vec<Effect>, IllegalEvent> {
        self.admit(&event.what)?;
        self.now = self.now.max(event.at);
        self.watch_budget();
        match event.what {
            Happening::Begin => {
                self.began_at = self.now;
                self.state = State::Leasing;
                self.ask(Action::AcquireLease);
            }
            Happening::Tick => {}
            Happening::Answer { effect, outcome } => self.take_answer(effect, outcome),
            Happening::Cancel { reason } => self.stop(Kind::Cancelled, reason),
            Happening::LeaseLost { reason } => self.stop(Kind::Locked, reason),
            Happening::Recovered => self.recover(),
        }
        // A step onwards may end the run, which leads on at once.
        loop {
            let before = self.state;
            self.advance();
            if self.state == before {
                break;
            }
        }
        Ok(std::mem::take(&mut self.outbox))
    }

    fn admit(&self, what: &Happening) -> Result<(), IllegalEvent> {
        match (self.state, what) {
            (State::New, Happening::Begin) => Ok(()),
            (State::New, _) => Err(IllegalEvent::NotBegun),
            (State::Concluded, _) => Err(IllegalEvent::Concluded),
            (_, Happening::Begin) => Err(IllegalEvent::AlreadyBegun),
            (_, Happening::Answer { effect, outcome }) => {
                let pending = self.pending.get(effect).ok_or(IllegalEvent::NotAsked(*effect))?;
                let fits = fits(&pending.action, outcome);
                let action = pending.action.name();
                if fits { Ok(()) } else { Err(IllegalEvent::WrongOutcome { effect: *effect, action }) }
            }
            _ => Ok(()),
        }
    }

    fn take_answer(&mut self, effect: EffectId, outcome: Outcome) {
        let Some(pending) = self.pending.remove(&effect) else { return };
        match outcome {
            Outcome::Failed(failure) => self.take_failure(effect, pending.action, pending.interrupted, *failure),
            outcome => self.take_success(effect, pending.action, pending.interrupted, outcome),
        }
    }

    fn take_failure(&mut self, effect: EffectId, action: Action, interrupted: bool, mut failure: Failure) {
        failure.operation.get_or_insert_with(|| action.name().to_owned());
        if let Some(store) = action.store() {
            failure.store.get_or_insert_with(|| store.as_str().to_owned());
        }
        match action {
            _ if super::unwind::is_undo(&action) => self.undo_failed(effect, failure),
            Action::WriteStatefile if !failure.certain => self.ask_for_commit(failure),
            Action::ReadStatefile => self.commit_not_told(),
            // A pause step that failed may have held some writers back, even after its undo.
            Action::Pause { step } if interrupted => self.owe(Action::Resume { step }),
            _ if interrupted => {}
            _ => self.fail(failure),
        }
    }

    fn take_success(&mut self, effect: EffectId, action: Action, interrupted: bool, outcome: Outcome) {
        match (action, outcome) {
            (Action::Prepare { store }, Outcome::Prepared { probe, safe_for_micros }) => {
                let hold_ends = self.now.plus(safe_for_micros);
                if let Some(record) = self.stores.get_mut(&store) {
                    record.probe = Some(*probe);
                    record.hold_ends = hold_ends;
                }
            }
            (Action::Observe { store, side, .. }, Outcome::Observed { position }) if !interrupted => {
                self.note_position(&store, side, position);
            }
            (Action::Pin { store, .. }, Outcome::Pinned(pinned)) => self.note_pin(&store, *pinned, interrupted),
            (Action::Pause { step }, Outcome::Done) if interrupted => self.owe(Action::Resume { step }),
            (Action::Pause { step }, Outcome::Done) => {
                if matches!(self.state, State::Pausing { .. }) {
                    self.state = State::Pausing { steps_done: step + 1 };
                }
            }
            (Action::Drain { store, .. }, Outcome::Drained(drained)) if !interrupted => {
                self.note_drained(&store, *drained);
            }
            (Action::CheckReference { reference }, Outcome::References(count)) if !interrupted => {
                self.note_reference(reference, count);
            }
            (Action::CheckPin { store, .. }, outcome) if !interrupted => self.note_validity(&store, outcome),
            (Action::WriteSnapshot, Outcome::SnapshotWritten { snapshot, bytes_stored }) => {
                self.snapshot = Some((snapshot, bytes_stored));
                self.forgive(&Action::AbandonBackup);
            }
            (Action::WriteStatefile, Outcome::Done) => self.committed(),
            (Action::ReadStatefile, Outcome::StatefileRead { present }) => self.commit_told(present),
            (action, _) if super::unwind::is_undo(&action) => self.undo_done(effect),
            _ => {}
        }
    }

    /// Leads on wherever everything that was waited for has come.
    fn advance(&mut self) {
        match self.state {
            State::Unwinding => self.unwind(),
            State::Resuming => self.resume_then_go_on(),
            State::AskingForCommit => self.ask_for_commit_again(),
            State::New | State::Concluded => {}
            _ if self.is_working() && self.state != State::CheckingReferences => {}
            State::Leasing => self.prepare_all(),
            State::Preparing => self.begin_cut(),
            State::Pausing { steps_done } => self.pause_next(steps_done),
            State::ObservingBefore => self.pin_group(0),
            State::Pinning { group } => self.pin_group(group + 1),
            State::ObservingAfter => self.judge_try(),
            State::Draining => self.begin_seal(),
            State::CheckingReferences => self.check_references(),
            State::CheckingPins => self.write_snapshot(),
            State::WritingSnapshot => self.write_statefile(),
            // Answered with success or failure, both of which lead on by themselves.
            State::Committing => {}
        }
    }

    fn stop(&mut self, kind: Kind, reason: String) {
        if self.state != State::Unwinding && !self.is_committing() {
            self.fail(Failure::new(kind, reason));
        }
    }

    pub(super) fn is_committing(&self) -> bool {
        matches!(self.state, State::Committing | State::AskingForCommit)
    }

    pub(super) fn record(&mut self, store: &StoreName) -> &mut super::StoreRecord {
        self.stores.entry(store.clone()).or_default()
    }
}

fn fits(action: &Action, outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Failed(_) => true,
        Outcome::Prepared { .. } => matches!(action, Action::Prepare { .. }),
        Outcome::Observed { .. } => matches!(action, Action::Observe { .. }),
        Outcome::Pinned(pinned) => matches!(action, Action::Pin { cut, .. } if *cut == pinned.pin.cut),
        Outcome::Drained(_) => matches!(action, Action::Drain { .. }),
        Outcome::PinValid | Outcome::PinLost { .. } => matches!(action, Action::CheckPin { .. }),
        Outcome::References(_) => matches!(action, Action::CheckReference { .. }),
        Outcome::SnapshotWritten { .. } => matches!(action, Action::WriteSnapshot),
        Outcome::StatefileRead { .. } => matches!(action, Action::ReadStatefile),
        Outcome::Done => matches!(
            action,
            Action::AcquireLease
                | Action::StartWatchdog { .. }
                | Action::Pause { .. }
                | Action::Resume { .. }
                | Action::StopWatchdog
                | Action::WriteStatefile
                | Action::Release { .. }
                | Action::AbandonBackup
                | Action::RemoveSnapshot
                | Action::ReleaseLease
        ),
    }
}
