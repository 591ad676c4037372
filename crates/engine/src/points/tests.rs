//! Listing, naming and believing points, on a bucket in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use stillpoint_core::error::Kind;
use stillpoint_core::id::{EnvironmentName, PlatformName, PointId, RunId, StoreName};
use stillpoint_core::position::{Identity, Position};
use stillpoint_core::statefile::{Level, SCHEMA, Statefile, StoreState, Totals, Verdict};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{Depot, Prefixed, WriteMode};
use stillpoint_repo::{InitOptions, KeyFile, Repository, Unlock};

use super::{authentication, get, list, object_name};

struct World {
    bucket: Arc<dyn Depot>,
    repository: Repository,
    platform: PlatformName,
    environment: EnvironmentName,
}

fn world() -> World {
    let bucket: Arc<dyn Depot> = Arc::new(MemoryDepot::new());
    let unlock = Unlock::KeyFile(KeyFile::generate().expect("random"));
    let depot = Arc::new(Prefixed::new(Arc::clone(&bucket), "repo/"));
    let repository = Repository::init(depot, &unlock, &InitOptions::default()).expect("init");
    let platform = PlatformName::new("churn").expect("valid");
    World { bucket, repository, platform, environment: EnvironmentName::new("production").expect("valid") }
}

fn state(at: Timestamp) -> StoreState {
    StoreState {
        driver: "memory".to_owned(),
        version: "1".to_owned(),
        identity: Identity { driver: "memory".to_owned(), native: None, endpoint: "here".to_owned() },
        position: Position::new("memory", "1"),
        pinned_micros: (0, 1),
        pinned_at: (at, at),
        files: 0,
        bytes: 0,
        items: 0,
        unit: "keys".to_owned(),
        checksums: BTreeMap::new(),
        losses: Vec::new(),
        notes: Vec::new(),
    }
}

impl World {
    fn put(&self, id: &str, second: i64) -> Statefile {
        self.put_of(id, second, &[], &[])
    }

    /// A point that covers some stores and leaves others out.
    fn put_of(&self, id: &str, second: i64, stores: &[&str], left_out: &[&str]) -> Statefile {
        let named = |name: &&str| StoreName::new(*name).expect("valid");
        let at = Timestamp::from_second(second).expect("valid");
        let mut point = Statefile {
            schema: SCHEMA.to_owned(),
            point: PointId::new(id).expect("valid"),
            run: RunId::new("0000000000").expect("valid"),
            fencing: 1,
            platform: self.platform.clone(),
            environment: self.environment.clone(),
            verdict: Verdict::Restorable,
            level: Level::Strict,
            level_asked: Level::Strict,
            cut_at: at,
            skew_micros: 1,
            pause_micros: 0,
            cut_tries: 1,
            started_at: at,
            sealed_at: at,
            snapshot: "0".repeat(64),
            parent: None,
            stores: stores.iter().map(|name| (named(name), state(at))).collect(),
            left_out: left_out.iter().map(named).collect(),
            references: Vec::new(),
            totals: Totals::default(),
            tool_version: "0".to_owned(),
            authentication: String::new(),
        };
        point.authentication = authentication(&self.repository, &point).expect("hash");
        self.write(id, &serde_json::to_vec(&point).expect("json"));
        point
    }

    fn write(&self, id: &str, bytes: &[u8]) {
        self.bucket.write(&object_name(id), &[bytes], &WriteMode::Replace).expect("write");
    }

    fn latest_for(&self, stores: &[&str]) -> stillpoint_core::Result<String> {
        let stores: BTreeSet<_> = stores.iter().map(|name| StoreName::new(*name).expect("valid")).collect();
        let listing = list(self.bucket.as_ref(), &self.repository)?;
        let found = listing.find_for("latest", &self.platform, &self.environment, &stores)?;
        Ok(found.point.to_string())
    }

    fn find(&self, text: &str) -> stillpoint_core::Result<Statefile> {
        list(self.bucket.as_ref(), &self.repository)?.find(text, &self.platform, &self.environment).cloned()
    }
}

