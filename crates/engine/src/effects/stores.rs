//! Calls on drivers. Those that must not block have a deadline; drains have a thread of their own.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::coordinator::{Micros, Outcome, Pinned, StoreDrained};
use stillpoint_core::driver::{Context, Driver, EdgeQuery, Pin, Validity};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{CutId, StoreName};
use stillpoint_core::tree::Tree;
use stillpoint_repo::SnapshotId;

use super::{DrainView, Hands, locked, on_thread};
use crate::points;
use crate::references;

/// How long a driver may take to probe and prepare: it may wait for a running fork or mutation.
const PREPARE_WITHIN: Duration = Duration::from_secs(600);
/// How long reading a position, or fixing a view, may take.
const CUT_WITHIN: Duration = Duration::from_secs(60);
/// How long checking a pin may take, and letting go of it.
const CHECK_WITHIN: Duration = Duration::from_secs(30);

/// Waits for a driver, but not for ever. The driver drops what it was doing.
async fn within<T>(
    limit: Duration,
    store: &StoreName,
    operation: &str,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    let named = |error: Error| error.store(store.as_str()).operation(operation.to_owned());
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result.map_err(named),
        Err(_) => Err(named(
            Error::new(Kind::TimedOut, format!("the store did not answer within {} s", limit.as_secs()))
                .hint("see whether it is overloaded, or waits for a lock"),
        )),
    }
}

impl Hands {
    /// The store's driver, opened at its first use.
    pub(super) fn driver(&self, store: &StoreName) -> Result<Arc<dyn Driver>> {
        let mut drivers = locked(&self.drivers);
        if let Some(driver) = drivers.get(store) {
            return Ok(Arc::clone(driver));
        }
        let scratch = self.head.scratch.join("stores").join(store.as_str());
        std::fs::create_dir_all(&scratch).or_io(|| format!("cannot create the folder `{}`", scratch.display()))?;
        let driver = (self.surroundings.open_store)(&self.session, store, &scratch)?;
        drivers.insert(store.clone(), Arc::clone(&driver));
        Ok(driver)
    }

    pub(super) async fn prepare(&self, store: &StoreName, context: &Context) -> Result<Outcome> {
        let driver = self.driver(store)?;
        let probe = within(PREPARE_WITHIN, store, "probe", driver.probe(context)).await?;
        if let Some(missing) = probe.missing_privileges.first() {
            let more = probe.missing_privileges.len() - 1;
            let others = if more > 0 { format!(", and {more} more") } else { String::new() };
            return Err(Error::new(Kind::PermissionDenied, format!("privileges are missing: {missing}{others}"))
                .store(store.as_str())
                .operation("probe")
                .hint(probe.missing_privileges.join("; ")));
        }
        for warning in &probe.warnings {
            self.warn(format!("store `{store}`: {warning}"));
        }
        let queries = self.queries_of(store);
        within(PREPARE_WITHIN, store, "prepare", driver.expect_edges(&queries)).await?;
        let hold = within(PREPARE_WITHIN, store, "prepare", driver.prepare(context)).await?;
        locked(&self.probes).insert(store.clone(), probe.clone());
        let view = DrainView {
            context: Context::default(),
            bytes_estimate: hold.bytes_estimate.unwrap_or(0),
            bytes_read: 0,
            bytes_stored: 0,
            done: false,
        };
        locked(&self.drains).insert(store.clone(), view);
        let safe_for_micros = u64::try_from(hold.safe_for.as_micros()).unwrap_or(u64::MAX);
        Ok(Outcome::Prepared { probe: Box::new(probe), safe_for_micros })
    }

    /// What the references of the platform will ask of this store's pin.
    fn queries_of(&self, store: &StoreName) -> Vec<EdgeQuery> {
        self.head.platform.references.iter().flat_map(|reference| references::queries_of(reference, store)).collect()
    }

    pub(super) async fn observe(&self, store: &StoreName, context: &Context) -> Result<Outcome> {
        let driver = self.driver(store)?;
        let position = within(CUT_WITHIN, store, "observe", driver.observe(context)).await?;
        Ok(Outcome::Observed { position })
    }

    pub(super) async fn pin(&self, store: &StoreName, cut: &CutId, context: &Context) -> Result<Outcome> {
        let driver = self.driver(store)?;
        let clock = &self.surroundings.clock;
        let now = || (Micros(u64::try_from(clock.monotonic().as_micros()).unwrap_or(u64::MAX)), clock.utc());
        let before = now();
        let pin = within(CUT_WITHIN, store, "cut", driver.cut(context, cut)).await?;
        let after = now();
        if pin.cut != *cut {
            return Err(Error::internal("the driver answered with the pin of another cut").store(store.as_str()));
        }
        locked(&self.pins).insert(store.clone(), pin.clone());
        let pinned = Pinned { pin, between: (before.0, after.0), between_utc: (before.1, after.1) };
        Ok(Outcome::Pinned(Box::new(pinned)))
    }

    pub(super) async fn check_pin(&self, store: &StoreName, pin: &Pin, context: &Context) -> Result<Outcome> {
        let driver = self.driver(store)?;
        match within(CHECK_WITHIN, store, "still_valid", driver.still_valid(context, pin)).await? {
            Validity::Valid => Ok(Outcome::PinValid),
            Validity::Lost(reason) => Ok(Outcome::PinLost { reason }),
        }
    }

