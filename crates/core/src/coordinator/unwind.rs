//! Lets go again: what undoes each effect, what is still owed, and in which order it is paid.
//!
//! An undo is owed from the moment at which its effect is asked for, because a crash may hide
//! whether the effect happened. Every undo may be repeated, and most are asked for on success too:
//! the way out is the same for every run.

use super::effect::{Action, Conclusion, EffectId};
use super::event::{Failure, Micros};
use super::{ATTEMPTS_MAX, Coordinator, State};
use crate::error::Kind;
use crate::id::StoreName;
use crate::statefile::{Level, Verdict};

/// Pause before the first repetition of an undo; doubled each time.
const RETRY_MICROS: u64 = 100_000;
/// Pause before asking again whether the statefile was written; doubled each time.
const COMMIT_RETRY_MICROS: u64 = 500_000;

/// What undoes an action, also when it failed or nobody knows whether it happened.
pub fn undo_of(action: &Action) -> Option<Action> {
    match action {
        Action::AcquireLease => Some(Action::ReleaseLease),
        Action::Prepare { store } | Action::Pin { store, .. } => {
            Some(Action::Release { store: store.clone(), remains: Vec::new() })
        }
        Action::StartWatchdog { .. } => Some(Action::StopWatchdog),
        Action::Pause { step } => Some(Action::Resume { step: *step }),
        Action::Drain { .. } => Some(Action::AbandonBackup),
        Action::WriteSnapshot => Some(Action::RemoveSnapshot),
        // The commit is never undone, reading changes nothing, and an undo needs none.
        Action::WriteStatefile
        | Action::Observe { .. }
        | Action::CheckReference { .. }
        | Action::CheckPin { .. }
        | Action::ReadStatefile
        | Action::Resume { .. }
        | Action::StopWatchdog
        | Action::Release { .. }
        | Action::AbandonBackup
        | Action::RemoveSnapshot
        | Action::ReleaseLease
        | Action::Interrupt { .. }
        | Action::Conclude { .. } => None,
    }
}

/// Whether the action is the undo of another one.
pub(super) fn is_undo(action: &Action) -> bool {
    matches!(
        action,
        Action::Resume { .. }
            | Action::StopWatchdog
            | Action::Release { .. }
            | Action::AbandonBackup
            | Action::RemoveSnapshot
            | Action::ReleaseLease
    )
}

/// One undo that is owed, and how far it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Owed {
    undo: Action,
    status: Status,
    failures: u32,
    retry_at: Micros,
    /// Its effect came to an end after the undo was asked for: undo once more.
    again: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Waiting,
    Asked(EffectId),
    Settled,
    GivenUp,
}

impl Owed {
    fn is_over(&self) -> bool {
        matches!(self.status, Status::Settled | Status::GivenUp)
    }

    fn resume_step(&self) -> Option<u32> {
        if let Action::Resume { step } = self.undo { Some(step) } else { None }
    }
}

impl Coordinator {
    /// Notes that something must be undone before the run may conclude.
    pub(super) fn owe(&mut self, undo: Action) {
        match self.owed.iter_mut().find(|owed| owed.undo == undo) {
            Some(owed) if owed.is_over() => (owed.status, owed.failures) = (Status::Waiting, 0),
            Some(owed) => owed.again = matches!(owed.status, Status::Asked(_)),
            None => {
                self.owed.push(Owed { undo, status: Status::Waiting, failures: 0, retry_at: Micros(0), again: false })
            }
        }
    }

    /// Drops an undo that must not happen any more.
    pub(super) fn forgive(&mut self, undo: &Action) {
        self.owed.retain(|owed| owed.undo != *undo);
    }

    pub(super) fn undo_done(&mut self, effect: EffectId) {
        if let Some(owed) = self.owed.iter_mut().find(|owed| owed.status == Status::Asked(effect)) {
            owed.status = if owed.again { Status::Waiting } else { Status::Settled };
            owed.again = false;
        }
    }

    pub(super) fn undo_failed(&mut self, effect: EffectId, failure: Failure) {
        let now = self.now;
        let Some(owed) = self.owed.iter_mut().find(|owed| owed.status == Status::Asked(effect)) else { return };
        owed.failures += 1;
        owed.again = false;
        if owed.failures < ATTEMPTS_MAX {
            owed.status = Status::Waiting;
            owed.retry_at = now.plus(RETRY_MICROS << (owed.failures - 1));
        } else {
            owed.status = Status::GivenUp;
            self.warnings.push(failure);
        }
    }

