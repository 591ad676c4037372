//! The files under `index/`: which blobs lie in which packs.
//!
//! An index file of 50,000 blobs is 7 MB of JSON, and every run reads all of them. So they are
//! parsed straight into the caller's table, without a tree of values in between, and written
//! without one.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use stillpoint_core::error::{Error, Kind, Result};

use super::id::Id;
use super::pack::{BlobKind, PackEntry};

/// Appends one pack to the JSON in `out`; `first` tells whether it is the file's first.
pub fn write_pack(pack: &Id, entries: &[PackEntry], first: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(if first { b"{\"packs\":[{\"id\":\"" } else { b",{\"id\":\"" });
    pack.push_hex(out);
    out.extend_from_slice(b"\",\"blobs\":[");
    for (number, entry) in entries.iter().enumerate() {
        out.extend_from_slice(if number == 0 { b"{\"id\":\"" } else { b",{\"id\":\"" });
        entry.id.push_hex(out);
        out.extend_from_slice(match entry.kind {
            BlobKind::Data => b"\",\"type\":\"data\",\"offset\":",
            BlobKind::Tree => b"\",\"type\":\"tree\",\"offset\":",
        });
        push_number(entry.offset, out);
        out.extend_from_slice(b",\"length\":");
        push_number(entry.length, out);
        if entry.uncompressed > 0 {
            out.extend_from_slice(b",\"uncompressed_length\":");
            push_number(entry.uncompressed, out);
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
}

/// Closes the JSON that [`write_pack`] wrote.
pub fn write_end(out: &mut Vec<u8>) {
    out.extend_from_slice(if out.is_empty() { b"{\"packs\":[]}" } else { b"]}" });
}

fn push_number(number: u32, out: &mut Vec<u8>) {
    let mut digits = [0_u8; 10];
    let mut begin = digits.len();
    let mut rest = number;
    loop {
        begin -= 1;
        digits[begin] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[begin..]);
}

/// Calls `visit` for each pack with its blobs. The slice is reused from pack to pack.
pub fn parse(json: &[u8], visit: &mut dyn FnMut(Id, &[PackEntry]) -> Result<()>) -> Result<()> {
    let mut failure = None;
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let file = File { visit, failure: &mut failure };
    let parsed = file.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match (failure, parsed) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(Error::new(Kind::Corrupt, "an index file is not what it must be").source(error)),
        (None, Ok(())) => Ok(()),
    }
}

struct File<'v> {
    visit: &'v mut dyn FnMut(Id, &[PackEntry]) -> Result<()>,
    failure: &'v mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for File<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for File<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an index file")
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<&str>()? {
            match key {
                "packs" => map.next_value_seed(Packs(&mut self))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

struct Packs<'f, 'v>(&'f mut File<'v>);

impl<'de> DeserializeSeed<'de> for Packs<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Packs<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of packs")
    }
    fn visit_none<E: de::Error>(self) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut packs: A) -> std::result::Result<(), A::Error> {
        let mut entries = Vec::new();
        while let Some(pack) = packs.next_element_seed(OnePack(&mut entries))? {
            if let Err(error) = (self.0.visit)(pack, &entries) {
                *self.0.failure = Some(error);
                return Err(de::Error::custom("the caller refused a pack"));
            }
        }
        Ok(())
    }
}

struct OnePack<'e>(&'e mut Vec<PackEntry>);

impl<'de> DeserializeSeed<'de> for OnePack<'_> {
    type Value = Id;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Id, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for OnePack<'_> {
    type Value = Id;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a pack")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Id, A::Error> {
        let mut pack = None;
        self.0.clear();
        while let Some(key) = map.next_key::<&str>()? {
            match key {
                "id" => pack = Some(map.next_value()?),
                "blobs" => map.next_value_seed(Blobs(self.0))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        pack.ok_or_else(|| de::Error::missing_field("id"))
    }
}

struct Blobs<'e>(&'e mut Vec<PackEntry>);

impl<'de> DeserializeSeed<'de> for Blobs<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Blobs<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of blobs")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut blobs: A) -> std::result::Result<(), A::Error> {
        while let Some(blob) = blobs.next_element::<BlobJson>()? {
            self.0.push(PackEntry {
                kind: blob.kind,
                id: blob.id,
                offset: blob.offset,
                length: blob.length,
                uncompressed: blob.uncompressed_length,
            });
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct BlobJson {
    id: Id,
    #[serde(rename = "type")]
    kind: BlobKind,
    offset: u32,
    length: u32,
    #[serde(default)]
    uncompressed_length: u32,
}

#[cfg(test)]
mod tests {
    use super::super::pack::tests::any_entries;
    use super::*;
    use proptest::prelude::*;

    fn collect(json: &[u8]) -> Result<Vec<(Id, Vec<PackEntry>)>> {
        let mut packs = Vec::new();
        parse(json, &mut |pack, entries| {
            packs.push((pack, entries.to_vec()));
            Ok(())
        })?;
        Ok(packs)
    }

    proptest! {
        #[test]
        fn index_files_survive(packs in proptest::collection::vec((any::<[u8; 32]>(), any_entries()), 0..5)) {
            let packs: Vec<_> = packs.into_iter().map(|(id, entries)| (Id(id), entries)).collect();
            let mut json = Vec::new();
            for (number, (pack, entries)) in packs.iter().enumerate() {
                write_pack(pack, entries, number == 0, &mut json);
            }
            write_end(&mut json);
            prop_assert_eq!(collect(&json).unwrap(), packs);
        }

        #[test]
        fn other_bytes_never_panic(json: Vec<u8>) {
            drop(collect(&json));
        }
    }

    #[test]
    fn unknown_fields_are_passed_over_and_null_is_empty() {
        assert_eq!(collect(br#"{"supersedes":["x",{"y":[1]}],"packs":null,"new":7}"#).unwrap(), []);
        assert!(collect(br#"{"packs":[{"blobs":[]}]}"#).is_err());
        assert!(collect(br#"{"packs":[]}x"#).is_err());
    }

    #[test]
    fn the_callers_error_comes_back() {
        let mut json = Vec::new();
        write_pack(&Id([1; 32]), &[], true, &mut json);
        write_end(&mut json);
        let error = parse(&json, &mut |_, _| Err(Error::new(Kind::Cancelled, "enough"))).unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled);
    }
}
