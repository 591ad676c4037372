//! The damage matrix: every action on every kind of file, then every operation.
//!
//! Never a panic, never a false success: an operation fails, or what it yields is right to the byte.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Existing, ExtractOptions, TreePath};
use stillpoint_repo::{CheckRequest, Data, InitOptions, KeyFile, PruneRequest, Repository, SnapshotId, Unlock};

use crate::support::{
    assert_same_below, backup, copy_all, depot, describe, difficult_tree, extract, files, init, noise,
};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    Flip,
    Truncate,
    Empty,
    Delete,
    Duplicate,
}

const ACTIONS: [Action; 5] = [Action::Flip, Action::Truncate, Action::Empty, Action::Delete, Action::Duplicate];

/// A repository with two snapshots, and what each of them holds.
struct Sample {
    scratch: tempfile::TempDir,
    key: Unlock,
    snapshots: Vec<(SnapshotId, PathBuf)>,
}

impl Sample {
    fn make() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        let key = Unlock::KeyFile(KeyFile::generate().unwrap());
        let repository = Repository::init(depot(&at("repo")), &key, &InitOptions::default()).unwrap();
        let mut snapshots = Vec::new();
        for number in 0..2 {
            let source = at(&format!("source-{number}"));
            std::fs::create_dir(&source).unwrap();
            if number == 0 {
                difficult_tree(&source);
            } else {
                std::fs::create_dir(source.join("folder")).unwrap();
                std::fs::write(source.join("folder/other"), noise(9, 700_000)).unwrap();
            }
            let snapshot = backup(&repository, &source).unwrap();
            snapshots.push((snapshot, source));
        }
        Self { scratch, key, snapshots }
    }

    fn open(&self, at: &Path) -> Result<Repository> {
        Repository::open(depot(at), &self.key)
    }

    fn repository(&self) -> PathBuf {
        self.scratch.path().join("repo")
    }

    /// One file of each kind: config, key, index, snapshot, a pack with data, one with trees. Packs
    /// with directories are small and hold no noise, so the largest pack is one with data.
    fn targets(&self) -> Vec<PathBuf> {
        let all = files(&self.repository());
        let first = |folder: &str| all.iter().find(|file| file.starts_with(folder)).cloned().unwrap();
        let mut packs: Vec<_> = all.iter().filter(|file| file.starts_with("data")).cloned().collect();
        packs.sort_by_key(|pack| self.repository().join(pack).metadata().unwrap().len());
        let mut targets = vec![PathBuf::from("config"), first("keys"), first("index"), first("snapshots")];
        targets.push(packs.first().unwrap().clone());
        targets.push(packs.last().unwrap().clone());
        targets
    }
}

fn damage(file: &Path, action: Action) {
    let bytes = std::fs::read(file).unwrap();
    let _ = rustix::fs::chmod(file, rustix::fs::Mode::from_raw_mode(0o600));
    match action {
        Action::Flip => {
            let mut bytes = bytes;
            let at = bytes.len() / 2;
            bytes[at] ^= 0x10;
            std::fs::write(file, bytes).unwrap();
        }
        Action::Truncate => std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
        Action::Empty => std::fs::write(file, b"").unwrap(),
        Action::Delete => std::fs::remove_file(file).unwrap(),
        Action::Duplicate => {
            let name = file.file_name().unwrap().to_str().unwrap();
            let other: String = name.chars().rev().collect();
            std::fs::write(file.with_file_name(other), bytes).unwrap();
        }
    }
}

/// Runs one operation; a panic fails the test with the case's name.
fn survive<T>(case: &str, operation: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|_| panic!("{case}: panicked"))
}

fn check(repository: &Repository) -> Result<Vec<String>> {
    let request = CheckRequest { data: Data::All, snapshots: None };
    Ok(repository.check(&request, &Context::default())?.errors)
}

/// Restores both snapshots, as far as they can be; what can be must be right.
fn restore_right_or_fail(case: &str, repository: &Repository, sample: &Sample, scratch: &Path) -> usize {
    let mut restored = 0;
    for (number, (snapshot, source)) in sample.snapshots.iter().enumerate() {
        let target = scratch.join(format!("{case}-{number}").replace([' ', '/'], "-"));
        let result = survive(case, || {
            let tree = repository.tree(snapshot, None)?.ok_or_else(|| Error::new(Kind::NotFound, "no tree"))?;
            let options = ExtractOptions { existing: Existing::Refuse, owners: true };
            tree.extract(&TreePath::parse("files")?, &target, &options, &Context::default())
        });
        if result.is_ok() {
            assert_same_below(source, &target);
            restored += 1;
        }
        let _ = std::fs::remove_dir_all(&target);
    }
    restored
}

