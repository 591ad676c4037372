//! Reads blobs in the order of the packs, on all cores, each verified before anyone sees it.
//!
//! Apart from the restore because copy and prune read in the same way. Neighbours in a pack are
//! read in one range, so that a pack comes once and in large pieces; when the depot is far away,
//! more ranges are under way than there are cores.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Kind, Result};

use super::decode::Decoder;
use crate::format::pack::PackEntry;
use crate::index::{Index, Location};
use crate::unpacked::FileKind;
use crate::{Id, Repository};

/// Bytes of a pack read at once.
const RUN_BYTES_MAX: u64 = 2 << 20;
/// Unneeded bytes read along rather than asking twice.
const GAP_BYTES_MAX: u64 = 128 << 10;
/// A depot that takes longer for its first byte counts as far away, even if it is none that waits.
const NEAR: Duration = Duration::from_millis(2);
/// Ranges under way when threads mostly wait for the depot. Each needs up to 12 MB.
const FAR_WORKERS: usize = 6;

/// Something that needs one blob.
pub(crate) trait Wanted: Sync {
    /// The pack, as the caller counts.
    fn pack(&self) -> u32;
    /// The blob within the pack.
    fn entry(&self) -> &PackEntry;
}

/// A blob that was verified.
pub(crate) struct Blob<'b> {
    /// Where it was found: of several copies maybe another one than was asked for.
    pub(crate) entry: &'b PackEntry,
    /// As it lies in the pack.
    pub(crate) sealed: &'b [u8],
    /// As its id says.
    pub(crate) plain: &'b [u8],
}

/// What a verified blob is handed to, with everything that needs it.
pub(crate) type Visit<'v, W> = dyn Fn(&[W], &Blob<'_>) -> Result<()> + Sync + 'v;

