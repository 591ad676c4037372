//! Settings of the `objects` driver. Pure: nothing here touches a store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::Secret;

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
    /// Requests to the bucket at the same time. Default 8.
    #[serde(default = "connections")]
    pub connections: usize,
}

fn unfinished() -> Vec<String> {
    [".tmp*", "*.tmp", "*.part", "*.partial"].map(str::to_owned).to_vec()
}

fn connections() -> usize {
    8
}

impl Settings {
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
            _ if !(1..=64).contains(&self.connections) => wrong("`connections` is out of range", "1 to 64"),
            _ => Ok(()),
        }
    }

    /// Whether a file of this name is no object yet.
    pub fn is_unfinished(&self, name: &[u8]) -> bool {
        self.unfinished.iter().any(|pattern| crate::place::matches_name(pattern.as_bytes(), name))
    }
}

/// The settings of the same store as a directory in `folder`; nothing that reaches the source stays.
pub(super) fn into_folder(settings: &crate::Settings, folder: &Path) -> crate::Settings {
    let mut settings = settings.clone();
    settings.retain(|name, _| name == "unfinished");
    settings.insert("path".to_owned(), serde_json::Value::String(folder.to_string_lossy().into_owned()));
    settings
}
