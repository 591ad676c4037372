//! `platform.yaml`: what is protected together. Pure data; reading files and secrets is the engine's.
//!
//! The same schema serves the file and, later, the Kubernetes resource. `generated/platform.schema.json`
//! is made from these types and checked by a test.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{EnvironmentName, PlatformName, StoreName};
use crate::statefile::Level;

/// The version that every `platform.yaml` states in `apiVersion`.
pub const API_VERSION: &str = "stillpoint.dev/v1";

/// A platform: stores, how their writers are paused, how they refer to each other, where it all goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Platform {
    /// Always `stillpoint.dev/v1`.
    pub api_version: String,
    /// The platform's name, unique in its bucket.
    pub platform: PlatformName,
    /// Which copy of the platform this is, e.g. `production`.
    pub environment: EnvironmentName,
    /// Where recovery points go.
    pub bucket: Bucket,
    /// The stores, by name. The name is also the store's top folder in every point.
    pub stores: BTreeMap<StoreName, Store>,
    /// How consistent a point must be, and how long writers may be held back for it.
    #[serde(default)]
    pub cut: Cut,
    /// What holds writers back during the cut, in order; undone in reverse order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pause: Vec<PauseStep>,
    /// Which store's data names what in another store.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<Reference>,
    /// Which points are kept by `forget`. Without it nothing is ever forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionPolicy>,
    /// What a run may use.
    #[serde(default)]
    pub limits: Limits,
    /// Named places to restore into: per store, the settings that replace the source's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub targets: BTreeMap<EnvironmentName, TargetEnvironment>,
}

/// Where recovery points go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Bucket {
    /// `/absolute/path`, `file:///path`, `s3://bucket/prefix`, `gs://…` or `az://…`.
    pub url: String,
    /// How the repository is unlocked: a key file or a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Secret>,
    /// For S3 and its clones: endpoint, region and the like, in the names of the `object_store`
    /// crate without prefix (`endpoint`, `region`, `allow_http`, `virtual_hosted_style_request`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// Credentials by the same names (`access_key_id`, `secret_access_key`, …).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub credentials: BTreeMap<String, Secret>,
    /// Whether new data is compressed: `auto` chooses by content, `none` stores as it is.
    #[serde(default)]
    pub compression: Compression,
}

/// Whether new data is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Compression {
    /// zstd, with parameters chosen by what the content gains; incompressible data stays as it is.
    #[default]
    Auto,
    /// None at all.
    None,
}

/// A secret, never written down: `env:NAME`, `file:/path` or `command:program args`.
///
/// A plain value is refused, so that no password ever stands in `platform.yaml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Secret(pub String);

/// One store: its driver, and the driver's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Store {
    /// Which driver: `files`, `sqlite`, `git`, `objects`, …
    pub driver: String,
    /// Stores that must be restored before this one, besides those that references tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<StoreName>,
    /// The driver's settings, checked by the driver.
    #[serde(flatten)]
    pub settings: BTreeMap<String, serde_json::Value>,
}

/// What is asked of the cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Cut {
    /// The level that a point must reach. Default `strict`.
    pub level: Level,
    /// Lower levels that are accepted by name when the asked one is not reached.
    pub accept: Vec<Level>,
    /// Stores that keep how far another store was filled. Such a cursor is pinned before its sink, so
    /// that a restored platform does some work again and never leaves any out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cursors: Vec<Cursor>,
    /// How often the optimistic cut is tried before the pause steps run. Default 5.
    pub optimistic_tries: u32,
    /// How long writers may be held back, e.g. `5s`, `800ms`. Default `5s`.
    pub pause_budget: String,
    /// Whether a point whose drain found torn files is kept as `restorable with named loss`.
    /// Default false: such a run fails.
    pub accept_named_loss: bool,
}

impl Default for Cut {
    fn default() -> Self {
        Self {
            level: Level::Strict,
            accept: Vec::new(),
            cursors: Vec::new(),
            optimistic_tries: 5,
            pause_budget: "5s".to_owned(),
            accept_named_loss: false,
        }
    }
}