/// Reads the blob of every item and hands it to `visit`, from several threads. `wanted` is sorted
/// by pack and offset; `packs` names the packs by number. `name_of` tells people who suffers from a damaged blob.
///
/// # Errors
/// `Corrupt` if a blob is not what its id says, also when read again; else the first error.
pub(crate) fn fetch<W: Wanted>(
    repository: &Repository,
    index: &Index,
    packs: &[Id],
    wanted: &[W],
    context: &Context,
    name_of: &(dyn Fn(&W) -> String + Sync),
    visit: &Visit<'_, W>,
) -> Result<()> {
    let Some(first) = wanted.first() else { return Ok(()) };
    let workers = workers(repository, &FileKind::Pack.name(&packs[first.pack() as usize]))?;
    let shared = Shared { cursor: Mutex::new(0), stop: AtomicBool::new(false), failure: Mutex::new(None) };
    let one = || {
        let mut decoder = Decoder::new();
        while !shared.stop.load(Ordering::Relaxed)
            && let Some(run) = shared.next(wanted)
        {
            let result = context.check().and_then(|()| {
                let pack = FileKind::Pack.name(&packs[wanted[run.start].pack() as usize]);
                carry_out(repository, index, &mut decoder, &pack, &wanted[run], name_of, visit)
            });
            if let Err(error) = result {
                shared.stop.store(true, Ordering::Relaxed);
                lock(&shared.failure).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(one);
        }
        one();
    });
    shared.failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

struct Shared {
    cursor: Mutex<usize>,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

impl Shared {
    /// The next run, of its own function so that the cursor is free while the run is carried out.
    fn next<W: Wanted>(&self, wanted: &[W]) -> Option<Range<usize>> {
        next_run(&mut lock(&self.cursor), wanted)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As many threads as there are cores; more when the depot is a service or far away, where threads
/// mostly wait.
pub(crate) fn workers(repository: &Repository, name: &str) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if repository.depot().waits() {
        return Ok(cores.max(FAR_WORKERS));
    }
    let begin = Instant::now();
    match repository.depot().read_range(name, 0, 1) {
        Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::Corrupt) => return Err(error),
        _ => {}
    }
    Ok(if begin.elapsed() < NEAR { cores } else { cores.max(FAR_WORKERS) })
}

/// Takes the next items whose blobs are read at once: of one pack, near each other.
fn next_run<W: Wanted>(cursor: &mut usize, wanted: &[W]) -> Option<Range<usize>> {
    let first = wanted.get(*cursor)?;
    let begin = u64::from(first.entry().offset);
    let mut end = begin;
    let from = *cursor;
    for item in &wanted[from..] {
        let entry = item.entry();
        let item_end = u64::from(entry.offset) + u64::from(entry.length);
        let fits = item.pack() == first.pack()
            && u64::from(entry.offset) <= end.saturating_add(GAP_BYTES_MAX)
            && (item_end - begin <= RUN_BYTES_MAX || item_end <= end || *cursor == from);
        if !fits {
            break;
        }
        end = end.max(item_end);
        *cursor += 1;
    }
    Some(from..*cursor)
}

/// Reads, decodes and hands out one run.
fn carry_out<W: Wanted>(
    repository: &Repository,
    index: &Index,
    decoder: &mut Decoder,
    pack: &str,
    run: &[W],
    name_of: &(dyn Fn(&W) -> String + Sync),
    visit: &Visit<'_, W>,
) -> Result<()> {
    let base = u64::from(run[0].entry().offset);
    let end = run.iter().map(|item| u64::from(item.entry().offset) + u64::from(item.entry().length)).max();
    let length = end.unwrap_or(base) - base;
    let data = match repository.depot().read_range(pack, base, length) {
        // Each blob is looked for elsewhere below.
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Corrupt) => Bytes::new(),
        other => other?,
    };
    // The same blob may be wanted in many places; it is decoded once.
    let mut entries: Vec<PackEntry> = Vec::new();
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (number, item) in run.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if entries.last() == Some(item.entry()) => group.end = number + 1,
            _ => {
                entries.push(*item.entry());
                groups.push(number..number + 1);
            }
        }
    }
    let mut from = 0;
    while from < entries.len() {
        let to = from + Decoder::batch(&entries[from..]);
        let decoded = decoder.decode(repository.cipher(), &data, base, &entries[from..to], None);
        let mut failed = Vec::new();
        for number in from..to {
            if decoded.failures.iter().any(|(bad, _)| *bad == number - from) {
                failed.push(number);
            } else {
                let entry = &entries[number];
                let plain = decoded.plain(number - from);
                let blob = Blob { entry, sealed: sealed(&data, base, entry), plain };
                visit(&run[groups[number].clone()], &blob)?;
            }
        }
        for number in failed {
            let group = groups[number].clone();
            look_elsewhere(repository, index, decoder, &entries[number], &|blob| visit(&run[group.clone()], blob))
                .map_err(|error| match error.kind() {
                    Kind::Corrupt => error.context("needed by", name_of(&run[group.start])),
                    _ => error,
                })?;
        }
        from = to;
    }
    Ok(())
}

/// The sealed bytes of a blob that decoded well, so that they are known to be there.
fn sealed<'d>(data: &'d [u8], base: u64, entry: &PackEntry) -> &'d [u8] {
    let from = (u64::from(entry.offset) - base) as usize;
    &data[from..from + entry.length as usize]
}

/// Reads one blob once more, as what came over a wire may have been torn on the way, and wherever
/// else a copy of it lies.
fn look_elsewhere(
    repository: &Repository,
    index: &Index,
    decoder: &mut Decoder,
    wanted: &PackEntry,
    visit: &dyn Fn(&Blob<'_>) -> Result<()>,
) -> Result<()> {
    let mut failure = Error::new(Kind::Corrupt, "a blob is in no pack").context("blob", wanted.id);
    for Location { pack, entry } in index.locations(wanted.kind, &wanted.id) {
        let name = FileKind::Pack.name(&pack);
        let base = u64::from(entry.offset);
        let data = match repository.depot().read_range(&name, base, entry.length.into()) {
            Err(error) if error.kind() == Kind::NotFound => {
                failure = Error::new(Kind::Corrupt, format!("the pack {name} is missing")).source(error);
                continue;
            }
            other => other?,
        };
        let mut decoded = decoder.decode(repository.cipher(), &data, base, &[entry], None);
        match decoded.failures.pop() {
            Some((_, error)) => failure = error.context("pack", name),
            None => {
                let sealed = sealed(&data, base, &entry);
                return visit(&Blob { entry: &entry, sealed, plain: decoded.plain(0) });
            }
        }
    }
    Err(failure.hint("`stillpoint check --data` lists everything that is damaged or missing"))
}
