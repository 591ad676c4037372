//! Runs the restores of all stores: as many at a time as the limits allow, in the order of their
//! needs, and stops them within 10 s when asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::plan::restore::RestoreStep;
use stillpoint_core::position::Stamp;
use tokio::task::JoinSet;

use super::record::Record;
use super::store::{Job, describe};
use super::{StoreReport, StoreStatus};
use crate::cancel::CancelToken;
use crate::fence::{Fence, Finding, Intent, Target};
use crate::open::Session;
use crate::ops::plan::Draft;
use crate::progress::{Progress, StoreProgress, Update};

/// How long stores may take to stop; an orderly stop has 10 s in all.
const STOP_WITHIN: Duration = Duration::from_secs(8);
/// Between two looks at how far everything is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// All stores of one restore.
pub(super) struct Scene<'a> {
    plan: &'a RestorePlan,
    ready: &'a Draft,
    record: Arc<Record>,
    progress: Arc<dyn Progress>,
    at_once: usize,
    contexts: BTreeMap<StoreName, Context>,
}

impl<'a> Scene<'a> {
    pub(super) fn new(
        session: &Session,
        plan: &'a RestorePlan,
        ready: &'a Draft,
        record: Arc<Record>,
        progress: Arc<dyn Progress>,
    ) -> Self {
        let at_once = session.platform().limits.connections.max(1) as usize;
        let contexts = plan.steps.iter().map(|step| (step.store.clone(), Context::default())).collect();
        Self { plan, ready, record, progress, at_once, contexts }
    }

