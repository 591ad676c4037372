//! Which blobs need not be stored: those that the repository has and those of this backup.

use std::sync::{Arc, Mutex, PoisonError};

use stillpoint_core::error::Result;

use crate::format::id::Id;
use crate::format::pack::BlobKind;
use crate::index::{Index, Table};

/// Locks among which the ids of this backup are spread, so that workers seldom meet.
const SHARDS: usize = 16;

/// The repository's index and what this backup adds to it.
pub(super) struct Known {
    stored: Arc<Index>,
    data: [Mutex<Table<Id>>; SHARDS],
    trees: Mutex<Table<Id>>,
}

impl Known {
    pub(super) fn new(stored: Arc<Index>) -> Self {
        Self { stored, data: std::array::from_fn(|_| Mutex::new(Table::new())), trees: Mutex::new(Table::new()) }
    }

    /// The index as it was when the backup began.
    pub(super) fn stored(&self) -> &Index {
        &self.stored
    }

    /// Whether the caller must store the blob: true for one caller of each unknown blob.
    pub(super) fn claim(&self, kind: BlobKind, id: &Id) -> Result<bool> {
        if self.stored.contains(kind, id) {
            return Ok(false);
        }
        let table = match kind {
            BlobKind::Data => &self.data[usize::from(id.0[31]) % SHARDS],
            BlobKind::Tree => &self.trees,
        };
        let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.get(id).next().is_some() {
            return Ok(false);
        }
        table.insert(*id)?;
        Ok(true)
    }
}