#[test]
fn points_are_named_by_unique_prefixes() {
    let world = world();
    world.put("k3f9aaaaaa", 100);
    world.put("k3f9bbbbbb", 300);
    world.put("zzzz000000", 200);
    assert_eq!(world.find("latest").expect("latest").point.as_str(), "k3f9bbbbbb");
    assert_eq!(world.find("zzzz").expect("unique").point.as_str(), "zzzz000000");
    assert_eq!(world.find("k3f9a").expect("unique").point.as_str(), "k3f9aaaaaa");
    let several = world.find("k3f9").expect_err("two");
    assert!(several.hint_text().is_some_and(|hint| hint.contains("k3f9aaaaaa") && hint.contains("k3f9bbbbbb")));
    assert!(world.find("zzz").expect_err("short").message().contains("too short"));
    assert_eq!(world.find("nope").expect_err("none").kind(), Kind::NotFound);
}

#[test]
fn latest_is_never_a_point_of_some_stores_unless_they_are_named() {
    let world = world();
    world.put_of("part000001", 100, &["models"], &["artifacts"]);
    let error = world.find("latest").expect_err("nothing covers the platform");
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(
        error.hint_text().is_some_and(|hint| hint.contains("part000001") && hint.contains("models only")),
        "{error:?}"
    );
    assert_eq!(world.latest_for(&["models"]).expect("covered"), "part000001");

    world.put_of("many000001", 200, &["models", "artifacts"], &[]);
    world.put_of("part000002", 300, &["models"], &["artifacts"]);
    assert_eq!(world.find("latest").expect("the whole one").point.as_str(), "many000001");
    assert_eq!(world.latest_for(&["models"]).expect("covered"), "part000002");
    assert_eq!(world.latest_for(&["artifacts"]).expect("covered"), "many000001");
    assert_eq!(world.latest_for(&["models", "artifacts"]).expect("covered"), "many000001");
    assert_eq!(world.latest_for(&["unknown"]).expect("what there is"), "many000001");
    assert_eq!(world.find("part000002").expect("named").left_out.len(), 1);
}

#[test]
fn what_was_changed_is_listed_and_never_believed() {
    let world = world();
    let mut forged = world.put("aaaa000000", 100);
    world.put("bbbb000000", 200);
    forged.level_asked = Level::Independent;
    world.write("aaaa000000", &serde_json::to_vec(&forged).expect("json"));
    world.write("cccc000000", b"{ \"schema\": \"stillpoint.dev/statefile/v9\" }");
    world.write("dddd000000", b"not json");
    let moved = world.put("eeee000000", 300);
    world.write("ffff000000", &serde_json::to_vec(&moved).expect("json"));
    world.write("gggg000000", &Statefile::void_mark(&moved.run));

    let listing = list(world.bucket.as_ref(), &world.repository).expect("lists");
    let good: Vec<_> = listing.points.iter().map(|point| point.point.as_str()).collect();
    assert_eq!(good, ["eeee000000", "bbbb000000"]);
    let damaged: Vec<_> = listing.damaged.iter().map(|(name, error)| (name.as_str(), error.kind())).collect();
    let corrupt = |name| (name, Kind::Corrupt);
    let wanted =
        [corrupt("aaaa000000"), ("cccc000000", Kind::Unsupported), corrupt("dddd000000"), corrupt("ffff000000")];
    assert_eq!(damaged, wanted);
    let error = world.find("aaaa").expect_err("damaged");
    assert_eq!((error.kind(), error.message()), (Kind::Corrupt, "the point `aaaa000000` is there, but damaged"));
    assert_eq!(get(world.bucket.as_ref(), &world.repository, &forged.point).expect_err("forged").kind(), Kind::Corrupt);
}

#[test]
fn points_of_another_key_are_not_believed() {
    let (ours, theirs) = (world(), world());
    let point = theirs.put("aaaa000000", 100);
    ours.write("aaaa000000", &serde_json::to_vec(&point).expect("json"));
    assert_eq!(ours.find("latest").expect_err("foreign").kind(), Kind::NotFound);
    assert_eq!(ours.find("aaaa").expect_err("foreign").kind(), Kind::Corrupt);
}
