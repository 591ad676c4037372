//! From a configuration to open things: the bucket, its repository, a store's driver.
//!
//! The one place where addresses, credentials and limits of `platform.yaml` meet the code that
//! needs them. Decides nothing about points; keeps no state but what it opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillpoint_core::Result;
use stillpoint_core::driver::Driver;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::{EnvironmentName, StoreName};
use stillpoint_core::platform::{Platform, Secret};
use stillpoint_drivers::{OpenRequest, Registration};
use stillpoint_repo::depot::{self, Depot, OpenOptions, Prefixed};
use stillpoint_repo::{KeyFile, Repository, Unlock};

use crate::config::{Config, nearest};
use crate::secrets::Secrets;

/// Where the repository lies in the bucket.
pub const REPOSITORY_PREFIX: &str = "repo/";

/// Bytes of a MiB, in which limits are given.
const MIB: u64 = 1 << 20;

/// What the text of every key file begins with.
const KEY_FILE_BEGIN: &str = "stillpoint-key-";

/// Where the machine's own state lies when nothing else is said.
const STATE_FOLDER_OF_SYSTEM: &str = "/var/lib/stillpoint";

/// An open bucket with its unlocked repository. Cheap to clone.
#[derive(Clone)]
pub struct Session {
    config: Arc<Config>,
    bucket: Arc<dyn Depot>,
    repository: Repository,
}

impl Session {
    /// Opens bucket and repository. Reads the repository's configuration and key, writes nothing.
    ///
    /// # Errors
    /// `NotFound` with a hint if the bucket holds no repository yet, `Unauthenticated` if the key
    /// is not one of the repository's.
    pub fn open(config: &Config) -> Result<Self> {
        let bucket = bucket(config)?;
        let unlock = unlock(config)?;
        let repository = Repository::open(repository_depot(&bucket), &unlock).map_err(|error| {
            let hint = match error.kind() {
                Kind::NotFound => "`stillpoint init` creates the bucket that platform.yaml names",
                Kind::Unauthenticated => "check `bucket.key`; the recovery sheet holds the key that `init` made",
                _ => return error,
            };
            error.hint(hint)
        })?;
        Ok(Self { config: Arc::new(config.clone()), bucket, repository })
    }

    /// Takes a repository that was opened or created elsewhere.
    pub fn from_parts(config: Config, bucket: Arc<dyn Depot>, repository: Repository) -> Self {
        Self { config: Arc::new(config), bucket, repository }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the configuration says.
    pub fn platform(&self) -> &Platform {
        &self.config.platform
    }

    /// The whole bucket: `points/`, `journal/`, `leases/` …
    pub fn bucket(&self) -> &Arc<dyn Depot> {
        &self.bucket
    }

    /// The repository in it.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }
}

/// The bucket of the configuration, with the layers that its limits ask for. Touches nothing yet.
pub fn bucket(config: &Config) -> Result<Arc<dyn Depot>> {
    let bucket = &config.platform.bucket;
    let mut credentials = BTreeMap::new();
    for (name, secret) in &bucket.credentials {
        let value = config.secrets.resolve(secret).map_err(|error| error.context("for bucket.credentials.", name))?;
        credentials.insert(name.clone(), value);
    }
    let limits = &config.platform.limits;
    let options = OpenOptions {
        upload_bytes_per_second: limits.upload_mib_per_second.saturating_mul(MIB),
        download_bytes_per_second: limits.download_mib_per_second.saturating_mul(MIB),
        ..OpenOptions::default()
    };
    depot::open_with(&bucket.url, &bucket.options, &credentials, &options)
}

/// The part of the bucket that restic would call the repository.
pub fn repository_depot(bucket: &Arc<dyn Depot>) -> Arc<dyn Depot> {
    Arc::new(Prefixed::new(Arc::clone(bucket), REPOSITORY_PREFIX))
}

/// What unlocks the repository: the key file or password behind `bucket.key`.
pub fn unlock(config: &Config) -> Result<Unlock> {
    let Some(secret) = &config.platform.bucket.key else {
        return Err(Error::new(Kind::Config, "platform.yaml does not say how the repository is unlocked")
            .hint("add `key: file:stillpoint.key` (made by `stillpoint init`) or `key: env:NAME` under `bucket:`"));
    };
    unlock_from(&config.secrets, secret)
}

/// A key file's text unlocks as a key file wherever it comes from; anything else is a password.
pub fn unlock_from(secrets: &Secrets, secret: &Secret) -> Result<Unlock> {
    let text = secrets.resolve(secret).map_err(|error| error.operation("unlock the repository"))?;
    // A mistyped key would otherwise be tried as a password and only be called wrong.
    match text.to_ascii_lowercase().starts_with(KEY_FILE_BEGIN) {
        true => Ok(Unlock::KeyFile(KeyFile::parse(&text).map_err(|error| error.context("in", &secret.0))?)),
        false => Ok(Unlock::Password(text)),
    }
}

/// Opens the driver of a store with its settings from `platform.yaml`.
///
/// `scratch` is a folder that the driver may fill; it is created if absent.
pub fn driver(config: &Config, store: &StoreName, scratch: &Path) -> Result<Arc<dyn Driver>> {
    driver_with(config, store, &BTreeMap::new(), scratch)
}

/// Opens the driver of a store as `environment` under `targets` describes it.
///
/// # Errors
/// `Config` if there is no such target, or if it does not mention the store: what is not mapped
/// would be the source itself.
pub fn target_driver(
    config: &Config,
    store: &StoreName,
    environment: &EnvironmentName,
    scratch: &Path,
) -> Result<Arc<dyn Driver>> {
    let target = config.platform.targets.get(environment).ok_or_else(|| {
        let known: Vec<_> = config.platform.targets.keys().map(EnvironmentName::as_str).collect();
        let hint = match nearest(environment.as_str(), known.iter().copied()) {
            Some(close) => format!("did you mean `{close}`?"),
            None if known.is_empty() => "platform.yaml has no `targets:`; or restore with --to FOLDER".to_owned(),
            None => format!("targets: {}", known.join(", ")),
        };
        Error::new(Kind::Config, format!("there is no target environment `{environment}`")).hint(hint)
    })?;
    let settings = target.stores.get(store).ok_or_else(|| {
        Error::new(Kind::Config, format!("the target `{environment}` does not say where `{store}` goes"))
            .store(store.as_str())
            .hint(format!("add it under `targets.{environment}.stores.{store}`"))
    })?;
    driver_with(config, store, settings, scratch)
}

/// Opens the driver of a store; `replaced` goes over its settings, name by name.
pub fn driver_with(
    config: &Config,
    store: &StoreName,
    replaced: &BTreeMap<String, serde_json::Value>,
    scratch: &Path,
) -> Result<Arc<dyn Driver>> {
    let declared = config.platform.stores.get(store).ok_or_else(|| {
        let known = config.platform.stores.keys().map(StoreName::as_str);
        let hint = match nearest(store.as_str(), known.clone()) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("stores: {}", known.collect::<Vec<_>>().join(", ")),
        };
        Error::new(Kind::Config, format!("there is no store `{store}` in platform.yaml")).hint(hint)
    })?;
    let mut settings = declared.settings.clone();
    settings.extend(replaced.iter().map(|(name, value)| (name.clone(), value.clone())));
    std::fs::create_dir_all(scratch)
        .map_err(|error| Error::io(format!("cannot create the scratch folder `{}`", scratch.display()), error))?;
    let registration = stillpoint_drivers::find(&declared.driver)?;
    limit_connections(&mut settings, registration, config.platform.limits.connections);
    let secrets = config.secrets.clone();
    let resolve = move |secret: &Secret| secrets.resolve(secret);
    let (scratch, kept) = (scratch.to_owned(), kept_folder());
    let request = OpenRequest { store, settings: &settings, scratch, kept, secrets: &resolve };
    (registration.open)(&request).map_err(|error| error.store(store.as_str()))
}

