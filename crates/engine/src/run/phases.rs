//! Tells those who watch how far a run is, and keeps how long each phase took.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use stillpoint_core::coordinator::{Coordinator, State};
use stillpoint_core::id::StoreName;
use stillpoint_core::statefile::Level;

use crate::effects::Hands;
use crate::progress::{Phase, StoreProgress, Update};

/// How far back the rate looks.
const RATE_OVER: Duration = Duration::from_secs(3);

/// How long one phase took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// How long, in milliseconds.
    pub elapsed_millis: u64,
    /// What came of it, for people.
    pub outcome: String,
}

pub(super) struct Phases {
    hands: Arc<Hands>,
    current: Option<(Phase, Duration)>,
    ended: Vec<PhaseTime>,
    /// Bytes done by store, at some instants of the last seconds.
    history: BTreeMap<StoreName, Vec<(Duration, u64)>>,
}

fn phase_of(state: State) -> Option<Phase> {
    match state.phase() {
        _ if matches!(state, State::New | State::Concluded) => None,
        "prepare" => Some(Phase::Prepare),
        "cut" => Some(Phase::Cut),
        "drain" => Some(Phase::Drain),
        "seal" => Some(Phase::Seal),
        _ => Some(Phase::Release),
    }
}

impl Phases {
    pub(super) fn new(hands: Arc<Hands>) -> Self {
        Self { hands, current: None, ended: Vec::new(), history: BTreeMap::new() }
    }

    fn now(&self) -> Duration {
        self.hands.surroundings.clock.monotonic()
    }

    /// Called after every step.
    pub(super) fn moved(&mut self, _before: State, coordinator: &Coordinator) {
        let phase = phase_of(coordinator.state());
        if phase == self.current.map(|(phase, _)| phase) {
            return;
        }
        self.end_current(coordinator);
        if let Some(phase) = phase {
            self.current = Some((phase, self.now()));
            self.hands.surroundings.progress.update(Update::PhaseBegan { phase });
        }
    }

    fn end_current(&mut self, coordinator: &Coordinator) {
        let Some((phase, began)) = self.current.take() else { return };
        if phase == Phase::Drain {
            self.tell_stores();
        }
        let elapsed = self.now().saturating_sub(began);
        let elapsed_millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let outcome = outcome(phase, coordinator);
        self.ended.push(PhaseTime { phase, elapsed_millis, outcome: outcome.clone() });
        self.hands.surroundings.progress.update(Update::PhaseEnded { phase, outcome, elapsed_millis });
    }

    /// The phases that there were.
    pub(super) fn end(mut self, coordinator: &Coordinator) -> Vec<PhaseTime> {
        self.end_current(coordinator);
        self.ended
    }

    /// Sends how far every drain is.
    pub(super) fn tell_stores(&mut self) {
        let now = self.now();
        let mut stores = Vec::new();
        for (store, view) in self.hands.drains() {
            let (bytes_done, items_done, bytes_expected) = view.context.progress();
            let history = self.history.entry(store.clone()).or_default();
            history.push((now, bytes_done));
            history.retain(|(at, _)| *at + RATE_OVER >= now);
            let bytes_per_second = rate(history);
            stores.push(StoreProgress {
                store,
                bytes_done,
                bytes_expected,
                items_done,
                bytes_per_second,
                done: view.done,
            });
        }
        self.hands.surroundings.progress.update(Update::Stores { stores });
    }
}

fn rate(history: &[(Duration, u64)]) -> u64 {
    let (Some((begin, before)), Some((end, after))) = (history.first(), history.last()) else { return 0 };
    let micros = u64::try_from(end.saturating_sub(*begin).as_micros()).unwrap_or(u64::MAX);
    after.saturating_sub(*before).saturating_mul(1_000_000).checked_div(micros).unwrap_or(0)
}

/// One line for people on what a phase came to.
fn outcome(phase: Phase, coordinator: &Coordinator) -> String {
    if let Some(failure) = coordinator.failure()
        && phase != Phase::Release
    {
        return format!("failed: {}", failure.message);
    }
    match phase {
        Phase::Prepare => match coordinator.spec().store_count() {
            1 => "1 store ready".to_owned(),
            count => format!("{count} stores ready"),
        },
        Phase::Cut => cut_outcome(coordinator),
        Phase::Drain => {
            let drained = coordinator.spec().stores().filter_map(|store| coordinator.drained(store));
            let (mut bytes, mut read) = (0u64, 0u64);
            for store in drained {
                bytes += store.bytes;
                read += store.drained.bytes_read;
            }
            format!("{} held, {} of them read", size(bytes), size(read))
        }
        Phase::Seal => "every pin checked".to_owned(),
        Phase::Recover | Phase::Release => String::new(),
    }
}

/// `1.2 GiB`, for people.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut shown = (bytes as f64, "B");
    for unit in units {
        if shown.0 < 1024.0 {
            break;
        }
        shown = (shown.0 / 1024.0, unit);
    }
    if shown.1 == "B" { format!("{bytes} B") } else { format!("{:.1} {}", shown.0, shown.1) }
}

fn cut_outcome(coordinator: &Coordinator) -> String {
    let Some(cut) = coordinator.cut() else { return "no cut".to_owned() };
    let level = match cut.level {
        Level::Strict => "strict",
        Level::Ordered => "ordered",
        Level::Independent => "independent",
    };
    let tries = match cut.tries {
        1 => String::new(),
        2 => " (2nd try)".to_owned(),
        3 => " (3rd try)".to_owned(),
        tries => format!(" ({tries}th try)"),
    };
    if cut.paused {
        let millis = coordinator.pause_micros().div_ceil(1000);
        format!("{level} · writers were paused for {millis} ms{tries}")
    } else {
        format!("{level} · no pause was needed{tries}")
    }
}
