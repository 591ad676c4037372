//! Compares what the index says of packs with what lies in the depot: presence and size.

use std::collections::{HashMap, HashSet};

use stillpoint_core::Result;

use super::{Bad, Check};
use crate::Id;
use crate::format::pack::{LENGTH_FIELD_BYTES, PackEntry, SEAL_BYTES};
use crate::index::Index;
use crate::unpacked::FileKind;

/// Bytes of a header's entry for a blob stored raw, and for a compressed one.
const ENTRY_BYTES: [u64; 2] = [37, 41];

/// The size of a pack that holds exactly these blobs.
pub(crate) fn pack_bytes<'e>(entries: impl IntoIterator<Item = &'e PackEntry>) -> u64 {
    let header = u64::from(SEAL_BYTES) + LENGTH_FIELD_BYTES as u64;
    let each = |entry: &PackEntry| u64::from(entry.length) + ENTRY_BYTES[usize::from(entry.uncompressed > 0)];
    entries.into_iter().fold(header, |sum, entry| sum + each(entry))
}

/// Calls `visit` with each pack of the index and its blobs, sorted by offset. A pack that several
/// index files name comes once for each.
pub(crate) fn each_pack(index: &Index, mut visit: impl FnMut(Id, &mut Vec<PackEntry>) -> Result<()>) -> Result<()> {
    let mut entries: Vec<PackEntry> = Vec::new();
    let mut current: Option<Id> = None;
    for location in index.iter() {
        if let Some(pack) = current
            && pack != location.pack
        {
            entries.sort_unstable_by_key(|entry| entry.offset);
            visit(pack, &mut entries)?;
            entries.clear();
        }
        current = Some(location.pack);
        entries.push(location.entry);
    }
    match current {
        Some(pack) => {
            entries.sort_unstable_by_key(|entry| entry.offset);
            visit(pack, &mut entries)
        }
        None => Ok(()),
    }
}

impl Check<'_> {
    /// Every pack of the index is there, and as large as its blobs make it.
    pub(super) fn packs(&mut self, index: &Index) -> Result<Bad> {
        let mut present: HashMap<Id, u64> = HashMap::new();
        self.repository.depot().list(FileKind::Pack.folder(), &mut |object| {
            if let Some(id) = FileKind::Pack.id_of(&object.name) {
                present.insert(id, object.size);
            }
            Ok(true)
        })?;
        let mut bad = Bad::default();
        let mut known: HashSet<Id> = HashSet::with_capacity(index.packs().len());
        let mut findings = Vec::new();
        each_pack(index, |pack, entries| {
            entries.dedup(); // Two index files that name one pack may follow each other.
            let first = known.insert(pack);
            let name = FileKind::Pack.name(&pack);
            match present.get(&pack) {
                None if first => {
                    bad.packs.insert(pack);
                    findings.push(format!("pack {name} is missing"));
                }
                Some(size) if *size != pack_bytes(entries.iter()) && bad.packs.insert(pack) => {
                    let expected = pack_bytes(entries.iter());
                    findings.push(format!("pack {name} is {size} bytes long, not {expected}"));
                }
                _ => {}
            }
            Ok(())
        })?;
        findings.into_iter().for_each(|finding| self.error(finding));
        self.report.packs = known.len() as u64;
        let unnamed = present.keys().filter(|id| !known.contains(id)).count();
        if unnamed > 0 {
            let note = format!("{unnamed} packs are named by no index; prune collects them");
            self.report.notes.push(note);
        }
        Ok(bad)
    }
}
