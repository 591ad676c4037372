//! Many small pieces of work over a few connections to one database.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use stillpoint_core::error::{Error, Result};

use super::super::session::Session;
use super::Way;

/// What is still to be done.
struct Queue<J> {
    jobs: VecDeque<J>,
    /// Pieces that somebody is at: they may bring more.
    under_way: usize,
    failed: Option<Error>,
}

/// One piece that somebody is at, also when he panics: others wait for its end.
struct UnderWay<'a, J>(&'a Mutex<Queue<J>>, &'a Condvar);

impl<J> Drop for UnderWay<'_, J> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).under_way -= 1;
        self.1.notify_all();
    }
}

/// Does every piece of `work` on one of the way's connections to `database`, in the given order as far
/// as connections become free. `begin` is run first on each. After the first failure no further piece is
/// begun; that failure is returned.
pub(in super::super) fn run<J: Send + Sync>(
    way: &Way<'_>,
    place: (&str, &str),
    jobs: Vec<J>,
    work: &(dyn Fn(&mut Session, &J) -> Result<()> + Sync),
) -> Result<()> {
    run_growing(way, place, (jobs, 0), &|session, job| work(session, job).map(|()| Vec::new()))
}

/// The same, where pieces that are done may bring more, so many in all.
pub(super) fn run_growing<J: Send + Sync>(
    way: &Way<'_>,
    (database, begin): (&str, &str),
    (jobs, more_max): (Vec<J>, usize),
    work: &(dyn Fn(&mut Session, &J) -> Result<Vec<J>> + Sync),
) -> Result<()> {
    let connections = way.settings.connections.min(jobs.len() + more_max);
    let all = Mutex::new(Queue { jobs: VecDeque::from(jobs), under_way: 0, failed: None });
    let changed = Condvar::new();
    let state = || -> MutexGuard<'_, Queue<J>> { all.lock().unwrap_or_else(PoisonError::into_inner) };
    let next = || -> Option<(J, UnderWay<'_, J>)> {
        let mut queue = state();
        loop {
            if queue.failed.is_some() {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                queue.under_way += 1;
                return Some((job, UnderWay(&all, &changed)));
            }
            if queue.under_way == 0 {
                return None;
            }
            queue = changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    };
    let one = || -> Result<()> {
        let mut session = way.connect(database)?;
        if !begin.is_empty() {
            session.execute(begin)?;
        }
        while let Some((job, under_way)) = next() {
            way.context.check()?;
            let more = work(&mut session, &job)?;
            state().jobs.extend(more);
            drop(under_way);
        }
        session.close();
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                if let Err(error) = one() {
                    state().failed.get_or_insert(error);
                    changed.notify_all();
                }
            });
        }
    });
    all.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
}
