//! Pure forms of the protocol and of SQL: frames, rows, the server's errors and what they mean to us,
//! quoting, and the order-free hash of rows.
//!
//! Facts are those of the manual's chapter "Frontend/Backend Protocol", version 3.0. Kept apart from the
//! connection, so that foreign bytes are taken apart where they can be tested without a server.

use stillpoint_core::error::{Error, Kind, Result};

/// A frame longer than this is no frame: the server itself builds no message above 1 GiB.
const FRAME_BYTES_MAX: usize = (1 << 30) + 64;

/// A message of the server: its type and how many bytes it takes, the five of its head included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) tag: u8,
    pub(super) bytes: usize,
}

/// The head of the message at the begin of `input`; `None` while it is not there whole.
pub(super) fn frame(input: &[u8]) -> Result<Option<Frame>> {
    let Some((&[tag, a, b, c, d], _)) = input.split_first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..=FRAME_BYTES_MAX).contains(&length) {
        return Err(garbled());
    }
    Ok(Some(Frame { tag, bytes: length + 1 }))
}

/// What is answered when the server's bytes are no protocol.
pub(super) fn garbled() -> Error {
    Error::new(Kind::Corrupt, "the server's answer is not PostgreSQL's protocol")
        .hint("check host and port: something else may listen there")
}

/// One row of a result, in text format.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Row(pub(super) Vec<Option<Vec<u8>>>);

impl Row {
    /// Takes a DataRow's body apart.
    pub(super) fn parse(body: &[u8]) -> Result<Self> {
        let (count, mut rest) = body.split_first_chunk::<2>().ok_or_else(garbled)?;
        let mut values = Vec::with_capacity(usize::from(u16::from_be_bytes(*count)));
        for _ in 0..u16::from_be_bytes(*count) {
            let (length, after) = rest.split_first_chunk::<4>().ok_or_else(garbled)?;
            rest = after;
            match i32::from_be_bytes(*length) {
                -1 => values.push(None),
                length => {
                    let length = usize::try_from(length).map_err(|_| garbled())?;
                    let (value, after) = rest.split_at_checked(length).ok_or_else(garbled)?;
                    values.push(Some(value.to_vec()));
                    rest = after;
                }
            }
        }
        Ok(Self(values))
    }

    /// The value as it came; `None` for NULL.
    pub(super) fn bytes(&self, column: usize) -> Option<&[u8]> {
        self.0.get(column)?.as_deref()
    }

    /// The value as text; `None` for NULL. Text that is no UTF-8 is an error: it names something we
    /// could not ask for again.
    pub(super) fn optional(&self, column: usize) -> Result<Option<&str>> {
        let Some(bytes) = self.bytes(column) else { return Ok(None) };
        std::str::from_utf8(bytes).map(Some).map_err(|error| {
            let shown = String::from_utf8_lossy(bytes).into_owned();
            Error::new(Kind::Unsupported, format!("`{shown}` is no UTF-8"))
                .hint("names in a database of encoding SQL_ASCII must be UTF-8")
                .source(error)
        })
    }

    /// The value as text; NULL is an error.
    pub(super) fn text(&self, column: usize) -> Result<&str> {
        self.optional(column)?.ok_or_else(|| Error::internal(format!("column {column} of a catalog query is NULL")))
    }

    /// The value as an owned text; NULL is an error.
    pub(super) fn string(&self, column: usize) -> Result<String> {
        self.text(column).map(str::to_owned)
    }

    /// The value as a number.
    pub(super) fn number<T: std::str::FromStr>(&self, column: usize) -> Result<T> {
        let text = self.text(column)?;
        text.parse().map_err(|_| Error::internal(format!("`{text}` of a catalog query is no number")))
    }

    /// The value as a truth; NULL is false.
    pub(super) fn truth(&self, column: usize) -> bool {
        self.bytes(column) == Some(b"t")
    }
}

/// What an ErrorResponse or a NoticeResponse says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ServerMessage {
    pub(super) severity: String,
    /// SQLSTATE.
    pub(super) code: String,
    pub(super) message: String,
    pub(super) detail: String,
    pub(super) hint: String,
    /// Where in a COPY or a function it happened.
    pub(super) place: String,
}

impl ServerMessage {
    /// Takes the body apart; fields that we do not know are passed over, as the protocol asks.
    pub(super) fn parse(body: &[u8]) -> Self {
        let mut said = Self::default();
        for field in body.split(|&byte| byte == 0) {
            let Some((&kind, value)) = field.split_first() else { continue };
            let value = String::from_utf8_lossy(value).into_owned();
            match kind {
                b'V' => said.severity = value,
                b'S' if said.severity.is_empty() => said.severity = value,
                b'C' => said.code = value,
                b'M' => said.message = value,
                b'D' => said.detail = value,
                b'H' => said.hint = value,
                b'W' => said.place = value,
                _ => {}
            }
        }
        said
    }

