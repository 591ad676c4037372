//! Files that hold one message: config, index, snapshots, locks.
//!
//! Sealed, and all but `config` compressed: a first byte 2, then a zstd frame. Files written before
//! compression existed begin with `{` or `[`. The name is the SHA-256 of the stored bytes.

use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, Kind, Result};

use crate::crypto::Cipher;
use crate::depot::{Depot, WriteMode};
use crate::format::id::Id;

/// What a file holds; also the folder it lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Index,
    Snapshot,
    Lock,
    Key,
    Pack,
}

impl FileKind {
    /// The folder, with the slash.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Index => "index/",
            Self::Snapshot => "snapshots/",
            Self::Lock => "locks/",
            Self::Key => "keys/",
            Self::Pack => "data/",
        }
    }

    /// The name of the file `id` within the repository.
    pub(crate) fn name(self, id: &Id) -> String {
        let hex = id.hex();
        match self {
            Self::Pack => format!("data/{}/{hex}", &hex[..2]),
            _ => format!("{}{hex}", self.folder()),
        }
    }

    /// The id in `name`, or `None` for a file of another tool's.
    pub(crate) fn id_of(self, name: &str) -> Option<Id> {
        let id = Id::parse(name.rsplit('/').next()?).ok()?;
        (self.name(&id) == name).then_some(id)
    }
}

/// The file that says who the repository is.
pub(crate) const CONFIG: &str = "config";

/// First byte of a compressed message.
const COMPRESSED: u8 = 2;
/// zstd's level for these few, small, often read files.
const LEVEL: i32 = 3;
/// The most that a message may claim to decompress to; an index file has 8 MB.
const PLAIN_BYTES_MAX: u64 = 1 << 30;

/// Seals `json`, writes it and returns its name.
pub(crate) fn save(depot: &dyn Depot, cipher: &Cipher, kind: FileKind, json: &[u8]) -> Result<Id> {
    let mut message = vec![COMPRESSED];
    let frame = zstd::bulk::compress(json, LEVEL).map_err(|error| Error::io("cannot compress", error))?;
    message.extend_from_slice(&frame);
    let sealed = cipher.seal(&message)?;
    let id = Id(Sha256::digest(&sealed).into());
    depot.write(&kind.name(&id), &[&sealed], &WriteMode::Replace)?;
    Ok(id)
}

/// Reads the file `id` and checks that it is what its name says.
pub(crate) fn load(depot: &dyn Depot, cipher: &Cipher, kind: FileKind, id: &Id) -> Result<Vec<u8>> {
    let name = kind.name(id);
    let (bytes, _) = depot.read(&name)?;
    if Sha256::digest(&bytes)[..] != id.0 {
        return Err(Error::new(Kind::Corrupt, format!("the file {name} is damaged")));
    }
    open(cipher, &bytes).map_err(|error| error.context("file", &name))
}

/// Opens what [`save`] sealed.
pub(crate) fn open(cipher: &Cipher, sealed: &[u8]) -> Result<Vec<u8>> {
    let mut message = Vec::new();
    cipher.open_into(sealed, &mut message)?;
    match message.first() {
        None | Some(b'{' | b'[') => Ok(message),
        Some(&COMPRESSED) => decompress(&message[1..]),
        Some(_) => Err(Error::new(Kind::Unsupported, "a file is encoded in a way that is not known")),
    }
}

/// Decompresses one frame, wherever its header states no length too (restic streams it).
fn decompress(frame: &[u8]) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let bad = |error| Error::io("a compressed file is damaged", error);
    let mut plain = Vec::new();
    let decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(bad)?;
    decoder.take(PLAIN_BYTES_MAX + 1).read_to_end(&mut plain).map_err(bad)?;
    if plain.len() as u64 > PLAIN_BYTES_MAX {
        return Err(Error::new(Kind::Corrupt, "a compressed file is impossibly large"));
    }
    Ok(plain)
}

/// The ids of all files of `kind`, sorted. Files of other tools are passed over.
pub(crate) fn list(depot: &dyn Depot, kind: FileKind) -> Result<Vec<Id>> {
    let mut ids = Vec::new();
    depot.list(kind.folder(), &mut |object| {
        ids.extend(kind.id_of(&object.name));
        Ok(true)
    })?;
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::MasterKey;
    use crate::depot::memory::MemoryDepot;

    #[test]
    fn files_survive_and_damage_is_named() {
        let depot = MemoryDepot::new();
        let cipher = Cipher::new(&MasterKey::from_bytes(&[3; 64]));
        let id = save(&depot, &cipher, FileKind::Snapshot, b"{\"a\":1}").unwrap();
        assert_eq!(load(&depot, &cipher, FileKind::Snapshot, &id).unwrap(), b"{\"a\":1}");
        assert_eq!(list(&depot, FileKind::Snapshot).unwrap(), [id]);
        let name = FileKind::Snapshot.name(&id);
        let mut bytes = depot.read(&name).unwrap().0.to_vec();
        bytes[20] ^= 1;
        depot.write(&name, &[&bytes], &WriteMode::Replace).unwrap();
        let error = load(&depot, &cipher, FileKind::Snapshot, &id).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().contains(&name));
    }

    #[test]
    fn messages_from_before_compression_are_read() {
        let cipher = Cipher::new(&MasterKey::from_bytes(&[3; 64]));
        for message in [&b"{}"[..], b"[1]", b""] {
            assert_eq!(open(&cipher, &cipher.seal(message).unwrap()).unwrap(), message);
        }
        assert!(open(&cipher, &cipher.seal(b"\x03x").unwrap()).is_err());
        assert!(open(&cipher, &cipher.seal(b"\x02x").unwrap()).is_err());
    }

    #[test]
    fn files_of_other_tools_have_no_id() {
        let hex = "ab".repeat(32);
        assert!(FileKind::Pack.id_of(&format!("data/ab/{hex}")).is_some());
        for foreign in
            [format!("data/ac/{hex}"), format!("data/{hex}"), "data/ab/x".into(), format!("data/ab/{hex}.tmp")]
        {
            assert!(FileKind::Pack.id_of(&foreign).is_none(), "{foreign}");
        }
    }
}
