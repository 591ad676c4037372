//! Compares a server with a point, key by key, in bounded memory.
//!
//! Both sides are images: the point's, and a fresh one of the server. Every key becomes a number that
//! depends on what it holds and not on how the server packs it; the numbers are added up in buckets by
//! the key's name. Equal sums mean equal content. Where sums differ, both images are walked once more
//! for the few buckets concerned, to name the keys.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};

use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Verification};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{NodeKind, Tree};

use super::client::Connection;
use super::commands::{self, Table, Touched};
use super::config::Ttl;
use super::drain::{IMAGE, REPLAY, ServerPart, StoreFacts, now_millis};
use super::rdb::{Element, Item, Key, Verified, Walker};
use super::replica::{Purpose, Replica};
use super::server::{self, Node};
use super::{Redis, is_stamp, wire};

/// Sums that are kept: 64 Ki of 24 bytes each, for either side.
const BUCKETS: usize = 1 << 16;
/// How many differing buckets are looked into, and how many differences are listed.
const BUCKETS_NAMED_MAX: usize = 64;
const DIFFERENCES_MAX: usize = 100;
/// Keys that expire within this time of the comparison may be gone on one side only.
const EXPIRY_MARGIN_MILLIS: i64 = 2_000;
/// Stands for the database of what belongs to none.
const NO_DATABASE: u32 = u32::MAX;

/// Compares every server of the target with the point.
pub(super) fn verify(driver: &Redis, context: &Context, source: &dyn Tree) -> Result<Verification> {
    context.check()?;
    let facts = StoreFacts::read(source)?;
    let endpoint = driver.endpoint()?;
    let (mut control, info) = server::open(&driver.access, &endpoint)?;
    server::check_is_master(&mut control, &info)?;
    let nodes = server::masters(&mut control, &info)?;
    if let Some(why) = facts.servers.iter().find_map(|part| part.not_walked.as_ref()) {
        return Err(Error::new(Kind::Unsupported, format!("the point cannot be compared key by key: {why}")));
    }
    let mut compare = Compare {
        driver,
        context,
        source,
        facts: &facts,
        nodes: &nodes,
        touched: Names::default(),
        now_millis: 0,
        ttl: driver.settings.ttl,
    };
    compare.touched = compare.touched_by_replay(&mut control)?;
    compare.run()
}

/// Names of keys that the commands between image and cut touched.
#[derive(Default)]
struct Names {
    /// By the hash of database and name: what a key is at the cut, as far as the last command says.
    keys: HashMap<u128, Outcome>,
    /// Databases that were emptied as a whole: nothing of the image is left of them.
    databases: Vec<u32>,
    /// Whether that happened to all of them.
    everything: bool,
    /// Whether functions were loaded or deleted.
    functions: bool,
}

/// What a touched key is at the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Gone.
    Deleted,
    /// A string with this content and without expiry.
    Text(u128),
    /// Something that only carrying out the commands would tell.
    Unknown,
}

/// One side's sums.
struct Sums {
    buckets: Vec<(u128, u64)>,
    keys: u64,
}

impl Default for Sums {
    fn default() -> Self {
        Self { buckets: vec![(0, 0); BUCKETS], keys: 0 }
    }
}

impl Sums {
    fn add(&mut self, name: u128, content: u128) {
        let (sum, count) = &mut self.buckets[bucket(name)];
        // The name's hash goes into the sum, or two keys could change places unseen.
        *sum = sum.wrapping_add(hash_of(&[&name.to_le_bytes(), &content.to_le_bytes()]));
        *count += 1;
        self.keys += 1;
    }
}

fn bucket(name: u128) -> usize {
    (name % BUCKETS as u128) as usize
}

/// Which side an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Point,
    Target,
}

/// What takes the keys of one side: name hash, name, content hash.
type Take<'a> = &'a mut dyn FnMut(u128, &Key, u128) -> Result<()>;

struct Compare<'a> {
    driver: &'a Redis,
    context: &'a Context,
    source: &'a dyn Tree,
    facts: &'a StoreFacts,
    nodes: &'a [Node],
    touched: Names,
    now_millis: i64,
    /// What the restore did with times of expiry.
    ttl: Ttl,
}

/// The first half of a hash.
fn half(hash: Sha256) -> u128 {
    let bytes = hash.finalize();
    u128::from_be_bytes(std::array::from_fn(|at| bytes[at]))
}

fn hash_of(parts: &[&[u8]]) -> u128 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    half(hash)
}

fn name_hash(database: u32, name: &[u8]) -> u128 {
    hash_of(&[&database.to_le_bytes(), name])
}

/// The hash of a string value without expiry, as [`Content`] makes it.
fn text_hash(text: &[u8]) -> u128 {
    let mut content = Content::default();
    content.add(Element::Text(text), 0);
    content.finish(0, None)
}

/// What a key holds, as a number.
#[derive(Default)]
struct Content {
    /// Of what has an order.
    ordered: Sha256,
    /// Of what has none.
    unordered: u128,
    pieces: u64,
}

