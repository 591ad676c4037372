//! COPY text turned into COPY binary on its way to the server.
//!
//! A restore waits for the server, and much of what the server does with text is reading numbers and times
//! out of it. We read them here, beside it. Only types whose binary form is plain and has been the same
//! for ever are turned; a table with any other column, or a value that is not written as we expect, is
//! loaded as text. Pure, but for one question to the catalog.
//!
//! Form: manual, COPY, "Binary Format"; of the types: their `recv` functions.

use stillpoint_core::error::Result;

use super::super::session::Session;
use super::super::wire::{literal, qualified};

/// What a binary COPY begins with: signature, flags, length of what follows the head.
pub(super) const HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What it ends with.
pub(super) const END: &[u8] = &(-1_i16).to_be_bytes();
/// Rows longer than this are not gathered.
const ROW_BYTES_MAX: usize = 64 << 20;
/// Days from 1970-01-01 to 2000-01-01, where the server begins to count.
const EPOCH_DAYS: i64 = 10_957;
const DAY_MICROS: i64 = 86_400_000_000;

/// How a column's values are turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    /// Also names, JSON and the labels of enums: the bytes themselves.
    Text,
    Jsonb,
    Bytea,
    Uuid,
    Date,
    Timestamp,
    TimestampZone,
}

/// The forms of a table's columns; `None` if one has none.
pub(super) fn fields(session: &mut Session, table: (&str, &str), columns: &[String]) -> Result<Option<Vec<Field>>> {
    let rows = session.query(&format!(
        "SELECT a.attname, t.oid, t.typtype FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
         WHERE a.attrelid = {}::pg_catalog.regclass AND a.attnum > 0 AND NOT a.attisdropped",
        literal(&qualified(table.0, table.1))
    ))?;
    let mut all = Vec::new();
    for column in columns {
        let Some(row) = rows.iter().find(|row| row.text(0).is_ok_and(|name| name == column)) else { return Ok(None) };
        match field(row.number(1)?, row.text(2)?) {
            Some(field) => all.push(field),
            None => return Ok(None),
        }
    }
    Ok((!all.is_empty()).then_some(all))
}

/// The form of a type, by its number, which is fixed for all versions.
fn field(oid: u32, kind: &str) -> Option<Field> {
    if kind == "e" {
        return Some(Field::Text);
    }
    Some(match oid {
        16 => Field::Bool,
        17 => Field::Bytea,
        20 => Field::Int8,
        21 => Field::Int2,
        23 => Field::Int4,
        700 => Field::Float4,
        701 => Field::Float8,
        // name, text, json, char(n), varchar
        19 | 25 | 114 | 1042 | 1043 => Field::Text,
        1082 => Field::Date,
        1114 => Field::Timestamp,
        1184 => Field::TimestampZone,
        2950 => Field::Uuid,
        3802 => Field::Jsonb,
        _ => return None,
    })
}

/// A stream of rows under way.
pub(super) struct Converter<'a> {
    fields: &'a [Field],
    /// The begin of a row whose end has not come yet.
    carry: Vec<u8>,
    /// Where a value with escapes is written out.
    plain: Vec<u8>,
}

impl<'a> Converter<'a> {
    pub(super) fn new(fields: &'a [Field]) -> Self {
        Self { fields, carry: Vec::new(), plain: Vec::new() }
    }

    /// Turns the rows that end in `text` and appends them to `out`. `None` if one cannot be turned.
    pub(super) fn push(&mut self, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let Some(last) = text.iter().rposition(|byte| *byte == b'\n') else {
            self.carry.extend_from_slice(text);
            return (self.carry.len() <= ROW_BYTES_MAX).then_some(());
        };
        let mut rows = &text[..last];
        if !self.carry.is_empty() {
            let first = rows.iter().position(|byte| *byte == b'\n').unwrap_or(rows.len());
            let mut row = std::mem::take(&mut self.carry);
            row.extend_from_slice(&rows[..first]);
            self.row(&row, out)?;
            rows = rows.get(first + 1..).unwrap_or_default();
            if first == last {
                self.carry.extend_from_slice(&text[last + 1..]);
                return Some(());
            }
        }
        for row in rows.split(|byte| *byte == b'\n') {
            self.row(row, out)?;
        }
        self.carry.extend_from_slice(&text[last + 1..]);
        Some(())
    }

    /// Whether the last row has ended.
    pub(super) fn is_complete(&self) -> bool {
        self.carry.is_empty()
    }