/// Lowers the driver's `connections` to the platform's limit. Drivers without that setting hold a
/// fixed number; what is no number is left for the driver to refuse.
fn limit_connections(settings: &mut stillpoint_drivers::Settings, registration: &Registration, limit: u32) {
    let schema = (registration.schema)();
    let Some(declared) = schema.pointer("/properties/connections") else { return };
    let wanted = settings.get("connections").or_else(|| declared.get("default")).and_then(serde_json::Value::as_u64);
    if let Some(wanted) = wanted.filter(|wanted| *wanted > u64::from(limit.max(1))) {
        tracing::debug!(driver = registration.name, wanted, limit, "fewer connections than the driver would have");
        settings.insert("connections".to_owned(), limit.max(1).into());
    }
}

/// Where this machine keeps journals and scratch folders: `STILLPOINT_STATE`, else below
/// `XDG_STATE_HOME`, else below the home directory, else `/var/lib/stillpoint`.
pub fn state_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("STILLPOINT_STATE") {
        return folder;
    }
    if let Some(folder) = set("XDG_STATE_HOME") {
        return folder.join("stillpoint");
    }
    match set("HOME") {
        Some(home) => home.join(".local/state/stillpoint"),
        None => PathBuf::from(STATE_FOLDER_OF_SYSTEM),
    }
}

/// Where drivers keep on this machine what a restore replaces.
pub(crate) fn kept_folder() -> PathBuf {
    state_folder().join("kept")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_platform_s_limit_lowers_what_a_driver_would_take() {
        let limited = |driver: &str, given: Option<u64>, limit: u32| {
            let mut settings = BTreeMap::new();
            settings.extend(given.map(|given| ("connections".to_owned(), given.into())));
            limit_connections(&mut settings, stillpoint_drivers::find(driver).expect("known"), limit);
            settings.get("connections").and_then(serde_json::Value::as_u64)
        };
        assert_eq!(limited("postgres", Some(12), 3), Some(3));
        assert_eq!(limited("postgres", Some(2), 3), Some(2));
        assert_eq!(limited("postgres", None, 3), Some(3), "the driver's default is more");
        assert_eq!(limited("postgres", None, 16), None, "the driver's default is less");
        assert_eq!(limited("git", None, 1), None, "the driver has no such setting");
    }
}
