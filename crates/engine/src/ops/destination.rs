//! Where a restore goes, and the drivers that write there.
//!
//! Opens drivers only; what they may do is the fence's business.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::Driver;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{EnvironmentName, StoreName};
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::statefile::StoreState;
use stillpoint_drivers::OpenRequest;

use crate::config::Config;
use crate::open;

/// The environment of a restore into a folder when nothing else is said.
pub const FOLDER_ENVIRONMENT: &str = "restored";

/// Where a restore goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Destination {
    /// Into the stores that `targets` of platform.yaml describes under this name.
    Environment(EnvironmentName),
    /// Below a folder of this machine, each store in a folder of its own name.
    Folder {
        /// The folder; made absolute by the plan.
        folder: PathBuf,
        /// The environment that the copy will belong to.
        environment: EnvironmentName,
    },
    /// Over the sources themselves.
    InPlace {
        /// The identities that the operator typed, one for each store that is replaced.
        typed: Vec<String>,
    },
}

impl Destination {
    /// A folder, as the environment `restored`.
    pub fn folder(folder: impl Into<PathBuf>) -> Result<Self> {
        Ok(Self::Folder { folder: folder.into(), environment: EnvironmentName::new(FOLDER_ENVIRONMENT)? })
    }

    /// The destination that a plan was made for; `typed` is never part of a plan.
    pub fn of(plan: &RestorePlan, typed: Vec<String>) -> Self {
        match &plan.to {
            _ if plan.in_place => Self::InPlace { typed },
            Some(folder) => Self::Folder { folder: folder.into(), environment: plan.target_environment.clone() },
            None => Self::Environment(plan.target_environment.clone()),
        }
    }

    /// The environment that the copy will belong to.
    pub fn environment<'a>(&'a self, config: &'a Config) -> &'a EnvironmentName {
        match self {
            Self::Environment(environment) | Self::Folder { environment, .. } => environment,
            Self::InPlace { .. } => &config.platform.environment,
        }
    }

    /// The folder with its full path, if it is one.
    pub fn absolute(&self) -> Result<Option<PathBuf>> {
        let Self::Folder { folder, .. } = self else { return Ok(None) };
        std::path::absolute(folder).or_io(|| format!("cannot resolve `{}`", folder.display())).map(Some)
    }

    /// Opens the driver that writes one store. Touches no store.
    pub fn open(
        &self,
        config: &Config,
        store: &StoreName,
        state: Option<&StoreState>,
        scratch: &Path,
    ) -> Result<Arc<dyn Driver>> {
        match self {
            Self::Environment(environment) => open::target_driver(config, store, environment, scratch),
            Self::InPlace { .. } => open::driver(config, store, scratch),
            Self::Folder { .. } => {
                let folder = self.absolute()?.ok_or_else(|| Error::internal("a folder without a path"))?;
                open_in_folder(config, store, state, &folder.join(store.as_str()), scratch)
            }
        }
    }
}

/// A folder needs nothing of platform.yaml: a store that is not declared any more is opened by the
/// driver that the point names.
fn open_in_folder(
    config: &Config,
    store: &StoreName,
    state: Option<&StoreState>,
    folder: &Path,
    scratch: &Path,
) -> Result<Arc<dyn Driver>> {
    let declared = config.platform.stores.get(store);
    let driver = match (state, declared) {
        (Some(state), _) => &state.driver,
        (None, Some(declared)) => &declared.driver,
        (None, None) => return Err(Error::internal("a store that nobody declares").store(store.as_str())),
    };
    let same = declared.filter(|declared| declared.driver == *driver);
    let settings = same.map_or_else(BTreeMap::new, |declared| declared.settings.clone());
    let registration = stillpoint_drivers::find(driver)?;
    let Some(into_folder) = registration.into_folder else {
        return Err(Error::new(Kind::Config, format!("a `{driver}` store lives on a server, not in a folder"))
            .store(store.as_str())
            .hint(format!(
                "say where it goes under `targets.NAME.stores.{store}` and restore with `--into NAME`; \
                 `stillpoint export` writes its files to a folder"
            )));
    };
    let settings = into_folder(&settings, folder);
    std::fs::create_dir_all(scratch).or_io(|| format!("cannot create the folder `{}`", scratch.display()))?;
    let secrets = config.secrets.clone();
    let resolve = move |secret: &stillpoint_core::platform::Secret| secrets.resolve(secret);
    let (scratch, kept) = (scratch.to_owned(), open::kept_folder());
    let request = OpenRequest { store, settings: &settings, scratch, kept, secrets: &resolve };
    (registration.open)(&request).map_err(|error| error.store(store.as_str()))
}
