//! Deletes what no snapshot needs.
//!
//! Runs alone, under restic's exclusive lock. Whatever it is killed at, every blob that a snapshot
//! needs is in a pack that is there and in an index file that names it, because the order is always:
//! new packs, new index files, then old index files, then old packs. What a killed run leaves (packs
//! that no index names, blobs that are named twice) the next one collects.
//!
//! `mark` finds what must stay, `plan` decides, `writer` writes; this file carries the plan out.
//! docs/formats.md § Deletion says why this order, and what an object lock changes.

pub(crate) mod mark;
mod plan;
pub(crate) mod writer;

use std::collections::{HashMap, HashSet};

use stillpoint_core::driver::Context;
use stillpoint_core::{Error, Kind, Result};

use crate::format::index;
use crate::format::pack::PackEntry;
use crate::index::Index;
use crate::lock::{HeldLock, Mode};
use crate::tree::fetch::{Wanted, fetch};
use crate::unpacked::{self, FileKind};
use crate::{Id, Repository};
use mark::Marks;
use plan::Plan;
use writer::{IndexWriter, PackWriter};

/// Blobs that are sorted and rewritten together, 60 bytes each.
const REWRITE_BLOBS_MAX: usize = 256 * 1024;

/// What to prune.
#[derive(Debug, Clone)]
pub struct PruneRequest {
    /// Say what would be done and do nothing.
    pub dry_run: bool,
    /// Unused bytes that may stay, in percent of the used ones. Default 5.
    pub max_unused_percent: f64,
}

impl Default for PruneRequest {
    fn default() -> Self {
        Self { dry_run: false, max_unused_percent: 5.0 }
    }
}

/// What a prune did, or would do.
#[derive(Debug, Clone, Default)]
pub struct PruneReport {
    /// Packs deleted, rewritten ones included.
    pub packs_deleted: u64,
    /// Packs rewritten, because only part of them is needed or many were small.
    pub packs_rewritten: u64,
    /// Packs among the deleted that no index named: left by runs that were killed.
    pub packs_unnamed: u64,
    /// Bytes freed: deleted less written.
    pub bytes_freed: u64,
    /// Bytes that snapshots need.
    pub bytes_used: u64,
    /// Unneeded bytes that stay, as the limit allows.
    pub bytes_unused: u64,
    /// Index files replaced.
    pub index_files_replaced: u64,
    /// What an object lock keeps from being deleted; a later prune gets it.
    pub kept_by_object_lock: Vec<String>,
}

impl Repository {
    /// Deletes what no snapshot needs.
    ///
    /// # Errors
    /// `Locked` if anyone else uses the repository; `Corrupt` if a snapshot, a directory or a needed
    /// blob is damaged or missing: then nothing is deleted.
    pub fn prune(&self, request: &PruneRequest, context: &Context) -> Result<PruneReport> {
        if request.dry_run {
            return Ok(Prune::prepare(self, request, context)?.expected());
        }
        let lock = HeldLock::acquire(self, Mode::Exclusive)?;
        let result = Prune::prepare(self, request, context).and_then(|prune| prune.carry_out(&lock));
        match (result, lock.release()) {
            (Ok(report), Ok(())) => Ok(report),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
        }
    }
}

/// A prune that knows what to do.
struct Prune<'a> {
    repository: &'a Repository,
    context: &'a Context,
    index: std::sync::Arc<Index>,
    marks: Marks,
    present: HashMap<Id, u64>,
    plan: Plan,
}

/// A blob that is written anew.
struct Moved {
    pack: u32,
    entry: PackEntry,
}

impl Wanted for Moved {
    fn pack(&self) -> u32 {
        self.pack
    }
    fn entry(&self) -> &PackEntry {
        &self.entry
    }
}

impl<'a> Prune<'a> {
    fn prepare(repository: &'a Repository, request: &PruneRequest, context: &'a Context) -> Result<Self> {
        // Snapshots come before the index: what they need was named before they were written.
        let roots: Vec<Id> = repository.snapshots()?.into_iter().map(|snapshot| snapshot.tree).collect();
        let index = repository.fresh_index()?;
        let mut present = HashMap::new();
        repository.depot().list(FileKind::Pack.folder(), &mut |object| {
            if let Some(id) = FileKind::Pack.id_of(&object.name) {
                present.insert(id, object.size);
            }
            Ok(true)
        })?;
        let marks = mark::mark(repository, &index, &roots, Some(&present), context)?;
        let plan = Plan::make(&index, &marks, &present, request.max_unused_percent);
        Ok(Self { repository, context, index, marks, present, plan })
    }

    /// The report of a dry run. What is written anew is taken to be as large as its blobs.
    fn expected(&self) -> PruneReport {
        let plan = &self.plan;
        PruneReport {
            packs_deleted: (plan.drop.len() + plan.unnamed.len() + plan.rewrite.len()) as u64,
            packs_rewritten: plan.rewrite.len() as u64,
            packs_unnamed: plan.unnamed.len() as u64,
            bytes_freed: plan.gone_bytes.saturating_sub(plan.rewrite_bytes),
            bytes_used: plan.used_bytes,
            bytes_unused: plan.unused_bytes_left,
            ..PruneReport::default()
        }
    }

