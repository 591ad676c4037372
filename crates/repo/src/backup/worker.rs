//! What a thread of the pipeline does: reads a batch, cuts it, hashes it, drops what is known,
//! compresses, seals and packs the rest.
//!
//! All of it in one thread, while the bytes are in its cache.

use std::ops::Range;
use std::sync::Arc;

use stillpoint_core::error::Result;
use stillpoint_core::tree::Content;

use super::failure::PanicGuard;
use super::pipeline::Pipeline;
use super::schedule::{Stream, Work};
use super::slot::{Job, Slot};
use crate::chunk::{CHUNK_BYTES_MIN, Cursor};
use crate::format::pack::BlobKind;

/// Bytes of a stream that are read before they are cut.
const BATCH_BYTES: usize = 4 << 20;
/// What is read at least, however much the last batch left.
const READ_BYTES_MIN: usize = 2 << 20;

/// Runs thread `number` until all work is done or the backup has failed. The first are workers, the
/// rest are spare.
pub(super) fn run(pipeline: &Pipeline, number: usize) {
    let _guard = PanicGuard(&pipeline.failure);
    let is_spare = number >= pipeline.plan.workers;
    let mut thread = Thread { pipeline, number, is_spare, buffer: Vec::new(), chunks: Vec::new(), files: Vec::new() };
    if let Err(error) = thread.run() {
        pipeline.failure.set(error);
    }
}

/// Chunks of one file within a batch.
struct FileChunks {
    slot: Arc<Slot>,
    /// Number of the first within the file.
    first: u64,
    count: usize,
}

struct Thread<'p> {
    pipeline: &'p Pipeline,
    number: usize,
    is_spare: bool,
    /// What was read. Only grows, so that it is cleared once and not for each batch.
    buffer: Vec<u8>,
    /// The chunks of the batch, as places in `buffer`.
    chunks: Vec<Range<usize>>,
    files: Vec<FileChunks>,
}

