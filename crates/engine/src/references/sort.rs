//! Sorts records that do not fit into memory: full buffers go to disk sorted, and are merged while
//! they are read.
//!
//! The temporary files have no name, so a crash leaves none behind. They hold keys of the user's
//! data in the clear, readable by this process alone.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stillpoint_core::error::{Error, IoContext, Kind, Result};

/// Lengths of key and owner, before each record.
const HEADER_BYTES: usize = 8;
/// A longer referent or owner is a mistake in the query, not data.
const PART_BYTES_MAX: usize = 1 << 20;
/// What is read of a run at a time.
const READ_BYTES: usize = 64 << 10;

/// A key and its owner.
pub(super) type Record = (Vec<u8>, Vec<u8>);

/// Takes records in any order.
pub(super) struct Sorter {
    folder: PathBuf,
    bytes_max: usize,
    buffer: Buffer,
    runs: Vec<File>,
}

/// Records one after the other, and where each begins.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

/// The first bytes of the key decide most comparisons without a jump through memory.
#[derive(Clone, Copy)]
struct Entry {
    prefix: u64,
    offset: u32,
}

impl Buffer {
    fn record(&self, entry: Entry) -> (&[u8], &[u8]) {
        let at = entry.offset as usize;
        let (key_length, owner_length) = lengths(&self.bytes[at..at + HEADER_BYTES]);
        let key_end = at + HEADER_BYTES + key_length;
        (&self.bytes[at + HEADER_BYTES..key_end], &self.bytes[key_end..key_end + owner_length])
    }

    fn sort(&mut self) {
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_unstable_by(|a, b| a.prefix.cmp(&b.prefix).then_with(|| self.record(*a).cmp(&self.record(*b))));
        self.entries = entries;
    }
}

fn lengths(header: &[u8]) -> (usize, usize) {
    let part = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;
    (part(0), part(4))
}

fn prefix(key: &[u8]) -> u64 {
    let mut first = [0_u8; 8];
    let length = key.len().min(8);
    first[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(first)
}

impl Sorter {
    /// Sorts within about `bytes_max` bytes of memory, at most 2 GiB; the rest goes to `folder`.
    pub(super) fn new(folder: &Path, bytes_max: usize) -> Self {
        Self {
            folder: folder.to_owned(),
            bytes_max: bytes_max.min(2 << 30),
            buffer: Buffer::default(),
            runs: Vec::new(),
        }
    }

    /// Adds a record.
    pub(super) fn push(&mut self, key: &[u8], owner: &[u8]) -> Result<()> {
        if key.len().max(owner.len()) > PART_BYTES_MAX {
            return Err(Error::new(Kind::Corrupt, "a referent or its owner is longer than 1 MiB")
                .hint("the first column of the query must be the referent itself"));
        }
        let length = HEADER_BYTES + key.len() + owner.len();
        // A quarter of the memory is for the entries, so neither side ever has to grow twice.
        let bytes_max = self.bytes_max / 4 * 3;
        let entries_max = self.bytes_max / 4 / size_of::<Entry>();
        let full = self.buffer.bytes.len() + length > bytes_max || self.buffer.entries.len() >= entries_max;
        if full && !self.buffer.entries.is_empty() {
            self.spill()?;
        }
        if self.buffer.bytes.capacity() == 0 {
            // Address space only: pages that are never written are never there.
            self.buffer.bytes.reserve_exact(bytes_max);
            self.buffer.entries.reserve_exact(entries_max);
        }
        let offset =
            u32::try_from(self.buffer.bytes.len()).map_err(|_| Error::internal("the sort buffer is too large"))?;
        for part in [key, owner] {
            self.buffer.bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
        }
        self.buffer.bytes.extend_from_slice(key);
        self.buffer.bytes.extend_from_slice(owner);
        self.buffer.entries.push(Entry { prefix: prefix(key), offset });
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        let folder = self.folder.display();
        self.buffer.sort();
        let file =
            tempfile::tempfile_in(&self.folder).or_io(|| format!("cannot create a temporary file in `{folder}`"))?;
        let mut writer = BufWriter::with_capacity(READ_BYTES, file);
        for entry in &self.buffer.entries {
            let (key, owner) = self.buffer.record(*entry);
            let at = entry.offset as usize;
            let record = &self.buffer.bytes[at..at + HEADER_BYTES + key.len() + owner.len()];
            writer.write_all(record).or_io(|| format!("cannot write a temporary file in `{folder}`"))?;
        }
        let file = writer
            .into_inner()
            .map_err(|error| Error::io(format!("cannot write a temporary file in `{folder}`"), error.into_error()))?;
        self.runs.push(file);
        self.buffer.bytes.clear();
        self.buffer.entries.clear();
        Ok(())
    }

    /// Ends the input.
    pub(super) fn finish(mut self) -> Result<Sorted> {
        if self.runs.is_empty() {
            self.buffer.sort();
            return Ok(Sorted { buffer: self.buffer, runs: Vec::new() });
        }
        if !self.buffer.entries.is_empty() {
            self.spill()?;
        }
        Ok(Sorted { buffer: Buffer::default(), runs: self.runs })
    }
}

/// Records in order; can be read any number of times.
pub(super) struct Sorted {
    buffer: Buffer,
    runs: Vec<File>,
}

impl Sorted {
    /// Reads from the begin.
    pub(super) fn iter(&self) -> Result<Ordered<'_>> {
        let mut runs: Vec<Run<'_>> = self.runs.iter().map(Run::new).collect();
        let mut heap = BinaryHeap::with_capacity(runs.len());
        for (number, run) in runs.iter_mut().enumerate() {
            if let Some(record) = run.next()? {
                heap.push(Reverse((record, number)));
            }
        }
        Ok(Ordered { buffer: &self.buffer, next: 0, runs, heap })
    }
}

