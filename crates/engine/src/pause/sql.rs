//! Pause steps that run a statement on a store of the platform, through that store's driver.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::driver::{Context, Driver};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::effects::locked;

/// Opens the driver of a store.
pub type OpenDatabase = Arc<dyn Fn(&StoreName) -> Result<Arc<dyn Driver>> + Send + Sync>;

/// How long a statement waits for the one before it on the same store. One that hangs must not keep
/// writers from being let go: the next one gets a connection of its own then.
const ONE_BEFORE_WITHIN: Duration = Duration::from_secs(1);

/// A store's driver, opened when first needed. Locked while a statement runs on it.
type Slot = Arc<Mutex<Option<Arc<dyn Driver>>>>;

/// The databases of the pause steps, opened when first needed.
pub struct Databases {
    open: OpenDatabase,
    slots: std::sync::Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    current: BTreeMap<StoreName, Slot>,
    /// Those on which a statement hung when the next one came.
    left_behind: Vec<Slot>,
}

impl fmt::Debug for Databases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Databases").finish_non_exhaustive()
    }
}

/// Asks a statement to stop when nobody waits for it any more.
struct StopWhenLeft(Context);

impl Drop for StopWhenLeft {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Databases {
    /// Databases that `open` opens.
    pub fn new(open: OpenDatabase) -> Self {
        Self { open, slots: std::sync::Mutex::default() }
    }

    /// For platforms without SQL steps.
    pub fn none() -> Self {
        Self::new(Arc::new(|store| {
            Err(Error::new(Kind::Config, "no database is known for the pause steps").store(store.as_str()))
        }))
    }

    /// Runs one statement and waits for its end. A statement that was left, by dropping this, goes on
    /// by itself; the next one on the store waits for it, so that it does not have the last word.
    pub(super) async fn execute(&self, store: &StoreName, statement: &str) -> Result<()> {
        // One statement at a time: calls on one store must not overlap.
        let mut held = self.hold(store).await;
        let context = Context::default();
        let _stop = StopWhenLeft(context.clone());
        let (open, store, statement) = (Arc::clone(&self.open), store.clone(), statement.to_owned());
        let work = tokio::spawn(async move {
            let driver = match &*held {
                Some(driver) => Arc::clone(driver),
                None => Arc::clone(held.insert(open(&store)?)),
            };
            driver.execute(&context, &statement).await.map_err(|error| error.store(store.as_str()))
        });
        work.await.map_err(|panic| Error::internal(format!("a statement broke: {panic}")))?
    }

    async fn hold(&self, store: &StoreName) -> OwnedMutexGuard<Option<Arc<dyn Driver>>> {
        let slot = Arc::clone(locked(&self.slots).current.entry(store.clone()).or_default());
        if let Ok(held) = tokio::time::timeout(ONE_BEFORE_WITHIN, Arc::clone(&slot).lock_owned()).await {
            return held;
        }
        let fresh = Slot::default();
        {
            let mut slots = locked(&self.slots);
            slots.left_behind.push(slot);
            slots.current.insert(store.clone(), Arc::clone(&fresh));
        }
        fresh.lock_owned().await
    }

    /// Waits until no statement runs; `false` if one still does after `within`.
    pub(super) async fn settled(&self, within: Duration) -> bool {
        let slots: Vec<Slot> = {
            let slots = locked(&self.slots);
            slots.current.values().chain(&slots.left_behind).map(Arc::clone).collect()
        };
        let all = async {
            for slot in slots {
                drop(slot.lock().await);
            }
        };
        tokio::time::timeout(within, all).await.is_ok()
    }
}
