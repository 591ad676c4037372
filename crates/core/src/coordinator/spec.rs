//! What a run is asked to do, as far as the machine must know it.

use serde::{Deserialize, Serialize};

use crate::id::{RunId, StoreName};
use crate::statefile::Level;

/// The fixed facts of one run. Part of the journal, before its first event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The run.
    pub run: RunId,
    /// The stores in the order in which they are pinned: groups one after the other, the stores of
    /// a group at the same time. Every store of the run stands in exactly one group.
    pub pin_groups: Vec<Vec<StoreName>>,
    /// Whether pinning in that order makes an unpaused point `ordered`: there are references, and
    /// the groups honour each of them.
    pub order_holds: bool,
    /// The level that is asked for.
    pub level: Level,
    /// Lower levels that are accepted by name.
    pub accept: Vec<Level>,
    /// How often the cut is tried without a pause, at least 1.
    pub optimistic_tries: u32,
    /// How many pause steps the platform has.
    pub pause_steps: u32,
    /// How long writers may be held back.
    pub pause_budget_micros: u64,
    /// Whether named losses are accepted.
    pub accept_named_loss: bool,
    /// The references, in the platform's order.
    pub references: Vec<ReferenceSpec>,
}

/// What the machine must know of one reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceSpec {
    /// The store that names.
    pub from: StoreName,
    /// The store that is named.
    pub to: StoreName,
    /// What is named there.
    pub kind: String,
    /// How many may be missing before the run fails; `None` if missing ones are only stated.
    pub missing_max: Option<u64>,
}

impl Spec {
    /// All stores, in pin order.
    pub fn stores(&self) -> impl Iterator<Item = &StoreName> {
        self.pin_groups.iter().flatten()
    }

    /// How many stores the run has.
    pub fn store_count(&self) -> usize {
        self.pin_groups.iter().map(Vec::len).sum()
    }

    /// Whether a point of `level` may be sealed: it reaches what was asked, or what is accepted.
    pub fn accepts(&self, level: Level) -> bool {
        level >= self.level || self.accept.iter().any(|accepted| level >= *accepted)
    }
}
