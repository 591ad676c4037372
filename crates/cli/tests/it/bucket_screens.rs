//! What goes wrong with buckets, keys and disks, and the screens that say so.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::{Screen, World, files_below};

#[test]
fn a_bucket_that_was_never_made() {
    let world = World::configured();
    world.write("stillpoint.key", "words that someone chose");
    let screen = world.run(&["list"]);
    assert_eq!(screen.code, 5);
    insta::assert_snapshot!(world.redact(&screen), @"
    error: there is no repository at [FOLDER]/bucket/repo
      hint: `stillpoint init` creates the bucket that platform.yaml names
    Nothing was changed. exit 5
    [exit 5]
    ");
}

#[test]
fn a_missing_key_file() {
    let world = World::ready();
    std::fs::remove_file(world.path("stillpoint.key")).expect("remove");
    insta::assert_snapshot!(world.redact(&world.run(&["backup"])), @"
    error: cannot read the secret file `[FOLDER]/stillpoint.key` (unlock the repository)
      caused by: No such file or directory (os error 2)
      hint: check the path and that this user may read it
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
    // `init` must not make a new key for data that an old one encrypted.
    insta::assert_snapshot!(world.redact(&world.run(&["init"])), @"
    error: the key file `[FOLDER]/stillpoint.key` does not exist, bucket [FOLDER]/bucket
      hint: the bucket holds a repository already: put its key file there, or type it from the recovery sheet
    Nothing was changed. exit 5
    [exit 5]
    ");
}

#[test]
fn a_wrong_password() {
    let world = World::ready();
    world.write("stillpoint.key", "not the password");
    let screen = world.run(&["backup"]);
    assert_eq!(screen.code, 5);
    insta::assert_snapshot!(world.redact(&screen), @"
    error: the key or password does not open the repository, key files tried 1
      hint: check `bucket.key`; the recovery sheet holds the key that `init` made
    No point was made. Nothing was changed. exit 5
    [exit 5]
    ");
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
    insta::assert_snapshot!(world.redact(&screen), @"
    error: this is not a key file: a digit is wrong or missing, in file:stillpoint.key
      hint: compare it with the recovery sheet
    Nothing was changed. exit 3
    [exit 3]
    ");
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
    insta::assert_snapshot!(text, @"
    error: the bucket holds a repository that this key does not open, bucket [THEIRS]/bucket
      caused by: the key or password does not open the repository, key files tried 1
      hint: name its key under `bucket.key`, or choose another bucket: nothing there is overwritten
    Nothing was changed. exit 5
    [exit 5]
    ");
    assert_eq!(files_below(&theirs.path("bucket")), before, "nothing of theirs was touched");
}

/// Runs the program behind `script`, in a mount namespace of its own; `None` where that is not allowed.
fn mounted(world: &World, script: &str, verb: &str) -> Option<Screen> {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_stillpoint")]);
        command.current_dir(world.path("")).env("STILLPOINT_STATE", world.path("state"));
        command
    };
    let allowed = unshare("mount -t tmpfs none /mnt").output().is_ok_and(|tried| tried.status.success());
    allowed.then(|| world.run_command(unshare(&format!("{script} && exec \"$0\" {verb}"))))
}

#[test]
fn a_read_only_bucket() {
    let world = World::ready();
    let bucket = world.path("bucket").display().to_string();
    let script = format!("mount --bind {bucket} {bucket} && mount -o remount,ro,bind {bucket}");
    let Some(screen) = mounted(&world, &script, "backup --quiet") else {
        return stillpoint_testkit::skip("a_read_only_bucket", "no mount namespaces here");
    };
    assert_eq!(screen.code, 5, "{screen:?}");
    for words in ["Read-only file system", "hint: ", "No point was made."] {
        assert!(screen.err.contains(words), "{screen:?}");
    }
}

#[test]
fn a_full_disk() {
    let world = World::ready();
    let noise = rusqlite::Connection::open(world.path("meta.db")).expect("open");
    noise.execute_batch("CREATE TABLE noise AS SELECT randomblob(3000000) AS bytes").expect("fill");
    // A disk of its own that is too small for the database.
    let bucket = world.path("bucket").display().to_string();
    let script = format!(
        "mkdir small && mount -t tmpfs -o size=1m none small && cp -a {bucket}/. small/ && mount --bind small {bucket}"
    );
    let Some(screen) = mounted(&world, &script, "backup --quiet") else {
        return stillpoint_testkit::skip("a_full_disk", "no mount namespaces here");
    };
    assert_eq!(screen.code, 9, "{screen:?}");
    for words in ["No space left on device", "hint: free some space", "No point was made."] {
        assert!(screen.err.contains(words), "{screen:?}");
    }
    assert_eq!(world.run(&["list", "--json"]).json()["points"].as_array().map(Vec::len), Some(0));
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
    insta::assert_snapshot!(world.redact(&list), @"
    churn · production · [FOLDER]/bucket
      no point that can be believed
    damaged: point [POINT 1]: the statefile was changed after it was written, or belongs to another repository
    [exit 5]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["show", &point])), @"
    error: the point `[POINT 1]` is there, but damaged, reason: the statefile was changed after it was written, or belongs to another repository
      hint: `stillpoint list` shows the points that are whole
    Nothing was changed. exit 5
    [exit 5]
    ");
    assert_eq!(world.run(&["check"]).code, 7);
    assert_eq!(world.run(&["forget"]).code, 5);
}

#[test]
fn damaged_data_is_found_by_verify_and_check() {
    let mut world = World::ready();
    world.backup();
    let pack = files_below(&world.path("bucket/repo/data"))
        .into_iter()
        .max_by_key(|file| std::fs::metadata(file).map_or(0, |meta| meta.len()));
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

#[test]
fn one_damaged_snapshot_concerns_its_own_point_only() {
    let mut world = World::ready();
    world.backup();
    let first = files_below(&world.path("bucket/repo/snapshots"));
    world.backup();
    let bytes = std::fs::read(&first[0]).expect("read");
    std::fs::set_permissions(&first[0], std::fs::Permissions::from_mode(0o644)).expect("chmod");
    std::fs::write(&first[0], &bytes[..bytes.len() / 2]).expect("write");
    let screen = world.run(&["verify", "latest"]);
    assert_eq!(screen.code, 0, "{screen:?}");
    let report = world.run(&["check", "--json"]);
    assert_eq!(report.code, 7, "{report:?}");
    let report = report.json();
    assert_eq!((report["points"].as_u64(), report["suffering"].as_array().map(Vec::len)), (Some(1), Some(1)));
}
