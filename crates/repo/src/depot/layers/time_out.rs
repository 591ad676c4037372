//! Bounds the time of each call on depots that cannot do it themselves, such as a network file
//! system whose server is gone.
//!
//! Each call runs on a thread of its own. One that does not return in time is left behind: its
//! thread ends when the system lets it go. A write that was left behind may still take effect.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};

/// A depot whose every call answers within the deadline, if only by an error. For a listing the
/// deadline begins anew with each object.
#[derive(Debug)]
pub struct TimeOut {
    inner: Arc<dyn Depot>,
    deadline: Duration,
}

impl TimeOut {
    /// Wraps the depot.
    pub fn new(inner: Arc<dyn Depot>, deadline: Duration) -> Self {
        Self { inner, deadline }
    }

    fn bounded<T: Send + 'static>(&self, call: impl FnOnce(&dyn Depot) -> Result<T> + Send + 'static) -> Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let inner = Arc::clone(&self.inner);
        // A caller that has given up needs no answer.
        self.start(move || drop(sender.send(call(inner.as_ref()))))?;
        receiver.recv_timeout(self.deadline).map_err(|error| self.no_answer(error))?
    }

    fn start(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let started = std::thread::Builder::new().name("depot-call".to_owned()).spawn(work);
        started.map(drop).map_err(|error| Error::io("cannot start a thread", error))
    }

    fn no_answer(&self, error: mpsc::RecvTimeoutError) -> Error {
        match error {
            mpsc::RecvTimeoutError::Timeout => {
                let message = format!("{} did not answer within {:?}", self.inner.location(), self.deadline);
                Error::new(Kind::TimedOut, message).temporary()
            }
            mpsc::RecvTimeoutError::Disconnected => Error::internal("a call ended without an answer"),
        }
    }
}

impl Depot for TimeOut {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        let name = name.to_owned();
        self.bounded(move |depot| depot.read(&name))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let name = name.to_owned();
        self.bounded(move |depot| depot.read_range(&name, offset, length))
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        let (name, mode) = (name.to_owned(), mode.clone());
        let parts: Vec<Bytes> = parts.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        self.bounded(move |depot| {
            let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
            depot.write(&name, &parts, &mode)
        })
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1000);
        let (inner, prefix) = (Arc::clone(&self.inner), prefix.to_owned());
        self.start(move || {
            let listed = inner.list(&prefix, &mut |object| Ok(sender.send(Ok(Some(object))).is_ok()));
            // Without a receiver the listing was given up, and so is its result.
            drop(sender.send(listed.map(|()| None)));
        })?;
        loop {
            let Some(object) = receiver.recv_timeout(self.deadline).map_err(|error| self.no_answer(error))?? else {
                return Ok(());
            };
            if !visit(object)? {
                return Ok(());
            }
        }
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        let name = name.to_owned();
        self.bounded(move |depot| depot.stat(&name))
    }

    fn delete(&self, name: &str) -> Result<()> {
        let name = name.to_owned();
        self.bounded(move |depot| depot.delete(&name))
    }

    fn capability(&self) -> DepotCapability {
        self.inner.capability()
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::memory::MemoryDepot;
    use super::super::{Chaos, ChaosPolicy};
    use super::*;

    #[test]
    fn a_depot_that_hangs_answers_in_time_with_a_temporary_error() {
        let hangs = ChaosPolicy { delay: 1.0, delay_for: Duration::from_secs(2), ..ChaosPolicy::default() };
        let depot = Chaos::new(Arc::new(MemoryDepot::new()), 1, hangs);
        let depot = TimeOut::new(Arc::new(depot), Duration::from_millis(50));
        for error in [
            depot.read("a").expect_err("late"),
            depot.stat("a").expect_err("late"),
            depot.list("", &mut |_| Ok(true)).expect_err("late"),
        ] {
            assert_eq!((error.kind(), error.is_temporary()), (Kind::TimedOut, true));
        }
    }
}
