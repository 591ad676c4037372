//! The repository's `config` file: who it is, which version, how it is cut.

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::polynomial;

/// The version that we write. Version 1 has no compression and is refused.
pub const VERSION: u32 = 2;

/// What `config` holds, encrypted but never compressed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Format version.
    pub version: u32,
    /// 64 random hex digits.
    pub id: String,
    /// An irreducible polynomial of degree 53, hex. Secret: with it an attacker could tell from
    /// the lengths of chunks which known files are stored.
    pub chunker_polynomial: String,
}

impl Config {
    /// A new repository's configuration.
    pub fn new(id: [u8; 32], polynomial: u64) -> Self {
        Self { version: VERSION, id: hex::encode(id), chunker_polynomial: format!("{polynomial:x}") }
    }

    /// Reads and checks the JSON.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let config: Self = serde_json::from_slice(json).map_err(|error| {
            Error::new(Kind::Corrupt, "the repository's config is not what it must be").source(error)
        })?;
        if config.version != VERSION {
            let message = format!("the repository has format version {}, only 2 is supported", config.version);
            return Err(Error::new(Kind::Unsupported, message)
                .hint("`restic migrate upgrade_repo_v2` brings version 1 to version 2"));
        }
        config.polynomial()?;
        Ok(config)
    }

    /// The JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("three plain fields always serialize")
    }

    /// The polynomial as a number.
    pub fn polynomial(&self) -> Result<u64> {
        u64::from_str_radix(&self.chunker_polynomial, 16)
            .ok()
            .filter(|number| polynomial::is_irreducible(*number))
            .ok_or_else(|| Error::new(Kind::Corrupt, "the repository's chunker polynomial is not irreducible"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_and_version_1_is_refused() {
        let config = Config::new([7; 32], 0x3DA3358B4DC173);
        assert_eq!(Config::parse(&config.to_json()).unwrap(), config);
        let old = Config { version: 1, ..config.clone() };
        assert_eq!(Config::parse(&old.to_json()).unwrap_err().kind(), Kind::Unsupported);
        let weak = Config { chunker_polynomial: "4".into(), ..config };
        assert_eq!(Config::parse(&weak.to_json()).unwrap_err().kind(), Kind::Corrupt);
    }
}
