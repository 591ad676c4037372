//! A small world with stores, writers, pause steps and a bucket, in which a run lives.
//!
//! Its legal faults: an effect may fail before or after it happened; its answer may come late, in
//! any order, but not twice; the engine may die at any time, and what was under way then has or has
//! not happened; writers write whenever they are not held back, and a leaky pause does not hold all
//! of them. Its illegal faults, which it never commits: an answer that never comes, a tick that
//! comes after the machine's `wake_at`, a pin that shows another state than that of its moment.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::super::*;
use crate::capability::{Capability, PinKind};
use crate::driver::{Drained, Loss, Pin};
use crate::error::Kind;
use crate::id::RunId;
use crate::position::Identity;

pub const BUDGET_MICROS: u64 = 5_000_000;

/// Where choices come from: a tape that a test writes or that proptest shrinks. An empty tape
/// chooses 0, which is always the choice that lets the run go well.
#[derive(Debug, Clone, Default)]
pub struct Tape {
    choices: std::collections::VecDeque<u16>,
}

impl Tape {
    pub fn new(choices: Vec<u16>) -> Self {
        Self { choices: choices.into() }
    }

    pub fn choose(&mut self, below: u16) -> u16 {
        self.choices.pop_front().map_or(0, |choice| choice % below.max(1))
    }

    /// True once in `out_of`, never on an empty tape.
    pub fn rarely(&mut self, out_of: u16) -> bool {
        self.choices.pop_front().is_some_and(|choice| choice % out_of == out_of - 1)
    }

    pub fn is_over(&self) -> bool {
        self.choices.is_empty()
    }
}

#[derive(Debug, Clone)]
pub struct Setting {
    pub groups: Vec<Vec<&'static str>>,
    pub blind: BTreeSet<&'static str>,
    pub level: Level,
    pub accept: Vec<Level>,
    pub order_holds: bool,
    pub pause_steps: u32,
    pub references: Vec<(&'static str, &'static str)>,
    /// Stores that are written to even while writers are paused.
    pub leaky: BTreeSet<&'static str>,
    /// Stores that are written to at every turn, instead of by the tape.
    pub busy: BTreeSet<&'static str>,
    pub accept_named_loss: bool,
    pub hold_micros: u64,
    /// Stores whose drain names a loss.
    pub torn: BTreeSet<&'static str>,
    /// Stores whose pin is found lost.
    pub lost: BTreeSet<&'static str>,
    pub missing: u64,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            groups: vec![vec!["a", "b"], vec!["c"]],
            blind: BTreeSet::new(),
            level: Level::Strict,
            accept: Vec::new(),
            order_holds: true,
            pause_steps: 0,
            references: vec![("a", "c"), ("b", "c"), ("a", "b")],
            leaky: BTreeSet::new(),
            busy: BTreeSet::new(),
            accept_named_loss: false,
            hold_micros: 3_600_000_000,
            torn: BTreeSet::new(),
            lost: BTreeSet::new(),
            missing: 0,
        }
    }
}

