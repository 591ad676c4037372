//! `plan`, `apply`, `restore`, `export`: what comes back, and what is refused.

use std::path::Path;

use crate::support::{ROWS, World};

fn rows(database: &Path) -> u32 {
    let connection = rusqlite::Connection::open(database).expect("open");
    connection.query_row("SELECT count(*) FROM models", [], |row| row.get(0)).expect("count")
}

#[test]
fn a_point_comes_back_beside_what_is_running() {
    let mut world = World::ready();
    world.backup();
    let lost = rusqlite::Connection::open(world.path("meta.db")).expect("open");
    lost.execute("DELETE FROM models", []).expect("delete");
    insta::assert_snapshot!(world.redact(&world.run(&["plan", "--to", "r"])), @"
    restore of churn (point [POINT 1], [DATE] [CLOCK] UTC) into [FOLDER]/r
      you lose meta: everything after [DATE] [CLOCK] UTC ([AGE])
      overwrites nothing
      fence clear · 1 identity compared · stamps absent
      steps 1 meta (sqlite) [SIZE] 2,000 rows
    plan [HEX] · nothing was changed; --save FILE keeps it for apply
    [exit 0]
    ");
    assert!(!world.path("r").exists(), "a plan writes nothing");
    let restored = world.run(&["restore", "latest", "--to", "r", "--yes", "--quiet"]);
    assert_eq!(restored.code, 0, "{restored:?}");
    assert!(restored.out.contains("proven in "), "{restored:?}");
    assert_eq!((rows(&world.path("r/meta/meta.db")), rows(&world.path("meta.db"))), (ROWS, 0));
    let again = world.run(&["restore", "latest", "--to", "r", "--quiet"]);
    assert_eq!(again.code, 6, "what was restored is not overwritten: {again:?}");
}

#[test]
fn nothing_is_restored_over_its_source_unless_its_identity_is_typed() {
    let mut world = World::ready();
    world.backup();
    let lost = rusqlite::Connection::open(world.path("meta.db")).expect("open");
    lost.execute("DELETE FROM models", []).expect("delete");
    drop(lost);
    let folder = world.path("").display().to_string();
    world.edit(
        "retention:",
        &format!("targets: {{ copy: {{ stores: {{ meta: {{ path: {folder}meta.db }} }} }} }}\nretention:"),
    );
    let over = world.run(&["plan", "--into", "copy"]);
    assert_eq!(over.code, 6, "{over:?}");
    assert_eq!(world.run(&["restore", "--into", "copy", "--quiet"]).code, 6);
    assert_eq!(world.run(&["restore", "latest", "--in-place", "--quiet"]).code, 6);
    let wrong = world.run(&["restore", "latest", "--in-place", "--confirm", "/somewhere/else", "--quiet"]);
    assert_eq!(wrong.code, 6, "{wrong:?}");
    insta::assert_snapshot!(world.redact(&wrong), @"
    error: store `meta`: replacing [FOLDER]/meta.db in place was not confirmed (fence)
      hint: type its identity: --in-place --confirm [FOLDER]/meta.db
    Nothing was changed. exit 6
    [exit 6]
    ");
    assert_eq!(rows(&world.path("meta.db")), 0, "nothing was touched");
    let typed = std::fs::canonicalize(world.path("meta.db")).expect("there").display().to_string();
    let right = world.run(&["restore", "latest", "--in-place", "--confirm", &typed, "--quiet"]);
    assert_eq!(right.code, 0, "{right:?}");
    assert_eq!(rows(&world.path("meta.db")), ROWS);
}

#[test]
fn references_that_cannot_be_checked_are_told_beside_what_was_restored() {
    let mut world = World::ready();
    std::fs::create_dir(world.path("objects")).expect("create");
    let folder = world.path("").display().to_string();
    // A program that knows where the platform is, and nothing of copies.
    world.edit(
        "retention:",
        &format!(
            "  models:\n    driver: objects\n    path: {folder}objects\nreferences:\n  \
             - {{ from: meta, to: models, kind: keys, query: \"command:sh -c 'test ${{#STILLPOINT_POSITION}} -gt 0'\" }}\nretention:"
        ),
    );
    world.backup();
    let restored = world.run(&["restore", "latest", "--to", "r", "--yes", "--quiet"]);
    assert_eq!(restored.code, 7, "{restored:?}");
    for part in [
        "  failed: store `meta`: `sh` failed: exit status: 1, while references were checked from `meta` to `models` (references); hint: ",
        "NOT proven: every store is restored, but what failed above was not checked.",
    ] {
        assert!(restored.out.contains(part), "{part}: {restored:?}");
    }
    assert!(!restored.all().contains("Nothing was changed"), "{restored:?}");
    assert_eq!(rows(&world.path("r/meta/meta.db")), ROWS);
}

#[test]
fn apply_carries_out_the_reviewed_plan_or_refuses() {
    let mut world = World::ready();
    world.backup();
    let planned = world.run(&["plan", "--to", "r", "--save", "plan.json", "--json"]);
    assert_eq!(planned.code, 0, "{planned:?}");
    let hash = planned.json()["hash"].as_str().expect("a hash").to_owned();
    let text = std::fs::read_to_string(world.path("plan.json")).expect("read");
    world.write("forged.json", &text.replace("\"replaces\": false", "\"replaces\": true"));
    for arguments in [&["apply", "forged.json", "--quiet"][..], &["apply", "plan.json", "0123456789ab", "--quiet"]] {
        let refused = world.run(arguments);
        assert_eq!(refused.code, 6, "{refused:?}");
        assert!(refused.err.contains("Nothing was changed."), "{refused:?}");
    }
    assert!(!world.path("r").exists());
    assert_eq!(world.run(&["plan", "--to", "r", "--save", "plan.json"]).code, 6, "a plan is never overwritten");
    let applied = world.run(&["apply", "plan.json", &hash[..12], "--quiet"]);
    assert_eq!(applied.code, 0, "{applied:?}");
    assert_eq!(rows(&world.path("r/meta/meta.db")), ROWS);
}

#[test]
fn export_writes_plain_files_that_say_how_to_restore() {
    let mut world = World::ready();
    world.backup();
    let exported = world.run(&["export", "latest", "meta", "plain"]);
    assert_eq!(exported.code, 0, "{exported:?}");
    let how = std::fs::read_to_string(world.path("plain/HOW-TO-RESTORE.txt")).expect("the page is there");
    assert!(how.len() > 100, "{how}");
    assert_eq!(world.run(&["export", "latest", "meta", "plain"]).code, 6, "a folder with content is refused");
    let unknown = world.run(&["export", "latest", "mete", "other"]);
    assert_eq!(unknown.code, 5, "{unknown:?}");
    assert!(unknown.err.contains("stores of the point: meta"), "{unknown:?}");
}
