//! The watchdog process: it lets writers go when the engine cannot, and never otherwise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use stillpoint_core::id::RunId;
use stillpoint_engine::pause::Act;
use stillpoint_engine::watchdog::{self, Start, Watchdog};

use crate::helper;
use crate::hooks::Hooks;

fn run() -> RunId {
    RunId::from_random([7; 8])
}

fn http(url: String) -> Act {
    Act::Http { url, method: "POST".to_owned(), headers: BTreeMap::new(), body: None, expect: Vec::new() }
}

fn start(undo: Vec<Act>, report: &Path) -> Watchdog {
    let (run, databases, secrets) = (run(), BTreeMap::new(), BTreeMap::new());
    let start = Start { run: &run, undo, databases, secrets, report: report.to_owned() };
    Watchdog::start(&helper::watchdog_program(), start).expect("the watchdog starts")
}

fn pause(hooks: &Hooks) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let performer = stillpoint_engine::pause::Performer::new(stillpoint_engine::pause::Databases::none());
    let act = http(hooks.url("/pause"));
    runtime.block_on(performer.expect("a client").perform(&act, Duration::from_secs(5), &|_| {})).expect("paused");
    assert!(hooks.is_paused());
}

fn report_in(folder: &Path) -> PathBuf {
    folder.join("run.watchdog")
}

#[test]
fn a_watchdog_that_is_disarmed_undoes_nothing() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let watchdog = start(vec![http(hooks.url("/resume"))], &report_in(folder.path()));
    watchdog.arm(Duration::from_secs(30)).expect("armed");
    watchdog.disarm().expect("it was alive");
    assert!(hooks.switches().is_empty());
}

#[test]
fn a_watchdog_that_was_never_armed_undoes_nothing_when_the_pipe_closes() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let report = report_in(folder.path());
    drop(start(vec![http(hooks.url("/resume"))], &report));
    assert!(watchdog::wait_until_gone(&report, Duration::from_secs(5)).expect("readable"));
    assert!(hooks.switches().is_empty());
}

#[test]
fn it_fires_at_the_deadline_and_says_so() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let report = report_in(folder.path());
    let watchdog = start(vec![http(hooks.url("/resume"))], &report);
    watchdog.arm(Duration::from_millis(300)).expect("armed");
    pause(&hooks);
    assert!(hooks.runs_within(Duration::from_millis(1300)), "budget + 1 s");
    let fired = watchdog.fired();
    let began = Instant::now();
    while !*fired.borrow() && began.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(*fired.borrow(), "the engine is told");
    watchdog.disarm().expect("it was alive");
    let text = std::fs::read_to_string(report).expect("a report");
    assert!(text.contains("the pause budget is used up") && text.contains("writers were let go"), "{text}");
}

#[test]
fn an_undo_that_hangs_does_not_hold_up_the_others() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let report = report_in(folder.path());
    let slow = Act::Command { words: vec!["sleep".to_owned(), "6".to_owned()] };
    let watchdog = start(vec![http(hooks.url("/resume")), slow.clone(), slow], &report);
    watchdog.arm(Duration::from_secs(30)).expect("armed");
    pause(&hooks);
    drop(watchdog);
    assert!(hooks.runs_within(Duration::from_millis(4500)), "the first step is undone before the others have ended");
}

#[test]
fn it_tries_again_until_the_undo_succeeds_and_one_failing_step_does_not_hold_up_the_others() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let (first, other) = (folder.path().join("first"), Hooks::start());
    std::fs::write(&first, "paused").expect("writable");
    let remove = Act::Command { words: vec!["rm".into(), "-f".into(), first.to_str().expect("text").into()] };
    let undo = vec![remove, http(other.url("/resume")), http(hooks.url("/resume"))];
    hooks.fail_resumes(3);
    let report = report_in(folder.path());
    let watchdog = start(undo, &report);
    watchdog.arm(Duration::from_secs(30)).expect("armed");
    pause(&hooks);
    pause(&other);
    drop(watchdog);
    assert!(other.runs_within(Duration::from_secs(1)), "not held up by the one that fails");
    assert!(hooks.runs_within(Duration::from_secs(5)));
    assert!(!first.exists());
    assert!(watchdog::wait_until_gone(&report, Duration::from_secs(5)).expect("readable"));
    let text = std::fs::read_to_string(report).expect("a report");
    assert!(text.contains("the engine is gone") && text.contains("still trying"), "{text}");
    assert!(text.contains("answered 500"), "{text}");
}

#[test]
fn it_survives_the_terminals_signals() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let watchdog = start(vec![http(hooks.url("/resume"))], &report_in(folder.path()));
    watchdog.arm(Duration::from_secs(30)).expect("armed");
    for signal in ["INT", "TERM", "HUP", "QUIT"] {
        let status = std::process::Command::new("kill").args(["-s", signal, &watchdog.process().to_string()]).status();
        assert!(status.expect("kill is there").success());
    }
    std::thread::sleep(Duration::from_millis(200));
    pause(&hooks);
    drop(watchdog);
    assert!(hooks.runs_within(Duration::from_secs(1)), "it lived, and did its duty");
}

/// What `helper::watchdog_parent_process` does: pauses through a slow command and waits.
pub fn parent_that_waits_to_be_killed() {
    let variable = |name: &str| std::env::var(name).expect("set by the test");
    let undo = vec![http(variable("RESUME")), Act::Command { words: vec!["rm".into(), "-f".into(), variable("FLAG")] }];
    let watchdog = start(undo, Path::new(&variable("REPORT")));
    watchdog.arm(Duration::from_secs(30)).expect("armed");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let performer = stillpoint_engine::pause::Performer::new(stillpoint_engine::pause::Databases::none());
    let performer = performer.expect("a client");
    runtime.block_on(async {
        performer.perform(&http(variable("PAUSE")), Duration::from_secs(5), &|_| {}).await.expect("paused");
        let slow = format!("sleep 0.4; touch {}; sleep 60", variable("FLAG"));
        let slow = Act::Command { words: vec!["sh".into(), "-c".into(), slow] };
        performer.perform(&slow, Duration::from_secs(60), &watchdog.group_watcher()).await.expect("killed before");
    });
}

#[test]
fn it_fires_when_its_parent_is_killed_and_stops_the_pause_command_that_was_running() {
    let (hooks, folder) = (Hooks::start(), tempfile::tempdir().expect("a folder"));
    let (flag, report) = (folder.path().join("flag"), report_in(folder.path()));
    let mut parent = std::process::Command::new(std::env::current_exe().expect("a file"))
        .args(helper::arguments("helper::watchdog_parent_process"))
        .envs(helper::environment("watchdog-parent"))
        .envs([("RESUME", hooks.url("/resume")), ("PAUSE", hooks.url("/pause"))])
        .env("FLAG", &flag)
        .env("REPORT", &report)
        .stdout(Stdio::null())
        .spawn()
        .expect("the parent starts");
    let began = Instant::now();
    while !hooks.is_paused() {
        assert!(began.elapsed() < Duration::from_secs(20), "the parent pauses");
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(150));
    parent.kill().expect("killed");
    assert!(hooks.runs_within(Duration::from_secs(1)), "the writer runs within a second");
    parent.wait().expect("reaped");
    assert!(watchdog::wait_until_gone(&report, Duration::from_secs(5)).expect("readable"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!flag.exists(), "the pause command was stopped, or undone after it");
    assert!(!hooks.is_paused());
}
