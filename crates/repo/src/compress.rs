//! Compresses and decompresses blobs with zstd, each file with the parameters that suit it.
//!
//! Two sets of parameters: *light* finds matches of 6 bytes and skips ahead where it finds none,
//! *dense* looks for matches of 4, which pays for binary numbers and little else. A sample of a
//! file decides. What looks random is stored as it is, without an attempt.

use std::cell::RefCell;
use std::io::Cursor;
use std::sync::atomic::{AtomicU32, Ordering};

use stillpoint_core::error::{Error, Kind, Result};
use zstd_safe::{CCtx, CParameter, DCtx, ParamSwitch};

/// Bytes of the sample that is compressed both ways.
const SAMPLE_BYTES: usize = 32 << 10;
/// Shorter blobs are compressed lightly without a sample.
const SAMPLED_BYTES_MIN: usize = 64 << 10;
/// Blobs of a file that one sample decides for.
const SAMPLE_BLOBS: u32 = 8;
/// Dense must come to so many percent of light.
const DENSE_PERCENT_MAX: usize = 90;
/// A blob that compresses to more than this is stored raw: reading it is cheaper.
const COMPRESSED_PERCENT_MAX: usize = 98;
/// Shorter blobs say too little of their bytes to tell whether they are random.
const PROBED_BYTES_MIN: usize = 1024;

/// What the last sample of a file said; shared by the workers that compress it. They may race: the
/// worst that comes of it is one sample more.
#[derive(Debug, Default)]
pub(crate) struct Choice(AtomicU32);

impl Choice {
    /// Whether the next blob is to be dense, if a sample has said so lately.
    fn next(&self) -> Option<bool> {
        let state = self.0.load(Ordering::Relaxed);
        let left = state >> 1;
        if left == 0 {
            return None;
        }
        self.0.store((left - 1) << 1 | state & 1, Ordering::Relaxed);
        Some(state & 1 == 1)
    }

    fn decide(&self, dense: bool) -> bool {
        self.0.store((SAMPLE_BLOBS - 1) << 1 | u32::from(dense), Ordering::Relaxed);
        dense
    }
}

/// The contexts of one worker. Making one costs more than compressing a small blob.
pub(crate) struct Compressor {
    light: CCtx<'static>,
    dense: CCtx<'static>,
    sample: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Result<Self> {
        let literals = CParameter::LiteralCompressionMode(ParamSwitch::Enable);
        // A target length makes the search skip, and turns off the coding of literals unless told.
        let light = context(&[CParameter::CompressionLevel(1), CParameter::TargetLength(4), literals])?;
        let dense = context(&[CParameter::CompressionLevel(1), CParameter::MinMatch(4)])?;
        Ok(Self { light, dense, sample: Vec::with_capacity(zstd_safe::compress_bound(SAMPLE_BYTES)) })
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
        let dense = self.is_dense(data, choice)?;
        append_frame(if dense { &mut self.dense } else { &mut self.light }, data, out)?;
        if (out.len() - begin) as u64 * 100 > data.len() as u64 * COMPRESSED_PERCENT_MAX as u64 {
            out.truncate(begin);
            out.extend_from_slice(data);
            return Ok(0);
        }
        Ok(length)
    }

    fn is_dense(&mut self, data: &[u8], choice: &Choice) -> Result<bool> {
        if data.len() < SAMPLED_BYTES_MIN {
            return Ok(false);
        }
        if let Some(dense) = choice.next() {
            return Ok(dense);
        }
        // Aligned to four, for the numbers that dense is meant for.
        let from = data.len() / 2 & !3;
        let sample = &data[from..from + SAMPLE_BYTES];
        self.sample.clear();
        append_frame(&mut self.light, sample, &mut self.sample)?;
        let light = self.sample.len();
        self.sample.clear();
        append_frame(&mut self.dense, sample, &mut self.sample)?;
        Ok(choice.decide(self.sample.len() * 100 < light * DENSE_PERCENT_MAX))
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

thread_local! {
    /// A context is 160 KB and costs more to make than a small blob to decompress.
    static CONTEXT: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Decompresses one frame of exactly `length` plain bytes into `plain`, which is overwritten.
pub(crate) fn decompress(frame: &[u8], length: usize, plain: &mut Vec<u8>) -> Result<()> {
    // A hostile index may claim any length; a frame cannot expand more than this.
    const RATIO_MAX: usize = 1 << 17;
    let bad = || Error::new(Kind::Corrupt, "a compressed blob is damaged");
    if length > frame.len().saturating_mul(RATIO_MAX) {
        return Err(bad().context("claimed length", length));
    }
    plain.clear();
    plain.reserve(length);
    let written = CONTEXT
        .with_borrow_mut(|context| context.decompress(plain, frame))
        .map_err(|code| bad().context("zstd", zstd_safe::get_error_name(code)))?;
    if written != length {
        return Err(bad().context("claimed length", length).context("length", written));
    }
    Ok(())
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
            let mut plain = Vec::new();
            decompress(&out[6..], uncompressed as usize, &mut plain).unwrap();
            assert_eq!(plain, data);
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

    #[test]
    fn a_sample_decides_for_eight_blobs() {
        let choice = Choice::default();
        let mut compressor = Compressor::new().unwrap();
        compressor.append(&numbers(1 << 20), &choice, &mut Vec::new()).unwrap();
        let answers: Vec<_> = (0..8).map(|_| choice.next()).collect();
        assert_eq!(answers[..7], [Some(true); 7]);
        assert_eq!(answers[7], None);
    }

    #[test]
    fn damaged_frames_are_errors() {
        let mut frame = Vec::new();
        Compressor::new().unwrap().append(&numbers(100_000), &Choice::default(), &mut frame).unwrap();
        let mut plain = Vec::new();
        for claimed in [0, 99_999, 100_001, usize::MAX] {
            assert_eq!(decompress(&frame, claimed, &mut plain).unwrap_err().kind(), Kind::Corrupt);
        }
        assert!(decompress(&frame[..frame.len() - 1], 100_000, &mut plain).is_err());
    }
}
