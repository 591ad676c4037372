//! Who reads what next.
//!
//! Small files are read in runs. A large or unknown one is a stream: a worker takes it out, reads a
//! batch, cuts it, puts it back and works on what it cut, while the next worker reads on. So one
//! stream keeps all cores busy, and no lock is held while anyone reads. Every queue is bounded.
//!
//! A content may be slow. Besides the workers there are spare threads, which step in only while a
//! worker has been stuck in a read for a while, so that the others' streams go on.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stillpoint_core::error::Result;
use stillpoint_core::tree::Content;

use super::failure::Failure;
use super::slot::{Job, LOOK_EVERY, Slot};
use crate::chunk::{CHUNK_BYTES_MIN, Cursor};

/// Files of one store that may wait for a worker.
const QUEUED_MAX: usize = 256;
/// Files of one run, and their bytes.
const RUN_FILES_MAX: usize = 64;
const RUN_BYTES_MAX: usize = 4 << 20;
/// A read that takes longer has a spare thread step in.
const STUCK_AFTER: Duration = Duration::from_millis(200);

/// A file that is read batch by batch.
pub(super) struct Stream {
    pub(super) slot: Arc<Slot>,
    pub(super) content: Box<dyn Content>,
    /// What was read and belongs to a chunk whose end was not seen yet.
    pub(super) carry: Vec<u8>,
    pub(super) cursor: Cursor,
    /// Number of the chunk that `carry` begins.
    pub(super) chunk: u64,
}

/// What a worker is given.
pub(super) enum Work {
    Run(Vec<Job>),
    Stream(Box<Stream>),
}

#[derive(Default)]
struct Queues {
    small: VecDeque<Job>,
    large: VecDeque<Job>,
    /// Streams that nobody has taken out.
    idle: VecDeque<Box<Stream>>,
    /// Streams that are open, taken out or not.
    open: usize,
    /// Whether a stream came before small files the last time.
    stream_was_first: bool,
    closed: bool,
}

/// The queues, and who waits at them.
pub(super) struct Schedule {
    queues: Mutex<Queues>,
    /// Work has come, or no more will.
    work: Condvar,
    /// No more work will come. Spare threads wait here, so that no call for a worker wakes them.
    over: Condvar,
    /// Spare threads that have work.
    spares_busy: AtomicUsize,
    /// A queue has become shorter.
    room: Condvar,
    /// When each thread, spare ones included, began to read, in milliseconds since `started`, plus one; 0 when it
    /// does not read.
    reading: Vec<AtomicU64>,
    started: Instant,
    workers: usize,
}

impl Schedule {
    pub(super) fn new(workers: usize, spares: usize) -> Self {
        Self {
            queues: Mutex::default(),
            work: Condvar::new(),
            over: Condvar::new(),
            spares_busy: AtomicUsize::new(0),
            room: Condvar::new(),
            reading: (0..workers + spares).map(|_| AtomicU64::new(0)).collect(),
            started: Instant::now(),
            workers,
        }
    }

