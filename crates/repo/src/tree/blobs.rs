//! Loads single blobs, directories above all, without asking a distant depot once for each.
//!
//! Apart from [`super::fetch`], which knows beforehand all it will need: a walk learns one
//! directory at a time. Directories of one backup lie next to each other, so packs are read in
//! segments and the latest ones are kept, still sealed. A check of content never comes through here.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use stillpoint_core::{Error, Kind, Result};

use super::decode::Decoder;
use crate::format::pack::{BlobKind, PackEntry};
use crate::index::{Index, Location};
use crate::unpacked::{self, FileKind};
use crate::{Id, Repository};

/// Bytes of a pack read and kept together.
const SEGMENT_BYTES: u64 = 1 << 20;
/// Segments kept.
const SEGMENTS_MAX: usize = 16;

/// The latest segments of packs that were read.
#[derive(Default)]
pub(crate) struct Segments {
    /// Pack, number within the pack, bytes; the latest is last.
    recent: Mutex<VecDeque<((Id, u64), Bytes)>>,
}

impl Segments {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<((Id, u64), Bytes)>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segment(&self, repository: &Repository, pack: &Id, number: u64) -> Result<Bytes> {
        let mut recent = self.lock();
        if let Some(at) = recent.iter().position(|(key, _)| *key == (*pack, number)) {
            let found = recent.remove(at).expect("its position was just found");
            let bytes = found.1.clone();
            recent.push_back(found);
            return Ok(bytes);
        }
        drop(recent);
        let name = FileKind::Pack.name(pack);
        let bytes = repository.depot().read_range(&name, number * SEGMENT_BYTES, SEGMENT_BYTES)?;
        let mut recent = self.lock();
        if recent.len() == SEGMENTS_MAX {
            recent.pop_front();
        }
        recent.push_back(((*pack, number), bytes.clone()));
        Ok(bytes)
    }

    /// The sealed bytes of a blob, together with where they begin in the pack.
    fn sealed(&self, repository: &Repository, pack: &Id, entry: &PackEntry) -> Result<(Bytes, u64)> {
        let begin = u64::from(entry.offset);
        let last = begin + u64::from(entry.length.max(1)) - 1;
        let (from, to) = (begin / SEGMENT_BYTES, last / SEGMENT_BYTES);
        if from == to {
            return Ok((self.segment(repository, pack, from)?, from * SEGMENT_BYTES));
        }
        if to - from >= 4 {
            let name = FileKind::Pack.name(pack);
            return Ok((repository.depot().read_range(&name, begin, entry.length.into())?, begin));
        }
        let mut bytes = Vec::new();
        for number in from..=to {
            bytes.extend_from_slice(&self.segment(repository, pack, number)?);
        }
        Ok((bytes.into(), from * SEGMENT_BYTES))
    }

    fn forget(&self, pack: &Id) {
        self.lock().retain(|((of, _), _)| of != pack);
    }
}

/// Loads directories of a repository as its index was when this was made.
pub(crate) struct Loader {
    repository: Repository,
    index: Arc<Index>,
    segments: Segments,
}

impl Loader {
    /// A loader that knows everything that is stored by now. If an index file is damaged, it knows what
    /// the others name: what can be restored must not wait for a repair.
    pub(crate) fn new(repository: &Repository) -> Result<Arc<Self>> {
        let index = match repository.fresh_index() {
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
                Arc::new(usable_index(repository)?)
            }
            other => other?,
        };
        Ok(Self::with_index(repository, index))
    }

    /// A loader that knows what this index knows.
    pub(crate) fn with_index(repository: &Repository, index: Arc<Index>) -> Arc<Self> {
        Arc::new(Self { repository: repository.clone(), index, segments: Segments::default() })
    }

    /// The repository that is read.
    pub(crate) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Which blob lies where.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// Loads a directory's tree blob: decrypted, decompressed, verified.
    ///
    /// # Errors
    /// `Corrupt` if the index does not know it or no copy of it is what its id says.
    pub(crate) fn tree(&self, id: &Id) -> Result<Vec<u8>> {
        let mut failure = None;
        for Location { pack, entry } in self.index.locations(BlobKind::Tree, id) {
            match self.load_at(&pack, &entry) {
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => failure = Some(error),
                other => return other,
            }
        }
        Err(failure.unwrap_or_else(|| {
            Error::new(Kind::Corrupt, "a directory is not in the repository")
                .context("tree", id)
                .hint("`stillpoint check` lists everything that is missing")
        }))
    }

    fn load_at(&self, pack: &Id, entry: &PackEntry) -> Result<Vec<u8>> {
        let mut decoder = Decoder::new();
        let mut again = false;
        loop {
            let (data, base) = self.segments.sealed(&self.repository, pack, entry)?;
            let mut decoded = decoder.decode(self.repository.cipher(), &data, base, &[*entry], None);
            match decoded.failures.pop() {
                None => return Ok(decoded.plain(0).to_vec()),
                // What came over a wire may have been torn on the way.
                Some(_) if !again => {
                    self.segments.forget(pack);
                    again = true;
                }
                Some((_, error)) => {
                    return Err(error
                        .context("pack", FileKind::Pack.name(pack))
                        .hint("`stillpoint check --data` lists everything that is damaged"));
                }
            }
        }
    }
}

/// The index without the files that cannot be used. What only those name is missing, and reported as
/// such by whoever needs it.
fn usable_index(repository: &Repository) -> Result<Index> {
    let mut index = Index::default();
    for id in unpacked::list(repository.depot(), FileKind::Index)? {
        match repository.load(FileKind::Index, &id) {
            Ok(json) => {
                // A file that ends early has named only packs that are there.
                if let Err(error) = index.add_file(&json) {
                    tracing::warn!(%error, "an index file cannot be used");
                }
            }
            Err(error) if error.is_temporary() || error.kind() == Kind::Cancelled => return Err(error),
            Err(error) => tracing::warn!(%error, "an index file cannot be used"),
        }
    }
    Ok(index)
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loader({:?})", self.repository)
    }
}
