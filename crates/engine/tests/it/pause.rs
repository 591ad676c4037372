//! Pause steps, one by one: what they do, how they fail, and what the operator reads then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillpoint_core::Kind;
use stillpoint_core::platform::{HttpCall, PauseStep, Secret};
use stillpoint_engine::pause::{Act, Databases, Performer, Step};

use crate::faults::{Fault, FaultyStore};
use crate::hooks::Hooks;
use crate::world::{World, store};

fn call(url: String) -> HttpCall {
    HttpCall { url, method: "POST".to_owned(), headers: BTreeMap::new(), body: None, expect: Vec::new() }
}

fn act(url: String) -> Act {
    let step = PauseStep::Http { pause: call(url.clone()), resume: call(url) };
    Step::resolve(0, &step, &|_: &Secret| panic!("no secret is named")).expect("valid").pause
}

async fn perform(act: &Act, within: Duration) -> stillpoint_core::Result<Duration> {
    Performer::new(Databases::none()).expect("a client").perform(act, within, &|_| {}).await
}

fn command(words: &[&str]) -> Act {
    Act::Command { words: words.iter().map(|word| (*word).to_owned()).collect() }
}

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_hook_that_answers_success_pauses_and_its_headers_carry_resolved_secrets() {
    let hooks = Hooks::start();
    let mut hook = call(hooks.url("/pause"));
    hook.headers.insert("authorization".to_owned(), "env:HOOK_TOKEN".to_owned());
    let step = PauseStep::Http { pause: hook.clone(), resume: hook };
    let step = Step::resolve(0, &step, &|secret| {
        assert_eq!(secret.0, "env:HOOK_TOKEN");
        Ok("Bearer 8f3c".to_owned())
    });
    let pause = step.expect("valid").pause;
    perform(&pause, SOON).await.expect("the hook answers 204");
    assert!(hooks.is_paused());
    assert!(hooks.headers().iter().any(|line| line.to_lowercase() == "authorization: bearer 8f3c"));
    assert!(!format!("{pause:?}").contains("8f3c"), "secrets never show");
}

#[tokio::test]
async fn a_hook_that_returns_500_says_what_it_said() {
    let hooks = Hooks::start();
    let error = perform(&act(hooks.url("/broken")), SOON).await.expect_err("500");
    assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true));
    let expected = format!(
        "the hook POST {} answered 500 Internal Server Error, saying \"no connection to the queue\"",
        hooks.url("/broken")
    );
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_redirect_is_no_success() {
    let hooks = Hooks::start();
    let error = perform(&act(hooks.url("/moved")), SOON).await.expect_err("a login page is no pause");
    assert!(error.to_string().ends_with("answered 302 Found"), "{error}");
    assert!(!hooks.is_paused());
}

#[tokio::test]
async fn a_hook_that_hangs_is_left_at_the_time_out() {
    let hooks = Hooks::start();
    let began = Instant::now();
    let error = perform(&act(hooks.url("/hang")), Duration::from_millis(200)).await.expect_err("it hangs");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(error.kind(), Kind::TimedOut);
    assert_eq!(error.to_string(), format!("POST {} did not end within 200 ms", hooks.url("/hang")));
}

#[tokio::test]
async fn a_hook_that_is_not_there_is_unreachable() {
    let error = perform(&act("http://127.0.0.1:1/pause".to_owned()), SOON).await.expect_err("nobody listens");
    assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true));
    assert_eq!(error.to_string(), "the hook POST http://127.0.0.1:1/pause cannot be reached");
}

#[tokio::test]
async fn only_the_expected_status_counts_when_one_is_named() {
    let hooks = Hooks::start();
    let mut hook = call(hooks.url("/pause"));
    hook.expect = vec![200];
    let step = PauseStep::Http { pause: hook.clone(), resume: hook };
    let pause = Step::resolve(0, &step, &|_| panic!("no secret")).expect("valid").pause;
    let error = perform(&pause, SOON).await.expect_err("204 is not 200");
    assert!(error.to_string().ends_with("answered 204 No Content"), "{error}");
}

#[tokio::test]
async fn a_command_runs_without_a_shell_and_its_last_words_are_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    let flag = folder.path().join("a b;c");
    perform(&command(&["touch", flag.to_str().expect("text")]), SOON).await.expect("touch works");
    assert!(flag.exists());
    let error = perform(&command(&["sh", "-c", "echo out; echo the queue is full >&2; exit 3"]), SOON).await;
    let error = error.expect_err("exit 3");
    assert!(error.to_string().contains("failed: exit status: 3, saying \"the queue is full\""), "{error}");
    let error = perform(&command(&["/nowhere/pause"]), SOON).await.expect_err("no such program");
    assert_eq!((error.kind(), error.message()), (Kind::NotFound, "cannot run `/nowhere/pause`"));
}

#[tokio::test]
async fn a_command_that_runs_out_of_time_is_killed_with_all_its_children() {
    let folder = tempfile::tempdir().expect("a folder");
    let flag = folder.path().join("late");
    let script = format!("(sleep 1; touch {}) & wait", flag.display());
    let error = perform(&command(&["sh", "-c", &script]), Duration::from_millis(200)).await.expect_err("too slow");
    assert_eq!(error.kind(), Kind::TimedOut);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!flag.exists(), "what was given up must not act later");
}

/// A performer whose store "a" is stuck for `stuck` in the statement `pause`, and what it was seen to do.
fn stuck_database(stuck: Duration) -> (Performer, Arc<Mutex<Vec<String>>>) {
    let world = World::new("statements", &["a"]);
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&seen);
    let open = (world.surroundings.open_store)(&world.session(), &store("a"), world.folder.path());
    let plan = move |call: &str| {
        log.lock().expect("whole").push(call.to_owned());
        if call == "begin pause" { Fault::Stuck(stuck) } else { Fault::None }
    };
    let driver: Arc<dyn stillpoint_core::driver::Driver> =
        Arc::new(FaultyStore::new(open.expect("a store"), Arc::new(plan)));
    (Performer::new(Databases::new(Arc::new(move |_| Ok(Arc::clone(&driver))))).expect("a client"), seen)
}

fn statement(text: &str) -> Act {
    Act::Sql { store: store("a"), statement: text.to_owned() }
}

#[tokio::test]
async fn a_statement_that_was_left_at_its_time_out_does_not_have_the_last_word() {
    let (performer, seen) = stuck_database(Duration::from_millis(500));
    let error = performer.perform(&statement("pause"), Duration::from_millis(50), &|_| {}).await.expect_err("stuck");
    assert_eq!(error.kind(), Kind::TimedOut);
    performer.perform(&statement("resume"), SOON, &|_| {}).await.expect("after it");
    assert_eq!(*seen.lock().expect("whole"), ["begin pause", "end pause", "begin resume", "end resume"]);
}

#[tokio::test]
async fn a_statement_that_hangs_does_not_keep_writers_from_being_let_go() {
    let (performer, seen) = stuck_database(Duration::from_secs(4));
    performer.perform(&statement("pause"), Duration::from_millis(50), &|_| {}).await.expect_err("stuck");
    let began = Instant::now();
    performer.perform(&statement("resume"), SOON, &|_| {}).await.expect("beside it");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!performer.settled(Duration::from_millis(50)).await, "it still runs, and that is known");
    assert!(performer.settled(SOON).await);
    assert_eq!(*seen.lock().expect("whole"), ["begin pause", "begin resume", "end resume", "end pause"]);
}
