//! Cuts streams into chunks where their content says so, so that an insertion moves no cut but the
//! ones beside it.
//!
//! A gear hash runs over the bytes: each byte shifts it by one and adds a random number from a
//! table, so that it depends on the last 63 bytes. A chunk ends where certain bits of it are zero:
//! more bits before the average length, fewer after (as in FastCDC). The table is secret and the
//! repository's own, for with a known one the lengths of chunks would tell which known files are
//! stored. docs/formats.md has the numbers; changing any of them costs all deduplication with what
//! is stored already.

use sha2::{Digest, Sha256};

/// No chunk is shorter, but for the last of a stream. A shorter stream is one chunk.
pub(crate) const CHUNK_BYTES_MIN: usize = 512 << 10;
/// Where the condition for a cut becomes weaker.
const CHUNK_BYTES_NORMAL: usize = 1 << 20;
/// No chunk is longer.
pub(crate) const CHUNK_BYTES_MAX: usize = 8 << 20;

/// 21 bits that must be zero up to the normal length, and 19 beyond it. The topmost bits see the
/// most bytes; the very first is left out, so that the hash may be shifted once more unseen.
const STRICT: u64 = ((1 << 21) - 1) << (63 - 21);
const LOOSE: u64 = ((1 << 19) - 1) << (63 - 19);

/// The cutting rule of one repository.
pub(crate) struct Chunker {
    gear: Box<[u64; 256]>,
    /// Each number of `gear`, shifted once.
    gear_shifted: Box<[u64; 256]>,
}

/// How far the current chunk of a stream was looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cursor {
    scanned: usize,
    hash: u64,
}

impl Chunker {
    /// The rule of a repository with this chunker polynomial.
    pub(crate) fn new(polynomial: u64) -> Self {
        let mut gear = Box::new([0; 256]);
        for (block, numbers) in (0_u64..).zip(gear.chunks_exact_mut(4)) {
            let mut hasher = Sha256::new_with_prefix("stillpoint gear v1\0");
            hasher.update(polynomial.to_le_bytes());
            hasher.update(block.to_le_bytes());
            let hash = hasher.finalize();
            for (number, bytes) in numbers.iter_mut().zip(hash.chunks_exact(8)) {
                *number = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
            }
        }
        let gear_shifted = Box::new(gear.map(|number| number << 1));
        Self { gear, gear_shifted }
    }

    /// The length of the chunk that `data` begins with, or `None` if it goes on behind `data`.
    ///
    /// `cursor` remembers what was looked at; it belongs to the stream, and `data` must begin where
    /// the chunk begins, at every call.
    pub(crate) fn cut(&self, data: &[u8], cursor: &mut Cursor) -> Option<usize> {
        let end = data.len().min(CHUNK_BYTES_MAX);
        let Cursor { scanned, mut hash } = *cursor;
        let mut at = scanned.max(CHUNK_BYTES_MIN);
        for (border, mask) in [(CHUNK_BYTES_NORMAL, STRICT), (CHUNK_BYTES_MAX, LOOSE)] {
            let to = end.min(border);
            if at < to {
                if let Some(length) = self.scan(&data[at..to], mask, &mut hash) {
                    *cursor = Cursor::default();
                    return Some(at + length);
                }
                at = to;
            }
        }
        if end == CHUNK_BYTES_MAX {
            *cursor = Cursor::default();
            return Some(end);
        }
        *cursor = Cursor { scanned: at.min(data.len()), hash };
        None
    }

