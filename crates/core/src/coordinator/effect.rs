//! What the machine asks the engine to do. Plain data; whoever performs it lives in the engine.
//!
//! Each effect has a number, given in order, so that its answer can be told from every other one.
//! The effects of one step may be performed at the same time, with one exception: those that
//! concern the pause ([`Action::is_pause`]) are begun in the order in which they are listed.

use serde::{Deserialize, Serialize};

use super::event::{Failure, Micros};
use crate::driver::Pin;
use crate::id::{CutId, StoreName};
use crate::statefile::{Level, Verdict};

/// Numbers the effects of one run, from 1, in the order in which they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EffectId(pub u32);

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Its number; the answer carries it.
    pub id: EffectId,
    /// What to do.
    pub action: Action,
}

/// Before or after the pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Before the first pin of the try.
    Before,
    /// After the last pin of the try.
    After,
}

/// What can be asked for. The doc of each says what answers it, besides `Failed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Take the platform's lease in the bucket, and keep it alive. Answer: `Done`.
    AcquireLease,
    /// Probe and prepare the store, or renew its hold. Answer: `Prepared`.
    Prepare {
        /// The store.
        store: StoreName,
    },
    /// Ask for the store's position. Answer: `Observed`.
    Observe {
        /// The store.
        store: StoreName,
        /// The try that it belongs to.
        cut: CutId,
        /// Before or after the pins of that try.
        side: Side,
    },
    /// Fix the store's view. Answer: `Pinned`.
    Pin {
        /// The store.
        store: StoreName,
        /// The try that it belongs to.
        cut: CutId,
    },
    /// Start the process that undoes the pause if this one dies. Answer: `Done`.
    StartWatchdog {
        /// When the pause must be undone at the latest.
        deadline: Micros,
    },
    /// Hold writers back. Answer: `Done`.
    Pause {
        /// Index of the pause step in the platform.
        step: u32,
    },
    /// Let writers go again; safe to repeat, also when they were never held. Answer: `Done`.
    Resume {
        /// Index of the pause step in the platform.
        step: u32,
    },
    /// End the watchdog without an undo. Answer: `Done`.
    StopWatchdog,
    /// Copy the pinned view into the repository. Answer: `Drained`.
    Drain {
        /// The store.
        store: StoreName,
        /// Its pin.
        pin: Box<Pin>,
    },
    /// Evaluate one reference on the pinned views. Answer: `References`.
    CheckReference {
        /// Index of the reference in the platform.
        reference: u32,
    },
    /// Check that the pin still shows what it showed at the cut. Answer: `PinValid`, `PinLost`.
    CheckPin {
        /// The store.
        store: StoreName,
        /// Its pin.
        pin: Box<Pin>,
    },
    /// Write what is left of packs, the index and the snapshot. Answer: `SnapshotWritten`.
    WriteSnapshot,
    /// Write the statefile, only if absent: the commit. Answer: `Done`. A `Failed` leads to
    /// `ReadStatefile` unless it is `certain`: refused before the write began.
    WriteStatefile,
    /// Find out whether this run's statefile is in the bucket. Answer: `StatefileRead`.
    ReadStatefile,
    /// Let go of everything that the store holds for us; safe to repeat. Answer: `Done`.
    Release {
        /// The store.
        store: StoreName,
        /// What its latest known pin left behind, for a driver value that did not make the pin.
        remains: Vec<String>,
    },
    /// Drop what the drains wrote; no snapshot names it. Safe to repeat. Answer: `Done`.
    AbandonBackup,
    /// Remove the snapshot of this run's point, found by its tag, if there is one. Answer: `Done`.
    RemoveSnapshot,
    /// Give the lease back. Answer: `Done`.
    ReleaseLease,
    /// Ask an effect that is under way to stop soon. Not answered itself; the effect is.
    Interrupt {
        /// Which effect.
        effect: EffectId,
    },
    /// The run is over. Always the last effect. Not answered.
    Conclude {
        /// How it ended.
        conclusion: Box<Conclusion>,
    },
}

impl Action {
    /// Whether the engine must answer it.
    pub fn is_answered(&self) -> bool {
        !matches!(self, Self::Interrupt { .. } | Self::Conclude { .. })
    }

    /// Whether it belongs to the pause, where order counts.
    pub fn is_pause(&self) -> bool {
        matches!(self, Self::StartWatchdog { .. } | Self::Pause { .. } | Self::Resume { .. } | Self::StopWatchdog)
    }

    /// The store whose driver is called, if it is one.
    pub fn store(&self) -> Option<&StoreName> {
        match self {
            Self::Prepare { store }
            | Self::Observe { store, .. }
            | Self::Pin { store, .. }
            | Self::Drain { store, .. }
            | Self::CheckPin { store, .. }
            | Self::Release { store, .. } => Some(store),
            _ => None,
        }
    }

    /// The name in journals and errors, e.g. `pin`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AcquireLease => "acquire_lease",
            Self::Prepare { .. } => "prepare",
            Self::Observe { .. } => "observe",
            Self::Pin { .. } => "pin",
            Self::StartWatchdog { .. } => "start_watchdog",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::StopWatchdog => "stop_watchdog",
            Self::Drain { .. } => "drain",
            Self::CheckReference { .. } => "check_reference",
            Self::CheckPin { .. } => "check_pin",
            Self::WriteSnapshot => "write_snapshot",
            Self::WriteStatefile => "write_statefile",
            Self::ReadStatefile => "read_statefile",
            Self::Release { .. } => "release",
            Self::AbandonBackup => "abandon_backup",
            Self::RemoveSnapshot => "remove_snapshot",
            Self::ReleaseLease => "release_lease",
            Self::Interrupt { .. } => "interrupt",
            Self::Conclude { .. } => "conclude",
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conclusion {
    /// The statefile is in the bucket: the point exists.
    Sealed {
        /// What the point is worth.
        verdict: Verdict,
        /// The level that was reached.
        level: Level,
        /// What went wrong on the way out, without harm to the point.
        warnings: Vec<Failure>,
    },
    /// There is no point.
    Failed {
        /// The first thing that went wrong.
        failure: Failure,
        /// What went wrong while cleaning up; a `Resume` among them means that writers may still
        /// be held back.
        warnings: Vec<Failure>,
        /// The statefile may be in the bucket after all: its writing was never answered, and
        /// asking failed too. Whatever is found there later is valid.
        commit_unknown: bool,
    },
}
