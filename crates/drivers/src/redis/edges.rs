//! References that leave a server, and keys that others refer to: evaluated while the image passes.
//!
//! An image passes once, so queries are known before `prepare`. What matches goes to a file on our
//! disk; commands behind the image that touch a matching key are remembered, and carried out on what
//! the file holds when the answer is asked for, as far as the cut. A command that cannot be carried out
//! here is an error: a wrong answer would be worse than none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stillpoint_core::driver::{Context, Edge, EdgeQuery, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::commands;
use super::effects::{self, Touch, Value};
use super::rdb::{Element, Key, Walker, damaged};
use super::replica::{Purpose, Replica};
use super::server;
use super::wire::{self, Command};
use super::{Redis, is_stamp};
use crate::phases::Visit;
use crate::place::matches_name;

/// What remembered commands may take in memory.
const COMMANDS_BYTES_MAX: usize = 64 << 20;
/// The longest piece that the file may hold; a damaged length is not believed.
const PIECE_BYTES_MAX: u32 = 1 << 30;
/// Marks in the file: what follows, or that the key ends.
const END: u8 = 0;
const ONE: u8 = 1;
const PAIR: u8 = 2;

/// What a query takes from the keys that match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verb {
    /// The name of the key itself.
    Names,
    /// The string.
    Text,
    /// The value of one field of the hash.
    Field(Vec<u8>),
    /// All values of the hash.
    Values,
    /// All field names of the hash.
    Fields,
    /// The members of the set.
    Members,
    /// The elements of the list.
    Items,
    /// The members of the sorted set.
    Ranked,
}

/// One query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    pub verb: Verb,
    pattern: Vec<u8>,
    database: Option<u32>,
}

impl Query {
    /// Reads `GET models:*`, `HGET models:* artifact`, `SMEMBERS s`, … with `IN 3` behind for one
    /// database; or what the store holds: `keys`.
    pub fn parse(query: &EdgeQuery) -> Result<Self> {
        let names = |pattern: &str| Self { verb: Verb::Names, pattern: pattern.into(), database: None };
        match query {
            EdgeQuery::Held(kind) => match kind.split_once(':') {
                None if kind == "keys" => Ok(names("*")),
                Some(("keys", pattern)) => Ok(names(pattern)),
                _ => Err(Error::new(Kind::Unsupported, format!("a Redis server holds no `{kind}`"))
                    .hint("kinds are `keys`, and `keys:<pattern>` for some of them")),
            },
            EdgeQuery::Which { .. } => {
                Err(Error::new(Kind::Unsupported, "a Redis server lists its keys; it is not asked for single ones"))
            }
            EdgeQuery::From(text) => Self::parse_text(text),
        }
    }

    fn parse_text(text: &str) -> Result<Self> {
        let wrong = || {
            Error::new(Kind::Config, format!("`{text}` is no query")).hint(
                "GET models:*   HGET models:* artifact   HVALS, HKEYS, SMEMBERS, LRANGE, ZRANGE, KEYS pattern; \
                 `IN 3` behind it for one database",
            )
        };
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let mut database = None;
        if let [.., word, number] = words.as_slice()
            && word.eq_ignore_ascii_case("in")
        {
            database = Some(number.parse().map_err(|_| wrong())?);
            words.truncate(words.len() - 2);
        }
        let [verb, pattern, rest @ ..] = words.as_slice() else { return Err(wrong()) };
        let verb = match (verb.to_ascii_uppercase().as_str(), rest) {
            ("GET", []) => Verb::Text,
            ("HGET", [field]) => Verb::Field(field.as_bytes().to_vec()),
            ("HVALS", []) => Verb::Values,
            ("HKEYS", []) => Verb::Fields,
            ("SMEMBERS", []) => Verb::Members,
            ("LRANGE", [] | ["0", "-1"]) => Verb::Items,
            ("ZRANGE", [] | ["0", "-1"]) => Verb::Ranked,
            ("KEYS", []) => Verb::Names,
            _ => return Err(wrong()),
        };
        Ok(Self { verb, pattern: pattern.as_bytes().to_vec(), database })
    }

    fn matches(&self, database: u32, name: &[u8]) -> bool {
        self.database.is_none_or(|only| only == database)
            && !is_stamp(database, name)
            && matches_name(&self.pattern, name)
    }

    /// Whether values of this type byte hold what the query takes.
    fn fits(&self, kind: u8) -> bool {
        match self.verb {
            Verb::Names => true,
            Verb::Text => kind == 0,
            Verb::Field(_) | Verb::Values | Verb::Fields => matches!(kind, 4 | 9 | 13 | 16 | 22..=25),
            Verb::Members => matches!(kind, 2 | 11 | 20),
            Verb::Items => matches!(kind, 1 | 10 | 14 | 18),
            Verb::Ranked => matches!(kind, 3 | 5 | 12 | 17),
        }
    }

