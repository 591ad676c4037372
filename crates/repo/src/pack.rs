//! Collects sealed blobs into packs.
//!
//! A pack grows in memory, is hashed as it grows (in the lane that the hashing of chunks leaves
//! idle), and is written whole. Sealed blobs do not know where they lie, so that the remains of
//! several packs can be joined.

use std::ops::Range;

use stillpoint_core::error::Result;

use crate::compress::{Choice, Compressor};
use crate::crypto::{Cipher, Nonces};
use crate::format::id::Id;
use crate::format::pack::{BlobKind, PackEntry, write_header};
use crate::simd::sha256::{Running, hash_many_beside};

/// What every worker needs to seal blobs.
pub(crate) struct Sealer {
    pub(crate) cipher: Cipher,
    pub(crate) nonces: Nonces,
}

/// A pack being filled, or filled and sealed.
pub(crate) struct Pack {
    bytes: Vec<u8>,
    entries: Vec<PackEntry>,
    running: Running,
    /// How many of `bytes` are in `running`.
    hashed: usize,
}

impl Pack {
    /// An empty pack; memory is taken as it fills.
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), entries: Vec::new(), running: Running::new(), hashed: 0 }
    }

    /// Bytes of sealed blobs.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The whole pack; complete once sealed.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The blobs in it.
    pub(crate) fn entries(&self) -> &[PackEntry] {
        &self.entries
    }

    /// Hashes `messages`, and what the pack has grown by beside them.
    pub(crate) fn hash_beside(&mut self, messages: &[&[u8]], out: &mut [Id]) {
        self.hashed += hash_many_beside(messages, out, &mut self.running, &self.bytes[self.hashed..]);
    }

    /// Adds a blob, compressed if `compressor` is given and it pays, sealed. Returns the bytes that it takes.
    pub(crate) fn add(
        &mut self,
        kind: BlobKind,
        id: Id,
        plain: &[u8],
        compressor: Option<(&mut Compressor, &Choice)>,
        sealer: &mut Sealer,
    ) -> Result<u32> {
        let begin = self.bytes.len();
        let nonce = sealer.nonces.next()?;
        self.bytes.extend_from_slice(&nonce);
        let uncompressed = match compressor {
            Some((compressor, choice)) => compressor.append(plain, choice, &mut self.bytes)?,
            None => {
                self.bytes.extend_from_slice(plain);
                0
            }
        };
        let mac = sealer.cipher.seal_in_place(&nonce, &mut self.bytes[begin + nonce.len()..]);
        self.bytes.extend_from_slice(&mac);
        let length = (self.bytes.len() - begin) as u32;
        self.entries.push(PackEntry { kind, id, offset: begin as u32, length, uncompressed });
        Ok(length)
    }

    /// Adds a blob that is sealed already, as another pack of the same repository holds it.
    pub(crate) fn add_sealed(&mut self, entry: &PackEntry, sealed: &[u8]) {
        self.entries.push(PackEntry { offset: self.bytes.len() as u32, ..*entry });
        self.bytes.extend_from_slice(sealed);
    }

    /// Moves the blobs of `other` behind the own.
    pub(crate) fn absorb(&mut self, other: &Self) {
        for entry in &other.entries {
            let place: Range<usize> = entry.offset as usize..(entry.offset + entry.length) as usize;
            self.add_sealed(entry, &other.bytes[place]);
        }
    }

    /// Appends the header and returns the pack's name. Nothing may be added any more.
    pub(crate) fn seal(&mut self, sealer: &mut Sealer) -> Result<Id> {
        let mut header = Vec::new();
        write_header(&self.entries, &mut header);
        let nonce = sealer.nonces.next()?;
        let mac = sealer.cipher.seal_in_place(&nonce, &mut header);
        let length = (nonce.len() + header.len() + mac.len()) as u32;
        for part in [&nonce[..], &header, &mac, &length.to_le_bytes()] {
            self.bytes.extend_from_slice(part);
        }
        let mut running = std::mem::replace(&mut self.running, Running::new());
        running.update(&self.bytes[self.hashed..]);
        Ok(running.finish())
    }

    /// Makes it an empty pack again, which keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
        self.running = Running::new();
        self.hashed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::MasterKey;
    use crate::format::pack::{LENGTH_FIELD_BYTES, parse_header};
    use crate::simd::sha256;

    #[test]
    fn joined_packs_are_packs() {
        let cipher = Cipher::new(&MasterKey::from_bytes(&[9; 64]));
        let mut sealer = Sealer { cipher: cipher.clone(), nonces: Nonces::new() };
        let mut compressor = Compressor::new().unwrap();
        let mut packs = [Pack::new(), Pack::new()];
        let mut blobs = Vec::new();
        for number in 0..20_usize {
            let plain = vec![number as u8; number * 100];
            let mut ids = [Id([0; 32])];
            let pack = &mut packs[number % 2];
            pack.hash_beside(&[&plain], &mut ids);
            let choice = Choice::default();
            let how = (number % 3 > 0).then_some((&mut compressor, &choice));
            pack.add(BlobKind::Data, ids[0], &plain, how, &mut sealer).unwrap();
            blobs.push((ids[0], plain));
        }
        let [mut pack, other] = packs;
        pack.absorb(&other);
        let name = pack.seal(&mut sealer).unwrap();
        assert_eq!(name, sha256::hash(pack.bytes()));
        let (rest, length) = pack.bytes().split_last_chunk::<LENGTH_FIELD_BYTES>().unwrap();
        let at = rest.len() - u32::from_le_bytes(*length) as usize;
        let mut header = Vec::new();
        cipher.open_into(&rest[at..], &mut header).unwrap();
        let entries = parse_header(&header, at as u64).unwrap();
        assert_eq!(entries, pack.entries());
        for (id, plain) in blobs {
            let entry = entries.iter().find(|entry| entry.id == id).unwrap();
            let mut opened = Vec::new();
            cipher.open_into(&rest[entry.offset as usize..][..entry.length as usize], &mut opened).unwrap();
            if entry.uncompressed > 0 {
                opened = zstd::bulk::decompress(&opened, entry.uncompressed as usize).unwrap();
            }
            assert_eq!(opened, plain);
        }
    }
}
