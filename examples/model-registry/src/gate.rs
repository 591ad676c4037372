//! The gate that every write passes: open, or closed for a pause.
//!
//! Closing waits until nothing is in flight; what cannot come to its end in time opens the gate
//! again and refuses the pause. A closed gate opens by itself when its lease runs out: whoever asked
//! for the pause may have died.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Result;
use crate::record::{Happening, Recorder};

/// How long a pause waits for what is in flight.
const QUIET_WITHIN: Duration = Duration::from_secs(3);

/// The gate. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    lease: Duration,
    recorder: Arc<Recorder>,
}

#[derive(Debug, Default)]
struct State {
    closed_until: Option<Instant>,
    in_flight: u32,
    pauses: u64,
    /// Pauses that only the lease ended.
    leases_run_out: u64,
}

/// What the gate looks like, for the oracle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Writers are held back.
    pub closed: bool,
    /// Versions on their way.
    pub in_flight: u32,
    /// Pauses so far.
    pub pauses: u64,
    /// Pauses that only the lease ended.
    pub leases_run_out: u64,
}

/// A write on its way; dropped when it has ended.
#[derive(Debug)]
pub struct Passage(Arc<Shared>);

impl Drop for Passage {
    fn drop(&mut self) {
        locked(&self.0.state).in_flight -= 1;
        self.0.changed.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// An open gate.
    pub fn new(lease: Duration, recorder: Arc<Recorder>) -> Self {
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), lease, recorder };
        Self { shared: Arc::new(shared) }
    }

    /// Waits until the gate is open, and passes.
    pub fn pass(&self) -> Passage {
        let mut state = locked(&self.shared.state);
        while let Some(until) = state.closed_until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.open(&mut state, "lease");
                break;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.in_flight += 1;
        Passage(Arc::clone(&self.shared))
    }

    /// Holds writers back; returns when nothing is in flight any more. May be repeated: then the
    /// lease begins anew.
    pub fn close(&self) -> Result<()> {
        let began = Instant::now();
        let mut state = locked(&self.shared.state);
        if state.closed_until.is_none() {
            self.shared.recorder.note(&Happening::PauseAsked)?;
            state.pauses += 1;
        }
        state.closed_until = Some(began + self.shared.lease);
        while state.in_flight > 0 {
            let left = QUIET_WITHIN.saturating_sub(began.elapsed());
            if left.is_zero() {
                let in_flight = state.in_flight;
                self.open(&mut state, "refused");
                return Err(format!("{in_flight} versions do not come to their end; writers go on"));
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            if state.closed_until.is_none() {
                return Err("someone let writers go while the pause was on its way".to_owned());
            }
        }
        self.shared.recorder.note(&Happening::Paused)
    }

    /// Lets writers go. May be repeated.
    pub fn resume(&self) {
        self.open(&mut locked(&self.shared.state), "hook");
    }

    fn open(&self, state: &mut State, by: &str) {
        if state.closed_until.take().is_none() {
            return;
        }
        state.leases_run_out += u64::from(by == "lease");
        // Writers must go on whatever becomes of the record; what it lacks, the judge will miss.
        if self.shared.recorder.note(&Happening::Resumed(by.to_owned())).is_err() {
            state.leases_run_out += 1;
        }
        self.shared.changed.notify_all();
    }

    /// What it looks like now.
    pub fn view(&self) -> View {
        let state = locked(&self.shared.state);
        View {
            closed: state.closed_until.is_some_and(|until| until > Instant::now()),
            in_flight: state.in_flight,
            pauses: state.pauses,
            leases_run_out: state.leases_run_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(lease: Duration) -> (Gate, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let recorder = Recorder::open(&folder.path().join("record")).expect("opens");
        (Gate::new(lease, Arc::new(recorder)), folder)
    }

    #[test]
    fn a_pause_waits_for_what_is_in_flight_and_holds_what_comes() {
        let (gate, _folder) = gate(Duration::from_secs(60));
        let passage = gate.pass();
        let closing = gate.clone();
        let closed = std::thread::spawn(move || closing.close());
        while !gate.view().closed {
            std::thread::yield_now();
        }
        assert!(!closed.is_finished());
        drop(passage);
        closed.join().expect("no panic").expect("all is quiet");
        let passing = gate.clone();
        let passed = std::thread::spawn(move || drop(passing.pass()));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!passed.is_finished());
        gate.resume();
        gate.resume();
        passed.join().expect("it goes on");
        assert_eq!((gate.view().pauses, gate.view().leases_run_out), (1, 0));
    }

    #[test]
    fn a_pause_that_nobody_ends_lets_go_by_itself() {
        let (gate, _folder) = gate(Duration::from_millis(30));
        gate.close().expect("nothing is in flight");
        let began = Instant::now();
        drop(gate.pass());
        assert!(began.elapsed() < Duration::from_secs(2));
        assert_eq!(gate.view().leases_run_out, 1);
    }
}
