//! The example platform as a whole: PostgreSQL, Redis, S3, git and files, real servers, writers that
//! publish. What a cut across them reaches, and what people read when something is wrong.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use stillpoint_testkit::chaos;
use stillpoint_testkit::platform::{Options, Programs, Stage, TEMPLATE};
use stillpoint_testkit::proxy::Weather;

/// The programs, or `None` after saying why the test is skipped.
fn programs(test: &str) -> Option<Programs> {
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let stillpoint = PathBuf::from(env!("CARGO_BIN_EXE_stillpoint"));
    let registry = stillpoint.with_file_name("model-registry");
    if !registry.exists() {
        stillpoint_testkit::skip(test, "no application: cargo build -p model-registry");
        return None;
    }
    let found =
        (given("STILLPOINT_RIG_POSTGRES_BIN"), given("STILLPOINT_RIG_REDIS_SERVER"), given("STILLPOINT_RIG_S3_SERVER"));
    let (Some(postgres_bin), Some(redis_server), Some(minio)) = found else {
        stillpoint_testkit::skip(test, "no rig: cargo xtask rig up postgres redis s3");
        return None;
    };
    Some(Programs { postgres_bin, redis_server, minio, stillpoint, registry })
}

/// A platform whose writers never rest, with changes to its description.
fn stage(test: &str, per_second: f64, changes: &[(&str, &str)]) -> Option<Stage> {
    let programs = programs(test)?;
    let mut template = TEMPLATE.to_owned();
    for (from, to) in changes {
        assert!(template.contains(from), "{from}");
        template = template.replace(from, to);
    }
    let options = Options { per_second, template, overwrites: per_second == BUSY, ..Options::default() };
    Some(Stage::start(&programs, options).expect("the platform starts"))
}

/// Writers that publish once a minute: between two publications nothing happens.
const IDLE: f64 = 1.0 / 60.0;
/// As fast as they can.
const BUSY: f64 = 0.0;

