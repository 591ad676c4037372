//! Rows as a stream: one COPY for each file of a point, counted and hashed on its way.
//!
//! The repository reads streams later and on its own threads. Each opens its COPY when it is first read
//! and tells the drain when it is over, also when it is dropped half-way: the drain waits for all of
//! them before it says what was copied.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd};

use super::pool::{Lease, Pool};
use super::wire::Tally;

/// How often the drain looks whether someone asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What became of the streams of one drain.
#[derive(Debug, Default)]
pub(super) struct Streams {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    under_way: usize,
    /// By the number that `add` gave.
    tallies: Vec<Option<Tally>>,
    /// The first thing that went wrong, for the drain's own error; the repository has the original.
    failed: Option<(Kind, String)>,
}

impl Streams {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream of what `sql` copies out. `lock` is run before it where the session does not hold the
    /// table yet; it must not wait.
    pub(super) fn add(self: &Arc<Self>, pool: &Arc<Pool>, context: &Context, lock: &str, sql: String) -> (usize, Rows) {
        let mut state = self.state();
        state.under_way += 1;
        state.tallies.push(None);
        let number = state.tallies.len() - 1;
        let rows = Rows {
            streams: Arc::clone(self),
            number,
            pool: Arc::clone(pool),
            context: context.clone(),
            lock: lock.to_owned(),
            sql,
            lease: None,
            tally: Tally::default(),
            whole: false,
        };
        (number, rows)
    }

    /// A stream that need not be read, because the parent point holds the same.
    pub(super) fn reused(&self, tally: Tally) -> usize {
        let mut state = self.state();
        state.tallies.push(Some(tally));
        state.tallies.len() - 1
    }

    /// Waits until every stream is over. Fails if one was not read to its end.
    pub(super) fn wait(&self, context: &Context) -> Result<Vec<Tally>> {
        let mut state = self.state();
        while state.under_way > 0 && state.failed.is_none() {
            context.check()?;
            state = self.changed.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        context.check()?;
        if let Some((kind, message)) = &state.failed {
            return Err(Error::new(*kind, message.clone()));
        }
        Ok(state.tallies.iter().map(|tally| tally.unwrap_or_default()).collect())
    }

    fn over(&self, number: usize, tally: Option<Tally>, failed: Option<&Error>) {
        let mut state = self.state();
        state.under_way -= 1;
        state.tallies[number] = tally;
        if let Some(error) = failed {
            state.failed.get_or_insert((error.kind(), error.to_string()));
        } else if tally.is_none() {
            state.failed.get_or_insert((Kind::Cancelled, "a stream was not read to its end".to_owned()));
        }
        self.changed.notify_all();
    }
}

/// The rows of one file.
pub(super) struct Rows {
    streams: Arc<Streams>,
    number: usize,
    pool: Arc<Pool>,
    context: Context,
    lock: String,
    sql: String,
    lease: Option<Lease>,
    tally: Tally,
    whole: bool,
}

impl Rows {
    fn open(&mut self) -> Result<()> {
        let mut lease = self.pool.take(&self.context)?;
        let locked = lease.locks() || self.lock.is_empty();
        let sql = if locked { self.sql.clone() } else { format!("{}; {}", self.lock, self.sql) };
        let begun = lease.session()?.copy_out(&sql).map_err(|error| match error.kind() {
            Kind::Locked => {
                Error::new(Kind::Locked, "someone waits for a table exclusively, and we would wait for him")
                    .temporary()
                    .hint("let the migration end first, or lower its own lock_timeout")
                    .source(error)
            }
            _ => error,
        });
        self.lease = Some(lease);
        begun
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.whole || buffer.is_empty() {
            return Ok(0);
        }
        if self.lease.is_none() {
            self.open()?;
        }
        let Some(lease) = &mut self.lease else { return Ok(0) };
        let before = self.tally.rows;
        let count = lease.session()?.copy_read(buffer, &mut self.tally)?;
        self.context.advance(count as u64, self.tally.rows - before);
        if count == 0 {
            self.whole = true;
            self.lease = None;
        }
        Ok(count)
    }

    fn end(&mut self, failed: Option<&Error>) {
        if self.number != usize::MAX {
            let tally = (self.whole && failed.is_none()).then_some(self.tally);
            self.streams.over(self.number, tally, failed);
            self.number = usize::MAX;
        }
    }
}

impl Content for Rows {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let done = self.fill(buffer);
        match &done {
            Ok(0) if self.whole => self.end(None),
            Ok(_) => {}
            Err(error) => self.end(Some(error)),
        }
        done
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        if !self.whole {
            return Err(Error::internal("a stream was finished before its end"));
        }
        Ok(ContentEnd::Whole)
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        if let (false, Some(lease)) = (self.whole, &mut self.lease) {
            // Its session is in the middle of a COPY.
            lease.give_up();
        }
        self.end(None);
    }
}
