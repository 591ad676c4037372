//! Faults on purpose, the same ones for the same seed, so that a failing test fails again.
//!
//! Its faults are those that real services show: refusing before anything happened, breaking off
//! after the effect, answering slowly, asking to slow down, delivering fewer bytes than asked, and
//! being gone for good.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};

/// How often each fault happens, as a probability per call from 0 to 1.
#[derive(Debug, Clone, Default)]
pub struct ChaosPolicy {
    /// The connection breaks before the call has any effect.
    pub error_before: f64,
    /// The call takes effect, but its answer is lost.
    pub error_after: f64,
    /// A read returns fewer bytes than there are, without an error.
    pub torn_read: f64,
    /// The call waits first.
    pub delay: f64,
    /// How long it waits.
    pub delay_for: Duration,
    /// The service asks to be called less often (status 503).
    pub busy: f64,
    /// After so many calls every further one fails, without effect and permanently, as if the
    /// machine had lost its power.
    pub dead_after: Option<u64>,
}

/// A depot that misbehaves by plan.
#[derive(Debug)]
pub struct Chaos {
    inner: Arc<dyn Depot>,
    policy: ChaosPolicy,
    state: Mutex<(Rng, u64)>,
}

impl Chaos {
    /// The same seed and the same calls in the same order give the same faults.
    pub fn new(inner: Arc<dyn Depot>, seed: u64, policy: ChaosPolicy) -> Self {
        Self { inner, policy, state: Mutex::new((Rng::with_seed(seed), 0)) }
    }

    /// How many calls there were, failed ones included.
    pub fn calls(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn happens(&self, probability: f64) -> bool {
        probability > 0.0 && self.state.lock().unwrap_or_else(PoisonError::into_inner).0.f64() < probability
    }

    fn faulty<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let number = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.1 += 1;
            state.1
        };
        if self.policy.dead_after.is_some_and(|calls| number > calls) {
            return Err(Error::new(Kind::Io, "chaos: the bucket is gone"));
        }
        if self.happens(self.policy.delay) {
            std::thread::sleep(self.policy.delay_for);
        }
        if self.happens(self.policy.busy) {
            return Err(Error::new(Kind::RateLimited, "chaos: slow down").temporary());
        }
        if self.happens(self.policy.error_before) {
            return Err(Error::new(Kind::Unreachable, "chaos: broken before the call").temporary());
        }
        let result = call()?;
        if self.happens(self.policy.error_after) {
            return Err(Error::new(Kind::Unreachable, "chaos: broken after the call").temporary());
        }
        Ok(result)
    }

    fn torn(&self, bytes: Bytes) -> Bytes {
        if bytes.is_empty() || !self.happens(self.policy.torn_read) {
            return bytes;
        }
        let keep = self.state.lock().unwrap_or_else(PoisonError::into_inner).0.usize(..bytes.len());
        bytes.slice(..keep)
    }
}

impl Depot for Chaos {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        let (bytes, version) = self.faulty(|| self.inner.read(name))?;
        Ok((self.torn(bytes), version))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let bytes = self.faulty(|| self.inner.read_range(name, offset, length))?;
        Ok(self.torn(bytes))
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.faulty(|| self.inner.write(name, parts, mode))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.faulty(|| self.inner.list(prefix, visit))
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.faulty(|| self.inner.stat(name))
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.faulty(|| self.inner.delete(name))
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
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let outcomes = |seed| {
            let policy = ChaosPolicy { error_before: 0.3, error_after: 0.3, torn_read: 0.5, ..ChaosPolicy::default() };
            let depot = Chaos::new(Arc::new(MemoryDepot::new()), seed, policy);
            (0..40)
                .map(|n| match n % 2 {
                    0 => depot.write("a", &[b"0123456789"], &WriteMode::Replace).is_ok().into(),
                    _ => depot.read("a").map_or(99, |(bytes, _)| bytes.len()),
                })
                .collect::<Vec<usize>>()
        };
        assert_eq!(outcomes(3), outcomes(3));
        assert_ne!(outcomes(3), outcomes(4));
    }

    #[test]
    fn a_dead_depot_stays_dead_and_takes_no_effect() {
        let memory = Arc::new(MemoryDepot::new());
        let depot = Chaos::new(memory.clone(), 1, ChaosPolicy { dead_after: Some(1), ..ChaosPolicy::default() });
        depot.write("a", &[], &WriteMode::Replace).expect("alive");
        let error = depot.write("b", &[], &WriteMode::Replace).expect_err("dead");
        assert!(!error.is_temporary());
        assert_eq!(memory.names(), ["a"]);
    }
}
