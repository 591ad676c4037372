//! Copies to a target that has lost something: it is copied again, or the copy fails; never a hole.

use std::path::Path;

use stillpoint_core::driver::Context;
use stillpoint_repo::{CheckRequest, Data, InitOptions, Repository, SnapshotId, Unlock};

use crate::support::{PASSWORD, assert_same_below, backup, depot, extract, init, latest, noise, open};

/// What happens to a pack of the target.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Deleted,
    CutShort,
}

/// A source with one snapshot, which its target has too.
struct Pair {
    scratch: tempfile::TempDir,
    source: Repository,
    target: Repository,
}

impl Pair {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        let files = scratch.path().join("files");
        std::fs::create_dir_all(files.join("below")).unwrap();
        std::fs::write(files.join("below/large"), noise(1, 3_000_000)).unwrap();
        std::fs::write(files.join("small"), noise(2, 3_000)).unwrap();
        init(depot(&from));
        let source = open(&from);
        backup(&source, &files).unwrap();
        let options = InitOptions { chunker_polynomial: Some(source.chunker_polynomial()), ..InitOptions::default() };
        let target = Repository::init(depot(&to), &Unlock::Password(PASSWORD.into()), &options).unwrap();
        let pair = Self { scratch, source, target };
        assert_eq!(pair.copy(), (0, true));
        pair
    }

    fn files(&self) -> std::path::PathBuf {
        self.scratch.path().join("files")
    }

    /// Copies all snapshots; how many were known, and whether blobs were copied.
    fn copy(&self) -> (u64, bool) {
        let ids: Vec<SnapshotId> = self.source.snapshots().unwrap().into_iter().map(|found| found.id).collect();
        let report = self.source.copy_to(&self.target, &ids, &Context::default()).unwrap();
        (report.snapshots_known, report.blobs > 0)
    }

    /// Loses one pack of the target after the other, and lets `then` judge each case.
    fn lose_each_pack(&self, mut then: impl FnMut(&str)) {
        let packs = packs(&self.scratch.path().join("to/data"));
        assert!(packs.len() >= 2, "one of data, one of directories");
        for pack in packs {
            for loss in [Loss::Deleted, Loss::CutShort] {
                let whole = std::fs::read(&pack).unwrap();
                std::fs::remove_file(&pack).unwrap();
                if let Loss::CutShort = loss {
                    std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
                }
                then(&format!("{loss:?} {}", pack.display()));
                // The next loss is the only one again.
                drop(std::fs::remove_file(&pack));
                std::fs::write(&pack, whole).unwrap();
            }
        }
    }

    fn assert_restores(&self, case: &str) {
        let to = tempfile::tempdir_in(self.scratch.path()).unwrap();
        let target = open(&self.scratch.path().join("to"));
        extract(&target, &latest(&target), "files", &to.path().join("back"));
        assert_same_below(&self.files(), &to.path().join("back"));
        let request = CheckRequest { data: Data::All, snapshots: None };
        let report = target.check(&request, &Context::default()).unwrap();
        assert!(report.suffering.is_empty(), "{case}: {report:?}");
    }
}

fn packs(data: &Path) -> Vec<std::path::PathBuf> {
    let folders = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
    let mut packs: Vec<_> =
        folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect();
    packs.sort();
    packs
}

#[test]
fn a_later_copy_brings_again_what_the_target_has_lost() {
    let first = Pair::new();
    std::fs::write(first.files().join("new"), noise(3, 2_000_000)).unwrap();
    backup(&first.source, &first.files()).unwrap();
    let mut number = 0;
    first.lose_each_pack(|case| {
        number += 1;
        // Each case copies a snapshot of its own, most of which the target seems to have.
        std::fs::write(first.files().join("new"), noise(100 + number, 20_000)).unwrap();
        backup(&first.source, &first.files()).unwrap();
        let (_, copied) = first.copy();
        assert!(copied, "{case}");
        first.assert_restores(case);
    });
}

#[test]
fn a_snapshot_that_the_target_has_is_made_whole_again() {
    let pair = Pair::new();
    assert_eq!(pair.copy(), (1, false), "there is nothing to do");
    pair.lose_each_pack(|case| {
        let pair_report = pair.copy();
        assert_eq!(pair_report.0, 1, "{case}");
        pair.assert_restores(case);
    });
}
