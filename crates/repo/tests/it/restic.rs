//! Interoperation with real restic: what one writes, the other restores and finds sound.

use stillpoint_core::driver::Context;
use stillpoint_core::tree::{Existing, ExtractOptions, TreePath};
use stillpoint_repo::{CheckRequest, Data};

use crate::support::{Restic, assert_same, difficult_tree, extract, latest, open};

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
    assert_eq!(tree.compare(&path, &target).unwrap(), []);
    std::fs::write(target.join("small"), b"hellO\n").unwrap();
    std::fs::write(target.join("extra"), b"").unwrap();
    std::fs::remove_file(target.join("deep/er/still/leaf")).unwrap();
    let found = tree.compare(&path, &target).unwrap();
    let paths: Vec<_> = found.iter().map(|difference| difference.path.as_str()).collect();
    assert_eq!(paths, ["deep/er/still/leaf", "deep/hard", "extra", "small", "zz-hard"], "{found:?}");

    let options = ExtractOptions { existing: Existing::Replace, owners: true };
    tree.extract(&path, &target, &options).unwrap();
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
