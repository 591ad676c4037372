//! Proves that a repository holds what its snapshots name.
//!
//! Three passes, cheapest first. `packs` compares what the index says with what lies in the depot
//! and, on request, re-reads content, always from the depot. `walk` then follows every snapshot and
//! knows of everything that was found bad, so that damage is told as what it means: which snapshots
//! suffer, and where. A check changes nothing and ends with a report, not at the first error;
//! only a depot that cannot be read at all is an `Err`.

mod content;
pub(crate) mod packs;
mod walk;

use std::collections::HashSet;
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::{Kind, Result};

use crate::format::pack::BlobKind;
use crate::index::Index;
use crate::lock::{HeldLock, Mode};
use crate::unpacked::{self, FileKind};
use crate::{Id, Repository, Snapshot, SnapshotId, key};

/// Most errors that are listed one by one; the rest is counted.
const ERRORS_MAX: usize = 1000;

/// How much of the packs' content is re-read.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Data {
    /// Structure only: index, trees, snapshots, and the existence and size of packs.
    #[default]
    None,
    /// Every byte.
    All,
    /// A random part of the packs.
    Sample {
        /// 0 to 100. More than 0 reads at least one pack.
        percent: f64,
        /// Chooses which part.
        seed: u64,
    },
}

/// What to check.
#[derive(Debug, Clone, Default)]
pub struct CheckRequest {
    /// How much content is re-read.
    pub data: Data,
    /// Only what these snapshots need; `None` for all snapshots and all packs.
    pub snapshots: Option<Vec<SnapshotId>>,
}

/// A snapshot that cannot be restored whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suffering {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its labels, among them the point's id.
    pub tags: Vec<String>,
    /// What is concerned, from the snapshot's root: the first part is the store. At most 100;
    /// a directory stands for all below it. Empty if the snapshot's own file is damaged.
    pub paths: Vec<String>,
    /// How many more there are.
    pub paths_more: u64,
}

/// What a check found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Everything that is wrong, for people. Empty means sound.
    pub errors: Vec<String>,
    /// Things worth knowing that endanger nothing: packs that no index names, for one.
    pub notes: Vec<String>,
    /// The snapshots that what is wrong concerns.
    pub suffering: Vec<Suffering>,
    /// Snapshots followed.
    pub snapshots: u64,
    /// Packs looked at.
    pub packs: u64,
    /// Packs whose content was re-read.
    pub packs_read: u64,
    /// Blobs looked at.
    pub blobs: u64,
    /// Bytes of packs read from the depot.
    pub bytes_read: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.errors.is_empty()
    }
}

impl Repository {
    /// Checks the repository as `request` says.
    ///
    /// # Errors
    /// Only what keeps the check from being made: an unreachable depot, a prune that runs, cancellation,
    /// a snapshot in the request that does not exist. What is wrong in the repository is in the report.
    pub fn check(&self, request: &CheckRequest, context: &Context) -> Result<CheckReport> {
        let mut check = Check { repository: self, context, report: CheckReport::default(), errors_more: 0 };
        // Against a prune that takes away what is being read. A read-only or full bucket takes no lock.
        let lock = match HeldLock::acquire(self, Mode::Shared) {
            Ok(lock) => Some(lock),
            Err(error) if matches!(error.kind(), Kind::PermissionDenied | Kind::Exhausted) => None,
            Err(error) if is_finding(error.kind()) => {
                check.error(format!("a lock cannot be read: {error}"));
                None
            }
            Err(error) => return Err(error),
        };
        check.keys()?;
        let index = Arc::new(check.index()?);
        let snapshots = check.snapshots(request)?;
        let mut bad = check.packs(&index)?;
        let wanted = match (&request.snapshots, request.data) {
            (None, _) | (_, Data::None) => None,
            (Some(_), _) => Some(check.packs_of(&index, &snapshots, &bad)?),
        };
        check.content(&index, request.data, wanted.as_ref(), &mut bad)?;
        check.walk(&index, &snapshots, &bad)?;
        lock.map_or(Ok(()), HeldLock::release)?;
        let mut report = check.report;
        if check.errors_more > 0 {
            report.errors.push(format!("{} more errors", check.errors_more));
        }
        Ok(report)
    }
}

