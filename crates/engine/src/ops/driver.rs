//! `driver`: what there is, what it can be told, and whether it keeps its promises on your store.

use schemars::Schema;
use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::capability::Probe;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::StoreName;
use stillpoint_drivers::{REGISTRY, Registration};

use crate::config::Config;
use crate::open;

/// One driver, as listed.
#[derive(Debug, Serialize)]
pub struct DriverLine {
    /// Its name in `platform.yaml`.
    pub name: &'static str,
    /// One line on what it is for.
    pub about: &'static str,
}

/// All drivers, in the order in which a reader should meet them.
pub fn list() -> Vec<DriverLine> {
    REGISTRY.iter().map(|driver| DriverLine { name: driver.name, about: driver.about }).collect()
}

/// The JSON schema of a driver's settings.
pub fn schema(name: &str) -> Result<Schema> {
    Ok((stillpoint_drivers::find(name)?.schema)())
}

/// The user's page of a driver: privileges it needs, versions, capability.
pub fn page(name: &str) -> Result<&'static Registration> {
    stillpoint_drivers::find(name)
}

/// The privileges that one store of the configuration needs, ready to paste. Fails with `Config` if its
/// kind has no such text.
pub fn policy(config: &Config, name: &str, store: &StoreName) -> Result<String> {
    let driver = stillpoint_drivers::find(name)?;
    let declared = config.platform.stores.get(store).ok_or_else(|| {
        let known: Vec<_> = config.platform.stores.keys().map(StoreName::as_str).collect();
        Error::new(Kind::Config, format!("there is no store `{store}`")).hint(format!("stores: {}", known.join(", ")))
    })?;
    if declared.driver != name {
        let hint = format!("stillpoint driver policy {} --store {store}", declared.driver);
        return Err(Error::new(Kind::Config, format!("`{store}` is a store of `{}`", declared.driver)).hint(hint));
    }
    (driver.policy)(&declared.settings)?.ok_or_else(|| {
        Error::new(Kind::Config, format!("there is no policy to print for `{store}`"))
            .hint(format!("stillpoint driver policy {name}    has the page that says what it needs"))
    })
}

/// The same for a store with the fewest settings; `None` for kinds that have no such text.
pub fn example_policy(name: &str) -> Result<Option<String>> {
    (stillpoint_drivers::find(name)?.policy)(&stillpoint_drivers::Settings::new())
}

/// What a store says of itself.
#[derive(Debug, Serialize)]
pub struct StoreProbe {
    /// The store.
    pub store: StoreName,
    /// Its driver.
    pub driver: String,
    /// What it can promise and what is missing.
    pub probe: Probe,
}

/// Probes one store of the configuration; changes nothing.
pub async fn probe(config: &Config, store: &StoreName, context: &Context) -> Result<StoreProbe> {
    let scratch =
        tempfile::tempdir().map_err(|error| stillpoint_core::Error::io("cannot create a temporary folder", error))?;
    let driver = open::driver(config, store, scratch.path())?;
    let probe = driver.probe(context).await.map_err(|error| error.store(store.as_str()).operation("probe"))?;
    let name = config.platform.stores.get(store).map(|declared| declared.driver.clone()).unwrap_or_default();
    Ok(StoreProbe { store: store.clone(), driver: name, probe })
}
