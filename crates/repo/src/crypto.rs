//! Seals and opens bytes as restic does: AES-256 in counter mode, then Poly1305-AES.
//!
//! A sealed message is 16 bytes of random nonce, the ciphertext, and 16 bytes of authenticator over
//! the ciphertext. The one-time key of Poly1305 is `r`, masked, and the nonce encrypted with AES-128
//! under `k`. Everything that lies in a repository, but for key files, is sealed this way.

use std::fmt;

use aes::{Aes128, Aes256};
use ctr::cipher::{BlockCipherEncrypt, InnerIvInit, KeyInit, StreamCipher};
use hmac::{Hmac, Mac};
use poly1305::Poly1305;
use poly1305::universal_hash::UniversalHash;
use sha2::Sha256;
use stillpoint_core::error::{Error, Kind, Result};

use crate::format::key::{Base64, MacKeyJson, MasterKeyJson};
use crate::format::pack::SEAL_BYTES;

/// Length of a nonce and of an authenticator.
pub(crate) const BLOCK_BYTES: usize = 16;

/// Bytes that are encrypted and authenticated in one go, so that the second finds them in the
/// first-level cache.
const STEP_BYTES: usize = 16 << 10;

/// The key that everything in a repository is sealed with. `Debug` never shows it.
#[derive(Clone)]
pub(crate) struct MasterKey {
    encrypt: [u8; 32],
    mac_k: [u8; 16],
    mac_r: [u8; 16],
}

impl MasterKey {
    /// A key of 64 bytes, in the order in which restic's scrypt yields them.
    pub(crate) fn from_bytes(bytes: &[u8; 64]) -> Self {
        let mut key = Self { encrypt: [0; 32], mac_k: [0; 16], mac_r: [0; 16] };
        key.encrypt.copy_from_slice(&bytes[..32]);
        key.mac_k.copy_from_slice(&bytes[32..48]);
        key.mac_r.copy_from_slice(&bytes[48..]);
        key
    }

    /// Draws a new key.
    pub(crate) fn generate() -> Result<Self> {
        Ok(Self::from_bytes(&random()?))
    }

    /// Reads the JSON that a key file's `data` holds once opened.
    pub(crate) fn parse(json: &[u8]) -> Result<Self> {
        let bad = || Error::new(Kind::Corrupt, "a key file holds no master key");
        let json: MasterKeyJson = serde_json::from_slice(json).map_err(|error| bad().source(error))?;
        let part = |bytes: &Base64, length: usize| if bytes.0.len() == length { Ok(()) } else { Err(bad()) };
        part(&json.encrypt, 32)?;
        part(&json.mac.k, 16)?;
        part(&json.mac.r, 16)?;
        let mut all = [0; 64];
        all[..32].copy_from_slice(&json.encrypt.0);
        all[32..48].copy_from_slice(&json.mac.k.0);
        all[48..].copy_from_slice(&json.mac.r.0);
        Ok(Self::from_bytes(&all))
    }

    /// The JSON for a key file.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let json = MasterKeyJson {
            mac: MacKeyJson { k: Base64(self.mac_k.to_vec()), r: Base64(self.mac_r.to_vec()) },
            encrypt: Base64(self.encrypt.to_vec()),
        };
        serde_json::to_vec(&json).expect("plain fields always serialize")
    }

    /// HMAC-SHA256 of `bytes` under a key derived for `purpose`, so that what is authenticated for
    /// one purpose proves nothing for another.
    pub(crate) fn authenticate(&self, purpose: &str, bytes: &[u8]) -> [u8; 32] {
        let derived = hmac(&self.encrypt, format!("stillpoint authenticate v1\0{purpose}").as_bytes());
        hmac(&derived, bytes)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(secret)")
    }
}

fn hmac(key: &[u8], bytes: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(bytes);
    mac.finalize().into_bytes().into()
}

/// Draws random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(Kind::Io, "the operating system yields no random bytes").context("cause", error))?;
    Ok(bytes)
}

/// Hands out random nonces, drawn 256 at a time.
#[derive(Debug)]
pub(crate) struct Nonces {
    drawn: [u8; 256 * BLOCK_BYTES],
    used: usize,
}

impl Nonces {
    pub(crate) fn new() -> Self {
        Self { drawn: [0; 256 * BLOCK_BYTES], used: 256 * BLOCK_BYTES }
    }

    pub(crate) fn next(&mut self) -> Result<[u8; BLOCK_BYTES]> {
        if self.used == self.drawn.len() {
            self.drawn = random()?;
            self.used = 0;
        }
        let mut nonce = [0; BLOCK_BYTES];
        nonce.copy_from_slice(&self.drawn[self.used..self.used + BLOCK_BYTES]);
        self.used += BLOCK_BYTES;
        Ok(nonce)
    }
}

/// A master key made ready for use: round keys expanded.
#[derive(Clone)]
pub(crate) struct Cipher {
    data: Aes256,
    pad: Aes128,
    mac_r: [u8; 16],
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(secret)")
    }
}

impl Cipher {
    pub(crate) fn new(key: &MasterKey) -> Self {
        Self { data: Aes256::new(&key.encrypt.into()), pad: Aes128::new(&key.mac_k.into()), mac_r: key.mac_r }
    }

    /// Encrypts `data` in place and returns its authenticator. The nonce must be new.
    pub(crate) fn seal_in_place(&self, nonce: &[u8; BLOCK_BYTES], data: &mut [u8]) -> [u8; BLOCK_BYTES] {
        let mut stream = self.stream(nonce);
        let mut mac = self.mac(nonce);
        let whole = data.len() / STEP_BYTES * STEP_BYTES;
        let (steps, last) = data.split_at_mut(whole);
        for step in steps.chunks_exact_mut(STEP_BYTES) {
            stream.apply_keystream(step);
            mac.update_padded(step);
        }
        stream.apply_keystream(last);
        mac.compute_unpadded(last).into()
    }

