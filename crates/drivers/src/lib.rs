//! One folder per kind of store, and the registry: the list below is all that the rest of
//! Stillpoint knows of them.

pub mod files;
pub mod git;
pub mod memory;
pub mod objects;
mod phases;
pub mod place;
pub mod postgres;
pub mod redis;
pub mod sqlite;
#[cfg(test)]
mod trial;
pub mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use stillpoint_core::Result;
use stillpoint_core::driver::Driver;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::Secret;

/// What a driver is opened with.
pub struct OpenRequest<'a> {
    /// The store's name, for errors.
    pub store: &'a StoreName,
    /// The driver's settings from `platform.yaml`, unchecked.
    pub settings: &'a BTreeMap<String, serde_json::Value>,
    /// A private folder that the driver may fill; removed by the engine after the run. On the
    /// same machine as the engine, not necessarily on the store's file system.
    pub scratch: PathBuf,
    /// A folder on the same machine that stays: for what a restore replaces and cannot keep beside it.
    /// Shared by all stores, and not created yet.
    pub kept: PathBuf,
    /// Resolves a secret reference. The result must never reach arguments, logs or the tree.
    pub secrets: &'a (dyn Fn(&Secret) -> Result<String> + Send + Sync),
}

/// One kind of store.
pub struct Registration {
    /// The name in `platform.yaml`.
    pub name: &'static str,
    /// One line for `driver list`.
    pub about: &'static str,
    /// The user's page.
    pub readme: &'static str,
    /// Checks the settings and opens the driver. Touches no store yet.
    pub open: fn(&OpenRequest<'_>) -> Result<Arc<dyn Driver>>,
    /// JSON schema of the settings.
    pub schema: fn() -> schemars::Schema,
    /// The given settings, changed so that the store lies in `folder` and nowhere else: what
    /// `restore --to` uses. Drops whatever would reach the source, such as credentials.
    /// `None` if the store lives on a server and cannot lie in a folder.
    pub into_folder: Option<fn(&Settings, &std::path::Path) -> Settings>,
    /// The least privileges that a store of these settings needs, in the words of its kind and ready
    /// to paste; `None` where the user's page says all.
    pub policy: fn(&Settings) -> Result<Option<String>>,
}

/// Settings of a store as `platform.yaml` has them.
pub type Settings = BTreeMap<String, serde_json::Value>;

/// Every driver, in the order in which a reader should meet them.
#[rustfmt::skip] // One line per driver.
pub static REGISTRY: &[&Registration] = &[
    &memory::REGISTRATION,
    &files::REGISTRATION,
    &sqlite::REGISTRATION,
    &objects::REGISTRATION,
    &postgres::REGISTRATION,
    &git::REGISTRATION,
    &redis::REGISTRATION,
];

/// Finds a driver by name; the error lists the names there are.
pub fn find(name: &str) -> Result<&'static Registration> {
    REGISTRY.iter().find(|driver| driver.name == name).copied().ok_or_else(|| {
        let known: Vec<_> = REGISTRY.iter().map(|driver| driver.name).collect();
        Error::new(Kind::Config, format!("there is no driver `{name}`")).hint(format!("drivers: {}", known.join(", ")))
    })
}

/// Turns settings into a driver's own type; errors name the setting.
pub fn settings<T: serde::de::DeserializeOwned>(request: &OpenRequest<'_>) -> Result<T> {
    let object = request.settings.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    serde_json::from_value(serde_json::Value::Object(object))
        .map_err(|error| Error::new(Kind::Config, format!("settings: {error}")).store(request.store.as_str()))
}
