//! Writes sealed blobs into new packs, and names packs in new index files.
//!
//! Apart from the backup's pipeline, which compresses and seals: prune and copy have blobs that are
//! done, and need only to place them. Packs are written by whoever fills them, several at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use stillpoint_core::Result;

use crate::crypto::Nonces;
use crate::depot::WriteMode;
use crate::format::index::{write_end, write_pack};
use crate::format::pack::{BlobKind, PackEntry};
use crate::pack::{Pack, Sealer};
use crate::unpacked::FileKind;
use crate::{Id, Repository};

/// A pack is written once it holds this much, bytes.
const PACK_BYTES: usize = 16 << 20;
/// Blobs named by one index file.
const INDEX_BLOBS_MAX: usize = 50_000;

/// Collects blobs into packs, data and directories apart, and names them in index files.
pub(crate) struct PackWriter<'r> {
    repository: &'r Repository,
    data: Mutex<Pack>,
    trees: Mutex<Pack>,
    index: Mutex<IndexWriter<'r>>,
}

impl<'r> PackWriter<'r> {
    /// A writer that has written nothing.
    pub(crate) fn new(repository: &'r Repository) -> Self {
        Self {
            repository,
            data: Mutex::new(Pack::new()),
            trees: Mutex::new(Pack::new()),
            index: Mutex::new(IndexWriter::new(repository)),
        }
    }

    /// Adds a blob that is sealed for this repository; `entry.offset` does not matter.
    pub(crate) fn add(&self, entry: &PackEntry, sealed: &[u8]) -> Result<()> {
        let full = {
            let mut pack = lock(match entry.kind {
                BlobKind::Data => &self.data,
                BlobKind::Tree => &self.trees,
            });
            pack.add_sealed(entry, sealed);
            if pack.len() < PACK_BYTES {
                return Ok(());
            }
            std::mem::replace(&mut *pack, Pack::new())
        };
        self.write(full)
    }

    fn write(&self, mut pack: Pack) -> Result<()> {
        let mut sealer = Sealer { cipher: self.repository.cipher().clone(), nonces: Nonces::new() };
        let id = pack.seal(&mut sealer)?;
        // The name is the content's hash, so whatever is there under it is the same.
        self.repository.depot().write(&FileKind::Pack.name(&id), &[pack.bytes()], &WriteMode::Replace)?;
        let mut index = lock(&self.index);
        index.bytes_of_packs += pack.bytes().len() as u64;
        index.add(&id, pack.entries())
    }

    /// Writes the packs that are not full, and hands back the index, which is not written yet.
    pub(crate) fn finish(self) -> Result<IndexWriter<'r>> {
        for pack in [&self.data, &self.trees] {
            let pack = std::mem::replace(&mut *lock(pack), Pack::new());
            if !pack.is_empty() {
                self.write(pack)?;
            }
        }
        Ok(self.index.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Collects packs into index files.
pub(crate) struct IndexWriter<'r> {
    repository: &'r Repository,
    json: Vec<u8>,
    blobs: usize,
    bytes_of_packs: u64,
    written: Vec<Id>,
}

impl<'r> IndexWriter<'r> {
    fn new(repository: &'r Repository) -> Self {
        Self { repository, json: Vec::new(), blobs: 0, bytes_of_packs: 0, written: Vec::new() }
    }

    /// Names a pack that lies in the depot.
    pub(crate) fn add(&mut self, pack: &Id, entries: &[PackEntry]) -> Result<()> {
        write_pack(pack, entries, self.json.is_empty(), &mut self.json);
        self.blobs += entries.len();
        if self.blobs < INDEX_BLOBS_MAX { Ok(()) } else { self.flush() }
    }

    /// Bytes of the packs that were written, not of those that are only named.
    pub(crate) fn bytes_of_packs(&self) -> u64 {
        self.bytes_of_packs
    }

    fn flush(&mut self) -> Result<()> {
        if self.json.is_empty() {
            return Ok(());
        }
        write_end(&mut self.json);
        self.written.push(self.repository.save(FileKind::Index, &self.json)?);
        self.json.clear();
        self.blobs = 0;
        Ok(())
    }

    /// Writes the last index file and returns the ids of all.
    pub(crate) fn finish(mut self) -> Result<Vec<Id>> {
        self.flush()?;
        Ok(self.written)
    }
}
