//! What goes wrong with buckets, keys and disks, and the screens that say so.

use std::os::unix::fs::PermissionsExt;

use crate::support::{World, files_below, is_root};

#[test]
fn a_bucket_that_was_never_made() {
    let world = World::configured();
    world.write("stillpoint.key", "words that someone chose");
    let screen = world.run(&["list"]);
    assert_eq!(screen.code, 5);
    insta::assert_snapshot!(world.redact(&screen), @"");
}

#[test]
fn a_missing_key_file() {
    let world = World::ready();
    std::fs::remove_file(world.path("stillpoint.key")).expect("remove");
    insta::assert_snapshot!(world.redact(&world.run(&["backup"])), @"");
    // `init` must not make a new key for data that an old one encrypted.
    insta::assert_snapshot!(world.redact(&world.run(&["init"])), @"");
}

#[test]
fn a_wrong_password() {
    let world = World::ready();
    world.write("stillpoint.key", "not the password");
    let screen = world.run(&["backup"]);
    assert_eq!(screen.code, 5);
    insta::assert_snapshot!(world.redact(&screen), @"");
}

#[test]
fn a_mistyped_key_is_said_to_be_mistyped() {
    let world = World::ready();
    let key = std::fs::read_to_string(world.path("stillpoint.key")).expect("read");
    let last = key.trim().chars().last().expect("digits");
    let other = if last == '7' { '8' } else { '7' };
    world.write("stillpoint.key", &format!("{}{other}\n", &key.trim()[..key.trim().len() - 1]));
    let screen = world.run(&["list"]);
    assert!(!screen.all().contains(&key.trim()[16..30]), "{screen:?}");
    insta::assert_snapshot!(world.redact(&screen), @"");
}

#[test]
fn a_foreign_repository_in_the_bucket() {
    let (ours, theirs) = (World::configured(), World::ready());
    ours.edit(&ours.path("bucket").display().to_string(), &theirs.path("bucket").display().to_string());
    let before = files_below(&theirs.path("bucket"));
    let refused = ours.run(&["init"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    ours.write("stillpoint.key", "another password");
    let screen = ours.run(&["init"]);
    assert_eq!(screen.code, 5);
    let text = ours.redact(&screen).replace(&theirs.path("").display().to_string(), "[THEIRS]/");
    insta::assert_snapshot!(text, @"");
    assert_eq!(files_below(&theirs.path("bucket")), before, "nothing of theirs was touched");
}

#[test]
fn a_read_only_bucket() {
    let name = "a_read_only_bucket";
    if is_root() {
        return stillpoint_testkit::skip(name, "root may write everywhere");
    }
    let world = World::ready();
    let set = |mode| {
        for entry in files_below(&world.path("bucket")).iter().filter_map(|file| file.parent()) {
            std::fs::set_permissions(entry, std::fs::Permissions::from_mode(mode)).expect("chmod");
        }
        std::fs::set_permissions(world.path("bucket"), std::fs::Permissions::from_mode(mode)).expect("chmod");
    };
    set(0o555);
    let screen = world.run(&["backup"]);
    set(0o755);
    assert_eq!(screen.code, 5, "{screen:?}");
    insta::assert_snapshot!(world.redact(&screen), @"");
}

#[test]
fn a_damaged_point_is_listed_and_never_believed() {
    let mut world = World::ready();
    let point = world.backup();
    let path = world.path(&format!("bucket/points/{point}/statefile.json"));
    let text = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, text.replacen("\"strict\"", "\"ordered\"", 1)).expect("write");
    let list = world.run(&["list"]);
    assert_eq!(list.code, 5);
    insta::assert_snapshot!(world.redact(&list), @"");
    insta::assert_snapshot!(world.redact(&world.run(&["show", &point])), @"");
    assert_eq!(world.run(&["check"]).code, 7);
    assert_eq!(world.run(&["forget"]).code, 5);
}

#[test]
fn damaged_data_is_found_by_verify_and_check() {
    let mut world = World::ready();
    world.backup();
    let pack = files_below(&world.path("bucket/repo/data")).into_iter().max_by_key(|file| {
        std::fs::metadata(file).map_or(0, |meta| meta.len())
    });
    let pack = pack.expect("a pack");
    let mut bytes = std::fs::read(&pack).expect("read");
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    std::fs::set_permissions(&pack, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    std::fs::write(&pack, bytes).expect("write");
    for arguments in [&["verify"][..], &["check", "--data"], &["verify", "--sample", "100%"]] {
        let screen = world.run(arguments);
        assert_eq!(screen.code, 7, "{screen:?}");
        assert!(screen.out.contains("damage: "), "{screen:?}");
    }
}
