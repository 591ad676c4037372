//! The way back key by key: `RESTORE` pipelines and the commands behind them, each to the master
//! that holds its slot.
//!
//! For targets that follow no master of ours (clusters, managed services), and for parts of a point.
//! One key at a time is in memory; a value larger than the server takes in one command is an error.

use std::io::{BufReader, Read};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::Tree;

use super::client::{Connection, refusal};
use super::commands::{self, Table, Touched};
use super::drain::{IMAGE, REPLAY, ServerPart, StoreFacts};
use super::expiry::Expiry;
use super::part::Part;
use super::rdb::{CRC, Item, Key, Verified, Walker};
use super::server::Node;
use super::wire::{self, Command, Reply};
use super::{Redis, is_stamp};

/// How much is sent before answers are read.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_COMMANDS: usize = 512;
/// Far away, in milliseconds: keys with a time of expiry get theirs so much later while commands are
/// carried out. A key that expired before them would be made anew by some, and stay for ever.
const FAR_MILLIS: i64 = 100_000 * 31_557_600_000;

/// The targets of a restore, each with what was sent to it and not yet answered.
pub(super) struct Writers {
    writers: Vec<Writer>,
    table: Table,
}

struct Writer {
    node: Node,
    connection: Connection,
    batch: Vec<u8>,
    /// What each unanswered command is about, for errors.
    waiting: Vec<Vec<u8>>,
    database: u32,
}

impl Writer {
    fn add(&mut self, database: u32, about: &[u8], command: &[u8]) -> Result<()> {
        if database != self.database {
            let select = wire::encode(&[b"SELECT", database.to_string().as_bytes()]);
            self.batch.extend_from_slice(&select);
            self.waiting.push(b"SELECT".to_vec());
            self.database = database;
        }
        self.batch.extend_from_slice(command);
        self.waiting.push(about.to_vec());
        if self.batch.len() >= BATCH_BYTES || self.waiting.len() >= BATCH_COMMANDS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.connection.send(&self.batch)?;
        self.batch.clear();
        for about in std::mem::take(&mut self.waiting) {
            if let Reply::Error(text) = self.connection.receive()? {
                let name = String::from_utf8_lossy(&about).into_owned();
                return Err(refusal(&[b"RESTORE"], &text).context("key", name));
            }
        }
        Ok(())
    }
}

impl Writers {
    /// Connects to all masters of the target.
    pub fn open(driver: &Redis, nodes: &[Node]) -> Result<Self> {
        let mut writers = Vec::new();
        for node in nodes {
            let connection = Connection::open(&driver.access, &node.endpoint)?;
            let (batch, waiting) = (Vec::new(), Vec::new());
            writers.push(Writer { node: node.clone(), connection, batch, waiting, database: 0 });
        }
        let first = writers.first_mut().ok_or_else(|| Error::internal("a target without servers"))?;
        let table = Table::read(&mut first.connection)?;
        Ok(Self { writers, table })
    }

    /// The target of a key.
    fn of(&mut self, key: &[u8]) -> Result<&mut Writer> {
        let slot = commands::slot(key);
        let at = match self.writers.as_slice() {
            [only] if only.node.slots.is_empty() => 0,
            writers => writers
                .iter()
                .position(|writer| writer.node.holds(slot))
                .ok_or_else(|| Error::new(Kind::Conflict, format!("no master of the target holds slot {slot}")))?,
        };
        Ok(&mut self.writers[at])
    }

    fn flush(&mut self) -> Result<()> {
        self.writers.iter_mut().try_for_each(Writer::flush)
    }

    /// What a command touches.
    fn touched(&mut self, command: &Command) -> Result<Touched> {
        if let Some(touched) = self.table.touched_without_asking(command)? {
            return Ok(touched);
        }
        let first = self.writers.first_mut().ok_or_else(|| Error::internal("a target without servers"))?;
        // The connection is used for questions only while nothing is unanswered on it.
        first.flush()?;
        self.table.touched(command, &mut first.connection)
    }

