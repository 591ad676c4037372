//! Sees every call: a span for whoever listens, and counts by verb, so that a test can assert what
//! an operation costs without measuring time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use stillpoint_core::error::Result;

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, total_bytes};

/// What was asked of the depot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// `read` and `read_range`.
    Read,
    /// `write`.
    Write,
    /// `list`.
    List,
    /// `stat`.
    Stat,
    /// `delete`.
    Delete,
}

/// What was counted so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceCounts {
    /// Calls by verb and folder; the folder of `data/ab/abcd` is `data`, of `config` it is empty.
    pub calls: BTreeMap<(Verb, String), u64>,
    /// Calls that failed, whatever the reason.
    pub failed: u64,
    /// Bytes that were read.
    pub bytes_down: u64,
    /// Bytes of writes that succeeded.
    pub bytes_up: u64,
}

impl TraceCounts {
    /// Calls of one verb, in all folders.
    pub fn of(&self, verb: Verb) -> u64 {
        self.calls.iter().filter(|((counted, _), _)| *counted == verb).map(|(_, count)| count).sum()
    }

    /// Calls of one verb in one folder.
    pub fn within(&self, verb: Verb, folder: &str) -> u64 {
        self.calls.get(&(verb, folder.to_owned())).copied().unwrap_or(0)
    }
}

/// A depot that is watched. Clones share their counts.
#[derive(Debug, Clone)]
pub struct Trace {
    inner: Arc<dyn Depot>,
    counts: Arc<Mutex<TraceCounts>>,
}

impl Trace {
    /// Wraps the depot; all counts begin at zero.
    pub fn new(inner: Arc<dyn Depot>) -> Self {
        Self { inner, counts: Arc::default() }
    }

    /// What was counted so far.
    pub fn counts(&self) -> TraceCounts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins to count anew, and returns what was counted.
    pub fn reset(&self) -> TraceCounts {
        std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn watched<T>(
        &self,
        verb: Verb,
        name: &str,
        call: impl FnOnce() -> Result<T>,
        bytes: impl FnOnce(&T) -> (u64, u64),
    ) -> Result<T> {
        let span = tracing::debug_span!("depot", ?verb, name);
        let result = span.in_scope(call);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.calls.entry((verb, folder(name))).or_default() += 1;
        match &result {
            Ok(value) => {
                let (up, down) = bytes(value);
                counts.bytes_up += up;
                counts.bytes_down += down;
            }
            Err(error) => {
                counts.failed += 1;
                span.in_scope(|| tracing::debug!(%error, "failed"));
            }
        }
        result
    }
}

/// The folders of a name, without the two hexadecimal digits by which packs are spread.
fn folder(name: &str) -> String {
    let parent = name.rfind('/').map_or("", |slash| &name[..slash]);
    let (above, last) = parent.rsplit_once('/').unwrap_or(("", parent));
    let spread = last.len() == 2 && last.bytes().all(|b| b.is_ascii_hexdigit());
    if spread { above.to_owned() } else { parent.to_owned() }
}

impl Depot for Trace {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.watched(Verb::Read, name, || self.inner.read(name), |(bytes, _)| (0, bytes.len() as u64))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let call = || self.inner.read_range(name, offset, length);
        self.watched(Verb::Read, name, call, |bytes| (0, bytes.len() as u64))
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.watched(Verb::Write, name, || self.inner.write(name, parts, mode), |_| (total_bytes(parts), 0))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.watched(Verb::List, prefix, || self.inner.list(prefix, visit), |()| (0, 0))
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.watched(Verb::Stat, name, || self.inner.stat(name), |_| (0, 0))
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.watched(Verb::Delete, name, || self.inner.delete(name), |()| (0, 0))
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
    fn calls_are_counted_by_verb_and_folder() {
        let depot = Trace::new(Arc::new(MemoryDepot::new()));
        depot.write("repo/data/ab/abcd", &[b"12", b"345"], &WriteMode::Replace).expect("write");
        depot.write("repo/data/cd/cdef", &[b"6"], &WriteMode::Replace).expect("write");
        depot.read_range("repo/data/ab/abcd", 1, 2).expect("read");
        assert!(depot.read("absent").is_err());
        depot.list("repo/data/", &mut |_| Ok(true)).expect("list");
        let counts = depot.reset();
        assert_eq!((counts.within(Verb::Write, "repo/data"), counts.of(Verb::Read), counts.failed), (2, 2, 1));
        assert_eq!((counts.bytes_up, counts.bytes_down, counts.within(Verb::List, "repo/data")), (6, 2, 1));
        assert_eq!(depot.counts(), TraceCounts::default());
    }
}
