//! Does something before each call, for tests that wait for a moment, slow one kind of call, or refuse it.
//!
//! Apart from [`super::Chaos`], whose faults are drawn by chance.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use stillpoint_core::error::Result;

use super::super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};
use super::Verb;

/// A call that is about to be made.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// What is asked for.
    pub verb: Verb,
    /// The object, or the prefix of a listing.
    pub name: &'a str,
    /// Bytes of the range that is asked for; 0 for all other calls.
    pub range_bytes: u64,
}

/// What is done before a call; an error takes the call's place.
type Act = Box<dyn Fn(&Call<'_>) -> Result<()> + Send + Sync>;

/// A depot before whose calls something is done.
pub struct Before {
    inner: Arc<dyn Depot>,
    act: Act,
}

impl Before {
    /// Wraps the depot.
    pub fn new(inner: Arc<dyn Depot>, act: impl Fn(&Call<'_>) -> Result<()> + Send + Sync + 'static) -> Self {
        Self { inner, act: Box::new(act) }
    }

    fn act(&self, verb: Verb, name: &str) -> Result<()> {
        (self.act)(&Call { verb, name, range_bytes: 0 })
    }
}

impl fmt::Debug for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Before({:?})", self.inner)
    }
}

impl Depot for Before {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.act(Verb::Read, name)?;
        self.inner.read(name)
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        (self.act)(&Call { verb: Verb::Read, name, range_bytes: length })?;
        self.inner.read_range(name, offset, length)
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.act(Verb::Write, name)?;
        self.inner.write(name, parts, mode)
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.act(Verb::List, prefix)?;
        self.inner.list(prefix, visit)
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.act(Verb::Stat, name)?;
        self.inner.stat(name)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.act(Verb::Delete, name)?;
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
