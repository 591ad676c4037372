//! Adds, removes, lists and rotates the keys of a repository.

use stillpoint_core::{Error, Result};

use crate::{Repository, Unlock};

/// One key file of the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its id: the name of the file, hex.
    pub id: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// The label given, kept in restic's `username`.
    pub label: String,
    /// The machine it was made on.
    pub hostname: String,
    /// Whether this session was opened with it.
    pub current: bool,
}

impl Repository {
    /// All keys.
    pub fn keys(&self) -> Result<Vec<KeyInfo>> {
        Err(Error::internal("not built yet"))
    }

    /// Lets `new` open the repository too.
    pub fn key_add(&self, _new: &Unlock, _label: &str) -> Result<KeyInfo> {
        Err(Error::internal("not built yet"))
    }

    /// Removes a key; refuses the one in use.
    pub fn key_remove(&self, _id: &str) -> Result<()> {
        Err(Error::internal("not built yet"))
    }

    /// Adds `new` and removes the key in use.
    pub fn key_rotate(&self, _new: &Unlock, _label: &str) -> Result<KeyInfo> {
        Err(Error::internal("not built yet"))
    }
}
