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
        let (known, blobs) = pair.copy();
        assert!(known == 0 && blobs > 0);
        pair
    }

    fn files(&self) -> std::path::PathBuf {
        self.scratch.path().join("files")
    }

    /// Copies all snapshots; how many were known, and how many blobs were copied.
    fn copy(&self) -> (u64, u64) {
        let ids: Vec<SnapshotId> = self.source.snapshots().unwrap().into_iter().map(|found| found.id).collect();
        let report = self.source.copy_to(&self.target, &ids, &Context::default()).unwrap();
        (report.snapshots_known, report.blobs)
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

/// A pair of its own for each pack of the target and each way to lose it, so that nothing is there
/// twice from a repair before.
fn lose_each_pack(then: impl Fn(&Pair, &str)) {
    let count = packs(&Pair::new().scratch.path().join("to/data")).len();
    assert!(count >= 2, "one of data, one of directories");
    for number in 0..count {
        for loss in [Loss::Deleted, Loss::CutShort] {
            let pair = Pair::new();
            let pack = packs(&pair.scratch.path().join("to/data")).swap_remove(number);
            let whole = std::fs::read(&pack).unwrap();
            std::fs::remove_file(&pack).unwrap();
            if let Loss::CutShort = loss {
                std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
            }
            then(&pair, &format!("{loss:?} {}", pack.display()));
        }
    }
}

#[test]
fn a_later_copy_brings_again_what_the_target_has_lost() {
    lose_each_pack(|pair, case| {
        // A snapshot most of which the target seems to have.
        std::fs::write(pair.files().join("new"), noise(100, 20_000)).unwrap();
        backup(&pair.source, &pair.files()).unwrap();
        let (known, blobs) = pair.copy();
        assert!(known == 1 && blobs > 2, "{case}: more than the new file and its directory, {blobs}");
        pair.assert_restores(case);
    });
}

#[test]
fn a_snapshot_that_the_target_has_is_made_whole_again() {
    assert_eq!(Pair::new().copy(), (1, 0), "there is nothing to do");
    lose_each_pack(|pair, case| {
        let (known, blobs) = pair.copy();
        assert!(known == 1 && blobs > 0, "{case}");
        pair.assert_restores(case);
    });
}
