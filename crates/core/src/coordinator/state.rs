//! Where a run stands.

use serde::{Deserialize, Serialize};

/// Where a run stands. The table in the [module's doc](super) says what leads from one to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing happened yet.
    New,
    /// The lease is being taken.
    Leasing,
    /// PREPARE: stores are being probed and prepared.
    Preparing,
    /// CUT: the watchdog and the pause steps are being started.
    Pausing {
        /// Pause steps that are in place.
        steps_done: u32,
    },
    /// CUT: positions are being read before the pins.
    ObservingBefore,
    /// CUT: stores are being pinned.
    Pinning {
        /// Which group of the pin order.
        group: u32,
    },
    /// CUT: positions are being read after the pins.
    ObservingAfter,
    /// CUT: writers are being let go, before the drain or before a cut without pause.
    Resuming,
    /// DRAIN: the stores are being copied.
    Draining,
    /// SEAL: references are being evaluated.
    CheckingReferences,
    /// SEAL: pins are being checked for the last time.
    CheckingPins,
    /// SEAL: the snapshot is being written.
    WritingSnapshot,
    /// SEAL: the statefile is being written. From here on nothing can stop the run.
    Committing,
    /// SEAL: nobody knows whether the statefile was written; the bucket is being asked.
    AskingForCommit,
    /// Everything that is held is being let go, after success or failure.
    Unwinding,
    /// The run is over.
    Concluded,
}

impl State {
    /// The phase of the design that this state belongs to: `prepare`, `cut`, `drain`, `seal` or
    /// `release`.
    pub fn phase(self) -> &'static str {
        match self {
            Self::New | Self::Leasing | Self::Preparing => "prepare",
            Self::Pausing { .. }
            | Self::ObservingBefore
            | Self::Pinning { .. }
            | Self::ObservingAfter
            | Self::Resuming => "cut",
            Self::Draining => "drain",
            Self::CheckingReferences
            | Self::CheckingPins
            | Self::WritingSnapshot
            | Self::Committing
            | Self::AskingForCommit => "seal",
            Self::Unwinding | Self::Concluded => "release",
        }
    }
}
