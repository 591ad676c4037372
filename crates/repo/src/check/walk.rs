//! Follows snapshots through their directories to their blobs.
//!
//! A directory that several snapshots share is read once; if something below it is bad, that is
//! remembered, so that every snapshot that suffers is named.

use std::collections::HashSet;
use std::sync::Arc;

use stillpoint_core::Result;
use stillpoint_core::tree::NodeKind;

use super::{Bad, Check, CheckReport, Suffering, is_finding};
use crate::format::pack::BlobKind;
use crate::format::tree::TreeNode;
use crate::format::tree_read::Nodes;
use crate::index::Index;
use crate::tree::blobs::Loader;
use crate::{Id, Snapshot};

/// Most paths named for one snapshot.
const PATHS_MAX: usize = 100;

impl Check<'_> {
    /// Follows all snapshots and reports what they lack.
    pub(super) fn walk(&mut self, index: &Arc<Index>, snapshots: &[Snapshot], bad: &Bad) -> Result<()> {
        let mut suffering = Vec::new();
        let mut walk = Walk::new(self, index, bad, None);
        for snapshot in snapshots {
            walk.follow(snapshot)?;
            if !walk.paths.is_empty() {
                suffering.push(Suffering {
                    snapshot: snapshot.id.clone(),
                    tags: snapshot.tags.clone(),
                    paths: std::mem::take(&mut walk.paths),
                    paths_more: std::mem::take(&mut walk.paths_more),
                });
            }
        }
        self.report.snapshots += snapshots.len() as u64;
        self.report.suffering.append(&mut suffering);
        Ok(())
    }

    /// The packs that hold what these snapshots need. What is bad is reported by the walk proper.
    pub(super) fn packs_of(&self, index: &Arc<Index>, snapshots: &[Snapshot], bad: &Bad) -> Result<HashSet<Id>> {
        let report = CheckReport::default();
        let mut quiet = Check { repository: self.repository, context: self.context, report, errors_more: 0 };
        let mut walk = Walk::new(&mut quiet, index, bad, Some(HashSet::new()));
        for snapshot in snapshots {
            walk.follow(snapshot)?;
        }
        Ok(walk.packs.unwrap_or_default())
    }
}

/// A directory that is being read.
struct Level {
    tree: Id,
    path: String,
    nodes: Nodes,
    bad_below: bool,
}

/// A walk over one snapshot after the other.
struct Walk<'w, 'c> {
    check: &'w mut Check<'c>,
    loader: Arc<Loader>,
    bad: &'w Bad,
    /// Directories met so far, in any snapshot.
    seen: HashSet<Id>,
    /// Those with something bad below.
    seen_bad: HashSet<Id>,
    /// The packs of every blob met, if they are asked for.
    packs: Option<HashSet<Id>>,
    levels: Vec<Level>,
    /// What the current snapshot suffers.
    paths: Vec<String>,
    paths_more: u64,
}

impl<'w, 'c> Walk<'w, 'c> {
    fn new(check: &'w mut Check<'c>, index: &Arc<Index>, bad: &'w Bad, packs: Option<HashSet<Id>>) -> Self {
        let loader = Loader::with_index(check.repository, Arc::clone(index));
        Self {
            check,
            loader,
            bad,
            seen: HashSet::new(),
            seen_bad: HashSet::new(),
            packs,
            levels: Vec::new(),
            paths: Vec::new(),
            paths_more: 0,
        }
    }

    fn follow(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.enter(snapshot, snapshot.tree, "/".to_owned())?;
        while let Some(level) = self.levels.last_mut() {
            self.check.context.check()?;
            match level.nodes.next() {
                Ok(Some(node)) => self.node(snapshot, node)?,
                Ok(None) => self.leave(),
                Err(error) => {
                    let path = level.path.clone();
                    self.check.error(format!("snapshot {}: directory `{path}`: {error}", snapshot.id));
                    self.suffers(path);
                    self.leave();
                }
            }
        }
        Ok(())
    }

    fn node(&mut self, snapshot: &Snapshot, node: TreeNode) -> Result<()> {
        let around = self.levels.last().map_or("/", |level| level.path.as_str());
        let name = String::from_utf8_lossy(&node.node.name);
        let path = if around == "/" { name.into_owned() } else { format!("{around}/{name}") };
        if let (NodeKind::Dir, Some(tree)) = (&node.node.kind, node.subtree) {
            return self.enter(snapshot, tree, path);
        }
        let mut lost = None;
        for id in &node.content {
            self.met(BlobKind::Data, id);
            if lost.is_none() && self.bad.is_lost(self.loader.index(), BlobKind::Data, id) {
                lost = Some(*id);
            }
        }
        if let Some(lost) = lost {
            self.check.error(format!("snapshot {}: `{path}` lacks the blob {lost}", snapshot.id));
            self.suffers(path);
        }
        Ok(())
    }

    /// Begins to read a directory, unless it was read before or cannot be read.
    fn enter(&mut self, snapshot: &Snapshot, tree: Id, path: String) -> Result<()> {
        if !self.seen.insert(tree) {
            if self.seen_bad.contains(&tree) {
                self.suffers(path);
            }
            return Ok(());
        }
        self.met(BlobKind::Tree, &tree);
        let loaded = if self.bad.is_lost(self.loader.index(), BlobKind::Tree, &tree) {
            Err(format!("its blob {tree} is lost"))
        } else {
            match self.loader.tree(&tree).and_then(Nodes::new) {
                Ok(nodes) => Ok(nodes),
                Err(error) if is_finding(error.kind()) => Err(error.to_string()),
                Err(error) => return Err(error),
            }
        };
        match loaded {
            Ok(nodes) => self.levels.push(Level { tree, path, nodes, bad_below: false }),
            Err(why) => {
                self.check.error(format!("snapshot {}: directory `{path}` cannot be read: {why}", snapshot.id));
                self.seen_bad.insert(tree);
                self.suffers(path);
            }
        }
        Ok(())
    }

    fn leave(&mut self) {
        let Some(level) = self.levels.pop() else { return };
        if level.bad_below {
            self.seen_bad.insert(level.tree);
            if let Some(around) = self.levels.last_mut() {
                around.bad_below = true;
            }
        }
    }

    /// Notes that the current snapshot lacks something at `path`.
    fn suffers(&mut self, path: String) {
        if let Some(level) = self.levels.last_mut() {
            level.bad_below = true;
        }
        if self.paths.len() < PATHS_MAX {
            self.paths.push(path);
        } else {
            self.paths_more += 1;
        }
    }

    fn met(&mut self, kind: BlobKind, id: &Id) {
        if let Some(packs) = &mut self.packs {
            packs.extend(self.loader.index().locations(kind, id).map(|location| location.pack));
        }
    }
}