    /// When the next undo that failed before is due.
    pub(super) fn undo_retry_at(&self) -> Option<Micros> {
        let due = self.owed.iter().filter(|owed| owed.status == Status::Waiting && owed.failures > 0);
        due.map(|owed| owed.retry_at).filter(|at| *at > self.now).min()
    }

    /// Whether a pause step is not even asked to be undone.
    pub(super) fn resume_waits(&self) -> bool {
        self.owed.iter().any(|owed| owed.resume_step().is_some() && owed.status == Status::Waiting)
    }

    /// Whether the undo of a pause step was given up.
    pub(super) fn resume_gave_up(&self) -> bool {
        self.owed.iter().any(|owed| owed.resume_step().is_some() && owed.status == Status::GivenUp)
    }

    /// Whether nothing of the pause is left.
    pub(super) fn pause_is_unwound(&self) -> bool {
        self.owed.iter().filter(|owed| owed.undo.is_pause()).all(Owed::is_over)
    }

    /// Ends the run without a point: stops what is under way and lets writers go at once.
    pub(super) fn fail(&mut self, failure: Failure) {
        if self.state == State::Unwinding {
            return;
        }
        self.failure = Some(failure);
        self.state = State::Unwinding;
        self.interrupt_all();
        self.end_hold();
        self.unwind_pause();
    }

    /// Asks everything that is under way, but for undoing, to stop soon.
    pub(super) fn interrupt_all(&mut self) {
        let mut targets = Vec::new();
        for (id, pending) in &mut self.pending {
            if !pending.interrupted && !is_undo(&pending.action) {
                pending.interrupted = true;
                targets.push(*id);
            }
        }
        for effect in targets {
            self.ask(Action::Interrupt { effect });
        }
    }

    /// Undoes pause steps, the last one first. Each waits for the answer of the one before, but
    /// nobody waits past the deadline or for a dead engine's answers.
    pub(super) fn unwind_pause(&mut self) {
        let Some(pause) = &self.pause else { return };
        let hurry = self.recovered || self.now >= pause.deadline;
        let mut steps: Vec<u32> = self.owed.iter().filter_map(Owed::resume_step).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        for step in steps {
            let undo = Action::Resume { step };
            self.ask_undo(&undo);
            let answered = self.owed.iter().any(|owed| owed.undo == undo && (owed.is_over() || owed.failures > 0));
            if !answered && !hurry {
                break;
            }
        }
        let resumes = || self.owed.iter().filter(|owed| owed.resume_step().is_some());
        let all_over = resumes().all(Owed::is_over);
        let all_settled = resumes().all(|owed| owed.status == Status::Settled);
        let now = self.now;
        if let Some(pause) = &mut self.pause {
            pause.ended_at = if all_settled { pause.ended_at.or(Some(now)) } else { None };
        }
        let pausing = |action: &Action| matches!(action, Action::Pause { .. } | Action::StartWatchdog { .. });
        if !all_over || self.pending.values().any(|pending| pausing(&pending.action)) {
            return;
        }
        if all_settled {
            self.ask_undo(&Action::StopWatchdog);
        } else if let Some(owed) = self.owed.iter_mut().find(|owed| owed.undo == Action::StopWatchdog) {
            // A step could not be undone: the watchdog stays and tries once more.
            owed.status = Status::GivenUp;
        }
    }

    /// Asks for an owed undo if it waits and is due.
    fn ask_undo(&mut self, undo: &Action) {
        let now = self.now;
        let due = |owed: &Owed| owed.undo == *undo && owed.status == Status::Waiting && owed.retry_at <= now;
        if !self.owed.iter().any(due) {
            return;
        }
        let action = match undo {
            // A driver value that made the pins knows what they left; another one must be told.
            Action::Release { store, .. } if self.recovered => {
                let remains = self.stores.get(store).map(|record| record.remains.clone()).unwrap_or_default();
                Action::Release { store: store.clone(), remains }
            }
            other => other.clone(),
        };
        let effect = self.ask(action);
        if let Some(owed) = self.owed.iter_mut().find(|owed| owed.undo == *undo) {
            owed.status = Status::Asked(effect);
        }
    }

