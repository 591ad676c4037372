//! What happened to a run, written down before anything follows from it.
//!
//! The local journal is the truth for this machine: each line is on disk before the effects that it
//! causes begin, so a restarted engine replays it through the coordinator and knows everything that
//! may be held. The copy in the bucket is for other machines; it lags behind by design, because
//! nothing may wait for a bucket while writers are held back. It always holds what an undo needs
//! (the platform with its pause steps), because that is in the head, copied before anything hurts.
//!
//! No secret is ever in a journal: platforms hold references to secrets only.

mod bucket;
mod local;

pub use bucket::{Authenticate, BucketJournal, Copier, OldCopies, forget_ended_copies, read_copy};
pub use local::{Found, Journal, find_unfinished, forget_ended};
pub(crate) use local::{is_dead_here, whole_seconds};

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stillpoint_core::coordinator::{Event, Spec};
use stillpoint_core::id::{PointId, RunId};
use stillpoint_core::platform::Platform;

/// The schema of the journal's head.
pub const SCHEMA: &str = "stillpoint.dev/journal/v1";

/// The fixed facts of a run: first line of every journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The run.
    pub run: RunId,
    /// The point that the run will commit, if it gets that far.
    pub point: PointId,
    /// The platform as it was when the run began, so that an undo does not depend on a later edit.
    pub platform: Platform,
    /// What the coordinator was told.
    pub spec: Spec,
    /// The host that runs it.
    pub host: String,
    /// The process that runs it.
    pub process: u32,
    /// When it began.
    pub began_at: Timestamp,
    /// The folder for drivers' temporary files, removed by whoever ends the run.
    pub scratch: PathBuf,
}

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The run began.
    Head(Box<Head>),
    /// Something happened to it.
    Event(Event),
    /// It is over, and nothing is held any more.
    Ended {
        /// How, in one line.
        outcome: String,
    },
}

/// A journal as it was read back.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// The fixed facts.
    pub head: Head,
    /// What happened, in order.
    pub events: Vec<Event>,
    /// Whether the run is over.
    pub ended: bool,
    /// Why reading stopped before the end, if it did for another reason than a torn last line.
    pub damage: Option<String>,
}

impl Replay {
    /// Puts entries together. `None` if not even the head is there, which means that the run died
    /// before it did anything.
    fn collect(entries: Vec<Entry>, damage: Option<String>) -> Option<Self> {
        let mut entries = entries.into_iter();
        let Some(Entry::Head(head)) = entries.next() else { return None };
        let mut replay = Self { head: *head, events: Vec::new(), ended: false, damage };
        for entry in entries {
            match entry {
                Entry::Event(event) => replay.events.push(event),
                Entry::Ended { .. } => replay.ended = true,
                Entry::Head(_) => replay.damage = Some("a second head".to_owned()),
            }
        }
        Some(replay)
    }
}