    fn row(&mut self, row: &[u8], out: &mut Vec<u8>) -> Option<()> {
        out.extend_from_slice(&i16::try_from(self.fields.len()).ok()?.to_be_bytes());
        let mut values = row.split(|byte| *byte == b'\t');
        for field in self.fields {
            let value = values.next()?;
            if value == b"\\N" {
                out.extend_from_slice(&(-1_i32).to_be_bytes());
                continue;
            }
            let value = match value.contains(&b'\\') {
                true => unescape(value, &mut self.plain),
                false => value,
            };
            turn(*field, value, out)?;
        }
        values.next().is_none().then_some(())
    }
}

/// Writes out what COPY escapes.
fn unescape<'b>(value: &[u8], plain: &'b mut Vec<u8>) -> &'b [u8] {
    plain.clear();
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        if byte != b'\\' {
            plain.push(byte);
            continue;
        }
        plain.extend(bytes.next().map(|escaped| match escaped {
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 0x0b,
            other => *other,
        }));
    }
    plain
}

/// Appends one value with its length.
fn turn(field: Field, value: &[u8], out: &mut Vec<u8>) -> Option<()> {
    match field {
        Field::Text => sized(value, out),
        Field::Jsonb => {
            out.extend_from_slice(&i32::try_from(value.len() + 1).ok()?.to_be_bytes());
            out.push(1);
            out.extend_from_slice(value);
            Some(())
        }
        Field::Bool => sized(&[u8::from(truth(value)?)], out),
        Field::Int2 => sized(&i16::try_from(integer(value)?).ok()?.to_be_bytes(), out),
        Field::Int4 => sized(&i32::try_from(integer(value)?).ok()?.to_be_bytes(), out),
        Field::Int8 => sized(&integer(value)?.to_be_bytes(), out),
        Field::Float4 => sized(&float::<f32>(value)?.to_be_bytes(), out),
        Field::Float8 => sized(&float::<f64>(value)?.to_be_bytes(), out),
        Field::Bytea => {
            let digits = value.strip_prefix(b"\\x")?;
            out.extend_from_slice(&i32::try_from(digits.len() / 2).ok()?.to_be_bytes());
            hexadecimal(digits, out)
        }
        Field::Uuid => {
            let digits: Vec<u8> = value.iter().copied().filter(|byte| *byte != b'-').collect();
            if (value.len(), digits.len()) != (36, 32) {
                return None;
            }
            out.extend_from_slice(&16_i32.to_be_bytes());
            hexadecimal(&digits, out)
        }
        Field::Date => {
            let days = match value {
                b"infinity" => i32::MAX,
                b"-infinity" => i32::MIN,
                value => i32::try_from(date(value)?).ok()?,
            };
            sized(&days.to_be_bytes(), out)
        }
        Field::Timestamp => sized(&moment(value)?.to_be_bytes(), out),
        Field::TimestampZone => match value {
            b"infinity" | b"-infinity" => sized(&moment(value)?.to_be_bytes(), out),
            // Sessions of ours speak UTC.
            value => sized(&moment(value.strip_suffix(b"+00")?)?.to_be_bytes(), out),
        },
    }
}

fn sized(value: &[u8], out: &mut Vec<u8>) -> Option<()> {
    out.extend_from_slice(&i32::try_from(value.len()).ok()?.to_be_bytes());
    out.extend_from_slice(value);
    Some(())
}

fn truth(value: &[u8]) -> Option<bool> {
    match value {
        b"t" => Some(true),
        b"f" => Some(false),
        _ => None,
    }
}

fn integer(value: &[u8]) -> Option<i64> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    if digits.is_empty() {
        return None;
    }
    // Counted downwards, where there is one number more.
    let number = digits.iter().try_fold(0_i64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| i64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_sub(digit)
    })?;
    if negative { Some(number) } else { number.checked_neg() }
}

