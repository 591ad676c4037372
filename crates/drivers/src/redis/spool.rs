//! A queue of bytes between the thread that receives them and the repository that pulls them.
//!
//! The receiver must never wait for the repository: while it does, the server piles up its stream in
//! its own memory and drops us in the end. So the queue takes whatever comes: some of it in memory, the
//! rest in a file. As long as the repository keeps up, nothing touches the disk.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use stillpoint_core::error::{Error, IoContext, Kind, Result};

/// What the queues of one kind hold in memory before they go to disk, and what each may at least.
const MEMORY_BYTES_MAX: usize = 16 << 20;
const MEMORY_BYTES_MIN: usize = 1 << 20;
/// How much is read from disk at once.
const PIECE_BYTES: usize = 1 << 20;

/// Where a queue puts what memory does not hold.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// The folder for the file; made when it is needed.
    pub folder: PathBuf,
    /// How much may lie there, in bytes.
    pub bytes_max: u64,
    /// How much stays in memory before anything goes to disk, in bytes.
    pub memory_bytes_max: usize,
}

impl Disk {
    /// Room for one of `count` servers: together they take no more memory than one would.
    pub fn new(folder: PathBuf, bytes_max: u64, count: usize) -> Self {
        let memory_bytes_max = (MEMORY_BYTES_MAX / count.max(1)).max(MEMORY_BYTES_MIN);
        Self { folder, bytes_max, memory_bytes_max }
    }
}

/// The queue; clones share it.
#[derive(Clone)]
pub(super) struct Queue {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    disk: Disk,
}

/// What is in memory is older than what is in the file.
#[derive(Default)]
struct State {
    memory: VecDeque<Vec<u8>>,
    memory_bytes: usize,
    file: Option<File>,
    file_from: u64,
    file_to: u64,
    ended: bool,
    failed: Option<(Kind, String)>,
}

impl Queue {
    /// An empty queue.
    pub fn new(disk: Disk) -> Self {
        Self { shared: Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), disk }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What the lock guards is whole between statements.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds bytes. Waits for nobody. Fails with `Exhausted` when the disk is full, or its limit is reached.
    pub fn push(&self, data: &[u8]) -> Result<()> {
        let mut state = self.state();
        if state.file_to == state.file_from && state.memory_bytes + data.len() <= self.shared.disk.memory_bytes_max {
            state.memory.push_back(data.to_vec());
            state.memory_bytes += data.len();
        } else {
            self.write(&mut state, data)?;
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn write(&self, state: &mut State, data: &[u8]) -> Result<()> {
        let disk = &self.shared.disk;
        if state.file_to - state.file_from + data.len() as u64 > disk.bytes_max {
            return Err(Error::new(
                Kind::Exhausted,
                format!("more than {} MiB of the server's data wait to be stored", disk.bytes_max >> 20),
            )
            .hint("raise `spoolMibMax`, or see why the bucket is slow"));
        }
        let message = || format!("cannot write to {}", disk.folder.display());
        let file = match &mut state.file {
            Some(file) => file,
            none => {
                std::fs::create_dir_all(&disk.folder).or_io(message)?;
                none.insert(tempfile::tempfile_in(&disk.folder).or_io(message)?)
            }
        };
        file.write_all_at(data, state.file_to).or_io(message)?;
        state.file_to += data.len() as u64;
        Ok(())
    }

    /// Says that nothing more comes.
    pub fn end(&self) {
        self.state().ended = true;
        self.shared.changed.notify_all();
    }

    /// Says that the rest will never come, and why. The first reason stays.
    pub fn fail(&self, error: &Error) {
        let mut state = self.state();
        if !state.ended {
            state.failed.get_or_insert_with(|| (error.kind(), error.message().to_owned()));
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// A reader of everything from here on. Waits for what is not there yet.
    pub fn reader(&self) -> QueueReader {
        QueueReader { queue: self.clone(), piece: Vec::new(), at: 0 }
    }

    /// The next piece; `None` at the end.
    fn take(&self) -> Result<Option<Vec<u8>>> {
        let mut state = self.state();
        loop {
            if let Some(piece) = state.memory.pop_front() {
                state.memory_bytes -= piece.len();
                return Ok(Some(piece));
            }
            if state.file_from < state.file_to {
                return self.read(&mut state).map(Some);
            }
            if let Some((kind, message)) = &state.failed {
                return Err(Error::new(*kind, message.clone()));
            }
            if state.ended {
                return Ok(None);
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read(&self, state: &mut State) -> Result<Vec<u8>> {
        let message = || format!("cannot read from {}", self.shared.disk.folder.display());
        let count = usize::try_from(state.file_to - state.file_from).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let mut piece = vec![0; count];
        let file = state.file.as_ref().ok_or_else(|| Error::internal("a queue lost its file"))?;
        file.read_exact_at(&mut piece, state.file_from).or_io(message)?;
        state.file_from += count as u64;
        if state.file_from == state.file_to {
            // Read to the end: what comes next has room in memory again.
            file.set_len(0).or_io(message)?;
            (state.file_from, state.file_to) = (0, 0);
        }
        Ok(piece)
    }
}

/// Reads a queue.
pub(super) struct QueueReader {
    queue: Queue,
    piece: Vec<u8>,
    at: usize,
}

impl Read for QueueReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.piece.len() {
            match self.queue.take().map_err(std::io::Error::other)? {
                Some(piece) => (self.piece, self.at) = (piece, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(folder: &tempfile::TempDir, bytes_max: u64) -> Disk {
        Disk::new(folder.path().join("spool"), bytes_max, 1)
    }

    #[test]
    fn what_goes_in_comes_out_in_order_whoever_is_faster() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::new(disk(&folder, 1 << 40));
        let mut random = fastrand::Rng::with_seed(3);
        let mut expected = Vec::new();
        let mut reader = queue.reader();
        let mut seen = Vec::new();
        for round in 0..60 {
            let piece: Vec<u8> = (0..random.usize(1..1_500_000)).map(|_| random.u8(..)).collect();
            queue.push(&piece).unwrap();
            expected.extend_from_slice(&piece);
            // For a while nobody reads, so that the queue goes to disk; then everything is read.
            if round % 20 > 15 {
                let mut buffer = vec![0; 4 << 20];
                let count = reader.read(&mut buffer).unwrap();
                seen.extend_from_slice(&buffer[..count]);
            }
        }
        queue.end();
        reader.read_to_end(&mut seen).unwrap();
        assert!(seen == expected, "{} bytes of {}", seen.len(), expected.len());
    }

    #[test]
    fn a_full_disk_and_a_lost_sender_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::new(disk(&folder, 1 << 20));
        let piece = vec![7; 1 << 20];
        for _ in 0..17 {
            queue.push(&piece).unwrap();
        }
        let full = queue.push(&piece).unwrap_err();
        assert_eq!(full.kind(), Kind::Exhausted);
        assert!(full.hint_text().unwrap().contains("spoolMibMax"));
        queue.fail(&Error::new(Kind::Unreachable, "gone"));
        let mut rest = Vec::new();
        let error = queue.reader().read_to_end(&mut rest).unwrap_err();
        assert_eq!((rest.len(), error.to_string().as_str()), (17 << 20, "gone"));
    }
}