impl Content {
    fn add(&mut self, element: Element<'_>, now_millis: i64) {
        let mut ordered = |bytes: &[u8]| {
            self.ordered.update((bytes.len() as u64).to_le_bytes());
            self.ordered.update(bytes);
        };
        match element {
            Element::Text(bytes) | Element::Item(bytes) | Element::Part(bytes) => ordered(bytes),
            Element::Member(member) => self.unordered = self.unordered.wrapping_add(hash_of(&[member])),
            Element::Scored(member, score) => {
                // Both zeros are one score.
                let score = if score == 0.0 { 0.0 } else { score };
                self.unordered = self.unordered.wrapping_add(hash_of(&[member, &score.to_bits().to_le_bytes()]));
            }
            Element::Field(_, _, Some(expires)) if expires <= now_millis => return,
            Element::Field(field, value, expires) => {
                let expires = expires.unwrap_or(-1).to_le_bytes();
                self.unordered = self.unordered.wrapping_add(hash_of(&[field, value, &expires]));
            }
        }
        self.pieces += 1;
    }

    /// The number; `class` tells types apart, however they are packed.
    fn finish(self, class: u8, expires: Option<i64>) -> u128 {
        let ordered = half(self.ordered).to_le_bytes();
        let expires = expires.unwrap_or(-1).to_le_bytes();
        hash_of(&[&[class], &ordered, &self.unordered.to_le_bytes(), &self.pieces.to_le_bytes(), &expires])
    }
}

/// What a type byte stands for: string, list, set, sorted set, hash, stream, module.
fn class(kind: u8) -> u8 {
    match kind {
        0 => 0,
        1 | 10 | 14 | 18 => 1,
        2 | 11 | 20 => 2,
        3 | 5 | 12 | 17 => 3,
        4 | 9 | 13 | 16 | 22..=25 => 4,
        15 | 19 | 21 => 5,
        _ => 6,
    }
}

