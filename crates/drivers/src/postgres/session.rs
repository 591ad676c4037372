//! One session of a server: queries, and COPY in both directions.
//!
//! Blocking, because every phase of a driver is, and with a buffer of its own, because a COPY brings
//! millions of small messages (docs/decisions/0008). Knows SQL only as text. Every wait looks at the
//! [`Context`] a few times a second; a cancelled one also asks the server to stop.

mod login;
mod watch;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use postgres_protocol::message::frontend;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

use super::endpoint::open;
pub(super) use super::endpoint::{Address, Endpoint};
use super::tls::Stream;
use super::wire::{self, Row, RowHash, ServerMessage, Tally};

/// What one read asks for; holds some thousand rows.
const INPUT_BYTES: usize = 256 << 10;
/// Data of one message to the server.
const OUTPUT_BYTES: usize = 256 << 10;
/// How long one call waits before it looks whether someone asked to stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// What a COPY TO STDOUT has still to hand out.
#[derive(Default)]
struct Outgoing {
    /// Bytes of the current message that were not handed out yet.
    left: usize,
    /// The row under way, where it came in several pieces.
    row: RowHash,
    done: bool,
}

/// A logged-in connection.
pub(super) struct Session {
    stream: Stream,
    input: Vec<u8>,
    begin: usize,
    end: usize,
    output: BytesMut,
    endpoint: Endpoint,
    database: String,
    process: i32,
    secret: i32,
    parameters: BTreeMap<String, String>,
    transaction: u8,
    context: Context,
    /// No answer is waited for longer than this.
    limit: Option<Duration>,
    usable: bool,
    /// How often the server was asked in the silence that lasts.
    asked: u64,
    /// Whether it was waiting for us when it was asked last.
    waits_for_us: bool,
    outgoing: Outgoing,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { database, process, .. } = self;
        f.debug_struct("Session").field("database", database).field("process", process).finish_non_exhaustive()
    }
}

/// What every session of ours relies on. Each line names the first major version that knows it.
const EVERYWHERE: &[(u32, &str)] = &[
    (0, "SET DateStyle = 'ISO'"),
    (0, "SET IntervalStyle = 'postgres'"),
    // Shortest text that reads back as the same number; before 12 it takes 3 for that.
    (0, "SET extra_float_digits = 3"),
    (0, "SET bytea_output = 'hex'"),
    (0, "SET TimeZone = 'UTC'"),
    (0, "SET statement_timeout = 0"),
    (0, "SET lock_timeout = 0"),
    (10, "SET idle_in_transaction_session_timeout = 0"),
    (14, "SET idle_session_timeout = 0"),
    (17, "SET transaction_timeout = 0"),
    // A filter that hides rows must be an error, never a smaller table.
    (10, "SET row_security = off"),
    // Names without schema must not be found in whatever schema someone made.
    (0, "SET search_path = ''"),
    // Tables are read from their begin, so that unchanged ones give the same bytes.
    (0, "SET synchronize_seqscans = off"),
    (0, "SET standard_conforming_strings = on"),
];

impl Session {
    /// Connects to `database` and logs in. The session's language and time-outs are those of every
    /// session of ours.
    pub(super) fn connect(endpoint: &Endpoint, database: &str, context: &Context) -> Result<Self> {
        let deadline = Instant::now() + endpoint.connect_time_max;
        let stream = open(endpoint, deadline)?;
        let mut session = Self {
            stream,
            input: vec![0; 16 << 10],
            begin: 0,
            end: 0,
            output: BytesMut::new(),
            endpoint: endpoint.clone(),
            database: database.to_owned(),
            process: 0,
            secret: 0,
            parameters: BTreeMap::new(),
            transaction: b'I',
            context: context.clone(),
            limit: Some(endpoint.connect_time_max),
            usable: true,
            asked: 0,
            waits_for_us: false,
            outgoing: Outgoing::default(),
        };
        session.stream.set_patience(PATIENCE).map_err(|error| Error::io("cannot set up the connection", error))?;
        session.log_in()?;
        let major = session.major();
        let mut batch: Vec<&str> =
            EVERYWHERE.iter().filter(|(since, _)| major >= *since).map(|(_, sql)| *sql).collect();
        // Such a database converts nothing, whatever we ask for.
        let raw = session.parameter("server_encoding") == Some("SQL_ASCII");
        batch.push(if raw { "SET client_encoding = 'SQL_ASCII'" } else { "SET client_encoding = 'UTF8'" });
        session.execute(&batch.join("; "))?;
        session.limit = None;
        Ok(session)
    }

