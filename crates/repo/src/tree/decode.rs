//! Turns sealed blobs into plain, verified bytes, in batches that fill both lanes of the hash.
//!
//! Apart from the readers because every one of them (restore, check, copy, prune, single blobs)
//! must come through here: a byte that was not authenticated, decompressed to exactly its length
//! and hashed to exactly its id is never handed on.

use std::ops::Range;

use stillpoint_core::{Error, Kind, Result};

use crate::Id;
use crate::crypto::Cipher;
use crate::format::pack::{PackEntry, SEAL_BYTES};
use crate::simd::sha256::{Running, hash_many, hash_many_beside};

/// Plain bytes decoded before they are hashed together.
const BATCH_BYTES: usize = 2 << 20;
/// Blobs hashed together.
const BATCH_BLOBS: usize = 64;
/// The largest plain blob that is believed; a directory of a million entries written by restic is
/// one blob of about half a gigabyte.
const BLOB_BYTES_MAX: usize = 2 << 30;
/// zstd cannot shrink by more than this; a larger claim must not make us take memory.
const RATIO_MAX: usize = 1 << 17;

/// The buffers of one worker, used again and again.
pub(crate) struct Decoder {
    zstd: zstd_safe::DCtx<'static>,
    /// Decrypted but still compressed bytes of one blob.
    compressed: Vec<u8>,
    /// Plain bytes of the batch, one blob behind the other. Only grows; its tail is old data.
    plain: Vec<u8>,
    spans: Vec<Range<usize>>,
    ids: Vec<Id>,
}

impl Decoder {
    /// Empty buffers, which grow as needed.
    pub(crate) fn new() -> Self {
        Self {
            zstd: zstd_safe::DCtx::create(),
            compressed: Vec::new(),
            plain: Vec::new(),
            spans: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// How many of the blobs fit into the next batch: at least one if there is any.
    pub(crate) fn batch(entries: &[PackEntry]) -> usize {
        let mut bytes = 0;
        let fits = entries.iter().take(BATCH_BLOBS).take_while(|entry| {
            bytes += entry.plain_length() as usize;
            bytes <= BATCH_BYTES
        });
        fits.count().max(1).min(entries.len())
    }

    /// Decodes a batch. `data` is part of a pack and begins at `base` of it. A blob that is not
    /// what its id says yields an error in its place; the others are there all the same.
    ///
    /// If `beside` is given, its hash is carried on meanwhile.
    pub(crate) fn decode(
        &mut self,
        cipher: &Cipher,
        data: &[u8],
        base: u64,
        entries: &[PackEntry],
        beside: Option<&mut Beside<'_>>,
    ) -> Decoded<'_> {
        self.spans.clear();
        self.ids.clear();
        let mut failures = Vec::new();
        let mut end = 0;
        for (number, entry) in entries.iter().enumerate() {
            let begin = end;
            match self.decode_one(cipher, data, base, entry, begin) {
                Ok(length) => end += length,
                Err(error) => failures.push((number, error)),
            }
            self.spans.push(begin..end);
        }
        let jobs: Vec<&[u8]> = self.spans.iter().map(|span| &self.plain[span.clone()]).collect();
        self.ids.resize(jobs.len(), Id([0; 32]));
        match beside {
            Some(beside) => beside.hash_many(&jobs, &mut self.ids),
            None => hash_many(&jobs, &mut self.ids),
        }
        for (number, (entry, id)) in entries.iter().zip(&self.ids).enumerate() {
            if entry.id != *id && failures.iter().all(|(failed, _)| *failed != number) {
                failures.push((number, damaged("its hash differs", entry)));
            }
        }
        Decoded { plain: &self.plain, spans: &self.spans, failures }
    }

    fn decode_one(
        &mut self,
        cipher: &Cipher,
        data: &[u8],
        base: u64,
        entry: &PackEntry,
        begin: usize,
    ) -> Result<usize> {
        let from = u64::from(entry.offset).checked_sub(base).and_then(|from| usize::try_from(from).ok());
        let sealed = from.and_then(|from| data.get(from..from + entry.length as usize));
        let sealed = sealed.ok_or_else(|| damaged("the pack is too short", entry))?;
        let inner = entry.length.saturating_sub(SEAL_BYTES) as usize;
        let claimed = entry.uncompressed as usize;
        if entry.length < SEAL_BYTES || claimed > BLOB_BYTES_MAX || claimed > inner.saturating_mul(RATIO_MAX) {
            return Err(damaged("its length is impossible", entry));
        }
        let length = entry.plain_length() as usize;
        if self.plain.len() < begin + length {
            self.plain.resize(begin + length, 0);
        }
        let out = &mut self.plain[begin..begin + length];
        if entry.uncompressed == 0 {
            cipher.open_to(sealed, out).map_err(|_| damaged("its authenticator differs", entry))?;
            return Ok(length);
        }
        if self.compressed.len() < inner {
            self.compressed.resize(inner, 0);
        }
        cipher
            .open_to(sealed, &mut self.compressed[..inner])
            .map_err(|_| damaged("its authenticator differs", entry))?;
        match self.zstd.decompress(out, &self.compressed[..inner]) {
            Ok(written) if written == length => Ok(length),
            _ => Err(damaged("it does not decompress to its length", entry)),
        }
    }
}

/// A decoded batch.
pub(crate) struct Decoded<'d> {
    plain: &'d [u8],
    spans: &'d [Range<usize>],
    /// The blobs that are not what they must be, by number within the batch.
    pub(crate) failures: Vec<(usize, Error)>,
}

impl<'d> Decoded<'d> {
    /// The plain bytes of blob `number`; only for blobs without failure.
    pub(crate) fn plain(&self, number: usize) -> &'d [u8] {
        &self.plain[self.spans[number].clone()]
    }
}

fn damaged(why: &str, entry: &PackEntry) -> Error {
    Error::new(Kind::Corrupt, format!("a blob is damaged: {why}")).context("blob", entry.id)
}

/// The hash of a pack that is read in windows, carried on while the blobs of a window are hashed.
pub(crate) struct Beside<'w> {
    running: &'w mut Running,
    rest: &'w [u8],
}

impl<'w> Beside<'w> {
    /// Goes on with `running` over `window`, which begins at byte `at` of the pack.
    pub(crate) fn new(running: &'w mut Running, window: &'w [u8], at: u64) -> Self {
        // Only whole blocks of the hash can be shared, so the one begun before is filled first.
        let open = (at % 64) as usize;
        let fill = if open == 0 { 0 } else { window.len().min(64 - open) };
        running.update(&window[..fill]);
        Self { running, rest: &window[fill..] }
    }

    fn hash_many(&mut self, messages: &[&[u8]], ids: &mut [Id]) {
        let used = hash_many_beside(messages, ids, self.running, self.rest);
        self.rest = &self.rest[used..];
    }

    /// Hashes what is left of the window.
    pub(crate) fn end(self) {
        self.running.update(self.rest);
    }
}