impl Thread<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            let schedule = &self.pipeline.schedule;
            let work = match self.is_spare {
                false => schedule.next(&self.pipeline.failure)?,
                true => schedule.next_spare(&self.pipeline.failure)?,
            };
            self.chunks.clear();
            self.files.clear();
            match work {
                None => return Ok(()),
                Some(Work::Run(jobs)) => self.read_run(jobs),
                Some(Work::Stream(stream)) => self.read_stream(stream),
            }
            self.store()?;
            if self.is_spare {
                // Work for spare threads is rare; their memory is better kept free.
                self.buffer = Vec::new();
                schedule.spare_done();
            }
        }
    }

    /// Reads small files, one behind the other.
    fn read_run(&mut self, jobs: Vec<Job>) {
        let mut filled = 0;
        for job in jobs {
            if !job.slot.store.abandoned.load(std::sync::atomic::Ordering::Relaxed) {
                filled = self.read_small(job, filled);
            }
        }
    }

    fn read_small(&mut self, mut job: Job, begin: usize) -> usize {
        let mut end = begin;
        // A file that is larger than expected is read on as far as one chunk goes.
        let mut space = job.bytes_expected + 1;
        loop {
            let whole = self.read(&mut *job.content, &mut end, begin + space);
            match whole {
                Err(error) => {
                    job.slot.end(Err(error));
                    return begin;
                }
                Ok(true) => break,
                Ok(false) if space > CHUNK_BYTES_MIN => {
                    self.grow_to_stream(job, begin..end);
                    return begin;
                }
                Ok(false) => space = CHUNK_BYTES_MIN + 1,
            }
        }
        if end > begin {
            job.slot.begin_batch((end - begin) as u64);
            self.chunks.push(begin..end);
            self.files.push(FileChunks { slot: job.slot.clone(), first: 0, count: 1 });
        }
        job.slot.end(job.content.finish());
        end
    }

    fn grow_to_stream(&self, job: Job, read: Range<usize>) {
        let Job { slot, content, .. } = job;
        let carry = self.buffer[read].to_vec();
        self.pipeline.schedule.add_stream(Box::new(Stream {
            slot,
            content,
            carry,
            cursor: Cursor::default(),
            chunk: 0,
        }));
    }

    /// Reads until `to` (false) or the end of the content (true).
    fn read(&mut self, content: &mut dyn Content, at: &mut usize, to: usize) -> Result<bool> {
        if self.buffer.len() < to {
            self.buffer.resize(to, 0);
        }
        self.pipeline.schedule.reading(self.number, true);
        let outcome = loop {
            if *at == to {
                break Ok(false);
            }
            match content.read(&mut self.buffer[*at..to]) {
                Ok(0) => break Ok(true),
                Ok(length) => *at += length,
                Err(error) => break Err(error),
            }
            if self.pipeline.failure.check().is_err() {
                break Ok(false);
            }
        };
        self.pipeline.schedule.reading(self.number, false);
        outcome
    }

    /// Reads and cuts a batch of a stream, and lets others have the stream again.
    fn read_stream(&mut self, mut stream: Box<Stream>) {
        let schedule = &self.pipeline.schedule;
        if stream.slot.store.abandoned.load(std::sync::atomic::Ordering::Relaxed) {
            schedule.ended();
            return;
        }
        let carried = stream.carry.len();
        let to = BATCH_BYTES.max(carried + READ_BYTES_MIN);
        if self.buffer.len() < to {
            self.buffer.resize(to, 0);
        }
        self.buffer[..carried].copy_from_slice(&stream.carry);
        let mut filled = carried;
        let is_end = match self.read(&mut *stream.content, &mut filled, to) {
            Ok(is_end) => is_end,
            Err(error) => {
                stream.slot.end(Err(error));
                schedule.ended();
                return;
            }
        };
        let mut begin = 0;
        while let Some(length) = self.pipeline.chunker.cut(&self.buffer[begin..filled], &mut stream.cursor) {
            self.chunks.push(begin..begin + length);
            begin += length;
        }
        if is_end && begin < filled {
            self.chunks.push(begin..filled);
            begin = filled;
        }
        if !self.chunks.is_empty() {
            stream.slot.begin_batch(begin as u64);
            let count = self.chunks.len();
            self.files.push(FileChunks { slot: stream.slot.clone(), first: stream.chunk, count });
            stream.chunk += count as u64;
        }
        if is_end {
            stream.slot.end(stream.content.finish());
            schedule.ended();
        } else {
            stream.carry.clear();
            stream.carry.extend_from_slice(&self.buffer[begin..filled]);
            schedule.put_back(stream);
        }
    }

    /// Stores the chunks that are new, and tells the files of all.
    fn store(&mut self) -> Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let pipeline = self.pipeline;
        let mut seat = pipeline.take_seat()?;
        let chunks: Vec<&[u8]> = self.chunks.iter().map(|place| &self.buffer[place.clone()]).collect();
        let mut ids = std::mem::take(&mut seat.ids);
        ids.clear();
        ids.resize(chunks.len(), crate::Id([0; 32]));
        seat.pack.hash_beside(&chunks, &mut ids);
        let mut next = 0;
        for file in self.files.drain(..) {
            let own = next..next + file.count;
            next = own.end;
            for (id, plain) in ids[own.clone()].iter().zip(&chunks[own.clone()]) {
                if pipeline.known.claim(BlobKind::Data, id)? {
                    let how = seat.compressor.as_mut().map(|compressor| (compressor, &file.slot.choice));
                    let length = seat.pack.add(BlobKind::Data, *id, plain, how, &mut seat.sealer)?;
                    file.slot.store.bytes_stored.fetch_add(u64::from(length), std::sync::atomic::Ordering::Relaxed);
                    if seat.pack.len() >= pipeline.plan.pack_bytes {
                        pipeline.outlet.write(&mut seat.pack, &mut seat.sealer)?;
                    }
                }
            }
            file.slot.end_batch(file.first, ids[own].to_vec());
        }
        seat.ids = ids;
        pipeline.give_seat(seat);
        Ok(())
    }
}
