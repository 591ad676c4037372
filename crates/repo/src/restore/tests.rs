//! Trees that no honest writer makes: a restore must fail and leave everything outside alone.

use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::tree::{Existing, ExtractOptions, TreePath};
use stillpoint_core::{Kind, Result};

use crate::depot::memory::MemoryDepot;
use crate::format::pack::{BlobKind, PackEntry};
use crate::prune::writer::PackWriter;
use crate::simd::sha256::hash;
use crate::unpacked::FileKind;
use crate::{Id, InitOptions, KeyFile, Repository, SnapshotId, Unlock};

fn put(repository: &Repository, writer: &PackWriter<'_>, kind: BlobKind, plain: &[u8]) -> Id {
    let sealed = repository.cipher().seal(plain).expect("seals");
    let id = hash(plain);
    let entry = PackEntry { kind, id, offset: 0, length: sealed.len() as u32, uncompressed: 0 };
    writer.add(&entry, &sealed).expect("adds");
    id
}

/// Extracts a root directory of these nodes; in their text, `DIR` and `DATA` stand for the ids of a
/// directory with one file, and of that file's content.
fn extract(nodes: &[&str], existing: Existing) -> (Result<()>, tempfile::TempDir) {
    let depot = Arc::new(MemoryDepot::new());
    let key = Unlock::KeyFile(KeyFile::generate().expect("random"));
    let repository = Repository::init(depot, &key, &InitOptions::default()).expect("init");
    let writer = PackWriter::new(&repository);
    let data = put(&repository, &writer, BlobKind::Data, b"owned").hex();
    let inner = format!(r#"{{"nodes":[{{"name":"file","type":"file","mode":420,"size":5,"content":["{data}"]}}]}}"#);
    let dir = put(&repository, &writer, BlobKind::Tree, inner.as_bytes()).hex();
    let root = format!(r#"{{"nodes":[{}]}}"#, nodes.join(",")).replace("DIR", &dir).replace("DATA", &data);
    let root = put(&repository, &writer, BlobKind::Tree, root.as_bytes());
    writer.finish().expect("packs").finish().expect("index");
    let snapshot = format!(r#"{{"time":"2026-11-21T10:00:00Z","tree":"{root}","paths":[]}}"#);
    let id = repository.save(FileKind::Snapshot, snapshot.as_bytes()).expect("snapshot");
    let scratch = tempfile::tempdir().expect("scratch");
    std::fs::create_dir_all(scratch.path().join("outside")).expect("outside");
    let options = ExtractOptions { existing, owners: false };
    let result = repository.tree(&SnapshotId::from(id), None).and_then(|tree| {
        let tree = tree.expect("the root is always there");
        tree.extract(&TreePath::root(), &scratch.path().join("to"), &options, &Context::default()).map(|_| ())
    });
    let outside = std::fs::read_dir(scratch.path().join("outside")).expect("lists").count();
    assert_eq!(outside, 0, "something was written outside");
    assert_eq!(std::fs::read_dir(scratch.path()).expect("lists").count(), 2, "something was written beside");
    (result, scratch)
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["..", ".", "", "/etc/x", "../outside/x", "a/b", "a\\u0000b"] {
        for node in [
            format!(r#"{{"name":"{name}","type":"file","mode":420,"size":5,"content":["DATA"]}}"#),
            format!(r#"{{"name":"{name}","type":"dir","mode":2147484141,"subtree":"DIR"}}"#),
            format!(r#"{{"name":"{name}","type":"symlink","mode":134218239,"linktarget":"x"}}"#),
        ] {
            for existing in [Existing::Refuse, Existing::Replace] {
                let (result, _scratch) = extract(&[&node], existing);
                assert_eq!(result.expect_err(&node).kind(), Kind::Corrupt, "{node}");
            }
        }
    }
}

#[test]
fn a_link_followed_by_a_directory_of_its_name_leads_nowhere() {
    let link = r#"{"name":"a","type":"symlink","mode":134218239,"linktarget":"../outside"}"#;
    let dir = r#"{"name":"a","type":"dir","mode":2147484141,"subtree":"DIR"}"#;
    let (result, _scratch) = extract(&[link, dir], Existing::Refuse);
    assert_eq!(result.expect_err("the name is taken").kind(), Kind::AlreadyExists);
    // Whoever asks for replacement gets the directory; nothing goes through the link.
    let (result, scratch) = extract(&[link, dir], Existing::Replace);
    result.expect("replaced");
    assert!(scratch.path().join("to/a").symlink_metadata().expect("there").is_dir());
}

#[test]
fn a_file_through_a_link_of_its_name_is_refused() {
    let link = r#"{"name":"a","type":"symlink","mode":134218239,"linktarget":"../outside/file"}"#;
    let file = r#"{"name":"a","type":"file","mode":420,"size":5,"content":["DATA"]}"#;
    let (result, _scratch) = extract(&[link, file], Existing::Refuse);
    assert!(result.is_err());
    let (_, _scratch) = extract(&[link, file], Existing::Replace);
}

#[test]
fn missing_and_impossible_parts_are_errors() {
    let gone = "11".repeat(32);
    for node in [
        format!(r#"{{"name":"a","type":"file","size":5,"content":["{gone}"]}}"#),
        format!(r#"{{"name":"a","type":"dir","subtree":"{gone}"}}"#),
        r#"{"name":"a","type":"dir"}"#.to_owned(),
        r#"{"name":"a","type":"dir","subtree":"DATA"}"#.to_owned(),
        r#"{"name":"a","type":"wormhole"}"#.to_owned(),
    ] {
        let (result, _scratch) = extract(&[&node], Existing::Refuse);
        assert!(result.is_err(), "{node}");
    }
}

#[test]
fn a_noted_length_that_is_wrong_is_a_named_loss_and_the_content_wins() {
    let (result, scratch) =
        extract(&[r#"{"name":"a","type":"file","mode":420,"size":7,"content":["DATA"]}"#], Existing::Refuse);
    result.expect("restored");
    assert_eq!(std::fs::read(scratch.path().join("to/a")).expect("reads"), b"owned");
}
