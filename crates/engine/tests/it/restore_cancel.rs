//! A restore that is stopped in the middle: soon, without harm to anything, and so that it can go on.
//!
//! The bucket is slow, or does not answer at all, from the moment in which large pieces of packs
//! are read: so the stop always comes while files are being written, on any machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::EnvironmentName;
use stillpoint_engine::cancel::CancelToken;
use stillpoint_engine::config::Config;
use stillpoint_engine::effects::Surroundings;
use stillpoint_engine::open::{Session, driver_with, repository_depot};
use stillpoint_engine::ops::apply::{self, ApplyRequest, RestoreReport};
use stillpoint_engine::ops::backup::{BackupRequest, backup};
use stillpoint_engine::ops::destination::Destination;
use stillpoint_engine::ops::plan::{self, PlanRequest, Planned};
use stillpoint_engine::progress::Silent;
use stillpoint_engine::secrets::Secrets;
use stillpoint_repo::depot::Depot;
use stillpoint_repo::depot::layers::{Before, Call, Verb};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::{InitOptions, Repository, Unlock};

use crate::helper::watchdog_program;
use crate::world::store;

/// Reads of at least this length are content, not directories.
const LARGE_BYTES: u64 = 1 << 20;
/// Files of 4 MiB, each of which takes a read of its own.
const FILES: u64 = 24;

/// Large reads of a restore that are answered at once: something is written before it is stopped.
const READS_FREE: u64 = 2;

/// A bucket whose large reads take their time, if that is asked for, once a restore has begun to
/// write.
#[derive(Debug)]
struct Slow {
    armed: AtomicBool,
    /// Set by the line of the restore's journal that says so.
    writing: AtomicBool,
    read_takes: Duration,
    large_reads: AtomicU64,
}

impl Slow {
    fn reads(&self) -> u64 {
        self.large_reads.load(Ordering::SeqCst)
    }

    fn before(&self, call: &Call<'_>) {
        if call.verb == Verb::Write && call.name.starts_with("restores/") && call.name.ends_with("/0001.json") {
            self.writing.store(true, Ordering::SeqCst);
        }
        if call.range_bytes >= LARGE_BYTES && self.writing.load(Ordering::SeqCst) {
            let begin = Instant::now();
            let number = self.large_reads.fetch_add(1, Ordering::SeqCst);
            while number >= READS_FREE && self.armed.load(Ordering::SeqCst) && begin.elapsed() < self.read_takes {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A platform of one store of large files, a point of it, and a target `staging`.
struct Bed {
    folder: tempfile::TempDir,
    depot: Arc<Slow>,
    session: Session,
}

impl Bed {
    async fn new(read_takes: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path();
        std::fs::create_dir_all(home.join("source/below")).expect("writable");
        let mut random = fastrand::Rng::with_seed(7);
        for number in 0..FILES {
            let noise: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(4 << 20).collect();
            std::fs::write(home.join(format!("source/below/file-{number}")), noise).expect("writable");
        }
        let depot = Arc::new(Slow {
            armed: AtomicBool::new(false),
            writing: AtomicBool::new(false),
            read_takes,
            large_reads: AtomicU64::new(0),
        });
        let slow = Arc::clone(&depot);
        let bucket: Arc<dyn Depot> = Arc::new(Before::new(Arc::new(MemoryDepot::default()), move |call| {
            slow.before(call);
            Ok(())
        }));
        let unlock = Unlock::Password("right horse".to_owned());
        let repository =
            Repository::init(repository_depot(&bucket), &unlock, &InitOptions::default()).expect("a repository");
        let platform = serde_json::from_value(serde_json::json!({
            "apiVersion": "stillpoint.dev/v1",
            "platform": "churn",
            "environment": "production",
            "bucket": { "url": home.join("bucket") },
            "stores": { "files": { "driver": "files", "path": home.join("source") } },
            "targets": { "staging": { "stores": { "files": { "path": home.join("target") } } } },
        }))
        .expect("a platform");
        let path = home.join("platform.yaml");
        let config = Config { platform, path, secrets: Secrets::new(home) };
        let session = Session::from_parts(config, bucket, repository);
        let surroundings = Surroundings {
            watchdog: watchdog_program(),
            state_folder: home.join("state"),
            ..Surroundings::of_this_machine().expect("a program")
        };
        let request =
            BackupRequest { session: session.clone(), surroundings, cancel: CancelToken::default(), take_over: false };
        backup(request).await.expect("a point");
        Self { folder, depot, session }
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("source")
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("target")
    }

    async fn plan(&self, destination: Destination) -> Planned {
        let request = PlanRequest::new("latest", destination);
        plan::run(&self.session, &request, &CancelToken::default()).await.expect("a plan")
    }

    async fn apply(&self, planned: &Planned, typed: &[String], cancel: &CancelToken) -> Result<RestoreReport, Error> {
        let request = ApplyRequest { plan: planned.plan.clone(), hash: planned.hash.clone(), typed: typed.to_vec() };
        apply::run(&self.session, &request, Arc::new(Silent), cancel).await
    }

    /// Carries the plan out and stops it while its third large piece is being read. Returns how long
    /// stopping took.
    async fn apply_and_stop(&self, planned: &Planned, typed: &[String]) -> Duration {
        self.depot.armed.store(true, Ordering::SeqCst);
        let cancel = CancelToken::default();
        let stop = async {
            while self.depot.reads() <= READS_FREE {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            cancel.cancel();
            Instant::now()
        };
        let (applied, stopped) = tokio::join!(self.apply(planned, typed, &cancel), stop);
        let took = stopped.elapsed();
        let error = applied.expect_err("it was stopped");
        assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("apply the same plan again")), "{error:?}");
        assert!(self.depot.reads() < FILES, "it was in the middle");
        took
    }

    /// The target is absent, or bears a stamp.
    async fn assert_no_finished_copy(&self) {
        if !self.target().exists() {
            return;
        }
        let settings = [("path".to_owned(), self.target().to_string_lossy().into_owned().into())].into();
        let scratch = self.folder.path().join("stamps");
        let driver = driver_with(self.session.config(), &store("files"), &settings, &scratch).expect("a driver");
        assert!(driver.read_stamp(&Context::default()).await.expect("answers").is_some(), "a copy without a stamp");
    }

    /// Names in the folder around source and target that a restore made.
    fn left_over(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.folder.path()).expect("readable");
        let names = names.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".stillpoint") || name.contains(".before-")).collect()
    }
}

