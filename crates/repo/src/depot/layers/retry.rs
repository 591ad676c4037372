//! Repeats what failed temporarily, ever more slowly, and gives up after a while.
//!
//! Two things need more than repeating. A conditional write may have taken effect although its
//! answer was lost; the repetition then meets its own work, so the object is read and compared
//! before someone else is blamed. That is why conditional writes must carry bytes that no other
//! writer writes (see [`WriteMode`]). Only if yet another writer replaced it in between, our own
//! success is reported as a conflict: safe, because whoever meets a conflict looks again. A listing that broke off has shown some objects already, and
//! shows only the others when it is repeated.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result, Status};

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, total_bytes};

/// How patiently to repeat.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// The first pause; each further one is twice as long, and a random part of it is taken.
    pub pause_first: Duration,
    /// The longest pause.
    pub pause_max: Duration,
    /// No repetition begins after this time.
    pub elapsed_max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            pause_first: Duration::from_millis(200),
            pause_max: Duration::from_secs(10),
            elapsed_max: Duration::from_secs(120),
        }
    }
}

/// A depot that repeats temporary failures. What stays temporary for too long becomes persistent.
#[derive(Debug)]
pub struct Retry {
    inner: Arc<dyn Depot>,
    policy: RetryPolicy,
    context: Context,
}

impl Retry {
    /// Repeats until `policy` says enough, or until `context` is cancelled.
    pub fn new(inner: Arc<dyn Depot>, policy: RetryPolicy, context: Context) -> Self {
        Self { inner, policy, context }
    }

    /// Calls `attempt` with its number, from 0, until it succeeds or trying again is in vain.
    fn repeat<T>(&self, verb: &str, mut attempt: impl FnMut(u32) -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let mut number = 0;
        loop {
            let error = match attempt(number) {
                Err(error) if error.is_temporary() => error,
                result => return result,
            };
            let pause = self.pause(number);
            if begun.elapsed() + pause > self.policy.elapsed_max {
                return Err(error.status(Status::Persistent).context("attempts", number + 1));
            }
            tracing::debug!(verb, number, pause_ms = pause.as_millis() as u64, %error, "tried again");
            self.sleep(pause)?;
            number += 1;
        }
    }

