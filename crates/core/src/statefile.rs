//! `statefile.json`: the commit of a recovery point. What is in it is proven; without it there is no point.
//!
//! Schema `stillpoint.dev/statefile/v1`, frozen samples in `testdata/`. Holds no secret.
//! `authentication` is a keyed hash over the canonical bytes of everything else, made with a key
//! derived from the repository's master key; see `docs/formats.md`.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::driver::Loss;
use crate::error::{Error, Kind, Result};
use crate::id::{EnvironmentName, PlatformName, PointId, RunId, StoreName};
use crate::position::{Identity, Position};

/// The schema name of this version.
pub const SCHEMA: &str = "stillpoint.dev/statefile/v1";

/// The schema of a mark that occupies a statefile's name, so that no point can be committed there.
///
/// Whoever takes over a run from an engine that may still be alive writes it, only if absent, to the
/// name that the other engine would commit to: exactly one of the two writes wins, whatever the
/// clocks say. A name that holds this mark is no point, and listings pass over it.
pub const VOID_SCHEMA: &str = "stillpoint.dev/void/v1";

/// How consistent a point is across its stores, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Each store consistent in itself; the measured skew is stated.
    Independent,
    /// Along every declared reference the right side was pinned first.
    Ordered,
    /// No write fell between any two pins.
    Strict,
}

/// What a point is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything the cut showed is in the point.
    Restorable,
    /// Everything but what is named under `losses`.
    RestorableWithNamedLoss,
}

/// The commit of a recovery point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Statefile {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The point.
    pub point: PointId,
    /// The run that made it.
    pub run: RunId,
    /// The platform.
    pub platform: PlatformName,
    /// The environment it was taken from.
    pub environment: EnvironmentName,
    /// What the point is worth.
    pub verdict: Verdict,
    /// The level that was reached.
    pub level: Level,
    /// The level that was asked for.
    pub level_asked: Level,
    /// Latest moment that the point may be taken to show: the end of the cut.
    pub cut_at: Timestamp,
    /// From the first pin's begin to the last pin's end, in microseconds.
    pub skew_micros: u64,
    /// How long writers were held back, in microseconds; 0 when they were not.
    pub pause_micros: u64,
    /// How many tries the cut took, from 1.
    pub cut_tries: u32,
    /// When the run began.
    pub started_at: Timestamp,
    /// When the statefile was written.
    pub sealed_at: Timestamp,
    /// The repository's snapshot, hex.
    pub snapshot: String,
    /// The point whose content served as the parent, if any.
    pub parent: Option<PointId>,
    /// The stores, by name.
    pub stores: BTreeMap<StoreName, StoreState>,
    /// Stores of the platform that the run was not asked to take. If there are any, the point counts
    /// for its own stores and not for the platform.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left_out: BTreeSet<StoreName>,
    /// What the references came to.
    pub references: Vec<ReferenceState>,
    /// Bytes read from stores, bytes new in the bucket, after compression.
    pub totals: Totals,
    /// The version of stillpoint that made the point.
    pub tool_version: String,
    /// The number of the lease under which the point was written; grows with every run of the platform.
    #[serde(default)]
    pub fencing: u64,
    /// Keyed hash over the rest, hex; see the module's doc.
    #[serde(default)]
    pub authentication: String,
}

/// One store in a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoreState {
    /// The driver's name.
    pub driver: String,
    /// The store's version in its own words.
    pub version: String,
    /// Who the store is.
    pub identity: Identity,
    /// Where its view stands.
    pub position: Position,
    /// Monotonic microseconds from the cut's begin to before and after the pin.
    pub pinned_micros: (u64, u64),
    /// UTC before and after the pin.
    pub pinned_at: (Timestamp, Timestamp),
    /// Files in the store's tree.
    pub files: u64,
    /// Bytes in the store's tree.
    pub bytes: u64,
    /// The store's own count, and what it counts.
    pub items: u64,
    /// What `items` counts.
    pub unit: String,
    /// The store's own checksums.
    pub checksums: BTreeMap<String, String>,
    /// Known losses.
    pub losses: Vec<Loss>,
    /// Notes for people.
    pub notes: Vec<String>,
}

