//! Each verb on a small platform: its screen, its JSON, what it leaves.

use std::os::unix::fs::PermissionsExt;

use crate::support::{World, files_below};

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[test]
fn init_looks_around_and_never_overwrites() {
    let world = World::empty();
    let screen = world.run(&["init"]);
    assert_eq!(screen.code, 0, "{screen:?}");
    let mode = |name: &str| std::fs::metadata(world.path(name)).expect("made").permissions().mode() & 0o777;
    assert_eq!((mode("stillpoint.key"), mode("stillpoint-recovery-sheet.txt")), (0o600, 0o600));
    let (yaml, key) = (world.path("platform.yaml"), world.path("stillpoint.key"));
    let before = (std::fs::read(&yaml).expect("read"), std::fs::read(&key).expect("read"));
    let again = world.run(&["init"]);
    assert_eq!(again.code, 0, "{again:?}");
    assert!(again.out.contains("was there already"), "{again:?}");
    assert_eq!(before, (std::fs::read(&yaml).expect("read"), std::fs::read(&key).expect("read")));
    let sheet = std::fs::read_to_string(world.path("stillpoint-recovery-sheet.txt")).expect("read");
    let in_one_line: String = sheet.split_whitespace().collect();
    assert!(in_one_line.contains(String::from_utf8_lossy(&before.1).trim()), "the sheet holds the key");
    let readme = std::fs::read_to_string(world.path("bucket").with_file_name("stillpoint-bucket").join("README.txt"));
    assert!(readme.expect("read").contains("restic"));
    assert_eq!(world.run(&["backup"]).code, 0);
}

