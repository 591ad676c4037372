//! SHA-256's compression function with the x86 SHA extensions, for one or two messages at once.

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_loadu_si128, _mm_set_epi64x, _mm_setzero_si128, _mm_sha256msg1_epu32,
    _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
};

const BLOCK_BYTES: usize = 64;

/// The round constants: fractional parts of the cube roots of the first 64 primes.
static ROUND: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
    0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
    0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
    0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2,
];

/// The state between two blocks, in the order in which the instructions want it.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    /// F, E, B, A.
    feba: [u32; 4],
    /// H, G, D, C.
    hgdc: [u32; 4],
}

impl State {
    /// Before the first block: fractional parts of the square roots of the first 8 primes.
    pub(super) const INITIAL: Self = Self {
        feba: [0x9b05688c, 0x510e527f, 0xbb67ae85, 0x6a09e667],
        hgdc: [0x5be0cd19, 0x1f83d9ab, 0xa54ff53a, 0x3c6ef372],
    };

    fn digest(&self) -> [u8; 32] {
        let ([f, e, b, a], [h, g, d, c]) = (self.feba, self.hgdc);
        let mut digest = [0; 32];
        for (bytes, word) in digest.chunks_exact_mut(4).zip([a, b, c, d, e, f, g, h]) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        digest
    }
}

/// Whether this CPU has the instructions.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("sha") && is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("sse4.1")
}

/// Takes the first `blocks` blocks of each message into its state. Panics if a message is shorter,
/// or if [`available`] is false.
pub(super) fn compress<const LANES: usize>(states: [&mut State; LANES], messages: [&[u8]; LANES], blocks: usize) {
    assert!(messages.iter().all(|message| message.len() / BLOCK_BYTES >= blocks), "a message is too short");
    assert!(available(), "the CPU lacks the instructions");
    // SAFETY: the instructions are there, and each message has `blocks` blocks.
    unsafe { compress_lanes(states, messages.map(<[u8]>::as_ptr), blocks) }
}

/// # Safety
/// Each pointer must be valid for reads of `blocks` times 64 bytes.
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
unsafe fn compress_lanes<const LANES: usize>(states: [&mut State; LANES], mut from: [*const u8; LANES], blocks: usize) {
    let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let mut upper = [_mm_setzero_si128(); LANES];
    let mut lower = [_mm_setzero_si128(); LANES];
    for lane in 0..LANES {
        // SAFETY: an array of four words is 16 bytes, and the load needs no alignment.
        unsafe {
            upper[lane] = _mm_loadu_si128(states[lane].feba.as_ptr().cast());
            lower[lane] = _mm_loadu_si128(states[lane].hgdc.as_ptr().cast());
        }
    }
    for _ in 0..blocks {
        let (upper_before, lower_before) = (upper, lower);
        let mut words = [[_mm_setzero_si128(); 4]; LANES];
        // Four rounds each; the steps are spelled out so that every index is a constant.
        macro_rules! rounds {
            ($($step:literal)*) => {$(
                for lane in 0..LANES {
                    if $step < 4 {
                        // SAFETY: the caller vouches for 64 bytes, of which this reads 16.
                        let raw = unsafe { _mm_loadu_si128(from[lane].add($step * 16).cast()) };
                        words[lane][$step % 4] = _mm_shuffle_epi8(raw, swap);
                    }
                    // SAFETY: `ROUND` has 64 words, and `$step` is below 16.
                    let constant = unsafe { _mm_loadu_si128(ROUND.as_ptr().add($step * 4).cast()) };
                    four_rounds::<$step>(&mut upper[lane], &mut lower[lane], &mut words[lane], constant);
                }
            )*};
        }
        rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        for lane in 0..LANES {
            upper[lane] = _mm_add_epi32(upper[lane], upper_before[lane]);
            lower[lane] = _mm_add_epi32(lower[lane], lower_before[lane]);
            // SAFETY: stays within the bytes that the caller vouches for, or one past them.
            from[lane] = unsafe { from[lane].add(BLOCK_BYTES) };
        }
    }
    for lane in 0..LANES {
        // SAFETY: as for the loads.
        unsafe {
            _mm_storeu_si128(states[lane].feba.as_mut_ptr().cast(), upper[lane]);
            _mm_storeu_si128(states[lane].hgdc.as_mut_ptr().cast(), lower[lane]);
        }
    }
}

/// Four rounds, and the part of the message schedule that a later step needs.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn four_rounds<const STEP: usize>(
    upper: &mut __m128i,
    lower: &mut __m128i,
    words: &mut [__m128i; 4],
    constant: __m128i,
) {
    let (now, before, after) = (STEP % 4, (STEP + 3) % 4, (STEP + 1) % 4);
    let input = _mm_add_epi32(words[now], constant);
    *lower = _mm_sha256rnds2_epu32(*lower, *upper, input);
    if STEP >= 3 && STEP < 15 {
        let shifted = _mm_alignr_epi8(words[now], words[before], 4);
        words[after] = _mm_sha256msg2_epu32(_mm_add_epi32(words[after], shifted), words[now]);
    }
    *upper = _mm_sha256rnds2_epu32(*upper, *lower, _mm_shuffle_epi32(input, 0x0e));
    if STEP >= 1 && STEP < 13 {
        words[before] = _mm_sha256msg1_epu32(words[before], words[now]);
    }
}

/// Pads and takes the last, incomplete block of a message of `length` bytes.
pub(super) fn finish(mut state: State, tail: &[u8], length: u64) -> [u8; 32] {
    let mut last = [0; 2 * BLOCK_BYTES];
    last[..tail.len()].copy_from_slice(tail);
    last[tail.len()] = 0x80;
    let blocks = if tail.len() < BLOCK_BYTES - 8 { 1 } else { 2 };
    let end = blocks * BLOCK_BYTES;
    last[end - 8..end].copy_from_slice(&(length * 8).to_be_bytes());
    compress([&mut state], [&last], blocks);
    state.digest()
}
