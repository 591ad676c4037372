//! Walks an RDB file: what follows what, without loading any of it.
//!
//! An RDB file is opaque wherever possible: it is stored and given back as it came, whatever its
//! version. It is walked only to count keys, to find one key's bytes, to evaluate references and to
//! compare; what is unknown here is refused by name, because the length of an unknown value is
//! unknown as well. Formats: Redis RDB 6 to 12, Valkey 80 (`src/rdb.h`, `src/rdb.c` of both).
//!
//! The bytes are foreign. Memory is taken as bytes arrive, never as they are announced.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};

use crc::{CRC_64_REDIS, Crc, Digest, Table};
use stillpoint_core::error::{Error, Kind, Result};

use super::{packed, wire};

/// The checksum at the end of RDB files and of `DUMP` payloads.
pub(super) static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_REDIS);

/// How much of an image is held back until what follows it has come.
const VERIFIED_BYTES: u64 = 256 << 10;
/// Bytes of the checksum at the end.
const CRC_BYTES: usize = 8;
/// A compressed string may not claim to become larger than a server allows for any string.
const STRING_BYTES_MAX: u64 = 4 << 30;

const SLOT_IMPORT: u8 = 243;
const SLOT_INFO: u8 = 244;
const FUNCTION: u8 = 245;
const MODULE_AUXILIARY: u8 = 247;
const IDLE: u8 = 248;
const FREQUENCY: u8 = 249;
const AUXILIARY: u8 = 250;
const SIZES: u8 = 251;
pub(super) const EXPIRES_MILLIS: u8 = 252;
const EXPIRES_SECONDS: u8 = 253;
const DATABASE: u8 = 254;
const END: u8 = 255;

/// Computes the checksum of everything but the last eight bytes, which are the checksum.
pub(super) struct Checksum {
    digest: Digest<'static, u64, Table<16>>,
    tail: Vec<u8>,
    bytes: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { digest: CRC.digest(), tail: Vec::with_capacity(2 * CRC_BYTES), bytes: 0 }
    }
}

impl Checksum {
    /// Takes the next bytes of the file.
    pub fn update(&mut self, data: &[u8]) {
        self.bytes += data.len() as u64;
        if data.len() >= CRC_BYTES {
            self.digest.update(&self.tail);
            let (whole, tail) = data.split_at(data.len() - CRC_BYTES);
            self.digest.update(whole);
            self.tail.clear();
            self.tail.extend_from_slice(tail);
        } else {
            self.tail.extend_from_slice(data);
            let surplus = self.tail.len().saturating_sub(CRC_BYTES);
            let surplus: Vec<u8> = self.tail.drain(..surplus).collect();
            self.digest.update(&surplus);
        }
    }

    /// Bytes taken so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the file is whole; `Ok(false)` if its server wrote no checksum.
    pub fn finish(self) -> Result<bool> {
        let stated: [u8; CRC_BYTES] =
            self.tail.as_slice().try_into().map_err(|_| damaged("the RDB file is too short to be one"))?;
        let stated = u64::from_le_bytes(stated);
        if stated == 0 {
            return Ok(false);
        }
        if stated != self.digest.finalize() {
            return Err(damaged("the RDB file is damaged: its checksum is wrong"));
        }
        Ok(true)
    }
}

/// An image that is handed on only as far as it may still be whole: the last bytes come out once the
/// checksum is known to be right. A server that loads a damaged image ends itself.
pub(super) struct Verified<R> {
    source: R,
    checksum: Option<Checksum>,
    held: Vec<u8>,
    piece: Vec<u8>,
    at: usize,
}

