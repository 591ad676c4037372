//! Each kind of mistake in `platform.yaml`: the message, its line and column, the exit code.

use crate::support::World;

fn screen(from: &str, to: &str) -> String {
    let world = World::configured();
    world.edit(from, to);
    let screen = world.run(&["backup"]);
    assert_eq!(screen.code, 3, "{screen:?}");
    world.redact(&screen)
}

#[test]
fn an_unknown_field_is_named_with_the_nearest_known_one() {
    insta::assert_snapshot!(screen("environment:", "enviroment:"), @"");
}

#[test]
fn a_driver_setting_is_checked_like_everything_else() {
    insta::assert_snapshot!(screen("    path:", "    pth:"), @"");
}

#[test]
fn a_wrong_type() {
    insta::assert_snapshot!(screen("retention: { last: 2 }", "retention: { last: two }"), @"");
}

#[test]
fn a_missing_field() {
    insta::assert_snapshot!(screen("platform: churn\n", ""), @"");
}

#[test]
fn a_bad_name() {
    insta::assert_snapshot!(screen("  meta:", "  Meta DB:"), @"");
}

#[test]
fn an_unknown_driver() {
    insta::assert_snapshot!(screen("driver: sqlite", "driver: sqlit"), @"");
}

#[test]
fn a_plain_secret_is_refused_and_not_repeated() {
    let screen = screen("file:stillpoint.key", "hunter2-is-my-password");
    assert!(!screen.contains("hunter2"), "{screen}");
    insta::assert_snapshot!(screen, @"");
}

#[test]
fn stores_that_are_named_and_not_there() {
    let references = "references:\n  - { from: meta, query: SELECT 1, to: artefacts, kind: keys }\npause:\n  \
                      - { kind: sql, store: mta, pause: SELECT 1, resume: SELECT 2 }\nretention:";
    insta::assert_snapshot!(screen("retention:", references), @"");
}

#[test]
fn needs_in_a_circle() {
    let second = "    needs: [other]\n  other: { driver: sqlite, path: /x.db, needs: [meta] }\nretention:";
    insta::assert_snapshot!(screen("retention:", second), @"");
}

#[test]
fn a_bad_duration() {
    insta::assert_snapshot!(screen("retention:", "cut: { pauseBudget: 5 parsecs }\nretention:"), @"");
}

#[test]
fn a_version_of_the_future() {
    insta::assert_snapshot!(screen("stillpoint.dev/v1", "stillpoint.dev/v2"), @"");
}

#[test]
fn broken_yaml() {
    insta::assert_snapshot!(screen("bucket:\n", "bucket: [\n"), @"");
}

#[test]
fn the_same_field_twice() {
    insta::assert_snapshot!(screen("platform: churn\n", "platform: churn\nplatform: other\n"), @"");
}

#[test]
fn a_relative_bucket() {
    insta::assert_snapshot!(screen("url: ", "url: backups"), @"");
}

#[test]
fn no_configuration_at_all() {
    let world = World::empty();
    insta::assert_snapshot!(world.redact(&world.run(&["backup"])), @"");
}

#[test]
fn mistakes_come_as_json_too() {
    let world = World::configured();
    world.edit("driver: sqlite", "driver: sqlit");
    let screen = world.run(&["backup", "--json"]);
    assert_eq!((screen.code, screen.err.as_str()), (3, ""));
    let json = screen.json();
    assert_eq!(json["exit"], 3);
    assert_eq!(json["error"]["kind"], "config");
    let mistake = &json["error"]["mistakes"][0];
    assert_eq!((mistake["line"].as_u64(), mistake["column"].as_u64()), (Some(9), Some(13)), "{json:#}");
}

#[test]
fn the_configuration_may_be_named_by_option_and_by_variable() {
    let world = World::ready();
    std::fs::rename(world.path("platform.yaml"), world.path("other.yaml")).expect("rename");
    assert_eq!(world.run(&["list"]).code, 3);
    assert_eq!(world.run(&["list", "--config", "other.yaml"]).code, 0);
    let mut command = world.command(&["list"]);
    command.env("STILLPOINT_CONFIG", world.path("other.yaml"));
    assert_eq!(world.run_command(command).code, 0);
}
