//! What a restore does with the times at which keys expire, in the image and in the commands.
//!
//! A target that loads as our replica deletes nothing by itself; once it is a master, whatever has
//! expired goes at once. So times are changed on the way in, not afterwards.

use std::io::{BufRead, Read};

use stillpoint_core::error::Result;

use super::config::Ttl;
use super::rdb::{CRC, Item, Walker};
use super::wire::{self, Command};

/// Bytes of rewritten image that are handed out at once.
const PIECE_BYTES: usize = 256 << 10;

/// A policy with its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expiry {
    /// Times stay.
    Keep,
    /// Times move by so many milliseconds.
    Shift(i64),
    /// Times go.
    Freeze,
}

impl Expiry {
    /// The policy for a point whose cut was at `cut_millis`, restored at `now_millis`.
    pub fn new(ttl: Ttl, cut_millis: i64, now_millis: i64) -> Self {
        match ttl {
            Ttl::Keep => Self::Keep,
            Ttl::Shift => Self::Shift(now_millis.saturating_sub(cut_millis)),
            Ttl::Freeze => Self::Freeze,
        }
    }

    /// The time that a key gets instead of its own.
    pub fn time(self, millis: Option<i64>) -> Option<i64> {
        match self {
            Self::Keep => millis,
            Self::Shift(by) => millis.map(|millis| millis.saturating_add(by)),
            Self::Freeze => None,
        }
    }

    /// Changes the times in a command; `None` if nothing is left of it.
    pub fn command(self, mut command: Command) -> Option<Command> {
        if self == Self::Keep {
            return Some(command);
        }
        let name = command.name();
        let arguments = &mut command.arguments;
        match Some(name.as_slice()) {
            Some(b"PEXPIREAT") => self.argument(arguments, 2, 1).then_some(command),
            Some(b"EXPIREAT") => self.argument(arguments, 2, 1000).then_some(command),
            Some(b"HPEXPIREAT") => self.argument(arguments, 2, 1).then_some(command),
            Some(b"HEXPIREAT") => self.argument(arguments, 2, 1000).then_some(command),
            Some(b"RESTORE") => {
                let is_absolute = arguments.iter().skip(4).any(|word| word.eq_ignore_ascii_case(b"absttl"));
                if is_absolute && arguments.get(2).is_some_and(|ttl| ttl != b"0") && !self.argument(arguments, 2, 1) {
                    arguments[2] = b"0".to_vec();
                }
                Some(command)
            }
            Some(b"SET" | b"HSETEX") => {
                for (word, unit) in [(&b"PXAT"[..], 1), (b"EXAT", 1000)] {
                    // The first two arguments of SET are any bytes.
                    let at = arguments.iter().skip(3).position(|argument| argument.eq_ignore_ascii_case(word));
                    if let Some(at) = at.map(|at| at + 3)
                        && !self.argument(arguments, at + 1, unit)
                    {
                        arguments.drain(at..(at + 2).min(arguments.len()));
                    }
                }
                Some(command)
            }
            _ => Some(command),
        }
    }

    /// Changes the time at `at`, in units of so many milliseconds; `false` if the policy removes it.
    fn argument(self, arguments: &mut [Vec<u8>], at: usize, unit_millis: i64) -> bool {
        let Some(argument) = arguments.get_mut(at) else { return true };
        let Some(time) = std::str::from_utf8(argument).ok().and_then(|text| text.parse::<i64>().ok()) else {
            return true;
        };
        match self.time(Some(time.saturating_mul(unit_millis))) {
            Some(millis) => {
                *argument = (millis / unit_millis).to_string().into_bytes();
                true
            }
            None => false,
        }
    }
}

/// An image with other times and a new checksum.
pub(super) struct RewrittenImage<R> {
    walker: Walker<R>,
    expiry: Expiry,
    digest: Option<crc::Digest<'static, u64, crc::Table<16>>>,
    piece: Vec<u8>,
    at: usize,
}

