//! From PREPARE to the end of CUT: tries without a pause, the pause, and what level it all proves.
//!
//! Positions that are equal before the first and after the last pin prove that no write fell
//! between two pins; a pause is only asked for where that proof cannot be had for nothing.

use super::effect::{Action, Side};
use super::event::{Failure, Pinned};
use super::{Coordinator, CutResult, PAUSED_TRIES_MAX, PREPARE_ROUNDS_MAX, PauseRecord, State};
use crate::error::Kind;
use crate::id::StoreName;
use crate::position::Position;
use crate::statefile::Level;

/// The longest time that is kept back from the budget for the undo itself.
const RESUME_RESERVE_MICROS_MAX: u64 = 1_000_000;

impl Coordinator {
    pub(super) fn prepare_all(&mut self) {
        let stores: Vec<_> = self.spec.stores().cloned().collect();
        self.prepare(stores);
    }

    fn prepare(&mut self, stores: Vec<StoreName>) {
        self.state = State::Preparing;
        self.prepare_rounds += 1;
        for store in stores {
            self.ask(Action::Prepare { store });
        }
    }

    /// Prepares again what would not last; true if that is under way.
    fn renew_holds(&mut self) -> bool {
        let now = self.now;
        let stale: Vec<_> =
            self.stores.iter().filter(|(_, record)| record.hold_ends < now).map(|(store, _)| store.clone()).collect();
        if stale.is_empty() {
            return false;
        }
        if self.prepare_rounds >= PREPARE_ROUNDS_MAX {
            let mut failure = Failure::new(Kind::TimedOut, "the hold on a store runs out before the cut can begin");
            failure.store = stale.first().map(|store| store.as_str().to_owned());
            failure.hint = Some("some other store takes too long to prepare; see the journal for which".to_owned());
            self.fail(failure);
        } else {
            self.prepare(stale);
        }
        true
    }

    /// Everything is prepared: chooses between a try without a pause, a pause, and giving up.
    pub(super) fn begin_cut(&mut self) {
        if self.renew_holds() {
            return;
        }
        let blind = self.blind_stores();
        if self.tries.last || blind.is_empty() || !self.wants_proof() {
            self.begin_try();
        } else if self.spec.pause_steps > 0 {
            self.begin_pause();
        } else if self.spec.accepts(self.unpaused_level()) {
            self.tries.last = true;
            self.begin_try();
        } else {
            self.fail_level(format!("store `{}` cannot tell whether it is being written to", blind[0]));
        }
    }

    fn blind_stores(&self) -> Vec<StoreName> {
        let sees = |store: &StoreName| self.observes(store);
        self.spec.stores().filter(|store| !sees(store)).cloned().collect()
    }

    fn observes(&self, store: &StoreName) -> bool {
        self.probe(store).is_some_and(|probe| probe.capability.observes_writes)
    }

    /// The level of pins that were made while writers ran and writes were seen.
    fn unpaused_level(&self) -> Level {
        match (self.spec.store_count(), self.spec.order_holds) {
            (0 | 1, _) => Level::Strict,
            (_, true) => Level::Ordered,
            (_, false) => Level::Independent,
        }
    }

    /// Whether what is asked for takes more than pinning in the right order.
    fn wants_proof(&self) -> bool {
        self.unpaused_level() < self.spec.level
    }

    fn is_paused(&self) -> bool {
        self.pause.as_ref().is_some_and(|pause| pause.holding)
    }

    /// Whether observing can prove anything in the try that begins now.
    fn observed_stores(&self) -> Vec<StoreName> {
        let all: Vec<_> = self.spec.stores().filter(|store| self.observes(store)).cloned().collect();
        let useful = self.is_paused() || all.len() == self.spec.store_count();
        if useful && self.spec.store_count() > 1 { all } else { Vec::new() }
    }

    fn begin_try(&mut self) {
        self.count_try();
        let observed = self.observed_stores();
        if observed.is_empty() {
            self.pin_group(0);
            return;
        }
        self.state = State::ObservingBefore;
        self.observe(observed, Side::Before);
    }

    fn count_try(&mut self) {
        self.tries.attempt += 1;
        if self.is_paused() {
            self.tries.paused += 1;
        } else {
            self.tries.unpaused += 1;
        }
        for record in self.stores.values_mut() {
            record.before = None;
            record.after = None;
            record.pinned = None;
        }
    }

    fn observe(&mut self, stores: Vec<StoreName>, side: Side) {
        for store in stores {
            let cut = self.cut_id();
            self.ask(Action::Observe { store, cut, side });
        }
    }

    pub(super) fn note_position(&mut self, store: &StoreName, side: Side, position: Option<Position>) {
        let record = self.record(store);
        match side {
            Side::Before => record.before = Some(position),
            Side::After => record.after = Some(position),
        }
    }

    pub(super) fn note_pin(&mut self, store: &StoreName, pinned: Pinned, interrupted: bool) {
        let record = self.record(store);
        for left in &pinned.pin.remains {
            if !record.remains.contains(left) {
                record.remains.push(left.clone());
            }
        }
        if !interrupted {
            record.pinned = Some(pinned);
        }
    }

    /// Pins one group; after the last one the positions are read again.
    pub(super) fn pin_group(&mut self, group: u32) {
        if let Some(stores) = self.spec.pin_groups.get(group as usize).cloned() {
            self.state = State::Pinning { group };
            for store in stores {
                let cut = self.cut_id();
                self.ask(Action::Pin { store, cut });
            }
            return;
        }
        self.state = State::ObservingAfter;
        let observed: Vec<_> =
            self.stores.iter().filter(|(_, r)| r.before.is_some()).map(|(store, _)| store.clone()).collect();
        if observed.is_empty() { self.judge_try() } else { self.observe(observed, Side::After) }
    }

