//! Which keys a command of the stream touches, and which slot a key has.
//!
//! The server says where the keys of its commands stand; nothing here guesses from names, but for
//! commands that touch whole databases.

use std::collections::HashMap;

use stillpoint_core::error::{Error, Kind, Result};

use super::client::{Connection, refusal};
use super::server::SLOTS;
use super::wire::{Command, Reply};

/// What a command touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Touched {
    /// These arguments, which are keys.
    Keys(Vec<usize>),
    /// Every key of the selected database.
    Database,
    /// Every key of every database.
    Everything,
    /// Which database is spoken to from here on.
    Select(u32),
    /// Begin or end of a transaction.
    Bracket,
    /// No key: functions, scripts, settings of streams of commands.
    Nothing,
}

/// Where keys stand among the arguments of a command: first, last, step.
#[derive(Debug, Clone, Copy)]
struct Places {
    first: i64,
    last: i64,
    step: i64,
    /// Only the server can tell, argument by argument.
    movable: bool,
}

/// What a server knows of its commands.
#[derive(Debug, Default)]
pub(super) struct Table {
    places: HashMap<Vec<u8>, Places>,
}

impl Table {
    /// Asks the server.
    pub fn read(connection: &mut Connection) -> Result<Self> {
        let mut table = Self::default();
        for command in connection.command(&["COMMAND"])?.items() {
            table.add(command);
        }
        Ok(table)
    }

    fn add(&mut self, command: &Reply) {
        let items = command.items();
        let number = |at: usize| match items.get(at) {
            Some(Reply::Integer(number)) => *number,
            _ => 0,
        };
        let Some(name) = items.first().and_then(Reply::bytes) else { return };
        let flags = items.get(2).map_or(&[][..], Reply::items);
        let movable = flags.iter().any(|flag| flag.bytes() == Some(b"movablekeys"));
        let places = Places { first: number(3), last: number(4), step: number(5), movable };
        self.places.insert(name.to_ascii_uppercase(), places);
        for below in items.get(9).map_or(&[][..], Reply::items) {
            self.add(below);
        }
    }

    /// What a command touches; asks the server where only that can tell.
    pub fn touched(&self, command: &Command, connection: &mut Connection) -> Result<Touched> {
        match self.touched_without_asking(command)? {
            Some(touched) => Ok(touched),
            None => movable(command, connection),
        }
    }

    /// What a command touches; `None` where the server must be asked.
    pub fn touched_without_asking(&self, command: &Command) -> Result<Option<Touched>> {
        let name = command.name();
        let argument = |at: usize| command.arguments.get(at).map_or(&b""[..], Vec::as_slice);
        match name.as_slice() {
            b"SELECT" => {
                let database = std::str::from_utf8(argument(1)).ok().and_then(|text| text.parse().ok());
                return database.map(|database| Some(Touched::Select(database))).ok_or_else(|| {
                    Error::new(Kind::Corrupt, "the stream of commands selects a database that is none")
                });
            }
            b"MULTI" | b"EXEC" => return Ok(Some(Touched::Bracket)),
            b"FLUSHDB" => return Ok(Some(Touched::Database)),
            b"FLUSHALL" | b"SWAPDB" => return Ok(Some(Touched::Everything)),
            _ => {}
        }
        let with_sub = [&name[..], b"|", &argument(1).to_ascii_uppercase()].concat();
        let Some(places) = self.places.get(&with_sub).or_else(|| self.places.get(&name)) else {
            let name = String::from_utf8_lossy(&name).into_owned();
            return Err(Error::new(Kind::Unsupported, format!("the server does not know the command `{name}`"))
                .hint("a module may be missing"));
        };
        Ok((!places.movable).then(|| places.of(command.arguments.len())))
    }
}

impl Places {
    fn of(self, count: usize) -> Touched {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        if self.first <= 0 || self.step <= 0 {
            return Touched::Nothing;
        }
        let last = if self.last < 0 { count + self.last } else { self.last.min(count - 1) };
        let mut keys = Vec::new();
        let mut at = self.first;
        while at <= last {
            keys.extend(usize::try_from(at));
            at += self.step;
        }
        Touched::Keys(keys)
    }
}

fn movable(command: &Command, connection: &mut Connection) -> Result<Touched> {
    let mut question: Vec<&[u8]> = vec![b"COMMAND", b"GETKEYS"];
    question.extend(command.arguments.iter().map(Vec::as_slice));
    let keys = match connection.ask(&question)? {
        Reply::Array(keys) => keys,
        Reply::Error(text) if text.contains("no key arguments") => return Ok(Touched::Nothing),
        Reply::Error(text) => {
            let name = String::from_utf8_lossy(&command.name()).into_owned();
            return Err(refusal(&question[..2], &text).context("command", name));
        }
        _ => return Err(Error::new(Kind::Corrupt, "COMMAND GETKEYS answers something else")),
    };
    let named = |argument: &Vec<u8>| keys.iter().any(|key| key.bytes() == Some(argument));
    let places = command.arguments.iter().enumerate().skip(1).filter(|(_, argument)| named(argument));
    Ok(Touched::Keys(places.map(|(at, _)| at).collect()))
}

/// The database that a `MOVE`, or a `COPY` with `DB`, writes to, which is not the selected one.
pub(super) fn other_database(arguments: &[Vec<u8>]) -> Option<u32> {
    let number = match arguments.first()?.to_ascii_uppercase().as_slice() {
        b"MOVE" => arguments.get(2),
        b"COPY" => {
            let at = arguments.iter().skip(3).position(|word| word.eq_ignore_ascii_case(b"db"))?;
            arguments.get(at + 4)
        }
        _ => None,
    };
    std::str::from_utf8(number?).ok()?.parse().ok()
}

/// The slot of a key in a cluster: of what stands between the first braces, if anything does.
pub(super) fn slot(key: &[u8]) -> u16 {
    const CRC16: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_XMODEM);
    let tag = key.iter().position(|&byte| byte == b'{').and_then(|open| {
        let close = key[open + 1..].iter().position(|&byte| byte == b'}')?;
        (close > 0).then(|| &key[open + 1..open + 1 + close])
    });
    CRC16.checksum(tag.unwrap_or(key)) % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot(b"123456789"), 0x31c3);
        assert_eq!(slot(b"{user1000}.following"), slot(b"{user1000}.followers"));
        assert_eq!(slot(b"foo{}{bar}"), slot(b"foo{}{bar}"));
        assert_ne!(slot(b"foo{}{bar}"), slot(b"bar"));
        assert_eq!(slot(b"foo{bar}{zap}"), slot(b"bar"));
    }

    #[test]
    fn commands_that_write_to_another_database_are_known() {
        let other = |line: &str| {
            let arguments: Vec<Vec<u8>> = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
            other_database(&arguments)
        };
        assert_eq!(other("move k 3"), Some(3));
        assert_eq!(other("COPY a b REPLACE db 5"), Some(5));
        assert_eq!(other("COPY db db"), None);
        assert_eq!(other("SET k 3"), None);
    }

    #[test]
    fn places_are_counted_as_servers_do() {
        let places = |first, last, step| Places { first, last, step, movable: false };
        assert_eq!(places(1, -1, 2).of(5), Touched::Keys(vec![1, 3]));
        assert_eq!(places(1, 1, 1).of(3), Touched::Keys(vec![1]));
        assert_eq!(places(0, 0, 0).of(3), Touched::Nothing);
        assert_eq!(places(1, 2, 1).of(2), Touched::Keys(vec![1]));
    }
}