impl<R: Read> RewrittenImage<R> {
    /// Reads the head of the image.
    pub fn new(source: R, expiry: Expiry) -> Result<Self> {
        let mut walker = Walker::capturing(source)?;
        let piece = walker.take_captured();
        let mut digest = CRC.digest();
        digest.update(&piece);
        Ok(Self { walker, expiry, digest: Some(digest), piece, at: 0 })
    }

    fn refill(&mut self) -> Result<()> {
        self.piece.clear();
        self.at = 0;
        while let Some(digest) = self.digest.as_mut().filter(|_| self.piece.len() < PIECE_BYTES) {
            let item = self.walker.next()?;
            if let Item::Key(key) = &item {
                self.walker.skip_value(key.kind)?;
            }
            let mut bytes = self.walker.take_captured();
            match item {
                Item::Key(key) => {
                    if let Some((at, size)) = key.expiry_at {
                        let mut new = Vec::new();
                        if let Some(millis) = self.expiry.time(key.expires) {
                            new.push(super::rdb::EXPIRES_MILLIS);
                            new.extend_from_slice(&millis.to_le_bytes());
                        }
                        bytes.splice(at..at + size, new);
                    }
                    digest.update(&bytes);
                    self.piece.append(&mut bytes);
                }
                Item::End => {
                    // The old checksum goes; the opcode before it counts.
                    bytes.truncate(1);
                    digest.update(&bytes);
                    self.piece.append(&mut bytes);
                    let checksum: u64 = self.digest.take().map_or(0, |digest| digest.finalize());
                    self.piece.extend_from_slice(&checksum.to_le_bytes());
                }
                _ => {
                    digest.update(&bytes);
                    self.piece.append(&mut bytes);
                }
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for RewrittenImage<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.piece.len() {
            self.refill().map_err(std::io::Error::other)?;
        }
        let count = (&self.piece[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

/// Commands with other times.
pub(super) struct RewrittenCommands<R> {
    source: R,
    expiry: Expiry,
    piece: Vec<u8>,
    at: usize,
}

impl<R: BufRead> RewrittenCommands<R> {
    pub fn new(source: R, expiry: Expiry) -> Self {
        Self { source, expiry, piece: Vec::new(), at: 0 }
    }
}

impl<R: BufRead> Read for RewrittenCommands<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.piece.len() {
            self.at = 0;
            self.piece.clear();
            let Some(command) = wire::read_command(&mut self.source, u64::MAX).map_err(std::io::Error::other)? else {
                return Ok(0);
            };
            if let Some(command) = self.expiry.command(command) {
                self.piece = command.encode();
            }
        }
        let count = (&self.piece[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(expiry: Expiry, line: &str) -> Option<String> {
        let arguments = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
        let command = expiry.command(Command { arguments, wire_bytes: 0 })?;
        let words: Vec<_> = command.arguments.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some(words.join(" "))
    }

    #[test]
    fn times_in_commands_follow_the_policy() {
        let shift = Expiry::Shift(5000);
        for (line, shifted, frozen) in [
            ("PEXPIREAT k 1000", Some("PEXPIREAT k 6000"), None),
            ("EXPIREAT k 10", Some("EXPIREAT k 15"), None),
            ("SET k v PXAT 1000", Some("SET k v PXAT 6000"), Some("SET k v")),
            ("SET PXAT PXAT", Some("SET PXAT PXAT"), Some("SET PXAT PXAT")),
            ("RESTORE k 1000 x ABSTTL", Some("RESTORE k 6000 x ABSTTL"), Some("RESTORE k 0 x ABSTTL")),
            ("RESTORE k 1000 x", Some("RESTORE k 1000 x"), Some("RESTORE k 1000 x")),
            ("INCR k", Some("INCR k"), Some("INCR k")),
        ] {
            assert_eq!(changed(Expiry::Keep, line).as_deref(), Some(line));
            assert_eq!(changed(shift, line).as_deref(), shifted, "{line}");
            assert_eq!(changed(Expiry::Freeze, line).as_deref(), frozen, "{line}");
        }
    }
}