/// Yields records by key, then owner.
pub(super) struct Ordered<'a> {
    buffer: &'a Buffer,
    next: usize,
    runs: Vec<Run<'a>>,
    heap: BinaryHeap<Reverse<(Record, usize)>>,
}

impl Iterator for Ordered<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        if let Some(entry) = self.buffer.entries.get(self.next) {
            self.next += 1;
            let (key, owner) = self.buffer.record(*entry);
            return Some(Ok((key.to_vec(), owner.to_vec())));
        }
        let Reverse((record, number)) = self.heap.pop()?;
        match self.runs[number].next() {
            Ok(Some(next)) => self.heap.push(Reverse((next, number))),
            Ok(None) => {}
            Err(error) => return Some(Err(error)),
        }
        Some(Ok(record))
    }
}

/// One sorted file, read at its own pace: several readers may share the file.
struct Run<'a> {
    file: &'a File,
    offset: u64,
    buffer: Vec<u8>,
    at: usize,
}

impl<'a> Run<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, offset: 0, buffer: Vec::new(), at: 0 }
    }

    fn next(&mut self) -> Result<Option<Record>> {
        if !self.fill(HEADER_BYTES)? {
            return Ok(None);
        }
        let (key_length, owner_length) = lengths(&self.buffer[self.at..self.at + HEADER_BYTES]);
        let length = HEADER_BYTES + key_length + owner_length;
        if !self.fill(length)? {
            return Err(Error::new(Kind::Io, "a temporary file ends too early"));
        }
        let record = &self.buffer[self.at + HEADER_BYTES..self.at + length];
        let (key, owner) = record.split_at(key_length);
        let record = (key.to_vec(), owner.to_vec());
        self.at += length;
        Ok(Some(record))
    }

    /// Makes `length` bytes available from `at` on; false at the end of the file.
    fn fill(&mut self, length: usize) -> Result<bool> {
        if self.buffer.len() - self.at >= length {
            return Ok(true);
        }
        self.buffer.drain(..self.at);
        self.at = 0;
        while self.buffer.len() < length {
            let begin = self.buffer.len();
            self.buffer.resize(begin + READ_BYTES, 0);
            let count = self.file.read_at(&mut self.buffer[begin..], self.offset);
            let count = count.or_io(|| "cannot read a temporary file".to_owned())?;
            self.buffer.truncate(begin + count);
            self.offset += count as u64;
            if count == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
