//! The pause: the watchdog first, then the steps; each undo may come any number of times.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stillpoint_core::coordinator::{Micros, Outcome};
use stillpoint_core::driver::Driver;
use stillpoint_core::error::{Error, IoContext, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::{Secret, Store};

use super::{Hands, Surroundings, locked, on_thread};
use crate::journal::Head;
use crate::open::Session;
use crate::pause::{Databases, Step};
use crate::watchdog::{Start, Watchdog};

/// How long an undo may take before it counts as failed and is tried again.
const RESUME_WITHIN: Duration = Duration::from_secs(10);

/// How long after the undo of a pause step that did not end cleanly the undo is repeated: a call that
/// was left may still have been on its way.
const REPEAT_AFTER: Duration = Duration::from_secs(1);
/// How long a statement of such a step is waited for before that.
const SETTLED_WITHIN: Duration = Duration::from_secs(5);

/// The stores of the SQL steps, opened apart from those that are backed up: a driver's calls must
/// not overlap.
pub(super) fn databases(surroundings: &Surroundings, session: &Session, head: &Head) -> Databases {
    let (surroundings, session, scratch) = (surroundings.clone(), session.clone(), head.scratch.join("pause"));
    Databases::new(Arc::new(move |store| {
        let folder = scratch.join(store.as_str());
        std::fs::create_dir_all(&folder).or_io(|| format!("cannot create the folder `{}`", folder.display()))?;
        (surroundings.open_store)(&session, store, &folder)
    }))
}

impl Hands {
    /// Where the watchdog of this run writes what it did. Locked while it lives.
    pub(crate) fn watchdog_report(&self) -> std::path::PathBuf {
        watchdog_report(&self.surroundings, &self.head)
    }

    pub(super) async fn start_watchdog(self: Arc<Self>, deadline: Micros) -> Result<Outcome> {
        let now = self.surroundings.clock.monotonic();
        let within = Duration::from_micros(deadline.0).saturating_sub(now);
        let hands = Arc::clone(&self);
        let watchdog = on_thread("watchdog", move || {
            let databases = crate::pause::databases_of(&hands.head.platform.pause, &hands.head.platform.stores);
            let secrets = secrets_of(&hands.session, &databases, &hands.head)?;
            let start = Start {
                run: &hands.head.run,
                undo: hands.steps.iter().map(|step| step.resume.clone()).collect(),
                databases,
                secrets,
                report: hands.watchdog_report(),
            };
            let watchdog = Watchdog::start(&hands.surroundings.watchdog, start)?;
            watchdog.arm(within)?;
            Ok(watchdog)
        })
        .await?;
        *locked(&self.watchdog) = Some(Arc::new(watchdog));
        Ok(Outcome::Done)
    }

    fn step(&self, step: u32) -> Result<&Step> {
        self.steps.get(step as usize).ok_or_else(|| Error::internal("a pause step that the platform does not have"))
    }

    pub(super) async fn pause(&self, step: u32) -> Result<Outcome> {
        let budget = Duration::from_micros(self.head.spec.pause_budget_micros);
        let act = &self.step(step)?.pause;
        let watchdog = locked(&self.watchdog).clone();
        let watchdog = watchdog.ok_or_else(|| Error::internal("writers would be paused without a watchdog"))?;
        let group = watchdog.group_watcher();
        let named = |error: Error| error.operation(format!("pause step {}", step + 1));
        // Taken back only after a clean answer: an interrupted call never gets to the last line.
        locked(&self.unclean).insert(step);
        self.performer.perform(act, budget, &group).await.map_err(named)?;
        locked(&self.unclean).remove(&step);
        Ok(Outcome::Done)
    }

    pub(crate) async fn resume(&self, step: u32) -> Result<Outcome> {
        let act = &self.step(step)?.resume;
        let named = |error: Error| {
            error.operation(format!("resume step {}", step + 1)).hint("writers may still be held back: run it by hand")
        };
        self.performer.perform(act, RESUME_WITHIN, &|_| {}).await.map_err(named)?;
        Ok(Outcome::Done)
    }

    /// Undoes once more the steps whose pause was interrupted, timed out or failed, so that a late
    /// call of theirs does not have the last word when the watchdog is gone.
    async fn resume_once_more(&self) -> Result<()> {
        let steps: Vec<u32> = locked(&self.unclean).iter().rev().copied().collect();
        if steps.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(REPEAT_AFTER).await;
        if !self.performer.settled(SETTLED_WITHIN).await {
            self.warn("a statement of a pause step still runs; see that the platform's writers run".to_owned());
        }
        let mut first_failure = None;
        for step in steps {
            match self.resume(step).await {
                Ok(_) => _ = locked(&self.unclean).remove(&step),
                Err(error) => _ = first_failure.get_or_insert(error),
            }
        }
        first_failure.map_or(Ok(()), Err)
    }

    pub(super) async fn stop_watchdog(&self) -> Result<Outcome> {
        let fired = locked(&self.watchdog).as_ref().is_some_and(|watchdog| *watchdog.fired().borrow());
        self.resume_once_more().await?;
        let Some(watchdog) = locked(&self.watchdog).take() else { return Ok(Outcome::Done) };
        if fired {
            self.warn("the watchdog let writers go at the deadline, before the run did".to_owned());
        }
        let watchdog = Arc::into_inner(watchdog)
            .ok_or_else(|| Error::internal("the watchdog is stopped while a pause step uses it"))?;
        // Writers run again by now; that their keeper died before its time is for people to know.
        if let Err(error) = on_thread("watchdog", move || watchdog.disarm()).await {
            self.warn(error.to_string());
        }
        Ok(Outcome::Done)
    }
}

pub(crate) fn watchdog_report(surroundings: &Surroundings, head: &Head) -> std::path::PathBuf {
    surroundings.state_folder.join(head.platform.platform.as_str()).join(format!("{}.watchdog", head.run))
}

/// The secrets that opening these stores asks for, by reference. Opening touches no store.
fn secrets_of(
    session: &Session,
    databases: &BTreeMap<StoreName, Store>,
    head: &Head,
) -> Result<BTreeMap<String, String>> {
    let found = Mutex::new(BTreeMap::new());
    for (name, store) in databases {
        let scratch = head.scratch.join("watchdog").join(name.as_str());
        std::fs::create_dir_all(&scratch).or_io(|| format!("cannot create the folder `{}`", scratch.display()))?;
        let recording = |secret: &Secret| {
            let value = session.config().secrets.resolve(secret)?;
            locked(&found).insert(secret.0.clone(), value.clone());
            Ok(value)
        };
        let request = stillpoint_drivers::OpenRequest {
            store: name,
            settings: &store.settings,
            kept: scratch.clone(),
            scratch,
            secrets: &recording,
        };
        let _opened: Arc<dyn Driver> = (stillpoint_drivers::find(&store.driver)?.open)(&request)?;
    }
    Ok(found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}