#[test]
fn damage_is_an_error_or_harmless_and_never_a_panic_or_a_false_success() {
    let sample = Sample::make();
    let scratch = tempfile::tempdir().unwrap();
    for (kind, target) in ["config", "key", "index", "snapshot", "tree pack", "data pack"].iter().zip(sample.targets())
    {
        for action in ACTIONS {
            let case = format!("{action:?} {kind}");
            let at = scratch.path().join("repo");
            copy_all(&sample.repository(), &at);
            damage(&at.join(&target), action);
            let harmless = action == Action::Duplicate;
            match survive(&case, || sample.open(&at)) {
                Err(error) => {
                    assert!(["config", "key"].contains(kind) && !harmless, "{case}: does not open: {error}");
                }
                Ok(repository) => operations(&case, kind, harmless, &repository, &sample, scratch.path()),
            }
            std::fs::remove_dir_all(&at).unwrap();
        }
    }
}

/// List, verify, restore, backup, prune on a damaged repository that opens.
fn operations(case: &str, kind: &str, harmless: bool, repository: &Repository, sample: &Sample, scratch: &Path) {
    let listed = survive(case, || repository.snapshots()).map(|snapshots| snapshots.len());
    let errors = survive(case, || check(repository));
    let found = errors.as_ref().map_or(true, |errors| !errors.is_empty());
    let restored = restore_right_or_fail(case, repository, sample, scratch);
    let key_is_gone = kind == "key" || kind == "config";
    if !harmless && !key_is_gone {
        // A deleted snapshot cannot be told from a forgotten one; everything else is found.
        let forgotten = kind == "snapshot" && matches!(listed, Ok(1));
        assert!(found || forgotten, "{case}: check found nothing");
        assert!(restored < 2, "{case}: restored although damaged");
    }
    if harmless && kind != "snapshot" && kind != "key" {
        assert_eq!(restored, 2, "{case}");
    }
    let source = scratch.join("new-source");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("file"), noise(77, 50_000)).unwrap();
    if let Ok(snapshot) = survive(case, || backup(repository, &source)) {
        let target = scratch.join("new-target");
        extract(repository, &snapshot, "files", &target);
        assert_eq!(describe(&target).len(), 2, "{case}");
        std::fs::remove_dir_all(&target).unwrap();
    }
    let request = PruneRequest { dry_run: false, max_unused_percent: 0.0 };
    let before = restore_right_or_fail(case, repository, sample, scratch);
    let _ = survive(case, || repository.prune(&request, &Context::default()));
    let after = restore_right_or_fail(case, &sample.open(&scratch.join("repo")).unwrap(), sample, scratch);
    assert!(after >= before, "{case}: prune took what could be restored");
}

#[test]
fn a_damaged_lock_stops_whoever_must_be_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("repo");
    let repository = init(depot(&at));
    std::fs::create_dir_all(at.join("locks")).unwrap();
    std::fs::write(at.join("locks").join("ab".repeat(32)), b"not a lock").unwrap();
    let refused = repository.prune(&PruneRequest::default(), &Context::default()).unwrap_err();
    assert!(refused.to_string().contains(&"ab".repeat(32)), "{refused}");
}

#[test]
fn a_check_names_the_snapshots_and_paths_that_suffer() {
    let sample = Sample::make();
    let (_, source) = &sample.snapshots[1];
    let pack = {
        // The pack that came with the second snapshot and holds its data is the larger of the new ones.
        let mut packs: Vec<_> =
            files(&sample.repository()).into_iter().filter(|file| file.starts_with("data")).collect();
        packs.sort_by_key(|pack| sample.repository().join(pack).metadata().unwrap().len());
        packs.into_iter().find(|pack| sample.repository().join(pack).metadata().unwrap().len() > 600_000).unwrap()
    };
    assert!(source.join("folder/other").exists());
    damage(&sample.repository().join(pack), Action::Delete);
    let report =
        sample.open(&sample.repository()).unwrap().check(&CheckRequest::default(), &Context::default()).unwrap();
    assert_eq!(report.suffering.len(), 1, "{report:?}");
    let suffering = &report.suffering[0];
    assert_eq!(
        (&suffering.snapshot, suffering.tags.as_slice()),
        (&sample.snapshots[1].0, &["point:k3f9".to_owned()][..])
    );
    assert_eq!(suffering.paths, ["files/folder/other"]);
}
