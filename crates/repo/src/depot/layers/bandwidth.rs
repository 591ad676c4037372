//! Keeps the line free for others: at most so many bytes a second, each way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_core::error::Result;

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, total_bytes};

/// A depot behind a narrow line. Requests wait for their turn; none is refused.
#[derive(Debug)]
pub struct Bandwidth {
    inner: Arc<dyn Depot>,
    up: Meter,
    down: Meter,
}

impl Bandwidth {
    /// Limits in bytes per second; 0 means unlimited.
    pub fn new(inner: Arc<dyn Depot>, up_bytes_per_second: u64, down_bytes_per_second: u64) -> Self {
        Self { inner, up: Meter::new(up_bytes_per_second), down: Meter::new(down_bytes_per_second) }
    }
}

/// Lets bytes pass at a rate, by telling each caller how long to wait. Bursts of a quarter of a
/// second pass at once.
#[derive(Debug)]
struct Meter {
    bytes_per_second: u64,
    /// When everything that was let through so far has passed.
    passed_at: Mutex<Instant>,
}

const BURST: Duration = Duration::from_millis(250);

impl Meter {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, passed_at: Mutex::new(Instant::now()) }
    }

    /// How long the caller must wait before, or after, moving so many bytes.
    fn wait_for(&self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_second == 0 || bytes == 0 {
            return Duration::ZERO;
        }
        let needs = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut passed_at = self.passed_at.lock().unwrap_or_else(PoisonError::into_inner);
        *passed_at = (*passed_at).max(now) + needs;
        passed_at.saturating_duration_since(now).saturating_sub(BURST)
    }

    fn pass(&self, bytes: u64) {
        let wait = self.wait_for(bytes, Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}

impl Depot for Bandwidth {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        // The size is known only afterwards, so the wait is paid by whoever comes next.
        let found = self.inner.read(name)?;
        self.down.pass(found.0.len() as u64);
        Ok(found)
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let bytes = self.inner.read_range(name, offset, length)?;
        self.down.pass(bytes.len() as u64);
        Ok(bytes)
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.up.pass(total_bytes(parts));
        self.inner.write(name, parts, mode)
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.inner.stat(name)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
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
    use super::*;

    #[test]
    fn the_rate_holds_over_many_requests_and_rest_is_not_saved_up() {
        let meter = Meter::new(1000);
        let begin = Instant::now() + Duration::from_secs(3600);
        assert_eq!(meter.wait_for(250, begin), Duration::ZERO);
        assert_eq!(meter.wait_for(1000, begin), Duration::from_secs(1));
        assert_eq!(meter.wait_for(1000, begin), Duration::from_secs(2));
        let much_later = begin + Duration::from_secs(100);
        assert_eq!(meter.wait_for(2250, much_later), Duration::from_secs(2));
        assert_eq!(Meter::new(0).wait_for(u64::MAX, begin), Duration::ZERO);
    }
}
