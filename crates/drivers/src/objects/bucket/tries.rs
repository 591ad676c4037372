//! When a request is sent: no sooner than its turn comes, and again after a failure while that can help.

use std::hash::{BuildHasher, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::error::{Error, Result, Status};

/// How often one request is sent, and for how long; how often it is, however long that takes.
const TRIES_MAX: u32 = 8;
const RETRY_TIME_MAX: Duration = Duration::from_secs(90);
const TRIES_MIN: u32 = 3;
/// The first pause between two tries; it doubles, and a random part of it is waited.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(20);

/// How often a request was sent, and when it is sent again.
pub(in super::super) struct Tries {
    begin: Instant,
    pause: Duration,
    failed: u32,
}

impl Tries {
    /// Before the first one.
    pub fn new() -> Self {
        Self { begin: Instant::now(), pause: PAUSE, failed: 0 }
    }

    /// Whether an earlier try may have been worked on although no answer came.
    pub fn were_several(&self) -> bool {
        self.failed > 1
    }

    /// Waits for the next try; returns the failure where trying again cannot help or has taken too long.
    pub async fn wait(&mut self, repeated: &AtomicU64, error: Error, wished: Option<Duration>) -> Result<()> {
        self.failed += 1;
        let wait = wished.unwrap_or_else(|| self.pause / 2 + random_part(self.pause / 2)).min(PAUSE_MAX);
        if !error.is_temporary() {
            return Err(error);
        }
        let is_late = self.failed >= TRIES_MIN && self.begin.elapsed() + wait > RETRY_TIME_MAX;
        if self.failed >= TRIES_MAX || is_late {
            let seconds = self.begin.elapsed().as_secs();
            return Err(error
                .status(Status::Persistent)
                .context("tried", format!("{} times in {seconds} s", self.failed)));
        }
        repeated.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(wait).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(())
    }
}

/// Between nothing and all of `whole`, so that many clients do not come back at once.
fn random_part(whole: Duration) -> Duration {
    let number = std::collections::hash_map::RandomState::new().build_hasher().finish();
    whole.mul_f64((number >> 11) as f64 / (1u64 << 53) as f64)
}

/// Spreads requests over time.
pub(super) struct Pace {
    gap: Option<Duration>,
    next: Mutex<Instant>,
}

impl Pace {
    /// The same for another bucket.
    pub fn again(&self) -> Self {
        Self { gap: self.gap, next: Mutex::new(Instant::now()) }
    }

    /// At most so many requests a second.
    pub fn new(per_second_max: Option<u32>) -> Self {
        let gap = per_second_max.map(|count| Duration::from_secs(1) / count.max(1));
        Self { gap, next: Mutex::new(Instant::now()) }
    }

    /// Waits for the next turn.
    pub async fn wait(&self) {
        let Some(gap) = self.gap else { return };
        let turn = {
            let mut next = self.next.lock().expect("no holder panics");
            let turn = (*next).max(Instant::now());
            *next = turn + gap;
            turn
        };
        tokio::time::sleep_until(turn.into()).await;
    }
}
