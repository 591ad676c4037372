//! The restore of one store: fence, restore, stamp, verify, each journalled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use stillpoint_core::driver::{Context, Driver, RestoreMode, RestoreRequest};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::plan::restore::RestoreStep;
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::{Tree, TreePath};
use tokio::runtime::Handle;

use super::record::{Line, Record};
use super::{StoreReport, StoreStatus};
use crate::effects::on_thread;
use crate::fence::{self, Finding, Target};

/// How long planting a stamp, or looking at a target, may take.
const SHORT: Duration = Duration::from_secs(120);

/// Everything that the restore of one store needs.
pub(super) struct Job {
    pub(super) step: RestoreStep,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) tree: Arc<dyn Tree>,
    pub(super) record: Arc<Record>,
    pub(super) stamp: Stamp,
    pub(super) context: Context,
    /// Replace what is there: in place, over an earlier copy, or over our own unfinished attempt.
    pub(super) replaces: bool,
    /// The target is the source itself, whose content survives a failed restore.
    pub(super) in_place: bool,
    /// How often earlier processes began to write this target.
    pub(super) attempts: u32,
    /// An earlier process has written and stamped it; only the comparison is left.
    pub(super) is_stamped: bool,
    /// What was written is read back and compared with the point.
    pub(super) compares: bool,
    /// What the fence says of a target as it is right now.
    pub(super) fence: Arc<dyn Fn(&Target) -> Vec<Finding> + Send + Sync>,
}

impl Job {
    /// Restores. What goes wrong is in the report, but for cancellation and a lost journal.
    pub(super) async fn run(self) -> Result<StoreReport> {
        let begin = Instant::now();
        let store = self.step.store.clone();
        let mut report = StoreReport::new(store.clone(), StoreStatus::Failed);
        let outcome = self.carry_out(&mut report).await;
        report.elapsed_millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        if let Err(error) = outcome {
            let error = error.store(store.as_str());
            if matches!(error.kind(), Kind::Cancelled | Kind::Locked) {
                return Err(error);
            }
            report.error = Some(describe(&error));
        }
        let (record, done) = (Arc::clone(&self.record), Box::new(report.clone()));
        on_thread("restore journal", move || record.append(&Line::Done { at: Timestamp::now(), report: done })).await?;
        Ok(report)
    }

    async fn carry_out(&self, report: &mut StoreReport) -> Result<()> {
        self.look_again().await?;
        if !self.is_stamped {
            self.write(report).await?;
        }
        report.endpoint = self.driver.identity(&self.context).await.ok().map(|identity| identity.endpoint);
        report.status = StoreStatus::Restored;
        if self.compares && self.step.part.is_none() {
            let verification = self.verify().await.inspect_err(|_| report.status = StoreStatus::Failed)?;
            report.checked = verification.checked;
            report.differences = verification.differences;
            report.status = match report.differences.is_empty() {
                true => StoreStatus::Proven,
                false => StoreStatus::Differs,
            };
        }
        Ok(())
    }

    async fn write(&self, report: &mut StoreReport) -> Result<()> {
        self.note(|store, at| Line::Begun { store, at }).await?;
        let restored = self.restore().await;
        if restored.as_ref().is_err_and(|error| error.kind() == Kind::AlreadyExists) {
            // It holds what somebody else put there: it is not ours to stamp, nor to replace at the next try.
            self.note(|store, at| Line::Refused { store, at }).await?;
            return restored.map(drop);
        }
        // A half-written copy must not be taken for an original: it gets its stamp all the same.
        if restored.is_ok() || !self.in_place {
            let stamped = self.plant().await;
            if restored.is_ok() {
                stamped?;
            }
        }
        let restored = restored?;
        (report.items, report.bytes) = (restored.items, restored.bytes);
        (report.kept_old, report.losses) = (restored.kept_old, restored.losses);
        self.note(|store, at| Line::Stamped { store, at }).await
    }

    /// The plan's look may be hours old: the target is asked once more, right before the first write.
    async fn look_again(&self) -> Result<()> {
        let look = tokio::time::timeout(SHORT, fence::look(&self.step.store, self.driver.as_ref(), &self.context));
        let mut target =
            look.await.unwrap_or_else(|_| Err(Error::new(Kind::TimedOut, "the target does not answer")))?;
        if self.attempts > 0 {
            target.occupied = None;
        }
        fence::refuse(&(self.fence)(&target))
    }

    async fn restore(&self) -> Result<stillpoint_core::driver::Restored> {
        let part = self.step.part.as_deref().map(TreePath::parse).transpose()?;
        let mode = if self.replaces { RestoreMode::InPlace } else { RestoreMode::Fresh };
        // What an earlier attempt kept beside may be the original, so its name is never used again.
        let restore = RestoreRequest::try_name(&self.stamp.restore, self.attempts + 1);
        let request = RestoreRequest { mode, part, restore };
        self.context.expect_bytes(self.step.bytes);
        let (driver, tree) = (Arc::clone(&self.driver), Arc::clone(&self.tree));
        let (context, runtime) = (self.context.clone(), Handle::current());
        on_thread("restore", move || runtime.block_on(driver.restore(&context, tree.as_ref(), &request)))
            .await
            .map_err(|error| error.operation("restore"))
    }

    async fn plant(&self) -> Result<()> {
        // Not under the cancelled context: a copy without a stamp is worse than a late answer.
        let context = Context::default();
        let stamp = Stamp { at: Timestamp::now(), ..self.stamp.clone() };
        let planted = tokio::time::timeout(SHORT, self.driver.stamp(&context, &stamp)).await;
        planted
            .unwrap_or_else(|_| Err(Error::new(Kind::TimedOut, "the stamp could not be planted in time")))
            .map_err(|error| error.operation("stamp"))
    }

    async fn verify(&self) -> Result<stillpoint_core::driver::Verification> {
        let (driver, tree) = (Arc::clone(&self.driver), Arc::clone(&self.tree));
        let (context, runtime) = (self.context.clone(), Handle::current());
        on_thread("verify", move || runtime.block_on(driver.verify(&context, tree.as_ref())))
            .await
            .map_err(|error| error.operation("verify"))
    }

    async fn note(&self, line: impl Fn(stillpoint_core::id::StoreName, Timestamp) -> Line) -> Result<()> {
        let (record, line) = (Arc::clone(&self.record), line(self.step.store.clone(), Timestamp::now()));
        on_thread("restore journal", move || record.append(&line)).await
    }
}

/// The error with its causes, on one line.
pub(super) fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!("; caused by: {inner}"));
        cause = inner.source();
    }
    if let Some(hint) = error.hint_text() {
        text.push_str(&format!("; hint: {hint}"));
    }
    text
}
