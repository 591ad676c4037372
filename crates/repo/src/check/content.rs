//! Re-reads packs from the depot: the whole pack's hash, its header, every blob.
//!
//! Never comes near a cache: what is read here is what the depot holds now. A pack is read once, in
//! windows that begin and end with blobs; while the blobs of a window are hashed, the hash of the
//! pack as a whole is carried on beside them.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Kind, Result};

use super::packs::{each_pack, pack_bytes};
use super::{Bad, Check, Data, is_finding};
use crate::format::pack::{LENGTH_FIELD_BYTES, PackEntry, SEAL_BYTES, parse_header};
use crate::index::Index;
use crate::simd::sha256::Running;
use crate::tree::decode::{Beside, Decoder};
use crate::tree::fetch::workers;
use crate::unpacked::FileKind;
use crate::{Id, Repository};

/// Bytes of a pack read at once.
const WINDOW_BYTES: u64 = 2 << 20;
/// Packs waiting for a worker.
const JOBS_AHEAD: usize = 4;

impl Check<'_> {
    /// Re-reads the packs that are asked for; `wanted` limits them.
    pub(super) fn content(
        &mut self,
        index: &Index,
        data: Data,
        wanted: Option<&HashSet<Id>>,
        bad: &mut Bad,
    ) -> Result<()> {
        let Some(chosen) = self.choose(index, data, wanted, bad) else { return Ok(()) };
        let bytes_read = AtomicU64::new(0);
        let found = Mutex::new((Vec::new(), None));
        let (sender, receiver) = sync_channel::<Job>(JOBS_AHEAD);
        let receiver = Mutex::new(receiver);
        let threads =
            chosen.iter().next().map_or(Ok(1), |pack| workers(self.repository, &FileKind::Pack.name(pack)))?;
        let worker = Worker {
            repository: self.repository,
            context: self.context,
            jobs: &receiver,
            found: &found,
            bytes_read: &bytes_read,
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| worker.run());
            }
            let mut seen = HashSet::new();
            let sender = sender;
            each_pack(index, |pack, entries| {
                entries.dedup();
                if chosen.contains(&pack) && seen.insert(pack) {
                    let job = Job { pack, entries: std::mem::take(entries) };
                    sender.send(job).map_err(|_| Error::internal("the threads that check are gone"))?;
                }
                Ok(())
            })
        })?;
        let (findings, failure) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = failure {
            return Err(error);
        }
        for finding in findings {
            self.error(finding.text);
            if finding.whole {
                bad.packs.insert(finding.pack);
            }
            bad.blobs.extend(finding.blobs.into_iter().map(|offset| (finding.pack, offset)));
        }
        self.report.packs_read = chosen.len() as u64;
        self.report.bytes_read = bytes_read.into_inner();
        Ok(())
    }

    /// The packs to be read; those that are known to be missing are left out.
    fn choose(&self, index: &Index, data: Data, wanted: Option<&HashSet<Id>>, bad: &Bad) -> Option<HashSet<Id>> {
        let depot = self.repository.depot();
        let is_there =
            |pack: &Id| !bad.packs.contains(pack) || matches!(depot.stat(&FileKind::Pack.name(pack)), Ok(Some(_)));
        let packs = index.packs().iter().filter(|pack| wanted.is_none_or(|wanted| wanted.contains(*pack)));
        match data {
            Data::None => None,
            Data::All => Some(packs.filter(|pack| is_there(pack)).copied().collect()),
            Data::Sample { percent, seed } => {
                let mut ranked: Vec<(u64, Id)> =
                    packs.filter(|pack| is_there(pack)).map(|pack| (rank(pack, seed), *pack)).collect();
                ranked.sort_unstable();
                ranked.dedup();
                let share = (ranked.len() as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil();
                ranked.truncate(share as usize);
                Some(ranked.into_iter().map(|(_, pack)| pack).collect())
            }
        }
    }
}

/// Where a pack stands in the order that `seed` chooses.
fn rank(pack: &Id, seed: u64) -> u64 {
    let start = u64::from_le_bytes(pack.0[..8].try_into().expect("an id has 32 bytes"));
    let mut mixed = start ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

struct Job {
    pack: Id,
    entries: Vec<PackEntry>,
}

/// What is wrong with one pack.
struct Finding {
    text: String,
    pack: Id,
    /// Nothing of the pack can be relied on.
    whole: bool,
    /// Offsets of damaged blobs.
    blobs: Vec<u32>,
}

struct Worker<'a> {
    repository: &'a Repository,
    context: &'a Context,
    jobs: &'a Mutex<Receiver<Job>>,
    found: &'a Mutex<(Vec<Finding>, Option<Error>)>,
    bytes_read: &'a AtomicU64,
}

