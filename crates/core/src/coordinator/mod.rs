//! The coordinator: the pure machine that decides whether a recovery point comes to exist.
//!
//! It performs nothing. An [`Event`] goes in, [`Effect`]s come out; the engine writes the event to
//! its journal, steps, performs the effects, and their outcomes are the next events. Replaying the
//! journal through the same [`step`](Coordinator::step) restores the state after a crash, and
//! [`Happening::Recovered`] then leads out of it. Nothing here may look at a clock, draw a random
//! number or depend on anything but the events.
//!
//! # Who does what
//! [`event`] and [`effect`] are the two languages, [`spec`] the fixed facts, [`state`] the states.
//! `step` takes events in, `cut` leads from PREPARE to the end of CUT, `seal` through DRAIN and
//! SEAL, `unwind` lets go again; beside each effect it says what undoes it.
//!
//! # The table
//! An empty cell means that the event is illegal there, or that it changes nothing. `Begin` is legal
//! in `New` only and every other event only after it; nothing is legal in `Concluded`.
//!
//! | state | event | next state | effects |
//! |---|---|---|---|
//! | New | Begin | Leasing | AcquireLease |
//! | Leasing | Done | Preparing | Prepare for every store |
//! | Preparing | Prepared, last one; every hold fresh | ObservingBefore, Pinning or Pausing | Observe for every store; or Pin for the first group where nothing is proven by observing; or StartWatchdog where only a pause can prove |
//! | Preparing | Prepared, last one; some hold has run out | Preparing | Prepare for those stores |
//! | Pausing | Done (watchdog, step) | Pausing | Pause, next step |
//! | Pausing | Done (last step) | ObservingBefore or Pinning | Observe for the stores that can, or Pin for the first group |
//! | ObservingBefore | Observed, last one | Pinning | Pin for the first group |
//! | Pinning | Pinned, last one of the group | Pinning | Pin for the next group |
//! | Pinning | Pinned, last one of all | ObservingAfter, or as below | Observe for every store that was observed before |
//! | ObservingAfter | Observed, last one; strict, no pause | Draining | Drain for every store |
//! | ObservingAfter | Observed, last one; strict, paused | Resuming | Resume, last step first |
//! | ObservingAfter | Observed, last one; a write was seen, tries are left | Pinning | Pin for the first group, with the next attempt; the positions just read serve as those before |
//! | ObservingAfter | Observed, last one; a write was seen, no tries left | Pausing, Draining, Resuming or Unwinding | StartWatchdog where there are pause steps and none ran; else Drain where the lower level is accepted; else the undo of everything |
//! | any with writers paused | any, budget nearly used up | Resuming or Unwinding | Interrupt for all that is under way, Resume; then once more without a pause where the lower level is accepted |
//! | Resuming | Done (step) | Resuming | Resume, the step before; StopWatchdog at the end |
//! | Resuming | all is undone, the cut is made | Draining | Drain for every store |
//! | Resuming | all is undone, no cut yet | Pinning or Preparing | Pin for the first group |
//! | Draining | Drained, last one | CheckingReferences or CheckingPins | CheckReference for those whose stores are free; CheckPin for every store where there are none |
//! | CheckingReferences | References | CheckingReferences | CheckReference for those whose stores became free |
//! | CheckingReferences | References, last one | CheckingPins | CheckPin for every store |
//! | CheckingPins | PinValid, last one | WritingSnapshot | WriteSnapshot |
//! | WritingSnapshot | SnapshotWritten | Committing | WriteStatefile |
//! | Committing | Done | Unwinding | Release for every store |
//! | Committing | Failed, refused before the write began | Unwinding | the undo of everything |
//! | Committing | Failed in any other way, also permanently | AskingForCommit | ReadStatefile |
//! | AskingForCommit | StatefileRead | Unwinding | Release for every store; the snapshot stays, because a late write may still land |
//! | AskingForCommit | Failed | AskingForCommit | ReadStatefile again after a while, at most 5 times |
//! | any before Committing | Failed, PinLost, Cancel, LeaseLost, named losses or missing references that are not accepted | Unwinding | Interrupt for all that is under way, and the undo of everything, the pause first |
//! | Committing | Recovered | AskingForCommit | ReadStatefile |
//! | any other | Recovered | Unwinding | the undo of everything, the pause first and all its steps at once |
//! | Unwinding | any answer | Unwinding | the next undo; a failed one again after a while, at most 5 times |
//! | Unwinding | nothing is held or under way | Concluded | Conclude |
//!
//! # What always holds
//! - `WriteStatefile` is asked for only after every pin of the cut was found valid, after its drain.
//! - `Conclude` comes only when everything that was begun is undone, or its undo has failed 5 times
//!   and is named in the conclusion.
//! - Writers are asked to go on at or before the deadline, if ticks come at
//!   [`wake_at`](Coordinator::wake_at).
//! - Calls on one store never overlap.
//! - The snapshot is never removed when the statefile may be there.

