//! What a driver's tests hand to the suite: hands that make, fill, read and open throw-away stores.
//!
//! The hands must not use the driver: they are the second opinion.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stillpoint_core::driver::{Driver, EdgeQuery};
use stillpoint_core::error::Result;
use stillpoint_core::tree::TreePath;

use crate::tree::MemoryTree;

/// What a store holds, in a form that all kinds of stores share: keys and values.
///
/// Keys that the suite uses are made of `a`-`z`, `0`-`9`, `-` and `/`, without empty parts, and no
/// key is a folder of another one. Values are any bytes up to 256 KiB, also none. A harness maps
/// them to what its store has: rows, objects, files, branches.
pub type Content = BTreeMap<String, Vec<u8>>;

/// Makes throw-away stores of one kind. The suite takes dozens of them, one after the other.
pub trait Harness: Send + Sync {
    /// A new store, ready for writes, without any content. Source of a backup.
    fn source(&self) -> Result<Box<dyn Subject>>;

    /// A place where nothing is yet, as an operator would name it for a restore: no folder, no
    /// database, no bucket content. It must not share an identity with any source.
    fn target(&self) -> Result<Box<dyn Subject>>;

    /// Cases that this kind of store cannot pass, by name, each with the reason. Cases that a
    /// capability rules out need no mention.
    fn exempt(&self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }

    /// How many bytes an incremental drain may read after one value of 1 KiB changed in a store
    /// that holds `content_bytes` (about 2 MiB). Default: a quarter.
    fn incremental_read_bytes_max(&self, content_bytes: u64) -> u64 {
        content_bytes / 4
    }

    /// The part of a drained `tree` that holds `key` and no other key, for stores that can restore
    /// parts.
    fn part_of(&self, tree: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        let _ = (tree, key);
        Ok(None)
    }
}

/// One throw-away store. Dropping it removes it.
pub trait Subject: Send + Sync {
    /// Opens a new driver value on the store, as a new process would.
    fn open(&self) -> Result<Arc<dyn Driver>>;

    /// Creates or replaces one item. Returning means that the store acknowledged the write.
    fn put(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Deletes one item, which is there. Returning means that the store acknowledged it.
    fn delete(&self, key: &str) -> Result<()>;

    /// Everything the store holds, read without the driver. The stamp is not content.
    fn read(&self) -> Result<Content>;

    /// A query and the referents that it must yield for what the store holds now; `None` where
    /// the kind of store has no edges.
    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        Ok(None)
    }
}