    pub(super) fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// Restores everything. A failed store ends the restore once those under way are done; a failure of
    /// the restore itself, such as a lost journal, stops those under way and is returned beside what
    /// became of the stores.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(super) async fn run(&self, cancel: &CancelToken) -> Result<(Vec<StoreReport>, Option<Error>)> {
        let mut reports: BTreeMap<StoreName, StoreReport> = BTreeMap::new();
        for step in &self.plan.steps {
            if let Some(done) = self.record.done(&step.store) {
                reports.insert(step.store.clone(), StoreReport { done_before: true, ..done.clone() });
            }
        }
        let mut jobs: JoinSet<Result<StoreReport>> = JoinSet::new();
        let mut started: BTreeSet<StoreName> = reports.keys().cloned().collect();
        let mut failure: Option<Error> = None;
        let mut stop_by: Option<Instant> = None;
        let mut rates = BTreeMap::new();
        loop {
            let failed = failure.is_some() || reports.values().any(|report| !report.is_good());
            if !failed
                && stop_by.is_none()
                && let Err(error) = self.start(&mut jobs, &mut started, &reports)
            {
                failure = Some(error);
                self.stop();
            }
            if jobs.is_empty() {
                break;
            }
            tokio::select! {
                ended = jobs.join_next() => match ended {
                    Some(Ok(Ok(report))) => { reports.insert(report.store.clone(), report); }
                    Some(Ok(Err(error))) => { failure.get_or_insert(error); self.stop(); }
                    Some(Err(panic)) => { failure.get_or_insert(Error::internal("a restore broke").source(panic)); }
                    None => {}
                },
                () = cancel.cancelled(), if stop_by.is_none() => {
                    self.stop();
                    stop_by = Some(Instant::now() + STOP_WITHIN);
                }
                () = tokio::time::sleep(PROGRESS_EVERY) => self.tell(&started, &reports, &mut rates),
            }
            if stop_by.is_some_and(|by| Instant::now() >= by) {
                jobs.detach_all();
                break;
            }
        }
        self.tell(&started, &reports, &mut rates);
        if stop_by.is_some() {
            return Err(Error::new(Kind::Cancelled, "stopped on request")
                .operation("apply")
                .hint("apply the same plan again to go on"));
        }
        Ok((self.in_order(reports, &started, failure.as_ref()), failure))
    }

    fn start(
        &self,
        jobs: &mut JoinSet<Result<StoreReport>>,
        started: &mut BTreeSet<StoreName>,
        reports: &BTreeMap<StoreName, StoreReport>,
    ) -> Result<()> {
        for step in &self.plan.steps {
            let ready = step.needs.iter().all(|need| reports.get(need).is_some_and(StoreReport::is_good));
            if ready && jobs.len() < self.at_once && started.insert(step.store.clone()) {
                jobs.spawn(self.job(step)?.run());
            }
        }
        Ok(())
    }

    fn job(&self, step: &RestoreStep) -> Result<Job> {
        let store = &step.store;
        let missing = || Error::internal("a planned store was not opened").store(store.as_str());
        let plan = self.plan;
        let attempts = self.record.attempts(store);
        Ok(Job {
            step: step.clone(),
            driver: Arc::clone(self.ready.drivers.get(store).ok_or_else(missing)?),
            tree: Arc::clone(self.ready.trees.get(store).ok_or_else(missing)?),
            record: Arc::clone(&self.record),
            stamp: Stamp {
                platform: plan.platform.as_str().to_owned(),
                environment: plan.target_environment.as_str().to_owned(),
                point: plan.point.as_str().to_owned(),
                restore: self.record.name().to_owned(),
                at: Timestamp::now(),
            },
            context: self.contexts.get(store).cloned().unwrap_or_default(),
            replaces: plan.in_place || attempts > 0 || (plan.replaces && step.target.overwrites.is_some()),
            in_place: plan.in_place,
            attempts,
            compares: plan.compares,
            is_stamped: self.record.is_stamped(store),
            fence: self.fence(step),
        })
    }

    /// The fence as it stood when everything was looked at; typed identities were checked then.
    fn fence(&self, step: &RestoreStep) -> Arc<dyn Fn(&Target) -> Vec<Finding> + Send + Sync> {
        let plan = self.plan.clone();
        let sources = self.ready.sources.clone();
        let typed: Vec<String> = step.target.identity.iter().map(|identity| identity.typed().to_owned()).collect();
        Arc::new(move |target| {
            let intent = match plan.in_place {
                true => Intent::InPlace { typed: &typed },
                false => Intent::Copy { replace: plan.replaces },
            };
            let fence = Fence {
                platform: &plan.platform,
                source_environment: &plan.source_environment,
                target_environment: &plan.target_environment,
                sources: &sources,
                intent,
            };
            fence.check(std::slice::from_ref(target))
        })
    }

    fn stop(&self) {
        self.contexts.values().for_each(Context::cancel);
    }

    fn tell(
        &self,
        started: &BTreeSet<StoreName>,
        reports: &BTreeMap<StoreName, StoreReport>,
        rates: &mut BTreeMap<StoreName, (Instant, u64)>,
    ) {
        let mut stores = Vec::new();
        for step in self.plan.steps.iter().filter(|step| started.contains(&step.store)) {
            let (bytes_done, items_done, expected) =
                self.contexts.get(&step.store).map(Context::progress).unwrap_or_default();
            let (since, first) = *rates.entry(step.store.clone()).or_insert((Instant::now(), bytes_done));
            let millis = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
            stores.push(StoreProgress {
                store: step.store.clone(),
                bytes_done,
                bytes_expected: expected.max(step.bytes),
                items_done,
                bytes_per_second: bytes_done.saturating_sub(first).saturating_mul(1_000) / millis,
                done: reports.contains_key(&step.store),
            });
        }
        if !stores.is_empty() {
            self.progress.update(Update::Stores { stores });
        }
    }

    fn in_order(
        &self,
        mut reports: BTreeMap<StoreName, StoreReport>,
        started: &BTreeSet<StoreName>,
        failure: Option<&Error>,
    ) -> Vec<StoreReport> {
        let unreported = |store: &StoreName| match started.contains(store) {
            // Its target may have been written, whatever the journal knows of it.
            true => {
                let error = failure.map(describe);
                StoreReport { error, ..StoreReport::new(store.clone(), StoreStatus::Failed) }
            }
            false => StoreReport::new(store.clone(), StoreStatus::NotStarted),
        };
        let steps = self.plan.steps.iter();
        steps.map(|step| reports.remove(&step.store).unwrap_or_else(|| unreported(&step.store))).collect()
    }
}