mod cut;
pub mod effect;
pub mod event;
mod seal;
pub mod spec;
pub mod state;
mod step;
#[cfg(test)]
mod tests;
mod unwind;

use std::collections::BTreeMap;

pub use effect::{Action, Conclusion, Effect, EffectId, Side};
pub use event::{Event, Failure, Happening, Micros, Outcome, Pinned, ReferenceCount, StoreDrained};
pub use seal::StatefileHead;
pub use spec::{ReferenceSpec, Spec};
pub use state::State;
pub use step::IllegalEvent;
pub use unwind::undo_of;

use crate::capability::Probe;
use crate::id::{CutId, StoreName};
use crate::position::Position;
use crate::statefile::Level;

/// How often an undo, or the question for the commit, is tried before it is given up.
pub const ATTEMPTS_MAX: u32 = 5;
/// How often the cut is tried while writers are paused.
const PAUSED_TRIES_MAX: u32 = 3;
/// How often stores are prepared again because their hold ran out before the cut.
const PREPARE_ROUNDS_MAX: u32 = 5;

/// The machine. One value leads one run from begin to conclusion.
#[derive(Debug, Clone, PartialEq)]
pub struct Coordinator {
    spec: Spec,
    state: State,
    now: Micros,
    began_at: Micros,
    effects_asked: u32,
    outbox: Vec<Effect>,
    pending: BTreeMap<EffectId, Pending>,
    stores: BTreeMap<StoreName, StoreRecord>,
    prepare_rounds: u32,
    tries: Tries,
    pause: Option<PauseRecord>,
    cut: Option<CutResult>,
    references: Vec<Option<ReferenceCount>>,
    snapshot: Option<(String, u64)>,
    owed: Vec<unwind::Owed>,
    commit: Commit,
    recovered: bool,
    failure: Option<Failure>,
    warnings: Vec<Failure>,
}