    fn is_cluster(&self) -> bool {
        self.writers.iter().any(|writer| !writer.node.slots.is_empty())
    }

    /// Loads a library of functions everywhere.
    fn function(&mut self, code: &[u8]) -> Result<()> {
        for writer in &mut self.writers {
            writer.connection.call(&[b"FUNCTION", b"LOAD", b"REPLACE", code])?;
        }
        Ok(())
    }
}

/// Counts of what was written.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Written {
    pub keys: u64,
    pub bytes: u64,
}

/// Restores the point, or the part of it, through `writers`.
pub(super) fn restore(
    writers: &mut Writers,
    context: &Context,
    source: &dyn Tree,
    facts: &StoreFacts,
    part: Option<&Part>,
    expiry: Expiry,
) -> Result<Written> {
    let mut written = Written::default();
    // Only commands behind an image could make anew what expired before them.
    let is_far = facts.servers.iter().any(|server| server.cut_offset > server.image_offset);
    for server in &facts.servers {
        let mut one = One { expiry, is_far, ..One::new(writers, context, part, &mut written) };
        one.find_flushes(source, server)?;
        one.image(source.open(&server.path(IMAGE)?)?)?;
        one.replay(source, server)?;
    }
    writers.flush()?;
    if is_far {
        set_true_times(writers, context, part)?;
    }
    match part {
        Some(_) if written.keys == 0 => Err(Error::new(Kind::NotFound, "the point holds no key of this part")),
        _ => Ok(written),
    }
}

/// Looks through the point before anything is touched: whether it can be read, whether its commands
/// can be followed, and whether it holds the part at all.
pub(super) fn check(
    writers: &mut Writers,
    context: &Context,
    source: &dyn Tree,
    facts: &StoreFacts,
    part: Option<&Part>,
) -> Result<()> {
    let mut written = Written::default();
    let mut is_there = part.is_none();
    for server in &facts.servers {
        let mut one = One::new(writers, context, part, &mut written);
        one.find_flushes(source, server)?;
        let walker = Walker::new(Verified::new(source.open(&server.path(IMAGE)?)?))?;
        is_there = is_there || one.is_in_image(walker)? || one.is_in_replay(source, server)?;
    }
    if is_there { Ok(()) } else { Err(Error::new(Kind::NotFound, "the point holds no key of this part")) }
}

/// Puts back what an image holds of a part, or all of it, into whichever masters hold the slots.
pub(super) fn put_back(
    writers: &mut Writers,
    reader: Box<dyn Read + Send>,
    context: &Context,
    part: Option<&Part>,
) -> Result<()> {
    let mut written = Written::default();
    One::new(writers, context, part, &mut written).image(reader)?;
    writers.flush()
}

/// Empties every master, or deletes what belongs to a part.
pub(super) fn clear(writers: &mut Writers, context: &Context, part: Option<&Part>) -> Result<()> {
    for writer in &mut writers.writers {
        let connection = &mut writer.connection;
        let Some(part) = part else {
            connection.command(&["FLUSHALL", "SYNC"])?;
            // Servers before 7 know no functions.
            connection.ask(&[b"FUNCTION", b"FLUSH", b"SYNC"])?;
            continue;
        };
        let databases = wire::keyspace(&connection.info("keyspace")?);
        for (database, _) in
            databases.into_iter().filter(|(number, _)| part.database.is_none_or(|only| only == *number))
        {
            connection.command(&["SELECT", &database.to_string()])?;
            delete_part(connection, context, part, database)?;
        }
        connection.command(&["SELECT", "0"])?;
    }
    Ok(())
}

/// Gives every key whose time is far away its own time; what has expired goes.
fn set_true_times(writers: &mut Writers, context: &Context, part: Option<&Part>) -> Result<()> {
    for writer in &mut writers.writers {
        let databases = wire::keyspace(&writer.connection.info("keyspace")?);
        for (database, _) in databases {
            writer.connection.command(&["SELECT", &database.to_string()])?;
            scan(&mut writer.connection, context, &mut |connection, keys| {
                let keys = keys.iter().filter(|key| part.is_none_or(|part| part.holds(database, key)));
                near(connection, &keys.copied().collect::<Vec<_>>())
            })?;
        }
        writer.connection.command(&["SELECT", "0"])?;
        writer.database = 0;
    }
    Ok(())
}

