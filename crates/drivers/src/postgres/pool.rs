//! The sessions that copy: all show the view of the cut, and each serves one stream at a time.
//!
//! A stream takes a session when it is first read and gives it back at its end. None ever waits for
//! another: where no session is idle, one more is opened, because a repository may read any number of
//! streams in any order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

use super::session::{Endpoint, Session};
use super::wire::literal;

/// How a transaction of ours begins. Read only: nothing that runs in it can change data.
pub(super) const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// Where the server knows it (minor versions since August 2024): no session that copies reads a view or a
/// foreign table, which may run anybody's code as our role. One may stand where a table was.
const TABLES_ONLY: &str = "SELECT pg_catalog.set_config(name, 'view, foreign-table', false) FROM pg_catalog.pg_settings \
                           WHERE name = 'restrict_nonsystem_relation_kind'";

/// The sessions of one database.
#[derive(Debug)]
pub(super) struct Pool {
    endpoint: Endpoint,
    database: String,
    /// No session waits longer for a table: who waits for a table exclusively waits for us, too.
    lock_seconds: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Worker>,
    /// What the sessions are to show, by the name under which the server exported it.
    snapshot: Option<String>,
}

#[derive(Debug)]
struct Worker {
    session: Session,
    /// What its transaction shows; `None` while it shows nothing yet.
    shows: Option<String>,
    /// Whether it holds the tables that `prepare` found.
    locks: bool,
}

impl Pool {
    pub(super) fn new(endpoint: &Endpoint, database: &str, lock_seconds: u32) -> Self {
        Self { endpoint: endpoint.clone(), database: database.to_owned(), lock_seconds, state: Mutex::default() }
    }

    fn connect(&self, context: &Context) -> Result<Session> {
        let mut session = Session::connect(&self.endpoint, &self.database, context)?;
        session.execute(&format!("SET lock_timeout = '{}s'; {TABLES_ONLY}", self.lock_seconds))?;
        Ok(session)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens sessions ahead. `lock` holds the tables in each, so that whoever queues up behind us for a
    /// table does not stop us from reading it; a lock fixes no view.
    pub(super) fn warm(&self, count: usize, lock: &str, context: &Context) -> Result<()> {
        for _ in 0..count {
            let mut session = self.connect(context)?;
            session.execute(&format!("{BEGIN}; {lock}"))?;
            self.state().idle.push(Worker { session, shows: None, locks: true });
        }
        Ok(())
    }

    /// From now on sessions show this view.
    pub(super) fn show(&self, snapshot: &str) {
        self.state().snapshot = Some(snapshot.to_owned());
    }

    /// A session that shows the view.
    pub(super) fn take(self: &Arc<Self>, context: &Context) -> Result<Lease> {
        let (idle, snapshot) = {
            let mut state = self.state();
            (state.idle.pop(), state.snapshot.clone())
        };
        let snapshot = snapshot.ok_or_else(|| Error::internal("no view was taken yet"))?;
        let mut worker = match idle {
            Some(worker) => worker,
            None => {
                let session = self.connect(context)?;
                Worker { session, shows: None, locks: false }
            }
        };
        worker.session.set_context(context);
        if worker.shows.as_deref() != Some(&snapshot) {
            let import = format!("SET TRANSACTION SNAPSHOT {}", literal(&snapshot));
            let begun = worker.session.in_transaction() && worker.shows.is_none();
            worker.locks &= begun;
            let sql = if begun { import } else { format!("ROLLBACK; {BEGIN}; {import}") };
            worker.session.execute(&sql).map_err(|error| expired(error, &self.database))?;
            worker.shows = Some(snapshot);
        }
        Ok(Lease { pool: Arc::clone(self), worker: Some(worker) })
    }

    /// Closes what is idle.
    pub(super) fn close(&self) {
        let idle = std::mem::take(&mut self.state().idle);
        idle.into_iter().for_each(|worker| worker.session.close());
    }
}

/// A view that cannot be shown any more is a lost pin; other failures stay what they are.
fn expired(error: Error, database: &str) -> Error {
    if matches!(error.kind(), Kind::NotFound | Kind::Config | Kind::Conflict) {
        return Error::new(Kind::PinLost, format!("the view of database `{database}` has expired"))
            .temporary()
            .hint("the session that held it ended: the server was restarted, or someone ended the session")
            .source(error);
    }
    error
}

/// A session in use; goes back to the pool when dropped, unless something is wrong with it.
#[derive(Debug)]
pub(super) struct Lease {
    pool: Arc<Pool>,
    worker: Option<Worker>,
}

impl Lease {
    /// The session.
    pub(super) fn session(&mut self) -> Result<&mut Session> {
        self.worker
            .as_mut()
            .map(|worker| &mut worker.session)
            .ok_or_else(|| Error::internal("the session was given up"))
    }

    /// Whether it holds the tables already that `prepare` found.
    pub(super) fn locks(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.locks)
    }

    /// Ends the session, because a stream was not read to its end.
    pub(super) fn give_up(&mut self) {
        self.worker = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        if worker.session.is_usable() && worker.session.is_in_good_transaction() {
            self.pool.state().idle.push(worker);
        }
    }
}