/// An effect that was asked for and not answered yet.
#[derive(Debug, Clone, PartialEq)]
struct Pending {
    action: Action,
    interrupted: bool,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct StoreRecord {
    probe: Option<Probe>,
    hold_ends: Micros,
    before: Option<Option<Position>>,
    after: Option<Option<Position>>,
    pinned: Option<Pinned>,
    /// What any pin of this run may have left behind, for a clean-up by another process.
    remains: Vec<String>,
    drained: Option<StoreDrained>,
    pin_checked: bool,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Tries {
    /// The attempt of the current or latest try, over all kinds of tries.
    attempt: u32,
    unpaused: u32,
    paused: u32,
    /// The try under way is the last one: whatever level it reaches is what there will be.
    last: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct PauseRecord {
    deadline: Micros,
    /// From here on the pause is being undone, so that it is over by the deadline.
    give_up_at: Micros,
    /// When the first pause step was asked for.
    began_at: Option<Micros>,
    /// When the last undo was answered.
    ended_at: Option<Micros>,
    /// Writers are meant to be held back: from the start until the undo is asked for.
    holding: bool,
    over_budget: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Commit {
    written: bool,
    unknown: bool,
    asked: u32,
    retry_at: Option<Micros>,
}

/// What the cut came to.
#[derive(Debug, Clone, PartialEq)]
pub struct CutResult {
    /// The try whose pins count.
    pub cut: CutId,
    /// The level that was reached.
    pub level: Level,
    /// How many tries it took, from 1.
    pub tries: u32,
    /// From the begin of the first pin to the end of the last one.
    pub skew_micros: u64,
    /// Whether writers were held back for it.
    pub paused: bool,
}

impl Coordinator {
    /// A machine for one run. The specification must be the journalled one when replaying.
    pub fn new(spec: Spec) -> Self {
        let stores = spec.stores().map(|store| (store.clone(), StoreRecord::default())).collect();
        let references = vec![None; spec.references.len()];
        Self {
            spec,
            state: State::New,
            now: Micros(0),
            began_at: Micros(0),
            effects_asked: 0,
            outbox: Vec::new(),
            pending: BTreeMap::new(),
            stores,
            prepare_rounds: 0,
            tries: Tries::default(),
            pause: None,
            cut: None,
            references,
            snapshot: None,
            owed: Vec::new(),
            commit: Commit::default(),
            recovered: false,
            failure: None,
            warnings: Vec::new(),
        }
    }

    /// Where the run stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// What the run was asked to do.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The effects that were asked for and not answered yet, in the order of asking.
    pub fn pending(&self) -> impl Iterator<Item = (EffectId, &Action)> {
        self.pending.iter().map(|(id, pending)| (*id, &pending.action))
    }

    /// The instant at which a tick must come at the latest, if any. The engine sleeps no longer.
    pub fn wake_at(&self) -> Option<Micros> {
        let pause = self.pause.as_ref().and_then(|pause| {
            if pause.holding {
                Some(pause.give_up_at)
            } else {
                self.resume_waits().then_some(pause.deadline).filter(|deadline| *deadline > self.now)
            }
        });
        let retry = self.undo_retry_at();
        [pause, retry, self.commit.retry_at].into_iter().flatten().min()
    }

    /// The first thing that went wrong, if anything did.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// What the cut came to, once it is made.
    pub fn cut(&self) -> Option<&CutResult> {
        self.cut.as_ref()
    }

    /// What `probe` said of a store, once it is prepared.
    pub fn probe(&self, store: &StoreName) -> Option<&Probe> {
        self.stores.get(store)?.probe.as_ref()
    }

    /// The latest pin of a store.
    pub fn pinned(&self, store: &StoreName) -> Option<&Pinned> {
        self.stores.get(store)?.pinned.as_ref()
    }

    /// What the drain of a store came to, once it is done.
    pub fn drained(&self, store: &StoreName) -> Option<&StoreDrained> {
        self.stores.get(store)?.drained.as_ref()
    }

    /// How long writers were held back so far, in microseconds; 0 when they were not.
    pub fn pause_micros(&self) -> u64 {
        let Some(pause) = &self.pause else { return 0 };
        pause.began_at.map_or(0, |began| pause.ended_at.unwrap_or(self.now).since(began))
    }

    /// How many tries the cut has taken so far.
    pub fn tries(&self) -> u32 {
        self.tries.attempt
    }

    fn cut_id(&self) -> CutId {
        CutId { run: self.spec.run.clone(), attempt: self.tries.attempt }
    }

    /// Asks for an effect, and notes what will undo it.
    fn ask(&mut self, action: Action) -> EffectId {
        if let Some(undo) = undo_of(&action) {
            self.owe(undo);
        }
        self.effects_asked += 1;
        let id = EffectId(self.effects_asked);
        if action.is_answered() {
            self.pending.insert(id, Pending { action: action.clone(), interrupted: false });
        }
        self.outbox.push(Effect { id, action });
        id
    }

    /// Whether anything of the run itself, not of its clean-up, is under way.
    fn is_working(&self) -> bool {
        self.pending.values().any(|pending| !unwind::is_undo(&pending.action))
    }
}
