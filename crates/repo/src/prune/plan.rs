//! Decides what becomes of each pack. Pure: facts in, decision out.

use std::collections::{HashMap, HashSet};

use super::mark::Marks;
use crate::Id;
use crate::check::packs::pack_bytes;
use crate::format::pack::BlobKind;
use crate::index::Index;

/// A pack below this size is small, bytes.
const SMALL_PACK_BYTES: u64 = 4 << 20;
/// This many small packs of one kind are worth joining.
const SMALL_PACKS_MIN: usize = 32;

/// What is known of one pack of the index that lies in the depot.
#[derive(Debug, Clone, Copy, Default)]
struct Facts {
    size: u64,
    /// Sealed bytes of blobs that must stay.
    used: u64,
    /// What they take of the pack, their part of the header included.
    taken: u64,
    has_data: bool,
    has_tree: bool,
}

impl Facts {
    /// Bytes that nothing needs. A pack that two index files name is not counted twice.
    fn unused(&self) -> u64 {
        self.size.saturating_sub(self.taken)
    }
}

/// What a prune is to do.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Packs whose blobs that must stay are written anew; the packs are deleted afterwards.
    pub(crate) rewrite: HashSet<Id>,
    /// Packs that hold nothing that must stay.
    pub(crate) drop: HashSet<Id>,
    /// Packs that no index names: the remains of killed runs.
    pub(crate) unnamed: HashSet<Id>,
    /// Packs that the index names and that are not there; no snapshot needs them.
    pub(crate) absent: HashSet<Id>,
    /// Bytes of blobs that must stay.
    pub(crate) used_bytes: u64,
    /// Bytes of packs that go, before what is written anew.
    pub(crate) gone_bytes: u64,
    /// Bytes of blobs that are written anew.
    pub(crate) rewrite_bytes: u64,
    /// Unused bytes that stay, within the limit.
    pub(crate) unused_bytes_left: u64,
}

