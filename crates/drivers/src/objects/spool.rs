//! Sorted lists of any length on disk: listings come in the order of keys or of directories, trees
//! are written in the order of names, and a flat bucket of ten million keys fits in no memory.
//!
//! Entries are pairs of a sort key and a payload. Runs of a few MiB are sorted in memory, written,
//! and merged. Everything lies in the scratch folder and goes when the value is dropped.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use stillpoint_core::error::{Error, IoContext, Kind, Result};
use tempfile::NamedTempFile;

/// Bytes that are sorted in memory at a time, entries' own overhead included.
const RUN_BYTES_MAX: usize = 8 << 20;
/// Runs that are merged at a time: each costs a buffer and a descriptor.
const RUNS_MAX: usize = if cfg!(test) { 4 } else { 64 };
/// What an entry costs in memory beside its bytes.
const ENTRY_BYTES: usize = 64;
/// No key and no payload of ours is longer; a longer one is damage.
const FIELD_BYTES_MAX: u32 = 1 << 20;

/// One entry: its sort key and what belongs to it.
pub(super) type Entry = (Vec<u8>, Vec<u8>);

/// Takes entries in any order.
pub(super) struct Sorter {
    folder: PathBuf,
    run: Vec<Entry>,
    run_bytes: usize,
    runs: Vec<NamedTempFile>,
}

/// A finished list, readable from its begin as often as needed.
#[derive(Debug)]
pub(super) struct Sorted {
    file: NamedTempFile,
}

/// Reads a list from its begin.
pub(super) struct Entries {
    reader: BufReader<File>,
}

impl Sorter {
    /// An empty list that spills into `folder`.
    pub fn new(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).or_io(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder: folder.to_owned(), run: Vec::new(), run_bytes: 0, runs: Vec::new() })
    }

    /// Adds one entry. Entries of equal keys stay beside each other, in any order.
    pub fn push(&mut self, key: Vec<u8>, payload: Vec<u8>) -> Result<()> {
        self.run_bytes += key.len() + payload.len() + ENTRY_BYTES;
        self.run.push((key, payload));
        if self.run_bytes >= RUN_BYTES_MAX { self.end_run() } else { Ok(()) }
    }

    fn end_run(&mut self) -> Result<()> {
        self.run.sort_unstable();
        let mut entries = std::mem::take(&mut self.run).into_iter();
        self.run_bytes = 0;
        let file = write_run(&self.folder, || Ok(entries.next()))?;
        self.runs.push(file);
        if self.runs.len() >= RUNS_MAX {
            let merged = merge(&self.folder, &self.runs)?;
            self.runs = vec![merged];
        }
        Ok(())
    }

    /// Ends the list.
    pub fn finish(mut self) -> Result<Sorted> {
        if !self.run.is_empty() || self.runs.is_empty() {
            self.end_run()?;
        }
        let file = if self.runs.len() == 1 { self.runs.remove(0) } else { merge(&self.folder, &self.runs)? };
        Ok(Sorted { file })
    }
}

impl Sorted {
    /// Reads from the begin.
    pub fn entries(&self) -> Result<Entries> {
        let file = self.file.reopen().or_io(|| "cannot read a list in the scratch folder".to_owned())?;
        Ok(Entries { reader: BufReader::with_capacity(64 << 10, file) })
    }
}

impl Entries {
    /// The next entry, or `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let Some(key) = self.field(true)? else { return Ok(None) };
        let payload = self.field(false)?.unwrap_or_default();
        Ok(Some((key, payload)))
    }

    fn field(&mut self, may_end: bool) -> Result<Option<Vec<u8>>> {
        let what = || "cannot read a list in the scratch folder".to_owned();
        let mut length = [0; 4];
        match self.reader.read_exact(&mut length) {
            Err(error) if may_end && error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.or_io(what)?,
        }
        let length = u32::from_le_bytes(length);
        if length > FIELD_BYTES_MAX {
            return Err(Error::new(Kind::Corrupt, "a list in the scratch folder is damaged"));
        }
        let mut field = vec![0; length as usize];
        self.reader.read_exact(&mut field).or_io(what)?;
        Ok(Some(field))
    }
}

fn write_run(folder: &Path, mut next: impl FnMut() -> Result<Option<Entry>>) -> Result<NamedTempFile> {
    let what = || format!("cannot write a list to the scratch folder {}", folder.display());
    let file = NamedTempFile::new_in(folder).or_io(what)?;
    let mut writer = BufWriter::with_capacity(256 << 10, file.as_file());
    while let Some((key, payload)) = next()? {
        for field in [&key, &payload] {
            let length = u32::try_from(field.len()).ok().filter(|&length| length <= FIELD_BYTES_MAX);
            let length = length.ok_or_else(|| Error::new(Kind::Unsupported, "a key is longer than 1 MiB"))?;
            writer.write_all(&length.to_le_bytes()).or_io(what)?;
            writer.write_all(field).or_io(what)?;
        }
    }
    writer.flush().or_io(what)?;
    drop(writer);
    Ok(file)
}

fn merge(folder: &Path, runs: &[NamedTempFile]) -> Result<NamedTempFile> {
    let mut readers = Vec::with_capacity(runs.len());
    let mut heads = BinaryHeap::with_capacity(runs.len());
    for (index, run) in runs.iter().enumerate() {
        let file = run.reopen().or_io(|| "cannot read a list in the scratch folder".to_owned())?;
        let mut entries = Entries { reader: BufReader::with_capacity(64 << 10, file) };
        if let Some(entry) = entries.next_entry()? {
            heads.push(Reverse((entry, index)));
        }
        readers.push(entries);
    }
    write_run(folder, || {
        let Some(Reverse((entry, index))) = heads.pop() else { return Ok(None) };
        if let Some(next) = readers[index].next_entry()? {
            heads.push(Reverse((next, index)));
        }
        Ok(Some(entry))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_longer_than_many_runs_come_back_sorted() {
        let folder = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(folder.path()).unwrap();
        let mut random = fastrand::Rng::with_seed(7);
        let mut expected = Vec::new();
        // Large payloads end a run every few entries.
        for _ in 0..150 {
            let key = random.u64(..).to_be_bytes()[..random.usize(0..8)].to_vec();
            expected.push(key.clone());
            sorter.push(key, vec![1; 1 << 20]).unwrap();
        }
        let sorted = sorter.finish().unwrap();
        expected.sort();
        for _ in 0..2 {
            let mut entries = sorted.entries().unwrap();
            let mut found = Vec::new();
            while let Some((key, payload)) = entries.next_entry().unwrap() {
                assert_eq!(payload.len(), 1 << 20);
                found.push(key);
            }
            assert_eq!(found, expected);
        }
        drop(sorted);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_empty_list_is_a_list() {
        let folder = tempfile::tempdir().unwrap();
        let sorted = Sorter::new(folder.path()).unwrap().finish().unwrap();
        assert!(sorted.entries().unwrap().next_entry().unwrap().is_none());
    }
}
