//! Writes directories as tree blobs, huge ones in parts, with memory bounded by a few parts.
//!
//! The JSON is written by hand, byte for byte as Go would, so that restic's own commands that
//! rewrite trees accept it, and equal directories get equal ids.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Metadata, NodeKind};

use super::id::Id;
use super::tree::{Entry, mode_to_go, type_of};
use super::{name, quote, time};

/// Entries of the largest directory that is stored in one tree blob.
pub const PART_NODES_MAX: usize = 50_000;
/// A part has at least this many entries, so that parts of parts are never needed.
const PART_NODES_MIN: usize = 4_096;
/// A part ends after an entry whose hashed name has these bits clear: after 16,384 on average.
/// The cut depends on names alone, so that a new entry changes one part and not all behind it.
const PART_CUT_MASK: u64 = 0x3fff;
/// A part also ends here, since entries of huge files are long themselves.
const PART_BYTES_MAX: usize = 16 << 20;
/// JSON of the largest directory that is stored in one tree blob: 1 TB of files' chunks.
const WHOLE_BYTES_MAX: usize = 64 << 20;

/// Stores a tree blob and returns its id.
pub type StoreTree<'s> = dyn FnMut(&[u8]) -> Result<Id> + 's;

/// One directory, written as its entries come in ascending order of plain names.
#[derive(Debug, Default)]
pub struct DirectoryWriter {
    /// Finished parts, kept as long as the directory may still fit into one blob.
    held: Vec<Vec<u8>>,
    /// The part being written: entries separated by commas.
    open: Vec<u8>,
    open_nodes: usize,
    nodes: usize,
    bytes_held: usize,
    /// The blobs of stored parts; not empty once the directory is known to be huge.
    stored: Vec<Id>,
    last_name: Vec<u8>,
}

impl DirectoryWriter {
    /// Adds an entry. Refuses names that are invalid or do not ascend.
    pub fn push(&mut self, entry: &Entry<'_>, store: &mut StoreTree<'_>) -> Result<()> {
        stillpoint_core::tree::check_name(entry.name)?;
        if self.nodes > 0 && entry.name <= self.last_name.as_slice() {
            let shown = String::from_utf8_lossy(entry.name).into_owned();
            return Err(Error::internal(format!("`{shown}` comes after a name that is not smaller")));
        }
        self.last_name.clear();
        self.last_name.extend_from_slice(entry.name);
        if self.open_nodes > 0 {
            self.open.push(b',');
        }
        write_entry(&name::encode(entry.name), entry, &mut self.open);
        self.open_nodes += 1;
        self.nodes += 1;
        let cut = self.open_nodes >= PART_NODES_MIN && hash(entry.name) & PART_CUT_MASK == 0;
        if cut || self.open_nodes >= PART_NODES_MAX || self.open.len() >= PART_BYTES_MAX {
            self.close_part(store)?;
        }
        Ok(())
    }

    /// Ends the directory and stores what is not stored yet.
    pub fn finish(mut self, store: &mut StoreTree<'_>) -> Result<Id> {
        if self.is_huge() {
            self.close_part(store)?;
        }
        if self.stored.is_empty() {
            self.held.push(std::mem::take(&mut self.open));
            self.held.retain(|part| !part.is_empty());
            return store(&wrap(&self.held));
        }
        let meta = Metadata { mode: 0o700, ..Metadata::default() };
        let mut parts = Vec::new();
        for (number, part) in self.stored.iter().enumerate() {
            let number =
                u32::try_from(number).map_err(|_| Error::new(Kind::Unsupported, "a directory has too many entries"))?;
            let part_name = name::part(number);
            let entry =
                Entry { name: &part_name, kind: &NodeKind::Dir, meta: &meta, content: &[], subtree: Some(*part) };
            if number > 0 {
                parts.push(b',');
            }
            write_entry(&part_name, &entry, &mut parts);
        }
        store(&wrap(&[parts]))
    }

    fn is_huge(&self) -> bool {
        !self.stored.is_empty() || self.nodes > PART_NODES_MAX || self.bytes_held + self.open.len() > WHOLE_BYTES_MAX
    }

    fn close_part(&mut self, store: &mut StoreTree<'_>) -> Result<()> {
        if self.open_nodes > 0 {
            self.bytes_held += self.open.len();
            self.open_nodes = 0;
            self.held.push(std::mem::take(&mut self.open));
        }
        if self.is_huge() {
            self.bytes_held = 0;
            for part in self.held.drain(..) {
                self.stored.push(store(&wrap(&[part]))?);
            }
        }
        Ok(())
    }
}

fn wrap(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut json = Vec::with_capacity(parts.iter().map(Vec::len).sum::<usize>() + parts.len() + 16);
    json.extend_from_slice(b"{\"nodes\":[");
    for (number, part) in parts.iter().enumerate() {
        if number > 0 {
            json.push(b',');
        }
        json.extend_from_slice(part);
    }
    json.extend_from_slice(b"]}\n");
    json
}

/// FNV-1a, whose low bits are good enough to choose cuts, and which needs no explanation.
fn hash(name: &[u8]) -> u64 {
    let sum = name
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    sum ^ sum >> 32
}