    /// How many bytes of `data` are taken when the bits of `mask` are zero for the first time.
    ///
    /// Two bytes a turn: after the first the hash stands shifted once too far, and so does what it
    /// is compared with.
    #[inline]
    fn scan(&self, data: &[u8], mask: u64, hash: &mut u64) -> Option<usize> {
        let mut sum = *hash;
        let pairs = data.chunks_exact(2);
        let last = pairs.remainder();
        for (number, pair) in pairs.enumerate() {
            sum = (sum << 2).wrapping_add(self.gear_shifted[usize::from(pair[0])]);
            if sum & (mask << 1) == 0 {
                return Some(number * 2 + 1);
            }
            sum = sum.wrapping_add(self.gear[usize::from(pair[1])]);
            if sum & mask == 0 {
                return Some(number * 2 + 2);
            }
        }
        if let [byte] = last {
            sum = (sum << 1).wrapping_add(self.gear[usize::from(*byte)]);
            if sum & mask == 0 {
                return Some(data.len());
            }
        }
        *hash = sum;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn random(length: usize, seed: u64) -> Vec<u8> {
        let mut data = vec![0; length];
        fastrand::Rng::with_seed(seed).fill(&mut data);
        data
    }

    /// The lengths of all chunks when the stream arrives in pieces of these lengths.
    fn lengths(chunker: &Chunker, data: &[u8], pieces: &mut dyn FnMut() -> usize) -> Vec<usize> {
        let (mut lengths, mut cursor, mut begin, mut end) = (vec![], Cursor::default(), 0, 0);
        while begin < data.len() {
            match chunker.cut(&data[begin..end], &mut cursor) {
                Some(length) => {
                    lengths.push(length);
                    begin += length;
                }
                None if end == data.len() => {
                    lengths.push(end - begin);
                    begin = end;
                }
                None => end = (end + pieces().max(1)).min(data.len()),
            }
        }
        lengths
    }

    /// The rule as the documentation states it, byte by byte.
    fn by_the_book(chunker: &Chunker, data: &[u8]) -> Vec<usize> {
        let (mut lengths, mut begin) = (vec![], 0);
        while begin < data.len() {
            let rest = &data[begin..];
            let mut hash = 0_u64;
            let mut length = rest.len().min(CHUNK_BYTES_MAX);
            for (at, byte) in rest.iter().enumerate().take(length).skip(CHUNK_BYTES_MIN) {
                hash = (hash << 1).wrapping_add(chunker.gear[usize::from(*byte)]);
                let bits = if at < CHUNK_BYTES_NORMAL { 21 } else { 19 };
                if hash << 1 >> (64 - bits) == 0 {
                    length = at + 1;
                    break;
                }
            }
            lengths.push(length);
            begin += length;
        }
        lengths
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn cuts_depend_on_content_and_not_on_how_it_arrives(seed: u64, pieces: u64, length in 0..20_000_000_usize) {
            let chunker = Chunker::new(seed);
            let data = random(length, seed);
            let mut sizes = fastrand::Rng::with_seed(pieces);
            let found = lengths(&chunker, &data, &mut || sizes.usize(1..3_000_000));
            prop_assert_eq!(found, by_the_book(&chunker, &data));
        }

        #[test]
        fn an_insertion_moves_few_cuts(seed: u64, at in 0..16_000_000_usize, inserted in 1..100_usize) {
            let chunker = Chunker::new(7);
            let mut data = random(24_000_000, seed);
            let ends = |data: &[u8]| {
                let mut end = 0;
                let sum = |length| { end += length; data.len() - end };
                lengths(&chunker, data, &mut || usize::MAX / 2).into_iter().map(sum).collect::<std::collections::HashSet<_>>()
            };
            let before = ends(&data);
            data.splice(at..at, random(inserted, !seed));
            let after = ends(&data);
            // Counted from the end, cuts behind the insertion are where they were, once in step again.
            let kept = before.intersection(&after).count();
            prop_assert!(kept >= 2, "{} of {} cuts kept", kept, before.len());
        }
    }

    #[test]
    fn lengths_stay_within_bounds() {
        let chunker = Chunker::new(1);
        let data = random(64 << 20, 3);
        let found = lengths(&chunker, &data, &mut || usize::MAX / 2);
        let (_, inner) = found.split_last().unwrap();
        assert!(inner.iter().all(|length| (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(length)));
        let mean = data.len() / found.len();
        assert!((900_000..1_500_000).contains(&mean), "mean {mean}");
        // A run of one byte never meets the condition, or always: here never.
        assert_eq!(lengths(&chunker, &vec![0; 20 << 20], &mut || 1 << 20), [8 << 20, 8 << 20, 4 << 20]);
    }

    #[test]
    fn each_repository_cuts_its_own_way() {
        let data = random(8 << 20, 3);
        let cut = |polynomial| lengths(&Chunker::new(polynomial), &data, &mut || usize::MAX / 2);
        assert_eq!(cut(5), cut(5));
        assert_ne!(cut(5), cut(6));
    }
}
