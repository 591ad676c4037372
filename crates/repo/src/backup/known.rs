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
use crate::unpacked::FileKind;

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
    /// Reads the index, and lists the packs once to leave out those that are absent or too short.
    pub(super) fn load(repository: &Repository) -> Result<Self> {
        let mut stored = repository.fresh_index()?;
        // Packs come before the index that names them, so a list that is made later has them all.
        let mut lost = stored.ends();
        if !lost.is_empty() {
            repository.depot().list(FileKind::Pack.folder(), &mut |object| {
                let id = FileKind::Pack.id_of(&object.name);
                // A header follows the last blob.
                if let Some(id) = id.filter(|id| lost.get(id).is_some_and(|end| object.size > *end)) {
                    lost.remove(&id);
                }
                Ok(true)
            })?;
        }
        let is_whole = lost.is_empty();
        if !is_whole {
            tracing::warn!(packs = lost.len(), "packs are absent or cut short; what they held is stored anew");
            stored = Arc::new(stored.without(|pack| lost.contains_key(pack))?);
        }
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
