//! `apply`: carries out a plan to the letter, or refuses.
//!
//! What was planned is looked at again, the fence is checked, and only then the stores are written,
//! those without needs first, several at a time. Every step is journalled in the bucket: a second
//! `apply` of the same plan goes on where the first one ended. `record` is that journal, `store`
//! the restore of one store, `scene` how they run together.

mod record;
mod scene;
mod store;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::{EnvironmentName, PointId, StoreName};
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::plan::restore::PlanHash;
use stillpoint_core::platform::ReferencePolicy;
use stillpoint_core::statefile::ReferenceState;
use tokio::runtime::Handle;

use super::plan::{Draft, PlanRequest, draft};
use crate::cancel::CancelToken;
use crate::effects::on_thread;
use crate::fence;
use crate::open::Session;
use crate::progress::{Progress, Update};
use record::Record;
use scene::Scene;
use store::describe;

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct ApplyRequest {
    /// The reviewed plan.
    pub plan: RestorePlan,
    /// The hash that the reviewer saw.
    pub hash: PlanHash,
    /// For a restore in place: the identities that the operator typed.
    pub typed: Vec<String>,
}

/// What became of one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreStatus {
    /// Restored, stamped and compared with the point: equal.
    Proven,
    /// Restored and stamped. A part of a store, or one whose plan does not compare, is checked byte by
    /// byte while it is read, but not read back afterwards.
    Restored,
    /// Restored and stamped, but the comparison found differences.
    Differs,
    /// It failed; what is there bears a stamp if anything is there.
    Failed,
    /// It was not begun, because something before it failed.
    NotStarted,
}

/// The restore of one store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoreReport {
    /// The store.
    pub store: StoreName,
    /// What became of it.
    pub status: StoreStatus,
    /// Where it was restored to, if known.
    pub endpoint: Option<String>,
    /// Rows, objects, commits, files written.
    pub items: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Items compared with the point.
    pub checked: u64,
    /// Differences found, at most 100.
    pub differences: Vec<String>,
    /// Where the old content was kept.
    pub kept_old: Vec<String>,
    /// What could not be reproduced exactly.
    pub losses: Vec<Loss>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether an earlier `apply` of the same plan had done it already.
    pub done_before: bool,
    /// How long it took.
    pub elapsed_millis: u64,
}

impl StoreReport {
    fn new(store: StoreName, status: StoreStatus) -> Self {
        Self {
            store,
            status,
            endpoint: None,
            items: 0,
            bytes: 0,
            checked: 0,
            differences: Vec::new(),
            kept_old: Vec::new(),
            losses: Vec::new(),
            error: None,
            done_before: false,
            elapsed_millis: 0,
        }
    }

    /// Whether the store is restored, and nothing is known to be wrong with it.
    pub fn is_good(&self) -> bool {
        matches!(self.status, StoreStatus::Proven | StoreStatus::Restored)
    }
}

/// What a restore came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The restore's name, also of its folder in the bucket.
    pub restore: String,
    /// The plan's name.
    pub hash: PlanHash,
    /// The point.
    pub point: PointId,
    /// The environment that the copy belongs to.
    pub environment: EnvironmentName,
    /// Every store is restored and compared with the point: equal; and no reference leads nowhere.
    pub proven: bool,
    /// Every store is restored, and nothing is known to be wrong. Without `proven`: a part of a store
    /// was asked for, or the plan does not compare.
    #[serde(default)]
    pub restored: bool,
    /// The stores, in the order of the plan.
    pub stores: Vec<StoreReport>,
    /// References, evaluated on the restored stores.
    pub references: Vec<ReferenceState>,
    /// What people should know.
    pub notes: Vec<String>,
    /// What failed besides the stores once one of them may have been written: a reference that could not
    /// be evaluated, the restore's own journal. With one of these, nothing is `proven` or `restored`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
    /// How long it took, this time.
    pub elapsed_millis: u64,
}

impl RestoreReport {
    fn fail(&mut self, error: &Error) {
        self.failures.push(describe(error));
        (self.proven, self.restored) = (false, false);
    }
}

