//! What tests are made of: platforms, clocks that jump, depots that fail.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use stillpoint_core::Result;
use stillpoint_core::driver::Driver;
use stillpoint_core::id::{PointId, RunId, StoreName};
use stillpoint_core::plan::BackupPlan;
use stillpoint_core::platform::{HttpCall, PauseStep, Platform};
use stillpoint_core::statefile::Statefile;
use stillpoint_core::tree::{TreePath, read_small};
use stillpoint_drivers::memory::Store;
use stillpoint_engine::cancel::CancelToken;
use stillpoint_engine::clock::Clock;
use stillpoint_engine::config::Config;
use stillpoint_engine::effects::Surroundings;
use stillpoint_engine::journal::{self, Head};
use stillpoint_engine::open::{Session, repository_depot};
use stillpoint_engine::ops::backup::{BackupOutcome, BackupRequest, backup};
use stillpoint_engine::points::{self, Listing};
use stillpoint_engine::secrets::Secrets;
use stillpoint_repo::depot::Depot;
use stillpoint_repo::depot::fs::FsDepot;
use stillpoint_repo::{InitOptions, KeyFile, Repository, SnapshotId, Unlock};

use crate::faults::{FaultyBucket, FaultyStore, WritePlan};

/// A wall clock that tests can move; time itself goes on as ever.
#[derive(Debug)]
pub struct JumpingClock {
    began: Instant,
    jump_seconds: AtomicI64,
}

impl Default for JumpingClock {
    fn default() -> Self {
        Self { began: Instant::now(), jump_seconds: AtomicI64::new(0) }
    }
}

