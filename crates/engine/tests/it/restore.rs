//! Plan, fence, apply, resume and export, with stores in this process and a bucket in memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::EnvironmentName;
use stillpoint_core::position::Stamp;
use stillpoint_core::statefile::Statefile;
use stillpoint_drivers::memory::Store;
use stillpoint_engine::cancel::CancelToken;
use stillpoint_engine::clock::SystemClock;
use stillpoint_engine::config::Config;
use stillpoint_engine::effects::Surroundings;
use stillpoint_engine::open::{Session, driver, driver_with, repository_depot};
use stillpoint_engine::ops::apply::{self, ApplyRequest, RestoreReport, StoreStatus};
use stillpoint_engine::ops::backup::{BackupRequest, backup};
use stillpoint_engine::ops::destination::Destination;
use stillpoint_engine::ops::export::{self, ExportRequest};
use stillpoint_engine::ops::plan::{self, PlanRequest, Planned};
use stillpoint_engine::ops::restore;
use stillpoint_engine::points;
use stillpoint_engine::progress::Silent;
use stillpoint_engine::secrets::Secrets;
use stillpoint_repo::depot::Depot;
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::{InitOptions, Repository, Unlock};

use crate::faults::{FaultyBucket, WriteFault, WritePlan};
use crate::helper::watchdog_program;
use crate::world::store;

/// A platform `models` names keys of `artifacts`; a target environment `staging` is declared.
struct Bed {
    folder: tempfile::TempDir,
    bucket: Arc<dyn Depot>,
    session: Session,
    prefix: String,
}

impl Bed {
    fn new(prefix: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let bucket: Arc<dyn Depot> = Arc::new(MemoryDepot::default());
        let unlock = Unlock::Password("right horse".to_owned());
        let repository =
            Repository::init(repository_depot(&bucket), &unlock, &InitOptions::default()).expect("a repository");
        let named = |name: &str| serde_json::json!({ "driver": "memory", "name": format!("{prefix}-{name}") });
        let platform = serde_json::from_value(serde_json::json!({
            "apiVersion": "stillpoint.dev/v1",
            "platform": "churn",
            "environment": "production",
            "bucket": { "url": folder.path().join("bucket") },
            "stores": { "models": named("models"), "artifacts": named("artifacts") },
            "references": [{ "from": "models", "query": "model/", "to": "artifacts", "kind": "keys" }],
            "targets": { "staging": { "stores": {
                "models": { "name": format!("{prefix}-staging-models") },
                "artifacts": { "name": format!("{prefix}-staging-artifacts") },
            } } },
        }))
        .expect("a platform");
        let path = folder.path().join("platform.yaml");
        let config = Config { platform, path, secrets: Secrets::new(folder.path()) };
        let session = Session::from_parts(config, Arc::clone(&bucket), repository);
        let bed = Self { folder, bucket, session, prefix: prefix.to_owned() };
        for name in ["models", "artifacts"] {
            bed.source(name);
        }
        for number in 0..20 {
            bed.source("artifacts").put(&format!("object-{number}"), format!("weights {number}"));
            bed.source("models").put(&format!("model/{number}"), format!("object-{number}"));
        }
        bed
    }

    fn source(&self, name: &str) -> Store {
        Store::create(&format!("{}-{name}", self.prefix))
    }

    fn staging(&self, name: &str) -> Store {
        Store::create(&format!("{}-staging-{name}", self.prefix))
    }

    /// The stamp that a driver finds on the memory store of this name.
    async fn stamp(&self, name: &str) -> Option<Stamp> {
        let settings = [("name".to_owned(), format!("{}-{name}", self.prefix).into())].into();
        let scratch = self.folder.path().join("stamps");
        let driver = driver_with(self.session.config(), &store("models"), &settings, &scratch).expect("a driver");
        driver.read_stamp(&Context::default()).await.expect("answers")
    }

    async fn point(&self) -> Statefile {
        let surroundings = Surroundings {
            clock: Arc::new(SystemClock::default()),
            progress: Arc::new(Silent),
            watchdog: watchdog_program(),
            open_store: Arc::new(|session, store, scratch| driver(session.config(), store, scratch)),
            state_folder: self.folder.path().join("state"),
            checkpoint: None,
        };
        let (session, cancel) = (self.session.clone(), CancelToken::default());
        let request = BackupRequest { session, surroundings, cancel, take_over: false };
        backup(request).await.expect("a point").statefile
    }

