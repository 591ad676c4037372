//! Whole runs on memory stores: what becomes a point, what does not, and what the operator reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::error::{Error, Kind};
use stillpoint_core::statefile::{Level, Verdict};
use stillpoint_drivers::memory::Store;
use stillpoint_engine::progress::{Progress, Update};

use crate::faults::{Fault, FaultyStore, Plan, WriteFault};
use crate::hooks::Hooks;
use crate::world::{World, http_step};

fn fail_at(call: &'static str, error: impl Fn() -> Error + Send + Sync + 'static) -> Plan {
    Arc::new(move |now| if now == call { Fault::Fail(error()) } else { Fault::None })
}

/// Writes to the world's stores all the time, but not while the hooks say pause.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn start(world: &World, hooks: Option<Hooks>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stores: Vec<Store> = world.platform.stores.keys().map(|name| world.memory(name.as_str())).collect();
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for number in 0u64.. {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                if !hooks.as_ref().is_some_and(Hooks::is_paused) {
                    for store in &stores {
                        store.put("written", number.to_string());
                    }
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the writer does not panic");
        }
    }
}

#[derive(Default)]
struct Recording(std::sync::Mutex<Vec<Update>>);

impl Progress for Recording {
    fn update(&self, update: Update) {
        self.0.lock().expect("whole").push(update);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_platform_gives_a_strict_point_at_the_first_try_without_any_pause() {
    let hooks = Hooks::start();
    let mut world = World::new("quiet", &["a", "b", "c"]);
    world.platform.pause = vec![http_step(hooks.url("/pause"), hooks.url("/resume"))];
    let recording = Arc::new(Recording::default());
    world.surroundings.progress = Arc::<Recording>::clone(&recording);
    let outcome = world.backup().await.expect("a point");
    let point = &outcome.statefile;
    assert_eq!((point.level, point.verdict, point.cut_tries), (Level::Strict, Verdict::Restorable, 1));
    assert_eq!((point.pause_micros, point.fencing), (0, 1));
    assert!(hooks.switches().is_empty(), "nobody was paused");
    for name in ["a", "b", "c"] {
        assert_eq!(world.stored(point, name), world.memory(name).content(), "{name}");
    }
    assert_eq!(world.listing().points[0], *point);
    world.assert_points(1);
    world.assert_nothing_held();
    let updates = recording.0.lock().expect("whole");
    let ended: Vec<_> = updates
        .iter()
        .filter_map(|update| match update {
            Update::PhaseEnded { outcome, .. } => Some(outcome.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(ended[..2], ["3 stores ready", "strict · no pause was needed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_point_takes_the_earlier_one_as_its_parent_and_reads_only_what_changed() {
    let world = World::new("next", &["a", "b"]);
    let first = world.backup().await.expect("a point").statefile;
    world.memory("a").put("a/3", "changed");
    let second = world.backup().await.expect("a point");
    assert_eq!(second.statefile.parent, Some(first.point.clone()));
    assert_eq!((second.statefile.fencing, second.stores.len()), (2, 2));
    assert!(second.statefile.totals.bytes_read < first.totals.bytes_read / 2, "{:?}", second.statefile.totals);
    assert_eq!(world.stored(&second.statefile, "a"), world.memory("a").content());
    assert_ne!(world.stored(&first, "a"), world.memory("a").content());
    world.assert_points(2);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_writers_never_rest_they_are_paused_and_the_point_is_strict() {
    let hooks = Hooks::start();
    let mut world = World::new("busy", &["a", "b", "c"]);
    world.platform.pause = vec![http_step(hooks.url("/pause"), hooks.url("/resume"))];
    world.platform.cut.optimistic_tries = 2;
    // Each observation sees another position, however quick the machine is.
    let busy = (world.memory("a"), hooks.clone());
    world.wrap("a", move |inner| {
        let (store, hooks) = busy.clone();
        FaultyStore::new(
            inner,
            Arc::new(move |call| {
                if call == "observe" && !hooks.is_paused() {
                    store.put("tick", "tock");
                }
                Fault::None
            }),
        )
    });
    let writer = Writer::start(&world, Some(hooks.clone()));
    let outcome = world.backup().await.expect("a point");
    drop(writer);
    let point = &outcome.statefile;
    assert_eq!((point.level, point.cut_tries), (Level::Strict, 3));
    assert!(point.pause_micros > 0);
    let switches: Vec<_> = hooks.switches().into_iter().map(|(_, paused)| paused).collect();
    assert_eq!(switches, [true, false]);
    assert!(hooks.longest_pause() < Duration::from_secs(5));
    let cut = outcome.phases.iter().map(|phase| phase.outcome.as_str()).find(|text| text.starts_with("strict"));
    let cut = cut.expect("the cut's line");
    assert!(cut.starts_with("strict · writers were paused for ") && cut.ends_with(" ms (3rd try)"), "{cut}");
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_pause_steps_a_busy_platform_fails_unless_a_lower_level_is_accepted_by_name() {
    let mut world = World::new("busier", &["a", "b"]);
    let store = world.memory("a");
    world.wrap("a", move |inner| {
        let store = store.clone();
        FaultyStore::new(
            inner,
            Arc::new(move |call| {
                if call == "observe" {
                    store.put("tick", "tock");
                }
                Fault::None
            }),
        )
    });
    let error = world.backup().await.expect_err("not strict");
    assert_eq!(error.kind(), Kind::Unproven);
    let expected = "the level `strict` was not reached: store `a` was written to during every try of the cut (cut)";
    assert_eq!(error.to_string(), expected);
    assert_eq!(error.hint_text(), Some("declare pause steps, or accept `independent` under cut.accept"));
    world.assert_points(0);
    world.assert_nothing_held();
    world.platform.cut.accept = vec![Level::Independent];
    let point = world.backup().await.expect("accepted").statefile;
    assert_eq!((point.level, point.level_asked, point.cut_tries), (Level::Independent, Level::Strict, 5));
}

/// A world where only a pause proves anything, because store `b` cannot tell of writes.
fn blind_world(prefix: &str, pause: String, resume: String) -> World {
    let mut world = World::new(prefix, &["a", "b"]);
    world.platform.pause = vec![http_step(pause, resume)];
    world.wrap("b", |inner| FaultyStore { blind: true, ..FaultyStore::new(inner, Arc::new(|_| Fault::None)) });
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_over_budget_lets_writers_go_first_and_then_fails() {
    let hooks = Hooks::start();
    let mut world = blind_world("slow", hooks.url("/pause"), hooks.url("/resume"));
    world.platform.cut.pause_budget = "500ms".to_owned();
    world.wrap("a", |inner| {
        let slow = |call: &str| if call == "cut" { Fault::Wait(Duration::from_secs(30)) } else { Fault::None };
        FaultyStore::new(inner, Arc::new(slow))
    });
    let began = Instant::now();
    let error = world.backup().await.expect_err("too slow");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(error.kind(), Kind::TimedOut);
    assert_eq!(error.to_string(), "the cut did not come to an end within the pause budget (cut)");
    assert_eq!(error.hint_text(), Some("writers run again; raise cut.pauseBudget if they can bear it"));
    assert!(!hooks.is_paused() && hooks.longest_pause() <= Duration::from_millis(500), "{:?}", hooks.longest_pause());
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_over_budget_degrades_where_the_lower_level_is_accepted() {
    let hooks = Hooks::start();
    let mut world = blind_world("degrade", hooks.url("/pause"), hooks.url("/resume"));
    world.platform.cut.pause_budget = "500ms".to_owned();
    world.platform.cut.accept = vec![Level::Independent];
    let slow = hooks.clone();
    world.wrap("a", move |inner| {
        let hooks = slow.clone();
        let plan = move |call: &str| {
            if call == "cut" && hooks.is_paused() { Fault::Wait(Duration::from_secs(30)) } else { Fault::None }
        };
        FaultyStore::new(inner, Arc::new(plan))
    });
    let point = world.backup().await.expect("degraded").statefile;
    assert_eq!(point.level, Level::Independent);
    assert!(hooks.longest_pause() <= Duration::from_millis(500), "{:?}", hooks.longest_pause());
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_hangs_costs_the_budget_and_not_more() {
    let hooks = Hooks::start();
    let mut world = blind_world("hang", hooks.url("/hang"), hooks.url("/resume"));
    world.platform.cut.pause_budget = "500ms".to_owned();
    let began = Instant::now();
    let error = world.backup().await.expect_err("it hangs");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(error.to_string(), "the cut did not come to an end within the pause budget (cut)");
    assert_eq!(hooks.switches().last().map(|(_, paused)| *paused), Some(false), "undone although it never answered");
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_returns_500_ends_the_run_and_is_undone() {
    let hooks = Hooks::start();
    let world = blind_world("broken", hooks.url("/broken"), hooks.url("/resume"));
    let error = world.backup().await.expect_err("500");
    let expected = format!(
        "the hook POST {} answered 500 Internal Server Error, saying \"no connection to the queue\" (pause step 1)",
        hooks.url("/broken")
    );
    assert_eq!((error.kind(), error.to_string()), (Kind::Unreachable, expected));
    assert_eq!(hooks.switches().last().map(|(_, paused)| *paused), Some(false));
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_cannot_be_let_go_are_named_and_the_next_start_tries_first_of_all() {
    let hooks = Hooks::start();
    let world = blind_world("stuck", hooks.url("/pause"), hooks.url("/resume"));
    // Five tries of the engine fail; the watchdog's tries fail too for a while.
    hooks.fail_resumes(7);
    let error = world.backup().await.expect_err("no resume");
    let hint = error.hint_text().expect("a hint").to_owned();
    assert_eq!(hint, "writers may still be held back: run it by hand");
    assert!(hooks.runs_within(Duration::from_secs(10)), "the watchdog goes on until it succeeds");
    let outcome = world.backup().await.expect("a point");
    assert_eq!(outcome.recovered.len(), 1);
    world.assert_points(1);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_looked_up_and_found() {
    let mut world = World::new("ambiguous", &["a"]);
    world.break_bucket(Arc::new(|name| {
        if name.ends_with("statefile.json") { WriteFault::AnswerLost } else { WriteFault::None }
    }));
    let point = world.backup().await.expect("it was written").statefile;
    assert_eq!(world.listing().points[0].point, point.point);
    world.assert_points(1);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_in_place_although_its_write_failed_for_good_keeps_its_snapshot() {
    let mut world = World::new("unsynced", &["a"]);
    world.break_bucket(Arc::new(|name| {
        let unsynced = || Error::io("cannot sync the directory", std::io::Error::other("disk"));
        if name.ends_with("statefile.json") { WriteFault::WrittenBut(unsynced()) } else { WriteFault::None }
    }));
    let point = world.backup().await.expect("it is in place").statefile;
    assert_eq!(world.listing().points[0].point, point.point);
    assert_eq!(world.reopened().snapshots().expect("readable").len(), 1);
    world.assert_points(1);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_failed_without_an_answer_and_is_not_there_is_no_point() {
    let mut world = World::new("unanswered", &["a"]);
    world.break_bucket(Arc::new(|name| {
        let lost = || Error::new(Kind::Unreachable, "the connection was reset").temporary();
        if name.ends_with("statefile.json") { WriteFault::Fail(lost()) } else { WriteFault::None }
    }));
    let error = world.backup().await.expect_err("not there");
    assert_eq!(error.to_string(), "the connection was reset (seal)");
    assert_eq!(world.listing().points.len(), 0);
    // The snapshot stays: a late write may still land. Forgetting it is prune's, once it is old.
    assert_eq!(world.reopened().snapshots().expect("readable").len(), 1);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_bucket_fails_the_run_and_says_so() {
    let mut world = World::new("full", &["a"]);
    world.break_bucket(Arc::new(|name| {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = Error::io(format!("cannot write `{name}`"), full);
        if name.starts_with("repo/data/") { WriteFault::Fail(error) } else { WriteFault::None }
    }));
    let error = world.backup().await.expect_err("full");
    assert_eq!(error.kind(), Kind::Exhausted);
    assert!(error.to_string().contains("cannot write `repo/data/"), "{error}");
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_bucket_is_found_out_before_any_store_is_touched() {
    let mut world = World::new("readonly", &["a"]);
    world.break_bucket(Arc::new(|name| {
        WriteFault::Fail(Error::new(Kind::PermissionDenied, format!("may not write `{name}`")))
    }));
    let touched = Arc::new(AtomicU32::new(0));
    let counting = Arc::clone(&touched);
    world.wrap("a", move |inner| {
        let counting = Arc::clone(&counting);
        FaultyStore::new(
            inner,
            Arc::new(move |_| {
                counting.fetch_add(1, Ordering::Relaxed);
                Fault::None
            }),
        )
    });
    let error = world.backup().await.expect_err("read-only");
    assert_eq!(error.kind(), Kind::PermissionDenied);
    assert_eq!(error.to_string(), "may not write `leases/churn.json` (take the lease)");
    assert_eq!(touched.load(Ordering::Relaxed), 0);
    world.assert_points(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_fails_is_no_success_and_everything_is_released() {
    let mut world = World::new("drainless", &["a", "b"]);
    world.wrap("b", |inner| {
        let broken = || Error::new(Kind::Unreachable, "the server closed the connection").temporary();
        FaultyStore::new(inner, fail_at("drain", broken))
    });
    let error = world.backup().await.expect_err("broken");
    assert_eq!(error.to_string(), "store `b`: the server closed the connection (drain)");
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_prepared_is_found_before_anyone_is_paused() {
    let hooks = Hooks::start();
    let mut world = blind_world("unready", hooks.url("/pause"), hooks.url("/resume"));
    world.wrap("a", |inner| {
        let denied = || Error::new(Kind::PermissionDenied, "may not read schema `billing`").hint("GRANT …");
        FaultyStore::new(inner, fail_at("prepare", denied))
    });
    let error = world.backup().await.expect_err("denied");
    assert_eq!(error.to_string(), "store `a`: may not read schema `billing` (prepare)");
    assert_eq!(error.hint_text(), Some("GRANT …"));
    assert!(hooks.switches().is_empty());
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_was_lost_is_never_sealed() {
    let mut world = World::new("pinless", &["a", "b"]);
    world.wrap("a", |inner| FaultyStore { loses_pin: true, ..FaultyStore::new(inner, Arc::new(|_| Fault::None)) });
    let error = world.backup().await.expect_err("lost");
    assert_eq!(error.kind(), Kind::PinLost);
    let expected =
        "store `a`: the pinned view was lost: the session that held it was closed by the server (still_valid)";
    assert_eq!(error.to_string(), expected);
    world.assert_points(0);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_loss_makes_a_point_only_where_that_is_accepted() {
    let mut world = World::new("lossy", &["a"]);
    world.wrap("a", |inner| FaultyStore { loses_a_file: true, ..FaultyStore::new(inner, Arc::new(|_| Fault::None)) });
    let error = world.backup().await.expect_err("not accepted");
    let expected = "store `a`: 1 named losses, the first one is `log/today`: it changed while it was read (drain)";
    assert_eq!((error.kind(), error.to_string()), (Kind::Unproven, expected.to_owned()));
    world.assert_points(0);
    world.platform.cut.accept_named_loss = true;
    let point = world.backup().await.expect("accepted").statefile;
    assert_eq!(point.verdict, Verdict::RestorableWithNamedLoss);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_on_request_ends_in_order_within_ten_seconds_even_if_a_driver_does_not_listen() {
    for (prefix, stuck) in [("stop", false), ("deaf", true)] {
        let mut world = World::new(prefix, &["a", "b"]);
        let draining = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&draining);
        world.wrap("a", move |inner| {
            let told = Arc::clone(&told);
            let plan = move |call: &str| {
                if call != "drain" {
                    return Fault::None;
                }
                told.store(true, Ordering::Relaxed);
                let time = Duration::from_secs(30);
                if stuck { Fault::Stuck(time) } else { Fault::Wait(time) }
            };
            FaultyStore::new(inner, Arc::new(plan))
        });
        let request = world.request();
        let cancel = request.cancel.clone();
        let run = tokio::spawn(stillpoint_engine::ops::backup::backup(request));
        while !draining.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let began = Instant::now();
        cancel.cancel();
        let error = run.await.expect("no panic").expect_err("stopped");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert_eq!((error.kind(), error.message()), (Kind::Cancelled, "stopped on request"));
        world.assert_points(0);
        world.assert_nothing_held();
    }
}

/// A world whose store `a` drains only once the flag is set.
fn waiting_world(prefix: &str) -> (World, Arc<AtomicBool>, Arc<AtomicBool>) {
    let mut world = World::new(prefix, &["a"]);
    let (draining, go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let flags = (Arc::clone(&draining), Arc::clone(&go));
    world.wrap("a", move |inner| {
        let (draining, go) = flags.clone();
        let plan = move |call: &str| {
            if call == "drain" {
                draining.store(true, Ordering::Relaxed);
                while !go.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            Fault::None
        };
        FaultyStore::new(inner, Arc::new(plan))
    });
    (world, draining, go)
}

async fn until(flag: &AtomicBool) {
    while !flag.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_engines_at_once_the_second_reads_who_runs_and_the_first_makes_its_point() {
    let (world, draining, go) = waiting_world("two");
    let first = tokio::spawn(stillpoint_engine::ops::backup::backup(world.request()));
    until(&draining).await;
    let error = world.backup().await.expect_err("same machine");
    assert_eq!(error.kind(), Kind::Locked);
    let text = error.to_string();
    assert!(text.starts_with("platform `churn` is being backed up already: run "), "{text}");
    let mut elsewhere = world.request();
    elsewhere.surroundings.state_folder = world.folder.path().join("elsewhere");
    let error = stillpoint_engine::ops::backup::backup(elsewhere).await.expect_err("another machine");
    let text = error.to_string();
    assert!(text.starts_with("another engine works on platform `churn` in this bucket: backup "), "{text}");
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
    assert!(error.hint_text().expect("a hint").starts_with("wait until it ends; if that engine is gone"));
    go.store(true, Ordering::Relaxed);
    first.await.expect("no panic").expect("a point");
    world.assert_points(1);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_lease_is_taken_over_makes_no_point_and_the_other_one_does() {
    let (world, draining, go) = waiting_world("lost");
    let first = tokio::spawn(stillpoint_engine::ops::backup::backup(world.request()));
    until(&draining).await;
    go.store(true, Ordering::Relaxed);
    let held = Arc::new(AtomicBool::new(true));
    let mut elsewhere = world.request();
    elsewhere.surroundings.state_folder = world.folder.path().join("elsewhere");
    elsewhere.take_over = true;
    // The first one is let on only when the second one is done: the slow engine that wakes up.
    go.store(false, Ordering::Relaxed);
    draining.store(false, Ordering::Relaxed);
    drop(held);
    let second = tokio::spawn(stillpoint_engine::ops::backup::backup(elsewhere));
    until(&draining).await;
    go.store(true, Ordering::Relaxed);
    let results = (first.await.expect("no panic"), second.await.expect("no panic"));
    let point = results.1.expect("the second one's point").statefile;
    assert_eq!(point.fencing, 2);
    let error = results.0.expect_err("the first one lost its lease");
    assert_eq!(error.kind(), Kind::Locked);
    assert!(error.to_string().starts_with("the lease was taken over by "), "{error}");
    assert_eq!(world.listing().points.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_jumps_back_during_the_run_changes_labels_and_nothing_else() {
    let (world, draining, go) = waiting_world("jump");
    let run = tokio::spawn(stillpoint_engine::ops::backup::backup(world.request()));
    until(&draining).await;
    world.clock.jump(-7200);
    go.store(true, Ordering::Relaxed);
    let point = run.await.expect("no panic").expect("a point").statefile;
    assert!(point.sealed_at < point.started_at, "the label follows the clock");
    assert!(point.skew_micros < 60_000_000, "durations do not");
    world.backup().await.expect("the next run is not kept out");
    world.assert_points(2);
    world.assert_nothing_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_for_the_journal_ends_the_run_and_everything_is_released() {
    let world = World::new("journalless", &["a"]);
    std::fs::write(world.folder.path().join("state"), "a file where a folder should be").expect("writable");
    let error = world.backup().await.expect_err("no journal");
    assert!(error.message().contains("state folder"), "{error}");
    world.assert_points(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_removes_journals_after_a_month_but_not_of_a_run_that_holds_the_lease() {
    use stillpoint_core::driver::Context;
    use stillpoint_engine::ops::prune;
    let world = World::new("old-journals", &["a"]);
    let first = world.backup().await.expect("a point").statefile.run;
    let session = world.session();
    let prune = |days: i64| {
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24 * days);
        prune::run(&session, false, 5.0, now, &Context::default()).expect("pruned")
    };
    assert!(prune(29).journals.is_empty(), "a month is not over");
    let (lease, _) = world.bucket.read("leases/churn.json").expect("there");
    let mut held: serde_json::Value = serde_json::from_slice(&lease).expect("JSON");
    held["holder"] =
        serde_json::json!({ "run": first, "point": null, "purpose": "backup", "host": "elsewhere", "process": 1 });
    let write = |bytes: &[u8]| {
        let mode = stillpoint_repo::depot::WriteMode::Replace;
        world.bucket.write("leases/churn.json", &[bytes], &mode).expect("writable");
    };
    write(held.to_string().as_bytes());
    assert!(prune(31).journals.is_empty(), "the lease names the run");
    // What another version or another's platform wrote there must not spoil the rest of the prune.
    write(b"no lease at all");
    let careful = prune(31);
    assert!(careful.journals.is_empty() && !careful.journals_unreadable.is_empty(), "{careful:?}");
    write(&lease);
    let pruned = prune(31);
    assert_eq!((pruned.journals, pruned.journals_unreadable), (vec![first], Vec::new()));
    assert!(prune(31).journals.is_empty(), "it is gone");
    world.backup().await.expect("the next point");
    world.assert_points(2);
}

/// Actions that may follow an event that is not on disk: they let go of something, end it, or look.
const HARMLESS: [&str; 7] =
    ["resume", "stop_watchdog", "release", "abandon_backup", "remove_snapshot", "release_lease", "read_statefile"];

/// Runs a backup whose journal fails at the given call of `moment` and at every later one. Returns
/// whether it failed at all.
async fn run_with_failing_journal(world: &mut World, hooks: &Hooks, moment: &'static str, at: u32) -> bool {
    let points = world.listing().points.len();
    let (calls, failed) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let begun_after: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let (noting, failing) = (Arc::clone(&begun_after), Arc::clone(&failed));
    world.surroundings.checkpoint = Some(Arc::new(move |name| {
        if name == moment && calls.fetch_add(1, Ordering::SeqCst) >= at {
            failing.store(true, Ordering::SeqCst);
            return Err(Error::new(Kind::Io, "the disk does not take the journal"));
        }
        // What was asked for by an earlier event may begin a moment later.
        match name.strip_prefix("before ").filter(|_| failing.load(Ordering::SeqCst)) {
            Some("sync" | "append") | None => {}
            Some(effect) => noting.lock().expect("whole").push(effect.to_owned()),
        }
        Ok(())
    }));
    let outcome = world.backup().await;
    let case = format!("{moment} {at}");
    assert!(!hooks.is_paused(), "{case}: writers are held back");
    for name in ["a", "b"] {
        assert_eq!(world.memory(name).pins(), 0, "{case}: store {name} is still pinned");
    }
    let failed = failed.load(Ordering::SeqCst);
    let made = world.listing().points.len() - points;
    match outcome {
        // The commit was durable in the bucket before the journal failed.
        Ok(_) => assert_eq!(made, 1, "{case}"),
        Err(error) => {
            assert!(failed && error.to_string().contains("the disk does not take the journal"), "{case}: {error:?}");
            assert_eq!(made, 0, "{case}: a failed run made a point");
        }
    }
    let begun = begun_after.lock().expect("whole").clone();
    let harmful: Vec<_> = begun.iter().filter(|effect| !HARMLESS.contains(&effect.as_str())).collect();
    assert!(harmful.is_empty(), "{case}: begun although the journal had failed: {harmful:?}");
    world.surroundings.checkpoint = None;
    failed
}

#[tokio::test]
async fn nothing_begins_after_the_journal_could_not_be_written_and_nothing_stays_paused() {
    for moment in ["before append", "before sync"] {
        let hooks = Hooks::start();
        let prefix = format!("disk-{}", &moment[7..]);
        let mut world = blind_world(&prefix, hooks.url("/pause"), hooks.url("/resume"));
        let mut at = 0;
        while run_with_failing_journal(&mut world, &hooks, moment, at).await {
            world.backup().await.unwrap_or_else(|error| panic!("after {moment} {at}: {error:?}"));
            world.assert_nothing_held();
            at += 1;
        }
        assert!(at > 10, "only {at} moments of {moment}");
        assert!(!hooks.switches().is_empty(), "writers were held back in some of them");
    }
}