    /// Pays what is owed, each debt as soon as it may be paid, and concludes after the last one.
    pub(super) fn unwind(&mut self) {
        self.unwind_pause();
        let undos: Vec<Action> = self.owed.iter().rev().map(|owed| owed.undo.clone()).collect();
        for undo in undos {
            let may = match &undo {
                Action::Release { store, .. } => !self.is_busy(store),
                Action::AbandonBackup | Action::RemoveSnapshot => !self.is_writing(),
                Action::ReleaseLease => {
                    !self.is_working() && self.owed.iter().all(|o| o.undo == Action::ReleaseLease || o.is_over())
                }
                _ => false,
            };
            if may {
                self.ask_undo(&undo);
            }
        }
        if self.pending.is_empty() && self.owed.iter().all(Owed::is_over) {
            self.conclude();
        }
    }

    /// Whether a call on the store's driver is under way.
    fn is_busy(&self, store: &StoreName) -> bool {
        self.pending.values().any(|pending| match &pending.action {
            Action::CheckReference { reference } => {
                let sides = self.spec.references.get(*reference as usize);
                sides.is_some_and(|sides| sides.from == *store || sides.to == *store)
            }
            action => action.store() == Some(store),
        })
    }

    fn is_writing(&self) -> bool {
        let writes = |action: &Action| matches!(action, Action::Drain { .. } | Action::WriteSnapshot);
        self.pending.values().any(|pending| writes(&pending.action))
    }

    fn conclude(&mut self) {
        let warnings = std::mem::take(&mut self.warnings);
        let conclusion = if self.commit.written {
            let level = self.cut.as_ref().map_or(Level::Independent, |cut| cut.level);
            Conclusion::Sealed { verdict: self.verdict(), level, warnings }
        } else {
            let unexplained = || Failure::new(Kind::Internal, "the run ended without a reason");
            let failure = self.failure.clone().unwrap_or_else(unexplained);
            Conclusion::Failed { failure, warnings, commit_unknown: self.commit.unknown }
        };
        self.state = State::Concluded;
        self.ask(Action::Conclude { conclusion: Box::new(conclusion) });
    }

    /// What the drains found, in one word.
    pub fn verdict(&self) -> Verdict {
        let drained = self.stores.values().filter_map(|record| record.drained.as_ref());
        if drained.into_iter().any(|drained| !drained.drained.losses.is_empty()) {
            Verdict::RestorableWithNamedLoss
        } else {
            Verdict::Restorable
        }
    }

    /// The engine that ran this journal is dead; none of its effects will ever answer.
    pub(super) fn recover(&mut self) {
        self.pending.clear();
        // The budget may have run out meanwhile, and what that asked for is asked for again below.
        self.outbox.clear();
        self.recovered = true;
        for owed in &mut self.owed {
            if owed.status != Status::Settled {
                (owed.status, owed.failures, owed.retry_at, owed.again) = (Status::Waiting, 0, Micros(0), false);
            }
        }
        let mut failure = Failure::new(Kind::Cancelled, "the engine ended in the middle of the run");
        failure.certain = false;
        match self.state {
            State::Committing | State::AskingForCommit => self.ask_for_commit(failure),
            _ => self.fail(failure),
        }
    }

    /// Nobody knows whether the statefile was written: asks the bucket.
    pub(super) fn ask_for_commit(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
        self.state = State::AskingForCommit;
        self.commit.asked = 1;
        self.commit.retry_at = None;
        self.ask(Action::ReadStatefile);
    }

    /// The question failed too: it is asked again after a while, but not for ever.
    pub(super) fn commit_not_told(&mut self) {
        if self.commit.asked < ATTEMPTS_MAX {
            self.commit.retry_at = Some(self.now.plus(COMMIT_RETRY_MICROS << (self.commit.asked - 1)));
        } else {
            self.commit.unknown = true;
            self.forgive(&Action::RemoveSnapshot);
            self.state = State::Unwinding;
        }
    }

    pub(super) fn ask_for_commit_again(&mut self) {
        if self.commit.retry_at.is_some_and(|at| at <= self.now) {
            self.commit.retry_at = None;
            self.commit.asked += 1;
            self.ask(Action::ReadStatefile);
        }
    }

    /// The bucket has answered. An absent statefile may still be on its way, and would then need
    /// its snapshot: the snapshot stays, and `prune` collects it once it is old.
    pub(super) fn commit_told(&mut self, present: bool) {
        if present {
            self.committed();
        } else {
            self.forgive(&Action::RemoveSnapshot);
            self.state = State::Unwinding;
        }
    }

    pub(super) fn committed(&mut self) {
        self.commit.written = true;
        self.failure = None;
        self.forgive(&Action::RemoveSnapshot);
        self.forgive(&Action::AbandonBackup);
        self.state = State::Unwinding;
    }
}
