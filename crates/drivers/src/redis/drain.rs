//! DRAIN: image and commands of every master become files, as they come.
//!
//! ```text
//! HOW-TO-RESTORE.txt
//! acl.txt, config.txt      what the server said, for people
//! dump.rdb                 the image, byte by byte
//! replay.aof               the commands between the image and the cut
//! store.json               versions, offsets, counts
//! ```
//! Of a cluster, the middle three lie below `shards/<first slot>/`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::{Context, Drained, Pin};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{self, Content, FileTime, Metadata, Sink, Tree, TreePath};

use super::Redis;
use super::cut::{Shard, State};
use super::rdb::damaged;
use super::replica::{ImageFacts, Replica};
use super::server::ServerFacts;
use super::spool::QueueReader;
use super::wire;

pub(super) const IMAGE: &[u8] = b"dump.rdb";
pub(super) const REPLAY: &[u8] = b"replay.aof";
pub(super) const ACL: &[u8] = b"acl.txt";
const CONFIG: &[u8] = b"config.txt";
pub(super) const SHARDS: &[u8] = b"shards";
const STORE: &[u8] = b"store.json";
/// `store.json` is a few lines per server.
const STORE_BYTES_MAX: u64 = 16 << 20;
/// How often the wait for the stream looks up.
const LOOK: Duration = Duration::from_millis(500);

/// What a point says of the whole store.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct StoreFacts {
    /// The version of this file's form.
    pub format: u32,
    /// Whether the servers are a cluster.
    pub cluster: bool,
    /// When the cut was, in milliseconds since 1970: what `ttl: shift` counts from.
    pub at_millis: i64,
    /// The servers, by first slot.
    pub servers: Vec<ServerPart>,
}

/// One server's part of a point.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct ServerPart {
    /// Where its files lie: empty, or below `shards/`.
    pub folder: String,
    /// Who it was.
    pub server: ServerFacts,
    /// The replication id of the offsets.
    pub replication_id: String,
    /// The offset of the image.
    pub image_offset: u64,
    /// The offset of the cut.
    pub cut_offset: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// The image's format.
    pub image_format: String,
    /// Keys in the image, by database.
    pub keys: BTreeMap<u32, u64>,
    /// Libraries of functions in the image.
    pub functions: u64,
    /// The types of modules that the image holds values or data of.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub module_types: BTreeSet<String>,
    /// Those that have data which belongs to no key.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub module_data: BTreeSet<String>,
    /// Why the image could not be walked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_walked: Option<String>,
}

impl StoreFacts {
    /// Reads `store.json` of a point.
    pub fn read(source: &dyn Tree) -> Result<Self> {
        let path = TreePath::root().join(STORE)?;
        let bytes = tree::read_small(source, &path, STORE_BYTES_MAX)?;
        let facts: Self = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(Kind::Corrupt, "store.json of the point cannot be read").source(error))?;
        if facts.format != 1 {
            return Err(
                Error::new(Kind::Unsupported, "the point was written by a newer version").hint("update stillpoint")
            );
        }
        if facts.servers.is_empty() {
            return Err(damaged("store.json of the point names no server"));
        }
        Ok(facts)
    }
}

impl ServerPart {
    /// The path of one of this server's files.
    pub fn path(&self, name: &[u8]) -> Result<TreePath> {
        if self.folder.is_empty() {
            return TreePath::root().join(name);
        }
        TreePath::root().join(SHARDS)?.join(self.folder.as_bytes())?.join(name)
    }
}

/// Milliseconds since 1970.
pub(super) fn now_millis() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// Writes the pinned view into `sink`. Nothing is taken from a parent: an image has no parts that
/// could be known to be unchanged; the repository keeps what is new of its bytes.
pub(super) fn drain(driver: &Redis, context: &Context, pin: &Pin, sink: &mut dyn Sink) -> Result<Drained> {
    context.check()?;
    let mut state = driver.state();
    let outcome = all(&mut state, context, pin, sink);
    if outcome.is_err() && state.is_drained {
        // Whoever reads a stream of ours must not wait for what will not come.
        state.shards.iter_mut().filter_map(|shard| shard.replica.as_mut()).for_each(Replica::detach);
    }
    outcome
}

fn all(state: &mut State, context: &Context, pin: &Pin, sink: &mut dyn Sink) -> Result<Drained> {
    if state.pinned.as_ref() != Some(pin) || state.is_drained {
        return Err(Error::new(Kind::PinLost, "the attachment was let go of, or is drained already"));
    }
    let now = state.cut_at_millis;
    let seconds = now.div_euclid(1000);
    let meta = Metadata::stream(FileTime { seconds, nanos: 0 });
    let folder_meta = Metadata::folder(FileTime { seconds, nanos: 0 });
    let how = super::HOW_TO_RESTORE;
    sink.file(b"HOW-TO-RESTORE.txt", &meta, Some(how.len() as u64), tree::bytes(how))?;
    state.is_drained = true;
    let is_cluster = state.shards.iter().any(|shard| !shard.node.slots.is_empty());
    let mut facts = StoreFacts { format: 1, cluster: is_cluster, at_millis: now, servers: Vec::new() };
    if is_cluster {
        sink.enter(SHARDS, &folder_meta)?;
    }
    for shard in &mut state.shards {
        let folder = if is_cluster { shard.node.folder() } else { String::new() };
        if is_cluster {
            sink.enter(folder.as_bytes(), &folder_meta)?;
        }
        let mut part = ServerPart { folder, server: shard.facts.clone(), ..ServerPart::default() };
        image(context, shard, sink, &meta)?;
        complete(context, shard, &mut part)?;
        replay(context, shard, &part, sink, &meta)?;
        facts.servers.push(part);
        if is_cluster {
            sink.leave()?;
        }
    }
    if is_cluster {
        sink.leave()?;
    }
    let text = serde_json::to_vec_pretty(&facts).map_err(|e| Error::internal("facts do not serialize").source(e))?;
    sink.file(STORE, &meta, Some(text.len() as u64), tree::bytes(text))?;
    state.is_whole = true;
    Ok(drained(&facts, state.notes.clone()))
}