    /// Adds a file; waits while its store has too many waiting.
    pub(super) fn submit(&self, job: Job, failure: &Failure) -> Result<()> {
        let mut queues = self.lock();
        while job.slot.store.queued.load(Ordering::Relaxed) >= QUEUED_MAX {
            failure.check()?;
            queues = self.room.wait_timeout(queues, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        job.slot.store.queued.fetch_add(1, Ordering::Relaxed);
        match job.bytes_expected <= CHUNK_BYTES_MIN {
            true => queues.small.push_back(job),
            false => queues.large.push_back(job),
        }
        drop(queues);
        self.work.notify_one();
        Ok(())
    }

    /// The next work for a regular worker; `None` once all is done.
    pub(super) fn next(&self, failure: &Failure) -> Result<Option<Work>> {
        let mut queues = self.lock();
        loop {
            failure.check()?;
            if let Some(work) = self.take(&mut queues) {
                return Ok(Some(work));
            }
            if queues.closed && queues.open == 0 {
                return Ok(None);
            }
            queues = self.work.wait_timeout(queues, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next work for a spare thread: only while more threads are stuck than spare ones busy.
    /// To be followed by [`Schedule::spare_done`].
    pub(super) fn next_spare(&self, failure: &Failure) -> Result<Option<Work>> {
        let mut queues = self.lock();
        loop {
            failure.check()?;
            if self.stuck() > self.spares_busy.load(Ordering::Relaxed)
                && let Some(work) = self.take(&mut queues)
            {
                self.spares_busy.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(work));
            }
            if queues.closed && queues.open == 0 && queues.small.is_empty() && queues.large.is_empty() {
                return Ok(None);
            }
            queues = self.over.wait_timeout(queues, STUCK_AFTER).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A spare thread has done its work.
    pub(super) fn spare_done(&self) {
        self.spares_busy.fetch_sub(1, Ordering::Relaxed);
    }

    fn take(&self, queues: &mut Queues) -> Option<Work> {
        queues.stream_was_first = !queues.stream_was_first;
        let work = match queues.stream_was_first {
            true => self.take_stream(queues).or_else(|| self.take_run(queues)),
            false => self.take_run(queues).or_else(|| self.take_stream(queues)),
        };
        if work.is_some() {
            self.room.notify_all();
        }
        work
    }

    fn take_stream(&self, queues: &mut Queues) -> Option<Work> {
        if let Some(stream) = queues.idle.pop_front() {
            return Some(Work::Stream(stream));
        }
        let job = queues.large.pop_front()?;
        job.slot.store.queued.fetch_sub(1, Ordering::Relaxed);
        queues.open += 1;
        let Job { slot, content, .. } = job;
        Some(Work::Stream(Box::new(Stream { slot, content, carry: Vec::new(), cursor: Cursor::default(), chunk: 0 })))
    }

    fn take_run(&self, queues: &mut Queues) -> Option<Work> {
        let fair = queues.small.len().div_ceil(2 * self.workers);
        let mut run = Vec::new();
        let mut bytes = 0;
        while run.len() < fair.min(RUN_FILES_MAX) {
            let Some(job) = queues.small.pop_front() else { break };
            job.slot.store.queued.fetch_sub(1, Ordering::Relaxed);
            bytes += job.bytes_expected;
            run.push(job);
            if bytes >= RUN_BYTES_MAX {
                break;
            }
        }
        (!run.is_empty()).then_some(Work::Run(run))
    }

    /// Puts a stream back that has not ended.
    pub(super) fn put_back(&self, stream: Box<Stream>) {
        self.lock().idle.push_front(stream);
        self.work.notify_one();
    }

    /// Adds a stream that began as a small file.
    pub(super) fn add_stream(&self, stream: Box<Stream>) {
        let mut queues = self.lock();
        queues.open += 1;
        queues.idle.push_front(stream);
        drop(queues);
        self.work.notify_one();
    }

    /// A stream that was taken out has ended.
    pub(super) fn ended(&self) {
        let mut queues = self.lock();
        queues.open -= 1;
        if queues.closed && queues.open == 0 {
            drop(queues);
            self.work.notify_all();
            self.over.notify_all();
        }
    }

    /// No more files will come. The workers end when all work is done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
        self.over.notify_all();
    }

    /// Notes that a thread begins or ends to read.
    pub(super) fn reading(&self, thread: usize, begins: bool) {
        let now = if begins { self.started.elapsed().as_millis() as u64 + 1 } else { 0 };
        self.reading[thread].store(now, Ordering::Relaxed);
    }

    /// How many threads have been in one read for long.
    fn stuck(&self) -> usize {
        let now = self.started.elapsed().as_millis() as u64;
        let stuck = |since: u64| since > 0 && now.saturating_sub(since - 1) > STUCK_AFTER.as_millis() as u64;
        self.reading.iter().filter(|since| stuck(since.load(Ordering::Relaxed))).count()
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