/// A check that is under way.
struct Check<'a> {
    repository: &'a Repository,
    context: &'a Context,
    report: CheckReport,
    errors_more: u64,
}

/// Which packs and blobs cannot be relied on.
#[derive(Debug, Default)]
struct Bad {
    /// Packs that are absent or not what they must be as a whole.
    packs: HashSet<Id>,
    /// Single blobs, by pack and offset.
    blobs: HashSet<(Id, u32)>,
}

impl Bad {
    /// Whether no sound copy of the blob is known.
    fn is_lost(&self, index: &Index, kind: BlobKind, id: &Id) -> bool {
        index.locations(kind, id).all(|location| {
            self.packs.contains(&location.pack) || self.blobs.contains(&(location.pack, location.entry.offset))
        })
    }
}

impl Check<'_> {
    fn error(&mut self, text: impl Into<String>) {
        if self.report.errors.len() < ERRORS_MAX {
            self.report.errors.push(text.into());
        } else {
            self.errors_more += 1;
        }
    }

    /// Every key file can be read. A damaged one may be the only one that someone has.
    fn keys(&mut self) -> Result<()> {
        for id in unpacked::list(self.repository.depot(), FileKind::Key)? {
            match key::load(self.repository.depot(), &id) {
                Ok(_) => {}
                Err(error) if is_finding(error.kind()) => self.error(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Loads all index files that can be read.
    fn index(&mut self) -> Result<Index> {
        let mut index = Index::default();
        for id in unpacked::list(self.repository.depot(), FileKind::Index)? {
            let added = self.repository.load(FileKind::Index, &id).and_then(|json| index.add_file(&json));
            match added {
                Ok(()) => {}
                Err(error) if is_finding(error.kind()) => {
                    let name = FileKind::Index.name(&id);
                    self.error(format!("index file {name} cannot be used: {error}"));
                }
                Err(error) => return Err(error),
            }
            self.context.check()?;
        }
        self.report.blobs = index.len() as u64;
        Ok(index)
    }

    /// Loads all snapshots that are asked for.
    fn snapshots(&mut self, request: &CheckRequest) -> Result<Vec<Snapshot>> {
        if let Some(ids) = &request.snapshots {
            let mut snapshots = Vec::new();
            for id in ids {
                match self.repository.snapshot(id) {
                    Ok(snapshot) => snapshots.push(snapshot),
                    Err(error) if error.kind() == Kind::Corrupt => self.lost_snapshot(id.clone(), &error.to_string()),
                    Err(error) => return Err(error),
                }
            }
            return Ok(snapshots);
        }
        let mut snapshots = Vec::new();
        for id in unpacked::list(self.repository.depot(), FileKind::Snapshot)? {
            match self.repository.snapshot(&id.into()) {
                Ok(snapshot) => snapshots.push(snapshot),
                Err(error) if error.kind() == Kind::NotFound => {} // Forgotten a moment ago.
                Err(error) if is_finding(error.kind()) => self.lost_snapshot(id.into(), &error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(snapshots)
    }

    fn lost_snapshot(&mut self, id: SnapshotId, why: &str) {
        self.error(format!("snapshot {id} cannot be read: {why}"));
        let suffering = Suffering { snapshot: id, tags: Vec::new(), paths: Vec::new(), paths_more: 0 };
        self.report.suffering.push(suffering);
    }
}

/// Whether an error is something that the check found, rather than something that prevents it.
fn is_finding(kind: Kind) -> bool {
    matches!(kind, Kind::Corrupt | Kind::NotFound | Kind::Unsupported)
}
