//! What the threads of a backup share, and how much memory each part of it may take.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use stillpoint_core::error::Result;

use super::failure::Failure;
use super::known::Known;
use super::outlet::Outlet;
use super::schedule::Schedule;
use super::slot::LOOK_EVERY;
use super::{BackupOptions, Compression};
use crate::Repository;
use crate::chunk::Chunker;
use crate::compress::{Choice, Compressor};
use crate::crypto::Nonces;
use crate::format::id::Id;
use crate::format::pack::BlobKind;
use crate::pack::{Pack, Sealer};
use crate::simd::sha256;
use crate::tree::blobs::Loader;

/// A pack is written when it is this full. Larger ones cost memory and gain nothing.
const PACK_BYTES_MAX: u64 = 16 << 20;
const PACK_BYTES_MIN: u64 = 2 << 20;
/// What a worker takes beside its pack: a batch, contexts, the overhang of the last blob.
const WORKER_BYTES: u64 = 9 << 20;
/// Threads that write to a depot that waits.
const UPLOADERS: u64 = 4;
/// Threads that step in for stuck ones, if memory allows.
const SPARES: u64 = 8;

/// How many threads and how large packs a memory budget allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) workers: usize,
    pub(super) spares: usize,
    pub(super) uploaders: usize,
    pub(super) packs: usize,
    pub(super) pack_bytes: usize,
}

impl Plan {
    pub(super) fn new(memory_bytes_max: u64, cores: usize, depot_waits: bool) -> Self {
        let memory = memory_bytes_max.max(32 << 20);
        let workers = (cores as u64).clamp(1, (memory / (WORKER_BYTES + PACK_BYTES_MIN * 2)).max(1));
        let uploaders = if depot_waits { UPLOADERS.min(workers + 1) } else { 0 };
        // One for each worker, one for trees, and those on their way.
        let packs = workers + 1 + uploaders;
        let left = memory.saturating_sub(workers * WORKER_BYTES);
        let pack_bytes = (left / packs).clamp(PACK_BYTES_MIN, PACK_BYTES_MAX);
        let spares = (left.saturating_sub(packs * pack_bytes) / WORKER_BYTES).clamp(1, SPARES);
        let [workers, spares, uploaders, packs] = [workers, spares, uploaders, packs].map(|number| number as usize);
        Self { workers, spares, uploaders, packs, pack_bytes: pack_bytes as usize }
    }
}

/// What one computing thread needs; there are as many as workers, so that spare threads add no
/// load beyond the cores.
pub(super) struct Seat {
    pub(super) pack: Pack,
    pub(super) sealer: Sealer,
    /// `None` when data is stored as it is.
    pub(super) compressor: Option<Compressor>,
    pub(super) ids: Vec<Id>,
}

/// Everything that is shared.
pub(super) struct Pipeline {
    pub(super) repository: Repository,
    pub(super) failure: Arc<Failure>,
    pub(super) schedule: Schedule,
    pub(super) known: Known,
    /// Reads the directories of parent snapshots.
    pub(super) loader: Arc<Loader>,
    pub(super) chunker: Chunker,
    pub(super) outlet: Arc<Outlet>,
    pub(super) plan: Plan,
    seats: Mutex<Vec<Seat>>,
    seat_free: Condvar,
    trees: Mutex<Trees>,
}

/// Where trees are packed; data and trees never share a pack.
struct Trees {
    pack: Pack,
    sealer: Sealer,
    compressor: Compressor,
}

impl Pipeline {
    pub(super) fn new(
        repository: &Repository,
        options: &BackupOptions,
        failure: Arc<Failure>,
        outlet: Arc<Outlet>,
        plan: Plan,
    ) -> Result<Self> {
        let sealer = || Sealer { cipher: repository.cipher().clone(), nonces: Nonces::new() };
        let mut seats = Vec::new();
        for _ in 0..plan.workers {
            let compressor = match options.compression {
                Compression::Auto => Some(Compressor::new()?),
                Compression::None => None,
            };
            seats.push(Seat { pack: outlet.empty_pack()?, sealer: sealer(), compressor, ids: Vec::new() });
        }
        let trees = Trees { pack: outlet.empty_pack()?, sealer: sealer(), compressor: Compressor::new()? };
        let known = Known::load(repository)?;
        Ok(Self {
            repository: repository.clone(),
            failure,
            schedule: Schedule::new(plan.workers, plan.spares),
            loader: Loader::with_index(repository, known.stored().clone()),
            known,
            chunker: Chunker::new(repository.chunker_polynomial()),
            outlet,
            plan,
            seats: Mutex::new(seats),
            seat_free: Condvar::new(),
            trees: Mutex::new(trees),
        })
    }

    /// A seat to compute on; waits until one is free.
    pub(super) fn take_seat(&self) -> Result<Seat> {
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(seat) = seats.pop() {
                return Ok(seat);
            }
            self.failure.check()?;
            seats = self.seat_free.wait_timeout(seats, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn give_seat(&self, seat: Seat) {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner).push(seat);
        self.seat_free.notify_one();
    }

    /// Stores a tree blob if it is new, and returns its id.
    pub(super) fn store_tree(&self, json: &[u8]) -> Result<Id> {
        let id = sha256::hash(json);
        if self.known.claim(BlobKind::Tree, &id)? {
            let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
            let Trees { pack, sealer, compressor } = &mut *trees;
            pack.add(BlobKind::Tree, id, json, Some((compressor, &Choice::default())), sealer)?;
            if pack.len() >= self.plan.pack_bytes {
                self.outlet.write(pack, sealer)?;
            }
        }
        Ok(id)
    }

    /// Writes what is left in the packs; the threads that filled them have ended.
    ///
    /// The remains of the workers' packs are joined, so that a small backup leaves one.
    pub(super) fn write_rest(&self) -> Result<()> {
        let mut seats = std::mem::take(&mut *self.seats.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(mut joined) = seats.pop() {
            for mut seat in seats {
                if joined.pack.len() + seat.pack.len() <= self.plan.pack_bytes {
                    joined.pack.absorb(&seat.pack);
                    self.outlet.recycle(seat.pack);
                } else {
                    self.outlet.write(&mut seat.pack, &mut seat.sealer)?;
                    self.outlet.recycle(seat.pack);
                }
            }
            self.outlet.write(&mut joined.pack, &mut joined.sealer)?;
            self.outlet.recycle(joined.pack);
        }
        let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        let Trees { pack, sealer, .. } = &mut *trees;
        self.outlet.write(pack, sealer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_stays_within_its_memory() {
        for memory in [0, 32 << 20, 64 << 20, 100 << 20, 256 << 20, 1 << 30, 64 << 30] {
            for cores in [1, 2, 8, 64, 500] {
                for waits in [false, true] {
                    let plan = Plan::new(memory, cores, waits);
                    let used = plan.workers as u64 * WORKER_BYTES + (plan.packs * plan.pack_bytes) as u64;
                    assert!(used <= memory.max(32 << 20), "{plan:?} takes {used} of {memory}");
                    assert!(plan.workers >= 1 && plan.packs > plan.workers + plan.uploaders);
                }
            }
        }
        let usual = Plan::new(256 << 20, 2, false);
        assert_eq!((usual.workers, usual.pack_bytes), (2, 16 << 20));
    }
}