fn staging() -> Destination {
    Destination::Environment(EnvironmentName::new("staging").expect("valid"))
}

/// Everything below a folder, with its times.
fn content(folder: &Path) -> BTreeMap<PathBuf, (Option<std::time::SystemTime>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("readable") {
        let path = entry.expect("readable").path();
        let modified = std::fs::metadata(&path).expect("there").modified().ok();
        if path.is_dir() {
            found.insert(path.clone(), (modified, Vec::new()));
            found.extend(content(&path));
        } else {
            let bytes = std::fs::read(&path).expect("readable");
            found.insert(path, (modified, bytes));
        }
    }
    found
}

fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let below = |path: PathBuf| path.strip_prefix(folder).expect("below").to_owned();
    let found = content(folder).into_iter().map(|(path, (_, bytes))| (below(path), bytes));
    found.filter(|(path, _)| !path.to_string_lossy().starts_with(".stillpoint")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_stopped_in_the_middle_ends_soon_and_goes_on_later() {
    let bed = Bed::new(Duration::from_secs(1)).await;
    let before = content(&bed.source());
    let planned = bed.plan(staging()).await;
    let took = bed.apply_and_stop(&planned, &[]).await;
    // Left behind are only those who do not stop within 8 s.
    assert!(took < Duration::from_secs(8), "it took {took:?} to stop");
    let reads = bed.depot.reads();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(bed.depot.reads(), reads, "somebody goes on restoring");
    assert!(content(&bed.source()) == before, "the source was touched");
    assert!(bed.left_over().is_empty(), "{:?}", bed.left_over());
    bed.assert_no_finished_copy().await;

    bed.depot.armed.store(false, Ordering::SeqCst);
    let report = bed.apply(&planned, &[], &CancelToken::default()).await.expect("goes on");
    assert!(report.proven, "{report:?}");
    assert!(bytes_of(&bed.target()) == bytes_of(&bed.source()), "it came back as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_stopped_in_the_middle_leaves_the_store_as_it_was() {
    let bed = Bed::new(Duration::from_secs(1)).await;
    std::fs::write(bed.source().join("below/file-3"), b"damage").expect("writable");
    let before = content(&bed.source());
    let planned = bed.plan(Destination::InPlace { typed: Vec::new() }).await;
    let typed: Vec<String> =
        planned.plan.steps.iter().filter_map(|step| Some(step.target.identity.as_ref()?.typed().to_owned())).collect();
    let took = bed.apply_and_stop(&planned, &typed).await;
    assert!(took < Duration::from_secs(8), "it took {took:?} to stop");
    assert!(content(&bed.source()) == before, "the store was touched");
    assert!(bed.left_over().is_empty(), "{:?}", bed.left_over());

    bed.depot.armed.store(false, Ordering::SeqCst);
    let report = bed.apply(&planned, &typed, &CancelToken::default()).await.expect("goes on");
    assert!(report.proven, "{report:?}");
    assert_eq!(std::fs::metadata(bed.source().join("below/file-3")).expect("there").len(), 4 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_does_not_answer_keeps_no_restore_from_being_stopped() {
    let bed = Bed::new(Duration::from_secs(600)).await;
    let before = content(&bed.source());
    let planned = bed.plan(staging()).await;
    let took = bed.apply_and_stop(&planned, &[]).await;
    assert!(took < Duration::from_secs(10), "it took {took:?} to stop");
    assert!(content(&bed.source()) == before, "the source was touched");
    bed.assert_no_finished_copy().await;

    // The bucket answers again, also the restore that nobody waited for.
    bed.depot.armed.store(false, Ordering::SeqCst);
    let report = bed.apply(&planned, &[], &CancelToken::default()).await.expect("goes on");
    assert!(report.proven, "{report:?}");
    assert!(bytes_of(&bed.target()) == bytes_of(&bed.source()), "it came back as it was");
}