impl Plan {
    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.rewrite.is_empty() && self.drop.is_empty() && self.unnamed.is_empty() && self.absent.is_empty()
    }

    /// Whether an index file that names this pack must be replaced.
    pub(crate) fn removes(&self, pack: &Id) -> bool {
        self.rewrite.contains(pack) || self.drop.contains(pack) || self.absent.contains(pack)
    }

    /// Makes the plan. `present` holds the packs in the depot with their sizes.
    pub(crate) fn make(index: &Index, marks: &Marks, present: &HashMap<Id, u64>, max_unused_percent: f64) -> Self {
        let mut facts: HashMap<Id, Facts> = HashMap::with_capacity(index.packs().len());
        let mut plan = Self::default();
        for (number, location) in index.iter().enumerate() {
            let Some(size) = present.get(&location.pack) else {
                plan.absent.insert(location.pack);
                continue;
            };
            let pack =
                facts.entry(location.pack).or_insert(Facts { size: *size, taken: pack_bytes([]), ..Facts::default() });
            match location.entry.kind {
                BlobKind::Data => pack.has_data = true,
                BlobKind::Tree => pack.has_tree = true,
            }
            if marks.is_set(number) {
                pack.used += u64::from(location.entry.length);
                pack.taken += pack_bytes([&location.entry]) - pack_bytes([]);
            }
        }
        plan.unnamed = present.keys().filter(|pack| !facts.contains_key(*pack)).copied().collect();
        plan.gone_bytes = plan.unnamed.iter().map(|pack| present[pack]).sum();
        let mut partly: Vec<(Id, Facts)> = Vec::new();
        for (pack, facts) in &facts {
            plan.used_bytes += facts.used;
            if facts.used == 0 {
                plan.drop.insert(*pack);
                plan.gone_bytes += facts.size;
            } else {
                partly.push((*pack, *facts));
            }
        }
        plan.choose(partly, max_unused_percent);
        plan
    }

    /// Chooses the packs to be written anew: those with the largest unused share, until the rest is
    /// within the limit, and small ones when there are many.
    fn choose(&mut self, mut packs: Vec<(Id, Facts)>, max_unused_percent: f64) {
        let mut unused: u64 = packs.iter().map(|(_, facts)| facts.unused()).sum();
        let limit = (self.used_bytes as f64 * max_unused_percent.max(0.0) / 100.0) as u64;
        let share = |facts: &Facts| facts.unused() as f64 / facts.size.max(1) as f64;
        packs.sort_by(|(a_id, a), (b_id, b)| share(b).total_cmp(&share(a)).then_with(|| a_id.cmp(b_id)));
        let small = |facts: &Facts, tree: bool| facts.size < SMALL_PACK_BYTES && facts.has_tree == tree;
        let many =
            [false, true].map(|tree| packs.iter().filter(|(_, facts)| small(facts, tree)).count() >= SMALL_PACKS_MIN);
        for (pack, facts) in &packs {
            let wasteful = facts.unused() > 0 && unused > limit;
            let joined = many[usize::from(facts.has_tree)] && small(facts, facts.has_tree);
            if wasteful || joined {
                unused -= facts.unused();
                self.rewrite.insert(*pack);
                self.gone_bytes += facts.size;
                self.rewrite_bytes += facts.used;
            }
        }
        self.unused_bytes_left = unused;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::pack::PackEntry;

    fn id(number: u32) -> Id {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        Id(bytes)
    }

    /// Packs of ten blobs of 1,000 bytes; `used` says how many of them stay.
    fn plan(used: &[usize], max_unused_percent: f64) -> (Vec<usize>, Vec<usize>, u64) {
        let mut index = Index::default();
        let mut present = HashMap::new();
        let mut stay = Vec::new();
        for (number, used) in used.iter().enumerate() {
            let entries: Vec<_> = (0..10_u32)
                .map(|blob| PackEntry {
                    kind: BlobKind::Data,
                    id: id(number as u32 * 10 + blob),
                    offset: blob * 1000,
                    length: 1000,
                    uncompressed: 0,
                })
                .collect();
            stay.extend((0..10).map(|blob| blob < *used));
            index.add_pack(id(1_000_000 + number as u32), &entries).expect("room");
            present.insert(id(1_000_000 + number as u32), pack_bytes(&entries));
        }
        let mut marks = Marks::new(index.len());
        stay.iter().enumerate().filter(|(_, stays)| **stays).for_each(|(number, _)| marks.set(number));
        let plan = Plan::make(&index, &marks, &present, max_unused_percent);
        let numbers = |set: &HashSet<Id>| {
            let number = |id: &Id| u32::from_le_bytes(id.0[..4].try_into().expect("four")) as usize - 1_000_000;
            let mut numbers: Vec<_> = set.iter().map(number).collect();
            numbers.sort_unstable();
            numbers
        };
        (numbers(&plan.drop), numbers(&plan.rewrite), plan.unused_bytes_left)
    }

    #[test]
    fn unused_packs_go_full_ones_stay_and_others_are_rewritten() {
        assert_eq!(plan(&[10, 0, 5, 10, 9], 0.0), (vec![1], vec![2, 4], 0));
    }

    #[test]
    fn what_is_within_the_limit_stays_and_the_worst_are_rewritten_first() {
        assert_eq!(plan(&[10, 9, 2, 10], 5.0), (vec![], vec![2], 1037));
        assert_eq!(plan(&[10, 9, 2, 10], 50.0), (vec![], vec![], 1037 * 9));
    }

    #[test]
    fn many_small_packs_are_joined() {
        assert_eq!(plan(&[10; SMALL_PACKS_MIN - 1], 0.0).1.len(), 0);
        assert_eq!(plan(&[10; SMALL_PACKS_MIN], 0.0).1.len(), SMALL_PACKS_MIN);
    }
}
