//! Many small pieces of work over a few connections to one database.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use stillpoint_core::error::{Error, Result};

use super::super::session::Session;
use super::Way;

/// Does every piece of `work` on one of the way's connections to `database`, in the given order as far
/// as connections become free. `begin` is run first on each. After the first failure no further piece is
/// begun; that failure is returned.
pub(in super::super) fn run<J: Send + Sync>(
    way: &Way<'_>,
    (database, begin): (&str, &str),
    jobs: Vec<J>,
    work: &(dyn Fn(&mut Session, &J) -> Result<()> + Sync),
) -> Result<()> {
    let connections = way.settings.connections.min(jobs.len());
    let jobs = Mutex::new(VecDeque::from(jobs));
    let (failed, stop) = (Mutex::new(None::<Error>), AtomicBool::new(false));
    let next = || jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
    let one = || -> Result<()> {
        let mut session = way.connect(database)?;
        if !begin.is_empty() {
            session.execute(begin)?;
        }
        while let Some(job) = next() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            way.context.check()?;
            work(&mut session, &job)?;
        }
        session.close();
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                if let Err(error) = one() {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}