/// Gives these keys their own times.
fn near(connection: &mut Connection, keys: &[&[u8]]) -> Result<()> {
    let questions: Vec<u8> = keys.iter().flat_map(|key| wire::encode(&[b"PEXPIRETIME", key])).collect();
    connection.send(&questions)?;
    let mut commands = Vec::new();
    let mut count = 0;
    for key in keys {
        match connection.receive()? {
            Reply::Integer(millis) if millis > FAR_MILLIS => {
                commands.extend(wire::encode(&[b"PEXPIREAT", key, (millis - FAR_MILLIS).to_string().as_bytes()]));
                count += 1;
            }
            Reply::Error(text) => return Err(refusal(&[b"PEXPIRETIME"], &text)),
            _ => {}
        }
    }
    connection.send(&commands)?;
    for _ in 0..count {
        if let Reply::Error(text) = connection.receive()? {
            return Err(refusal(&[b"PEXPIREAT"], &text));
        }
    }
    Ok(())
}

fn delete_part(connection: &mut Connection, context: &Context, part: &Part, database: u32) -> Result<()> {
    scan(connection, context, &mut |connection, keys| {
        for key in keys.iter().filter(|key| part.holds(database, key) && !is_stamp(database, key)) {
            connection.call(&[b"UNLINK", key])?;
        }
        Ok(())
    })
}

/// What takes some of the keys of a database.
type TakeKeys<'a> = &'a mut dyn FnMut(&mut Connection, &[&[u8]]) -> Result<()>;

/// Hands out all keys of the selected database, as many at a time as the server gives.
fn scan(connection: &mut Connection, context: &Context, take: TakeKeys<'_>) -> Result<()> {
    let mut cursor = b"0".to_vec();
    loop {
        context.check()?;
        let answer = connection.call(&[b"SCAN", &cursor, b"COUNT", b"1000"])?;
        let [next, keys] = answer.items() else { return Err(super::rdb::damaged("SCAN answers something else")) };
        let keys: Vec<&[u8]> = keys.items().iter().filter_map(Reply::bytes).collect();
        take(connection, &keys)?;
        cursor = next.bytes().unwrap_or(b"0").to_vec();
        if cursor == b"0" {
            return Ok(());
        }
    }
}

/// One server of the point.
struct One<'a> {
    writers: &'a mut Writers,
    context: &'a Context,
    part: Option<&'a Part>,
    expiry: Expiry,
    written: &'a mut Written,
    /// Databases that a command empties, with the number of the last one that does; `None` for all.
    flushes: Vec<(Option<u32>, u64)>,
    /// Commands of the replay that were seen.
    commands: u64,
    /// Whether times of expiry are far away until all commands are carried out.
    is_far: bool,
}

impl<'a> One<'a> {
    /// With times of expiry as they are.
    fn new(writers: &'a mut Writers, context: &'a Context, part: Option<&'a Part>, written: &'a mut Written) -> Self {
        Self { writers, context, part, expiry: Expiry::Keep, written, flushes: Vec::new(), commands: 0, is_far: false }
    }

    fn holds(&self, database: u32, name: &[u8]) -> bool {
        !is_stamp(database, name) && self.part.is_none_or(|part| part.holds(database, name))
    }

    /// Whether what stands at command `number` in `database` is emptied later. 0 is the image.
    fn is_flushed(&self, database: u32, number: u64) -> bool {
        self.flushes.iter().any(|(only, at)| only.is_none_or(|only| only == database) && number < *at)
    }

