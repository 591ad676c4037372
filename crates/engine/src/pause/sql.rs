//! Pause steps that run a statement on a store of the platform, through that store's driver.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use stillpoint_core::driver::{Context, Driver};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use tokio::sync::Mutex;

/// Opens the driver of a store.
pub type OpenDatabase = Arc<dyn Fn(&StoreName) -> Result<Arc<dyn Driver>> + Send + Sync>;

/// The databases of the pause steps, opened when first needed.
pub struct Databases {
    open: OpenDatabase,
    opened: Mutex<BTreeMap<StoreName, Arc<dyn Driver>>>,
}

impl fmt::Debug for Databases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Databases").finish_non_exhaustive()
    }
}

impl Databases {
    /// Databases that `open` opens.
    pub fn new(open: OpenDatabase) -> Self {
        Self { open, opened: Mutex::new(BTreeMap::new()) }
    }

    /// For platforms without SQL steps.
    pub fn none() -> Self {
        Self::new(Arc::new(|store| {
            Err(Error::new(Kind::Config, "no database is known for the pause steps").store(store.as_str()))
        }))
    }

    /// Runs one statement and waits for its end.
    pub(super) async fn execute(&self, store: &StoreName, statement: &str) -> Result<()> {
        // One statement at a time: calls on one store must not overlap.
        let mut opened = self.opened.lock().await;
        let driver = match opened.get(store) {
            Some(driver) => Arc::clone(driver),
            None => {
                let driver = (self.open)(store)?;
                opened.insert(store.clone(), Arc::clone(&driver));
                driver
            }
        };
        driver.execute(&Context::default(), statement).await.map_err(|error| error.store(store.as_str()))
    }
}
