//! Which stores a backup has, and which of them are whole.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;

use crate::format::id::Id;

/// Each store's tree, once its sink is finished.
#[derive(Debug, Default)]
pub(super) struct Stores(Mutex<BTreeMap<StoreName, Option<Id>>>);

impl Stores {
    /// Registers a store; each may come once.
    pub(super) fn begin(&self, name: &StoreName) -> Result<()> {
        let before = self.lock().insert(name.clone(), None);
        match before {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::AlreadyExists, format!("store `{name}` is in this backup already"))),
        }
    }

    /// Takes back a store that could not begin.
    pub(super) fn forget(&self, name: &StoreName) {
        self.lock().remove(name);
    }

    pub(super) fn done(&self, name: &StoreName, tree: Id) {
        self.lock().insert(name.clone(), Some(tree));
    }

    /// All trees by name; fails if one is missing.
    pub(super) fn trees(&self) -> Result<Vec<(StoreName, Id)>> {
        let whole = |(name, tree): (&StoreName, &Option<Id>)| match tree {
            Some(tree) => Ok((name.clone(), *tree)),
            None => Err(Error::internal("its drain was not finished").store(name.as_str())),
        };
        self.lock().iter().map(whole).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StoreName, Option<Id>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
