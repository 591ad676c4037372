//! What a run tells those who watch it, as plain data.
//!
//! Kept apart from any rendering: the CLI draws bars or prints lines, a daemon forwards JSON.
//! An observer must return quickly and cannot fail a run.

use serde::Serialize;
use stillpoint_core::id::StoreName;

/// The phases of a run, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Undoing what an earlier run left behind.
    Recover,
    /// Everything that can block, before anyone is paused.
    Prepare,
    /// Fixing every store's view.
    Cut,
    /// Copying from the pins.
    Drain,
    /// Checking the pins and references, and the commit.
    Seal,
    /// Letting go of the pins.
    Release,
}

/// How far one store is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreProgress {
    /// The store.
    pub store: StoreName,
    /// Bytes of content handled so far, reused ones included where the driver counts them.
    pub bytes_done: u64,
    /// Bytes to handle in all; 0 when unknown.
    pub bytes_expected: u64,
    /// Rows, objects, files so far.
    pub items_done: u64,
    /// Bytes per second over the last seconds.
    pub bytes_per_second: u64,
    /// Whether the store is drained.
    pub done: bool,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum Update {
    /// A phase began.
    PhaseBegan {
        /// Which.
        phase: Phase,
    },
    /// A phase ended, with one line on what came of it, e.g. `5 stores ready`.
    PhaseEnded {
        /// Which.
        phase: Phase,
        /// What came of it, for people.
        outcome: String,
        /// How long it took, in milliseconds.
        elapsed_millis: u64,
    },
    /// How far the drains are; sent several times a second while they run.
    Stores {
        /// All stores of the run, by name.
        stores: Vec<StoreProgress>,
    },
    /// Something that people should know and that is no failure.
    Message {
        /// One sentence.
        text: String,
    },
}

/// Watches a run.
pub trait Progress: Send + Sync {
    /// Called from any thread, in the order of events of one thread. Must not block.
    fn update(&self, update: Update);
}

/// Watches nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn update(&self, _update: Update) {}
}