    /// The database it is connected to.
    pub(super) fn database(&self) -> &str {
        &self.database
    }

    /// The server's process, as `pg_stat_activity` has it.
    pub(super) fn process(&self) -> i32 {
        self.process
    }

    /// What the server reported, e.g. `server_version`.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's major version; 0 if it says nothing sensible.
    pub(super) fn major(&self) -> u32 {
        let version = self.parameter("server_version").unwrap_or_default();
        version.split(|c: char| !c.is_ascii_digit()).next().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Whether a transaction is open (also a failed one).
    pub(super) fn in_transaction(&self) -> bool {
        self.transaction != b'I'
    }

    /// Whether a transaction is open in which nothing failed.
    pub(super) fn is_in_good_transaction(&self) -> bool {
        self.transaction == b'T'
    }

    /// Whether it can take another query.
    pub(super) fn is_usable(&self) -> bool {
        self.usable
    }

    /// From now on no answer is waited for longer than this; `None` while the server may work as long as it
    /// likes.
    pub(super) fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// Whose wish to stop is heard from now on.
    pub(super) fn set_context(&mut self, context: &Context) {
        self.context = context.clone();
    }

    /// Runs one or more statements; fails at the first that fails.
    pub(super) fn execute(&mut self, sql: &str) -> Result<()> {
        self.query(sql).map(drop)
    }

    /// Runs one or more statements and returns the rows of all of them.
    pub(super) fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        self.each_row(sql, &mut |row| {
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }

    /// Runs a statement that yields exactly one row.
    pub(super) fn query_one(&mut self, sql: &str) -> Result<Row> {
        let mut rows = self.query(sql)?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            _ => Err(Error::internal(format!("one row was expected of: {}", shortened(sql)))),
        }
    }

    /// Runs statements and hands each row on as it comes. When `visit` fails, the rest of the answer is
    /// read and dropped, so that the session stays usable.
    pub(super) fn each_row(&mut self, sql: &str, visit: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
        self.ask(sql)?;
        let mut failed = None;
        loop {
            let (tag, body) = self.message()?;
            match tag {
                b'D' if failed.is_none() => failed = Row::parse(&self.input[body]).and_then(&mut *visit).err(),
                b'E' if failed.is_none() => failed = Some(self.server_error(body, sql)),
                b'G' => {
                    // Nobody here has data for it.
                    frontend::copy_fail("no data", &mut self.output).map_err(unsendable)?;
                    self.send()?;
                }
                b'Z' => return failed.map_or(Ok(()), Err),
                _ => {}
            }
        }
    }

    /// Begins a `COPY … TO STDOUT`, to be read by [`Session::copy_read`].
    pub(super) fn copy_out(&mut self, sql: &str) -> Result<()> {
        if self.input.len() < INPUT_BYTES {
            self.input.resize(INPUT_BYTES, 0);
        }
        self.outgoing = Outgoing::default();
        self.ask(sql)?;
        self.until(b'H', sql)
    }

    /// Fills `buffer` with data of the COPY as far as it is there; 0 at its end. Rows are counted and
    /// hashed on their way. A row that the server splits is one row: a line feed ends it.
    pub(super) fn copy_read(&mut self, buffer: &mut [u8], tally: &mut Tally) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() && !self.outgoing.done {
            if self.outgoing.left > 0 {
                filled += self.copy_piece(&mut buffer[filled..], tally, filled == 0)?;
                if self.outgoing.left > 0 {
                    break;
                }
                continue;
            }
            let ready = &self.input[self.begin..self.end];
            match wire::frame(ready)? {
                Some(frame) if frame.tag == b'd' && frame.bytes <= ready.len() => {
                    let data = &ready[5..frame.bytes];
                    if data.len() > buffer.len() - filled
                        || !self.outgoing.row.is_empty()
                        || data.last() != Some(&b'\n')
                    {
                        self.begin += 5;
                        self.outgoing.left = frame.bytes - 5;
                        continue;
                    }
                    buffer[filled..filled + data.len()].copy_from_slice(data);
                    filled += data.len();
                    tally.row(data);
                    self.begin += frame.bytes;
                }
                Some(frame) if frame.tag == b'd' => {
                    if frame.bytes > INPUT_BYTES / 2 {
                        // A long row: handed out as it comes.
                        self.begin += 5;
                        self.outgoing.left = frame.bytes - 5;
                    } else if filled > 0 {
                        break;
                    } else {
                        self.fill()?;
                    }
                }
                Some(_) => self.copy_control()?,
                None if filled > 0 => break,
                None => self.fill()?,
            }
        }
        Ok(filled)
    }