fn float<F: std::str::FromStr>(value: &[u8]) -> Option<F> {
    // What Rust takes beyond what the server writes (`inf`, `+1`) does not occur, and means the same.
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn hexadecimal(digits: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = digits.as_chunks::<2>();
    for [high, low] in pairs {
        out.push(nibble(*high)? << 4 | nibble(*low)?);
    }
    rest.is_empty().then_some(())
}

/// Two digits as a number.
fn two(digits: &[u8]) -> Option<i64> {
    match digits {
        [tens, ones] if tens.is_ascii_digit() && ones.is_ascii_digit() => {
            Some(i64::from(tens - b'0') * 10 + i64::from(ones - b'0'))
        }
        _ => None,
    }
}

/// `2026-11-21` as days since 2000-01-01. Years before ours are left to the server.
fn date(value: &[u8]) -> Option<i64> {
    let dash = value.iter().position(|byte| *byte == b'-').filter(|at| (4..=6).contains(at))?;
    let year = integer(&value[..dash])?;
    let [b'-', month @ .., b'-', tens, ones] = &value[dash..] else { return None };
    let (month, day) = (two(month)?, two(&[*tens, *ones])?);
    if year < 1 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days of the civil calendar, with years that begin in March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let of_era = shifted.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    Some(era * 146_097 + days - 719_468 - EPOCH_DAYS)
}

/// `2026-11-21 10:00:03.412` as microseconds since 2000-01-01.
fn moment(value: &[u8]) -> Option<i64> {
    match value {
        b"infinity" => return Some(i64::MAX),
        b"-infinity" => return Some(i64::MIN),
        _ => {}
    }
    let blank = value.iter().position(|byte| *byte == b' ')?;
    let days = date(&value[..blank])?;
    let clock = &value[blank + 1..];
    let (clock, fraction) = clock.split_at_checked(8)?;
    let [h1, h2, b':', m1, m2, b':', s1, s2] = clock else { return None };
    let seconds = two(&[*h1, *h2])? * 3600 + two(&[*m1, *m2])? * 60 + two(&[*s1, *s2])?;
    let micros = match fraction {
        [] => 0,
        [b'.', digits @ ..] if (1..=6).contains(&digits.len()) && digits[0] != b'-' => {
            integer(digits)? * 10_i64.pow(6 - digits.len() as u32)
        }
        _ => return None,
    };
    days.checked_mul(DAY_MICROS)?.checked_add(seconds * 1_000_000 + micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(field: Field, value: &str) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        turn(field, value.as_bytes(), &mut out)?;
        Some(out[4..].to_vec())
    }

    #[test]
    fn values_are_turned_as_the_server_reads_them_or_not_at_all() {
        let moment = |text| one(Field::Timestamp, text).map(|bytes| i64::from_be_bytes(bytes.try_into().unwrap()));
        assert_eq!(moment("2000-01-01 00:00:00"), Some(0));
        assert_eq!(moment("1999-12-31 23:59:59.999999"), Some(-1));
        assert_eq!(moment("2024-02-29 12:00:00.5"), Some(762_523_200_500_000));
        assert_eq!(moment("294276-12-31 23:59:59.999999"), Some(9_223_371_331_199_999_999));
        assert_eq!(moment("infinity"), Some(i64::MAX));
        for left in ["0044-03-15 00:00:00 BC", "2024-02-29", "2024-02-29 1:00:00", "24-02-29 12:00:00", "now"] {
            assert_eq!(moment(left), None, "{left}");
        }
        assert_eq!(one(Field::TimestampZone, "2000-01-01 00:00:00+00"), Some(vec![0; 8]));
        assert_eq!(one(Field::TimestampZone, "2000-01-01 00:00:00+01"), None);
        assert_eq!(one(Field::Date, "0001-01-01"), Some((-730_119_i32).to_be_bytes().to_vec()));
        assert_eq!(one(Field::Int8, "-9223372036854775808"), Some(i64::MIN.to_be_bytes().to_vec()));
        assert_eq!(
            (one(Field::Int8, "9223372036854775808"), one(Field::Int2, "32768"), one(Field::Int4, "")),
            (None, None, None)
        );
        assert_eq!(one(Field::Float8, "-0"), Some((-0.0_f64).to_be_bytes().to_vec()));
        assert_eq!(one(Field::Float8, "-Infinity"), Some(f64::NEG_INFINITY.to_be_bytes().to_vec()));
        assert_eq!(one(Field::Bytea, "\\x00ff"), Some(vec![0, 255]));
        assert_eq!((one(Field::Bytea, "\\x0"), one(Field::Bytea, "00"), one(Field::Bool, "true")), (None, None, None));
        assert_eq!(one(Field::Uuid, "00000000-0000-0000-0000-0000000000ff").map(|bytes| bytes[15]), Some(255));
        assert_eq!(one(Field::Uuid, "000000000000000000000000000000000000"), None);
    }

    #[test]
    fn rows_are_turned_wherever_the_stream_is_cut() {
        let fields = [Field::Int4, Field::Text, Field::Jsonb];
        let text = b"1\ta\\tb\\\\\\n\t{\"a\": 1}\n-7\t\\N\t\\N\n3\t\tnull\n";
        let whole = {
            let (mut converter, mut out) = (Converter::new(&fields), Vec::new());
            converter.push(text, &mut out).unwrap();
            assert!(converter.is_complete());
            out
        };
        assert!(whole.windows(5).any(|window| window == b"a\tb\\\n"));
        for step in 1..text.len() {
            let (mut converter, mut out) = (Converter::new(&fields), Vec::new());
            text.chunks(step).for_each(|part| converter.push(part, &mut out).unwrap());
            assert_eq!((out, converter.is_complete()), (whole.clone(), true), "{step}");
        }
        for wrong in [&b"1\ta\n"[..], b"1\ta\tb\tc\n", b"x\ta\tb\n"] {
            assert_eq!(Converter::new(&fields).push(wrong, &mut Vec::new()), None);
        }
    }
}
