//! The header at the end of every pack: which blobs lie in it, in which order.
//!
//! A pack is the sealed blobs, one after the other, the sealed header, and the sealed header's
//! length as 4 bytes little endian.

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::id::Id;

/// What sealing adds to a plain or compressed blob: 16 bytes of nonce, 16 of authenticator.
pub const SEAL_BYTES: u32 = 32;

/// Bytes of the length field at the very end of a pack.
pub const LENGTH_FIELD_BYTES: usize = 4;

/// What a blob is. Both kinds may hold the same bytes under the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlobKind {
    /// Part of a file.
    Data,
    /// A directory.
    Tree,
}

/// One blob within a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackEntry {
    /// What it is.
    pub kind: BlobKind,
    /// SHA-256 of the plain bytes.
    pub id: Id,
    /// Where the sealed blob begins, bytes from the begin of the pack.
    pub offset: u32,
    /// Length of the sealed blob, [`SEAL_BYTES`] included.
    pub length: u32,
    /// Length of the plain bytes if the blob is compressed, 0 if it is stored raw.
    pub uncompressed: u32,
}

impl PackEntry {
    /// Length of the plain bytes.
    pub fn plain_length(&self) -> u32 {
        if self.uncompressed > 0 { self.uncompressed } else { self.length.saturating_sub(SEAL_BYTES) }
    }
}

/// The plain header of a pack with `entries`.
pub fn write_header(entries: &[PackEntry], out: &mut Vec<u8>) {
    out.reserve(entries.len() * 41);
    for entry in entries {
        let compressed = entry.uncompressed > 0;
        out.push(u8::from(entry.kind == BlobKind::Tree) | u8::from(compressed) << 1);
        out.extend_from_slice(&entry.length.to_le_bytes());
        if compressed {
            out.extend_from_slice(&entry.uncompressed.to_le_bytes());
        }
        out.extend_from_slice(&entry.id.0);
    }
}

/// Reads a plain header. `blobs_bytes` is the length of the pack before the header; blobs must fill
/// it exactly.
pub fn parse_header(header: &[u8], blobs_bytes: u64) -> Result<Vec<PackEntry>> {
    let mut entries = Vec::with_capacity(header.len() / 37);
    let mut reader = Reader(header);
    let mut offset = 0_u64;
    while !reader.0.is_empty() {
        let kind_byte = reader.take::<1>()?[0];
        if kind_byte > 3 {
            return Err(corrupt().context("kind", kind_byte));
        }
        let length = u32::from_le_bytes(reader.take()?);
        let is_compressed = kind_byte & 2 == 2;
        let uncompressed = if is_compressed { u32::from_le_bytes(reader.take()?) } else { 0 };
        let id = Id(reader.take()?);
        if is_compressed && uncompressed == 0 {
            // Nobody stores a blob of no bytes, and 0 stands for not compressed here and in indexes.
            return Err(corrupt().context("blob", id));
        }
        let kind = if kind_byte & 1 == 1 { BlobKind::Tree } else { BlobKind::Data };
        let start = u32::try_from(offset).map_err(|_| corrupt())?;
        offset += u64::from(length);
        if length < SEAL_BYTES || offset > blobs_bytes {
            return Err(corrupt().context("blob", id));
        }
        entries.push(PackEntry { kind, id, offset: start, length, uncompressed });
    }
    if offset != blobs_bytes {
        return Err(corrupt().context("bytes described", offset).context("bytes present", blobs_bytes));
    }
    Ok(entries)
}

fn corrupt() -> Error {
    Error::new(Kind::Corrupt, "a pack's header is damaged")
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(corrupt)?;
        self.0 = rest;
        Ok(*head)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_entries() -> impl Strategy<Value = Vec<PackEntry>> {
        let one = (any::<bool>(), any::<[u8; 32]>(), SEAL_BYTES..1_000_000, 0..2_000_000_u32);
        proptest::collection::vec(one, 0..40).prop_map(|blobs| {
            let mut offset = 0;
            let place = |(tree, id, length, uncompressed)| {
                let kind = if tree { BlobKind::Tree } else { BlobKind::Data };
                let entry = PackEntry { kind, id: Id(id), offset, length, uncompressed };
                offset += length;
                entry
            };
            blobs.into_iter().map(place).collect()
        })
    }

    #[test]
    fn a_blob_that_is_compressed_from_nothing_is_damage() {
        let case = include_bytes!("../../../../fuzz/seeds/pack_header/compressed-to-nothing.bin");
        let (length, header) = case.split_first_chunk::<4>().unwrap();
        let error = parse_header(header, u32::from_le_bytes(*length).into()).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
    }

    proptest! {
        #[test]
        fn headers_survive(entries in any_entries()) {
            let mut header = Vec::new();
            write_header(&entries, &mut header);
            let bytes = entries.iter().map(|entry| u64::from(entry.length)).sum();
            prop_assert_eq!(parse_header(&header, bytes).unwrap(), entries);
            prop_assert!(header.is_empty() || parse_header(&header, bytes + 1).is_err());
        }

        #[test]
        fn damaged_headers_never_panic(header: Vec<u8>, bytes: u64) {
            drop(parse_header(&header, bytes));
        }
    }
}