    /// Finds the commands that empty databases: what they would empty is not written at all, because
    /// in the target it may lie beside what other servers held.
    fn find_flushes(&mut self, source: &dyn Tree, server: &ServerPart) -> Result<()> {
        let mut reader = BufReader::new(source.open(&server.path(REPLAY)?)?);
        let (mut database, mut number) = (0, 0);
        while let Some(command) = wire::read_command(&mut reader, 64)? {
            number += 1;
            match command.name().as_slice() {
                b"SELECT" => database = selected(&command)?,
                b"FLUSHDB" => self.flushes.push((Some(database), number)),
                b"FLUSHALL" => self.flushes.push((None, number)),
                b"SWAPDB" => {
                    return Err(Error::new(Kind::Unsupported, "databases were swapped between image and cut")
                        .hint("restore the whole point into a server of its own"));
                }
                name if commands::other_database(&command.arguments).is_some() => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    let message =
                        format!("`{name}` was carried out over the border of a database, between image and cut");
                    return Err(Error::new(Kind::Unsupported, message)
                        .hint("restore the whole point into a server of its own, as its master"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether an image holds anything that is restored.
    fn is_in_image(&self, mut walker: Walker<impl Read>) -> Result<bool> {
        loop {
            self.context.check()?;
            match walker.next()? {
                Item::End => return Ok(false),
                Item::Key(key) if self.holds(key.database, &key.name) && !self.is_flushed(key.database, 0) => {
                    return Ok(true);
                }
                Item::Key(key) => walker.skip_value(key.kind)?,
                _ => {}
            }
        }
    }

    /// Whether a command touches anything that is restored.
    fn is_in_replay(&mut self, source: &dyn Tree, server: &ServerPart) -> Result<bool> {
        let mut reader = BufReader::new(source.open(&server.path(REPLAY)?)?);
        let (mut database, mut number) = (0, 0);
        while let Some(command) = wire::read_command(&mut reader, u64::MAX)? {
            self.context.check()?;
            number += 1;
            match self.writers.touched(&command)? {
                Touched::Select(selected) => database = selected,
                Touched::Keys(keys) if !self.is_flushed(database, number) => {
                    let mut names = keys.iter().filter_map(|at| command.arguments.get(*at));
                    if names.any(|name| self.holds(database, name)) {
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
        Ok(false)
    }

    fn image(&mut self, reader: Box<dyn Read + Send>) -> Result<()> {
        let mut walker = Walker::new(Verified::new(reader))?;
        let version = u16::try_from(walker.version).map_err(|_| super::rdb::damaged("an impossible version"))?;
        loop {
            match walker.next()? {
                Item::End => return walker.finish(),
                Item::Function(code) if self.part.is_none() => self.writers.function(&code)?,
                Item::Key(key) if self.holds(key.database, &key.name) && !self.is_flushed(key.database, 0) => {
                    walker.capture(true);
                    walker.skip_value(key.kind)?;
                    let value = walker.take_captured();
                    walker.capture(false);
                    self.key(&key, &value, version)?;
                }
                Item::Key(key) => walker.skip_value(key.kind)?,
                _ => {}
            }
        }
    }

    fn key(&mut self, key: &Key, value: &[u8], version: u16) -> Result<()> {
        self.context.check()?;
        let mut payload = Vec::with_capacity(value.len() + 11);
        payload.push(key.kind);
        payload.extend_from_slice(value);
        payload.extend_from_slice(&version.to_le_bytes());
        let checksum = CRC.checksum(&payload);
        payload.extend_from_slice(&checksum.to_le_bytes());
        let far = if self.is_far { FAR_MILLIS } else { 0 };
        let expires = self.expiry.time(key.expires).map_or(0, |millis| millis.saturating_add(far)).max(0).to_string();
        let access = key.idle.map(|idle| idle.to_string()).or(key.frequency.map(|often| often.to_string()));
        let mut arguments: Vec<&[u8]> =
            vec![b"RESTORE", &key.name, expires.as_bytes(), &payload, b"REPLACE", b"ABSTTL"];
        if let Some(access) = &access {
            arguments.push(if key.idle.is_some() { b"IDLETIME" } else { b"FREQ" });
            arguments.push(access.as_bytes());
        }
        let command = wire::encode(&arguments);
        self.writers.of(&key.name)?.add(key.database, &key.name, &command)?;
        self.written.keys += 1;
        self.written.bytes += payload.len() as u64;
        self.context.advance(payload.len() as u64, 1);
        Ok(())
    }

    fn replay(&mut self, source: &dyn Tree, server: &ServerPart) -> Result<()> {
        let mut reader = BufReader::new(source.open(&server.path(REPLAY)?)?);
        let mut database = 0;
        while let Some(command) = wire::read_command(&mut reader, u64::MAX)? {
            self.context.check()?;
            self.commands += 1;
            match self.writers.touched(&command)? {
                Touched::Select(selected) => database = selected,
                Touched::Bracket | Touched::Database | Touched::Everything => {}
                Touched::Keys(keys) if keys.is_empty() => self.keyless(&command)?,
                Touched::Keys(keys) => self.keyed(command, database, &keys)?,
                Touched::Nothing => self.keyless(&command)?,
            }
        }
        Ok(())
    }

    /// A command that touches no key: functions go everywhere, the rest changes no data.
    fn keyless(&mut self, command: &Command) -> Result<()> {
        if command.name() != b"FUNCTION" || self.part.is_some() {
            return Ok(());
        }
        let arguments: Vec<&[u8]> = command.arguments.iter().map(Vec::as_slice).collect();
        self.writers.flush()?;
        for writer in &mut self.writers.writers {
            writer.connection.call(&arguments)?;
        }
        Ok(())
    }

    fn keyed(&mut self, command: Command, database: u32, keys: &[usize]) -> Result<()> {
        if self.is_flushed(database, self.commands) {
            return Ok(());
        }
        let name = |at: usize| command.arguments.get(at).map_or(&b""[..], Vec::as_slice);
        let held = keys.iter().filter(|at| self.holds(database, name(**at))).count();
        if held == 0 {
            return Ok(());
        }
        let is_split = self.writers.is_cluster()
            && keys.iter().any(|at| commands::slot(name(*at)) != commands::slot(name(keys[0])));
        if held < keys.len() || is_split {
            return self.split(command, database, keys);
        }
        let about = name(keys[0]).to_vec();
        self.send(command, database, &about)
    }

    fn send(&mut self, command: Command, database: u32, about: &[u8]) -> Result<()> {
        let Some(mut command) = self.expiry.command(command) else { return Ok(()) };
        // Times of fields of a hash do not end the key.
        if self.is_far && !matches!(command.name().as_slice(), b"HPEXPIREAT" | b"HEXPIREAT" | b"HSETEX") {
            let Some(later) = Expiry::Shift(FAR_MILLIS).command(command) else { return Ok(()) };
            command = later;
        }
        let bytes = command.encode();
        self.written.keys += 1;
        self.written.bytes += bytes.len() as u64;
        self.writers.of(about)?.add(database, about, &bytes)
    }

    /// A command whose keys do not all belong here, taken apart where that is the same.
    fn split(&mut self, command: Command, database: u32, keys: &[usize]) -> Result<()> {
        let upper = command.name();
        let stride = match upper.as_slice() {
            b"DEL" | b"UNLINK" => 1,
            b"MSET" => 2,
            _ => {
                let name = String::from_utf8_lossy(&upper).into_owned();
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("`{name}` was carried out over the border of this part, between image and cut"),
                )
                .hint("restore the whole point into a server of its own, and copy the part from there"));
            }
        };
        let single: &[u8] = if upper == b"MSET" { b"SET" } else { &upper };
        for at in keys {
            let Some(arguments) = command.arguments.get(*at..at + stride) else { continue };
            let about = arguments[0].clone();
            if self.holds(database, &about) {
                let arguments = std::iter::once(single.to_vec()).chain(arguments.iter().cloned()).collect();
                self.send(Command { arguments, wire_bytes: 0 }, database, &about)?;
            }
        }
        Ok(())
    }
}

/// The database that a `SELECT` names.
pub(super) fn selected(command: &Command) -> Result<u32> {
    let text = command.arguments.get(1).map(|text| String::from_utf8_lossy(text).into_owned());
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or_else(|| super::rdb::damaged("the stream of commands selects a database that is none"))
}
