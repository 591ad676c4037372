//! The entries of one stored directory, pulled one by one.
//!
//! Apart from the format because loading a tree blob is I/O. Whoever walks keeps a stack of these
//! instead of recursing, so that depth costs no stack.

use std::sync::Arc;

use stillpoint_core::Result;

use super::blobs::Loader;
use crate::Id;
use crate::format::tree::TreeNode;
use crate::format::tree_read::DirectoryReader;

/// One directory being read, in ascending order of names.
#[derive(Debug)]
pub(crate) struct Entries {
    loader: Arc<Loader>,
    reader: DirectoryReader,
}

impl Entries {
    /// Opens the directory whose tree blob is `tree`.
    pub(crate) fn open(loader: &Arc<Loader>, tree: &Id) -> Result<Self> {
        let reader = DirectoryReader::new(loader.tree(tree)?)?;
        Ok(Self { loader: Arc::clone(loader), reader })
    }

    /// The next entry, or `None` behind the last.
    pub(crate) fn next(&mut self) -> Result<Option<TreeNode>> {
        self.reader.next(&mut |id| self.loader.tree(id))
    }
}
