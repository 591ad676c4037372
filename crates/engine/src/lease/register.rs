//! One small record in the bucket that changes only from what was read.
//!
//! With conditional updates it is one object, `leases/<platform>.json`. Where a depot can only
//! create conditionally, each holder creates an object of its own,
//! `leases/<platform>/<number>.json`; the highest number is the record, creating the next number is
//! the takeover, and a holder overwrites nothing but its own. Where a depot cannot even do that,
//! the same objects are read back after a pause: two engines that start within that pause can then
//! both believe to hold the lease, which costs a run; the commit is still one write to one name.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::PlatformName;
use stillpoint_repo::depot::{Depot, Version, WriteMode};

use super::{LeaseRecord, SCHEMA};

/// How long a create waits for a rival where the depot cannot decide.
const SETTLE: Duration = Duration::from_millis(500);

/// A record as it was read, and what a change of it must name.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) record: LeaseRecord,
    version: Option<Version>,
}

#[derive(Debug)]
pub(super) struct Register {
    bucket: Arc<dyn Depot>,
    platform: PlatformName,
}

impl Register {
    pub(super) fn new(bucket: Arc<dyn Depot>, platform: &PlatformName) -> Self {
        Self { bucket, platform: platform.clone() }
    }

    fn updates(&self) -> bool {
        self.bucket.capability().conditional_update
    }

    fn single_name(&self) -> String {
        format!("leases/{}.json", self.platform)
    }

    fn numbered_name(&self, fencing: u64) -> String {
        format!("leases/{}/{fencing:012}.json", self.platform)
    }

    /// The record as it is now.
    pub(super) fn read(&self) -> Result<Option<Entry>> {
        let name = if self.updates() { Some(self.single_name()) } else { self.highest()? };
        let Some(name) = name else { return Ok(None) };
        match self.bucket.read(&name) {
            Ok((bytes, version)) => Ok(Some(Entry { record: self.parse(&name, &bytes)?, version })),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error.operation("read the lease")),
        }
    }

    /// Replaces `found` by `record`; `Conflict` or `AlreadyExists` if it is no longer what it was.
    pub(super) fn swap(&self, found: Option<&Entry>, record: LeaseRecord) -> Result<Entry> {
        let bytes = serde_json::to_vec_pretty(&record).map_err(|e| Error::internal("a lease has no JSON").source(e))?;
        if !self.updates() {
            return self.swap_numbered(found, record, &bytes);
        }
        let mode = match found {
            None => WriteMode::Create,
            Some(Entry { version: Some(version), .. }) => WriteMode::Update(version.clone()),
            Some(_) => return Err(Error::internal("the depot updates conditionally but gives no versions")),
        };
        let version = self.bucket.write(&self.single_name(), &[&bytes], &mode)?;
        Ok(Entry { record, version })
    }

    fn swap_numbered(&self, found: Option<&Entry>, record: LeaseRecord, bytes: &[u8]) -> Result<Entry> {
        let own = found.is_some_and(|entry| entry.record.fencing == record.fencing);
        let name = self.numbered_name(record.fencing);
        if !own {
            self.bucket.write(&name, &[bytes], &WriteMode::Create)?;
            if !self.bucket.capability().conditional_create {
                std::thread::sleep(SETTLE);
            }
            self.remove_below(record.fencing)?;
        }
        let highest = self.highest()?;
        if highest.as_deref() != Some(name.as_str()) {
            return Err(Error::new(Kind::Conflict, "the lease has a newer holder"));
        }
        if own {
            self.bucket.write(&name, &[bytes], &WriteMode::Replace)?;
        } else if self.bucket.read(&name)?.0 != bytes {
            return Err(Error::new(Kind::Conflict, "the lease was taken at the same moment"));
        }
        Ok(Entry { record, version: None })
    }

    fn highest(&self) -> Result<Option<String>> {
        let mut highest: Option<String> = None;
        self.bucket.list(&format!("leases/{}/", self.platform), &mut |info| {
            if highest.as_ref().is_none_or(|name| *name < info.name) {
                highest = Some(info.name);
            }
            Ok(true)
        })?;
        Ok(highest)
    }

    /// Removes old numbers, but never the one right below: its holder may still be looking.
    fn remove_below(&self, fencing: u64) -> Result<()> {
        let keep = self.numbered_name(fencing.saturating_sub(1));
        let mut old = Vec::new();
        self.bucket.list(&format!("leases/{}/", self.platform), &mut |info| {
            if info.name < keep {
                old.push(info.name);
            }
            Ok(true)
        })?;
        old.iter().try_for_each(|name| self.bucket.delete(name))
    }

    fn parse(&self, name: &str, bytes: &[u8]) -> Result<LeaseRecord> {
        let unreadable = || Error::new(Kind::Corrupt, format!("the lease `{name}` in the bucket is not readable"));
        let hint = "see that no engine runs for this platform, then remove that object";
        let record: LeaseRecord = serde_json::from_slice(bytes).map_err(|e| unreadable().hint(hint).source(e))?;
        if record.schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the lease uses the schema `{}`", record.schema))
                .hint("a newer stillpoint uses this bucket; use that one"));
        }
        if record.platform != self.platform {
            return Err(unreadable().hint(hint).context("platform", &record.platform));
        }
        Ok(record)
    }
}
