//! Which parts of a file must be written, and which become holes.
//!
//! Apart because it is pure. A restored file starts as one hole of its full length, so runs of
//! zeros need no write. Short runs are written all the same: many tiny holes cost more than they
//! save.

use std::ops::Range;

/// Granularity of holes: the block of common file systems.
const BLOCK_BYTES: usize = 4096;
/// Shortest run of zero blocks that is left out.
const HOLE_BYTES_MIN: usize = 16 * 1024;

/// Calls `write` with each part of `data` that is no hole, in order. `offset` is where `data`
/// begins in its file.
pub(crate) fn parts<E>(
    data: &[u8],
    offset: u64,
    mut write: impl FnMut(Range<usize>) -> Result<(), E>,
) -> Result<(), E> {
    if data.len() < HOLE_BYTES_MIN {
        return write(0..data.len());
    }
    let first = (BLOCK_BYTES - usize::try_from(offset % BLOCK_BYTES as u64).expect("below 4096")) % BLOCK_BYTES;
    let (mut begin, mut at) = (0, first);
    while at + BLOCK_BYTES <= data.len() {
        if !is_zero(&data[at..at + BLOCK_BYTES]) {
            at += BLOCK_BYTES;
            continue;
        }
        let mut end = at + BLOCK_BYTES;
        while end + BLOCK_BYTES <= data.len() && is_zero(&data[end..end + BLOCK_BYTES]) {
            end += BLOCK_BYTES;
        }
        if end - at >= HOLE_BYTES_MIN {
            if begin < at {
                write(begin..at)?;
            }
            begin = end;
        }
        at = end;
    }
    if begin < data.len() { write(begin..data.len()) } else { Ok(()) }
}

/// Whether a block holds only zeros; ordinary data is told from its first bytes.
fn is_zero(block: &[u8]) -> bool {
    block[..16] == [0; 16] && block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(data: &[u8], offset: u64) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        parts(data, offset, |range| {
            ranges.push(range);
            Ok::<(), ()>(())
        })
        .expect("never fails");
        ranges
    }

    #[test]
    fn long_zero_runs_are_left_out_and_short_ones_written() {
        let mut data = vec![1_u8; 100_000];
        data[8192..8192 + 20_480].fill(0);
        data[40_000..44_000].fill(0);
        assert_eq!(written(&data, 0), [0..8192, 28_672..100_000]);
        assert_eq!(written(&data, 8192), [0..8192, 28_672..100_000]);
        assert_eq!(written(&data, 1), [0..12_287, 28_671..100_000], "holes stay block aligned");
    }

    #[test]
    fn all_zeros_write_nothing_and_small_data_is_written_whole() {
        assert!(written(&vec![0; 1 << 20], 0).is_empty());
        let whole = written(&[0; 100], 0);
        assert_eq!((whole.len(), whole[0].clone()), (1, 0..100));
    }

    #[test]
    fn what_is_written_plus_zeros_is_the_data() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let mut data = vec![0_u8; random.usize(0..200_000)];
            for _ in 0..random.usize(0..6) {
                let end = random.usize(0..=data.len());
                let begin = random.usize(0..=end);
                data[begin..end].fill(random.u8(..));
            }
            let mut rebuilt = vec![0_u8; data.len()];
            for range in written(&data, random.u64(0..1 << 30)) {
                rebuilt[range.clone()].copy_from_slice(&data[range]);
            }
            assert_eq!(rebuilt, data);
        }
    }
}
