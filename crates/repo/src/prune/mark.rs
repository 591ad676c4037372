//! Finds out which copies of blobs must stay: everything that any snapshot reaches.
//!
//! One bit for each entry of the index; the bit of a directory also says that it was followed. Of
//! several copies of a blob one is marked, in a pack that is there.

use std::collections::HashMap;
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Kind, Result};

use crate::format::pack::BlobKind;
use crate::format::tree_read::Nodes;
use crate::index::Index;
use crate::tree::blobs::Loader;
use crate::{Id, Repository};

/// One bit for each entry of an index, in the order of [`Index::iter`].
#[derive(Debug)]
pub(crate) struct Marks {
    words: Vec<u64>,
    /// How many bits are set.
    pub(crate) count: u64,
}

impl Marks {
    pub(super) fn new(entries: usize) -> Self {
        Self { words: vec![0; entries.div_ceil(64)], count: 0 }
    }

    /// Whether entry `number` must stay.
    pub(crate) fn is_set(&self, number: usize) -> bool {
        self.words[number / 64] >> (number % 64) & 1 == 1
    }

    pub(super) fn set(&mut self, number: usize) {
        self.words[number / 64] |= 1 << (number % 64);
        self.count += 1;
    }
}

/// Marks everything that snapshots with these root directories reach. `present` holds the packs in
/// the depot with their sizes; without it the index is believed.
///
/// # Errors
/// `Corrupt` if anything they need cannot be found: then nothing may be deleted, since what is
/// missing might be what tells of more.
pub(crate) fn mark(
    repository: &Repository,
    index: &Arc<Index>,
    roots: &[Id],
    present: Option<&HashMap<Id, u64>>,
    context: &Context,
) -> Result<Marks> {
    let loader = Loader::with_index(repository, Arc::clone(index));
    let mut marks = Marks::new(index.len());
    let mut levels = Vec::new();
    for root in roots {
        if reach(index, present, &mut marks, BlobKind::Tree, root)? {
            levels.push(Nodes::new(loader.tree(root)?)?);
        }
        while let Some(nodes) = levels.last_mut() {
            context.check()?;
            let Some(node) = nodes.next()? else {
                levels.pop();
                continue;
            };
            for id in &node.content {
                reach(index, present, &mut marks, BlobKind::Data, id)?;
            }
            if let Some(tree) = node.subtree
                && reach(index, present, &mut marks, BlobKind::Tree, &tree)?
            {
                levels.push(Nodes::new(loader.tree(&tree)?)?);
            }
        }
    }
    Ok(marks)
}

/// Marks one blob; true if it was not marked before.
fn reach(
    index: &Index,
    present: Option<&HashMap<Id, u64>>,
    marks: &mut Marks,
    kind: BlobKind,
    id: &Id,
) -> Result<bool> {
    let mut candidate = None;
    for (number, location) in index.numbered(kind, id) {
        if marks.is_set(number) {
            return Ok(false);
        }
        let end = u64::from(location.entry.offset) + u64::from(location.entry.length);
        if candidate.is_none()
            && present.is_none_or(|present| present.get(&location.pack).is_some_and(|size| *size >= end))
        {
            candidate = Some(number);
        }
    }
    let Some(number) = candidate else {
        return Err(Error::new(Kind::Corrupt, "a snapshot needs a blob that is not in the repository")
            .context("blob", id)
            .hint("nothing is deleted while something is missing; `stillpoint check` names what suffers"));
    };
    marks.set(number);
    Ok(true)
}
