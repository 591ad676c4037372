//! Settings of the `sqlite` driver. Pure: nothing here touches a store.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

/// What stands under the store in `platform.yaml`: either `path`, or `directory` with `include`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// The database file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A directory that holds many databases, e.g. one per tenant. Each is known by its path below
    /// this directory, so that a restore into another directory finds its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Which files below `directory` are databases: `*` and `?` within a name, `**` across
    /// folders. Default: `**/*.db`, `**/*.sqlite`, `**/*.sqlite3`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// How a database in rollback-journal mode is held, whose writers cannot go on beside a
    /// reader. Databases in WAL mode need none of it.
    #[serde(default)]
    pub rollback: Rollback,
    /// How long a lock of another connection is waited for, in milliseconds. Default 5000.
    #[serde(default = "busy_timeout")]
    pub busy_timeout_millis: u64,
    /// Whether rows are counted and broken foreign keys looked for under the pin. It reads every
    /// table once more. Default true.
    #[serde(default = "yes")]
    pub inspect: bool,
}

/// How the view of a database in rollback-journal mode is held during the drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Rollback {
    /// `clone` where the file system can, else `hold`.
    #[default]
    Auto,
    /// A shared lock is held until the drain ends. Commits of writers wait, or fail as busy once
    /// their own time-out is over.
    Hold,
    /// The file is cloned (reflink) within the cut; writers wait for milliseconds. Fails where the
    /// file system cannot clone.
    Clone,
}

fn busy_timeout() -> u64 {
    5_000
}

fn yes() -> bool {
    true
}

/// The settings of the same store below `folder`: one database keeps its file name, many become the
/// folder itself.
pub(super) fn into_folder(settings: &crate::Settings, folder: &std::path::Path) -> crate::Settings {
    let mut settings = settings.clone();
    let text = |path: &std::path::Path| serde_json::Value::String(path.to_string_lossy().into_owned());
    if let Some(path) = settings.get("path").and_then(serde_json::Value::as_str) {
        let name = std::path::Path::new(path).file_name().unwrap_or("database.sqlite".as_ref()).to_owned();
        settings.insert("path".to_owned(), text(&folder.join(name)));
    } else {
        settings.insert("directory".to_owned(), text(folder));
    }
    settings
}

/// The patterns that count as databases when none are given.
const INCLUDE: [&str; 3] = ["**/*.db", "**/*.sqlite", "**/*.sqlite3"];

impl Settings {
    /// Refuses what cannot name a database, and fills in defaults. After it, the settings hold.
    pub fn validate(mut self) -> Result<Self> {
        let wrong = |message: &str, hint: &str| Err(Error::new(Kind::Config, message).hint(hint));
        match (&self.path, &self.directory) {
            (Some(_), Some(_)) => {
                return wrong("both `path` and `directory` are given", "use one store for each of them");
            }
            (None, None) => return wrong("the database is not named", "path: /srv/app/app.db"),
            (Some(_), None) if !self.include.is_empty() => {
                return wrong("`include` needs `directory`", "directory: /srv/tenants");
            }
            _ => {}
        }
        let named = self.path.as_ref().or(self.directory.as_ref());
        if named.is_some_and(|path| !path.is_absolute()) {
            return wrong("the path is not absolute", "write the path from `/` on");
        }
        if self.include.iter().any(String::is_empty) {
            return wrong("a pattern in `include` is empty", "include: [\"*.db\"]");
        }
        if self.include.is_empty() {
            self.include = INCLUDE.map(str::to_owned).to_vec();
        }
        Ok(self)
    }

    /// How long a lock of another connection is waited for.
    pub fn busy_timeout(&self) -> Duration {
        Duration::from_millis(self.busy_timeout_millis)
    }
}
