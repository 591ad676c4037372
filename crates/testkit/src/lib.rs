//! What proves drivers and engine: the conformance suite, an in-memory tree, chaos, the oracle.
//!
//! Kept apart from what it proves, and dependent on `core` alone: the same suite runs in our tests
//! and, through `stillpoint driver check`, against a user's own store. Nothing here is needed to
//! take or restore a point, and nothing here prints, except [`skip`].

pub mod chaos;
pub mod conformance;
pub mod corpus;
mod extract;
pub mod fault;
pub mod minio;
pub mod oracle;
pub mod platform;
pub mod proxy;
pub mod servers;
mod sink;
mod skew;
mod tree;

pub use sink::{CountingSink, Drain, MemorySink};
pub use tree::MemoryTree;

/// Says on stderr that a test did not run, and why, in the form that `cargo xtask test` counts.
///
/// A test that needs what is not installed calls this and returns; it never passes silently.
#[allow(clippy::print_stderr)]
pub fn skip(test: &str, reason: &str) {
    eprintln!("SKIP {test}: {reason}");
}
