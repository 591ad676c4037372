//! A depot in memory, for tests and rehearsals: the plainest reading of the contract.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use stillpoint_core::error::{Error, Kind, Result};

use super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, check_name, check_prefix, total_bytes};

/// Objects in a map. Everything is gone when it is dropped.
#[derive(Debug)]
pub struct MemoryDepot {
    state: Mutex<State>,
    capability: DepotCapability,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    writes: u64,
}

#[derive(Debug, Clone)]
struct Object {
    bytes: Bytes,
    version: Version,
    modified: SystemTime,
}

impl Default for MemoryDepot {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryDepot {
    /// An empty depot that can do conditional writes.
    pub fn new() -> Self {
        Self::with_capability(DepotCapability {
            conditional_create: true,
            conditional_update: true,
            ..Default::default()
        })
    }

    /// An empty depot that behaves as if it could do only this much: without `conditional_create`
    /// a `Create` overwrites, as on services that ignore the condition; without
    /// `conditional_update` an `Update` is `Unsupported`.
    pub fn with_capability(capability: DepotCapability) -> Self {
        Self { state: Mutex::default(), capability }
    }

    /// The names of all objects, sorted.
    pub fn names(&self) -> Vec<String> {
        self.state().objects.keys().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn object(&self, name: &str) -> Result<Object> {
        check_name(name)?;
        let found = self.state().objects.get(name).cloned();
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("there is no object `{name}`")))
    }
}

impl Depot for MemoryDepot {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        let object = self.object(name)?;
        Ok((object.bytes, Some(object.version)))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let bytes = self.object(name)?.bytes;
        let begin = offset.min(bytes.len() as u64);
        let end = offset.saturating_add(length).min(bytes.len() as u64);
        Ok(bytes.slice(begin as usize..end as usize))
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        check_name(name)?;
        let mut bytes = Vec::with_capacity(total_bytes(parts) as usize);
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        let mut state = self.state();
        let found = state.objects.get(name).map(|object| &object.version);
        match mode {
            WriteMode::Create if found.is_some() && self.capability.conditional_create => {
                return Err(Error::new(Kind::AlreadyExists, format!("`{name}` exists already")));
            }
            WriteMode::Update(_) if !self.capability.conditional_update => {
                return Err(Error::new(Kind::Unsupported, "this depot has no conditional update"));
            }
            WriteMode::Update(expected) if found != Some(expected) => {
                return Err(Error::new(Kind::Conflict, format!("`{name}` was changed by someone else")));
            }
            _ => {}
        }
        state.writes += 1;
        let version = Version(state.writes.to_string());
        let object = Object { bytes: bytes.into(), version: version.clone(), modified: SystemTime::now() };
        state.objects.insert(name.to_owned(), object);
        Ok(Some(version))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        // The visitor may call back into the depot, so the lock is not held while it runs.
        let found: Vec<_> = {
            let state = self.state();
            let within = state.objects.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix));
            within.map(|(name, object)| info(name, object)).collect()
        };
        for object in found {
            if !visit(object)? {
                break;
            }
        }
        Ok(())
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        check_name(name)?;
        Ok(self.state().objects.get(name).map(|object| info(name, object)))
    }

    fn delete(&self, name: &str) -> Result<()> {
        check_name(name)?;
        self.state().objects.remove(name);
        Ok(())
    }

    fn capability(&self) -> DepotCapability {
        self.capability
    }

    fn waits(&self) -> bool {
        false
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}

fn info(name: &str, object: &Object) -> ObjectInfo {
    ObjectInfo {
        name: name.to_owned(),
        size: object.bytes.len() as u64,
        modified: object.modified,
        version: Some(object.version.clone()),
    }
}
