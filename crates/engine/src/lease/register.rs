//! One small record in the bucket that changes only from what was read.
//!
//! Conditional writes decide between racers; where a service has none, the depot lets writers take
//! turns (docs/decisions/0002-conditional-writes-fallback.md), so that nothing here needs to know.

use std::sync::Arc;

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::PlatformName;
use stillpoint_repo::depot::{Depot, Version, WriteMode};

use super::{LeaseRecord, SCHEMA};

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
    name: String,
}

impl Register {
    pub(super) fn new(bucket: Arc<dyn Depot>, platform: &PlatformName) -> Self {
        Self { bucket, platform: platform.clone(), name: format!("leases/{platform}.json") }
    }

    /// The record as it is now.
    pub(super) fn read(&self) -> Result<Option<Entry>> {
        match self.bucket.read(&self.name) {
            Ok((bytes, version)) => Ok(Some(Entry { record: self.parse(&bytes)?, version })),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error.operation("read the lease")),
        }
    }

    /// Replaces `found` by `record`; `Conflict` or `AlreadyExists` if it is no longer what it was.
    pub(super) fn swap(&self, found: Option<&Entry>, record: LeaseRecord) -> Result<Entry> {
        let bytes = serde_json::to_vec_pretty(&record).map_err(|e| Error::internal("a lease has no JSON").source(e))?;
        let mode = match found {
            None => WriteMode::Create,
            Some(Entry { version: Some(version), .. }) => WriteMode::Update(version.clone()),
            Some(_) => return Err(Error::internal("the depot gives no version for the lease")),
        };
        let version = self.bucket.write(&self.name, &[&bytes], &mode)?;
        Ok(Entry { record, version })
    }

    fn parse(&self, bytes: &[u8]) -> Result<LeaseRecord> {
        let unreadable = || {
            Error::new(Kind::Corrupt, format!("the lease `{}` in the bucket is not readable", self.name))
                .hint("see that no engine runs for this platform, then remove that object")
        };
        let record: LeaseRecord = serde_json::from_slice(bytes).map_err(|error| unreadable().source(error))?;
        if record.schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the lease uses the schema `{}`", record.schema))
                .hint("a newer stillpoint uses this bucket; use that one"));
        }
        if record.platform != self.platform {
            return Err(unreadable().context("platform", &record.platform));
        }
        Ok(record)
    }
}