    /// The error for people and for the layers above; `doing` says what was attempted.
    pub(super) fn into_error(self, doing: impl Into<String>) -> Error {
        let (kind, temporary, hint) = classify(&self.code, &self.message);
        let mut error = Error::new(kind, doing.into());
        if temporary {
            error = error.temporary();
        }
        if let Some(hint) = hint {
            error = error.hint(hint);
        } else if !self.hint.is_empty() {
            error = error.hint(self.hint.clone());
        }
        error.source(self)
    }
}

impl std::fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)?;
        for more in [&self.detail, &self.place] {
            if !more.is_empty() {
                write!(f, "; {}", more.replace('\n', "; "))?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ServerMessage {}

/// Kind, whether trying again helps, and what the operator can do. Codes: manual, appendix A.
fn classify(code: &str, message: &str) -> (Kind, bool, Option<&'static str>) {
    match code {
        "28P01" | "28000" => (
            Kind::Unauthenticated,
            false,
            Some("check `user` and `password`, and that pg_hba.conf lets this machine in"),
        ),
        "42501" => (
            Kind::PermissionDenied,
            false,
            Some("GRANT pg_read_all_data TO the backup role, or leave the object out by `excludeTables`"),
        ),
        "3D000" => (Kind::NotFound, false, Some("check the name of the database")),
        "42P01" | "3F000" | "42883" | "42704" => (Kind::NotFound, false, None),
        "42P04" | "42P06" | "42P07" | "42710" | "23505" => (Kind::AlreadyExists, false, None),
        "40001" if message.contains("conflict with recovery") => (
            Kind::PinLost,
            true,
            Some("the standby cancelled the view: raise max_standby_streaming_delay, or set hot_standby_feedback = on"),
        ),
        "40001" | "40P01" => (Kind::Conflict, true, None),
        "55P03" | "55006" => (Kind::Locked, true, None),
        "57014" => (Kind::Cancelled, false, None),
        "53300" => (
            Kind::Exhausted,
            true,
            Some("the server has no connection left: lower `connections`, or raise max_connections"),
        ),
        "53100" => (Kind::Exhausted, false, Some("the server's disk is full")),
        "53200" if message.contains("shared memory") => {
            (Kind::Exhausted, false, Some("raise max_locks_per_transaction on the server, and restart it"))
        }
        "57P03" => (Kind::Unreachable, true, Some("the server is starting up or shutting down")),
        "57P01" | "57P02" | "57P05" => {
            (Kind::Unreachable, true, Some("the server, or someone on it, ended the session"))
        }
        "25P03" | "25P04" => (Kind::PinLost, true, Some("a time-out of the server ended the session")),
        "0A000" => (Kind::Unsupported, false, None),
        "22021" | "22P05" => (Kind::Unsupported, false, None),
        "XX001" | "XX002" => (Kind::Corrupt, false, Some("the server reports damaged data: run pg_amcheck")),
        _ => match code.get(..2) {
            Some("08") => (Kind::Unreachable, true, None),
            Some("53") | Some("54") => (Kind::Exhausted, false, None),
            Some("58") => (Kind::Io, false, None),
            Some("XX") => (Kind::Io, false, None),
            _ => (Kind::Config, false, None),
        },
    }
}

/// A name as SQL has it, whatever it is made of.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `"schema"."name"`.
pub(super) fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}

/// A text as SQL has it, whatever the server's `standard_conforming_strings` is.
pub(super) fn literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text).trim_start().to_owned()
}

/// Counts and hashes rows. Two sets of rows have the same hash if they are the same, in whatever
/// order and in however many parts; different ones differ but for a chance of 2⁻⁶⁴.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    pub(super) rows: u64,
    pub(super) bytes: u64,
    /// Wrapping sum of the rows' hashes.
    pub(super) hash: u64,
}

impl Tally {
    /// Adds one row of COPY text, its line end included.
    #[inline]
    pub(super) fn row(&mut self, row: &[u8]) {
        self.add(row.len() as u64, row_hash(row));
    }

    /// Adds one row that was hashed in parts.
    #[inline]
    pub(super) fn add(&mut self, bytes: u64, hash: u64) {
        self.rows += 1;
        self.bytes += bytes;
        self.hash = self.hash.wrapping_add(hash);
    }

    /// Adds what was counted elsewhere.
    pub(super) fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.hash = self.hash.wrapping_add(other.hash);
    }
}

/// Constants of the row hash: digits of pi, odd. Part of the format: statefiles hold sums of it.
const SEED: u64 = 0x243f_6a88_85a3_08d3;
const BLOCK: u64 = 0x1319_8a2e_0370_7345;
const TAIL: u64 = 0xa409_3822_299f_31d1;
const LENGTH: u64 = 0x082e_fa98_ec4e_6c89;

/// The two halves of a 128-bit product, folded.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

#[inline]
fn halves(block: &[u8; 16]) -> (u64, u64) {
    let whole = u128::from_le_bytes(*block);
    (whole as u64, (whole >> 64) as u64)
}

#[inline]
fn mix(state: u64, block: &[u8; 16]) -> u64 {
    let (a, b) = halves(block);
    fold(a ^ state, b ^ BLOCK)
}

