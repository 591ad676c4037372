//! What is stored of one store in one snapshot, for reading.
//!
//! [`StoredTree`] is the [`Tree`] that drivers restore from and drain against. Reading comes in
//! three forms, each with a file of its own: single directories as a walk needs them (`blobs`,
//! `entries`), one file from its begin (`reader`), and everything at once in the order of the packs
//! (`fetch`, used by the restore). All of them pass through `decode`, which verifies.

pub(crate) mod blobs;
mod compare;
pub(crate) mod decode;
pub(crate) mod entries;
pub(crate) mod fetch;
mod reader;

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use stillpoint_core::driver::Context;
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{
    Difference, ExtractOptions, Extracted, FileTime, Metadata, Node, NodeKind, Tree, TreePath,
};
use stillpoint_core::{Error, Kind, Result};

use crate::format::tree::TreeNode;
use crate::unpacked::FileKind;
use crate::{Id, Repository, SnapshotId};
use blobs::Loader;
use entries::Entries;

/// Directories whose reading is remembered, so that a look-up behind the last one goes on there.
const CURSORS_MAX: usize = 8;

/// A directory of a snapshot as a [`Tree`].
pub struct StoredTree {
    loader: Arc<Loader>,
    root: Id,
    /// What is known of the top directory itself.
    top: Node,
    cursors: Mutex<Vec<Cursor>>,
}

/// A directory that is being read, and its latest entry.
struct Cursor {
    tree: Id,
    entries: Entries,
    last: Option<TreeNode>,
}

impl StoredTree {
    /// The tree blob of the top directory; the writer compares against it.
    pub(crate) fn root(&self) -> Id {
        self.root
    }

    /// The repository that it lies in.
    pub(crate) fn repository(&self) -> &Repository {
        self.loader.repository()
    }

    /// The entry at `path` with where its bytes lie.
    fn find(&self, path: &TreePath) -> Result<Option<TreeNode>> {
        let mut found = TreeNode { node: self.top.clone(), content: Vec::new(), subtree: Some(self.root) };
        for name in path.names() {
            let Some(tree) = found.subtree else { return Ok(None) };
            match self.find_in(&tree, name)? {
                Some(entry) => found = entry,
                None => return Ok(None),
            }
        }
        Ok(Some(found))
    }

    /// The entry `name` of one directory. Look-ups in ascending order read the directory once.
    fn find_in(&self, tree: &Id, name: &[u8]) -> Result<Option<TreeNode>> {
        let lock = || self.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        let remembered = {
            let mut cursors = lock();
            let at = cursors.iter().position(|cursor| {
                cursor.tree == *tree && cursor.last.as_ref().is_none_or(|last| *last.node.name <= *name)
            });
            at.map(|at| cursors.remove(at))
        };
        let mut cursor = match remembered {
            Some(cursor) => cursor,
            None => Cursor { tree: *tree, entries: Entries::open(&self.loader, tree)?, last: None },
        };
        let found = cursor.seek(name)?;
        let mut cursors = lock();
        if cursors.len() == CURSORS_MAX {
            cursors.remove(0);
        }
        cursors.push(cursor);
        Ok(found)
    }

    /// The directory at `path`.
    fn directory(&self, path: &TreePath) -> Result<(Node, Id)> {
        match self.find(path)? {
            Some(TreeNode { node, subtree: Some(tree), .. }) => Ok((node, tree)),
            Some(_) => Err(Error::new(Kind::Config, format!("`{path}` is not a directory"))),
            None => Err(absent(path)),
        }
    }
}

impl Cursor {
    fn seek(&mut self, name: &[u8]) -> Result<Option<TreeNode>> {
        loop {
            if let Some(last) = &self.last
                && *last.node.name >= *name
            {
                return Ok((*last.node.name == *name).then(|| last.clone()));
            }
            match self.entries.next()? {
                Some(entry) => self.last = Some(entry),
                None => return Ok(None),
            }
        }
    }
}

