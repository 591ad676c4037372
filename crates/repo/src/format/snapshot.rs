//! The files under `snapshots/`.

use std::fmt;

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::id::Id;

/// The id of a snapshot: the name of its file, 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub String);

impl SnapshotId {
    /// Accepts 64 hex digits.
    pub fn parse(text: &str) -> Result<Self> {
        Id::parse(text).map(|id| Self(id.hex()))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Id> for SnapshotId {
    fn from(id: Id) -> Self {
        Self(id.hex())
    }
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The name of its file.
    pub id: SnapshotId,
    /// When it was taken.
    pub time: jiff::Timestamp,
    /// The root tree.
    pub tree: Id,
    /// What was backed up.
    pub paths: Vec<String>,
    /// Where.
    pub hostname: String,
    /// By whom.
    pub username: String,
    /// Labels.
    pub tags: Vec<String>,
    /// What wrote it, empty when unknown.
    pub program_version: String,
}

/// The snapshot as JSON holds it. Fields that we do not know are kept by nobody: snapshots are
/// written once and never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotJson {
    /// RFC 3339, any zone.
    pub time: String,
    /// The root tree.
    pub tree: Id,
    /// What was backed up; restic writes null for none.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub paths: Vec<String>,
    /// Where.
    #[serde(default)]
    pub hostname: String,
    /// By whom.
    #[serde(default)]
    pub username: String,
    /// Labels.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// What wrote it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program_version: String,
    /// The snapshot this one was copied or rewritten from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<Id>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    Ok(Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default())
}

impl SnapshotJson {
    /// Reads a snapshot.
    pub fn parse(json: &[u8]) -> Result<Self> {
        serde_json::from_slice(json)
            .map_err(|error| Error::new(Kind::Corrupt, "a snapshot is not what it must be").source(error))
    }

    /// The JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields always serialize")
    }

    /// The snapshot under the name it was found by.
    pub fn named(self, id: SnapshotId) -> Result<Snapshot> {
        let time = self.time.parse().map_err(|error| {
            Error::new(Kind::Corrupt, format!("snapshot {id} has the impossible time `{}`", self.time)).source(error)
        })?;
        Ok(Snapshot {
            id,
            time,
            tree: self.tree,
            paths: self.paths,
            hostname: self.hostname,
            username: self.username,
            tags: self.tags,
            program_version: self.program_version,
        })
    }
}

impl From<&Snapshot> for SnapshotJson {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            time: snapshot.time.to_string(),
            tree: snapshot.tree,
            paths: snapshot.paths.clone(),
            hostname: snapshot.hostname.clone(),
            username: snapshot.username.clone(),
            tags: snapshot.tags.clone(),
            program_version: snapshot.program_version.clone(),
            original: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_of_restic_is_read() {
        let json = br#"{"time":"2026-11-21T10:00:00.123456789+01:00","parent":"00","tree":"0707070707070707070707070707070707070707070707070707070707070707","paths":null,"hostname":"h","username":"u","uid":0,"excludes":["x"],"tags":["a"],"summary":{"x":1}}"#;
        let snapshot = SnapshotJson::parse(json).unwrap().named(SnapshotId("ab".into())).unwrap();
        assert_eq!(snapshot.time.to_string(), "2026-11-21T09:00:00.123456789Z");
        assert_eq!((snapshot.paths.len(), snapshot.tags), (0, vec!["a".to_owned()]));
    }

    #[test]
    fn a_snapshot_survives() {
        let snapshot = Snapshot {
            id: SnapshotId("ab".into()),
            time: "2026-11-21T10:00:00.5Z".parse().unwrap(),
            tree: Id([7; 32]),
            paths: vec!["/a \"b\"".into()],
            hostname: "h".into(),
            username: "u".into(),
            tags: vec!["point:k3f9".into()],
            program_version: "stillpoint 0.1".into(),
        };
        let json = SnapshotJson::from(&snapshot).to_json();
        assert_eq!(SnapshotJson::parse(&json).unwrap().named(snapshot.id.clone()).unwrap(), snapshot);
    }
}