#[inline]
fn end(state: u64, tail: &[u8], length: u64) -> u64 {
    let mut padded = [0; 16];
    padded[..tail.len()].copy_from_slice(tail);
    let (a, b) = halves(&padded);
    let state = fold(a ^ state, b ^ TAIL);
    fold(state ^ length, LENGTH)
}

/// The hash of one row: 16 bytes at a time by folded multiplication, then what is left, padded with
/// zeros, then the length. Chosen for speed; it stands against accidents, not against forgers, from
/// whom the repository's SHA-256 protects.
#[inline]
pub(super) fn row_hash(row: &[u8]) -> u64 {
    let (blocks, tail) = row.as_chunks::<16>();
    let state = blocks.iter().fold(SEED, mix);
    end(state, tail, row.len() as u64)
}

/// The same hash for rows that are too long to lie in memory whole.
#[derive(Debug, Clone)]
pub(super) struct RowHash {
    state: u64,
    carry: Vec<u8>,
    length: u64,
}

impl Default for RowHash {
    fn default() -> Self {
        Self { state: SEED, carry: Vec::with_capacity(16), length: 0 }
    }
}

impl RowHash {
    /// Adds the next part.
    pub(super) fn update(&mut self, mut part: &[u8]) {
        self.length += part.len() as u64;
        if !self.carry.is_empty() {
            let taken = part.len().min(16 - self.carry.len());
            self.carry.extend_from_slice(&part[..taken]);
            part = &part[taken..];
            let Ok(block) = <&[u8; 16]>::try_from(self.carry.as_slice()) else { return };
            self.state = mix(self.state, block);
            self.carry.clear();
        }
        let (blocks, tail) = part.as_chunks::<16>();
        self.state = blocks.iter().fold(self.state, mix);
        self.carry.extend_from_slice(tail);
    }

    /// Whether nothing was added yet.
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Length and hash of the row.
    pub(super) fn finish(self) -> (u64, u64) {
        (self.length, end(self.state, &self.carry, self.length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hash_alike_in_one_piece_and_in_parts_and_the_values_never_change() {
        let text: Vec<u8> = (0..100u8).map(|number| number.wrapping_mul(37)).collect();
        for length in 0..text.len() {
            let whole = row_hash(&text[..length]);
            for step in [1, 3, 15, 16, 17, 40] {
                let mut parts = RowHash::default();
                text[..length].chunks(step).for_each(|part| parts.update(part));
                assert_eq!(parts.finish(), (length as u64, whole), "{length} by {step}");
            }
        }
        let mut seen: Vec<u64> = (0..text.len()).map(|length| row_hash(&text[..length])).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), text.len());
        assert_ne!(row_hash(b"a\0\n"), row_hash(b"a\n"));
    }

    #[test]
    fn tallies_do_not_depend_on_order_and_parts() {
        let rows = [&b"1\tone\n"[..], b"2\ttwo\n", b"3\t\\N\n"];
        let mut forth = Tally::default();
        rows.iter().for_each(|row| forth.row(row));
        let mut back = Tally::default();
        back.row(rows[2]);
        let mut rest = Tally::default();
        rows[..2].iter().rev().for_each(|row| rest.row(row));
        back.merge(&rest);
        assert_eq!(forth, back);
        let mut twice = forth;
        twice.row(rows[0]);
        assert_ne!(twice, forth);
    }

    #[test]
    fn frames_and_rows_are_taken_apart_and_garbage_is_refused() {
        assert_eq!(frame(b"Z\0\0\0").unwrap(), None);
        assert_eq!(frame(b"Z\0\0\0\x05I").unwrap(), Some(Frame { tag: b'Z', bytes: 6 }));
        assert_eq!(frame(b"HTTP/1.1 400").unwrap_err().kind(), Kind::Corrupt);
        let row = Row::parse(b"\0\x03\0\0\0\x011\xff\xff\xff\xff\0\0\0\0").unwrap();
        assert_eq!(row.0, [Some(b"1".to_vec()), None, Some(Vec::new())]);
        assert_eq!(row.number::<u64>(0).unwrap(), 1);
        for cut in 1..15 {
            assert!(Row::parse(&b"\0\x03\0\0\0\x011\xff\xff\xff\xff\0\0\0\0"[..cut]).is_err(), "{cut}");
        }
        assert!(Row::parse(b"\0\x01\x7f\xff\xff\xff").is_err());
    }

    #[test]
    fn errors_of_the_server_are_classified_and_keep_their_words() {
        let said = ServerMessage::parse(b"SERROR\0VERROR\0C42501\0Mpermission denied for schema billing\0\0");
        let error = said.into_error("cannot list tables");
        assert_eq!(error.kind(), Kind::PermissionDenied);
        assert!(error.hint_text().unwrap().contains("pg_read_all_data"));
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(source, "permission denied for schema billing (SQLSTATE 42501)");
        assert!(ServerMessage { code: "57P01".to_owned(), ..Default::default() }.into_error("x").is_temporary());
    }

    #[test]
    fn names_and_texts_are_quoted() {
        assert_eq!(qualified("a\"b", "c d"), "\"a\"\"b\".\"c d\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\b"), "E'a\\\\b'");
    }
}
