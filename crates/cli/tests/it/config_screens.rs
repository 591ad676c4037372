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
    insta::assert_snapshot!(screen("environment:", "enviroment:"), @"
    error: platform.yaml:3:1: there is no field `enviroment` in the file
      hint: did you mean `environment`?
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_driver_setting_is_checked_like_everything_else() {
    insta::assert_snapshot!(screen("    path:", "    pth:"), @"
    error: platform.yaml:10:5: there is no field `pth` in `stores.meta`
      hint: did you mean `path`?
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_wrong_type() {
    insta::assert_snapshot!(screen("retention: { last: 2 }", "retention: { last: two }"), @"
    error: platform.yaml:11:20: `retention.last` must be a whole number, not a text
      hint: write it without quotes and units
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_missing_field() {
    insta::assert_snapshot!(screen("platform: churn\n", ""), @"
    error: platform.yaml:1:1: the file needs the field `platform`
      hint: add `platform:` (the platform's name, unique in its bucket)
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_bad_name() {
    insta::assert_snapshot!(screen("  meta:", "  Meta DB:"), @"
    error: platform.yaml:8:3: `Meta DB` is not a valid store name: lower-case letters, digits and `-`, first and last a letter or digit
      hint: for example `meta-db`
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn an_unknown_driver() {
    insta::assert_snapshot!(screen("driver: sqlite", "driver: sqlit"), @"
    error: platform.yaml:9:13: there is no driver `sqlit`
      hint: did you mean `sqlite`?
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_plain_secret_is_refused_and_not_repeated() {
    let screen = screen("file:stillpoint.key", "hunter2-is-my-password");
    assert!(!screen.contains("hunter2"), "{screen}");
    insta::assert_snapshot!(screen, @"
    error: platform.yaml:6:8: a secret may not stand here in plain text
      hint: write `env:NAME`, `file:/path` or `command:program arguments`
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn stores_that_are_named_and_not_there() {
    let references = "references:\n  - { from: meta, query: SELECT 1, to: artefacts, kind: keys }\npause:\n  \
                      - { kind: sql, store: mta, pause: SELECT 1, resume: SELECT 2 }\nretention:";
    insta::assert_snapshot!(screen("retention:", references), @"
    error: platform.yaml:12:40: `to` names the store `artefacts`, which is not under `stores`
      hint: stores: meta
    error: platform.yaml:14:25: `store` names the store `mta`, which is not under `stores`
      hint: did you mean `meta`?
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn needs_in_a_circle() {
    let second = "    needs: [other]\n  other: { driver: sqlite, path: /x.db, needs: [meta] }\nretention:";
    insta::assert_snapshot!(screen("retention:", second), @"
    error: platform.yaml:12:49: stores need each other in a circle: meta → other → meta
      hint: remove one of these `needs`; a restore must begin somewhere
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_bad_duration() {
    insta::assert_snapshot!(screen("retention:", "cut: { pauseBudget: 5 parsecs }\nretention:"), @"
    error: platform.yaml:11:21: `cut.pauseBudget`: `5 parsecs` is not a span of time
      hint: for example 800ms, 5s, 36h or 7d
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_version_of_the_future() {
    insta::assert_snapshot!(screen("stillpoint.dev/v1", "stillpoint.dev/v2"), @"
    error: platform.yaml:1:13: this version of stillpoint does not read apiVersion `stillpoint.dev/v2`
      hint: write `apiVersion: stillpoint.dev/v1`
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn broken_yaml() {
    insta::assert_snapshot!(screen("bucket:\n", "bucket: [\n"), @"
    error: platform.yaml:6:6: not valid YAML: while parsing a flow mapping, did not find expected ',' or '}'
      hint: indent with spaces, and put odd texts in quotes
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn the_same_field_twice() {
    insta::assert_snapshot!(screen("platform: churn\n", "platform: churn\nplatform: other\n"), @"
    error: platform.yaml:3:1: not valid YAML: duplicate mapping key: platform
      hint: keep one of the two
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn a_relative_bucket() {
    insta::assert_snapshot!(screen("url: ", "url: backups"), @"
    error: platform.yaml:5:8: `backups[FOLDER]/bucket` is not an absolute path or an address
      hint: for example /srv/backup, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
}

#[test]
fn no_configuration_at_all() {
    let world = World::empty();
    insta::assert_snapshot!(world.redact(&world.run(&["backup"])), @"
    error: there is no `platform.yaml`
      hint: `stillpoint init` writes one; or name yours with --config FILE or STILLPOINT_CONFIG
    No point was made. Nothing was changed. exit 3
    [exit 3]
    ");
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