    /// Hands out the edges of one key.
    fn edges(&self, name: &[u8], value: &Value, visit: &mut (dyn FnMut(Edge) -> Result<()> + Send)) -> Result<()> {
        let owner = format!("key `{}`", name.escape_ascii());
        let mut give = |referent: &[u8], owner: String| visit(Edge { referent: referent.to_vec(), owner });
        match (&self.verb, value) {
            (_, Value::Absent) => Ok(()),
            (Verb::Names, _) => give(name, String::new()),
            (Verb::Field(field), Value::Map(map)) => match map.get(field) {
                Some(value) => give(value, format!("{owner} field `{}`", field.escape_ascii())),
                None => Ok(()),
            },
            (Verb::Values, Value::Map(map)) => map
                .iter()
                .try_for_each(|(field, value)| give(value, format!("{owner} field `{}`", field.escape_ascii()))),
            (Verb::Fields, Value::Map(map)) => map.keys().try_for_each(|field| give(field, owner.clone())),
            (_, Value::Text(text)) => give(text, owner),
            (_, Value::Set(members)) => members.iter().try_for_each(|member| give(member, owner.clone())),
            (_, Value::List(items)) => items.iter().try_for_each(|item| give(item, owner.clone())),
            _ => Err(Error::internal("a key has another type than its query")),
        }
    }

    /// What the key is before anything is known of it.
    fn empty(&self) -> Value {
        match self.verb {
            Verb::Names => Value::Present,
            Verb::Text => Value::Text(Vec::new()),
            Verb::Field(_) | Verb::Values | Verb::Fields => Value::Map(BTreeMap::new()),
            Verb::Members | Verb::Ranked => Value::Set(BTreeSet::new()),
            Verb::Items => Value::List(Vec::new()),
        }
    }
}

/// A key of one database.
type Place = (u32, Vec<u8>);

/// Collects what the queries of one server match.
pub(super) struct Collector {
    queries: Vec<Query>,
    folder: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    file: Option<BufWriter<File>>,
    /// Offsets and commands, by matching key.
    commands: BTreeMap<Place, Vec<(u64, Command)>>,
    commands_bytes: usize,
    /// Databases that were emptied, `None` for all, with the offset.
    emptied: Vec<(Option<u32>, u64)>,
    /// The database that commands speak to.
    database: u32,
    /// Why no answer can be given, with the offset from which on that is so.
    failed: Option<(u64, Kind, String)>,
}

