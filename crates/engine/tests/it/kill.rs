//! The kill matrix: SIGKILL before and after every journal line and every effect of a run.
//!
//! After each kill: no point appeared unless it was committed, a paused writer runs again within the
//! budget and a second, the next backup works, earlier points are whole. In the end nothing is left
//! that prune does not collect. A second machine takes over from the bucket alone.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::driver::Context;
use stillpoint_core::platform::PauseStep;
use stillpoint_engine::ops::backup::backup;
use stillpoint_engine::watchdog;
use stillpoint_repo::{CheckRequest, Data, PruneRequest};

use crate::faults::{Fault, FaultyStore};
use crate::helper;
use crate::hooks::Hooks;
use crate::world::{World, http_step};

const STORES: [&str; 2] = ["a", "b"];
const BUDGET: Duration = Duration::from_secs(2);

/// How the engine process says that it got to its end alive.
const SURVIVED: i32 = 77;

fn variable(name: &str) -> String {
    std::env::var(name).expect("set by the test")
}

/// A platform that can only be cut while its writers are paused: by a hook and by a flag file.
fn arrange(world: &mut World, hooks_at: &str, flag: &Path) {
    let flag = flag.to_str().expect("text").to_owned();
    let touch =
        PauseStep::Command { pause: vec!["touch".into(), flag.clone()], resume: vec!["rm".into(), "-f".into(), flag] };
    world.platform.pause = vec![http_step(format!("{hooks_at}/pause"), format!("{hooks_at}/resume")), touch];
    world.platform.cut.pause_budget = format!("{}ms", BUDGET.as_millis());
    world.wrap("b", |inner| FaultyStore { blind: true, ..FaultyStore::new(inner, Arc::new(|_| Fault::None)) });
}

/// What `helper::engine_process` does: a backup that kills its own process at a certain moment.
pub fn engine_that_is_killed() {
    let folder = variable("WORLD");
    let mut world = World::existing(&variable("PREFIX"), &STORES, Path::new(&folder));
    arrange(&mut world, &variable("HOOKS"), &Path::new(&folder).join("flag"));
    if let Ok(state) = std::env::var("STATE") {
        world.surroundings.state_folder = state.into();
    }
    let (kill_at, reached) = (variable("KILL_AT"), AtomicU32::new(0));
    world.surroundings.checkpoint = Some(Arc::new(move |name| {
        if name == "before sync" {
            return Ok(()); // The same moment as after the append.
        }
        let number = reached.fetch_add(1, Ordering::SeqCst);
        if kill_at.parse() == Ok(number) || kill_at == name {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).expect("killed");
            std::thread::sleep(Duration::from_secs(60));
        }
        Ok(())
    }));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(backup(world.request())).expect("a point");
    std::process::exit(SURVIVED);
}

struct Scene {
    world: World,
    hooks: Hooks,
}

impl Scene {
    fn new(prefix: &str) -> Self {
        let mut world = World::new(prefix, &STORES);
        let hooks = Hooks::start();
        let flag = world.folder.path().join("flag");
        arrange(&mut world, &hooks.url(""), &flag);
        Self { world, hooks }
    }

    /// Runs an engine that dies at `kill_at`; true if it got to its end.
    fn run_killed_at(&self, kill_at: &str, state: Option<&Path>) -> bool {
        let mut command = std::process::Command::new(std::env::current_exe().expect("a file"));
        command
            .args(helper::arguments("helper::engine_process"))
            .envs(helper::environment("engine"))
            .env("WORLD", self.world.folder.path())
            .env("PREFIX", &self.world.prefix)
            .env("HOOKS", self.hooks.url(""))
            .env("KILL_AT", kill_at)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(state) = state {
            command.env("STATE", state);
        }
        let status = command.status().expect("the engine starts");
        assert!(status.code().is_none_or(|code| code == SURVIVED), "the engine failed by itself: {status}");
        status.code() == Some(SURVIVED)
    }

    fn flag(&self) -> std::path::PathBuf {
        self.world.folder.path().join("flag")
    }