/// Appends the JSON of one entry under its stored name.
fn write_entry(stored_name: &[u8], entry: &Entry<'_>, out: &mut Vec<u8>) {
    let meta = entry.meta;
    let (kind, type_bits) = type_of(entry.kind);
    out.extend_from_slice(b"{\"name\":");
    write_text(&quote::quote(stored_name), out);
    out.extend_from_slice(b",\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.push(b'"');
    write_number_if(b",\"mode\":", u64::from(mode_to_go(meta.mode) | type_bits), out);
    for (field, value) in
        [(&b",\"mtime\":\""[..], meta.mtime), (b",\"atime\":\"", meta.atime), (b",\"ctime\":\"", meta.ctime)]
    {
        out.extend_from_slice(field);
        time::write(value, out);
        out.push(b'"');
    }
    write_number(b",\"uid\":", u64::from(meta.uid), out);
    write_number(b",\"gid\":", u64::from(meta.gid), out);
    write_text_if(b",\"user\":", &meta.user, out);
    write_text_if(b",\"group\":", &meta.group, out);
    write_number_if(b",\"inode\":", meta.inode, out);
    // Only hard links need the device, whose number may change at every mount.
    write_number_if(b",\"device_id\":", if meta.links > 1 { meta.device } else { 0 }, out);
    if let NodeKind::File { size } = entry.kind {
        write_number_if(b",\"size\":", *size, out);
    }
    write_number_if(b",\"links\":", meta.links, out);
    write_rest(entry, out);
}

fn write_rest(entry: &Entry<'_>, out: &mut Vec<u8>) {
    if let NodeKind::Symlink { target } = entry.kind {
        write_text_if(b",\"linktarget\":", &String::from_utf8_lossy(target), out);
        if std::str::from_utf8(target).is_err() {
            out.extend_from_slice(b",\"linktarget_raw\":");
            write_base64(target, out);
        }
    }
    write_attributes(&entry.meta.xattrs, out);
    if let NodeKind::CharDevice { device } | NodeKind::BlockDevice { device } = entry.kind {
        write_number_if(b",\"device\":", *device, out);
    }
    match entry.kind {
        NodeKind::File { .. } => write_content(entry.content, out),
        _ => out.extend_from_slice(b",\"content\":null"),
    }
    if let Some(subtree) = entry.subtree {
        out.extend_from_slice(b",\"subtree\":\"");
        subtree.push_hex(out);
        out.push(b'"');
    }
    out.push(b'}');
}

fn write_content(content: &[Id], out: &mut Vec<u8>) {
    out.reserve(content.len() * 67 + 16);
    out.extend_from_slice(b",\"content\":[");
    for (number, id) in content.iter().enumerate() {
        out.extend_from_slice(if number == 0 { b"\"" } else { b",\"" });
        id.push_hex(out);
        out.push(b'"');
    }
    out.push(b']');
}

/// restic takes names of attributes for text; those that are none go into a field of our own,
/// which restic passes over.
fn write_attributes(attributes: &[(Vec<u8>, Vec<u8>)], out: &mut Vec<u8>) {
    let texts = attributes.iter().filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, value)));
    for (number, (name, value)) in texts.enumerate() {
        out.extend_from_slice(if number == 0 { b",\"extended_attributes\":[{\"name\":" } else { b",{\"name\":" });
        write_text(name, out);
        write_attribute_value(value, out);
    }
    let closed = |out: &mut Vec<u8>| out.push(b']');
    if attributes.iter().any(|(name, _)| std::str::from_utf8(name).is_ok()) {
        closed(out);
    }
    let raw = attributes.iter().filter(|(name, _)| std::str::from_utf8(name).is_err());
    for (number, (name, value)) in raw.enumerate() {
        out.extend_from_slice(if number == 0 { b",\"stillpoint_attributes_raw\":[{\"name\":" } else { b",{\"name\":" });
        write_base64(name, out);
        write_attribute_value(value, out);
    }
    if attributes.iter().any(|(name, _)| std::str::from_utf8(name).is_err()) {
        closed(out);
    }
}

fn write_attribute_value(value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"value\":");
    write_base64(value, out);
    out.push(b'}');
}

fn write_base64(bytes: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
    out.push(b'"');
}

fn write_number(field: &[u8], number: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(field);
    let mut digits = [0_u8; 20];
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

fn write_number_if(field: &[u8], number: u64, out: &mut Vec<u8>) {
    if number != 0 {
        write_number(field, number, out);
    }
}

fn write_text_if(field: &[u8], text: &str, out: &mut Vec<u8>) {
    if !text.is_empty() {
        out.extend_from_slice(field);
        write_text(text, out);
    }
}

/// A JSON string with Go's choice of escapes: `<`, `>` and `&` too.
fn write_text(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text;
    while let Some(at) =
        rest.find(|c: char| matches!(c, '\0'..='\x1f' | '"' | '\\' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}'))
    {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let character = rest[at..].chars().next().expect("find stops at a character");
        match character {
            '"' | '\\' => out.extend_from_slice(&[b'\\', character as u8]),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            other => out.extend_from_slice(format!("\\u{:04x}", other as u32).as_bytes()),
        }
        rest = &rest[at + character.len_utf8()..];
    }
    out.extend_from_slice(rest.as_bytes());
    out.push(b'"');
}