impl Collector {
    /// A collector for these queries; its file lies in `folder`.
    pub fn new(queries: Vec<Query>, folder: PathBuf) -> Self {
        Self { queries, folder, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any query looks at this key.
    pub fn wants(&self, key: &Key) -> bool {
        self.queries.iter().any(|query| query.fits(key.kind) && query.matches(key.database, &key.name))
    }

    /// Takes what the queries want of a key of the image.
    pub fn key<R: Read>(&self, key: &Key, walker: &mut Walker<R>) -> Result<()> {
        let wanted = |query: &&Query| query.fits(key.kind) && query.matches(key.database, &key.name);
        let numbered = self.queries.iter().enumerate();
        let wanted: Vec<(usize, &Query)> = numbered.filter(|(_, query)| wanted(query)).collect();
        let mut inner = self.inner();
        let message = || format!("cannot write to {}", self.folder.display());
        if inner.file.is_none() {
            std::fs::create_dir_all(&self.folder).or_io(message)?;
            inner.file = Some(BufWriter::new(tempfile::tempfile_in(&self.folder).or_io(message)?));
        }
        let Some(file) = &mut inner.file else { return Err(Error::internal("a file that was just made")) };
        // A value is walked once, whatever the number of queries: what it holds is told query by query.
        let mut told: Vec<Vec<u8>> = wanted.iter().map(|(number, _)| head(*number, key)).collect();
        if wanted.iter().all(|(_, query)| query.verb == Verb::Names) {
            walker.skip_value(key.kind)?;
        } else {
            walker.visit_value(key.kind, &mut |element| {
                for ((_, query), told) in wanted.iter().zip(&mut told) {
                    tell(query, element, told);
                    if told.len() > 1 << 20 && wanted.len() == 1 {
                        file.write_all(told).or_io(message)?;
                        told.clear();
                    }
                }
                Ok(())
            })?;
        }
        for told in &mut told {
            told.push(END);
            file.write_all(told).or_io(message)?;
        }
        Ok(())
    }

    /// Notes a command of the stream that ends at `offset`.
    pub fn command(&self, offset: u64, command: &Command) -> Result<()> {
        let mut inner = self.inner();
        let database = inner.database;
        match effects::touched(&command.arguments) {
            Touch::Nothing => {}
            Touch::Select(database) => inner.database = database,
            Touch::Empties => inner.emptied.push((Some(database), offset)),
            Touch::EmptiesAll => inner.emptied.push((None, offset)),
            Touch::Keys(keys) => {
                for key in keys.iter().filter_map(|at| command.arguments.get(*at)) {
                    if self.queries.iter().any(|query| query.matches(database, key)) {
                        inner.commands_bytes += key.len() + 64 + command.wire_bytes as usize;
                        inner.commands.entry((database, key.clone())).or_default().push((offset, command.clone()));
                    }
                }
            }
            Touch::Swaps => {
                inner.fail(offset, Kind::Unsupported, "databases changed places".to_owned());
            }
            Touch::Unknown => {
                let mut arguments = command.arguments.iter().skip(1);
                let other = commands::other_database(&command.arguments).unwrap_or(database);
                let concerns = |argument: &Vec<u8>| {
                    self.queries.iter().any(|query| query.matches(database, argument) || query.matches(other, argument))
                };
                if arguments.any(concerns) {
                    let name = String::from_utf8_lossy(&command.name()).into_owned();
                    inner.fail(
                        offset,
                        Kind::Unsupported,
                        format!("`{name}` was carried out on keys that references need"),
                    );
                }
            }
        }
        if inner.commands_bytes > COMMANDS_BYTES_MAX {
            inner.commands.clear();
            inner.commands_bytes = 0;
            inner.fail(offset, Kind::Exhausted, "too much was written to keys that references need".to_owned());
        }
        Ok(())
    }

    /// The image could not be walked.
    pub fn fail(&self, error: &Error) {
        self.inner().fail(0, error.kind(), error.message().to_owned());
    }

    /// Hands out the edges of one query as they are at `offset`.
    fn answer(&self, query: &Query, offset: u64, context: &Context, visit: Visit<'_>) -> Result<()> {
        let number = self.queries.iter().position(|known| known == query).ok_or_else(|| {
            Error::new(Kind::Config, "the query was not announced before the cut; the image has passed")
        })?;
        let mut inner = self.inner();
        if let Some((from, kind, message)) = &inner.failed
            && *from <= offset
        {
            return Err(Error::new(*kind, format!("references cannot be evaluated: {message}"))
                .hint("`mode: rdb` makes the image at the cut, so that no command has to be followed"));
        }
        let mut seen: BTreeSet<Place> = BTreeSet::new();
        if let Some(file) = &mut inner.file {
            let message = || format!("cannot read back from {}", self.folder.display());
            file.flush().or_io(message)?;
            let mut file = file.get_ref().try_clone().or_io(message)?;
            file.seek(SeekFrom::Start(0)).or_io(message)?;
            let mut records = Records { reader: BufReader::with_capacity(256 << 10, file) };
            while let Some((at, place)) = records.next()? {
                context.check()?;
                let wanted = at as usize == number;
                let mut value = if wanted { query.empty() } else { Value::Absent };
                records.pieces(&mut |first, second| {
                    if wanted {
                        value.add(first, second);
                    }
                })?;
                if wanted {
                    let touched = inner.commands.contains_key(&place);
                    inner.bring_up(&place, offset, &mut value)?;
                    query.edges(&place.1, &value, visit)?;
                    if touched {
                        seen.insert(place);
                    }
                }
            }
        }
        let made: Vec<&Place> = inner.commands.keys().filter(|place| !seen.contains(*place)).collect();
        for place in made.into_iter().filter(|place| query.matches(place.0, &place.1)) {
            let mut value = Value::Absent;
            inner.bring_up(place, offset, &mut value)?;
            effects::fit(&query.verb, &mut value);
            query.edges(&place.1, &value, visit)?;
        }
        Ok(())
    }
}

/// The begin of a key's record.
fn head(number: usize, key: &Key) -> Vec<u8> {
    let mut bytes = u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes().to_vec();
    bytes.extend_from_slice(&key.database.to_le_bytes());
    piece(&mut bytes, &key.name);
    bytes
}

fn piece(bytes: &mut Vec<u8>, data: &[u8]) {
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(data);
}

/// Appends what a query takes of one element.
fn tell(query: &Query, element: Element<'_>, told: &mut Vec<u8>) {
    match (&query.verb, element) {
        (Verb::Text, Element::Text(data))
        | (Verb::Items, Element::Item(data))
        | (Verb::Members, Element::Member(data))
        | (Verb::Ranked, Element::Scored(data, _)) => {
            told.push(ONE);
            piece(told, data);
        }
        (Verb::Field(only), Element::Field(field, _, _)) if field != only => {}
        (Verb::Field(_) | Verb::Values | Verb::Fields, Element::Field(field, value, _)) => {
            told.push(PAIR);
            piece(told, field);
            piece(told, value);
        }
        _ => {}
    }
}

impl Inner {
    fn fail(&mut self, offset: u64, kind: Kind, message: String) {
        self.failed.get_or_insert((offset, kind, message));
    }

    /// Carries out what happened to a key up to `offset`.
    fn bring_up(&self, place: &Place, offset: u64, value: &mut Value) -> Result<()> {
        let empty: &[(u64, Command)] = &[];
        let commands = self.commands.get(place).map_or(empty, Vec::as_slice).iter();
        let emptied = self.emptied.iter().filter(|(only, _)| only.is_none_or(|only| only == place.0));
        let mut emptied = emptied.map(|(_, at)| *at).filter(|at| *at <= offset).peekable();
        for (at, command) in commands.filter(|(at, _)| *at <= offset) {
            while emptied.next_if(|emptied| emptied < at).is_some() {
                *value = Value::Absent;
            }
            effects::apply(value, &place.1, &command.arguments)?;
        }
        if emptied.next().is_some() {
            *value = Value::Absent;
        }
        Ok(())
    }
}

/// Reads the file back.
struct Records {
    reader: BufReader<File>,
}

impl Records {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).or_io(|| "cannot read back what references need".to_owned())?;
        Ok(bytes)
    }