    /// Seals a message that need not be fast: nonce, ciphertext, authenticator.
    pub(crate) fn seal(&self, plain: &[u8]) -> Result<Vec<u8>> {
        let nonce = random()?;
        let mut sealed = Vec::with_capacity(plain.len() + SEAL_BYTES as usize);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(plain);
        let mac = self.seal_in_place(&nonce, &mut sealed[BLOCK_BYTES..]);
        sealed.extend_from_slice(&mac);
        Ok(sealed)
    }

    /// Checks and decrypts a sealed message into `plain`, which must be [`SEAL_BYTES`] shorter. When
    /// the authenticator is wrong, `plain` is wiped and the error is `Corrupt`.
    pub(crate) fn open_to(&self, sealed: &[u8], plain: &mut [u8]) -> Result<()> {
        let bad = || Error::new(Kind::Corrupt, "bytes are damaged or sealed with another key");
        let (nonce, rest) = sealed.split_first_chunk::<BLOCK_BYTES>().ok_or_else(bad)?;
        let (data, authenticator) = rest.split_last_chunk::<BLOCK_BYTES>().ok_or_else(bad)?;
        if plain.len() != data.len() {
            return Err(Error::internal("the space for plain bytes has another length than the bytes"));
        }
        // Decrypted along with the check, while the bytes are in the first-level cache; what fails the
        // check is wiped before anyone sees it.
        let (mut stream, mut mac) = (self.stream(nonce), self.mac(nonce));
        let whole = data.len() / STEP_BYTES * STEP_BYTES;
        for (from, to) in data[..whole].chunks_exact(STEP_BYTES).zip(plain.chunks_exact_mut(STEP_BYTES)) {
            mac.update_padded(from);
            stream.apply_keystream_b2b(from, to);
        }
        stream.apply_keystream_b2b(&data[whole..], &mut plain[whole..]);
        let mac: [u8; BLOCK_BYTES] = mac.compute_unpadded(&data[whole..]).into();
        if differs(&mac, authenticator) {
            plain.fill(0);
            return Err(bad());
        }
        Ok(())
    }

    /// Like [`Cipher::open_to`], into `plain`, which is overwritten whole.
    pub(crate) fn open_into(&self, sealed: &[u8], plain: &mut Vec<u8>) -> Result<()> {
        plain.resize(sealed.len().saturating_sub(SEAL_BYTES as usize), 0);
        self.open_to(sealed, plain)
    }

    fn stream(&self, nonce: &[u8; BLOCK_BYTES]) -> ctr::Ctr128BE<Aes256> {
        ctr::Ctr128BE::from_core(ctr::CtrCore::inner_iv_init(self.data.clone(), nonce.into()))
    }

    fn mac(&self, nonce: &[u8; BLOCK_BYTES]) -> Poly1305 {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&self.mac_r);
        for index in [3, 7, 11, 15] {
            key[index] &= 15;
        }
        for index in [4, 8, 12] {
            key[index] &= 252;
        }
        let mut pad = (*nonce).into();
        self.pad.encrypt_block(&mut pad);
        key[16..].copy_from_slice(&pad);
        Poly1305::new(&key.into())
    }
}

/// Whether two authenticators differ, in a time that tells nothing of where.
fn differs(a: &[u8], b: &[u8]) -> bool {
    a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cipher() -> Cipher {
        let mut bytes = [0; 64];
        for (number, byte) in bytes.iter_mut().enumerate() {
            *byte = number as u8;
        }
        Cipher::new(&MasterKey::from_bytes(&bytes))
    }

    #[test]
    fn poly1305_aes_agrees_with_the_vector_of_its_inventor() {
        // Bernstein, "The Poly1305-AES message-authentication code", appendix B, first vector.
        let hex = |text: &str| hex::decode(text).unwrap();
        let mut key = [0; 64];
        key[32..48].copy_from_slice(&hex("ec074c835580741701425b623235add6"));
        key[48..].copy_from_slice(&hex("851fc40c3467ac0be05cc20404f3f700"));
        let nonce: [u8; 16] = hex("fb447350c4e868c52ac3275cf9d4327e").try_into().unwrap();
        let mac = Cipher::new(&MasterKey::from_bytes(&key)).mac(&nonce).compute_unpadded(&hex("f3f6"));
        assert_eq!(mac.to_vec(), hex("f4c633c3044fc145f84f335cb81953de"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn sealed_bytes_open_and_no_flipped_bit_does(length in 0..70_000_usize, flip: u64) {
            let plain: Vec<u8> = (0..length).map(|number| (number * 31) as u8).collect();
            let mut sealed = cipher().seal(&plain).unwrap();
            let mut opened = Vec::new();
            cipher().open_into(&sealed, &mut opened).unwrap();
            prop_assert_eq!(&opened, &plain);
            let bit = flip as usize % (sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(cipher().open_into(&sealed, &mut opened).unwrap_err().kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn what_is_too_short_is_corrupt() {
        for length in 0..32 {
            assert!(cipher().open_into(&vec![0; length], &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn purposes_are_kept_apart() {
        let key = MasterKey::from_bytes(&[5; 64]);
        assert_ne!(key.authenticate("a", b"x"), key.authenticate("b", b"x"));
        assert_eq!(key.authenticate("a", b"x"), MasterKey::parse(&key.to_json()).unwrap().authenticate("a", b"x"));
    }
}