impl<R: Read> Verified<R> {
    pub fn new(source: R) -> Self {
        Self { source, checksum: Some(Checksum::default()), held: Vec::new(), piece: Vec::new(), at: 0 }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.piece.len() && self.checksum.is_some() {
            self.at = 0;
            self.piece = std::mem::take(&mut self.held);
            (&mut self.source).take(VERIFIED_BYTES).read_to_end(&mut self.held)?;
            match &mut self.checksum {
                Some(checksum) if !self.held.is_empty() => checksum.update(&self.held),
                _ => {
                    if let Some(checksum) = self.checksum.take() {
                        checksum.finish().map_err(std::io::Error::other)?;
                    }
                }
            }
        }
        let count = (&self.piece[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

/// The bytes are not what they must be.
pub(super) fn damaged(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, message)
}

/// What stands in front of a key's value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Key {
    /// The database.
    pub database: u32,
    /// The name, any bytes.
    pub name: Vec<u8>,
    /// When it expires, in milliseconds since 1970.
    pub expires: Option<i64>,
    /// Seconds without access, if the server keeps them.
    pub idle: Option<u64>,
    /// How often it was accessed, logarithmic, if the server keeps it.
    pub frequency: Option<u8>,
    /// The type byte of the value.
    pub kind: u8,
    /// Where the expiry's opcode begins in what was captured, with its length; for rewriting.
    pub expiry_at: Option<(usize, usize)>,
}

/// What a file holds, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// A fact about the file: `redis-ver`, `repl-offset`.
    Auxiliary(Vec<u8>, Vec<u8>),
    /// The source of a library of functions.
    Function(Vec<u8>),
    /// Data of a module that belongs to no key; the number names the module.
    ModuleAuxiliary(u64),
    /// A key; its value must be passed over or visited next.
    Key(Key),
    /// What is of no concern here: size hints, slots.
    Other,
    /// The end; the checksum was consumed as well.
    End,
}

/// A piece of a value, in a form that does not depend on how the server packs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Element<'a> {
    /// A whole string.
    Text(&'a [u8]),
    /// An element of a list, in order.
    Item(&'a [u8]),
    /// A member of a set, in any order.
    Member(&'a [u8]),
    /// A member of a sorted set with its score, in any order.
    Scored(&'a [u8], f64),
    /// A field of a hash with its value and expiry in milliseconds, in any order.
    Field(&'a [u8], &'a [u8], Option<i64>),
    /// Part of a stream or of a module's value, in order.
    Part(&'a [u8]),
}

/// What takes the pieces of a value.
pub(super) type Visit<'a> = &'a mut (dyn FnMut(Element<'_>) -> Result<()> + 'a);

/// Walks one file.
pub(super) struct Walker<R> {
    source: BufReader<R>,
    /// Whether the file calls itself Valkey's.
    pub is_valkey: bool,
    /// The version of the format.
    pub version: u32,
    /// The modules whose values or data were passed, by number; the first of them.
    pub modules: BTreeSet<u64>,
    database: u32,
    captured: Option<Vec<u8>>,
}

/// How many modules are remembered: a server has few, damaged bytes may name any number.
const MODULES_MAX: usize = 256;

/// The name of a module's type: nine letters of six bits each, above ten bits of version.
pub(super) fn module_type(id: u64) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let letter = |place: u32| LETTERS[(id >> (10 + 6 * place) & 63) as usize] as char;
    (0..9).rev().map(letter).collect()
}

/// A length, or what stands in its place for specially encoded strings.
enum Length {
    Plain(u64),
    Special(u8),
}

impl<R: Read> Walker<R> {
    /// Reads the head of the file.
    pub fn new(source: R) -> Result<Self> {
        Self::begin(source, false)
    }

    /// Like `new`; everything that is passed is captured, to be taken by `take_captured`.
    pub fn capturing(source: R) -> Result<Self> {
        Self::begin(source, true)
    }

    fn begin(source: R, capture: bool) -> Result<Self> {
        let source = BufReader::with_capacity(256 << 10, source);
        let captured = capture.then(Vec::new);
        let mut walker = Self { source, is_valkey: false, version: 0, modules: BTreeSet::new(), database: 0, captured };
        let head: [u8; 9] = walker.array()?;
        let digits = match &head[..5] {
            b"REDIS" => &head[5..],
            _ if head.starts_with(b"VALKEY") => &head[6..],
            _ => return Err(damaged("this is no RDB file")),
        };
        walker.is_valkey = digits.len() == 3;
        let version = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
        walker.version = version.ok_or_else(|| damaged("the RDB file has no version"))?;
        Ok(walker)
    }

    /// What was passed since the last call.
    pub fn take_captured(&mut self) -> Vec<u8> {
        self.captured.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Begins to capture, or ends it.
    pub fn capture(&mut self, on: bool) {
        self.captured = on.then(Vec::new);
    }

    fn fill(&mut self) -> Result<&[u8]> {
        let data = self.source.fill_buf().map_err(|error| wire::unwrapped(error, "cannot read the RDB file"))?;
        if data.is_empty() { Err(damaged("the RDB file ends too early")) } else { Ok(data) }
    }

    /// Passes `count` bytes to `take` in pieces.
    fn pass(&mut self, mut count: u64, mut take: impl FnMut(&[u8])) -> Result<()> {
        while count > 0 {
            let data = self.fill()?;
            let size = usize::try_from(count).unwrap_or(usize::MAX).min(data.len());
            take(&data[..size]);
            if let Some(captured) = &mut self.captured {
                captured.extend_from_slice(&self.source.buffer()[..size]);
            }
            self.source.consume(size);
            count -= size as u64;
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let mut filled = 0;
        self.pass(N as u64, |data| {
            bytes[filled..filled + data.len()].copy_from_slice(data);
            filled += data.len();
        })?;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn length_or_special(&mut self) -> Result<Length> {
        let first = self.byte()?;
        Ok(match first >> 6 {
            0 => Length::Plain(u64::from(first & 0x3f)),
            1 => Length::Plain(u64::from(first & 0x3f) << 8 | u64::from(self.byte()?)),
            2 if first == 0x80 => Length::Plain(u64::from(u32::from_be_bytes(self.array()?))),
            2 if first == 0x81 => Length::Plain(u64::from_be_bytes(self.array()?)),
            2 => return Err(damaged("a length in the RDB file has no known form")),
            _ => Length::Special(first & 0x3f),
        })
    }

    /// A length, which may not be a specially encoded string.
    pub(super) fn length(&mut self) -> Result<u64> {
        match self.length_or_special()? {
            Length::Plain(length) => Ok(length),
            Length::Special(_) => Err(damaged("the RDB file holds a string where a length must stand")),
        }
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        if count > STRING_BYTES_MAX {
            return Err(damaged("a string in the RDB file is longer than any server allows"));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(count.min(64 << 10)).unwrap_or(0));
        self.pass(count, |data| bytes.extend_from_slice(data))?;
        Ok(bytes)
    }

    /// One string, decoded.
    pub(super) fn string(&mut self) -> Result<Vec<u8>> {
        match self.length_or_special()? {
            Length::Plain(count) => self.bytes(count),
            Length::Special(0) => Ok(i8::from_le_bytes(self.array()?).to_string().into_bytes()),
            Length::Special(1) => Ok(i16::from_le_bytes(self.array()?).to_string().into_bytes()),
            Length::Special(2) => Ok(i32::from_le_bytes(self.array()?).to_string().into_bytes()),
            Length::Special(3) => {
                let (packed, whole) = (self.length()?, self.length()?);
                let packed = self.bytes(packed)?;
                packed::inflate(&packed, whole.min(STRING_BYTES_MAX))
            }
            Length::Special(other) => {
                Err(damaged(format!("a string in the RDB file has the unknown encoding {other}")))
            }
        }
    }

    pub(super) fn skip_string(&mut self) -> Result<()> {
        let count = match self.length_or_special()? {
            Length::Plain(count) => count,
            Length::Special(kind @ 0..=2) => 1 << kind,
            Length::Special(3) => {
                let packed = self.length()?;
                self.length()?;
                packed
            }
            Length::Special(other) => {
                return Err(damaged(format!("a string in the RDB file has the unknown encoding {other}")));
            }
        };
        self.pass(count, |_| ())
    }

    /// What comes next. After a key, [`Walker::skip_value`] or [`Walker::visit_value`] must follow.
    pub fn next(&mut self) -> Result<Item> {
        let mut key = Key { database: self.database, ..Key::default() };
        let mut is_key = false;
        loop {
            let at = self.captured.as_ref().map_or(0, Vec::len);
            let opcode = self.byte()?;
            let belongs_to_key = matches!(opcode, EXPIRES_MILLIS | EXPIRES_SECONDS | IDLE | FREQUENCY);
            if is_key && opcode >= SLOT_IMPORT && !belongs_to_key {
                return Err(damaged("the RDB file holds an expiry without a key"));
            }
            match opcode {
                EXPIRES_MILLIS => {
                    key.expires = Some(i64::from_le_bytes(self.array()?));
                    key.expiry_at = Some((at, 9));
                }
                EXPIRES_SECONDS => {
                    key.expires = Some(i64::from(i32::from_le_bytes(self.array()?)) * 1000);
                    key.expiry_at = Some((at, 5));
                }
                IDLE => key.idle = Some(self.length()?),
                FREQUENCY => key.frequency = Some(self.byte()?),
                kind if kind < SLOT_IMPORT => {
                    key.kind = kind;
                    key.name = self.string()?;
                    return Ok(Item::Key(key));
                }
                other => return self.other(other),
            }
            is_key = true;
        }
    }

    /// What is no key.
    fn other(&mut self, opcode: u8) -> Result<Item> {
        match opcode {
            DATABASE => {
                let database = self.length()?;
                self.database =
                    u32::try_from(database).map_err(|_| damaged("the RDB file names an impossible database"))?;
                Ok(Item::Other)
            }
            SIZES => {
                self.length()?;
                self.length()?;
                Ok(Item::Other)
            }
            SLOT_INFO => {
                (0..3).try_for_each(|_| self.length().map(drop))?;
                Ok(Item::Other)
            }
            SLOT_IMPORT if self.is_valkey => {
                self.skip_string()?;
                let ranges = self.length()?;
                for _ in 0..ranges {
                    self.length()?;
                    self.length()?;
                }
                Ok(Item::Other)
            }
            AUXILIARY => Ok(Item::Auxiliary(self.string()?, self.string()?)),
            FUNCTION => Ok(Item::Function(self.string()?)),
            MODULE_AUXILIARY => {
                let module = self.module_id()?;
                self.length()?;
                self.length()?;
                self.skip_module()?;
                Ok(Item::ModuleAuxiliary(module))
            }
            END => {
                self.array::<CRC_BYTES>()?;
                Ok(Item::End)
            }
            other => Err(Error::new(
                Kind::Unsupported,
                format!("the RDB file (version {}) holds the unknown opcode {other}", self.version),
            )
            .hint("it can be restored as a whole into a server of the same version")),
        }
    }

    /// Reads on to the end of the input, where a damaged one is found out.
    pub fn finish(&mut self) -> Result<()> {
        let rest = std::io::copy(&mut self.source, &mut std::io::sink());
        match rest.map_err(|error| wire::unwrapped(error, "cannot read the RDB file"))? {
            0 => Ok(()),
            _ => Err(damaged("something follows the end of the RDB file")),
        }
    }

    /// Passes over the value of a key of this type.
    pub fn skip_value(&mut self, kind: u8) -> Result<()> {
        self.value(kind, &mut None)
    }

    /// Hands out the pieces of the value of a key of this type.
    pub fn visit_value(&mut self, kind: u8, visit: Visit<'_>) -> Result<()> {
        self.value(kind, &mut Some(visit))
    }

    fn value(&mut self, kind: u8, visit: &mut Option<Visit<'_>>) -> Result<()> {
        match kind {
            0 => self.one(visit, &|data, visit| visit(Element::Text(data))),
            1 => self.many(visit, |data| Element::Item(data)),
            2 => self.many(visit, |data| Element::Member(data)),
            3 | 5 => self.scored(kind == 5, visit),
            4 => self.fields(visit),
            7 => self.module(visit),
            9 => self.one(visit, &|data, visit| visit(Element::Part(data))),
            10 => self.one(visit, &|data, visit| packed::ziplist(data, &mut |item| visit(Element::Item(item)))),
            11 => self.one(visit, &|data, visit| packed::intset(data, &mut |member| visit(Element::Member(member)))),
            12 => self.one(visit, &|data, visit| packed::scored(&packed::ziplist, data, visit)),
            13 => self.one(visit, &|data, visit| packed::fields(&packed::ziplist, data, visit)),
            14 | 18 => self.quicklist(kind == 18, visit),
            15 | 19 | 21 => self.stream(kind, visit),
            16 => self.one(visit, &|data, visit| packed::fields(&packed::listpack, data, visit)),
            17 => self.one(visit, &|data, visit| packed::scored(&packed::listpack, data, visit)),
            20 => self.one(visit, &|data, visit| packed::listpack(data, &mut |item| visit(Element::Member(item)))),
            22 if self.is_valkey => self.expiring_fields(visit),
            24 => self.hash_with_expiry(visit),
            25 => {
                self.array::<8>()?;
                self.one(visit, &packed::expiring_fields)
            }
            other => Err(Error::new(
                Kind::Unsupported,
                format!("the RDB file (version {}) holds the unknown value type {other}", self.version),
            )
            .hint("it can be restored as a whole into a server of the same version")),
        }
    }

    /// A value that is one string, unpacked by `unpack`.
    fn one(&mut self, visit: &mut Option<Visit<'_>>, unpack: &dyn Fn(&[u8], Visit<'_>) -> Result<()>) -> Result<()> {
        match visit {
            None => self.skip_string(),
            Some(visit) => unpack(&self.string()?, visit),
        }
    }

    fn many(&mut self, visit: &mut Option<Visit<'_>>, element: fn(&[u8]) -> Element<'_>) -> Result<()> {
        for _ in 0..self.length()? {
            match visit {
                None => self.skip_string()?,
                Some(visit) => visit(element(&self.string()?))?,
            }
        }
        Ok(())
    }

    fn scored(&mut self, is_binary: bool, visit: &mut Option<Visit<'_>>) -> Result<()> {
        for _ in 0..self.length()? {
            let member = if visit.is_some() { self.string()? } else { self.skip_string().map(|()| Vec::new())? };
            let score = if is_binary { f64::from_le_bytes(self.array()?) } else { self.score_text()? };
            if let Some(visit) = visit {
                visit(Element::Scored(&member, score))?;
            }
        }
        Ok(())
    }

    fn score_text(&mut self) -> Result<f64> {
        match self.byte()? {
            253 => Ok(f64::NAN),
            254 => Ok(f64::INFINITY),
            255 => Ok(f64::NEG_INFINITY),
            count => packed::score(&self.bytes(u64::from(count))?),
        }
    }

    fn fields(&mut self, visit: &mut Option<Visit<'_>>) -> Result<()> {
        for _ in 0..self.length()? {
            match visit {
                None => {
                    self.skip_string()?;
                    self.skip_string()?;
                }
                Some(visit) => visit(Element::Field(&self.string()?, &self.string()?, None))?,
            }
        }
        Ok(())
    }

    /// Valkey's: an expiry stands after each field, -1 for none.
    fn expiring_fields(&mut self, visit: &mut Option<Visit<'_>>) -> Result<()> {
        for _ in 0..self.length()? {
            let (field, value) = (self.string()?, self.string()?);
            let expires = i64::from_le_bytes(self.array()?);
            if let Some(visit) = visit {
                visit(Element::Field(&field, &value, (expires >= 0).then_some(expires)))?;
            }
        }
        Ok(())
    }

    /// Redis': the earliest expiry first, then before each field how much later it expires, plus
    /// one; 0 for never.
    fn hash_with_expiry(&mut self, visit: &mut Option<Visit<'_>>) -> Result<()> {
        let earliest = i64::from_le_bytes(self.array()?);
        for _ in 0..self.length()? {
            let later = self.length()?;
            let (field, value) = (self.string()?, self.string()?);
            let expires = (later > 0).then(|| earliest.saturating_add_unsigned(later - 1));
            if let Some(visit) = visit {
                visit(Element::Field(&field, &value, expires))?;
            }
        }
        Ok(())
    }

    fn quicklist(&mut self, has_containers: bool, visit: &mut Option<Visit<'_>>) -> Result<()> {
        for _ in 0..self.length()? {
            let is_plain = has_containers && self.length()? == 1;
            match (visit.as_mut(), is_plain, has_containers) {
                (None, ..) => self.skip_string()?,
                (Some(visit), true, _) => visit(Element::Item(&self.string()?))?,
                (Some(visit), false, true) => {
                    packed::listpack(&self.string()?, &mut |item| visit(Element::Item(item)))?;
                }
                (Some(visit), false, false) => {
                    packed::ziplist(&self.string()?, &mut |item| visit(Element::Item(item)))?;
                }
            }
        }
        Ok(())
    }

    fn module_id(&mut self) -> Result<u64> {
        let module = self.length()?;
        if self.modules.len() < MODULES_MAX {
            self.modules.insert(module);
        }
        Ok(module)
    }

    fn module(&mut self, visit: &mut Option<Visit<'_>>) -> Result<()> {
        let module = self.module_id()?;
        let Some(visit) = visit else { return self.skip_module() };
        // A module's value has no form that is known here: its bytes are one piece.
        let outer = self.captured.replace(Vec::new());
        let done = self.skip_module();
        let inner = std::mem::replace(&mut self.captured, outer).unwrap_or_default();
        if let Some(captured) = &mut self.captured {
            captured.extend_from_slice(&inner);
        }
        done?;
        visit(Element::Part(&module.to_le_bytes()))?;
        visit(Element::Part(&inner))
    }

    fn skip_module(&mut self) -> Result<()> {
        loop {
            match self.length()? {
                0 => return Ok(()),
                1 | 2 => drop(self.length()?),
                3 => drop(self.array::<4>()?),
                4 => drop(self.array::<8>()?),
                5 => self.skip_string()?,
                other => return Err(damaged(format!("a module's value holds the unknown opcode {other}"))),
            }
        }
    }
}