    /// Waits until hook and flag say that writers run.
    fn assert_runs_again(&self, kill_at: &str) {
        let began = Instant::now();
        while self.hooks.is_paused() || self.flag().exists() {
            assert!(began.elapsed() < BUDGET + Duration::from_secs(1), "killed at {kill_at}: writers are still paused");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(self.hooks.longest_pause() < BUDGET + Duration::from_secs(1), "{:?}", self.hooks.longest_pause());
    }

    fn wait_for_watchdogs(&self, state: &Path) {
        let folder = state.join("churn");
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "watchdog") {
                assert!(watchdog::wait_until_gone(&entry.path(), Duration::from_secs(10)).expect("readable"));
            }
        }
    }

    /// The unfinished journals, for a failed test's message.
    fn journals(&self) -> String {
        let folder = self.world.surroundings.state_folder.join("churn");
        let paths = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let journals = paths.filter(|path| path.extension().is_some_and(|extension| extension == "journal"));
        let texts = journals.filter_map(|path| std::fs::read_to_string(path).ok());
        texts.filter(|text| !text.contains("{\"ended\"")).collect()
    }

    fn assert_sound(&self) {
        let request = CheckRequest { data: Data::All, ..CheckRequest::default() };
        let report = self.world.reopened().check(&request, &Context::default()).expect("readable");
        assert!(report.errors.is_empty(), "{:?}", report.errors);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_moment_no_point_appears_writers_run_again_and_the_next_backup_works() {
    let scene = Scene::new("matrix");
    let world = &scene.world;
    let first = world.backup().await.expect("a point").statefile;
    let content = world.stored(&first, "a");
    let mut points = 1;
    let mut kills = 0;
    let mut slowest = Duration::ZERO;
    // One moment can be looked at alone: STILLPOINT_KILL_FROM=17.
    let from = std::env::var("STILLPOINT_KILL_FROM").map_or(0, |from| from.parse().expect("a number"));
    for kill_at in from.. {
        let name = kill_at.to_string();
        let survived = scene.run_killed_at(&name, None);
        let killed = Instant::now();
        scene.assert_runs_again(&name);
        slowest = slowest.max(killed.elapsed());
        // Before anyone cleans up: a point is there only if its statefile is, whole and authentic.
        let listing = world.listing();
        assert!(listing.points.len() <= points + 1, "killed at {name}");
        let committed = listing.points.len() - points;
        points += committed;
        if survived {
            assert_eq!(committed, 1);
            break;
        }
        kills += 1;
        let outcome = world.backup().await;
        let outcome = outcome.unwrap_or_else(|error| panic!("killed at {name}: {error:?}\n{}", scene.journals()));
        points += 1;
        assert!(!scene.hooks.is_paused() && !scene.flag().exists());
        assert!(outcome.recovered.len() <= 1);
        if let Some(recovered) = outcome.recovered.first() {
            assert_eq!(recovered.point.is_some(), committed == 1, "killed at {name}: {recovered:?}");
            assert!(recovered.warnings.is_empty(), "killed at {name}: {recovered:?}");
        }
        assert_eq!(world.stored(&outcome.statefile, "a"), content, "killed at {name}");
        world.assert_nothing_held();
    }
    assert!(from > 0 || kills > 60, "only {kills} moments");
    println!("{kills} kills; writers ran again within {slowest:?} of the engine's end");
    assert_eq!(world.stored(&first, "a"), content, "the first point is whole");
    assert_eq!(world.listing().points.len(), points);
    // A snapshot without a point stays where the commit's fate was open; it is prune's to forget.
    let ids: Vec<String> = world.listing().points.iter().map(|point| point.snapshot.clone()).collect();
    let snapshots = world.reopened().snapshots().expect("readable");
    let orphans: Vec<_> =
        snapshots.into_iter().map(|snapshot| snapshot.id).filter(|id| !ids.contains(&id.to_string())).collect();
    assert!(orphans.len() <= 4, "{} snapshots without a point", orphans.len());
    scene.assert_sound();
    let repository = world.reopened();
    repository.forget(&orphans).expect("forgotten");
    repository
        .prune(&PruneRequest { max_unused_percent: 0.0, ..PruneRequest::default() }, &Context::default())
        .expect("pruned");
    scene.assert_sound();
    for point in world.listing().points.iter().take(5) {
        assert_eq!(world.stored(point, "a"), content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_takes_over_from_the_bucket_alone_and_lets_writers_go_first() {
    let scene = Scene::new("takeover");
    let elsewhere = scene.world.folder.path().join("elsewhere");
    // The watchdog dies with its machine here: it cannot reach what its undo needs.
    assert!(!scene.run_killed_at("after pin", Some(&elsewhere)));
    scene.wait_for_watchdogs(&elsewhere);
    let hooks = &scene.hooks;
    pause_again(hooks).await;
    let error = scene.world.backup().await.expect_err("the lease has not run out");
    assert!(error.to_string().starts_with("another engine works on platform `churn`"), "{error}");
    assert!(hooks.is_paused(), "nothing is undone for an engine that may be alive");
    scene.world.clock.jump(61);
    let outcome = scene.world.backup().await.expect("a point");
    assert!(!hooks.is_paused(), "writers were let go");
    assert_eq!(outcome.statefile.fencing, 2);
    assert_eq!(scene.world.listing().points.len(), 1);
    scene.world.assert_nothing_held();
}

async fn pause_again(hooks: &Hooks) {
    let performer = stillpoint_engine::pause::Performer::new(stillpoint_engine::pause::Databases::none());
    let step = http_step(hooks.url("/pause"), hooks.url("/resume"));
    let step = stillpoint_engine::pause::Step::resolve(0, &step, &|_| panic!("no secret")).expect("valid");
    performer.expect("a client").perform(&step.pause, Duration::from_secs(5), &|_| {}).await.expect("paused");
}
