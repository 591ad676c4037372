//! A part of a depot, seen as a depot of its own: the repository below `repo/`.

use std::sync::Arc;

use bytes::Bytes;
use stillpoint_core::Result;

use super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, check_name, check_prefix};

/// Everything below one prefix of another depot.
#[derive(Debug, Clone)]
pub struct Prefixed {
    inner: Arc<dyn Depot>,
    prefix: String,
}

impl Prefixed {
    /// `prefix` ends in `/`, or is empty; a missing `/` is added.
    pub fn new(inner: Arc<dyn Depot>, prefix: impl Into<String>) -> Self {
        let mut prefix = prefix.into();
        if !prefix.is_empty() && !prefix.ends_with('/') {
            prefix.push('/');
        }
        Self { inner, prefix }
    }

    fn full(&self, name: &str) -> Result<String> {
        check_name(name)?;
        Ok(format!("{}{name}", self.prefix))
    }

    fn shortened(&self, mut object: ObjectInfo) -> ObjectInfo {
        object.name.drain(..self.prefix.len());
        object
    }
}

impl Depot for Prefixed {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.inner.read(&self.full(name)?)
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.inner.read_range(&self.full(name)?, offset, length)
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        self.inner.write(&self.full(name)?, parts, mode)
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        self.inner.list(&format!("{}{prefix}", self.prefix), &mut |object| visit(self.shortened(object)))
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        Ok(self.inner.stat(&self.full(name)?)?.map(|object| self.shortened(object)))
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(&self.full(name)?)
    }

    fn capability(&self) -> DepotCapability {
        self.inner.capability()
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }

    fn location(&self) -> String {
        let location = self.inner.location();
        format!("{}/{}", location.trim_end_matches('/'), self.prefix.trim_end_matches('/'))
    }
}
