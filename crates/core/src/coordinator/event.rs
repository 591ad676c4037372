//! What happens to a run: the only input of the machine, and the lines of its journal.
//!
//! Time has no other way in than [`Event::at`]. Every event can be written down and read back, so
//! that a journal replays to the same state. Nothing here decides anything.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::effect::EffectId;
use crate::capability::Probe;
use crate::driver::{Drained, Pin};
use crate::error::{Error, Kind};
use crate::position::Position;

/// Microseconds on the engine's monotonic clock, from any fixed origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Micros(pub u64);

impl Micros {
    /// This instant plus `micros`; stays at the end of time instead of wrapping.
    #[must_use]
    pub fn plus(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }

    /// Microseconds from `earlier` to this instant; 0 if it is not earlier.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One thing that happened, and when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When it happened. An `at` before the latest one seen counts as the latest one seen.
    pub at: Micros,
    /// What happened.
    pub what: Happening,
}

impl Event {
    /// `what`, at `at`.
    pub fn new(at: Micros, what: Happening) -> Self {
        Self { at, what }
    }

    /// The answer to `effect`, at `at`.
    pub fn answer(at: Micros, effect: EffectId, outcome: Outcome) -> Self {
        Self { at, what: Happening::Answer { effect, outcome } }
    }
}

/// What can happen to a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// The run begins. First event of every journal, and only once.
    Begin,
    /// Time passed. Ticks before [`Coordinator::wake_at`](super::Coordinator::wake_at) change
    /// nothing but the clock and need not be journalled.
    Tick,
    /// An effect came to an end, well or badly.
    Answer {
        /// Which effect.
        effect: EffectId,
        /// What came of it.
        outcome: Outcome,
    },
    /// Somebody asked to stop. Legal at any time before the conclusion; without effect once the
    /// statefile is being written.
    Cancel {
        /// Who or what asked, for people.
        reason: String,
    },
    /// The lease on the platform was lost to another engine. Ends the run like `Cancel`.
    LeaseLost {
        /// What is known about it, for people.
        reason: String,
    },
    /// The engine that ran this journal is dead and another one has replayed it. Whatever was under
    /// way will never answer. May happen again during the clean-up.
    Recovered,
}

/// What came of an effect. Which variants answer which action is said at
/// [`Action`](super::effect::Action).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done, and there is nothing more to say.
    Done,
    /// The store was probed and prepared.
    Prepared {
        /// What `probe` said. Missing privileges that matter are a `Failed` instead.
        probe: Box<Probe>,
        /// For how many microseconds after this answer a cut may still come.
        safe_for_micros: u64,
    },
    /// The store's position now; `None` where it cannot tell.
    Observed {
        /// The position.
        position: Option<Position>,
    },
    /// The store's view is fixed.
    Pinned(Box<Pinned>),
    /// The store's content is in the repository's pipeline, all of it written.
    Drained(Box<StoreDrained>),
    /// The pin still shows what it showed at the cut.
    PinValid,
    /// It does not. The point will not be sealed.
    PinLost {
        /// Why, for people.
        reason: String,
    },
    /// One reference was evaluated on the pinned views.
    References(ReferenceCount),
    /// The repository's snapshot is written.
    SnapshotWritten {
        /// Its id, hex.
        snapshot: String,
        /// Bytes that are new in the bucket.
        bytes_stored: u64,
    },
    /// Whether this run's statefile is in the bucket.
    StatefileRead {
        /// Present, readable, authentic and of this run.
        present: bool,
    },
    /// It failed; layers have already retried what was temporary.
    Failed(Box<Failure>),
}

/// A pin and the clock readings around it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pinned {
    /// The driver's pin.
    pub pin: Pin,
    /// Monotonic clock before and after the call.
    pub between: (Micros, Micros),
    /// UTC before and after the call.
    pub between_utc: (Timestamp, Timestamp),
}

/// What the drain of one store came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoreDrained {
    /// What the driver said. `losses` includes the streams that the repository found torn.
    pub drained: Drained,
    /// Files in the store's tree.
    pub files: u64,
    /// Bytes in the store's tree.
    pub bytes: u64,
}

/// What one reference came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceCount {
    /// Edges that were checked.
    pub checked: u64,
    /// Edges whose referent is missing.
    pub missing: u64,
    /// Up to 10 missing ones: referent and owner.
    pub examples: Vec<(String, String)>,
    /// Different referents that are held and that no edge names; `None` where the store cannot list
    /// what it holds.
    #[serde(default)]
    pub unreferenced: Option<u64>,
}

/// An [`Error`] as the journal keeps it: everything that people and exit codes need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong.
    pub kind: Kind,
    /// What was attempted, if known.
    pub operation: Option<String>,
    /// The store concerned, if any.
    pub store: Option<String>,
    /// One sentence, facts included.
    pub message: String,
    /// What the operator can do, if known.
    pub hint: Option<String>,
    /// The causes, outermost first.
    pub causes: Vec<String>,
    /// Whether it is certain that the effect did not happen. No error tells that by its kind: a
    /// write can be in place and still end with a permanent error. So whoever refused before the
    /// first call says it. Only the writing of the statefile asks for it.
    pub certain: bool,
}

impl Failure {
    /// A failure that the machine itself finds, or that the engine found before it did anything.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            operation: None,
            store: None,
            message: message.into(),
            hint: None,
            causes: Vec::new(),
            certain: true,
        }
    }

    /// Turns the failure into an error again; the causes become a chain of plain messages.
    pub fn into_error(self) -> Error {
        let mut error = Error::new(self.kind, self.message);
        if let Some(operation) = self.operation {
            error = error.operation(operation);
        }
        if let Some(store) = self.store {
            error = error.store(store);
        }
        if let Some(hint) = self.hint {
            error = error.hint(hint);
        }
        let chain = self.causes.into_iter().rev().fold(None, |inner, message| Some(Box::new(Cause { message, inner })));
        match chain {
            Some(cause) => error.source(cause as Box<dyn std::error::Error + Send + Sync>),
            None => error,
        }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let mut message = error.message().to_owned();
        for (name, value) in error.facts() {
            message.push_str(&format!(", {name} {value}"));
        }
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            causes.push(inner.to_string());
            cause = inner.source();
        }
        Self {
            kind: error.kind(),
            operation: error.operation_name().map(str::to_owned),
            store: error.store_name().map(str::to_owned),
            message,
            hint: error.hint_text().map(str::to_owned),
            causes,
            certain: false,
        }
    }
}

#[derive(Debug)]
struct Cause {
    message: String,
    inner: Option<Box<Cause>>,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.as_deref().map(|cause| cause as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_all_that_people_need() {
        let error = Error::io("cannot read", std::io::Error::other("disk on fire"))
            .store("meta")
            .operation("drain")
            .context("page", 7)
            .hint("replace the disk");
        let failure = Failure::from(&error);
        let again = Failure::from(&failure.clone().into_error());
        assert_eq!(failure, again);
        assert_eq!(failure.into_error().to_string(), error.to_string());
    }

    #[test]
    fn no_error_proves_by_its_kind_that_nothing_was_written() {
        for kind in [Kind::TimedOut, Kind::Io, Kind::AlreadyExists, Kind::PermissionDenied, Kind::Exhausted] {
            assert!(!Failure::from(&Error::new(kind, "t")).certain, "{kind:?}");
        }
        assert!(Failure::new(Kind::Locked, "refused before the write").certain);
    }
}
