//! Names and identifiers, each its own type, each valid once it exists.
//!
//! Random identifiers are made from bytes that the caller draws, so that this crate stays pure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

use crate::error::{Error, Kind, Result};

/// Lower-case Crockford base32: no i, l, o, u, so that ids survive being read out on a phone.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Accepts `text` if it is valid; the error says what is allowed.
            pub fn new(text: impl Into<String>) -> Result<Self> {
                let text = text.into();
                let valid: fn(&str) -> std::result::Result<(), &'static str> = $valid;
                match valid(&text) {
                    Ok(()) => Ok(Self(text)),
                    Err(rule) => Err(Error::new(Kind::Config, format!("`{text}` is not a valid {}: {rule}", $what))),
                }
            }

            /// The text as given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }
    };
}

fn label(text: &str) -> std::result::Result<(), &'static str> {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    let edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if bytes.is_empty() || bytes.len() > 63 {
        Err("1 to 63 characters")
    } else if !bytes.iter().all(inner) || !edge(&bytes[0]) || !edge(&bytes[bytes.len() - 1]) {
        Err("lower-case letters, digits and `-`, first and last a letter or digit")
    } else {
        Ok(())
    }
}

fn base32(text: &str) -> std::result::Result<(), &'static str> {
    if text.len() != RANDOM_ID_CHARS {
        Err("10 characters")
    } else if !text.bytes().all(|b| ALPHABET.contains(&b)) {
        Err("digits and lower-case letters without i, l, o, u")
    } else {
        Ok(())
    }
}

/// Length of a random id in characters; 50 bits.
pub const RANDOM_ID_CHARS: usize = 10;

fn random_text(bytes: [u8; 8]) -> String {
    let bits = u64::from_le_bytes(bytes);
    (0..RANDOM_ID_CHARS).map(|i| ALPHABET[(bits >> (5 * i)) as usize & 31] as char).collect()
}

text_id!(
    /// The name of a platform: what is protected together.
    PlatformName, "platform name", label
);
text_id!(
    /// The name of an environment, such as `production` or `staging`.
    EnvironmentName, "environment name", label
);
text_id!(
    /// The name of one store within a platform; also its top folder in every point.
    StoreName, "store name", label
);
text_id!(
    /// A recovery point's id, unique per bucket.
    PointId, "point id", base32
);
text_id!(
    /// The id of one run of the engine: a backup, a restore, a maintenance run.
    RunId, "run id", base32
);

macro_rules! random_id {
    ($name:ident) => {
        impl $name {
            /// Makes an id from 8 random bytes, which the caller draws.
            pub fn from_random(bytes: [u8; 8]) -> Self {
                Self(random_text(bytes))
            }
        }
    };
}
random_id!(PointId);
random_id!(RunId);

/// Names one attempt to cut: the run, and how many tries came before.
///
/// `Driver::cut` is idempotent per `CutId`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct CutId {
    /// The run that cuts.
    pub run: RunId,
    /// Counts the tries within the run, from 1.
    pub attempt: u32,
}

impl fmt::Display for CutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.run, self.attempt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_dns_rules() {
        for good in ["a", "meta-db", "s3", "0x"] {
            assert!(StoreName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "..", &"x".repeat(64)] {
            assert!(StoreName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn random_ids_use_all_fifty_bits_and_parse_again() {
        let id = PointId::from_random([0xff; 8]);
        assert_eq!(id.as_str(), "zzzzzzzzzz");
        assert_eq!(PointId::new(id.as_str()).expect("valid"), id);
        assert!(PointId::new("k3f9").is_err());
    }
}