/// A store that keeps how far another one was filled: offsets, high-water marks, job queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Cursor {
    /// The store that keeps the position.
    pub cursor: StoreName,
    /// The store that is filled.
    pub sink: StoreName,
}

/// One step that holds writers back, with the step that lets them go. Both can be repeated safely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", tag = "kind")]
pub enum PauseStep {
    /// Calls an HTTP endpoint of the platform.
    #[serde(rename_all = "camelCase")]
    Http {
        /// Called to pause.
        pause: HttpCall,
        /// Called to resume.
        resume: HttpCall,
    },
    /// Runs a program, without a shell.
    #[serde(rename_all = "camelCase")]
    Command {
        /// Program and arguments to pause.
        pause: Vec<String>,
        /// Program and arguments to resume.
        resume: Vec<String>,
    },
    /// Runs SQL statements against a store of this platform.
    #[serde(rename_all = "camelCase")]
    Sql {
        /// The store, which must be a database.
        store: StoreName,
        /// Statement that pauses.
        pause: String,
        /// Statement that resumes.
        resume: String,
    },
}

/// One HTTP call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpCall {
    /// Where.
    pub url: String,
    /// Default `POST`.
    #[serde(default = "post")]
    pub method: String,
    /// Sent as they are; a value may be a secret reference.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Sent as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Expected status codes. Default: any 2xx.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expect: Vec<u16>,
}

fn post() -> String {
    "POST".to_owned()
}

/// A declared edge from one store's data to another's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Reference {
    /// The store whose data names something.
    pub from: StoreName,
    /// A query in that store's language: first column the referent, second (optional) the owner. Or
    /// `command:program arguments`: a program that prints `referent<TAB>owner` lines.
    pub query: String,
    /// The store that holds what is named.
    pub to: StoreName,
    /// What is named there: `keys`, `commits`, `paths`.
    pub kind: String,
    /// How many may be missing before the run fails. Default 0.
    #[serde(default)]
    pub allow_missing: u64,
    /// Whether missing ones above the allowed count fail the run or are only stated. Default fail.
    #[serde(default)]
    pub policy: ReferencePolicy,
    /// Which side is pinned first when writers are not paused. Default `referrer`: right where
    /// referents are only ever added. `referent` where they may be deleted before the referrer.
    #[serde(default)]
    pub pin_first: PinFirst,
}

/// What missing referents do to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ReferencePolicy {
    /// They fail the run.
    #[default]
    Fail,
    /// They are stated in the statefile and on the screen.
    Warn,
}

/// Which side of a reference is pinned first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum PinFirst {
    /// The side that names.
    #[default]
    Referrer,
    /// The side that is named.
    Referent,
}

/// Which points `forget` keeps: the union of all rules. The newest restorable point is always kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct RetentionPolicy {
    /// The newest N points.
    pub last: u32,
    /// The newest point of each of the last N hours that have one.
    pub hourly: u32,
    /// … days …
    pub daily: u32,
    /// … ISO weeks …
    pub weekly: u32,
    /// … months …
    pub monthly: u32,
    /// … years …
    pub yearly: u32,
    /// Every point younger than this, e.g. `7d`, `36h`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
    /// IANA name of the time zone in which hours, days … begin. Default `UTC`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// What a run may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Limits {
    /// Memory for all drains together, in MiB. Default 96.
    pub memory_mib: u64,
    /// Connections that one store may be asked for at a time, whatever its driver's own `connections`
    /// says, and how many stores are drained at a time. Default 16.
    pub connections: u32,
    /// Upload to the bucket, in MiB/s; 0 means unlimited. Default 0.
    pub upload_mib_per_second: u64,
    /// Download from the bucket, in MiB/s; 0 means unlimited. Default 0.
    pub download_mib_per_second: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_mib: 96, connections: 16, upload_mib_per_second: 0, download_mib_per_second: 0 }
    }
}

/// A place to restore into: settings by store that replace or extend those of the source.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct TargetEnvironment {
    /// Per store: driver settings, merged over the source's.
    pub stores: BTreeMap<StoreName, BTreeMap<String, serde_json::Value>>,
}
