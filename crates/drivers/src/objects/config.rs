//! Settings of the `objects` driver. Pure: nothing here touches a store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::duration;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::Secret;

/// Services accept no request that is dated further off.
const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(15 * 60);

/// What stands under the store in `platform.yaml`: either `path` or `url`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// A directory whose files are the objects; their keys are the paths below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A bucket, with the prefix that is the store: `s3://bucket/prefix`, `gs://…`, `az://…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Endpoint, region and the like, in the names of the `object_store` crate without prefix
    /// (`endpoint`, `region`, `allow_http`, `virtual_hosted_style_request`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// Credentials by the same names (`access_key_id`, `secret_access_key`, …).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub credentials: BTreeMap<String, Secret>,
    /// Names of files in a directory that are no objects yet: `*` and `?`, compared with the last
    /// part of the key. Default: `.tmp*`, `*.tmp`, `*.part`, `*.partial`, which writers use before
    /// they rename. An empty list counts every file.
    #[serde(default = "unfinished")]
    pub unfinished: Vec<String>,
    /// Requests to the bucket at the same time. Default 16.
    #[serde(default = "connections")]
    pub connections: usize,
    /// Requests to the bucket in a second, at most; S3 only. Default: no limit but the service's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
    /// How far the clock that dates the objects of a bucket may be from the one that dates the cut: a
    /// service has several machines, and a proxy may show its own time. What is dated so close to the
    /// cut is in doubt: new objects are kept, and of others the older content, both named. Default
    /// `2s`; `0s` where one machine does it all.
    #[serde(default = "clock_difference")]
    pub clock_difference: String,
    /// What a point holds of a bucket; S3 only beyond `copy`.
    #[serde(default, skip_serializing_if = "Mode::is_copy")]
    pub mode: Mode,
    /// With `mode: mirror`: the bucket and prefix that the copies go to, `s3://bucket/prefix`, on the
    /// same service, with the same options and credentials. It must keep versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// Whether tags of objects are kept and restored; S3 only. Default true.
    #[serde(default = "yes")]
    pub tags: bool,
    /// Whether tags, locks and access control lists of objects whose bytes did not change are asked for
    /// again; S3 only, one or two requests for each object of every point. Default false: a point has them
    /// as they were when the object was first read, and says so.
    #[serde(default)]
    pub refresh: bool,
    /// Whether access control lists of objects are kept and restored; S3 only, one request more for
    /// each object. Default false: buckets of today have none.
    #[serde(default)]
    pub acl: bool,
    /// Whether a restore locks objects as their sources were: retention and legal hold; S3 only.
    /// Default false: what is locked cannot be removed, and a rehearsal should be.
    #[serde(default)]
    pub lock: bool,
    /// Whether a restore creates a bucket that is absent, with versions if its source kept any; S3
    /// only. Default false.
    #[serde(default)]
    pub create: bool,
}

/// What a point holds of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The bytes.
    #[default]
    Copy,
    /// The ids of copies that the service makes in a second bucket.
    Mirror,
    /// The ids of versions in the bucket itself: it protects against writers, not against its loss.
    Reference,
}

impl Mode {
    /// Whether the point holds the bytes.
    pub fn is_copy(&self) -> bool {
        *self == Self::Copy
    }
}

fn yes() -> bool {
    true
}

fn unfinished() -> Vec<String> {
    [".tmp*", "*.tmp", "*.part", "*.partial"].map(str::to_owned).to_vec()
}

fn connections() -> usize {
    16
}

fn clock_difference() -> String {
    "2s".to_owned()
}

impl Settings {
    /// How far clocks may differ.
    pub fn clock_difference(&self) -> Result<Duration> {
        duration::parse(&self.clock_difference)
    }

    /// Refuses what cannot name a store. After it, the settings hold.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: &str, hint: &str| Err(Error::new(Kind::Config, message).hint(hint));
        match (&self.path, &self.url) {
            (Some(_), Some(_)) => wrong("both `path` and `url` are given", "use one store for each of them"),
            (None, None) => wrong("the objects are not named", "path: /srv/objects, or url: s3://bucket/prefix"),
            (Some(path), None) if !path.is_absolute() => {
                wrong("the path is not absolute", "write the path from `/` on")
            }
            (Some(_), None) if !self.options.is_empty() || !self.credentials.is_empty() => {
                wrong("`options` and `credentials` go with `url`", "leave them out beside `path`")
            }
            (_, url) if self.mode != Mode::Copy && !url.as_deref().is_some_and(is_s3) => {
                wrong("only buckets of S3 have this `mode`", "mode: copy")
            }
            _ if (self.mode == Mode::Mirror) != self.mirror.is_some() => {
                wrong("`mode: mirror` and `mirror` go together", "mode: mirror, and mirror: s3://bucket/prefix")
            }
            _ if self.mirror.as_deref().is_some_and(|mirror| !is_s3(mirror)) => {
                wrong("`mirror` names no bucket of S3", "mirror: s3://bucket/prefix")
            }
            _ if self.requests_per_second == Some(0) => {
                wrong("`requestsPerSecond` is 0", "leave it out, or 1 and more")
            }
            _ if !(1..=64).contains(&self.connections) => wrong("`connections` is out of range", "1 to 64"),
            _ if self.clock_difference()? > CLOCK_DIFFERENCE_MAX => {
                wrong("`clockDifference` is out of range", "0s to 15min: services refuse clocks that are further off")
            }
            _ => Ok(()),
        }
    }

    /// Whether a file of this name is no object yet.
    pub fn is_unfinished(&self, name: &[u8]) -> bool {
        self.unfinished.iter().any(|pattern| crate::place::matches_name(pattern.as_bytes(), name))
    }
}

/// Whether a url is that of a bucket that our own client speaks to.
pub(super) fn is_s3(url: &str) -> bool {
    url.starts_with("s3://") || url.starts_with("s3a://")
}

/// The settings of the same store as a directory in `folder`; nothing that reaches the source stays.
pub(super) fn into_folder(settings: &crate::Settings, folder: &Path) -> crate::Settings {
    let mut settings = settings.clone();
    settings.retain(|name, _| name == "unfinished");
    settings.insert("path".to_owned(), serde_json::Value::String(folder.to_string_lossy().into_owned()));
    settings
}
