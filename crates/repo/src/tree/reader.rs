//! Reads one file from its begin, verified, a few blobs ahead of whoever consumes it.
//!
//! Apart from the restore, which writes whole trees in the order of the packs: here the order is
//! the file's. Blobs that lie behind one another in a pack are read in one range; long files are
//! read by a thread of their own, so that a distant depot and the consumer work at the same time.

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use stillpoint_core::{Error, Kind, Result};

use super::blobs::Loader;
use super::decode::Decoder;
use crate::format::pack::{BlobKind, PackEntry};
use crate::index::Location;
use crate::unpacked::FileKind;
use crate::{Id, Repository};

/// Plain bytes decoded at once, and read ahead three times.
const RUN_BYTES_MAX: u64 = 4 << 20;
/// Runs waiting for the consumer.
const RUNS_AHEAD: usize = 2;

/// Opens a file of these blobs; `name` is for errors.
pub(crate) fn open(loader: &Arc<Loader>, name: String, content: Vec<Id>) -> Result<Box<dyn Read + Send>> {
    let mut runs = Runs { loader: Arc::clone(loader), name, content, next: 0, decoder: Decoder::new() };
    let first = runs.next_run()?.unwrap_or_default();
    let missing = runs.content.len() - runs.next;
    let source = if missing > 0 {
        let (sender, receiver) = sync_channel(RUNS_AHEAD);
        std::thread::Builder::new()
            .name("read-ahead".to_owned())
            .spawn(move || {
                let mut delivered = runs.next;
                while let Some(run) = runs.next_run().transpose() {
                    let failed = run.is_err();
                    let run = run.map(|plain| (plain, runs.next - delivered));
                    delivered = runs.next;
                    // A closed channel means that the consumer has seen enough.
                    if sender.send(run).is_err() || failed {
                        break;
                    }
                }
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Some(receiver)
    } else {
        None
    };
    Ok(Box::new(FileReader { current: first, at: 0, missing, source, failed: false }))
}

struct Runs {
    loader: Arc<Loader>,
    name: String,
    content: Vec<Id>,
    next: usize,
    decoder: Decoder,
}

impl Runs {
    /// The plain bytes of the next blobs that lie behind one another, or `None` at the end.
    fn next_run(&mut self) -> Result<Option<Vec<u8>>> {
        if self.next == self.content.len() {
            return Ok(None);
        }
        let Location { pack, entry: first } = self.locate(self.next)?;
        let mut entries = vec![first];
        let mut bytes = u64::from(first.plain_length());
        while let Some(entry) = self.neighbour(&pack, entries.last().expect("one is there"), entries.len())? {
            bytes += u64::from(entry.plain_length());
            if bytes > RUN_BYTES_MAX {
                break;
            }
            entries.push(entry);
        }
        self.next += entries.len();
        self.decode(&pack, &entries).map(Some)
    }

    fn locate(&self, number: usize) -> Result<Location> {
        let id = &self.content[number];
        self.loader.index().get(BlobKind::Data, id).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("a part of `{}` is not in the repository", self.name)).context("blob", id)
        })
    }

    /// The blob after the ones taken, if it lies right behind `last` in the same pack.
    fn neighbour(&self, pack: &Id, last: &PackEntry, taken: usize) -> Result<Option<PackEntry>> {
        if self.next + taken == self.content.len() {
            return Ok(None);
        }
        let Location { pack: other, entry } = self.locate(self.next + taken)?;
        let behind = other == *pack && u64::from(entry.offset) == u64::from(last.offset) + u64::from(last.length);
        Ok(behind.then_some(entry))
    }

    fn decode(&mut self, pack: &Id, entries: &[PackEntry]) -> Result<Vec<u8>> {
        match self.decode_from(pack, entries) {
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                let mut plain = Vec::new();
                for entry in entries {
                    plain.extend_from_slice(&self.decode_anywhere(entry)?);
                }
                Ok(plain)
            }
            other => other,
        }
    }

    /// One blob, once more and wherever a copy of it lies: what came over a wire may have been
    /// torn on the way, and what lay in a damaged pack may have been stored anew.
    fn decode_anywhere(&mut self, entry: &PackEntry) -> Result<Vec<u8>> {
        let copies: Vec<Location> = self.loader.index().locations(entry.kind, &entry.id).collect();
        let mut failure = Error::new(Kind::Corrupt, "a blob is in no pack").context("blob", entry.id);
        for Location { pack, entry } in copies {
            match self.decode_from(&pack, &[entry]) {
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => failure = error,
                other => return other,
            }
        }
        Err(failure)
    }

    fn decode_from(&mut self, pack: &Id, entries: &[PackEntry]) -> Result<Vec<u8>> {
        let name = FileKind::Pack.name(pack);
        let base = u64::from(entries[0].offset);
        let length = entries.iter().map(|entry| u64::from(entry.length)).sum();
        let named = |error: Error| error.context("needed by", &self.name).context("pack", &name);
        let data = self.loader.repository().depot().read_range(&name, base, length).map_err(named)?;
        decode_all(&mut self.decoder, self.loader.repository(), &data, base, entries).map_err(named)
    }
}

fn decode_all(
    decoder: &mut Decoder,
    repository: &Repository,
    data: &[u8],
    base: u64,
    entries: &[PackEntry],
) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let (batch, behind) = rest.split_at(Decoder::batch(rest));
        let mut decoded = decoder.decode(repository.cipher(), data, base, batch, None);
        if let Some((_, error)) = decoded.failures.pop() {
            return Err(error);
        }
        (0..batch.len()).for_each(|number| plain.extend_from_slice(decoded.plain(number)));
        rest = behind;
    }
    Ok(plain)
}

/// Plain bytes, and of how many blobs.
type Run = Result<(Vec<u8>, usize)>;

struct FileReader {
    current: Vec<u8>,
    at: usize,
    /// Blobs that are still to come: a thread that dies must not look like the end of the file.
    missing: usize,
    source: Option<Receiver<Run>>,
    failed: bool,
}

impl Read for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.current.len() {
            if self.failed {
                return Err(std::io::Error::other("the file could not be read before"));
            }
            match self.source.as_ref().and_then(|source| source.recv().ok()) {
                None if self.missing == 0 => return Ok(0),
                None => {
                    self.failed = true;
                    return Err(std::io::Error::other("reading ahead ended early"));
                }
                Some(Ok((run, blobs))) => {
                    self.missing -= blobs;
                    (self.current, self.at) = (run, 0);
                }
                Some(Err(error)) => {
                    self.failed = true;
                    return Err(std::io::Error::other(error));
                }
            }
        }
        let count = buffer.len().min(self.current.len() - self.at);
        buffer[..count].copy_from_slice(&self.current[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
