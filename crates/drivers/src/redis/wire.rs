//! RESP: commands out, replies in, and the stream of commands that a master sends.
//!
//! Pure: works on readers and bytes, opens nothing. Whatever comes in may be foreign or damaged:
//! lengths are limited, and memory is taken as bytes arrive, never as they are announced.
//! Manual: <https://redis.io/docs/latest/develop/reference/protocol-spec/>.

use std::io::{BufRead, Read};

use stillpoint_core::error::{Error, Kind, Result};

/// The longest line of a reply, and of a command's header.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// The longest string that a server takes (`proto-max-bulk-len` as it may be raised).
const BULK_BYTES_MAX: u64 = 4 << 30;
/// The most elements of an array.
const ARRAY_MAX: u64 = 64 << 20;
/// How deep replies may be nested.
const DEPTH_MAX: u32 = 16;

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// A status: `+OK`.
    Simple(String),
    /// A refusal: `-NOPERM …`.
    Error(String),
    /// A number.
    Integer(i64),
    /// A string of any bytes.
    Bulk(Vec<u8>),
    /// Nothing.
    Nil,
    /// A list.
    Array(Vec<Reply>),
}

impl Reply {
    /// The bytes of a string or status.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bulk(bytes) => Some(bytes),
            Self::Simple(text) => Some(text.as_bytes()),
            _ => None,
        }
    }

    /// The text of a string, status or number.
    pub fn text(&self) -> String {
        match self {
            Self::Integer(number) => number.to_string(),
            Self::Error(text) => text.clone(),
            other => String::from_utf8_lossy(other.bytes().unwrap_or_default()).into_owned(),
        }
    }

    /// The elements of a list; none of anything else.
    pub fn items(&self) -> &[Reply] {
        match self {
            Self::Array(items) => items,
            _ => &[],
        }
    }
}

/// A command as it goes over the wire.
pub(super) fn encode(arguments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + arguments.iter().map(|one| one.len() + 16).sum::<usize>());
    encode_into(&mut bytes, arguments);
    bytes
}

/// Appends a command as it goes over the wire.
pub(super) fn encode_into(bytes: &mut Vec<u8>, arguments: &[&[u8]]) {
    bytes.extend_from_slice(format!("*{}\r\n", arguments.len()).as_bytes());
    for argument in arguments {
        bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        bytes.extend_from_slice(argument);
        bytes.extend_from_slice(b"\r\n");
    }
}

fn broken(message: &str) -> Error {
    Error::new(Kind::Corrupt, message.to_owned())
}

/// What a reader's error was before it had to become one of the system's.
pub(super) fn unwrapped(error: std::io::Error, message: &str) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(error) => Error::io(message, error),
    }
}

fn from_io(error: std::io::Error) -> Error {
    unwrapped(error, "cannot read from the server")
}

/// Whether a socket has nothing yet, or takes nothing yet.
pub(super) fn is_late(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as E;
    matches!(error.kind(), E::WouldBlock | E::TimedOut | E::Interrupted)
}

/// One line without its end. Fails with `Unreachable` at the end of the input.
pub(super) fn read_line(reader: &mut dyn BufRead) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    reader.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(from_io)?;
    if line.last() != Some(&b'\n') {
        let long = line.len() as u64 == LINE_BYTES_MAX;
        return Err(if long { broken("a line of the server's has no end") } else { closed() });
    }
    line.pop();
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(line)
}

/// The peer closed the connection.
pub(super) fn closed() -> Error {
    Error::new(Kind::Unreachable, "the server closed the connection").temporary()
}

fn number(text: &[u8]) -> Result<i64> {
    let text = std::str::from_utf8(text).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| broken("a number of the server's is none"))
}

/// A length; `None` is the null of RESP 2.
fn length(text: &[u8], max: u64) -> Result<Option<u64>> {
    match number(text)? {
        -1 => Ok(None),
        count if count >= 0 && count.unsigned_abs() <= max => Ok(Some(count.unsigned_abs())),
        _ => Err(broken("a length of the server's is out of range")),
    }
}

/// Reads `count` bytes and the line end after them; memory grows as they come.
fn read_bulk(reader: &mut dyn BufRead, count: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(count).read_to_end(&mut bytes).map_err(from_io)?;
    if bytes.len() as u64 != count {
        return Err(closed());
    }
    end_of_bulk(reader)?;
    Ok(bytes)
}

fn end_of_bulk(reader: &mut dyn BufRead) -> Result<()> {
    let mut end = [0; 2];
    reader.read_exact(&mut end).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => closed(),
        _ => from_io(error),
    })?;
    if end == *b"\r\n" { Ok(()) } else { Err(broken("a string of the server's is longer than it said")) }
}

/// Reads one reply.
pub(super) fn read_reply(reader: &mut dyn BufRead) -> Result<Reply> {
    reply(reader, 0)
}

