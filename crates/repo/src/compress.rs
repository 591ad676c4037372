//! Compresses blobs with zstd, each file with the parameters that suit it.
//!
//! All manners are zstd's fastest search. *Light* has a small table, which the first-level cache
//! holds; *wide* has twice that; *dense* looks for matches of 4 bytes instead of 6, which pays for
//! binary numbers and little else. A sample of a file decides. What looks random is stored as it
//! is, without an attempt.

use std::io::Cursor;
use std::sync::atomic::{AtomicU32, Ordering};

use stillpoint_core::error::{Error, Result};
use zstd_safe::{CCtx, CParameter, ParamSwitch};

/// Bytes of the sample that is compressed in every manner.
const SAMPLE_BYTES: usize = 32 << 10;
/// Shorter blobs are compressed light without a sample.
const SAMPLED_BYTES_MIN: usize = 64 << 10;
/// Blobs of a file that one sample decides for.
const SAMPLE_BLOBS: u32 = 8;
/// Dense must come to so many thousandths of light, and wide to so many.
const DENSE_PERMILLE_MAX: usize = 900;
const WIDE_PERMILLE_MAX: usize = 985;
/// A blob that compresses to more than this is stored raw: reading it is cheaper.
const COMPRESSED_PERCENT_MAX: usize = 98;
/// Shorter blobs say too little of their bytes to tell whether they are random.
const PROBED_BYTES_MIN: usize = 1024;

/// How a blob is compressed; also the number of its context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Light,
    Wide,
    Dense,
}

/// What the last sample of a file said; shared by the workers that compress it. They may race: the
/// worst that comes of it is one sample more.
#[derive(Debug, Default)]
pub(crate) struct Choice(AtomicU32);

impl Choice {
    /// The manner for the next blob, if a sample has told it lately.
    fn next(&self) -> Option<Manner> {
        let state = self.0.load(Ordering::Relaxed);
        let left = state >> 2;
        if left == 0 {
            return None;
        }
        self.0.store((left - 1) << 2 | state & 3, Ordering::Relaxed);
        Some(match state & 3 {
            2 => Manner::Dense,
            1 => Manner::Wide,
            _ => Manner::Light,
        })
    }

    fn decide(&self, manner: Manner) -> Manner {
        self.0.store((SAMPLE_BLOBS - 1) << 2 | manner as u32, Ordering::Relaxed);
        manner
    }
}

/// The contexts of one worker. Making one costs more than compressing a small blob.
pub(crate) struct Compressor {
    /// By [`Manner`].
    contexts: [CCtx<'static>; 3],
    sample: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Result<Self> {
        use CParameter::{CompressionLevel, HashLog, LiteralCompressionMode, MinMatch, TargetLength};
        // A target length turns off the coding of literals unless told.
        let literals = LiteralCompressionMode(ParamSwitch::Enable);
        let table = |log| [CompressionLevel(1), HashLog(log), MinMatch(6), TargetLength(1), literals];
        let dense = [CompressionLevel(1), MinMatch(4)];
        let contexts = [context(&table(12))?, context(&table(13))?, context(&dense)?];
        Ok(Self { contexts, sample: Vec::with_capacity(zstd_safe::compress_bound(SAMPLE_BYTES)) })
    }

    /// Appends `data` to `out`, compressed if that pays. Returns what a pack's header says of it:
    /// the length of `data`, or 0 if it was appended as it is.
    pub(crate) fn append(&mut self, data: &[u8], choice: &Choice, out: &mut Vec<u8>) -> Result<u32> {
        let length = u32::try_from(data.len()).map_err(|_| Error::internal("a blob of 4 GiB"))?;
        if data.is_empty() || looks_random(data) {
            out.extend_from_slice(data);
            return Ok(0);
        }
        let begin = out.len();
        let manner = self.manner(data, choice)?;
        append_frame(&mut self.contexts[manner as usize], data, out)?;
        if (out.len() - begin) as u64 * 100 > data.len() as u64 * COMPRESSED_PERCENT_MAX as u64 {
            out.truncate(begin);
            out.extend_from_slice(data);
            return Ok(0);
        }
        Ok(length)
    }

    fn manner(&mut self, data: &[u8], choice: &Choice) -> Result<Manner> {
        if data.len() < SAMPLED_BYTES_MIN {
            return Ok(Manner::Light);
        }
        if let Some(manner) = choice.next() {
            return Ok(manner);
        }
        // Aligned to four, for the numbers that dense is meant for.
        let from = (data.len() / 2) & !3;
        let sample = &data[from..from + SAMPLE_BYTES];
        let mut lengths = [0; 3];
        for (length, context) in lengths.iter_mut().zip(&mut self.contexts) {
            self.sample.clear();
            append_frame(context, sample, &mut self.sample)?;
            *length = self.sample.len();
        }
        let [light, wide, dense] = lengths;
        let manner = if dense * 1000 < light * DENSE_PERMILLE_MAX {
            Manner::Dense
        } else if wide * 1000 < light * WIDE_PERMILLE_MAX {
            Manner::Wide
        } else {
            Manner::Light
        };
        Ok(choice.decide(manner))
    }
}

fn context(parameters: &[CParameter]) -> Result<CCtx<'static>> {
    let mut context = CCtx::create();
    for parameter in parameters {
        context.set_parameter(*parameter).map_err(|code| zstd_error("zstd refuses a parameter", code))?;
    }
    Ok(context)
}

