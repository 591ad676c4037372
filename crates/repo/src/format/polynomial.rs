//! Irreducible polynomials over GF(2): restic's configuration must hold one of degree 53.
//!
//! Our chunker does not compute with it, restic's does when both write to one repository. We take
//! the seed of our gear table from it, so that repositories made with the same polynomial cut
//! alike.

/// The degree that restic asks for.
const DEGREE: u32 = 53;

/// Makes the first irreducible polynomial of degree 53 from random candidates that `draw` yields.
///
/// One candidate in about 26 is irreducible, so this ends soon.
pub fn generate<E>(mut draw: impl FnMut() -> Result<u64, E>) -> Result<u64, E> {
    loop {
        let candidate = draw()? & ((1 << DEGREE) - 1) | 1 << DEGREE | 1;
        if is_irreducible(candidate) {
            return Ok(candidate);
        }
    }
}

/// Whether `polynomial` is of degree 53 and has no factor: Ben-Or's test, which looks for a common
/// factor with `x^(2^i) - x` for every `i` up to half the degree.
pub fn is_irreducible(polynomial: u64) -> bool {
    if polynomial >> DEGREE != 1 {
        return false;
    }
    let mut power = 2;
    for _ in 1..=DEGREE / 2 {
        power = multiply_modulo(power, power, polynomial);
        if greatest_common_divisor(polynomial, power ^ 2) != 1 {
            return false;
        }
    }
    true
}

fn multiply_modulo(mut a: u64, mut b: u64, modulus: u64) -> u64 {
    let mut product = 0;
    while b != 0 {
        if b & 1 == 1 {
            product ^= a;
        }
        b >>= 1;
        a <<= 1;
        if a >> DEGREE & 1 == 1 {
            a ^= modulus;
        }
    }
    product
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        while a != 0 && a.leading_zeros() <= b.leading_zeros() {
            a ^= b << (b.leading_zeros() - a.leading_zeros());
        }
        std::mem::swap(&mut a, &mut b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_polynomials_are_judged_right() {
        // The polynomial that restic's own tests use, and products of small factors.
        assert!(is_irreducible(0x3DA3358B4DC173));
        assert!(!is_irreducible(0x3DA3358B4DC172));
        assert!(!is_irreducible(1 << 53 | 1));
        assert!(!is_irreducible(0x3DA3358B4DC173 >> 1));
        assert!(!is_irreducible(0) && !is_irreducible(u64::MAX));
    }

    #[test]
    fn about_one_candidate_in_26_is_irreducible() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut drawn = 0;
        for _ in 0..20 {
            let made = generate(|| {
                drawn += 1;
                Ok::<_, ()>(random.u64(..))
            });
            assert!(is_irreducible(made.unwrap()));
        }
        assert!((200..1500).contains(&drawn), "{drawn}");
    }
}
