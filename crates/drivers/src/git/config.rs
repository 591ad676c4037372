//! Settings of the `git` driver. Pure: nothing here touches a repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

/// What stands under the store in `platform.yaml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// A repository, bare or with a working tree, or a folder with any number of them. Absolute.
    pub path: PathBuf,
    /// Whether reflogs are part of the store. Default false: they are local history. Objects that
    /// only reflogs still reach are on their way to be collected, and are never part of a point.
    #[serde(default)]
    pub reflogs: bool,
    /// Whether a restore puts hooks where git runs them. Default false: they come back as
    /// `hooks.restored/`, for a person to look at, because a hook is a program.
    #[serde(default)]
    pub restore_hooks: bool,
    /// After so many packs a repository is packed anew, whole. 1 to 1000, default 24.
    #[serde(default = "generations_max")]
    pub generations_max: u32,
}

fn generations_max() -> u32 {
    24
}

impl Settings {
    /// Refuses what can never work. After it, the settings cannot fail.
    pub fn validate(&self) -> Result<()> {
        if !self.path.is_absolute() {
            let message = format!("`path` must be absolute, not {}", self.path.display());
            return Err(Error::new(Kind::Config, message).hint("path: /srv/git"));
        }
        if !(1..=1000).contains(&self.generations_max) {
            return Err(Error::new(Kind::Config, "`generationsMax` must be from 1 to 1000"));
        }
        Ok(())
    }
}

/// The settings that put the store into `folder`.
pub(super) fn into_folder(settings: &crate::Settings, folder: &Path) -> crate::Settings {
    let mut settings = settings.clone();
    settings.insert("path".to_owned(), folder.to_string_lossy().into());
    settings
}
