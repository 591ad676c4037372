//! The files under `locks/`, as restic reads and writes them.

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

/// One lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockJson {
    /// When it was taken or last refreshed, RFC 3339.
    pub time: String,
    /// Held alone (prune) or together (backup).
    pub exclusive: bool,
    /// Machine of the holder.
    #[serde(default)]
    pub hostname: String,
    /// User of the holder.
    #[serde(default)]
    pub username: String,
    /// Process of the holder.
    #[serde(default)]
    pub pid: i64,
    /// User id of the holder.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u32,
    /// Group id of the holder.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl LockJson {
    /// Reads a lock.
    pub fn parse(json: &[u8]) -> Result<Self> {
        serde_json::from_slice(json)
            .map_err(|error| Error::new(Kind::Corrupt, "a lock is not what it must be").source(error))
    }

    /// The JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields always serialize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_of_restic_is_read() {
        let json =
            br#"{"time":"2026-11-21T10:00:00.1+01:00","exclusive":false,"hostname":"h","username":"root","pid":7}"#;
        let lock = LockJson::parse(json).unwrap();
        assert_eq!((lock.pid, lock.uid, lock.exclusive), (7, 0, false));
        assert_eq!(LockJson::parse(&lock.to_json()).unwrap(), lock);
    }
}