    /// Writes a changed statefile, as one that holds the key can.
    fn write_point(&self, point: &mut Statefile) {
        point.authentication = points::authentication(self.session.repository(), point).expect("a hash");
        let bytes = serde_json::to_vec(point).expect("JSON");
        let name = points::object_name(point.point.as_str());
        let mode = stillpoint_repo::depot::WriteMode::Replace;
        self.bucket.write(&name, &[&bytes], &mode).expect("written");
    }

    async fn plan(&self, request: &PlanRequest) -> Planned {
        plan::run(&self.session, request, &CancelToken::default()).await.expect("a plan")
    }

    async fn apply(&self, planned: &Planned, typed: &[&str]) -> Result<RestoreReport, Error> {
        let typed = typed.iter().map(|text| (*text).to_owned()).collect();
        let request = ApplyRequest { plan: planned.plan.clone(), hash: planned.hash.clone(), typed };
        apply::run(&self.session, &request, Arc::new(Silent), &CancelToken::default()).await
    }

    async fn restore(&self, request: &PlanRequest) -> Result<RestoreReport, Error> {
        restore::run(&self.session, request, Arc::new(Silent), &CancelToken::default()).await
    }

    fn objects(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut note = |object: stillpoint_repo::depot::ObjectInfo| {
            names.push(object.name);
            Ok(true)
        };
        self.bucket.list("", &mut note).expect("lists");
        names.sort();
        names
    }
}

fn staging() -> Destination {
    Destination::Environment(EnvironmentName::new("staging").expect("valid"))
}

fn into(folder: &Path) -> Destination {
    Destination::folder(folder).expect("valid")
}