    /// All pins of the try stand and all positions are known.
    pub(super) fn judge_try(&mut self) {
        let moved = self.stores.iter().find(|(_, r)| r.before != r.after).map(|(store, _)| store.clone());
        let silent = self.stores.values().any(|r| !matches!(r.after, Some(Some(_))));
        let strict = self.spec.store_count() <= 1 || (moved.is_none() && (self.is_paused() || !silent));
        if strict {
            self.cut_made(Level::Strict);
        } else if self.wants_proof() && !self.tries.last && self.may_try_again(silent) {
            self.try_again();
        } else if self.wants_proof() && self.spec.pause_steps > 0 && self.pause.is_none() {
            if !self.renew_holds() {
                self.begin_pause();
            }
        } else if self.spec.accepts(self.unpaused_level()) {
            self.cut_made(self.unpaused_level());
        } else {
            let why = match (moved, self.is_paused()) {
                (Some(store), true) => format!("store `{store}` was written to although writers were paused"),
                (Some(store), false) => format!("store `{store}` was written to during every try of the cut"),
                (None, _) => "not every store could tell whether it was being written to".to_owned(),
            };
            self.fail_level(why);
        }
    }

    fn may_try_again(&self, silent: bool) -> bool {
        if self.is_paused() {
            self.tries.paused < PAUSED_TRIES_MAX
        } else {
            !silent && self.pause.is_none() && self.tries.unpaused < self.spec.optimistic_tries
        }
    }

    /// The next try at once; what was read after the last one serves as what is read before.
    fn try_again(&mut self) {
        if !self.is_paused() && self.renew_holds() {
            return;
        }
        let positions: Vec<_> = self.stores.values().map(|record| record.after.clone()).collect();
        self.count_try();
        for (record, position) in self.stores.values_mut().zip(positions) {
            record.before = position;
        }
        self.pin_group(0);
    }

    fn cut_made(&mut self, level: Level) {
        let pins = || self.stores.values().filter_map(|record| record.pinned.as_ref()).map(|pinned| pinned.between);
        let begin = pins().map(|(begin, _)| begin).min().unwrap_or(self.now);
        let end = pins().map(|(_, end)| end).max().unwrap_or(self.now);
        self.cut = Some(CutResult {
            cut: self.cut_id(),
            level,
            tries: self.tries.attempt,
            skew_micros: end.since(begin),
            paused: self.is_paused(),
        });
        if self.is_paused() { self.resume() } else { self.begin_drain() }
    }

    fn fail_level(&mut self, why: String) {
        let asked = level_name(self.spec.level);
        let reached = level_name(self.unpaused_level());
        let mut failure = Failure::new(Kind::Unproven, format!("the level `{asked}` was not reached: {why}"));
        failure.operation = Some("cut".to_owned());
        failure.hint = Some(if self.spec.pause_steps == 0 {
            format!("declare pause steps, or accept `{reached}` under cut.accept")
        } else {
            format!("check what the pause steps hold back, or accept `{reached}` under cut.accept")
        });
        self.fail(failure);
    }

    fn begin_pause(&mut self) {
        let budget = self.spec.pause_budget_micros;
        let reserve = (budget / 5).min(RESUME_RESERVE_MICROS_MAX);
        let deadline = self.now.plus(budget);
        self.pause = Some(PauseRecord {
            deadline,
            give_up_at: self.now.plus(budget - reserve),
            began_at: None,
            ended_at: None,
            holding: true,
            over_budget: false,
        });
        self.state = State::Pausing { steps_done: 0 };
        self.ask(Action::StartWatchdog { deadline });
    }

    pub(super) fn pause_next(&mut self, steps_done: u32) {
        if steps_done == self.spec.pause_steps {
            self.begin_try();
            return;
        }
        let now = self.now;
        if let Some(pause) = &mut self.pause {
            pause.began_at.get_or_insert(now);
        }
        self.ask(Action::Pause { step: steps_done });
    }

    /// Ends the pause when its budget is nearly used up: writers first, then what becomes of the run.
    pub(super) fn watch_budget(&mut self) {
        let Some(pause) = &mut self.pause else { return };
        if !pause.holding || self.now < pause.give_up_at || self.state == State::Unwinding {
            return;
        }
        pause.over_budget = true;
        if self.spec.accepts(self.unpaused_level()) {
            self.interrupt_all();
            self.tries.last = true;
            self.resume();
        } else {
            let mut failure = Failure::new(Kind::TimedOut, "the cut did not come to an end within the pause budget");
            failure.operation = Some("cut".to_owned());
            failure.hint = Some("writers run again; raise cut.pauseBudget if they can bear it".to_owned());
            self.fail(failure);
        }
    }

    fn resume(&mut self) {
        self.state = State::Resuming;
        self.end_hold();
        self.unwind_pause();
    }

    pub(super) fn end_hold(&mut self) {
        if let Some(pause) = &mut self.pause {
            pause.holding = false;
        }
    }

    /// Writers are being let go. Once they are, the drain begins, or the last try without a pause.
    pub(super) fn resume_then_go_on(&mut self) {
        self.unwind_pause();
        if self.resume_gave_up() {
            let mut failure = Failure::new(Kind::Unproven, "the writers could not be let go");
            failure.operation = Some("resume".to_owned());
            failure.hint = Some("run the resume step by hand; the watchdog tries once more at the deadline".to_owned());
            self.fail(failure);
        } else if !self.pause_is_unwound() || self.is_working() {
        } else if self.cut.is_some() {
            self.begin_drain();
        } else {
            self.begin_cut();
        }
    }
}

pub(super) fn level_name(level: Level) -> &'static str {
    match level {
        Level::Strict => "strict",
        Level::Ordered => "ordered",
        Level::Independent => "independent",
    }
}