    fn carry_out(self, lock: &HeldLock) -> Result<PruneReport> {
        let mut report = self.expected();
        (report.packs_deleted, report.packs_unnamed, report.bytes_freed) = (0, 0, 0);
        if self.plan.is_empty() {
            return Ok(report);
        }
        let writer = PackWriter::new(self.repository);
        self.rewrite(&writer)?;
        let mut new_index = writer.finish()?;
        let bytes_written = new_index.bytes_of_packs();
        let old_files = self.survivors(&mut new_index)?;
        let new_files = new_index.finish()?;
        lock.check()?;
        let pinned = self.delete_index_files(&old_files, &new_files, &mut report)?;
        let bytes_deleted = self.delete_packs(lock, &pinned, &mut report)?;
        report.bytes_freed = bytes_deleted.saturating_sub(bytes_written);
        Ok(report)
    }

    /// Writes the blobs that must stay of packs that go, each verified on the way.
    fn rewrite(&self, writer: &PackWriter<'_>) -> Result<()> {
        let mut packs = Vec::new();
        let mut numbers = HashMap::new();
        let mut moved = Vec::new();
        for (number, location) in self.index.iter().enumerate() {
            if !self.plan.rewrite.contains(&location.pack) || !self.marks.is_set(number) {
                continue;
            }
            if moved.len() >= REWRITE_BLOBS_MAX && !numbers.contains_key(&location.pack) {
                self.move_blobs(writer, &packs, &mut moved)?;
                (packs, numbers) = (Vec::new(), HashMap::new());
            }
            let pack = *numbers.entry(location.pack).or_insert_with(|| {
                packs.push(location.pack);
                (packs.len() - 1) as u32
            });
            moved.push(Moved { pack, entry: location.entry });
        }
        self.move_blobs(writer, &packs, &mut moved)
    }

    fn move_blobs(&self, writer: &PackWriter<'_>, packs: &[Id], moved: &mut Vec<Moved>) -> Result<()> {
        moved.sort_unstable_by_key(|blob| (blob.pack, blob.entry.offset));
        let name_of = |blob: &Moved| format!("blob {}", blob.entry.id);
        fetch(self.repository, &self.index, packs, moved, self.context, &name_of, &|_, blob| {
            self.context.advance(blob.sealed.len() as u64, 1);
            writer.add(blob.entry, blob.sealed)
        })?;
        moved.clear();
        Ok(())
    }

    /// Names the packs that stay in new index files, as far as the files that name them must go.
    /// Returns those files.
    fn survivors(&self, new_index: &mut IndexWriter<'_>) -> Result<Vec<Id>> {
        let mut replaced = Vec::new();
        for file in unpacked::list(self.repository.depot(), FileKind::Index)? {
            let json = match self.repository.load(FileKind::Index, &file) {
                Err(error) if error.kind() == Kind::NotFound => continue,
                other => other?,
            };
            let mut concerned = false;
            index::parse(&json, &mut |pack, _| {
                concerned |= self.plan.removes(&pack);
                Ok(())
            })?;
            // The index files that were written a moment ago name none of the packs that go.
            if !concerned {
                continue;
            }
            index::parse(&json, &mut |pack, entries| {
                if self.plan.removes(&pack) { Ok(()) } else { new_index.add(&pack, entries) }
            })?;
            replaced.push(file);
        }
        Ok(replaced)
    }

    /// Deletes old index files. The packs of those that an object lock keeps are returned: they must
    /// stay as long as they are named.
    fn delete_index_files(&self, old: &[Id], new: &[Id], report: &mut PruneReport) -> Result<HashSet<Id>> {
        let mut pinned = HashSet::new();
        for file in old {
            if new.contains(file) {
                // The same content has the same name: nothing was to be replaced after all.
                return Err(Error::internal("an index file was replaced by itself"));
            }
            let name = FileKind::Index.name(file);
            match self.repository.depot().delete(&name) {
                Ok(()) => report.index_files_replaced += 1,
                Err(error) if error.kind() == Kind::PermissionDenied => {
                    let json = self.repository.load(FileKind::Index, file)?;
                    index::parse(&json, &mut |pack, _| {
                        pinned.insert(pack);
                        Ok(())
                    })?;
                    report.kept_by_object_lock.push(name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pinned)
    }

    fn delete_packs(&self, lock: &HeldLock, pinned: &HashSet<Id>, report: &mut PruneReport) -> Result<u64> {
        let mut bytes = 0;
        let plan = &self.plan;
        let mut packs: Vec<&Id> = plan.unnamed.iter().chain(&plan.drop).chain(&plan.rewrite).collect();
        packs.sort_unstable();
        for pack in packs {
            self.context.check()?;
            lock.check()?;
            let name = FileKind::Pack.name(pack);
            if pinned.contains(pack) {
                report.kept_by_object_lock.push(name);
                continue;
            }
            match self.repository.depot().delete(&name) {
                Ok(()) => {
                    report.packs_deleted += 1;
                    report.packs_unnamed += u64::from(plan.unnamed.contains(pack));
                    bytes += self.present.get(pack).copied().unwrap_or_default();
                }
                Err(error) if error.kind() == Kind::PermissionDenied => report.kept_by_object_lock.push(name),
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }
}