/// Carries out a plan.
///
/// # Errors
/// Before the first write: `Conflict` if the plan is not the reviewed one or what it was made for has
/// changed, `Fenced` if the fence finds anything, `Locked` if another process carries out the same
/// plan, and those of the bucket and the stores. After it only `Cancelled`: whatever else goes wrong is
/// in the report, beside what was restored.
pub async fn run(
    session: &Session,
    request: &ApplyRequest,
    progress: Arc<dyn Progress>,
    cancel: &CancelToken,
) -> Result<RestoreReport> {
    let begin = Instant::now();
    let plan = &request.plan;
    plan.check()?;
    let hash = plan.hash()?;
    if hash != request.hash {
        return Err(Error::new(Kind::Conflict, format!("the plan is {}, not {}", hash.short(), request.hash.short()))
            .operation("apply")
            .hint("it was changed after it was reviewed; make it again with `stillpoint plan`"));
    }
    let record = {
        let (session, plan, hash) = (session.clone(), plan.clone(), hash.clone());
        on_thread("restore journal", move || Record::open(&session, &plan, &hash)).await?
    };
    let ours = record.begun();
    let ready = prepare(session, request, &ours, cancel).await?;
    let record = on_thread("restore journal", move || record.begin()).await?;
    if !ours.is_empty() {
        let text = format!("going on with the restore {}, of which {} stores were begun", record.name(), ours.len());
        progress.update(Update::Message { text });
    }
    let scene = Scene::new(session, plan, &ready, Arc::new(record), Arc::clone(&progress));
    let (stores, failure) = scene.run(cancel).await?;
    let mut report = RestoreReport {
        restore: scene.record().name().to_owned(),
        hash,
        point: plan.point.clone(),
        environment: plan.target_environment.clone(),
        proven: false,
        restored: false,
        stores,
        references: Vec::new(),
        notes: plan.warnings.clone(),
        failures: failure.iter().map(describe).collect(),
        elapsed_millis: 0,
    };
    if plan.in_place && !ours.is_empty() {
        report
            .notes
            .push("an earlier attempt may have kept the originals beside the stores; see its journal".to_owned());
    }
    if failure.is_none() && report.stores.iter().all(StoreReport::is_good) {
        report.restored = check_references(session, plan, &ready, &mut report, cancel).await?;
    }
    report.proven = report.restored && report.stores.iter().all(|store| store.status == StoreStatus::Proven);
    report.elapsed_millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (record, ended) = (Arc::clone(scene.record()), report.clone());
    if let Err(error) = on_thread("restore journal", move || record.end(&ended)).await {
        report.fail(&error);
    }
    Ok(report)
}

/// Looks again at everything the plan was made for, and at the fence.
async fn prepare(
    session: &Session,
    request: &ApplyRequest,
    ours: &BTreeSet<StoreName>,
    cancel: &CancelToken,
) -> Result<Draft> {
    let context = Context::default();
    let asked = PlanRequest::of(&request.plan, request.typed.clone());
    let ready = tokio::select! {
        ready = draft(session, &asked, ours, &context) => ready?,
        () = cancel.cancelled() => return Err(Error::new(Kind::Cancelled, "stopped on request")),
    };
    fence::refuse(&ready.findings)?;
    // Warnings are for people and may differ between two looks, e.g. when a source stops answering.
    let mut now = ready.plan.clone();
    now.warnings.clone_from(&request.plan.warnings);
    let differences = request.plan.differences(&now, ours);
    if let Some(first) = differences.first() {
        let more = differences.len() - 1;
        let others = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        return Err(Error::new(Kind::Conflict, format!("the plan does not fit any more: {first}{others}"))
            .operation("apply")
            .hint("nothing was written; review a new plan with `stillpoint plan`"));
    }
    Ok(ready)
}

/// Evaluates every reference between stores that were restored whole. False if one fails; one that
/// cannot be evaluated is a failure of the report, for the stores are restored all the same.
///
/// # Errors
/// `Cancelled`.
async fn check_references(
    session: &Session,
    plan: &RestorePlan,
    ready: &Draft,
    report: &mut RestoreReport,
    cancel: &CancelToken,
) -> Result<bool> {
    let mut good = true;
    let whole = |store: &StoreName| plan.step(store).is_some_and(|step| step.part.is_none());
    for reference in &session.platform().references {
        let (from, to, kind) = (&reference.from, &reference.to, &reference.kind);
        let (source, target) = match (ready.drivers.get(from), ready.drivers.get(to)) {
            (Some(source), Some(target)) => (source, target),
            (None, None) => continue,
            (found, _) => {
                let other = if found.is_some() { to } else { from };
                let why = format!("`{other}` is not part of this restore");
                report.notes.push(format!("references from `{from}` to `{to}` were not evaluated: {why}"));
                continue;
            }
        };
        if !whole(from) || !whole(to) {
            report
                .notes
                .push(format!("references from `{from}` to `{to}` were not evaluated: only a part was restored"));
            continue;
        }
        let context = Context::default();
        let (declared, environment) = (reference.clone(), plan.target_environment.to_string());
        let (source, target) = (Arc::clone(source), Arc::clone(target));
        let (working, scratch, runtime) = (context.clone(), ready.scratch.path().to_owned(), Handle::current());
        let work = on_thread("references", move || {
            let sides = ((source.as_ref(), None), (target.as_ref(), None));
            crate::references::check(&declared, &environment, sides.0, sides.1, &scratch, &working, &runtime)
        });
        let checked = tokio::select! {
            biased;
            () = cancel.cancelled() => {
                context.cancel();
                return Err(Error::new(Kind::Cancelled, "stopped on request").hint("the stores are restored; only references were not evaluated"));
            }
            checked = work => checked,
        };
        let count = match checked {
            Ok(checked) => checked.count(),
            Err(error) => {
                good = false;
                report.fail(&error.context("while references were checked from", format!("`{from}` to `{to}`")));
                continue;
            }
        };
        if count.missing > reference.allow_missing && reference.policy == ReferencePolicy::Fail {
            good = false;
        }
        report.references.push(ReferenceState {
            from: from.clone(),
            to: to.clone(),
            kind: kind.clone(),
            checked: count.checked,
            missing: count.missing,
            examples: count.examples,
            unreferenced: count.unreferenced,
        });
    }
    Ok(good)
}
