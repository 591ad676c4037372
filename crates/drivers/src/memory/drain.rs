//! DRAIN: from the pinned view to named streams; and the edges of that view.
//!
//! The tree: `HOW-TO-RESTORE.txt`, `generation` (which incarnation of the store the versions
//! belong to) and `values/` with one file per key, the key percent-encoded. A value's version
//! stands in its file's time, so that the next drain can tell without reading.

use std::collections::BTreeMap;

use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Pin};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{FileTime, Metadata, NodeKind, Sink, Tree, TreePath, bytes, read_small};

use super::client::{Value, View};
use super::{Memory, client, cut};

pub(super) const VALUES: &str = "values";
const GENERATION: &str = "generation";

const HOW_TO_RESTORE: &str = "\
One file per key under values/. A file's name is the key, percent-encoded; its content is the value.
The time of a file is the number of the write that made the value, in seconds; it has no other meaning.
";

pub(super) fn drain(
    driver: &Memory,
    context: &Context,
    pin: &Pin,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
) -> Result<Drained> {
    context.check()?;
    let store = client::find(&driver.settings.name)?;
    let pinned = store.pinned(&cut::name(&pin.cut)).ok_or_else(pin_lost)?;
    let plain = Metadata::stream(FileTime::default());
    sink.file(b"HOW-TO-RESTORE.txt", &plain, None, bytes(HOW_TO_RESTORE))?;
    sink.file(GENERATION.as_bytes(), &plain, None, bytes(pinned.generation.to_string()))?;
    sink.enter(VALUES.as_bytes(), &Metadata::folder(FileTime::default()))?;
    let comparable = parent.is_some_and(|tree| holds_generation(tree, pinned.generation));
    let mut drained = Drained { unit: "keys".to_owned(), ..Drained::default() };
    for (name, value) in by_name(&pinned.view) {
        context.check()?;
        let size = value.bytes.len() as u64;
        let meta = Metadata::stream(FileTime { seconds: value.version.cast_signed(), nanos: 0 });
        if comparable && is_unchanged(sink, &name, value)? {
            sink.reuse(name.as_bytes(), &meta)?;
        } else {
            sink.file(name.as_bytes(), &meta, Some(size), bytes(value.bytes.to_vec()))?;
            drained.bytes_read += size;
        }
        drained.items += 1;
        drained.bytes += size;
        context.advance(size, 1);
    }
    sink.leave()?;
    Ok(drained)
}

/// Versions mean nothing across incarnations of a store: after a restore in place, number 7 is
/// another write. Only a parent of the same generation may be compared with.
fn holds_generation(parent: &dyn Tree, generation: u64) -> bool {
    let path = TreePath::parse(GENERATION).expect("a plain name");
    read_small(parent, &path, 32).is_ok_and(|text| text == generation.to_string().as_bytes())
}

fn is_unchanged(sink: &mut dyn Sink, name: &str, value: &Value) -> Result<bool> {
    let Some(node) = sink.parent(name.as_bytes())? else { return Ok(false) };
    let same_size = node.kind == NodeKind::File { size: value.bytes.len() as u64 };
    Ok(same_size && node.meta.mtime.seconds == value.version.cast_signed())
}

/// Encoding changes the order of keys, and a sink takes names in ascending order only.
fn by_name(view: &View) -> BTreeMap<String, &Value> {
    view.iter().map(|(key, value)| (encode(key), value)).collect()
}

fn pin_lost() -> Error {
    Error::new(Kind::PinLost, "the store no longer keeps the view of the cut")
}

/// Yields the edges of the pinned view, or of the live store after a restore.
///
/// `From(prefix)`: each value under the prefix names one referent, owned by its key.
pub(super) fn edges(
    driver: &Memory,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let store = client::find(&driver.settings.name)?;
    let view = match pin {
        Some(pin) => store.pinned(&cut::name(&pin.cut)).ok_or_else(pin_lost)?.view,
        None => store.view(),
    };
    let held = |key: &str| Edge { referent: key.as_bytes().to_vec(), owner: String::new() };
    for (key, value) in view.iter() {
        context.check()?;
        match query {
            EdgeQuery::From(prefix) if key.starts_with(prefix) => {
                visit(Edge { referent: value.bytes.to_vec(), owner: format!("key {key}") })?;
            }
            EdgeQuery::From(_) => {}
            EdgeQuery::Held(kind) | EdgeQuery::Which { kind, .. } if kind != "keys" => {
                return Err(Error::new(Kind::Unsupported, format!("a memory store holds no {kind}")).hint("kind: keys"));
            }
            EdgeQuery::Held(_) => visit(held(key))?,
            EdgeQuery::Which { referents, .. } if referents.iter().any(|asked| asked == key.as_bytes()) => {
                visit(held(key))?;
            }
            EdgeQuery::Which { .. } => {}
        }
    }
    Ok(())
}

/// Percent-encodes everything but letters, digits, `-` and `_`, so that any key is a file name.
/// The empty key is `%`, which nothing else can be.
pub(super) fn encode(key: &str) -> String {
    if key.is_empty() {
        return "%".to_owned();
    }
    let mut name = String::with_capacity(key.len());
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            name.push(byte as char);
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name
}

/// The reverse of [`encode`]; refuses every name that `encode` would not have made, because two
/// names must never mean one key.
pub(super) fn decode(name: &[u8]) -> Result<String> {
    let refuse = || {
        let shown = String::from_utf8_lossy(name);
        Error::new(Kind::Corrupt, format!("`{shown}` is not the name of a key"))
    };
    if name == b"%" {
        return Ok(String::new());
    }
    let mut key = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, tail) = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let byte = std::str::from_utf8(&digits).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                (byte.ok_or_else(refuse)?, tail)
            }
            _ => (first, tail),
        };
        key.push(byte);
        rest = tail;
    }
    let key = String::from_utf8(key).map_err(|_| refuse())?;
    if encode(&key).as_bytes() == name { Ok(key) } else { Err(refuse()) }
}
