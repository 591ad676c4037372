//! A driver as a table of plain functions, and the one place that knows which of them may wait where.
//!
//! The contract is asynchronous, but what drivers wait for is not: disks, locks, programs. So each
//! writes its phases as functions that simply wait, names them in one table, and is turned into a
//! [`Driver`] here. A table, because a trait would repeat every signature in every driver. Knows no
//! kind of store.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use stillpoint_core::capability::Probe;
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};

/// The same store's tree in an earlier point, which a drain need not copy again.
pub(crate) type Parent<'a> = Option<&'a (dyn Tree + 'a)>;

/// What `edges` hands its findings to.
pub(crate) type Visit<'a> = &'a mut (dyn FnMut(Edge) -> Result<()> + Send + 'a);

/// The phases of one kind of store, whose value is `S`. What each must do stands at [`Driver`]; all
/// of them may block their thread.
pub(crate) struct Phases<S> {
    pub(crate) probe: fn(&S) -> Result<Probe>,
    pub(crate) prepare: fn(&S, &Context) -> Result<Hold>,
    pub(crate) observe: fn(&S) -> Result<Option<Position>>,
    pub(crate) cut: fn(&S, &Context, &CutId) -> Result<Pin>,
    pub(crate) drain: fn(&S, &Context, &Pin, &mut dyn Sink, Parent<'_>) -> Result<Drained>,
    pub(crate) still_valid: fn(&S, &Pin) -> Result<Validity>,
    pub(crate) edges: fn(&S, &Context, Option<&Pin>, &EdgeQuery, Visit<'_>) -> Result<()>,
    pub(crate) release: fn(&S, &[String]) -> Result<()>,
    pub(crate) identity: fn(&S) -> Result<Identity>,
    pub(crate) restore: fn(&S, &Context, &dyn Tree, &RestoreRequest) -> Result<Restored>,
    pub(crate) verify: fn(&S, &Context, &dyn Tree) -> Result<Verification>,
    pub(crate) stamp: fn(&S, &Stamp) -> Result<()>,
    pub(crate) read_stamp: fn(&S) -> Result<Option<Stamp>>,
    pub(crate) occupied: fn(&S) -> Result<Option<String>>,
    /// `None` where the store has no language.
    pub(crate) execute: Option<fn(&S, &str) -> Result<()>>,
}

/// One store with its phases: what the engine sees of it.
pub(crate) struct Phased<S: 'static> {
    pub(crate) store: Arc<S>,
    phases: &'static Phases<S>,
    expect_edges: Option<fn(&S, &[EdgeQuery]) -> Result<()>>,
}

impl<S: Send + Sync + 'static> Phased<S> {
    pub(crate) fn new(store: S, phases: &'static Phases<S>) -> Self {
        Self { store: Arc::new(store), phases, expect_edges: None }
    }

    /// For a store whose view passes by once: it must know queries beforehand.
    pub(crate) fn expecting_edges(mut self, expect: fn(&S, &[EdgeQuery]) -> Result<()>) -> Self {
        self.expect_edges = Some(expect);
        self
    }

    /// Runs what may wait on a thread where waiting hurts nobody. Once begun it runs to its end,
    /// also when nobody waits for it any more.
    async fn aside<T: Send + 'static>(&self, work: impl FnOnce(&S) -> Result<T> + Send + 'static) -> Result<T> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(|error| Error::internal("a blocking task of a driver ended early").source(error))?
    }
}

impl<S: fmt::Debug> fmt::Debug for Phased<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

/// `drain`, `edges`, `restore` and `verify` stay on the caller's thread, which is their own by the
/// contract and owns what they borrow; everything else goes aside.
#[async_trait]
impl<S: fmt::Debug + Send + Sync + 'static> Driver for Phased<S> {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        context.check()?;
        self.aside(self.phases.probe).await
    }

    async fn expect_edges(&self, queries: &[EdgeQuery]) -> Result<()> {
        self.expect_edges.map_or(Ok(()), |expect| expect(&self.store, queries))
    }

    async fn prepare(&self, context: &Context) -> Result<Hold> {
        let (prepare, context) = (self.phases.prepare, context.clone());
        self.aside(move |store| prepare(store, &context)).await
    }

    async fn observe(&self, _: &Context) -> Result<Option<Position>> {
        self.aside(self.phases.observe).await
    }

    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        let (take, context, cut) = (self.phases.cut, context.clone(), cut.clone());
        self.aside(move |store| take(store, &context, &cut)).await
    }

    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained> {
        (self.phases.drain)(&self.store, context, pin, sink, parent)
    }

    async fn still_valid(&self, _: &Context, pin: &Pin) -> Result<Validity> {
        let (still_valid, pin) = (self.phases.still_valid, pin.clone());
        self.aside(move |store| still_valid(store, &pin)).await
    }

    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()> {
        (self.phases.edges)(&self.store, context, pin, query, visit)
    }

    async fn release(&self, _: &Context, remains: &[String]) -> Result<()> {
        let (release, remains) = (self.phases.release, remains.to_vec());
        self.aside(move |store| release(store, &remains)).await
    }

    async fn identity(&self, _: &Context) -> Result<Identity> {
        self.aside(self.phases.identity).await
    }

    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored> {
        (self.phases.restore)(&self.store, context, source, request)
    }

    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification> {
        (self.phases.verify)(&self.store, context, source)
    }

    async fn stamp(&self, _: &Context, stamp: &Stamp) -> Result<()> {
        let (plant, stamp) = (self.phases.stamp, stamp.clone());
        self.aside(move |store| plant(store, &stamp)).await
    }

    async fn read_stamp(&self, _: &Context) -> Result<Option<Stamp>> {
        self.aside(self.phases.read_stamp).await
    }

    async fn occupied(&self, _: &Context) -> Result<Option<String>> {
        self.aside(self.phases.occupied).await
    }

    async fn execute(&self, context: &Context, statement: &str) -> Result<()> {
        let unsupported = || Error::new(Kind::Unsupported, "this kind of store runs no statements");
        let (execute, statement) = (self.phases.execute.ok_or_else(unsupported)?, statement.to_owned());
        context.check()?;
        self.aside(move |store| execute(store, &statement)).await
    }
}
