//! Interoperation with real restic: what one writes, the other restores and finds sound.

use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;
use stillpoint_core::tree::{Existing, ExtractOptions, TreePath};
use stillpoint_repo::{CheckRequest, Data, InitOptions, PruneRequest, Repository, Unlock};

use crate::support::{
    PASSWORD, Restic, assert_same, assert_same_below, backup, depot, difficult_tree, extract, init, latest, noise, open,
};

#[test]
fn what_restic_wrote_is_restored_compared_and_checked() {
    let scratch = tempfile::tempdir().unwrap();
    let Some(restic) = Restic::find("what_restic_wrote_is_restored_compared_and_checked", &scratch.path().join("repo"))
    else {
        return;
    };
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    difficult_tree(&source);
    restic.run(&["init", "--repository-version", "2"]);
    restic.backup(&source);
    restic.run(&["backup", "--tag", "again", source.to_str().unwrap()]);

    let repository = open(&restic.repository);
    let snapshot = latest(&repository);
    let inside = source.to_str().unwrap();
    let target = scratch.path().join("target");
    let extracted = extract(&repository, &snapshot, inside, &target);
    assert_eq!(extracted.losses, [""; 0]);
    assert_same(&source, &target);
    let blocks = |at: &std::path::Path| std::os::unix::fs::MetadataExt::blocks(&at.metadata().unwrap());
    assert!(blocks(&target.join("sparse")) * 512 < 1 << 20, "holes stay holes");

    let tree = repository.tree(&snapshot, None).unwrap().unwrap();
    let path = TreePath::parse(inside).unwrap();
    assert_eq!(tree.compare(&path, &target, &Context::default()).unwrap(), []);
    std::fs::write(target.join("small"), b"hellO\n").unwrap();
    std::fs::write(target.join("extra"), b"").unwrap();
    std::fs::remove_file(target.join("deep/er/still/leaf")).unwrap();
    let found = tree.compare(&path, &target, &Context::default()).unwrap();
    let paths: Vec<_> = found.iter().map(|difference| difference.path.as_str()).collect();
    assert_eq!(paths, ["deep/er/still/leaf", "deep/hard", "extra", "small", "zz-hard"], "{found:?}");

    let options = ExtractOptions { existing: Existing::Replace, owners: true };
    tree.extract(&path, &target, &options, &Context::default()).unwrap();
    assert_same(&source, &target);

    let mut big = Vec::new();
    let mut reader = tree.open(&path.join(b"big").unwrap()).unwrap();
    std::io::Read::read_to_end(&mut reader, &mut big).unwrap();
    assert_eq!(big, std::fs::read(source.join("big")).unwrap());

    let request = CheckRequest { data: Data::All, snapshots: None };
    let report = repository.check(&request, &Context::default()).unwrap();
    assert_eq!(report.errors, [""; 0]);
    assert_eq!((report.snapshots, report.packs_read), (2, report.packs));
    assert!(report.bytes_read > 5_000_000);
}