/// What one reference came to at SEAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReferenceState {
    /// The store that names.
    pub from: StoreName,
    /// The store that is named.
    pub to: StoreName,
    /// What is named there.
    pub kind: String,
    /// Edges that were checked.
    pub checked: u64,
    /// Edges whose referent is missing.
    pub missing: u64,
    /// Up to 10 missing ones: referent and owner.
    pub examples: Vec<(String, String)>,
    /// Different things that the named store holds and that this reference does not name; absent
    /// where the store cannot list what it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreferenced: Option<u64>,
}

/// Sums over all stores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Totals {
    /// Files in all trees.
    pub files: u64,
    /// Bytes in all trees.
    pub bytes: u64,
    /// Bytes that were read from stores in this run.
    pub bytes_read: u64,
    /// Bytes that are new in the bucket, compressed and encrypted.
    pub bytes_stored: u64,
}

impl Statefile {
    /// Whether the point covers every store that its platform had.
    pub fn is_whole(&self) -> bool {
        self.left_out.is_empty()
    }

    /// The bytes that `authentication` covers: the JSON of all other fields with sorted keys.
    pub fn canonical_bytes(&self) -> Result<Vec<u8>> {
        let mut value =
            serde_json::to_value(self).map_err(|e| Error::internal("statefile does not serialize").source(e))?;
        if let Some(object) = value.as_object_mut() {
            object.remove("authentication");
        }
        serde_json::to_vec(&value).map_err(|e| Error::internal("statefile does not serialize").source(e))
    }

    /// The mark that keeps `run` from committing; see [`VOID_SCHEMA`].
    pub fn void_mark(run: &RunId) -> Vec<u8> {
        serde_json::json!({ "schema": VOID_SCHEMA, "run": run }).to_string().into_bytes()
    }

    /// Whether these bytes are the mark of a run that was given up, and so no point.
    pub fn is_void(bytes: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Head {
            schema: String,
        }
        serde_json::from_slice::<Head>(bytes).is_ok_and(|head| head.schema == VOID_SCHEMA)
    }

    /// The bytes that `authentication` covers, taken from a statefile as it was read.
    ///
    /// Whoever checks uses this one: [`canonical_bytes`](Self::canonical_bytes) of a parsed
    /// statefile would lack fields that a later version wrote, and have fields that an earlier one
    /// did not know.
    pub fn authenticated_bytes(bytes: &[u8]) -> Result<Vec<u8>> {
        let corrupt = |e| Error::new(Kind::Corrupt, "the statefile is not readable").source(e);
        let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(corrupt)?;
        if let Some(object) = value.as_object_mut() {
            object.remove("authentication");
        }
        serde_json::to_vec(&value).map_err(|e| Error::internal("statefile does not serialize").source(e))
    }

    /// Parses a statefile. A newer schema is refused by name before its fields are looked at.
    ///
    /// The caller checks `authentication` over [`canonical_bytes`](Self::canonical_bytes) before
    /// it believes anything.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            schema: String,
        }
        let corrupt = |e: serde_json::Error| {
            Error::new(Kind::Corrupt, "the statefile is not readable")
                .context("line", e.line())
                .hint("restore it from a copy of the bucket, or use restic on the repository directly")
                .source(e)
        };
        let head: Head = serde_json::from_slice(bytes).map_err(corrupt)?;
        if head.schema == VOID_SCHEMA {
            return Err(Error::new(
                Kind::NotFound,
                "there is no such point: its run was given up before it was sealed",
            ));
        }
        if head.schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the point uses the schema `{}`", head.schema))
                .hint(format!("this version reads `{SCHEMA}`; use a newer stillpoint")));
        }
        serde_json::from_slice(bytes).map_err(corrupt)
    }
}
