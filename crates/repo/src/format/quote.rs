//! How restic writes file names that need not be text: Go's quoted strings without the quotes.
//!
//! What is no valid UTF-8 becomes `\xff`, control characters and `"` and `\` are escaped; the rest
//! stands for itself. Reading accepts every escape that Go knows. Any bytes survive both ways.

use std::borrow::Cow;
use std::fmt::Write as _;

use stillpoint_core::error::{Error, Kind, Result};

/// Writes `name` as text.
pub fn quote(name: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(name)
        && !text.chars().any(|c| c == '"' || c == '\\' || !is_printable(c))
    {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(name.len() + 8);
    for chunk in name.utf8_chunks() {
        for character in chunk.valid().chars() {
            quote_char(character, &mut out);
        }
        for byte in chunk.invalid() {
            write!(out, "\\x{byte:02x}").expect("a string takes every write");
        }
    }
    Cow::Owned(out)
}

fn quote_char(character: char, out: &mut String) {
    match character {
        '"' | '\\' => out.extend(['\\', character]),
        '\x07' => out.push_str("\\a"),
        '\x08' => out.push_str("\\b"),
        '\x0b' => out.push_str("\\v"),
        '\x0c' => out.push_str("\\f"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\0'..='\x1f' | '\x7f' => write!(out, "\\x{:02x}", character as u32).expect("a string takes every write"),
        hidden if !is_printable(hidden) => match hidden as u32 {
            wide @ 0x1_0000.. => write!(out, "\\U{wide:08x}").expect("a string takes every write"),
            narrow => write!(out, "\\u{narrow:04x}").expect("a string takes every write"),
        },
        plain => out.push(plain),
    }
}

/// Nearly what Go calls printable, so that `restic rewrite` finds our trees written as it would
/// write them. Where the two differ, both forms read the same.
fn is_printable(character: char) -> bool {
    let hidden = matches!(character,
        '\u{ad}' | '\u{61c}' | '\u{6dd}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}' | '\u{f0000}'..);
    let space = character.is_whitespace() && character != ' ';
    !(hidden || space || character.is_control())
}

/// Reads what [`quote`] or restic wrote.
pub fn unquote(text: &str) -> Result<Cow<'_, [u8]>> {
    if !text.contains('\\') {
        return Ok(Cow::Borrowed(text.as_bytes()));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        rest = unquote_one(&rest[at + 1..], &mut out).ok_or_else(|| bad(text))?;
    }
    out.extend_from_slice(rest.as_bytes());
    Ok(Cow::Owned(out))
}

/// Reads one escape whose backslash is gone, and returns what follows it.
fn unquote_one<'t>(rest: &'t str, out: &mut Vec<u8>) -> Option<&'t str> {
    let letter = *rest.as_bytes().first()?;
    let simple = match letter {
        b'a' => 7,
        b'b' => 8,
        b'f' => 12,
        b'n' => 10,
        b'r' => 13,
        b't' => 9,
        b'v' => 11,
        b'\\' | b'"' => letter,
        b'x' => return number(rest, 1, 2, 16).and_then(|(value, rest)| push_byte(value, rest, out)),
        b'0'..=b'7' => return number(rest, 0, 3, 8).and_then(|(value, rest)| push_byte(value, rest, out)),
        b'u' | b'U' => {
            let (value, rest) = number(rest, 1, if letter == b'u' { 4 } else { 8 }, 16)?;
            let character = char::from_u32(value)?;
            out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(rest);
        }
        _ => return None,
    };
    out.push(simple);
    Some(&rest[1..])
}

fn number(rest: &str, skip: usize, digits: usize, radix: u32) -> Option<(u32, &str)> {
    let text = rest.get(skip..skip + digits)?;
    if !text.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    Some((u32::from_str_radix(text, radix).ok()?, &rest[skip + digits..]))
}

fn push_byte<'t>(value: u32, rest: &'t str, out: &mut Vec<u8>) -> Option<&'t str> {
    out.push(u8::try_from(value).ok()?);
    Some(rest)
}

fn bad(text: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the name `{text}` is not quoted as it must be"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_survive(name: Vec<u8>) {
            let quoted = quote(&name);
            prop_assert_eq!(unquote(&quoted).unwrap().into_owned(), name);
        }

        #[test]
        fn any_text_survives_and_never_panics_when_read(name: String) {
            let quoted = quote(name.as_bytes());
            prop_assert_eq!(unquote(&quoted).unwrap().into_owned(), name.as_bytes());
            drop(unquote(&name));
        }
    }

    #[test]
    fn escapes_are_those_of_go() {
        assert_eq!(quote(b"plain \xc3\xa4"), "plain ä");
        assert_eq!(quote(b"\x01\n\"\\\xff\x7f"), r#"\x01\n\"\\\xff\x7f"#);
        assert_eq!(unquote(r"\u00e4\U0001f600\101\a").unwrap().as_ref(), "ä😀A\x07".as_bytes());
        for bad in ["\\", "\\q", "\\x1", "\\xg0", "\\u12", "\\ud800", "\\777", "\\x+1"] {
            assert!(unquote(bad).is_err(), "{bad}");
        }
    }
}
