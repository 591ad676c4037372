//! Where a store's view stands, and whose view it is.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A store's own coordinate of its view: LSN, GTID set, offset, ref hash.
///
/// Opaque to the engine. Two positions of one store are comparable for equality under the same
/// [`Identity`]; equality means that no write fell between the two observations.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Position {
    /// What kind of coordinate it is, e.g. `sqlite-wal`, `git-refs`, `inotify`.
    pub kind: String,
    /// The coordinate, printable, without secrets.
    pub text: String,
}

impl Position {
    /// A position of `kind` at `text`.
    pub fn new(kind: impl Into<String>, text: impl Into<String>) -> Self {
        Self { kind: kind.into(), text: text.into() }
    }
}

/// What tells this store from every other one, as far as the store itself can tell.
///
/// `native` is what the store calls itself and survives a physical copy; `endpoint` is where it
/// was reached, normalised (absolute path, `host:port/db`). The fence refuses a target if either
/// equals the source's, and relies on the stamp where copies share native ids.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Identity {
    /// The driver's name.
    pub driver: String,
    /// The store's own identifier, if it has one.
    pub native: Option<String>,
    /// The normalised address.
    pub endpoint: String,
}

impl Identity {
    /// The text an operator types to confirm an in-place restore.
    pub fn typed(&self) -> &str {
        &self.endpoint
    }
}

/// The environment marker that the fence plants in every restored store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stamp {
    /// The platform whose point was restored.
    pub platform: String,
    /// The environment that the copy belongs to.
    pub environment: String,
    /// The restored point.
    pub point: String,
    /// The restore run.
    pub restore: String,
    /// When the stamp was planted.
    pub at: Timestamp,
}
