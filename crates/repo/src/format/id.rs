//! The SHA-256 names of blobs and files.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use stillpoint_core::error::{Error, Kind, Result};

/// A SHA-256: of a blob's plain bytes, or of a file's stored bytes. Printed as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 32]);

impl Id {
    /// Reads 64 hex digits.
    pub fn parse(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        match decode_hex(text.as_bytes(), &mut bytes) {
            true => Ok(Self(bytes)),
            false => Err(Error::new(Kind::Corrupt, format!("`{text}` is not 64 hex digits"))),
        }
    }

    /// The 64 hex digits.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Appends the 64 hex digits to `out`, without an allocation of their own.
    pub fn push_hex(&self, out: &mut Vec<u8>) {
        let mut text = [0; 64];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        out.extend_from_slice(&text);
    }
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The value of each hex digit, `0xff` for other bytes.
const VALUES: [u8; 256] = {
    let mut values = [0xff; 256];
    let mut digit = 0;
    while digit < 16 {
        values[DIGITS[digit] as usize] = digit as u8;
        values[DIGITS[digit].to_ascii_uppercase() as usize] = digit as u8;
        digit += 1;
    }
    values
};

fn decode_hex(text: &[u8], out: &mut [u8; 32]) -> bool {
    if text.len() != 64 {
        return false;
    }
    let mut seen = 0;
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        let (high, low) = (VALUES[usize::from(pair[0])], VALUES[usize::from(pair[1])]);
        seen |= high | low;
        *byte = high << 4 | (low & 15);
    }
    seen < 16
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hex())
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Id;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("64 hex digits")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Id, E> {
                let mut bytes = [0; 32];
                match decode_hex(text.as_bytes(), &mut bytes) {
                    true => Ok(Id(bytes)),
                    false => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hex_survives(bytes: [u8; 32]) {
            let id = Id(bytes);
            prop_assert_eq!(Id::parse(&id.hex()).unwrap(), id);
            prop_assert_eq!(Id::parse(&id.hex().to_uppercase()).unwrap(), id);
            let mut text = Vec::new();
            id.push_hex(&mut text);
            prop_assert_eq!(text, id.hex().into_bytes());
        }

        #[test]
        fn other_text_is_refused(text in ".{0,70}") {
            let valid = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            prop_assert_eq!(Id::parse(&text).is_ok(), valid);
        }
    }
}