    pub(super) async fn release(&self, store: &StoreName, remains: &[String], context: &Context) -> Result<Outcome> {
        let driver = self.driver(store)?;
        within(CHECK_WITHIN, store, "release", driver.release(context, remains)).await?;
        Ok(Outcome::Done)
    }

    pub(super) async fn drain(self: Arc<Self>, store: StoreName, pin: Pin, context: Context) -> Result<Outcome> {
        let _connection = self.budget.connection().await?;
        context.check()?;
        if let Some(view) = locked(&self.drains).get_mut(&store) {
            context.expect_bytes(view.bytes_estimate);
            view.context = context.clone();
        }
        let parent = self.parent_tree(&store).await?;
        let driver = self.driver(&store)?;
        let hands = Arc::clone(&self);
        let runtime = tokio::runtime::Handle::current();
        let name = store.clone();
        let thread = format!("drain {store}");
        let drained = on_thread(&thread, move || {
            let mut sink = match locked(&hands.backup).as_ref() {
                Some(backup) => backup.store(&name, parent.clone())?,
                None => return Err(Error::internal("a drain began without a backup")),
            };
            let drained = runtime.block_on(driver.drain(&context, &pin, &mut sink, parent.as_deref()))?;
            let summary = sink.finish()?;
            Ok((drained, summary))
        });
        let (mut drained, summary) = drained.await.map_err(|error| error.store(store.as_str()).operation("drain"))?;
        drained.losses.extend(summary.torn);
        if let Some(view) = locked(&self.drains).get_mut(&store) {
            view.done = true;
            view.bytes_read = drained.bytes_read;
            view.bytes_stored = summary.bytes_stored;
        }
        Ok(Outcome::Drained(Box::new(StoreDrained { drained, files: summary.files, bytes: summary.bytes })))
    }

    pub(super) async fn check_reference(self: Arc<Self>, reference: u32, context: Context) -> Result<Outcome> {
        let index = reference as usize;
        let declared = self.head.platform.references.get(index).cloned();
        let declared = declared.ok_or_else(|| Error::internal("a reference that the platform does not have"))?;
        let (from, to) = (self.driver(&declared.from)?, self.driver(&declared.to)?);
        let pins = (self.pin_of(&declared.from)?, self.pin_of(&declared.to)?);
        let scratch = self.head.scratch.join(format!("reference-{reference}"));
        let runtime = tokio::runtime::Handle::current();
        let (thread, store) = (format!("reference {reference}"), declared.from.clone());
        let environment = self.head.platform.environment.to_string();
        let checked = on_thread(&thread, move || {
            std::fs::create_dir_all(&scratch).or_io(|| format!("cannot create the folder `{}`", scratch.display()))?;
            let (from, to) = ((from.as_ref(), Some(&pins.0)), (to.as_ref(), Some(&pins.1)));
            references::check(&declared, &environment, from, to, &scratch, &context, &runtime)
        });
        let checked = checked.await.map_err(|error| error.store(store.as_str()).operation("references"))?;
        Ok(Outcome::References(checked.count()))
    }

    fn pin_of(&self, store: &StoreName) -> Result<Pin> {
        let pin = locked(&self.pins).get(store).cloned();
        pin.ok_or_else(|| Error::internal("a reference is checked before the cut").store(store.as_str()))
    }

    /// The store's tree in the newest point of this platform that holds the same store.
    async fn parent_tree(&self, store: &StoreName) -> Result<Option<Arc<dyn Tree>>> {
        let Some(identity) = locked(&self.probes).get(store).map(|probe| probe.identity.clone()) else {
            return Ok(None);
        };
        let session = self.session.clone();
        let listing = self.points.get_or_try_init(|| async {
            let list = on_thread("points", move || points::list(session.bucket().as_ref(), session.repository()));
            list.await.map(Arc::new)
        });
        let listing = Arc::clone(listing.await.map_err(|error| error.operation("look for the parent point"))?);
        let platform = &self.head.platform;
        let same = |state: &stillpoint_core::statefile::StoreState| state.identity == identity;
        let parent = listing
            .of(&platform.platform, &platform.environment)
            .find(|point| point.stores.get(store).is_some_and(same));
        let Some(point) = parent else { return Ok(None) };
        let (id, snapshot) = (point.point.clone(), SnapshotId::parse(&point.snapshot)?);
        let (repository, top) = (self.session.repository().clone(), store.clone());
        let tree = on_thread("parent", move || repository.tree(&snapshot, Some(&top))).await;
        match tree {
            Ok(Some(tree)) => {
                locked(&self.parent).get_or_insert(id);
                Ok(Some(tree))
            }
            // A damaged parent costs time, not the point: everything is read again.
            Ok(None) => {
                self.warn(format!("store `{store}`: the parent point {id} lacks it; everything is read again"));
                Ok(None)
            }
            Err(error) if error.is_temporary() => Err(error),
            Err(error) => {
                self.warn(format!("store `{store}`: the parent point {id} is not used: {error}"));
                Ok(None)
            }
        }
    }
}