impl Compare<'_> {
    fn run(&mut self) -> Result<Verification> {
        let (mut found, mut expected) = (Sums::default(), Sums::default());
        self.target(&mut |name, _, content| {
            found.add(name, content);
            Ok(())
        })?;
        self.point(&mut |name, _, content| {
            expected.add(name, content);
            Ok(())
        })?;
        let differing: Vec<usize> = (0..BUCKETS).filter(|&at| expected.buckets[at] != found.buckets[at]).collect();
        let mut verification = Verification { checked: expected.keys, differences: Vec::new() };
        if !differing.is_empty() {
            verification.differences = self.name_differences(&differing)?;
        }
        Ok(verification)
    }

    /// Every key of the target that is to be compared.
    fn target(&mut self, take: Take<'_>) -> Result<()> {
        let images: Vec<Replica> = self.nodes.iter().map(|node| self.attach(node)).collect::<Result<_>>()?;
        // What has expired by the moment of the target's image may be gone on one side only.
        self.now_millis = now_millis() + EXPIRY_MARGIN_MILLIS;
        for image in images {
            self.walk(Box::new(image.image().reader()), Side::Target, take)?;
        }
        Ok(())
    }

    /// Every key of the point that is to be compared.
    fn point(&self, take: Take<'_>) -> Result<()> {
        for part in &self.facts.servers {
            self.walk(self.source.open(&part.path(IMAGE)?)?, Side::Point, take)?;
        }
        for (name, outcome) in &self.touched.keys {
            if let Outcome::Text(content) = outcome {
                let key = Key { name: b"(set after the image)".to_vec(), ..Key::default() };
                take(*name, &key, *content)?;
            }
        }
        Ok(())
    }

    fn attach(&self, node: &Node) -> Result<Replica> {
        Replica::attach(Purpose::image(self.driver, node, self.nodes.len()), self.context)
    }

    /// Hands out every key of an image that is to be compared.
    fn walk(&self, image: Box<dyn Read + Send>, side: Side, take: Take<'_>) -> Result<()> {
        let mut walker = Walker::new(Verified::new(image))?;
        loop {
            match walker.next()? {
                Item::End => return Ok(()),
                Item::Function(code) if !self.touched.functions => {
                    let key = Key { database: NO_DATABASE, name: function_name(&code), ..Key::default() };
                    take(name_hash(NO_DATABASE, &code), &key, hash_of(&[&code]))?;
                }
                Item::Key(key) => {
                    self.context.check()?;
                    let name = name_hash(key.database, &key.name);
                    if !self.is_compared(&key, name, side) {
                        walker.skip_value(key.kind)?;
                        continue;
                    }
                    let mut content = Content::default();
                    walker.visit_value(key.kind, &mut |element| {
                        content.add(element, self.now_millis);
                        Ok(())
                    })?;
                    let expires = key.expires.filter(|_| self.ttl == Ttl::Keep);
                    take(name, &key, content.finish(class(key.kind), expires))?;
                }
                _ => {}
            }
        }
    }

    fn is_compared(&self, key: &Key, name: u128, side: Side) -> bool {
        if is_stamp(key.database, &key.name) {
            return false;
        }
        let is_superseded = match (side, self.touched.keys.get(&name)) {
            (_, Some(Outcome::Unknown)) => true,
            (Side::Point, Some(_)) => true,
            (Side::Point, None) => self.touched.everything || self.touched.databases.contains(&key.database),
            (Side::Target, _) => false,
        };
        let may_be_gone = match self.ttl {
            Ttl::Keep => key.expires.is_some_and(|expires| expires <= self.now_millis),
            // How much time was added is not known here.
            Ttl::Shift => key.expires.is_some(),
            Ttl::Freeze => false,
        };
        !is_superseded && !may_be_gone
    }

    /// Walks both sides again for the buckets that differ, and names the keys.
    fn name_differences(&mut self, differing: &[usize]) -> Result<Vec<String>> {
        let named: Vec<usize> = differing.iter().copied().take(BUCKETS_NAMED_MAX).collect();
        let mut expected: BTreeMap<u128, (String, u128)> = BTreeMap::new();
        let mut differences = Vec::new();
        self.point(&mut |name, key, content| {
            if named.binary_search(&bucket(name)).is_ok() {
                expected.insert(name, (shown(key), content));
            }
            Ok(())
        })?;
        self.target(&mut |name, key, content| {
            if named.binary_search(&bucket(name)).is_ok() {
                match expected.remove(&name) {
                    Some((_, same)) if same == content => {}
                    Some(_) => differences.push(format!("{} differs", shown(key))),
                    None => differences.push(format!("{} is not in the point", shown(key))),
                }
            }
            Ok(())
        })?;
        differences.extend(expected.into_values().map(|(key, _)| format!("{key} is missing")));
        if differences.is_empty() {
            differences.push("the server was written to while it was compared".to_owned());
        }
        differences.truncate(DIFFERENCES_MAX - 1);
        if differing.len() > named.len() {
            differences.push(format!("and more, in about {} further places", differing.len() - named.len()));
        }
        Ok(differences)
    }

    /// What the commands between image and cut say of single keys.
    fn touched_by_replay(&self, control: &mut Connection) -> Result<Names> {
        let mut names = Names::default();
        let mut followed = Vec::new();
        for part in &self.facts.servers {
            let file = self.source.get(&part.path(REPLAY)?)?;
            match file.map(|node| node.kind) {
                Some(NodeKind::File { size: 0 }) => {}
                _ => followed.push(part),
            }
        }
        if followed.is_empty() {
            return Ok(names);
        }
        let table = Table::read(control)?;
        for part in followed {
            self.touched_by(part, &table, control, &mut names)?;
        }
        Ok(names)
    }

    fn touched_by(&self, part: &ServerPart, table: &Table, control: &mut Connection, names: &mut Names) -> Result<()> {
        let mut reader = BufReader::new(self.source.open(&part.path(REPLAY)?)?);
        let mut database = 0;
        while let Some(command) = wire::read_command(&mut reader, u64::MAX)? {
            self.context.check()?;
            let upper = command.name();
            match table.touched(&command, control)? {
                Touched::Select(selected) => database = selected,
                Touched::Database => names.empty(Some(database)),
                Touched::Everything if upper == b"FLUSHALL" => names.empty(None),
                Touched::Everything => {
                    return Err(Error::new(
                        Kind::Unsupported,
                        "databases were swapped between image and cut: the point cannot be compared key by key",
                    ));
                }
                Touched::Keys(keys) => names.command(database, &upper, &command.arguments, &keys),
                Touched::Nothing => names.functions |= upper == b"FUNCTION",
                Touched::Bracket => {}
            }
        }
        Ok(())
    }
}

impl Names {
    /// A database was emptied, or all were. What was touched in it before is gone as well.
    fn empty(&mut self, database: Option<u32>) {
        match database {
            // Names are hashes: which database a key was in is not known any more.
            Some(database) => {
                self.keys.values_mut().for_each(|outcome| *outcome = Outcome::Unknown);
                self.databases.push(database);
            }
            None => {
                self.keys.clear();
                self.everything = true;
            }
        }
    }

    fn command(&mut self, database: u32, upper: &[u8], arguments: &[Vec<u8>], keys: &[usize]) {
        for at in keys {
            let Some(key) = arguments.get(*at) else { continue };
            let outcome = match (upper, arguments) {
                (b"SET", [_, _, value]) => Outcome::Text(text_hash(value)),
                (b"MSET", _) => arguments.get(at + 1).map_or(Outcome::Unknown, |value| Outcome::Text(text_hash(value))),
                (b"DEL" | b"UNLINK", _) => Outcome::Deleted,
                // What is only read, as the source of a copy, counts as touched as well.
                _ => Outcome::Unknown,
            };
            self.keys.insert(name_hash(database, key), outcome);
            if let Some(other) = commands::other_database(arguments) {
                self.keys.insert(name_hash(other, key), outcome);
            }
        }
    }
}

fn function_name(code: &[u8]) -> Vec<u8> {
    let line = code.split(|&byte| byte == b'\n').next().unwrap_or_default();
    [b"functions ", line].concat()
}

/// A key as people see it.
fn shown(key: &Key) -> String {
    let name = key.name.escape_ascii();
    if key.database == NO_DATABASE { name.to_string() } else { format!("database {} key `{name}`", key.database) }
}
