//! Where full packs go: into the depot, and after that into an index file.
//!
//! A depot that waits for a network gets threads of its own, so that computing goes on beside the
//! writes; the number of packs in memory stays bounded. Nothing names a pack before it is written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use stillpoint_core::error::{Error, Result};

use super::failure::{Failure, PanicGuard};
use super::slot::LOOK_EVERY;
use crate::Repository;
use crate::depot::WriteMode;
use crate::format::id::Id;
use crate::format::index::{write_end, write_pack};
use crate::format::pack::PackEntry;
use crate::pack::{Pack, Sealer};
use crate::unpacked::FileKind;

/// Blobs of one index file, as restic has it. What a killed backup wrote before its last index file
/// is deduplicated against by the next.
const INDEX_BLOBS_MAX: usize = 50_000;
/// An index file is written at least this often while packs are.
const INDEX_EVERY: Duration = Duration::from_secs(10 * 60);

/// Writes packs and index files.
pub(super) struct Outlet {
    repository: Repository,
    failure: Arc<Failure>,
    index: Mutex<Pending>,
    bytes_stored: AtomicU64,
    blobs_new: AtomicU64,
    /// Empty packs, kept for their memory.
    spare: Mutex<Vec<Pack>>,
    returned: Condvar,
    uploads: Mutex<Option<Sender<(Id, Pack)>>>,
}

/// Packs that are written and named by no index file yet.
struct Pending {
    packs: Vec<(Id, Vec<PackEntry>)>,
    blobs: usize,
    since: Instant,
}

impl Outlet {
    /// Writes on the caller's thread with `uploaders` 0, else on as many threads, with `packs_max`
    /// packs in memory.
    pub(super) fn new(
        repository: &Repository,
        failure: Arc<Failure>,
        uploaders: usize,
        packs_max: usize,
    ) -> Result<(Arc<Self>, Vec<JoinHandle<()>>)> {
        let (sender, receiver) = channel();
        let outlet = Arc::new(Self {
            repository: repository.clone(),
            failure,
            index: Mutex::new(Pending { packs: Vec::new(), blobs: 0, since: Instant::now() }),
            bytes_stored: AtomicU64::new(0),
            blobs_new: AtomicU64::new(0),
            spare: Mutex::new((0..packs_max).map(|_| Pack::new()).collect()),
            returned: Condvar::new(),
            uploads: Mutex::new((uploaders > 0).then_some(sender)),
        });
        let receiver = Arc::new(Mutex::new(receiver));
        let start = |number| {
            let (outlet, receiver) = (outlet.clone(), receiver.clone());
            let thread = std::thread::Builder::new().name(format!("upload-{number}"));
            thread.spawn(move || outlet.upload(&receiver)).map_err(|error| Error::io("cannot start a thread", error))
        };
        let threads = (0..uploaders).map(start).collect::<Result<Vec<_>>>()?;
        Ok((outlet, threads))
    }

    /// An empty pack; waits while all are filled and not written yet.
    pub(super) fn empty_pack(&self) -> Result<Pack> {
        let mut spare = lock(&self.spare);
        loop {
            if let Some(pack) = spare.pop() {
                return Ok(pack);
            }
            self.failure.check()?;
            spare = self.returned.wait_timeout(spare, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives back a pack whose content is written or not wanted.
    pub(super) fn recycle(&self, mut pack: Pack) {
        pack.clear();
        lock(&self.spare).push(pack);
        self.returned.notify_one();
    }

    /// Seals a pack and has it written; `pack` is an empty one afterwards.
    pub(super) fn write(&self, pack: &mut Pack, sealer: &mut Sealer) -> Result<()> {
        if pack.is_empty() {
            return Ok(());
        }
        let id = pack.seal(sealer)?;
        let uploads = lock(&self.uploads).clone();
        match uploads {
            None => {
                self.write_now(id, pack)?;
                pack.clear();
            }
            Some(uploads) => {
                // Sent before another is waited for, since it may be this very one that comes back.
                let full = std::mem::replace(pack, Pack::new());
                uploads.send((id, full)).map_err(|_| Error::internal("nobody writes packs any more"))?;
                *pack = self.empty_pack()?;
            }
        }
        Ok(())
    }

    fn upload(&self, receiver: &Mutex<Receiver<(Id, Pack)>>) {
        let _guard = PanicGuard(&self.failure);
        loop {
            let received = lock(receiver).recv();
            let Ok((id, pack)) = received else { return };
            if self.failure.check().is_ok()
                && let Err(error) = self.write_now(id, &pack)
            {
                self.failure.set(error);
            }
            self.recycle(pack);
        }
    }

    fn write_now(&self, id: Id, pack: &Pack) -> Result<()> {
        self.repository.depot().write(&FileKind::Pack.name(&id), &[pack.bytes()], &WriteMode::Replace)?;
        self.bytes_stored.fetch_add(pack.bytes().len() as u64, Ordering::Relaxed);
        self.blobs_new.fetch_add(pack.entries().len() as u64, Ordering::Relaxed);
        let mut index = lock(&self.index);
        index.blobs += pack.entries().len();
        index.packs.push((id, pack.entries().to_vec()));
        if index.blobs >= INDEX_BLOBS_MAX || index.since.elapsed() >= INDEX_EVERY {
            let packs = std::mem::take(&mut index.packs);
            (index.blobs, index.since) = (0, Instant::now());
            drop(index);
            self.write_index(&packs)?;
        }
        Ok(())
    }

    fn write_index(&self, packs: &[(Id, Vec<PackEntry>)]) -> Result<()> {
        if packs.is_empty() {
            return Ok(());
        }
        let mut json = Vec::new();
        for (number, (pack, entries)) in packs.iter().enumerate() {
            write_pack(pack, entries, number == 0, &mut json);
        }
        write_end(&mut json);
        self.repository.save(FileKind::Index, &json)?;
        Ok(())
    }

    /// Lets the uploading threads end once the queue is empty.
    pub(super) fn close(&self) {
        lock(&self.uploads).take();
    }

    /// Writes the last index file. All packs must be written: the threads have ended.
    pub(super) fn finish_index(&self) -> Result<()> {
        self.failure.check()?;
        let packs = std::mem::take(&mut lock(&self.index).packs);
        self.write_index(&packs)
    }

    /// Bytes of the packs written so far.
    pub(super) fn bytes_stored(&self) -> u64 {
        self.bytes_stored.load(Ordering::Relaxed)
    }

    /// Blobs of the packs written so far.
    pub(super) fn blobs_new(&self) -> u64 {
        self.blobs_new.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
