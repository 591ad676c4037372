//! Repositories of every released form stay readable: samples in `testdata/` that are never changed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::id::StoreName;
use stillpoint_core::tree::{Existing, ExtractOptions, TreePath};
use stillpoint_repo::depot::fs::FsDepot;
use stillpoint_repo::{CheckRequest, Data, KeyFile, Repository, Unlock};
use stillpoint_testkit::skip;

use crate::support::{backup, copy_all, depot, describe, latest, noise};

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/repository-v1")
}

/// The description of a restored sample, one entry a line, as `expected.txt` holds it.
fn lines(top: &Path) -> String {
    let entries = describe(top).into_iter().filter(|(name, _)| !name.is_empty());
    entries.map(|(name, what)| format!("{} {what}\n", String::from_utf8_lossy(&name).escape_debug())).collect()
}

#[test]
fn the_sample_of_the_first_form_is_restored() {
    let name = "the_sample_of_the_first_form_is_restored";
    if !rustix::process::geteuid().is_root() {
        return skip(name, "owners can only be restored by root");
    }
    let scratch = tempfile::tempdir().unwrap();
    // A copy, so that locks are not written into the sample.
    copy_all(&sample().join("repo"), &scratch.path().join("repo"));
    let key = std::fs::read_to_string(sample().join("key.txt")).unwrap();
    let key = Unlock::KeyFile(KeyFile::parse(&key).unwrap());
    let repository = Repository::open(Arc::new(FsDepot::open(scratch.path().join("repo")).unwrap()), &key).unwrap();
    let request = CheckRequest { data: Data::All, snapshots: None };
    assert_eq!(repository.check(&request, &Context::default()).unwrap().errors, [""; 0]);
    let tree = repository.tree(&latest(&repository), Some(&StoreName::new("files").unwrap())).unwrap().unwrap();
    let target = scratch.path().join("target");
    let options = ExtractOptions { existing: Existing::Refuse, owners: true };
    let extracted = tree.extract(&TreePath::root(), &target, &options, &Context::default()).unwrap();
    if !extracted.losses.is_empty() {
        return skip(name, &format!("this file system cannot hold all of the sample: {:?}", extracted.losses));
    }
    let expected = std::fs::read_to_string(sample().join("expected.txt")).unwrap();
    assert_eq!(lines(&target), expected);
}

/// Makes a new sample; samples that are released are never made again.
#[test]
#[ignore = "writes into testdata"]
fn make_the_sample() {
    assert!(!sample().exists(), "the sample is frozen");
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    std::fs::create_dir_all(at("folder/inner")).unwrap();
    std::fs::write(at("noise"), noise(1, 60_000)).unwrap();
    std::fs::write(at("text"), "one line of text\n".repeat(20_000)).unwrap();
    std::fs::write(at("empty"), b"").unwrap();
    std::fs::write(at("folder/inner/grüße \"quoted\""), b"hello\n").unwrap();
    std::fs::hard_link(at("text"), at("folder/second-name")).unwrap();
    std::os::unix::fs::symlink("../noise", at("folder/link")).unwrap();
    std::fs::write(at(".stillpoint-part-00000000"), b"a name that is ours, used by someone").unwrap();
    std::fs::File::create(at("hole")).unwrap().set_len(3 << 20).unwrap();
    xattr::set(at("noise"), "user.colour", b"green").unwrap();
    crate::support::mode(&at("empty"), 0o4711);
    let key = KeyFile::generate().unwrap();
    std::fs::create_dir_all(sample()).unwrap();
    std::fs::write(sample().join("key.txt"), key.text() + "\n").unwrap();
    let options = stillpoint_repo::InitOptions { key_label: "sample".into(), ..Default::default() };
    let repository = Repository::init(depot(&sample().join("repo")), &Unlock::KeyFile(key), &options).unwrap();
    std::fs::write(at("folder/changing"), b"before").unwrap();
    backup(&repository, scratch.path()).unwrap();
    std::fs::write(at("folder/changing"), b"after").unwrap();
    backup(&repository, scratch.path()).unwrap();
    std::fs::write(sample().join("expected.txt"), lines(scratch.path())).unwrap();
}
