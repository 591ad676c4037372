//! Which blob lies where: the one table that every read and every deduplication asks.
//!
//! It stands behind one type, so that a table on disk can follow for repositories of 10^8 blobs.
//! Here it lies in memory, at most 64 bytes for each blob: 48 for the entry, in segments that never
//! move, and 6.4 to 12.8 for its slot in a table of numbers, which finds it.

use std::collections::HashMap;

use stillpoint_core::error::{Error, Kind, Result};

use crate::format::id::Id;
use crate::format::index;
use crate::format::pack::{BlobKind, PackEntry};

/// Entries of one segment. Segments are what grows, so memory is never held twice.
const SEGMENT_ENTRIES: usize = 4096;

/// Something with an id, kept in a [`Table`].
pub(crate) trait Keyed {
    fn id(&self) -> &Id;
}

impl Keyed for Id {
    fn id(&self) -> &Id {
        self
    }
}

/// Entries by id; one id may have several.
///
/// Open addressing over entry numbers. Ids are SHA-256, so a few of their bytes are the hash; a
/// random factor keeps whoever writes the data from choosing which entries collide.
#[derive(Debug)]
pub(crate) struct Table<E> {
    segments: Vec<Vec<E>>,
    /// Entry number plus one; 0 is free. The length is a power of two.
    slots: Vec<u32>,
    entries: usize,
    factor: u64,
}

impl<E: Keyed> Table<E> {
    pub(crate) fn new() -> Self {
        let factor = crate::crypto::random().map(u64::from_le_bytes).unwrap_or(0x9e37_79b9_7f4a_7c15) | 1;
        Self { segments: Vec::new(), slots: Vec::new(), entries: 0, factor }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries
    }

    /// All entries of `id`.
    pub(crate) fn get<'t>(&'t self, id: &'t Id) -> impl Iterator<Item = &'t E> {
        self.numbered(id).map(|(_, entry)| entry)
    }