fn reply(reader: &mut dyn BufRead, depth: u32) -> Result<Reply> {
    let line = read_line(reader)?;
    let (kind, rest) = line.split_first().ok_or_else(|| broken("an answer of the server's is empty"))?;
    let text = || String::from_utf8_lossy(rest).into_owned();
    Ok(match kind {
        b'+' => Reply::Simple(text()),
        b'-' => Reply::Error(text()),
        b':' => Reply::Integer(number(rest)?),
        b'$' => match length(rest, BULK_BYTES_MAX)? {
            None => Reply::Nil,
            Some(count) => Reply::Bulk(read_bulk(reader, count)?),
        },
        b'*' => match length(rest, ARRAY_MAX)? {
            None => Reply::Nil,
            Some(_) if depth == DEPTH_MAX => return Err(broken("an answer of the server's is nested too deep")),
            Some(count) => {
                let mut items = Vec::new();
                for _ in 0..count {
                    items.push(reply(reader, depth + 1)?);
                }
                Reply::Array(items)
            }
        },
        _ => return Err(broken("an answer of the server's has no known form")),
    })
}

/// One command of a stream, with what it took on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    /// Name and arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Bytes on the wire, line ends included.
    pub wire_bytes: u64,
}

impl Command {
    /// The name in capital letters.
    pub fn name(&self) -> Vec<u8> {
        self.arguments.first().map(|name| name.to_ascii_uppercase()).unwrap_or_default()
    }

    /// Whether it changes no data and prepares no change: the master's own signs of life, and messages
    /// to subscribers, who are as past as the messages.
    pub fn is_noise(&self) -> bool {
        self.is_one_of(&[b"PING", b"REPLCONF", b"PUBLISH", b"SPUBLISH"])
    }

    /// Whether it changes no data by itself. Everything that is unknown counts as a write.
    pub fn is_no_write(&self) -> bool {
        self.is_noise() || self.is_one_of(&[b"SELECT"])
    }

    fn is_one_of(&self, names: &[&[u8]]) -> bool {
        let name = self.arguments.first();
        name.is_some_and(|name| names.iter().any(|one| name.eq_ignore_ascii_case(one)))
    }

    /// As it goes over the wire.
    pub fn encode(&self) -> Vec<u8> {
        let arguments: Vec<&[u8]> = self.arguments.iter().map(Vec::as_slice).collect();
        encode(&arguments)
    }
}

/// Reads one command of a stream; `None` at its end between two commands.
///
/// Of each argument at most `keep_bytes` are kept; the rest is passed over.
pub(super) fn read_command(reader: &mut dyn BufRead, keep_bytes: u64) -> Result<Option<Command>> {
    if reader.fill_buf().map_err(from_io)?.is_empty() {
        return Ok(None);
    }
    let line = read_line(reader)?;
    // A master keeps a silent link alive with bare line ends; they have no offset.
    if line.is_empty() {
        return Ok(Some(Command { arguments: Vec::new(), wire_bytes: 0 }));
    }
    let count = line.strip_prefix(b"*").ok_or_else(|| broken("the stream of commands holds something else"))?;
    let mut wire_bytes = line.len() as u64 + 2;
    let count = length(count, ARRAY_MAX)?.unwrap_or(0);
    let mut arguments = Vec::new();
    for _ in 0..count {
        let line = read_line(reader)?;
        let size = line.strip_prefix(b"$").ok_or_else(|| broken("a command of the stream holds no string"))?;
        let size = length(size, BULK_BYTES_MAX)?.ok_or_else(|| broken("a command of the stream holds nothing"))?;
        let kept = size.min(keep_bytes);
        let mut bytes = Vec::new();
        reader.take(kept).read_to_end(&mut bytes).map_err(from_io)?;
        let passed = std::io::copy(&mut reader.take(size - kept), &mut std::io::sink()).map_err(from_io)?;
        if bytes.len() as u64 != kept || passed != size - kept {
            return Err(closed());
        }
        end_of_bulk(reader)?;
        wire_bytes += line.len() as u64 + 2 + size + 2;
        arguments.push(bytes);
    }
    Ok(Some(Command { arguments, wire_bytes }))
}

/// The value of `name` in an answer of `INFO`.
pub(super) fn info<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// A number in an answer of `INFO`.
pub(super) fn info_number(text: &str, name: &str) -> Option<u64> {
    info(text, name)?.parse().ok()
}

/// The databases that hold keys, with how many: `db0:keys=3,expires=0`.
pub(super) fn keyspace(text: &str) -> Vec<(u32, u64)> {
    let line = |line: &str| {
        let (database, facts) = line.strip_prefix("db")?.split_once(':')?;
        let keys = facts.split(',').find_map(|fact| fact.strip_prefix("keys="))?;
        Some((database.parse().ok()?, keys.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}
