//! The two clocks of a run: one that only moves forward, one that people read.
//!
//! Kept behind a trait so that tests can let the wall clock jump. Durations, deadlines and the
//! skew of a cut come from the monotonic clock alone; the wall clock only labels.

use std::fmt;
use std::time::{Duration, Instant};

use jiff::Timestamp;

/// Tells the time.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Time since an arbitrary begin; never goes back.
    fn monotonic(&self) -> Duration;

    /// The wall clock, which may jump either way.
    fn utc(&self) -> Timestamp;
}

/// The clocks of this machine.
#[derive(Debug)]
pub struct SystemClock {
    began: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { began: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.began.elapsed()
    }

    fn utc(&self) -> Timestamp {
        Timestamp::now()
    }
}
