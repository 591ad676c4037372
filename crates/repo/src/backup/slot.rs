//! One file under way: what the workers have found out, and what its sink waits for.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stillpoint_core::error::{Error, Result};
use stillpoint_core::tree::{Content, ContentEnd};

use super::failure::Failure;
use crate::compress::Choice;
use crate::format::id::Id;

/// How often a wait looks whether the backup was cancelled.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the files of one store share.
#[derive(Debug, Default)]
pub(super) struct StoreCounters {
    /// The sink is gone: what it queued need not be read.
    pub(super) abandoned: AtomicBool,
    /// Files that wait for a worker.
    pub(super) queued: AtomicUsize,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_stored: AtomicU64,
}

/// The result of one file, in the making.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) store: Arc<StoreCounters>,
    pub(super) choice: Choice,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The ids of consecutive chunks, each run with the number of its first chunk.
    runs: Vec<(u64, Vec<Id>)>,
    /// Batches that were cut and are not stored yet.
    outstanding: usize,
    bytes: u64,
    end: Option<Result<ContentEnd>>,
}

impl State {
    fn is_done(&self) -> bool {
        // After an error nothing else matters.
        self.end.as_ref().is_some_and(|end| end.is_err() || self.outstanding == 0)
    }
}

/// What became of a file.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) content: Vec<Id>,
    pub(super) bytes: u64,
    pub(super) end: ContentEnd,
}

impl Slot {
    pub(super) fn new(store: Arc<StoreCounters>) -> Arc<Self> {
        Arc::new(Self { store, choice: Choice::default(), state: Mutex::default(), changed: Condvar::new() })
    }

    /// A batch of `bytes` was cut and is going to be stored.
    pub(super) fn begin_batch(&self, bytes: u64) {
        let mut state = self.lock();
        state.outstanding += 1;
        state.bytes += bytes;
        self.store.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A batch is stored, or about to be written: its chunks are `ids`, the first is number `first`.
    pub(super) fn end_batch(&self, first: u64, ids: Vec<Id>) {
        let mut state = self.lock();
        state.outstanding -= 1;
        state.runs.push((first, ids));
        self.announce(&state);
    }

    /// The stream was read to its end, or failed.
    pub(super) fn end(&self, end: Result<ContentEnd>) {
        let mut state = self.lock();
        state.end = Some(end);
        self.announce(&state);
    }

    fn announce(&self, state: &MutexGuard<'_, State>) {
        if state.is_done() {
            self.changed.notify_all();
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.lock().is_done()
    }

    /// Waits until the file is done and takes its result; fails when the backup does.
    pub(super) fn wait(&self, failure: &Failure) -> Result<Finished> {
        let mut state = self.lock();
        while !state.is_done() {
            failure.check()?;
            state = self.changed.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        let State { mut runs, bytes, end, .. } = std::mem::take(&mut *state);
        let end = end.unwrap_or_else(|| Err(Error::internal("a file is done and has no end")))?;
        runs.sort_unstable_by_key(|(first, _)| *first);
        let content = match <[_; 1]>::try_from(runs) {
            Ok([(_, ids)]) => ids,
            Err(runs) => runs.into_iter().flat_map(|(_, ids)| ids).collect(),
        };
        Ok(Finished { content, bytes, end })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that waits for a worker.
pub(super) struct Job {
    pub(super) slot: Arc<Slot>,
    pub(super) content: Box<dyn Content>,
    /// What the driver expects.
    pub(super) bytes_expected: usize,
}
