//! Where the five stores of one environment lie: a JSON file, the same shape for the application
//! and for a restored copy that is judged.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Attempted, Result};

/// One environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `postgresql://user:password@host:port/database`.
    pub postgres: String,
    /// `redis://host:port`.
    pub redis: String,
    /// The bucket of artifacts.
    pub s3: Bucket,
    /// The bare git repository of training code.
    pub code: PathBuf,
    /// The folder of serving configuration.
    pub config: PathBuf,
    /// Where the hooks listen. Port 0 takes a free one.
    #[serde(default = "listen")]
    pub listen: String,
    /// How many writers publish at the same time, each its own model.
    #[serde(default = "writers")]
    pub writers: u32,
    /// Versions published per second by all writers together; 0 means as fast as they can.
    #[serde(default)]
    pub per_second: f64,
    /// The record of what was begun and acknowledged, in a folder that is no store.
    pub record: PathBuf,
    /// Whether writers also ask the database before each publication, for pauses by SQL.
    #[serde(default)]
    pub ask_database: bool,
    /// Whether objects are also overwritten, deleted, and uploaded slowly in parts: what a bucket's copy
    /// must get right and a registry that only adds never shows.
    #[serde(default)]
    pub overwrites: bool,
    /// After so many seconds without a `resume` the pause lets go by itself.
    #[serde(default = "lease_seconds")]
    pub lease_seconds: f64,
}

/// A bucket on S3 or a clone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// `http://host:port`.
    pub endpoint: String,
    /// Its name.
    pub bucket: String,
    /// Credential.
    pub access_key_id: String,
    /// Credential.
    pub secret_access_key: String,
}

fn listen() -> String {
    "127.0.0.1:0".to_owned()
}

fn writers() -> u32 {
    2
}

fn lease_seconds() -> f64 {
    30.0
}

impl Settings {
    /// Reads the file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).attempted(&format!("read {}", path.display()))?;
        serde_json::from_str(&text).attempted(&format!("understand {}", path.display()))
    }
}