fn append_frame(context: &mut CCtx<'_>, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
    out.reserve(zstd_safe::compress_bound(data.len()));
    let mut place = Cursor::new(&mut *out);
    place.set_position(place.get_ref().len() as u64);
    context.compress2(&mut place, data).map_err(|code| zstd_error("zstd cannot compress", code))?;
    Ok(())
}

fn zstd_error(message: &str, code: usize) -> Error {
    Error::internal(message).context("zstd", zstd_safe::get_error_name(code))
}

/// Whether the bytes come about as evenly as random ones would, in eight places.
///
/// With n bytes counted, the squares of the 256 counts sum up to n²/256 + n on average if they are
/// random; a little more is allowed.
fn looks_random(data: &[u8]) -> bool {
    const PLACES: usize = 8;
    const PLACE_BYTES: usize = 512;
    if data.len() < PROBED_BYTES_MIN {
        return false;
    }
    let mut counts = [0_u32; 256];
    let mut counted = 0.0;
    let step = (data.len() / PLACES).max(PLACE_BYTES);
    for place in data.chunks(step).filter_map(|part| part.get(..PLACE_BYTES)) {
        for byte in place {
            counts[usize::from(*byte)] += 1;
        }
        counted += PLACE_BYTES as f64;
    }
    let squares: f64 = counts.iter().map(|count| f64::from(*count) * f64::from(*count)).sum();
    squares < counted * counted / 256.0 * 1.06 + counted * 1.25
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(1);
        (0..length / 4).flat_map(|_| ((random.f32() * 100.0).round() / 100.0).to_le_bytes()).collect()
    }

    fn random(length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        fastrand::Rng::with_seed(2).fill(&mut data);
        data
    }

    fn survives(data: &[u8]) -> u32 {
        let mut out = b"before".to_vec();
        let uncompressed = Compressor::new().unwrap().append(data, &Choice::default(), &mut out).unwrap();
        assert!(out.starts_with(b"before"));
        if uncompressed == 0 {
            assert_eq!(&out[6..], data);
        } else {
            assert_eq!(zstd::bulk::decompress(&out[6..], uncompressed as usize).unwrap(), data);
            assert!(out.len() - 6 < data.len());
        }
        uncompressed
    }

    proptest! {
        #[test]
        fn any_bytes_survive(data: Vec<u8>, times in 1..500_usize) {
            survives(&data.repeat(times));
        }
    }

    #[test]
    fn random_bytes_are_stored_raw_and_others_are_not() {
        assert_eq!(survives(&random(1 << 20)), 0);
        assert_eq!(survives(&random(4096)), 0);
        assert_eq!(survives(b""), 0);
        assert_eq!(survives(&numbers(1 << 20)), 1 << 20);
        assert_eq!(survives("a line of text\n".repeat(10_000).as_bytes()), 150_000);
    }

    /// Numbers of few kinds: matches of 4 bytes and not of 6.
    fn few_numbers(length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(1);
        let kinds: Vec<_> = (0..300).map(|_| random.u32(..)).collect();
        (0..length / 4).flat_map(|_| kinds[random.usize(..300)].to_le_bytes()).collect()
    }

    #[test]
    fn a_sample_decides_for_eight_blobs() {
        let text = b"line 1 of many that are all but alike\nline 2 of many\n".repeat(20_000);
        for (data, manner) in [(few_numbers(1 << 20), Manner::Dense), (text, Manner::Light)] {
            let choice = Choice::default();
            Compressor::new().unwrap().append(&data, &choice, &mut Vec::new()).unwrap();
            let answers: Vec<_> = (0..8).map(|_| choice.next()).collect();
            assert_eq!(answers[..7], [Some(manner); 7]);
            assert_eq!(answers[7], None);
        }
    }
}