impl Worker<'_> {
    fn run(&self) {
        let mut decoder = Decoder::new();
        loop {
            let job = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(job) = job else { return };
            if self.lock().1.is_some() {
                continue; // Takes what is left, so that the sender does not wait for ever.
            }
            let result = self.context.check().and_then(|()| self.pack(&mut decoder, &job));
            match result {
                Ok(findings) => self.lock().0.extend(findings),
                Err(error) if is_finding(error.kind()) => {
                    let name = FileKind::Pack.name(&job.pack);
                    let text = format!("pack {name}: {error}");
                    self.lock().0.push(Finding { text, pack: job.pack, whole: true, blobs: Vec::new() });
                }
                Err(error) => {
                    self.lock().1.get_or_insert(error);
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<Finding>, Option<Error>)> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one pack from begin to end.
    fn pack(&self, decoder: &mut Decoder, job: &Job) -> Result<Vec<Finding>> {
        let name = FileKind::Pack.name(&job.pack);
        let mut running = Running::new();
        let mut bad_blobs = Vec::new();
        let mut first_reason = None;
        let mut from = 0;
        let mut at = 0_u64;
        while from < job.entries.len() {
            let (to, end) = window(&job.entries, from, at);
            let data = self.repository.depot().read_range(&name, at, end - at)?;
            self.bytes_read.fetch_add(data.len() as u64, Ordering::Relaxed);
            let mut blobs = &job.entries[from..to];
            let mut beside = Beside::new(&mut running, &data, at);
            while !blobs.is_empty() {
                let (batch, behind) = blobs.split_at(Decoder::batch(blobs));
                let decoded = decoder.decode(self.repository.cipher(), &data, at, batch, Some(&mut beside));
                for (number, error) in decoded.failures {
                    bad_blobs.push(batch[number].offset);
                    first_reason.get_or_insert(error);
                }
                blobs = behind;
            }
            beside.end();
            (from, at) = (to, end);
        }
        // A little more than there should be, so that a longer pack is noticed.
        let expected = pack_bytes(&job.entries).saturating_sub(at) + 64;
        let rest = self.repository.depot().read_range(&name, at, expected)?;
        self.bytes_read.fetch_add(rest.len() as u64, Ordering::Relaxed);
        running.update(&rest);
        self.context.advance(at + rest.len() as u64, 1);
        let mut findings = Vec::new();
        let mut find = |text: String, whole, blobs| findings.push(Finding { text, pack: job.pack, whole, blobs });
        if let Some(reason) = first_reason {
            find(format!("pack {name}: {} blobs are damaged, the first: {reason}", bad_blobs.len()), false, bad_blobs);
        } else if running.finish() != job.pack {
            find(format!("pack {name} is damaged: its hash differs from its name"), false, Vec::new());
        }
        if let Err(error) = self.header(&rest, at, &job.entries) {
            find(format!("pack {name}: {error}"), false, Vec::new());
        }
        Ok(findings)
    }

    /// Compares the header with the index. `rest` is all of the pack behind its last blob, at `at`.
    fn header(&self, rest: &[u8], at: u64, entries: &[PackEntry]) -> Result<()> {
        let short = || Error::new(Kind::Corrupt, "it ends within its header");
        let (header, field) = rest.split_last_chunk::<LENGTH_FIELD_BYTES>().ok_or_else(short)?;
        let length = u32::from_le_bytes(*field) as usize;
        if length != header.len() || length < SEAL_BYTES as usize {
            return Err(Error::new(Kind::Corrupt, "its header is not where the index says")
                .context("bytes behind the last blob", header.len())
                .context("bytes of header", length));
        }
        let mut plain = Vec::new();
        self.repository.cipher().open_into(header, &mut plain)?;
        let mut listed = parse_header(&plain, at)?;
        listed.sort_unstable_by_key(|entry| entry.offset);
        if listed != entries {
            return Err(Error::new(Kind::Corrupt, "its header and the index disagree")
                .context("blobs in the header", listed.len())
                .context("blobs in the index", entries.len()));
        }
        Ok(())
    }
}

/// The blobs read together with blob `from`, up to which, and where the window ends. It begins at
/// `at`, so that nothing between two blobs is left out.
fn window(entries: &[PackEntry], from: usize, at: u64) -> (usize, u64) {
    let end_of = |entry: &PackEntry| u64::from(entry.offset) + u64::from(entry.length);
    let mut end = end_of(&entries[from]).max(at);
    let mut to = from + 1;
    while to < entries.len() && end_of(&entries[to]) - at <= WINDOW_BYTES {
        end = end.max(end_of(&entries[to]));
        to += 1;
    }
    (to, end)
}