fn absent(path: &TreePath) -> Error {
    Error::new(Kind::NotFound, format!("`{path}` is not in this point"))
}

impl fmt::Debug for StoredTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredTree({})", self.root)
    }
}

impl Tree for StoredTree {
    fn get(&self, path: &TreePath) -> Result<Option<Node>> {
        Ok(self.find(path)?.map(|found| found.node))
    }

    fn list(&self, path: &TreePath, visit: &mut dyn FnMut(Node) -> Result<bool>) -> Result<()> {
        let (_, tree) = self.directory(path)?;
        let mut entries = Entries::open(&self.loader, &tree)?;
        while let Some(entry) = entries.next()? {
            if !visit(entry.node)? {
                break;
            }
        }
        Ok(())
    }

    fn open(&self, path: &TreePath) -> Result<Box<dyn Read + Send>> {
        let found = self.find(path)?.ok_or_else(|| absent(path))?;
        match found.node.kind {
            NodeKind::File { .. } => reader::open(&self.loader, path.to_string(), found.content),
            _ => Err(Error::new(Kind::Config, format!("`{path}` is not a file"))),
        }
    }

    fn extract(&self, path: &TreePath, to: &Path, options: &ExtractOptions, context: &Context) -> Result<Extracted> {
        let (node, tree) = self.directory(path)?;
        // The top of a store is a folder of the writer's, not a directory of the user's.
        let meta = (!path.names().is_empty()).then_some(&node.meta);
        crate::restore::extract(&self.loader, &tree, meta, to, options, context)
    }

    fn compare(&self, path: &TreePath, with: &Path, context: &Context) -> Result<Vec<Difference>> {
        let (_, tree) = self.directory(path)?;
        compare::compare(&self.loader, &tree, with, context)
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}

impl Repository {
    /// The tree of one store in a snapshot (`top` given), or the snapshot's root.
    ///
    /// `None` if the snapshot has no such folder.
    ///
    /// # Errors
    /// `NotFound` if there is no such snapshot; `Corrupt` if it or its root is damaged.
    pub fn tree(&self, snapshot: &SnapshotId, top: Option<&StoreName>) -> Result<Option<Arc<dyn Tree>>> {
        let snapshot = self.snapshot(snapshot)?;
        let time = FileTime {
            seconds: snapshot.time.as_second(),
            nanos: u32::try_from(snapshot.time.subsec_nanosecond()).unwrap_or_default(),
        };
        let node = Node { name: Vec::new(), kind: NodeKind::Dir, meta: Metadata::folder(time) };
        let whole =
            StoredTree { loader: Loader::new(self)?, root: snapshot.tree, top: node, cursors: Mutex::default() };
        let Some(top) = top else { return Ok(Some(Arc::new(whole))) };
        match whole.find_in(&snapshot.tree, top.as_str().as_bytes())? {
            Some(TreeNode { node, subtree: Some(root), .. }) => {
                Ok(Some(Arc::new(StoredTree { root, top: node, cursors: Mutex::default(), ..whole })))
            }
            Some(_) | None => Ok(None),
        }
    }

    /// Deletes the snapshots' files; their data stays until the next prune.
    ///
    /// A snapshot that is not there any more is no error.
    pub fn forget(&self, ids: &[SnapshotId]) -> Result<()> {
        for id in ids {
            let id = Id::parse(&id.0)?;
            self.depot().delete(&FileKind::Snapshot.name(&id))?;
        }
        Ok(())
    }

    /// Reads one snapshot.
    pub fn snapshot(&self, id: &SnapshotId) -> Result<crate::Snapshot> {
        let file = Id::parse(&id.0)?;
        let json = self.load(FileKind::Snapshot, &file)?;
        crate::format::snapshot::SnapshotJson::parse(&json)?.named(id.clone())
    }
}
