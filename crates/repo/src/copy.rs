//! Replicates snapshots to another repository.
//!
//! Everything that the snapshots reach and the target lacks is read in the order of the source's
//! packs, verified, sealed with the target's key and written to new packs there. Compressed bytes
//! are moved as they are. Snapshots come last, so that a copy that is killed leaves nothing but
//! blobs which the next one finds. What the target's index names counts only if its pack is there: what
//! lay in packs that were lost is copied again, also for snapshots that the target has.

use std::collections::HashMap;

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Kind, Result};

use crate::format::pack::{PackEntry, SEAL_BYTES};
use crate::format::snapshot::SnapshotJson;
use crate::index::Index;
use crate::lock::{HeldLock, Mode};
use crate::prune::mark::mark;
use crate::prune::writer::PackWriter;
use crate::tree::fetch::{Blob, Wanted, fetch};
use crate::unpacked::{self, FileKind};
use crate::{Id, Repository, SnapshotId};

/// Blobs that are sorted and copied together, 60 bytes each.
const COPY_BLOBS_MAX: usize = 256 * 1024;

/// What a copy did.
#[derive(Debug, Clone, Default)]
pub struct CopyReport {
    /// The id of each snapshot at the source and at the target, in the order asked for.
    pub snapshots: Vec<(SnapshotId, SnapshotId)>,
    /// How many of them the target had already.
    pub snapshots_known: u64,
    /// Blobs copied.
    pub blobs: u64,
    /// Bytes written to the target.
    pub bytes_stored: u64,
}

/// A blob to be copied.
struct Copied {
    pack: u32,
    entry: PackEntry,
}

impl Wanted for Copied {
    fn pack(&self) -> u32 {
        self.pack
    }
    fn entry(&self) -> &PackEntry {
        &self.entry
    }
}

impl Repository {
    /// Copies `snapshots` and all that they need to `target`. What is there already is not copied
    /// again, unless the pack that holds it there was lost or cut short.
    ///
    /// # Errors
    /// `Corrupt` if something is damaged or missing at the source: snapshots that need it are not
    /// written. `Locked` if someone prunes one of the two.
    pub fn copy_to(&self, target: &Repository, snapshots: &[SnapshotId], context: &Context) -> Result<CopyReport> {
        if self.id() == target.id() {
            return Err(Error::new(Kind::Config, "source and target are the same repository"));
        }
        let source_lock = match HeldLock::acquire(self, Mode::Shared) {
            Err(error) if error.kind() == Kind::PermissionDenied => None, // A source may be read-only.
            other => Some(other?),
        };
        let target_lock = HeldLock::acquire(target, Mode::Shared)?;
        let result = self.copy_locked(target, &target_lock, snapshots, context);
        let released = target_lock.release().and_then(|()| source_lock.map_or(Ok(()), HeldLock::release));
        match (result, released) {
            (Ok(report), Ok(())) => Ok(report),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
        }
    }

    fn copy_locked(
        &self,
        target: &Repository,
        lock: &HeldLock,
        snapshots: &[SnapshotId],
        context: &Context,
    ) -> Result<CopyReport> {
        let known = origins(target)?;
        let mut report = CopyReport::default();
        let (held, is_whole) = target.index_of_present()?;
        let (mut roots, mut missing) = (Vec::new(), Vec::new());
        for id in snapshots {
            let source_id = Id::parse(&id.0)?;
            let json = self.load(FileKind::Snapshot, &source_id)?;
            let parsed = SnapshotJson::parse(&json)?;
            let origin = parsed.original.unwrap_or(source_id);
            if let Some(copy) = known.get(&origin).or_else(|| known.get(&source_id)) {
                report.snapshots.push((id.clone(), (*copy).into()));
                report.snapshots_known += 1;
                if is_whole {
                    continue;
                }
            } else {
                missing.push((id.clone(), copied_json(&json, origin)?));
            }
            roots.push(parsed.tree);
        }
        if !roots.is_empty() {
            self.copy_blobs(target, &held, &roots, context, &mut report)?;
        }
        lock.check()?;
        for (id, json) in missing {
            let copy = target.save(FileKind::Snapshot, &json)?;
            report.snapshots.push((id, copy.into()));
        }
        let place = |id: &SnapshotId| snapshots.iter().position(|asked| asked == id);
        report.snapshots.sort_by_key(|(id, _)| place(id));
        Ok(report)
    }

