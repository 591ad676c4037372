//! What a store can promise, judged from its live version and settings.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::position::Identity;

/// How a store's view is held, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PinKind {
    /// A position in a retained log.
    Log,
    /// Names of immutable things, protected from collection.
    Set,
    /// A view that the server or file system keeps.
    Snapshot,
    /// Nothing holds the view: what changes after the cut is detected and named.
    Watched,
}

/// What a driver can do on this store; the engine asks here before it asks the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Capability {
    /// How the cut is held.
    pub pin: PinKind,
    /// Whether `observe` reports a position, so that the optimistic cut can count on this store.
    pub observes_writes: bool,
    /// Whether `drain` can skip what the parent point already holds.
    pub incremental: bool,
    /// Whether `edges` can evaluate references on the pinned view.
    pub edges: bool,
    /// Whether a restore can load beside the old content and swap at the end.
    pub swaps_in_place: bool,
    /// Whether parts (a path, a key prefix, a table) can be restored alone.
    pub partial_restore: bool,
}

/// What `probe` found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Probe {
    /// The store's version, in its own words.
    pub version: String,
    /// Who the store is.
    pub identity: Identity,
    /// What it can promise.
    pub capability: Capability,
    /// Privileges that are missing, each with what would grant it. Empty when nothing is missing.
    pub missing_privileges: Vec<String>,
    /// Things the operator should know, which do not stop a backup.
    pub warnings: Vec<String>,
}
