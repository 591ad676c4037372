//! Which blobs need not be stored: those that the repository has and those of this backup.
//!
//! The index alone is not believed: a pack that it names and that is gone would be missing from every
//! later point too. What is wrong within a pack is the business of `check`.

use std::sync::{Arc, Mutex, PoisonError};

use stillpoint_core::error::Result;

use crate::Repository;
use crate::format::id::Id;
use crate::format::pack::BlobKind;
use crate::index::{Index, Table};

/// Locks among which the ids of this backup are spread, so that workers seldom meet.
const SHARDS: usize = 16;

/// The repository's index and what this backup adds to it.
pub(super) struct Known {
    stored: Arc<Index>,
    is_whole: bool,
    data: [Mutex<Table<Id>>; SHARDS],
    trees: Mutex<Table<Id>>,
}

impl Known {
    /// Reads the index, without the packs that are absent or too short.
    pub(super) fn load(repository: &Repository) -> Result<Self> {
        let (stored, is_whole) = repository.index_of_present()?;
        let data = std::array::from_fn(|_| Mutex::new(Table::new()));
        Ok(Self { stored, is_whole, data, trees: Mutex::new(Table::new()) })
    }

    /// Whether every pack is there that the index names. If not, nothing is known of what lies below
    /// a directory.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The index as it was when the backup began, without what lay in lost packs.
    pub(super) fn stored(&self) -> &Arc<Index> {
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