    /// All entries of `id`, each with its place in the order of [`Table::iter`].
    pub(crate) fn numbered<'t>(&'t self, id: &'t Id) -> impl Iterator<Item = (usize, &'t E)> {
        let mask = self.slots.len().wrapping_sub(1);
        let mut slot = if self.slots.is_empty() { 0 } else { self.home(id) };
        std::iter::from_fn(move || {
            loop {
                let number = *self.slots.get(slot)?;
                if number == 0 {
                    return None;
                }
                slot = (slot + 1) & mask;
                let entry = self.entry(number);
                if entry.id() == id {
                    return Some((number as usize - 1, entry));
                }
            }
        })
    }

    pub(crate) fn insert(&mut self, entry: E) -> Result<()> {
        // Five eighths full at most: a search for what is not there looks at four slots.
        if self.entries + 1 > self.slots.len() / 8 * 5 {
            self.grow()?;
        }
        let mut slot = self.home(entry.id());
        while self.slots[slot] != 0 {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        match self.segments.last_mut() {
            Some(segment) if segment.len() < SEGMENT_ENTRIES => segment.push(entry),
            _ => {
                let mut segment = Vec::with_capacity(SEGMENT_ENTRIES);
                segment.push(entry);
                self.segments.push(segment);
            }
        }
        self.entries += 1;
        self.slots[slot] = u32::try_from(self.entries).map_err(|_| full())?;
        Ok(())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &E> {
        self.segments.iter().flatten()
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(crate) fn memory_bytes(&self) -> usize {
        let segments: usize = self.segments.iter().map(|segment| segment.capacity() * size_of::<E>()).sum();
        segments + self.segments.capacity() * size_of::<Vec<E>>() + self.slots.capacity() * size_of::<u32>()
    }

    fn entry(&self, number: u32) -> &E {
        let number = number as usize - 1;
        &self.segments[number / SEGMENT_ENTRIES][number % SEGMENT_ENTRIES]
    }

    fn home(&self, id: &Id) -> usize {
        let [low, high] = [0, 8].map(|at| u64::from_le_bytes(id.0[at..at + 8].try_into().expect("8 bytes")));
        let mixed = (low ^ high.rotate_left(32)).wrapping_mul(self.factor);
        (mixed >> 32) as usize & (self.slots.len() - 1)
    }

    fn grow(&mut self) -> Result<()> {
        let slots = (self.slots.len() * 2).max(64);
        if slots > 1 << 32 {
            return Err(full());
        }
        self.slots = Vec::new();
        self.slots = vec![0; slots];
        for number in 1..=self.entries {
            let number = number as u32;
            let mut slot = self.home(self.entry(number).id());
            while self.slots[slot] != 0 {
                slot = (slot + 1) & (slots - 1);
            }
            self.slots[slot] = number;
        }
        Ok(())
    }
}

fn full() -> Error {
    Error::new(Kind::Exhausted, "the index in memory is full")
}

/// Where one copy of a blob lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    /// The pack.
    pub(crate) pack: Id,
    /// The place in it.
    pub(crate) entry: PackEntry,
}

/// 48 bytes: the id, and where the blob lies.
#[derive(Debug, Clone, Copy)]
struct Slot {
    id: Id,
    /// The number of the pack, doubled; odd for a tree.
    pack_and_kind: u32,
    offset: u32,
    length: u32,
    uncompressed: u32,
}

impl Keyed for Slot {
    fn id(&self) -> &Id {
        &self.id
    }
}

impl Slot {
    fn kind(&self) -> BlobKind {
        if self.pack_and_kind & 1 == 1 { BlobKind::Tree } else { BlobKind::Data }
    }
}

/// Every blob that the loaded index files name.
#[derive(Debug)]
pub(crate) struct Index {
    blobs: Table<Slot>,
    packs: Vec<Id>,
}

impl Default for Index {
    fn default() -> Self {
        Self { blobs: Table::new(), packs: Vec::new() }
    }
}

impl Index {
    /// Adds the content of one index file.
    pub(crate) fn add_file(&mut self, json: &[u8]) -> Result<()> {
        index::parse(json, &mut |pack, entries| self.add_pack(pack, entries))
    }

    /// Adds one pack. A pack that two index files name is added twice; that costs memory only.
    pub(crate) fn add_pack(&mut self, pack: Id, entries: &[PackEntry]) -> Result<()> {
        let number = self.packs.len() as u32;
        if number >= 1 << 31 {
            return Err(full());
        }
        self.packs.push(pack);
        for entry in entries {
            self.blobs.insert(Slot {
                id: entry.id,
                pack_and_kind: number << 1 | u32::from(entry.kind == BlobKind::Tree),
                offset: entry.offset,
                length: entry.length,
                uncompressed: entry.uncompressed,
            })?;
        }
        Ok(())
    }

    /// Every place that a blob lies at; most have one.
    pub(crate) fn locations<'i>(&'i self, kind: BlobKind, id: &'i Id) -> impl Iterator<Item = Location> {
        self.blobs.get(id).filter(move |slot| slot.kind() == kind).map(|slot| self.location(slot))
    }

    /// Like [`Index::locations`], each with its place in the order of [`Index::iter`], by which whoever
    /// marks blobs can keep a bit for each.
    pub(crate) fn numbered<'i>(&'i self, kind: BlobKind, id: &'i Id) -> impl Iterator<Item = (usize, Location)> {
        let of_kind = self.blobs.numbered(id).filter(move |(_, slot)| slot.kind() == kind);
        of_kind.map(|(number, slot)| (number, self.location(slot)))
    }

    /// One place that a blob lies at.
    pub(crate) fn get(&self, kind: BlobKind, id: &Id) -> Option<Location> {
        self.locations(kind, id).next()
    }

    /// Whether the blob is known.
    pub(crate) fn contains(&self, kind: BlobKind, id: &Id) -> bool {
        self.blobs.get(id).any(|slot| slot.kind() == kind)
    }

    /// Every entry, pack by pack in the order of loading; copies of a blob come as often as they
    /// lie somewhere.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Location> {
        self.blobs.iter().map(|slot| self.location(slot))
    }

    /// The packs, in the order of loading. A pack that two index files name comes twice.
    pub(crate) fn packs(&self) -> &[Id] {
        &self.packs
    }

    /// Where the last blob of each pack ends, in bytes.
    pub(crate) fn ends(&self) -> HashMap<Id, u64> {
        let mut ends = vec![0; self.packs.len()];
        for slot in self.blobs.iter() {
            let end: &mut u64 = &mut ends[(slot.pack_and_kind >> 1) as usize];
            *end = (*end).max(u64::from(slot.offset) + u64::from(slot.length));
        }
        let mut by_pack = HashMap::with_capacity(ends.len());
        for (pack, end) in self.packs.iter().zip(ends) {
            let known: &mut u64 = by_pack.entry(*pack).or_default();
            *known = (*known).max(end);
        }
        by_pack
    }

    /// The same without the blobs of some packs.
    pub(crate) fn without(&self, lost: impl Fn(&Id) -> bool) -> Result<Self> {
        let lost: Vec<bool> = self.packs.iter().map(lost).collect();
        let mut blobs = Table::new();
        for slot in self.blobs.iter().filter(|slot| !lost[(slot.pack_and_kind >> 1) as usize]) {
            blobs.insert(*slot)?;
        }
        Ok(Self { blobs, packs: self.packs.clone() })
    }

    /// Entries held.
    pub(crate) fn len(&self) -> usize {
        self.blobs.len()
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub(crate) fn memory_bytes(&self) -> usize {
        self.blobs.memory_bytes() + self.packs.capacity() * size_of::<Id>()
    }

    fn location(&self, slot: &Slot) -> Location {
        Location {
            pack: self.packs[(slot.pack_and_kind >> 1) as usize],
            entry: PackEntry {
                kind: slot.kind(),
                id: slot.id,
                offset: slot.offset,
                length: slot.length,
                uncompressed: slot.uncompressed,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(kind: BlobKind, id: Id, offset: u32) -> PackEntry {
        PackEntry { kind, id, offset, length: 40, uncompressed: offset & 1 }
    }

    #[test]
    fn a_blob_takes_at_most_64_bytes() {
        // The memory held just before and just after the table of slots grows, and in between. While
        // it grows, the old slots are given back before the new ones are taken.
        let mut index = Index::default();
        let mut random = fastrand::Rng::with_seed(1);
        for blobs in [100_000, 163_800, 163_900, 327_600, 327_700, 500_000, 1_000_000] {
            while index.len() < blobs {
                let entries: Vec<_> = (0..100)
                    .map(|number| entry(BlobKind::Data, Id(std::array::from_fn(|_| random.u8(..))), number))
                    .collect();
                index.add_pack(Id(std::array::from_fn(|_| random.u8(..))), &entries).unwrap();
            }
            let each = index.memory_bytes() as f64 / index.len() as f64;
            assert!(each <= 64.0, "{each} bytes for each of {blobs}");
        }
    }

    proptest! {
        #[test]
        fn it_answers_like_a_map(blobs in proptest::collection::vec((0..20_u8, any::<bool>(), any::<u16>()), 0..300)) {
            let mut index = Index::default();
            let mut model: HashMap<(BlobKind, Id), Vec<u32>> = HashMap::new();
            for (number, tree, offset) in blobs {
                let kind = if tree { BlobKind::Tree } else { BlobKind::Data };
                let id = Id([number; 32]);
                index.add_pack(Id([number ^ 0x80; 32]), &[entry(kind, id, u32::from(offset))]).unwrap();
                model.entry((kind, id)).or_default().push(u32::from(offset));
            }
            for number in 0..21 {
                for kind in [BlobKind::Data, BlobKind::Tree] {
                    let id = Id([number; 32]);
                    let found: Vec<_> = index.locations(kind, &id).collect();
                    prop_assert!(found.iter().all(|location| location.pack == Id([number ^ 0x80; 32])));
                    let mut offsets: Vec<_> = found.iter().map(|location| location.entry.offset).collect();
                    let mut expected = model.get(&(kind, id)).cloned().unwrap_or_default();
                    offsets.sort_unstable();
                    expected.sort_unstable();
                    prop_assert_eq!(index.contains(kind, &id), !expected.is_empty());
                    prop_assert_eq!(offsets, expected);
                }
            }
        }
    }
}