#[test]
fn restic_finds_no_error_after_forget_prune_copy_and_key_rotation() {
    let scratch = tempfile::tempdir().unwrap();
    let name = "restic_finds_no_error_after_forget_prune_copy_and_key_rotation";
    let Some(restic) = Restic::find(name, &scratch.path().join("repo")) else { return };
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    difficult_tree(&source);
    restic.run(&["init", "--repository-version", "2"]);
    restic.backup(&source);
    std::fs::remove_file(source.join("big")).unwrap();
    std::fs::write(source.join("new"), noise(2, 3_000_000)).unwrap();
    restic.backup(&source);

    let repository = open(&restic.repository);
    let snapshots = repository.snapshots().unwrap();
    let request = PruneRequest { dry_run: false, max_unused_percent: 0.0 };
    let report = repository.prune(&request, &Context::default()).unwrap();
    assert_eq!((report.packs_deleted, report.bytes_freed), (0, 0), "everything is needed: {report:?}");

    repository.forget(&[snapshots[0].id.clone()]).unwrap();
    std::fs::write(restic.repository.join("data/notes-of-another-tool"), b"keep me").unwrap();
    let expected = repository.prune(&PruneRequest { dry_run: true, ..request.clone() }, &Context::default()).unwrap();
    let report = repository.prune(&request, &Context::default()).unwrap();
    assert!(expected.bytes_freed > 4_000_000 && report.bytes_freed > 4_000_000, "{expected:?} {report:?}");
    assert!(report.packs_rewritten > 0, "{report:?}");
    assert!(restic.repository.join("data/notes-of-another-tool").exists());
    restic.check();
    let again = repository.prune(&request, &Context::default()).unwrap();
    assert_eq!((again.packs_deleted, again.packs_rewritten), (0, 0), "{again:?}");
    let target = scratch.path().join("after-prune");
    restic.restore("latest", &target);
    assert_same(&source, &target.join(source.strip_prefix("/").unwrap()));

    let copy = scratch.path().join("copy");
    let options = InitOptions::default();
    let other = Repository::init(depot(&copy), &Unlock::Password(PASSWORD.into()), &options).unwrap();
    let ids = [snapshots[1].id.clone()];
    let first = repository.copy_to(&other, &ids, &Context::default()).unwrap();
    let second = repository.copy_to(&other, &ids, &Context::default()).unwrap();
    assert!(first.bytes_stored > 3_000_000, "{first:?}");
    assert_eq!((second.bytes_stored, second.snapshots_known, &second.snapshots), (0, 1, &first.snapshots));
    let back = other.copy_to(&repository, &[first.snapshots[0].1.clone()], &Context::default()).unwrap();
    assert_eq!(back.snapshots[0].1, ids[0], "a copy of a copy is known at the origin");
    let copied = Restic::find(name, &copy).unwrap();
    copied.check();
    let target = scratch.path().join("after-copy");
    copied.restore("latest", &target);
    assert_same(&source, &target.join(source.strip_prefix("/").unwrap()));

    repository.key_add(&Unlock::Password("second".into()), "second").unwrap();
    let by_second = Repository::open(depot(&restic.repository), &Unlock::Password("second".into())).unwrap();
    assert_eq!(by_second.keys().unwrap().len(), 2);
    by_second.key_rotate(&Unlock::Password("third".into()), "third").unwrap();
    restic.check();
    let first_key = by_second.keys().unwrap().into_iter().find(|key| key.label != "third").unwrap();
    by_second.key_remove(&first_key.id).unwrap();
    assert!(!restic.try_run(&["snapshots"]).status.success(), "the first password opens no more");
}

#[test]
fn prune_waits_for_nobody_and_respects_a_running_restic() {
    let scratch = tempfile::tempdir().unwrap();
    let name = "prune_waits_for_nobody_and_respects_a_running_restic";
    let Some(restic) = Restic::find(name, &scratch.path().join("repo")) else { return };
    restic.run(&["init", "--repository-version", "2"]);
    let mut running = restic.spawn(&["backup", "--stdin"]);
    let locks = restic.repository.join("locks");
    for _ in 0..600 {
        if std::fs::read_dir(&locks).unwrap().count() > 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let refused = open(&restic.repository).prune(&PruneRequest::default(), &Context::default()).unwrap_err();
    assert_eq!(refused.kind(), Kind::Locked);
    assert!(refused.to_string().contains(&format!("process {}", running.id())), "{refused}");
    std::io::Write::write_all(&mut running.stdin.take().unwrap(), b"a little").unwrap();
    assert!(running.wait().unwrap().success());
    open(&restic.repository).prune(&PruneRequest::default(), &Context::default()).unwrap();
    restic.check();
}

#[test]
fn restic_restores_what_we_wrote_and_both_write_by_turns() {
    let scratch = tempfile::tempdir().unwrap();
    let name = "restic_restores_what_we_wrote_and_both_write_by_turns";
    let Some(restic) = Restic::find(name, &scratch.path().join("repo")) else { return };
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    difficult_tree(&source);
    let repository = init(depot(&restic.repository));
    for turn in 0..4 {
        std::fs::write(source.join("turn"), noise(turn, 200_000)).unwrap();
        let ours = turn % 2 == 0;
        if ours {
            backup(&repository, &source).unwrap();
        } else {
            restic.backup(&source);
        }
        let inside = if ours { "files" } else { source.to_str().unwrap().trim_start_matches('/') };
        let by_us = scratch.path().join(format!("by-us-{turn}"));
        extract(&repository, &latest(&repository), inside, &by_us);
        assert_same_below(&source, &by_us);
        let by_restic = scratch.path().join(format!("by-restic-{turn}"));
        restic.restore("latest", &by_restic);
        assert_same_below(&source, &by_restic.join(inside));
        std::fs::remove_dir_all(&by_restic).unwrap();
    }
    restic.check();
    let request = CheckRequest { data: Data::All, snapshots: None };
    assert_eq!(repository.check(&request, &Context::default()).unwrap().errors, [""; 0]);
}