fn run(stage: &Stage, arguments: &[&str]) -> Output {
    stage.engine(arguments).output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn json(stage: &Stage, arguments: &[&str]) -> Value {
    let output = run(stage, arguments);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A backup that makes a point, and its statefile.
#[track_caller]
fn backup(stage: &Stage) -> Value {
    json(stage, &["backup", "--json"])["statefile"].take()
}

/// A backup that makes none: its exit code, and what people read.
#[track_caller]
fn refused(stage: &Stage) -> (i32, String) {
    let output = run(stage, &["backup", "--quiet"]);
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert_eq!(json(stage, &["list", "--json"])["points"].as_array().map(Vec::len), Some(0), "{said}");
    (output.status.code().unwrap_or(-1), said)
}

/// Restores the newest point into fresh servers and judges it by the application's record.
#[track_caller]
fn comes_back(stage: &mut Stage) {
    let copy = stage.copy().expect("fresh targets");
    let point = json(stage, &["show", "latest", "--json"]);
    let path = stage.path().join("point.json");
    std::fs::write(&path, point.to_string()).expect("writable");
    let restored = json(stage, &["restore", "latest", "--into", "staging", "--yes", "--json"]);
    assert_eq!(restored["proven"], true, "{restored:#}");
    let verdict = stage.judge(&copy, &path).expect("judged");
    assert_eq!(verdict["violations"], 0, "{verdict:#}");
    assert!(verdict["expected"].as_u64() > Some(0), "{verdict:#}");
}

fn is_paused(stage: &Stage) -> bool {
    stage.oracle().expect("the application answers")["paused"] == true
}

#[track_caller]
fn writers_run_within(stage: &Stage, within: Duration) {
    let began = Instant::now();
    while is_paused(stage) {
        assert!(began.elapsed() < within, "writers are still held back");
        std::thread::sleep(Duration::from_millis(5));
    }
    stage.wait_for_progress().expect("writers get on");
}

/// Starts a backup and waits until the writers are held back.
fn backup_in_its_pause(stage: &Stage) -> std::process::Child {
    let mut command = stage.engine(&["backup", "--quiet"]);
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().expect("the program runs");
    while !is_paused(stage) {
        let ended = child.try_wait().expect("waits");
        assert!(ended.is_none(), "the run ended without a pause");
        std::thread::sleep(Duration::from_micros(300));
    }
    child
}

#[test]
fn idle_writers_need_no_pause_for_a_strict_cut() {
    let name = "idle_writers_need_no_pause_for_a_strict_cut";
    // A bucket cannot tell whether it is being written to: with one, strict always takes the pause.
    let removed = |begin: &str, end: &str| {
        let begin = TEMPLATE.find(begin).expect("there");
        &TEMPLATE[begin..begin + TEMPLATE[begin..].find(end).expect("there")]
    };
    let changes = [
        (removed("  artifacts:  ", "  code:  "), ""),
        (removed("  - from: meta\n    query: SELECT artifact_key", "  - from: meta\n    query: SELECT commit_id"), ""),
        (removed("  - from: cache", "\nretention"), ""),
        (removed("      artifacts: {", "      code: {"), ""),
    ];
    let Some(mut stage) = stage(name, IDLE, &changes) else { return };
    std::thread::sleep(Duration::from_millis(500));
    let point = backup(&stage);
    assert_eq!((&point["level"], &point["pause_micros"]), (&"strict".into(), &0.into()), "{point:#}");
    assert_eq!(point["stores"].as_object().map(serde_json::Map::len), Some(4));
    assert!(point["references"].as_array().expect("references").iter().all(|one| one["missing"] == 0), "{point:#}");
    let shown = text(&run(&stage, &["show"]).stdout);
    for expected in ["strict at the first try · writers held back 0 ms", "meta → code commits: ", "pinned  position"]
    {
        assert!(shown.contains(expected), "{expected} is not in:\n{shown}");
    }
    comes_back(&mut stage);
}

#[test]
fn busy_writers_are_held_back_by_each_kind_of_step() {
    let name = "busy_writers_are_held_back_by_each_kind_of_step";
    let http = TEMPLATE.split("pause:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("the step");
    let command = "  - kind: command\n    pause: [curl, -fsS, -X, POST, \"{hooks}/pause\"]\n    resume: [curl, -fsS, -X, POST, \"{hooks}/resume\"]";
    let (hold, let_go) = (
        "DO $$ BEGIN LOCK TABLE writing IN EXCLUSIVE MODE; UPDATE writing SET held = true; END $$",
        "UPDATE writing SET held = false",
    );
    let sql = format!("  - kind: sql\n    store: meta\n    pause: {hold}\n    resume: {let_go}");
    for (kind, step) in [("http", http), ("command", command), ("sql", &sql)] {
        let Some(mut stage) = stage(name, BUSY, &[(http, step)]) else { return };
        if kind == "sql" {
            stage.ask_database().expect("the application starts again");
        }
        let point = backup(&stage);
        assert_eq!(point["level"], "strict", "{kind}: {point:#}");
        assert!(point["pause_micros"].as_u64() > Some(0), "{kind}: {point:#}");
        assert_eq!(point["stores"].as_object().map(serde_json::Map::len), Some(5));
        writers_run_within(&stage, Duration::from_secs(1));
        comes_back(&mut stage);
    }
}

#[test]
fn without_a_pause_an_ordered_cut_pins_cursors_and_referrers_first() {
    let name = "without_a_pause_an_ordered_cut_pins_cursors_and_referrers_first";
    let pause = TEMPLATE.split("pause:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("the step");
    let changes = [
        (
            "  level: strict",
            "  level: ordered\n  cursors: [{ cursor: config, sink: cache }, { cursor: cache, sink: meta }]",
        ),
        (&*format!("pause:\n{pause}\n"), ""),
    ];
    let Some(mut stage) = stage(name, BUSY, &changes) else { return };
    for _ in 0..5 {
        let point = backup(&stage);
        let strict = point["level"] == "strict";
        assert!(strict || point["level"] == "ordered", "{point:#}");
        let pinned = |store: &str, side: usize| point["stores"][store]["pinned_micros"][side].as_u64().expect("micros");
        for (first, then) in [("config", "cache"), ("cache", "meta"), ("meta", "artifacts"), ("meta", "code")] {
            assert!(pinned(first, 1) <= pinned(then, 0), "{first} before {then}: {point:#}");
        }
        assert!(point["references"].as_array().expect("references").iter().all(|one| one["missing"] == 0), "{point:#}");
    }
    comes_back(&mut stage);
}

#[test]
fn what_a_row_names_and_nobody_holds_fails_the_run_by_name() {
    let name = "what_a_row_names_and_nobody_holds_fails_the_run_by_name";
    let Some(stage) = stage(name, IDLE, &[]) else { return };
    std::thread::sleep(Duration::from_millis(500));
    let dangling = "INSERT INTO models (name, version, artifact_key, commit_id, sha256, metrics) \
                    SELECT 'model-9', 1, 'models/none', commit_id, sha256, metrics FROM models LIMIT 1";
    stage.postgres.sql("model_registry", dangling).expect("inserts");
    let (code, said) = refused(&stage);
    assert_eq!(code, 7, "{said}");
    assert!(
        said.contains("references to keys of `artifacts` lead nowhere, e.g. `models/none` named by models id"),
        "{said}"
    );
    // The same as a warning: a point, and the row is named in it.
    let path = stage.path().join("platform.yaml");
    let text = std::fs::read_to_string(&path).expect("readable");
    std::fs::write(&path, text.replacen("    kind: keys\n", "    kind: keys\n    policy: warn\n", 1))
        .expect("writable");
    stage
        .postgres
        .sql("model_registry", "DELETE FROM events WHERE model = 1; DELETE FROM models WHERE id = 1")
        .expect("deletes");
    let point = backup(&stage);
    let reference = &point["references"][0];
    assert_eq!((&reference["missing"], &reference["examples"][0][0]), (&1.into(), &"models/none".into()), "{point:#}");
    assert!(reference["unreferenced"].as_u64() > Some(0), "an artifact lost its row: {point:#}");
    let shown = text_of(&stage, &["show"]);
    assert!(shown.contains("    missing: models/none, named by models id "), "{shown}");
    assert!(shown.contains(" that it does not name"), "{shown}");
}

fn text_of(stage: &Stage, arguments: &[&str]) -> String {
    text(&run(stage, arguments).stdout)
}

#[test]
fn a_server_that_is_down_is_named_before_anyone_is_paused() {
    let name = "a_server_that_is_down_is_named_before_anyone_is_paused";
    let Some(stage) = stage(name, BUSY, &[]) else { return };
    for (line, store) in [("postgres", "meta"), ("redis", "cache"), ("s3", "artifacts")] {
        stage.engine_lines[line].set(Weather::Cut);
        let (code, said) = refused(&stage);
        assert_eq!(code, 4, "{said}");
        assert!(said.contains(&format!("error: store `{store}`: ")), "{said}");
        assert!(said.contains("  hint: ") && said.contains("No point was made."), "{said}");
        stage.engine_lines[line].set(Weather::Fair);
    }
    assert_eq!(stage.oracle().expect("answers")["pauses"], 0, "nobody was paused");
    backup(&stage);
}

#[test]
fn a_bucket_whose_clock_is_a_minute_off_is_cut_at_its_own_time() {
    let name = "a_bucket_whose_clock_is_a_minute_off_is_cut_at_its_own_time";
    for ahead in [60, -60] {
        let Some(mut stage) = stage(name, BUSY, &[]) else { return };
        stage.engine_lines["s3"].skew(ahead);
        // Cut by any other clock, a point would lack what was written in the minute before, or hold what
        // came in the minute after.
        std::thread::sleep(Duration::from_secs(3));
        let point = backup(&stage);
        assert_eq!(point["level"], "strict", "{ahead} s: {point:#}");
        assert_eq!(point["verdict"], "restorable", "{ahead} s: {point:#}");
        assert!(point["skew_micros"].as_u64() < Some(5_000_000), "{ahead} s: {point:#}");
        let time =
            |value: &Value| value.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok()).expect("a time");
        let artifacts = &point["stores"]["artifacts"];
        let (told, ours) = (time(&artifacts["position"]["text"]), time(&artifacts["pinned_at"][0]));
        let off = told.as_second() - ours.as_second();
        assert!((off - ahead).abs() <= 5, "the service's own time is {off} s ahead of ours: {artifacts:#}");
        std::thread::sleep(Duration::from_secs(2));
        comes_back(&mut stage);
    }
}

#[test]
fn hooks_that_fail_or_hang_leave_writers_running_and_no_point() {
    let name = "hooks_that_fail_or_hang_leave_writers_running_and_no_point";
    let wrong = ("{hooks}/pause", "{hooks}/nowhere");
    let Some(failing) = stage(name, BUSY, &[wrong]) else { return };
    let (_, said) = refused(&failing);
    assert!(said.contains("/nowhere answered 404 Not Found") && said.contains("pause step 1"), "{said}");
    writers_run_within(&failing, Duration::from_secs(1));
    drop(failing);
    let slow =
        ("  - kind: http\n    pause: { url: \"{hooks}/pause\" }", "  - kind: command\n    pause: [sleep, \"60\"]");
    let undo = ("resume: { url: \"{hooks}/resume\" }", "resume: [\"true\"]");
    let short = ("pauseBudget: 5s", "pauseBudget: 1s");
    let Some(hanging) = stage(name, BUSY, &[slow, undo, short]) else { return };
    let (_, said) = refused(&hanging);
    assert!(said.contains("pause budget") || said.contains("did not end within"), "{said}");
    writers_run_within(&hanging, Duration::from_secs(1));
}

#[test]
fn an_engine_that_is_killed_in_the_pause_leaves_no_point_and_writers_run() {
    let name = "an_engine_that_is_killed_in_the_pause_leaves_no_point_and_writers_run";
    let Some(mut stage) = stage(name, BUSY, &[]) else { return };
    // Slow lines make the pause long enough to be hit.
    stage.engine_lines["postgres"].set(Weather::Slow(Duration::from_millis(30)));
    let mut child = backup_in_its_pause(&stage);
    child.kill().expect("kills");
    child.wait().expect("waits");
    writers_run_within(&stage, Duration::from_secs(6));
    assert_eq!(json(&stage, &["list", "--json"])["points"].as_array().map(Vec::len), Some(0));
    stage.engine_lines["postgres"].set(Weather::Fair);
    let next = run(&stage, &["backup"]);
    let said = text(&next.stderr);
    assert!(next.status.success() && said.contains("had not ended; what it held is released now"), "{said}");
    comes_back(&mut stage);
}

#[test]
fn an_engine_that_stands_still_in_the_pause_is_overruled_by_its_watchdog() {
    let name = "an_engine_that_stands_still_in_the_pause_is_overruled_by_its_watchdog";
    let changes = [("pauseBudget: 5s", "pauseBudget: 2s")];
    let Some(stage) = stage(name, BUSY, &changes) else { return };
    stage.engine_lines["postgres"].set(Weather::Slow(Duration::from_millis(30)));
    let mut child = backup_in_its_pause(&stage);
    chaos::suspend(&child).expect("stops");
    writers_run_within(&stage, Duration::from_secs(3));
    chaos::wake(&child).expect("wakes");
    let status = child.wait().expect("waits");
    assert!(!status.success(), "its proof is gone");
    assert_eq!(json(&stage, &["list", "--json"])["points"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_store_that_is_lost_in_the_cut_ends_the_run_and_the_pause() {
    let name = "a_store_that_is_lost_in_the_cut_ends_the_run_and_the_pause";
    let Some(stage) = stage(name, BUSY, &[]) else { return };
    stage.engine_lines["postgres"].set(Weather::Slow(Duration::from_millis(30)));
    let child = backup_in_its_pause(&stage);
    stage.engine_lines["redis"].set(Weather::Cut);
    let output = child.wait_with_output().expect("waits");
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("store `cache`"), "{said}");
    assert!(said.contains("No point was made."), "{said}");
    writers_run_within(&stage, Duration::from_secs(6));
}

#[test]
fn a_bucket_that_is_full_is_named() {
    let name = "a_bucket_that_is_full_is_named";
    let Some(stage) = stage(name, IDLE, &[]) else { return };
    let folder = stage.path().join("small");
    std::fs::create_dir_all(&folder).expect("writable");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&folder)
        .stderr(std::process::Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return stillpoint_testkit::skip(name, "a small file system needs root");
    }
    let _mount = Mount(&folder);
    let path = stage.path().join("platform.yaml");
    let described = std::fs::read_to_string(&path).expect("readable");
    let bucket = format!("url: {}", stage.path().join("bucket").display());
    assert!(described.contains(&bucket));
    std::fs::write(&path, described.replace(&bucket, &format!("url: {}", folder.display()))).expect("writable");
    assert!(run(&stage, &["init"]).status.success());
    let filled = stage.registry(&["fill", "app.json", "20"]).output().expect("fills");
    assert!(filled.status.success(), "{}", text(&filled.stderr));
    let (_, said) = refused(&stage);
    assert!(said.contains("No space left on device") && said.contains("No point was made."), "{said}");
}

/// A mounted file system, taken off at the end.
struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg(self.0).status());
    }
}
