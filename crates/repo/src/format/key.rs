//! The files under `keys/`: plain JSON around the sealed master key.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use stillpoint_core::error::{Error, Kind, Result};

/// One key file. The password stretched by `kdf` opens `data`, which is a [`MasterKeyJson`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyFileJson {
    /// When it was made, RFC 3339.
    #[serde(default)]
    pub created: String,
    /// For people; we keep a label here.
    #[serde(default)]
    pub username: String,
    /// Machine it was made on.
    #[serde(default)]
    pub hostname: String,
    /// Always `scrypt`.
    pub kdf: String,
    /// scrypt's cost: a power of two.
    #[serde(rename = "N")]
    pub n: u64,
    /// scrypt's block size.
    pub r: u32,
    /// scrypt's lanes.
    pub p: u32,
    /// 64 random bytes; restic refuses other lengths.
    pub salt: Base64,
    /// The sealed master key.
    pub data: Base64,
}

/// The master key's three parts as restic writes them.
#[derive(Clone, Serialize, Deserialize)]
pub struct MasterKeyJson {
    /// For Poly1305-AES.
    pub mac: MacKeyJson,
    /// AES-256 key, 32 bytes.
    pub encrypt: Base64,
}

/// The Poly1305-AES key.
#[derive(Clone, Serialize, Deserialize)]
pub struct MacKeyJson {
    /// AES-128 key that turns the nonce into the one-time pad, 16 bytes.
    pub k: Base64,
    /// Poly1305's multiplier, 16 bytes; masked when used.
    pub r: Base64,
}

/// Bytes that JSON shows in padded base64. Never printed, since they may be a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl std::fmt::Debug for Base64 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

impl KeyFileJson {
    /// Reads a key file and refuses parameters that would take minutes or gigabytes.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let key: Self = serde_json::from_slice(json)
            .map_err(|error| Error::new(Kind::Corrupt, "a key file is not what it must be").source(error))?;
        if key.kdf != "scrypt" {
            return Err(Error::new(Kind::Unsupported, format!("key derivation `{}` is not supported", key.kdf)));
        }
        let memory_bytes = u128::from(key.n) * u128::from(key.r) * 128;
        let work_bytes = memory_bytes * u128::from(key.p);
        if !key.n.is_power_of_two() || key.n < 2 || key.r == 0 || key.p == 0 || work_bytes > 64 << 30 {
            return Err(Error::new(Kind::Corrupt, "a key file asks for impossible scrypt parameters"));
        }
        Ok(key)
    }

    /// The JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields always serialize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> KeyFileJson {
        KeyFileJson {
            created: "2026-11-21T10:00:00Z".into(),
            username: "label".into(),
            hostname: "host".into(),
            kdf: "scrypt".into(),
            n: 32768,
            r: 8,
            p: 7,
            salt: Base64(vec![1; 64]),
            data: Base64(vec![2; 100]),
        }
    }

    #[test]
    fn a_key_file_survives() {
        assert_eq!(KeyFileJson::parse(&sample().to_json()).unwrap(), sample());
    }

    #[test]
    fn absurd_parameters_are_refused_before_they_are_tried() {
        for (n, r, p) in [(0, 8, 1), (3, 8, 1), (1 << 40, 8, 1), (32768, 0, 1), (32768, 8, 0), (2, u32::MAX, u32::MAX)]
        {
            let json = KeyFileJson { n, r, p, ..sample() }.to_json();
            assert_eq!(KeyFileJson::parse(&json).unwrap_err().kind(), Kind::Corrupt);
        }
    }
}