#[track_caller]
fn fenced(result: Result<RestoreReport, Error>) -> String {
    let error = result.expect_err("refused");
    assert_eq!(error.kind(), Kind::Fenced, "{error:?}");
    assert!(error.hint_text().is_some());
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_comes_back_elsewhere_proven_and_stamped() {
    let bed = Bed::new("elsewhere");
    let point = bed.point().await;
    let expected = (bed.source("models").content(), bed.source("artifacts").content());
    bed.source("models").put("model/after", "object-lost");
    let report = bed.restore(&PlanRequest::new("latest", staging())).await.expect("restored");
    assert!(report.proven, "{report:?}");
    assert_eq!((bed.staging("models").content(), bed.staging("artifacts").content()), expected);
    assert!(report.stores.iter().all(|store| store.status == StoreStatus::Proven && store.checked == 20));
    let order: Vec<_> = report.stores.iter().map(|report| report.store.as_str()).collect();
    assert_eq!(order, ["artifacts", "models"], "what is named comes first");
    assert_eq!((report.references[0].checked, report.references[0].missing), (20, 0));
    for name in ["models", "artifacts"] {
        let stamp = bed.stamp(&format!("staging-{name}")).await.expect("a stamp");
        assert_eq!((stamp.environment.as_str(), stamp.point.as_str()), ("staging", point.point.as_str()));
        assert_eq!(stamp.restore, report.restore);
        assert!(bed.stamp(name).await.is_none(), "the source bears none");
    }
    let record = format!("restores/{}/report.json", report.restore);
    assert!(bed.objects().contains(&record), "{:?}", bed.objects());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_changes_nothing_and_is_the_same_twice() {
    let bed = Bed::new("readonly");
    bed.point().await;
    let before = bed.objects();
    let request = PlanRequest::new("latest", staging());
    let (first, second) = (bed.plan(&request).await, bed.plan(&request).await);
    assert_eq!(first.hash, second.hash);
    assert!(first.fence.is_empty(), "{:?}", first.fence);
    assert_eq!(bed.objects(), before);
    let models = first.plan.step(&store("models")).expect("planned");
    assert_eq!(models.needs, [store("artifacts")].into());
    assert!(models.loses.starts_with("everything after 20") && models.loses.ends_with(" UTC"), "{}", models.loses);
    assert_eq!(models.target.overwrites, None);
    assert_eq!(models.items, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_is_never_a_target() {
    let bed = Bed::new("fenced");
    bed.point().await;
    let mut session_platform = bed.session.platform().clone();
    let production = EnvironmentName::new("mirror").expect("valid");
    let mut target = session_platform.targets.values().next().expect("staging").clone();
    target.stores.insert(store("models"), [("name".to_owned(), "fenced-models".into())].into());
    session_platform.targets.insert(production.clone(), target);
    let config = Config { platform: session_platform, ..bed.session.config().clone() };
    let session = Session::from_parts(config, Arc::clone(&bed.bucket), bed.session.repository().clone());
    let before = bed.source("models").content();
    let request = PlanRequest::new("latest", Destination::Environment(production));
    let result = restore::run(&session, &request, Arc::new(Silent), &CancelToken::default()).await;
    let message = fenced(result);
    assert!(message.contains("store `models`") && message.contains("is store `models` of the point"), "{message}");
    assert_eq!(bed.source("models").content(), before);
    assert!(bed.staging("artifacts").content().is_empty(), "nothing at all was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_may_be_an_original_is_left_alone() {
    let bed = Bed::new("original");
    bed.point().await;
    bed.staging("models").put("precious", "x");
    let message = fenced(bed.restore(&PlanRequest::new("latest", staging())).await);
    assert!(message.contains("holds 1 keys and bears no stamp"), "{message}");
    let replace = PlanRequest { replace: true, ..PlanRequest::new("latest", staging()) };
    fenced(bed.restore(&replace).await);
    assert_eq!(bed.staging("models").content().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_copy_is_replaced_on_request_and_kept_beside() {
    let bed = Bed::new("replace");
    bed.point().await;
    let request = PlanRequest::new("latest", staging());
    assert!(bed.restore(&request).await.expect("restored").proven);
    let message = fenced(bed.restore(&request).await);
    assert!(message.contains("of an earlier restore"), "{message}");
    bed.source("models").put("model/new", "object-3");
    bed.point().await;
    let replace = PlanRequest { replace: true, ..request };
    let report = bed.restore(&replace).await.expect("restored");
    assert!(report.proven, "{report:?}");
    assert_eq!(bed.staging("models").content().len(), 21);
    assert!(report.stores.iter().all(|store| store.kept_old.len() == 1), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_place_needs_every_identity_typed() {
    let bed = Bed::new("inplace");
    bed.point().await;
    bed.source("models").put("model/3", "damage");
    let request = |typed: &[String]| PlanRequest::new("latest", Destination::InPlace { typed: typed.to_vec() });
    let planned = bed.plan(&request(&[])).await;
    let typed: Vec<String> =
        planned.plan.steps.iter().filter_map(|step| Some(step.target.identity.as_ref()?.typed().to_owned())).collect();
    assert_eq!(typed.len(), 2);
    let message = fenced(bed.restore(&request(&typed[..1])).await);
    assert!(message.contains("was not confirmed"), "{message}");
    assert_eq!(bed.source("models").content()["model/3"], b"damage");
    let report = bed.restore(&request(&typed)).await.expect("restored");
    assert!(report.proven, "{report:?}");
    assert_eq!(bed.source("models").content()["model/3"], b"object-3");
    assert_eq!(bed.stamp("models").await.expect("a stamp").environment, "production");
    assert!(report.stores.iter().all(|store| store.kept_old.len() == 1), "the old content is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_not_mixed_without_consent() {
    let bed = Bed::new("mixed");
    let first = bed.point().await;
    bed.source("models").put("model/new", "object-3");
    bed.point().await;
    let only =
        |name: &str, point: &str| PlanRequest { stores: vec![store(name)], ..PlanRequest::new(point, staging()) };
    assert!(bed.restore(&only("artifacts", first.point.as_str())).await.expect("restored").proven);
    let message = fenced(bed.restore(&only("models", "latest")).await);
    assert!(message.contains("`artifacts`, restored from the point"), "{message}");
    let consent = PlanRequest { accept_mixed: true, ..only("models", "latest") };
    assert!(bed.restore(&consent).await.expect("restored").proven);
    let in_place = PlanRequest {
        destination: Destination::InPlace {
            typed: vec![
                bed.plan(&only("models", "latest")).await.statefile.stores[&store("models")]
                    .identity
                    .typed()
                    .to_owned(),
            ],
        },
        ..only("models", "latest")
    };
    assert!(fenced(bed.restore(&in_place).await).contains("goes on from a later state"));
}

#[tokio::test(flavor = "multi_thread")]
async fn latest_is_the_newest_point_of_all_stores_unless_stores_are_named() {
    let bed = Bed::new("partial");
    let whole = bed.point().await;
    assert!(whole.is_whole(), "{:?}", whole.left_out);
    bed.source("artifacts").put("object-late", "weights");
    let mut partial = bed.point().await;
    partial.stores.remove(&store("models"));
    partial.left_out.insert(store("models"));
    bed.write_point(&mut partial);

    let report = bed.restore(&PlanRequest::new("latest", staging())).await.expect("restored");
    assert!(report.proven, "{report:?}");
    assert_eq!(report.point, whole.point);
    assert_eq!(bed.staging("artifacts").content().len(), 20);
    let only = PlanRequest { stores: vec![store("artifacts")], replace: true, ..PlanRequest::new("latest", staging()) };
    assert_eq!(bed.plan(&only).await.plan.point, partial.point);
    let message = fenced(bed.restore(&only).await);
    assert!(message.contains("`models`, restored from the point"), "the point's own stores are not all: {message}");
    let accepted = PlanRequest { accept_mixed: true, ..only };
    assert!(bed.restore(&accepted).await.expect("restored").proven);
    assert_eq!(bed.staging("artifacts").content().len(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_does_not_fit_any_more_is_refused() {
    let bed = Bed::new("stale");
    bed.point().await;
    assert!(bed.restore(&PlanRequest::new("latest", staging())).await.expect("restored").proven);
    let replace = PlanRequest { replace: true, ..PlanRequest::new("latest", staging()) };
    let planned = bed.plan(&replace).await;
    bed.staging("models").put("work", "of somebody");
    let error = bed.apply(&planned, &[]).await.expect_err("refused");
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.to_string().contains("overwrites 20 keys as planned, 21 keys now"), "{error}");
    let mut forged = planned.clone();
    forged.plan.replaces = false;
    let error = bed.apply(&forged, &[]).await.expect_err("refused");
    assert_eq!(error.kind(), Kind::Conflict, "the plan is not the reviewed one");
}

/// The packs that the second point added, largest first.
fn new_packs(bed: &Bed, before: &[String]) -> Vec<String> {
    let size = |name: &String| bed.bucket.stat(name).expect("there").expect("there").size;
    let mut packs: Vec<_> =
        bed.objects().into_iter().filter(|n| n.starts_with("repo/data/") && !before.contains(n)).collect();
    packs.sort_by_key(|name| std::cmp::Reverse(size(name)));
    packs
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_restore_goes_on_where_it_ended() {
    let bed = Bed::new("resume");
    bed.point().await;
    let before = bed.objects();
    // Incompressible and large: the pack of data that only `models` needs.
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(300_000).collect();
    bed.source("models").put("blob", noise);
    bed.point().await;
    let pack = new_packs(&bed, &before).remove(0);
    let (bytes, _) = bed.bucket.read(&pack).expect("there");
    let planned = bed.plan(&PlanRequest::new("latest", staging())).await;
    bed.bucket.delete(&pack).expect("deleted");
    let report = bed.apply(&planned, &[]).await.expect("a report");
    assert!(!report.proven);
    let statuses: Vec<_> = report.stores.iter().map(|store| store.status).collect();
    assert_eq!(statuses, [StoreStatus::Proven, StoreStatus::Failed], "{report:?}");
    assert!(report.stores[1].error.is_some());
    bed.bucket.write(&pack, &[&bytes], &stillpoint_repo::depot::WriteMode::Create).expect("put back");
    let again = bed.apply(&planned, &[]).await.expect("a report");
    assert!(again.proven, "{again:?}");
    assert_eq!(again.restore, report.restore, "the same restore goes on");
    assert_eq!(again.stores.iter().map(|store| store.done_before).collect::<Vec<_>>(), [true, false]);
    assert_eq!(bed.staging("models").content(), bed.source("models").content());
    let third = bed.apply(&planned, &[]).await.expect_err("it is done");
    assert!(matches!(third.kind(), Kind::Fenced | Kind::Conflict), "{third:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_cannot_be_evaluated_hides_nothing_of_what_was_restored() {
    let bed = Bed::new("unevaluated");
    bed.point().await;
    let mut platform = bed.session.platform().clone();
    platform.references[0].query = "command:sh -c 'echo no such host >&2; exit 3'".to_owned();
    let config = Config { platform, ..bed.session.config().clone() };
    let session = Session::from_parts(config, Arc::clone(&bed.bucket), bed.session.repository().clone());
    let planned = bed.plan(&PlanRequest::new("latest", staging())).await;
    let request = ApplyRequest { plan: planned.plan.clone(), hash: planned.hash.clone(), typed: Vec::new() };
    let report = apply::run(&session, &request, Arc::new(Silent), &CancelToken::default()).await.expect("a report");
    assert!(!report.proven && !report.restored, "{report:?}");
    assert!(report.stores.iter().all(|store| store.status == StoreStatus::Proven), "{report:?}");
    assert_eq!(report.failures.len(), 1, "{report:?}");
    for part in ["`models` to `artifacts`", "`sh` failed: exit status: 3", "no such host", "hint: "] {
        assert!(report.failures[0].contains(part), "{part}: {}", report.failures[0]);
    }
    let again = bed.apply(&planned, &[]).await.expect("a report");
    assert!(again.proven && again.stores.iter().all(|store| store.done_before), "{again:?}");
    assert_eq!((again.restore, again.references[0].checked), (report.restore, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_loses_its_journal_says_what_it_may_have_written() {
    let bed = Bed::new("unwritten");
    bed.point().await;
    let planned = bed.plan(&PlanRequest::new("latest", staging())).await;
    // The credential runs out once the first store is written.
    let plan: WritePlan = Arc::new(|name| match name.ends_with("/0003.json") || name.ends_with("/report.json") {
        true => WriteFault::Fail(Error::new(Kind::Unauthenticated, "the token has expired")),
        false => WriteFault::None,
    });
    let bucket: Arc<dyn Depot> = Arc::new(FaultyBucket { inner: Arc::clone(&bed.bucket), plan });
    let session = Session::from_parts(bed.session.config().clone(), bucket, bed.session.repository().clone());
    let request = ApplyRequest { plan: planned.plan.clone(), hash: planned.hash.clone(), typed: Vec::new() };
    let report = apply::run(&session, &request, Arc::new(Silent), &CancelToken::default()).await.expect("a report");
    let statuses: Vec<_> = report.stores.iter().map(|store| store.status).collect();
    assert_eq!(statuses, [StoreStatus::Failed, StoreStatus::NotStarted], "{report:?}");
    assert!(report.stores[0].error.as_ref().is_some_and(|error| error.contains("expired")), "{report:?}");
    assert!(!report.restored && report.failures.len() == 2, "{report:?}");
    assert_eq!(bed.staging("artifacts").content().len(), 20, "it was written, and nobody may be told otherwise");
    let again = bed.apply(&planned, &[]).await.expect("a report");
    assert!(again.proven, "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_journal_is_not_believed() {
    let bed = Bed::new("forged");
    bed.point().await;
    let planned = bed.plan(&PlanRequest::new("latest", staging())).await;
    let name = format!("restores/{}-1/plan.json", planned.hash.short());
    let body = serde_json::json!({ "body": { "restore": "x" }, "authentication": "00" });
    let mode = stillpoint_repo::depot::WriteMode::Create;
    bed.bucket.write(&name, &[body.to_string().as_bytes()], &mode).expect("written");
    let error = bed.apply(&planned, &[]).await.expect_err("refused");
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    assert!(bed.staging("models").content().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_without_comparison_is_restored_but_not_proven() {
    let bed = Bed::new("uncompared");
    bed.point().await;
    let compared = bed.plan(&PlanRequest::new("latest", staging())).await;
    let planned = bed.plan(&PlanRequest { compare: false, ..PlanRequest::new("latest", staging()) }).await;
    assert_ne!(planned.hash, compared.hash, "a reviewer sees which of the two it is");
    let report = bed.apply(&planned, &[]).await.expect("a report");
    assert!(report.restored && !report.proven, "{report:?}");
    for store in &report.stores {
        assert_eq!((store.status, store.checked), (StoreStatus::Restored, 0), "{store:?}");
    }
    assert_eq!(bed.staging("artifacts").content().len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_comes_back_alone() {
    let bed = Bed::new("part");
    bed.point().await;
    let parts: BTreeMap<_, _> = [(store("artifacts"), "object-7".to_owned())].into();
    let request = PlanRequest { parts, ..PlanRequest::new("latest", staging()) };
    let planned = bed.plan(&request).await;
    assert_eq!((planned.plan.steps.len(), planned.plan.steps[0].files), (1, 1));
    let report = bed.apply(&planned, &[]).await.expect("a report");
    assert!(report.restored && !report.proven, "{report:?}");
    assert_eq!(report.stores[0].status, StoreStatus::Restored);
    assert_eq!(bed.staging("artifacts").content().len(), 1);
    let missing = PlanRequest {
        parts: [(store("artifacts"), "values/nothing".to_owned())].into(),
        ..PlanRequest::new("latest", staging())
    };
    let planned = bed.plan(&missing).await;
    assert!(planned.plan.warnings[0].contains("values/nothing"), "{:?}", planned.plan.warnings);
    let other = PlanRequest { destination: into(&bed.folder.path().join("part")), ..missing };
    let report = bed.restore(&other).await.expect("a report");
    assert!(report.stores[0].error.as_ref().is_some_and(|error| error.contains("holds no")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_gets_a_place_for_each_store() {
    let bed = Bed::new("folder");
    bed.point().await;
    let folder = bed.folder.path().join("back");
    let report = bed.restore(&PlanRequest::new("latest", into(&folder))).await.expect("restored");
    assert!(report.proven, "{report:?}");
    assert_eq!(report.environment.as_str(), "restored");
    let back = Store::create(&folder.join("models").to_string_lossy());
    assert_eq!(back.content(), bed.source("models").content());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_restore_writes_nothing_more() {
    let bed = Bed::new("cancel");
    bed.point().await;
    let planned = bed.plan(&PlanRequest::new("latest", staging())).await;
    let cancel = CancelToken::default();
    cancel.cancel();
    let request = ApplyRequest { plan: planned.plan.clone(), hash: planned.hash.clone(), typed: Vec::new() };
    let error = apply::run(&bed.session, &request, Arc::new(Silent), &cancel).await.expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(bed.staging("models").content().is_empty());
    assert!(bed.apply(&planned, &[]).await.expect("goes on").proven);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_and_a_file_are_exported_as_plain_files() {
    let bed = Bed::new("export");
    bed.point().await;
    let export = |path: Option<&str>, to: PathBuf| {
        let request =
            ExportRequest { point: "latest".to_owned(), store: store("artifacts"), path: path.map(str::to_owned), to };
        let session = bed.session.clone();
        async move { export::run(&session, &request, &CancelToken::default()).await }
    };
    let (all, one) = (bed.folder.path().join("all"), bed.folder.path().join("one"));
    let report = export(None, all.clone()).await.expect("exported");
    assert!(report.files >= 21, "{report:?}");
    assert!(all.join("HOW-TO-RESTORE.txt").is_file());
    assert_eq!(std::fs::read(all.join("values/object-7")).expect("there"), b"weights 7");
    let report = export(Some("values/object-7"), one.clone()).await.expect("exported");
    assert_eq!((report.files, report.bytes), (1, 9));
    assert_eq!(std::fs::read(one.join("object-7")).expect("there"), b"weights 7");
    let error = export(None, all).await.expect_err("not empty");
    assert_eq!(error.kind(), Kind::AlreadyExists);
    let error = export(Some("values/nothing"), bed.folder.path().join("none")).await.expect_err("not there");
    assert_eq!(error.kind(), Kind::NotFound);
}