    fn copy_blobs(
        &self,
        target: &Repository,
        held: &Index,
        roots: &[Id],
        context: &Context,
        report: &mut CopyReport,
    ) -> Result<()> {
        let index = self.fresh_index()?;
        let marks = mark(self, &index, roots, None, context)?;
        let wanted = || {
            let marked = index.iter().enumerate().filter(|(number, _)| marks.is_set(*number));
            marked
                .map(|(_, location)| location)
                .filter(|location| !held.contains(location.entry.kind, &location.entry.id))
        };
        context.expect_bytes(wanted().map(|location| u64::from(location.entry.length)).sum());
        let writer = PackWriter::new(target);
        let (mut packs, mut numbers, mut copied) = (Vec::new(), HashMap::new(), Vec::new());
        let mut carry_out = |packs: &[Id], copied: &mut Vec<Copied>| {
            copied.sort_unstable_by_key(|blob| (blob.pack, blob.entry.offset));
            let name_of = |blob: &Copied| format!("blob {}", blob.entry.id);
            report.blobs += copied.len() as u64;
            fetch(self, &index, packs, copied, context, &name_of, &|blobs, blob| {
                context.advance(blob.sealed.len() as u64, 1);
                let (entry, sealed) = self.sealed_for(target, &blobs[0].entry, blob)?;
                writer.add(&entry, &sealed)
            })?;
            copied.clear();
            Ok::<(), Error>(())
        };
        for location in wanted() {
            if copied.len() >= COPY_BLOBS_MAX && !numbers.contains_key(&location.pack) {
                carry_out(&packs, &mut copied)?;
                packs.clear();
                numbers.clear();
            }
            let pack = *numbers.entry(location.pack).or_insert_with(|| {
                packs.push(location.pack);
                (packs.len() - 1) as u32
            });
            copied.push(Copied { pack, entry: location.entry });
        }
        carry_out(&packs, &mut copied)?;
        let index = writer.finish()?;
        report.bytes_stored = index.bytes_of_packs();
        index.finish()?;
        Ok(())
    }

    /// The blob as the target holds it: the same payload, compressed or not, under its key.
    fn sealed_for(&self, target: &Repository, entry: &PackEntry, blob: &Blob<'_>) -> Result<(PackEntry, Vec<u8>)> {
        if blob.entry.uncompressed == 0 {
            let sealed = target.cipher().seal(blob.plain)?;
            return Ok((PackEntry { length: sealed.len() as u32, uncompressed: 0, ..*entry }, sealed));
        }
        let mut payload = vec![0; blob.sealed.len() - SEAL_BYTES as usize];
        self.cipher().open_to(blob.sealed, &mut payload)?;
        let sealed = target.cipher().seal(&payload)?;
        Ok((PackEntry { length: sealed.len() as u32, uncompressed: blob.entry.uncompressed, ..*entry }, sealed))
    }
}

/// The target's snapshots by the snapshot that each was copied from, or by itself.
fn origins(target: &Repository) -> Result<HashMap<Id, Id>> {
    let mut origins = HashMap::new();
    for id in unpacked::list(target.depot(), FileKind::Snapshot)? {
        let json = SnapshotJson::parse(&target.load(FileKind::Snapshot, &id)?)?;
        origins.insert(json.original.unwrap_or(id), id);
    }
    Ok(origins)
}

/// The snapshot as it is written to the target: every field kept, also those of newer tools, but
/// the parent, which may not be there.
fn copied_json(json: &[u8], origin: Id) -> Result<Vec<u8>> {
    let bad = |error| Error::new(Kind::Corrupt, "a snapshot is not what it must be").source(error);
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).map_err(bad)?;
    fields.remove("parent");
    fields.insert("original".to_owned(), origin.hex().into());
    serde_json::to_vec(&fields).map_err(bad)
}