    /// Hands out a part of the current message.
    fn copy_piece(&mut self, buffer: &mut [u8], tally: &mut Tally, may_wait: bool) -> Result<usize> {
        if self.begin == self.end {
            if !may_wait {
                return Ok(0);
            }
            self.fill()?;
        }
        let count = self.outgoing.left.min(self.end - self.begin).min(buffer.len());
        let piece = &self.input[self.begin..self.begin + count];
        buffer[..count].copy_from_slice(piece);
        self.outgoing.row.update(piece);
        self.outgoing.left -= count;
        self.begin += count;
        if self.outgoing.left == 0 && piece_ends_row(&buffer[..count]) {
            let (bytes, hash) = std::mem::take(&mut self.outgoing.row).finish();
            tally.add(bytes, hash);
        }
        Ok(count)
    }

    /// Takes a message that is no data: the end, an error, or something to note.
    fn copy_control(&mut self) -> Result<()> {
        let (tag, body) = self.message()?;
        match tag {
            b'E' => {
                let error = self.server_error(body, "COPY");
                self.outgoing.done = true;
                self.drop_until_ready()?;
                Err(error)
            }
            b'Z' => {
                self.outgoing.done = true;
                if !self.outgoing.row.is_empty() {
                    return Err(wire::garbled());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Begins a `COPY … FROM STDIN`.
    pub(super) fn copy_in(&mut self, sql: &str) -> Result<()> {
        self.ask(sql)?;
        self.until(b'G', sql)
    }

    /// Sends data of the COPY. An error of the server shows in [`Session::copy_finish`].
    pub(super) fn copy_write(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let (part, rest) = data.split_at(data.len().min(OUTPUT_BYTES));
            self.output.put_u8(b'd');
            self.output.put_u32(part.len() as u32 + 4);
            self.output.put_slice(part);
            self.send()?;
            data = rest;
        }
        Ok(())
    }

    /// Ends the COPY and returns how many rows the server took.
    pub(super) fn copy_finish(&mut self) -> Result<u64> {
        frontend::copy_done(&mut self.output);
        self.send()?;
        let mut rows = 0;
        let mut failed = None;
        loop {
            let (tag, body) = self.message()?;
            match tag {
                b'C' => {
                    let text = String::from_utf8_lossy(&self.input[body]).into_owned();
                    rows = text.trim_end_matches('\0').strip_prefix("COPY ").and_then(|n| n.parse().ok()).unwrap_or(0);
                }
                b'E' => failed = Some(self.server_error(body, "COPY")),
                b'Z' => return failed.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Gives the COPY up; the server keeps nothing of it.
    pub(super) fn copy_fail(&mut self, why: &str) -> Result<()> {
        frontend::copy_fail(&why.replace('\0', " "), &mut self.output).map_err(unsendable)?;
        self.send()?;
        self.drop_until_ready()
    }

    /// Says good-bye. Dropping a session does the same without looking.
    pub(super) fn close(mut self) {
        self.usable = false;
        frontend::terminate(&mut self.output);
        // The server notices a closed connection as well.
        drop(self.stream.write_all(&self.output).and_then(|()| self.stream.flush()));
    }

    /// Sends a simple query.
    fn ask(&mut self, sql: &str) -> Result<()> {
        if !self.usable {
            return Err(self.lost());
        }
        frontend::query(sql, &mut self.output).map_err(unsendable)?;
        self.send()
    }

    /// Reads until the message `tag` comes; an error of the server ends the statement.
    fn until(&mut self, tag: u8, sql: &str) -> Result<()> {
        let mut failed = None;
        loop {
            let (seen, body) = self.message()?;
            match seen {
                seen if seen == tag => return Ok(()),
                b'E' => failed = Some(self.server_error(body, sql)),
                b'Z' => {
                    let other = || Error::internal(format!("no COPY came of: {}", shortened(sql)));
                    return Err(failed.unwrap_or_else(other));
                }
                _ => {}
            }
        }
    }

    fn drop_until_ready(&mut self) -> Result<()> {
        while self.message()?.0 != b'Z' {}
        Ok(())
    }

    fn server_error(&self, body: std::ops::Range<usize>, sql: &str) -> Error {
        let said = ServerMessage::parse(&self.input[body]);
        said.into_error(format!("database `{}` refused: {}", self.database, shortened(sql)))
    }

    /// The next message's type, and where its body lies in the input. Parameters are noted on the way,
    /// notices passed over.
    fn message(&mut self) -> Result<(u8, std::ops::Range<usize>)> {
        loop {
            let ready = &self.input[self.begin..self.end];
            let frame = match wire::frame(ready)? {
                Some(frame) if frame.bytes <= ready.len() => frame,
                Some(frame) => {
                    self.make_room(frame.bytes);
                    self.fill()?;
                    continue;
                }
                None => {
                    self.fill()?;
                    continue;
                }
            };
            let body = self.begin + 5..self.begin + frame.bytes;
            self.begin += frame.bytes;
            match frame.tag {
                b'S' => {
                    let mut parts = self.input[body].split(|&byte| byte == 0);
                    let mut next = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
                    let (name, value) = (next(), next());
                    self.parameters.insert(name, value);
                }
                // Notices and notifications are for people who watch.
                b'A' | b'N' => {}
                b'Z' => {
                    self.transaction = *self.input[body.clone()].first().ok_or_else(wire::garbled)?;
                    return Ok((b'Z', body));
                }
                b'E' if self.process != 0 => {
                    let said = ServerMessage::parse(&self.input[body.clone()]);
                    if !matches!(said.severity.as_str(), "FATAL" | "PANIC") {
                        return Ok((b'E', body));
                    }
                    // The server closes the connection behind it; whatever was asked has no answer.
                    self.usable = false;
                    self.transaction = b'I';
                    return Err(said.into_error(format!("the server ended the session with {}", self.endpoint.address)));
                }
                tag => return Ok((tag, body)),
            }
        }
    }

    fn make_room(&mut self, bytes: usize) {
        if self.input.len() < bytes {
            self.input.resize(bytes, 0);
        }
    }

    /// Reads more input; waits until there is some.
    fn fill(&mut self) -> Result<()> {
        if !self.usable {
            return Err(self.lost());
        }
        if self.begin > 0 {
            self.input.copy_within(self.begin..self.end, 0);
            self.end -= self.begin;
            self.begin = 0;
        }
        if self.end == self.input.len() {
            let larger = self.input.len() * 2;
            self.make_room(larger);
        }
        let since = Instant::now();
        loop {
            match self.stream.read(&mut self.input[self.end..]) {
                Ok(0) => {
                    self.usable = false;
                    return Err(self.lost());
                }
                Ok(count) => {
                    self.end += count;
                    self.waits_for_us = false;
                    return Ok(());
                }
                Err(error) if is_wait(&error) => self.look(since)?,
                Err(error) => {
                    self.usable = false;
                    return Err(self.lost().source(error));
                }
            }
        }
    }

    /// Sends what lies in the output.
    fn send(&mut self) -> Result<()> {
        let output = self.output.split();
        let mut rest = &output[..];
        let mut since = Instant::now();
        loop {
            let done = if rest.is_empty() { self.stream.flush().map(|()| 0) } else { self.stream.write(rest) };
            match done {
                Ok(_) if rest.is_empty() => return Ok(()),
                Ok(0) => {
                    self.usable = false;
                    return Err(self.lost());
                }
                Ok(count) => {
                    rest = &rest[count..];
                    (since, self.waits_for_us) = (Instant::now(), false);
                }
                Err(error) if is_wait(&error) => self.look(since)?,
                Err(error) => {
                    self.usable = false;
                    return Err(self.last_words().unwrap_or_else(|| self.lost().source(error)));
                }
            }
        }
    }

    /// What the server said before it closed the connection, if it said anything.
    fn last_words(&mut self) -> Option<Error> {
        self.input.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        let count = self.stream.read(&mut self.input[self.end..]).ok()?;
        self.end += count;
        while let Ok(Some(frame)) = wire::frame(&self.input[self.begin..self.end]) {
            let body = self.begin + 5..(self.begin + frame.bytes).min(self.end);
            self.begin = (self.begin + frame.bytes).min(self.end);
            if frame.tag == b'E' {
                let said = ServerMessage::parse(&self.input[body]);
                return Some(said.into_error(format!("lost the connection to {}", self.endpoint.address)));
            }
        }
        None
    }
}

fn piece_ends_row(piece: &[u8]) -> bool {
    piece.last() == Some(&b'\n')
}

fn is_wait(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn unsendable(error: std::io::Error) -> Error {
    Error::new(Kind::Config, "a text with a zero byte cannot be sent to PostgreSQL").source(error)
}

/// The begin of a statement, for messages.
fn shortened(sql: &str) -> String {
    const SHOWN: usize = 200;
    let line = sql.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= SHOWN { line } else { line.chars().take(SHOWN).chain("…".chars()).collect() }
}