impl Setting {
    pub fn spec(&self) -> Spec {
        let name = |text: &&str| StoreName::new(*text).expect("valid");
        Spec {
            run: RunId::from_random([7; 8]),
            pin_groups: self.groups.iter().map(|group| group.iter().map(name).collect()).collect(),
            order_holds: self.order_holds,
            level: self.level,
            accept: self.accept.clone(),
            optimistic_tries: 3,
            pause_steps: self.pause_steps,
            pause_budget_micros: BUDGET_MICROS,
            accept_named_loss: self.accept_named_loss,
            references: self
                .references
                .iter()
                .map(|(from, to)| ReferenceSpec {
                    from: name(from),
                    to: name(to),
                    kind: "keys".to_owned(),
                    missing_max: Some(0),
                })
                .collect(),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct SimStore {
    /// The turns at which writes happened.
    writes: Vec<u64>,
    /// Something that only `release` lets go.
    held: bool,
    /// The turn at which the latest pin was made.
    pinned_turn: u64,
    checked: bool,
}

/// The world, the machine in it, and the journal.
#[derive(Debug)]
pub struct World {
    pub setting: Setting,
    pub machine: Coordinator,
    pub journal: Vec<(Event, Vec<Effect>)>,
    pub in_flight: BTreeMap<EffectId, Action>,
    pub now: Micros,
    pub turn: u64,
    pub stores: BTreeMap<StoreName, SimStore>,
    pub steps: Vec<bool>,
    pub watchdog: bool,
    pub lease: bool,
    pub backup_open: bool,
    pub snapshot: bool,
    pub statefile: bool,
    /// A write of the statefile that is still on its way from an earlier life.
    pub late_statefile: bool,
    pub conclusion: Option<Conclusion>,
    pub asked: Vec<Action>,
    /// Resume steps whose failure the test demands.
    pub paused_since: Option<Micros>,
    pub longest_pause_micros: u64,
}

impl World {
    pub fn new(setting: Setting) -> Self {
        let machine = Coordinator::new(setting.spec());
        let stores = machine.spec().stores().map(|store| (store.clone(), SimStore::default())).collect();
        let steps = vec![false; setting.pause_steps as usize];
        Self {
            setting,
            machine,
            journal: Vec::new(),
            in_flight: BTreeMap::new(),
            now: Micros(1_000),
            turn: 0,
            stores,
            steps,
            watchdog: false,
            lease: false,
            backup_open: false,
            snapshot: false,
            statefile: false,
            late_statefile: false,
            conclusion: None,
            asked: Vec::new(),
            paused_since: None,
            longest_pause_micros: 0,
        }
    }

    /// Gives one event to the machine, as the engine does: journal, step, then perform.
    pub fn happen(&mut self, what: Happening) {
        self.tick_if_due();
        self.give(Event::new(self.now, what));
    }

    fn tick_if_due(&mut self) {
        if self.machine.wake_at().is_some_and(|at| at <= self.now) {
            self.give(Event::new(self.now, Happening::Tick));
        }
    }

    fn give(&mut self, event: Event) {
        let before = self.machine.clone();
        match self.machine.step(event.clone()) {
            Ok(effects) => {
                self.journal.push((event, effects.clone()));
                for effect in effects {
                    self.begin(effect);
                }
            }
            Err(_) => assert!(before == self.machine, "a refused event changed the state"),
        }
    }

    fn begin(&mut self, effect: Effect) {
        let Effect { id, action } = effect;
        self.check_asked(&action);
        self.asked.push(action.clone());
        match &action {
            Action::Conclude { conclusion } => {
                assert!(self.in_flight.is_empty(), "concluded while effects are under way: {:?}", self.in_flight);
                self.conclusion = Some((**conclusion).clone());
            }
            Action::Interrupt { .. } => {}
            Action::Pause { .. } => {
                self.paused_since.get_or_insert(self.now);
                self.in_flight.insert(id, action);
            }
            Action::Resume { .. } => {
                if let Some(since) = self.paused_since
                    && self.every_step_is_asked_to_resume()
                {
                    self.longest_pause_micros = self.longest_pause_micros.max(self.now.since(since));
                    self.paused_since = None;
                }
                self.in_flight.insert(id, action);
            }
            _ => {
                self.in_flight.insert(id, action);
            }
        }
    }

    /// Each pause step that was ever asked for has been asked to resume since.
    fn every_step_is_asked_to_resume(&self) -> bool {
        (0..self.setting.pause_steps).all(|step| {
            let last = self.asked.iter().rev().find(|action| match action {
                Action::Pause { step: other } | Action::Resume { step: other } => *other == step,
                _ => false,
            });
            !matches!(last, Some(Action::Pause { .. }))
        })
    }

    /// What must hold whenever an effect is asked for.
    fn check_asked(&self, action: &Action) {
        if let Some(store) = action.store() {
            let clash = self.in_flight.values().find(|other| other.store() == Some(store));
            assert!(clash.is_none(), "two calls on one store: {clash:?} and {action:?}");
        }
        match action {
            Action::WriteStatefile => {
                let all = self.stores.values().all(|store| store.checked);
                assert!(all, "sealed with an unchecked pin");
                assert!(self.snapshot, "sealed without a snapshot");
            }
            Action::RemoveSnapshot => {
                assert!(!self.statefile && !self.late_statefile, "the snapshot of a point would be removed");
            }
            Action::Pause { .. } => assert!(self.watchdog, "paused without a watchdog"),
            Action::StopWatchdog => {
                assert!(self.steps.iter().all(|paused| !paused), "no watchdog, but writers are held back");
            }
            Action::Drain { .. } if self.machine.cut().is_some_and(|cut| cut.level == Level::Strict) => {
                assert!(self.pins_show_one_moment(), "claimed strict, but a write fell between two pins");
            }
            _ => {}
        }
    }

    /// Whether there is a moment at which every store was in the state that its pin shows. A store that
    /// cannot see its own writes, and is written to although its writers are said to be held back, is
    /// left out: nobody could know.
    pub fn pins_show_one_moment(&self) -> bool {
        let is_deceived = |name: &str| self.setting.blind.contains(name) && self.setting.leaky.contains(name);
        let stores = || self.stores.iter().filter(|(name, _)| !is_deceived(name.as_str())).map(|(_, store)| store);
        let begin = |store: &SimStore| store.writes.iter().copied().filter(|t| *t <= store.pinned_turn).max();
        let end = |store: &SimStore| store.writes.iter().copied().filter(|t| *t > store.pinned_turn).min();
        let latest_begin = stores().filter_map(begin).max().unwrap_or(0);
        let first_end = stores().filter_map(end).min().unwrap_or(u64::MAX);
        latest_begin < first_end
    }

    pub fn writers_paused(&self) -> bool {
        !self.steps.is_empty() && self.steps.iter().all(|paused| *paused)
    }

    /// Lets time pass, but never past the machine's alarm without a tick.
    pub fn pass(&mut self, micros: u64) {
        let until = self.now.plus(micros);
        while let Some(at) = self.machine.wake_at()
            && at <= until
            && self.conclusion.is_none()
        {
            self.now = self.now.max(at);
            let before = self.machine.wake_at();
            self.give(Event::new(self.now, Happening::Tick));
            assert_ne!(before, self.machine.wake_at(), "the alarm rings for ever");
        }
        self.now = self.now.max(until);
    }

    /// Writers do their work: `busy` stores always, others where the tape says so.
    pub fn write(&mut self, tape: &mut Tape) {
        self.turn += 1;
        let paused = self.writers_paused();
        for (name, store) in &mut self.stores {
            let leaky = self.setting.leaky.contains(name.as_str());
            let wants = self.setting.busy.contains(name.as_str()) || tape.rarely(6);
            if wants && (!paused || leaky) {
                store.writes.push(self.turn);
            }
        }
    }

    /// Makes the effect happen in the world and says what a driver would answer.
    pub fn perform(&mut self, action: &Action) -> Outcome {
        self.turn += 1;
        let turn = self.turn;
        if let Some(store) = action.store().cloned() {
            return self.perform_on(&store, action, turn);
        }
        match action {
            Action::AcquireLease => self.lease = true,
            Action::ReleaseLease => self.lease = false,
            Action::StartWatchdog { .. } => self.watchdog = true,
            Action::StopWatchdog => self.watchdog = false,
            Action::Pause { step } => self.steps[*step as usize] = true,
            Action::Resume { step } => self.steps[*step as usize] = false,
            Action::AbandonBackup => self.backup_open = false,
            Action::RemoveSnapshot => self.snapshot = false,
            Action::CheckReference { .. } => {
                let missing = self.setting.missing;
                return Outcome::References(ReferenceCount {
                    checked: 9,
                    missing,
                    examples: Vec::new(),
                    unreferenced: None,
                });
            }
            Action::WriteSnapshot => {
                self.backup_open = false;
                self.snapshot = true;
                return Outcome::SnapshotWritten { snapshot: "5a".to_owned(), bytes_stored: 1 };
            }
            Action::WriteStatefile => {
                assert!(self.snapshot, "a statefile without its snapshot");
                self.statefile = true;
            }
            Action::ReadStatefile => return Outcome::StatefileRead { present: self.statefile },
            other => panic!("not answered: {other:?}"),
        }
        Outcome::Done
    }

    fn perform_on(&mut self, name: &StoreName, action: &Action, turn: u64) -> Outcome {
        let observes = !self.setting.blind.contains(name.as_str());
        let torn = self.setting.torn.contains(name.as_str());
        let lost = self.setting.lost.contains(name.as_str());
        let now = self.now;
        let store = self.stores.get_mut(name).expect("a store of the platform");
        match action {
            Action::Prepare { .. } => {
                store.held = true;
                Outcome::Prepared { probe: Box::new(probe(name, observes)), safe_for_micros: self.setting.hold_micros }
            }
            Action::Observe { .. } => {
                let writes = store.writes.len();
                Outcome::Observed { position: observes.then(|| Position::new("sim", writes.to_string())) }
            }
            Action::Pin { cut, .. } => {
                store.held = true;
                store.checked = false;
                store.pinned_turn = turn;
                let position = Position::new("sim", store.writes.len().to_string());
                let pin = Pin { cut: cut.clone(), position, remains: vec![format!("{name}-{}", cut.attempt)] };
                let utc = Timestamp::UNIX_EPOCH;
                Outcome::Pinned(Box::new(Pinned { pin, between: (now, now.plus(5)), between_utc: (utc, utc) }))
            }
            Action::Drain { .. } => {
                self.backup_open = true;
                let loss = || Loss { what: "f".to_owned(), why: "changed".to_owned() };
                let losses = if torn { vec![loss()] } else { Vec::new() };
                let drained = Drained { losses, ..Drained::default() };
                Outcome::Drained(Box::new(StoreDrained { drained, files: 1, bytes: 1 }))
            }
            Action::CheckPin { pin, .. } => {
                assert_eq!(
                    pin.position.text,
                    store.writes.iter().filter(|t| **t <= store.pinned_turn).count().to_string()
                );
                store.checked = !lost;
                if lost { Outcome::PinLost { reason: "gone".to_owned() } } else { Outcome::PinValid }
            }
            Action::Release { .. } => {
                store.held = false;
                Outcome::Done
            }
            other => panic!("not a call on a store: {other:?}"),
        }
    }

    /// Answers an effect: done, failed before it happened, or failed after it.
    pub fn answer(&mut self, id: EffectId, fault: Fault) {
        let Some(action) = self.in_flight.remove(&id) else { return };
        let outcome = match fault {
            Fault::None => self.perform(&action),
            Fault::Before => failed(true),
            Fault::Unclear => failed(false),
            Fault::After => {
                self.perform(&action);
                failed(false)
            }
        };
        let event = Happening::Answer { effect: id, outcome };
        self.happen(event.clone());
        self.refused(event);
    }

    /// Gives an event that must be refused without a trace.
    pub fn refused(&mut self, what: Happening) {
        let before = self.machine.clone();
        self.machine.step(Event::new(self.now.plus(1), what)).expect_err("refused");
        assert!(before == self.machine, "a refused event changed the state");
    }

    /// The engine dies, with what was under way done or not as `happened` says; another one
    /// replays the journal and goes on.
    pub fn crash(&mut self, happened: &mut dyn FnMut() -> bool) {
        for (_, action) in std::mem::take(&mut self.in_flight) {
            if happened() {
                self.perform(&action);
            } else if action == Action::WriteStatefile && happened() {
                self.late_statefile = true;
            }
        }
        self.machine = self.replayed();
        self.give(Event::new(self.now, Happening::Recovered));
    }

    /// Like [`crash`](Self::crash), but the next engine comes only after a while. The watchdog has
    /// let writers go meanwhile.
    pub fn crash_for(&mut self, micros: u64, happened: &mut dyn FnMut() -> bool) {
        self.now = self.now.plus(micros);
        self.paused_since = None;
        self.crash(happened);
        let mut asked = Vec::new();
        for action in self.in_flight.values() {
            assert!(!asked.contains(&action), "asked twice after a death: {action:?}");
            asked.push(action);
        }
    }

    /// A new machine that was told what the journal tells. Compares every step on the way.
    pub fn replayed(&self) -> Coordinator {
        let mut machine = Coordinator::new(self.setting.spec());
        for (event, effects) in &self.journal {
            let text = serde_json::to_string(event).expect("events serialize");
            let event: Event = serde_json::from_str(&text).expect("events parse");
            let again = machine.step(event).expect("the journal holds legal events only");
            assert_eq!(again, *effects, "a replay asks for other effects");
        }
        machine
    }

    /// Lets everything go well from here on, and checks what must hold at the end.
    pub fn finish(&mut self) -> Conclusion {
        for _ in 0..2_000 {
            if self.conclusion.is_some() {
                break;
            }
            self.write(&mut Tape::default());
            let first = self.in_flight.keys().next().copied();
            match (first, self.machine.wake_at()) {
                (Some(id), _) => self.answer(id, Fault::None),
                (None, Some(at)) => self.pass(at.since(self.now) + 1),
                (None, None) => panic!("stuck in {:?}", self.machine.state()),
            }
        }
        self.check_end();
        self.conclusion.clone().expect("the run ends when the world answers")
    }

    pub fn check_end(&self) {
        let Some(conclusion) = &self.conclusion else { panic!("no end: {:?}", self.machine.state()) };
        let (sealed, warnings, unknown) = match conclusion {
            Conclusion::Sealed { warnings, .. } => (true, warnings, false),
            Conclusion::Failed { warnings, commit_unknown, .. } => (false, warnings, *commit_unknown),
        };
        let gave_up = |operation: &str| warnings.iter().any(|w| w.operation.as_deref() == Some(operation));
        for (name, store) in &self.stores {
            assert!(!store.held || gave_up("release"), "store {name} is still held");
        }
        assert!(self.steps.iter().all(|paused| !paused) || gave_up("resume"), "writers are still held back");
        assert!(!self.watchdog || gave_up("stop_watchdog") || gave_up("resume"), "the watchdog still runs");
        assert!(!self.lease || gave_up("release_lease"), "the lease is still held");
        assert!(!self.backup_open || gave_up("abandon_backup"), "the backup is still open");
        if !unknown {
            assert_eq!(sealed, self.statefile, "the verdict and the bucket disagree: {conclusion:?}");
        }
        if self.statefile || self.late_statefile {
            assert!(self.snapshot, "a point without its snapshot");
        }
        assert!(self.longest_pause_micros <= BUDGET_MICROS, "paused for {} µs", self.longest_pause_micros);
        assert!(self.machine.clone() == self.replayed(), "a replay ends elsewhere");
        assert_eq!(self.machine.clone().step(Event::new(self.now, Happening::Tick)), Err(IllegalEvent::Concluded));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It failed and did not happen, and everybody knows.
    Before,
    /// It failed and did not happen, but nobody knows.
    Unclear,
    /// It happened, but the answer is a failure.
    After,
}

pub fn failed(certain: bool) -> Outcome {
    Outcome::Failed(Box::new(Failure { certain, ..Failure::new(Kind::Io, "the simulated world says no") }))
}

fn probe(name: &StoreName, observes_writes: bool) -> Probe {
    Probe {
        version: "1".to_owned(),
        identity: Identity { driver: "sim".to_owned(), native: None, endpoint: format!("sim/{name}") },
        capability: Capability {
            pin: PinKind::Snapshot,
            observes_writes,
            incremental: false,
            edges: true,
            swaps_in_place: true,
            partial_restore: true,
        },
        missing_privileges: Vec::new(),
        warnings: Vec::new(),
    }
}