#[test]
fn init_with_nothing_to_protect() {
    let world = World::empty();
    std::fs::remove_file(world.path("meta.db")).expect("remove");
    insta::assert_snapshot!(world.redact(&world.run(&["init"])), @"
    error: nothing to protect was found in [FOLDER]
      hint: name folders, databases or repositories: stillpoint init /srv/app.db postgresql://USER@HOST/DATABASE
    Nothing was changed. exit 3
    [exit 3]
    ");
    assert!(!world.path("platform.yaml").exists());
}

#[test]
fn a_point_from_backup_to_prune() {
    let mut world = World::ready();
    let first = world.backup();
    let second = world.backup_shown();
    insta::assert_snapshot!(world.redact(&second), @"
    point [POINT 2] · [DATE] [CLOCK] UTC · restorable · strict · skew [TIME]
      read [SIZE] of [SIZE] · new in the bucket [SIZE] · [TIME] · writers held back [TIME]
      stillpoint show [POI 2] what is in it
      stillpoint plan [POI 2] what a restore would do, and lose
    churn · production → [FOLDER]/bucket
      prepare 1 store ready [TIME]
      cut strict · no pause was needed [TIME]
      drain [SIZE] held, [SIZE] of them read [TIME]
      seal every pin checked [TIME]
      release [TIME]
    [exit 0]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["list"])), @"
    churn · production · [FOLDER]/bucket
      point taken age level stores holds new verdict
      [POINT 2] [DATE] [CLOCK] UTC [AGE] strict 1 [SIZE] [SIZE] restorable
      [POINT 1] [DATE] [CLOCK] UTC [AGE] strict 1 [SIZE] [SIZE] restorable
    [exit 0]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["show"])), @"
    point [POINT 2] · [DATE] [CLOCK] UTC · restorable · strict · skew [TIME]
      churn · production · [FOLDER]/bucket
      taken [AGE] · strict at the first try · writers held back [TIME]
      holds [SIZE] in 3 files · read [SIZE] · new in the bucket [SIZE]
    stores
      store driver holds items pinned position
      meta sqlite 3.54.1 [SIZE] 2,000 rows [TIME] sqlite-data-version meta.db inode [N] observer [N]
    without stillpoint
      restic -r [FOLDER]/bucket/repo --password-file [FOLDER]/stillpoint.key snapshots --tag point:[POINT 2]
      restic -r [FOLDER]/bucket/repo --password-file [FOLDER]/stillpoint.key ls [HEX]
      restic -r [FOLDER]/bucket/repo --password-file [FOLDER]/stillpoint.key restore [HEX] --target FOLDER
    [exit 0]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["verify", &first[..4]])), @"
    point [POINT 1] · [DATE] [CLOCK] UTC · restorable · strict · skew [TIME]
      100 % of its data re-read from the bucket: [SIZE] in [TIME]
    proven: statefile authentic, every piece as it was written
    [exit 0]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["check"])), @"
    [FOLDER]/bucket · 2 points · 2 packs · 5 pieces of data
      structure only; --data re-reads every byte
    sound
    [exit 0]
    ");
    insta::assert_snapshot!(world.redact(&world.run(&["key", "list"])).replace(&host(), "HOST"), @"
      key made on label
      [HEX] [DATE] [CLOCK] UTC HOST in use
    [exit 0]
    ");
    world.backup();
    insta::assert_snapshot!(world.redact(&world.run(&["forget", "--dry-run"])), @"
    [FOLDER]/bucket
      point taken why
      [POINT 3] [DATE] [CLOCK] UTC keep last 1 of 2, newest restorable point
      [POINT 2] [DATE] [CLOCK] UTC keep last 2 of 2
      [POINT 1] [DATE] [CLOCK] UTC would forget
    1 point would be forgotten. Nothing was changed.
    [exit 0]
    ");
    assert_eq!(world.run(&["list", "--json"]).json()["points"].as_array().map(Vec::len), Some(3));
    insta::assert_snapshot!(world.redact(&world.run(&["forget"])), @"
    [FOLDER]/bucket
      point taken why
      [POINT 3] [DATE] [CLOCK] UTC keep last 1 of 2, newest restorable point
      [POINT 2] [DATE] [CLOCK] UTC keep last 2 of 2
      [POINT 1] [DATE] [CLOCK] UTC forgotten
    1 point forgotten
      stillpoint prune frees their space
    [exit 0]
    ");
    assert_eq!(world.run(&["list", "--json"]).json()["points"].as_array().map(Vec::len), Some(2));
    let pruned = world.run(&["prune", "--max-unused", "0"]);
    assert_eq!(pruned.code, 0, "{pruned:?}");
    assert_eq!(world.run(&["check", "--data"]).code, 0);
}

#[test]
fn the_newest_point_is_never_forgotten() {
    let mut world = World::ready();
    let point = world.backup();
    let screen = world.run(&["forget", &point]);
    assert_eq!(screen.code, 7);
    insta::assert_snapshot!(world.redact(&screen), @"
    error: `[POINT 1]` is the newest restorable point
      hint: make a newer one first: `stillpoint backup`
    Nothing was changed. exit 7
    [exit 7]
    ");
}

#[test]
fn points_of_another_environment_are_not_forgotten() {
    let mut world = World::ready();
    world.backup();
    world.backup();
    let points = std::fs::read_dir(world.path("bucket/points")).expect("points");
    let ids: Vec<_> = points.map(|entry| entry.expect("entry").file_name().into_string().expect("text")).collect();
    world.edit("environment: production", "environment: staging");
    for id in &ids {
        let refused = world.run(&["forget", id]);
        assert!(refused.code != 0 && refused.err.contains("belongs to `churn` · `production`"), "{refused:?}");
    }
    assert_eq!(std::fs::read_dir(world.path("bucket/points")).expect("points").count(), 2);
}

#[test]
fn copies_stand_on_their_own() {
    let mut world = World::ready();
    world.backup();
    world.backup();
    let other = world.path("second").display().to_string();
    let copy = ["copy", "--to", &other, "--key", "env:OTHER"];
    let run = |arguments: &[&str]| {
        let mut command = world.command(arguments);
        command.env("OTHER", "words of the other bucket");
        world.run_command(command)
    };
    insta::assert_snapshot!(world.redact(&run(&copy)), @"
    [FOLDER]/bucket → [FOLDER]/second (created)
      copied [POINT 1]
      copied [POINT 2]
    2 points copied, 0 there already · new in the other bucket [SIZE]
    [exit 0]
    ");
    let again = run(&[&copy[..], &["--json"]].concat()).json();
    assert_eq!(
        (again["copied"].as_array().map(Vec::len), again["present"].as_array().map(Vec::len)),
        (Some(0), Some(2))
    );
    // What a prune leaves at the place of a point whose copy was interrupted.
    let void = br#"{"schema":"stillpoint.dev/void/v1","run":"0000000000"}"#;
    let id = again["present"][0].as_str().expect("an id");
    std::fs::write(world.path(&format!("second/points/{id}/statefile.json")), void).expect("write");
    let resumed = run(&[&copy[..], &["--json"]].concat()).json();
    assert_eq!(resumed["copied"], serde_json::json!([id]), "{resumed}");
    // What the other bucket lost comes again, although it has all points.
    let second = files_below(&world.path("second"));
    let pack = second.iter().find(|file| file.to_string_lossy().contains("/data/")).expect("a pack");
    std::fs::remove_file(pack).expect("remove");
    let healed = run(&[&copy[..], &["--json"]].concat()).json();
    assert!(healed["copied"] == serde_json::json!([]) && healed["blobs_healed"].as_u64() > Some(0), "{healed}");
    std::fs::remove_dir_all(world.path("bucket")).expect("remove");
    world.edit(&world.path("bucket").display().to_string(), &other);
    world.edit("file:stillpoint.key", "env:OTHER");
    let pruned = run(&["prune"]);
    assert_eq!(pruned.code, 0, "{pruned:?}");
    let verified = run(&["verify"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    assert_eq!(run(&["check", "--data"]).code, 0);
    assert!(files_below(&world.path("second")).iter().any(|file| file.ends_with("README.txt")));
}

#[test]
fn keys_come_and_go_without_rewriting_data() {
    let mut world = World::ready();
    world.backup();
    assert_eq!(world.run(&["key", "add", "--file", "second.key", "--label", "usb"]).code, 0);
    let refused = world.run(&["key", "add", "--file", "second.key"]);
    assert_eq!(refused.code, 6, "a key file is never overwritten: {refused:?}");
    assert_eq!(world.run(&["key", "rotate", "--file", "third.key"]).code, 0);
    assert_eq!(world.run(&["list"]).code, 5, "the old key opens nothing any more");
    world.edit("file:stillpoint.key", "file:third.key");
    assert_eq!(world.run(&["verify"]).code, 0);
    let keys = world.run(&["key", "list", "--json"]).json();
    let keys = keys["keys"].as_array().expect("a list");
    assert_eq!(keys.len(), 2, "{keys:?}");
    let find =
        |current: bool| keys.iter().find(|key| key["current"] == current).expect("there")["id"].as_str().expect("text");
    let in_use = world.run(&["key", "remove", &find(true)[..8]]);
    assert_ne!(in_use.code, 0, "nobody locks himself out: {in_use:?}");
    assert_eq!(world.run(&["key", "remove", &find(false)[..8]]).code, 0);
    assert_eq!(world.run(&["verify"]).code, 0);
}

#[test]
fn drivers_are_listed_explained_and_checked() {
    let world = World::configured();
    let drivers = world.run(&["driver", "list", "--json"]).json();
    let names: Vec<_> =
        drivers["drivers"].as_array().expect("a list").iter().map(|line| line["name"].clone()).collect();
    assert!(names.contains(&"sqlite".into()), "{names:?}");
    for name in names {
        let name = name.as_str().expect("text");
        assert!(world.run(&["driver", "policy", name]).out.len() > 200, "{name}");
        assert_eq!(world.run(&["driver", "schema", name]).json()["type"], "object", "{name}");
    }
    let check = world.run(&["driver", "check"]);
    assert_eq!(check.code, 0, "{check:?}");
    assert!(check.out.contains("passed"), "{check:?}");
}

#[test]
fn the_policy_of_a_bucket_is_printed_ready_to_paste() {
    let world = World::configured();
    let yaml = world.platform_yaml().replace(
        "retention:",
        "  models:\n    driver: objects\n    url: s3://models/production\n    mode: mirror\n    mirror: s3://copies\nretention:",
    );
    world.write("platform.yaml", &yaml);
    let printed = world.run(&["driver", "policy", "objects", "--store", "models"]);
    assert_eq!(printed.code, 0, "{printed:?}");
    let policy: serde_json::Value = serde_json::from_str(&printed.out).expect("JSON");
    assert_eq!(policy["Version"], "2012-10-17");
    assert!(printed.out.contains("arn:aws:s3:::models/production/*") && printed.out.contains("arn:aws:s3:::copies"));
    assert!(world.run(&["driver", "policy", "objects"]).out.contains("s3:GetObjectVersion"));
    let grant = "GRANT CONNECT ON DATABASE \"postgres\" TO \"backup\";";
    assert!(world.run(&["driver", "policy", "postgres"]).out.contains(grant));
    assert!(world.run(&["driver", "policy", "redis"]).out.contains("ACL SETUSER backup on ><password> +psync"));
    let other = world.run(&["driver", "policy", "objects", "--store", "meta"]);
    assert!(other.code != 0 && other.err.contains("stillpoint driver policy sqlite --store meta"), "{other:?}");
    let none = world.run(&["driver", "policy", "sqlite", "--store", "meta"]);
    assert!(none.code != 0 && none.err.contains("no policy to print"), "{none:?}");
}

#[test]
fn a_store_that_is_named_where_a_platform_is_described_already_is_not_passed_over_in_silence() {
    let world = World::ready();
    let again = world.run(&["init"]);
    assert!(again.code == 0 && !again.out.contains("was not added"), "{again:?}");
    let named = world.run(&["init", "redis://cache"]);
    assert!(named.out.contains("  note       what was named here was not added to it: "), "{named:?}");
}