    fn piece(&mut self) -> Result<Vec<u8>> {
        let count = u32::from_le_bytes(self.array()?);
        if count > PIECE_BYTES_MAX {
            return Err(damaged("a value that references need is too large"));
        }
        let mut bytes = vec![0; count as usize];
        self.reader.read_exact(&mut bytes).or_io(|| "cannot read back what references need".to_owned())?;
        Ok(bytes)
    }

    /// The number of the query and the key; `None` at the end.
    fn next(&mut self) -> Result<Option<(u32, Place)>> {
        use std::io::BufRead;
        let message = || "cannot read back what references need".to_owned();
        if self.reader.fill_buf().or_io(message)?.is_empty() {
            return Ok(None);
        }
        let number = u32::from_le_bytes(self.array()?);
        let database = u32::from_le_bytes(self.array()?);
        Ok(Some((number, (database, self.piece()?))))
    }

    fn pieces(&mut self, take: &mut dyn FnMut(Vec<u8>, Option<Vec<u8>>)) -> Result<()> {
        loop {
            match self.array::<1>()?[0] {
                END => return Ok(()),
                ONE => take(self.piece()?, None),
                PAIR => {
                    let first = self.piece()?;
                    take(first, Some(self.piece()?));
                }
                _ => return Err(damaged("what references need was changed on disk")),
            }
        }
    }
}

/// Answers from the pin, or from a fresh image of the live store.
pub(super) fn edges(
    driver: &Redis,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: Visit<'_>,
) -> Result<()> {
    context.check()?;
    let query = Query::parse(query)?;
    let Some(pin) = pin else { return live(driver, context, query, visit) };
    let state = driver.state();
    if state.pinned.as_ref() != Some(pin) || !state.is_whole {
        return Err(Error::new(Kind::PinLost, "references are evaluated after the drain"));
    }
    for shard in &state.shards {
        let Some(collector) = &shard.collector else {
            return Err(Error::new(Kind::Config, "the query was not announced before the cut; the image has passed"));
        };
        collector.answer(&query, shard.offset, context, visit)?;
    }
    Ok(())
}

fn live(driver: &Redis, context: &Context, query: Query, visit: Visit<'_>) -> Result<()> {
    let endpoint = driver.endpoint()?;
    let (mut control, info) = server::open(&driver.access, &endpoint)?;
    server::check_is_master(&mut control, &info)?;
    for node in server::masters(&mut control, &info)? {
        let collector = std::sync::Arc::new(Collector::new(vec![query.clone()], driver.scratch.clone()));
        let shared = std::sync::Arc::clone(&collector);
        let purpose = Purpose { collector: Some(shared), ..Purpose::image(driver, &node, 1) };
        let replica = Replica::attach(purpose, context)?;
        // The image itself is of no use here, but must be taken out of its queue.
        let copied = std::io::copy(&mut replica.image().reader(), &mut std::io::sink());
        copied.map_err(|error| wire::unwrapped(error, "cannot receive the image"))?;
        collector.answer(&query, u64::MAX, context, visit)?;
    }
    Ok(())
}