impl JumpingClock {
    /// Moves the wall clock; negative is back.
    pub fn jump(&self, seconds: i64) {
        self.jump_seconds.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Clock for JumpingClock {
    fn monotonic(&self) -> Duration {
        self.began.elapsed()
    }

    fn utc(&self) -> Timestamp {
        Timestamp::now() + SignedDuration::from_secs(self.jump_seconds.load(Ordering::Relaxed))
    }
}

pub fn store(name: &str) -> StoreName {
    StoreName::new(name).expect("a valid name")
}

/// A platform of memory stores, each named `<prefix>-<store>` within the process.
pub fn platform(prefix: &str, stores: &[&str], bucket: &Path) -> Platform {
    let stores: BTreeMap<_, _> = stores
        .iter()
        .map(|name| ((*name).to_owned(), serde_json::json!({ "driver": "memory", "name": format!("{prefix}-{name}") })))
        .collect();
    serde_json::from_value(serde_json::json!({
        "apiVersion": "stillpoint.dev/v1",
        "platform": "churn",
        "environment": "production",
        "bucket": { "url": bucket },
        "stores": stores,
    }))
    .expect("a valid platform")
}

/// A pause step that calls two hooks.
pub fn http_step(pause: String, resume: String) -> PauseStep {
    let call = |url| HttpCall { url, method: "POST".into(), headers: BTreeMap::new(), body: None, expect: Vec::new() };
    PauseStep::Http { pause: call(pause), resume: call(resume) }
}

/// The head of a journal for `platform`.
pub fn head(platform: &Platform, number: u8, scratch: &Path) -> Head {
    let run = RunId::from_random([number; 8]);
    Head {
        schema: journal::SCHEMA.to_owned(),
        point: PointId::from_random([number; 8]),
        spec: BackupPlan::new(platform).expect("a valid platform").spec(run.clone()),
        platform: platform.clone(),
        host: "elsewhere".to_owned(),
        process: 4711,
        began_at: Timestamp::from_second(1_700_000_000 + i64::from(number)).expect("in range"),
        scratch: scratch.to_owned(),
        run,
    }
}

/// A folder that is removed at the end, unless another process owns it.
pub struct Folder {
    path: PathBuf,
    _owned: Option<tempfile::TempDir>,
}

impl Folder {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A bucket on disk with its repository, a platform of memory stores, and this machine's folders.
pub struct World {
    pub folder: Folder,
    pub prefix: String,
    pub platform: Platform,
    pub bucket: Arc<dyn Depot>,
    pub repository: Repository,
    pub surroundings: Surroundings,
    pub clock: Arc<JumpingClock>,
}

impl World {
    /// A world whose stores hold a few values each. `prefix` keeps the tests of this process apart.
    pub fn new(prefix: &str, stores: &[&str]) -> Self {
        let owned = tempfile::tempdir().expect("a folder");
        let folder = Folder { path: owned.path().to_owned(), _owned: Some(owned) };
        let root = folder.path().join("bucket");
        std::fs::create_dir_all(&root).expect("writable");
        let bucket: Arc<dyn Depot> = Arc::new(FsDepot::open(&root).expect("a bucket"));
        let key = KeyFile::generate().expect("random numbers");
        std::fs::write(folder.path().join("key"), key.text()).expect("writable");
        let repository = repository_depot(&bucket);
        let repository = Repository::init(repository, &Unlock::KeyFile(key), &InitOptions::default()).expect("made");
        Self::around(prefix, stores, folder, bucket, repository)
    }

    /// The world that another process made at `path`, with stores of our own.
    pub fn existing(prefix: &str, stores: &[&str], path: &Path) -> Self {
        let bucket: Arc<dyn Depot> = Arc::new(FsDepot::open(path.join("bucket")).expect("a bucket"));
        let key = std::fs::read_to_string(path.join("key")).expect("written before");
        let key = Unlock::KeyFile(KeyFile::parse(&key).expect("ours"));
        let repository = Repository::open(repository_depot(&bucket), &key).expect("readable");
        Self::around(prefix, stores, Folder { path: path.to_owned(), _owned: None }, bucket, repository)
    }

    fn around(prefix: &str, stores: &[&str], folder: Folder, bucket: Arc<dyn Depot>, repository: Repository) -> Self {
        for name in stores {
            let store = Store::create(&format!("{prefix}-{name}"));
            for number in 0..20 {
                store.put(&format!("{name}/{number}"), format!("value {number} of {name}"));
            }
        }
        let clock: Arc<JumpingClock> = Arc::default();
        let surroundings = Surroundings {
            clock: Arc::<JumpingClock>::clone(&clock),
            watchdog: crate::helper::watchdog_program(),
            state_folder: folder.path().join("state"),
            ..Surroundings::of_this_machine().expect("a program")
        };
        let platform = platform(prefix, stores, &folder.path().join("bucket"));
        Self { prefix: prefix.to_owned(), platform, bucket, repository, surroundings, clock, folder }
    }

    /// The store behind the name in the platform.
    pub fn memory(&self, name: &str) -> Store {
        Store::create(&format!("{}-{name}", self.prefix))
    }

    pub fn session(&self) -> Session {
        let config = Config {
            platform: self.platform.clone(),
            path: self.folder.path().join("platform.yaml"),
            secrets: Secrets::new(self.folder.path()),
        };
        Session::from_parts(config, Arc::clone(&self.bucket), self.repository.clone())
    }

    pub fn request(&self) -> BackupRequest {
        BackupRequest {
            session: self.session(),
            surroundings: self.surroundings.clone(),
            cancel: CancelToken::default(),
            take_over: false,
        }
    }

    pub async fn backup(&self) -> Result<BackupOutcome> {
        backup(self.request()).await
    }

    /// Puts `change` around the driver of `name`.
    pub fn wrap(
        &mut self,
        name: &'static str,
        change: impl Fn(Arc<dyn Driver>) -> FaultyStore + Send + Sync + 'static,
    ) {
        let inner = Arc::clone(&self.surroundings.open_store);
        self.surroundings.open_store = Arc::new(move |session, store, scratch| {
            let driver = inner(session, store, scratch)?;
            if store.as_str() == name { Ok(Arc::new(change(driver))) } else { Ok(driver) }
        });
    }

    /// Lets writes to the bucket go wrong where `plan` says so; the repository goes through it too.
    pub fn break_bucket(&mut self, plan: WritePlan) {
        let key = std::fs::read_to_string(self.folder.path().join("key")).expect("written before");
        let key = Unlock::KeyFile(KeyFile::parse(&key).expect("ours"));
        self.bucket = Arc::new(FaultyBucket { inner: Arc::clone(&self.bucket), plan });
        self.repository = Repository::open(repository_depot(&self.bucket), &key).expect("readable");
    }

    /// Opens the world's repository anew: nothing is remembered.
    pub fn reopened(&self) -> Repository {
        let key = std::fs::read_to_string(self.folder.path().join("key")).expect("written before");
        let key = Unlock::KeyFile(KeyFile::parse(&key).expect("ours"));
        Repository::open(repository_depot(&self.bucket), &key).expect("readable")
    }

    pub fn listing(&self) -> Listing {
        let listing = points::list(self.bucket.as_ref(), &self.repository).expect("readable");
        assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
        listing
    }

    /// What a point holds of a memory store.
    pub fn stored(&self, point: &Statefile, name: &str) -> BTreeMap<String, Vec<u8>> {
        let snapshot = SnapshotId::parse(&point.snapshot).expect("an id");
        let tree = self.reopened().tree(&snapshot, Some(&store(name))).expect("readable").expect("there");
        let values = TreePath::parse("values").expect("valid");
        let mut names = Vec::new();
        tree.list(&values, &mut |node| {
            names.push(node.name);
            Ok(true)
        })
        .expect("readable");
        let mut content = BTreeMap::new();
        for name in names {
            let bytes = read_small(tree.as_ref(), &values.join(&name).expect("valid"), 1 << 20).expect("whole");
            let key = String::from_utf8(name).expect("text").replace("%2F", "/").replace("%2f", "/");
            content.insert(key, bytes);
        }
        content
    }

    /// Nothing of any run is left: no pins, no journal, no lease, no temporary files, no lock.
    pub fn assert_nothing_held(&self) {
        for name in self.platform.stores.keys() {
            assert_eq!(self.memory(name.as_str()).pins(), 0, "store {name} is still pinned");
        }
        let unfinished = journal::find_unfinished(&self.surroundings.state_folder, &self.platform.platform);
        assert!(unfinished.expect("readable").is_empty(), "a journal is unfinished");
        let scratch = self.surroundings.state_folder.join("scratch");
        let left = std::fs::read_dir(&scratch).map_or(0, Iterator::count);
        assert_eq!(left, 0, "temporary files are left");
        if let Ok((lease, _)) = self.bucket.read("leases/churn.json") {
            let lease: serde_json::Value = serde_json::from_slice(&lease).expect("JSON");
            assert!(lease["holder"].is_null(), "the lease is held: {lease}");
        }
        let mut locks = Vec::new();
        let mut visit = |info: stillpoint_repo::depot::ObjectInfo| {
            locks.push(info.name);
            Ok(true)
        };
        self.bucket.list("repo/locks/", &mut visit).expect("readable");
        assert!(locks.is_empty(), "the repository is locked: {locks:?}");
    }

    /// There is no point but those, and no snapshot but theirs.
    pub fn assert_points(&self, count: usize) {
        assert_eq!(self.listing().points.len(), count, "points");
        assert_eq!(self.reopened().snapshots().expect("readable").len(), count, "snapshots");
    }
}
