//! An example platform: a registry of models, whose every model lies in five stores at once.
//!
//! `publish` puts the artifact into S3, commits the training code to git, writes the row, an event
//! and a counter in one transaction of PostgreSQL, points Redis at the newest artifact, and writes a
//! file for the serving side. Kept apart from Stillpoint, of which it knows nothing but its hooks:
//! it uses the stores through their own clients only, so that what `judge` says of a restored copy
//! owes nothing to the code that restored it.

pub mod content;
pub mod create;
pub mod fill;
pub mod gate;
pub mod hooks;
pub mod judge;
pub mod record;
pub mod settings;
pub mod stores;
mod uploader;
pub mod writer;

/// What goes wrong here is said in one sentence; nobody handles it by its kind.
pub type Result<T> = std::result::Result<T, String>;

/// Puts what was attempted in front of a foreign error.
pub(crate) trait Attempted<T> {
    /// `what` reads like `write the row`.
    fn attempted(self, what: &str) -> Result<T>;
}

impl<T, E: std::fmt::Debug + std::fmt::Display> Attempted<T> for std::result::Result<T, E> {
    fn attempted(self, what: &str) -> Result<T> {
        self.map_err(|error| format!("cannot {what}: {error}"))
    }
}