    fn pause(&self, number: u32) -> Duration {
        let whole = self.policy.pause_first.saturating_mul(1 << number.min(16)).min(self.policy.pause_max);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// Sleeps in short naps, so that a request to stop is heard.
    fn sleep(&self, pause: Duration) -> Result<()> {
        let until = Instant::now() + pause;
        loop {
            self.context.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Whether the object is exactly what we tried to write: then the lost answer was a success.
    fn holds(&self, name: &str, parts: &[&[u8]]) -> Result<Option<Option<Version>>> {
        let Some(found) = self.inner.stat(name)? else { return Ok(None) };
        if found.size != total_bytes(parts) {
            return Ok(None);
        }
        let (bytes, version) = self.inner.read(name)?;
        let mut rest: &[u8] = &bytes;
        for part in parts {
            match rest.strip_prefix(*part) {
                Some(after) => rest = after,
                None => return Ok(None),
            }
        }
        Ok(rest.is_empty().then_some(version))
    }
}

impl Depot for Retry {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.repeat("read", |_| self.inner.read(name))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.repeat("read", |_| self.inner.read_range(name, offset, length))
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        let mut may_have_happened = false;
        self.repeat("write", |_| match self.inner.write(name, parts, mode) {
            Err(error) if may_have_happened && matches!(error.kind(), Kind::AlreadyExists | Kind::Conflict) => {
                self.holds(name, parts)?.ok_or(error)
            }
            Err(error) => {
                // A service that asked to wait, or said that it is another's turn, did nothing.
                may_have_happened |= !matches!(error.kind(), Kind::RateLimited | Kind::Locked);
                Err(error)
            }
            result => result,
        })
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        // 128 random bits per name tell names apart; the names themselves would take more memory.
        let (one, two) = (RandomState::new(), RandomState::new());
        let mark = |name: &str| (u128::from(one.hash_one(name)) << 64) | u128::from(two.hash_one(name));
        let mut shown: HashSet<u128> = HashSet::new();
        // An error of the visitor is not the depot's, so it is carried around the repetition.
        let mut refused: Option<Error> = None;
        let mut seen_enough = false;
        self.repeat("list", |number| {
            let listed = self.inner.list(prefix, &mut |object| {
                if !shown.insert(mark(&object.name)) && number > 0 {
                    return Ok(true);
                }
                let go_on = visit(object).unwrap_or_else(|error| {
                    refused = Some(error);
                    false
                });
                seen_enough |= !go_on;
                Ok(go_on)
            });
            // A visitor that has seen enough is not called again, whatever became of the listing.
            if seen_enough { Ok(()) } else { listed }
        })?;
        refused.map_or(Ok(()), Err)
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.repeat("stat", |_| self.inner.stat(name))
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.repeat("delete", |_| self.inner.delete(name))
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

    fn quick() -> RetryPolicy {
        RetryPolicy {
            pause_first: Duration::from_millis(1),
            pause_max: Duration::from_millis(2),
            elapsed_max: Duration::from_millis(400),
        }
    }

    fn over(policy: ChaosPolicy) -> Retry {
        Retry::new(Arc::new(Chaos::new(Arc::new(MemoryDepot::new()), 7, policy)), quick(), Context::default())
    }

    #[test]
    fn a_creation_whose_answer_was_lost_is_recognised_as_our_own() {
        for seed in 0..20 {
            let chaos = ChaosPolicy { error_after: 0.6, ..ChaosPolicy::default() };
            let depot = Chaos::new(Arc::new(MemoryDepot::new()), seed, chaos);
            let depot = Retry::new(Arc::new(depot), quick(), Context::default());
            depot.write("a", &[b"mi", b"ne"], &WriteMode::Create).expect("ours");
            let error = depot.write("a", &[b"else"], &WriteMode::Create).expect_err("taken");
            assert_eq!(error.kind(), Kind::AlreadyExists);
        }
    }

    #[test]
    fn what_stays_temporary_becomes_persistent_and_what_is_permanent_is_not_repeated() {
        let depot = over(ChaosPolicy { busy: 1.0, ..ChaosPolicy::default() });
        let error = depot.read("a").expect_err("always busy");
        assert_eq!((error.kind(), error.status_value()), (Kind::RateLimited, Status::Persistent));
        let begun = Instant::now();
        let error = over(ChaosPolicy::default()).read("a").expect_err("absent");
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(begun.elapsed() < Duration::from_millis(300));
    }

    #[test]
    fn a_request_to_stop_ends_the_repetition() {
        let context = Context::default();
        context.cancel();
        let chaos = Chaos::new(Arc::new(MemoryDepot::new()), 1, ChaosPolicy { busy: 1.0, ..ChaosPolicy::default() });
        let depot = Retry::new(Arc::new(chaos), RetryPolicy::default(), context);
        assert_eq!(depot.read("a").expect_err("stopped").kind(), Kind::Cancelled);
    }

    #[test]
    fn a_listing_that_broke_off_shows_each_object_once() {
        #[derive(Debug)]
        struct Breaks(MemoryDepot, std::sync::atomic::AtomicU32);
        impl Depot for Breaks {
            fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
                self.0.read(name)
            }
            fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
                self.0.read_range(name, offset, length)
            }
            fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
                self.0.write(name, parts, mode)
            }
            fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
                let allowed = 3 * (1 + self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst));
                let mut count = 0;
                self.0.list(prefix, &mut |object| {
                    count += 1;
                    if count > allowed {
                        return Err(Error::new(Kind::Unreachable, "broken off").temporary());
                    }
                    visit(object)
                })
            }
            fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
                self.0.stat(name)
            }
            fn delete(&self, name: &str) -> Result<()> {
                self.0.delete(name)
            }
            fn capability(&self) -> DepotCapability {
                self.0.capability()
            }
            fn location(&self) -> String {
                self.0.location()
            }
        }
        let breaks = Breaks(MemoryDepot::new(), 0.into());
        for number in 0..10 {
            breaks.0.write(&format!("d/{number}"), &[], &WriteMode::Replace).expect("write");
        }
        let depot = Retry::new(Arc::new(breaks), quick(), Context::default());
        let mut names = Vec::new();
        let listed = depot.list("d/", &mut |object| {
            names.push(object.name);
            Ok(true)
        });
        listed.expect("complete in the end");
        assert_eq!(names.len(), 10);
        let error = depot.list("d/", &mut |_| Err(Error::new(Kind::Conflict, "visitor").temporary()));
        assert_eq!(error.expect_err("visitor's").kind(), Kind::Conflict);
    }
}