/// What comes first of one server: the papers, and the image, which is read while it comes in.
fn image(context: &Context, shard: &mut Shard, sink: &mut dyn Sink, meta: &Metadata) -> Result<()> {
    let Some(replica) = &shard.replica else { return Err(Error::internal("a server was cut without an attachment")) };
    for (name, text) in [(ACL, &shard.papers.acl), (CONFIG, &shard.papers.config)] {
        if let Some(text) = text {
            sink.file(name, meta, Some(text.len() as u64), tree::bytes(text.as_bytes()))?;
        }
    }
    let image = Image { reader: replica.image().reader(), context: context.clone() };
    sink.file(IMAGE, meta, Some(shard.facts.used_memory), Box::new(image))
}

/// The commands behind the image. Only once they are all here: whoever reads a file for the repository
/// would otherwise wait for the image to end, and could have read another file meanwhile.
fn replay(context: &Context, shard: &Shard, part: &ServerPart, sink: &mut dyn Sink, meta: &Metadata) -> Result<()> {
    let Some(replica) = &shard.replica else { return Err(Error::internal("a server lost its attachment")) };
    let raw_bytes = part.cut_offset.saturating_sub(part.image_offset);
    let replay = Replay::new(replica.stream().reader(), raw_bytes, context.clone());
    sink.file(REPLAY, meta, Some(raw_bytes), Box::new(replay))
}

/// Waits until everything up to the cut was received, and lets the server go.
fn complete(context: &Context, shard: &mut Shard, part: &mut ServerPart) -> Result<()> {
    let offset = shard.offset;
    let Some(replica) = &mut shard.replica else { return Err(Error::internal("a server lost its attachment")) };
    let has_all = |state: &super::replica::State| {
        let image = state.image.as_ref()?;
        (state.reached >= offset).then(|| (image.clone(), state.replication_id.clone(), state.start))
    };
    let (image, replication_id, start): (ImageFacts, _, _) = loop {
        // However long it takes: a server that falls silent is noticed by who receives.
        if let Some(all) = replica.wait(LOOK, context, has_all)? {
            break all;
        }
    };
    replica.detach();
    part.replication_id = replication_id;
    part.image_offset = start;
    part.cut_offset = offset;
    part.image_bytes = image.bytes;
    part.image_format = image.format;
    part.keys = image.keys;
    part.functions = image.functions;
    part.module_types = image.module_types;
    part.module_data = image.module_data;
    part.not_walked = image.not_walked;
    context.advance(0, part.keys.values().sum());
    Ok(())
}

fn drained(facts: &StoreFacts, mut notes: Vec<String>) -> Drained {
    let mut drained = Drained { unit: "keys".to_owned(), ..Drained::default() };
    for part in &facts.servers {
        drained.items += part.keys.values().sum::<u64>();
        drained.bytes += part.image_bytes + (part.cut_offset - part.image_offset);
        if let Some(why) = &part.not_walked {
            notes.push(format!("{}: keys were not counted: {why}", part.server.endpoint));
        }
        if part.server.modules.is_none() && !part.module_types.is_empty() {
            let types: Vec<&str> = part.module_types.iter().map(String::as_str).collect();
            notes.push(format!(
                "{} holds values of modules ({}), and does not tell which modules it has: +module|list",
                part.server.endpoint,
                types.join(", ")
            ));
        }
    }
    drained.bytes_read = drained.bytes;
    drained.notes = notes;
    drained
}

/// The image, as it comes out of its queue.
struct Image {
    reader: QueueReader,
    context: Context,
}

impl Content for Image {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.context.check()?;
        let read = self.reader.read(buffer);
        let count = read.map_err(|error| wire::unwrapped(error, "cannot read what the server sent"))?;
        self.context.advance(count as u64, 0);
        Ok(count)
    }
}

/// The commands up to the cut, without what changes no data.
struct Replay {
    source: BufReader<std::io::Take<QueueReader>>,
    left: u64,
    piece: Vec<u8>,
    at: usize,
    context: Context,
}

impl Replay {
    /// `bytes` of the stream lie before the cut.
    fn new(reader: QueueReader, bytes: u64, context: Context) -> Self {
        let source = BufReader::with_capacity(128 << 10, reader.take(bytes));
        Self { source, left: bytes, piece: Vec::new(), at: 0, context }
    }

    /// Fills the piece with the next commands; leaves it empty at the end.
    fn refill(&mut self) -> Result<()> {
        self.piece.clear();
        self.at = 0;
        while self.left > 0 && self.piece.len() < 64 << 10 {
            let command = wire::read_command(&mut self.source, u64::MAX)?;
            let command = command.ok_or_else(|| damaged("the stream of commands ends before the cut"))?;
            let is_past = command.wire_bytes > self.left;
            self.left = self
                .left
                .checked_sub(command.wire_bytes)
                .filter(|_| !is_past)
                .ok_or_else(|| Error::internal("the cut lies within a command"))?;
            if !command.is_noise() && !command.arguments.is_empty() {
                self.piece.extend_from_slice(&command.encode());
            }
        }
        Ok(())
    }
}

impl Content for Replay {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.context.check()?;
        while self.at == self.piece.len() && self.left > 0 {
            self.refill()?;
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        self.context.advance(count as u64, 0);
        Ok(count)
    }
}
