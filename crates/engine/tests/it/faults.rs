//! Stores and buckets that misbehave where a test says so.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use stillpoint_core::capability::Probe;
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Loss, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};
use stillpoint_repo::depot::{Depot, DepotCapability, ObjectInfo, Version, WriteMode};

/// What a store does instead of, or before, what it should.
pub enum Fault {
    /// Nothing special.
    None,
    /// Fails.
    Fail(Error),
    /// Waits, looking for a request to stop.
    Wait(Duration),
    /// Waits without looking: a driver that is stuck in a call.
    Stuck(Duration),
}

/// Asked at the begin of every call, by the call's name.
pub type Plan = Arc<dyn Fn(&str) -> Fault + Send + Sync>;

/// A store that behaves but for its plan.
pub struct FaultyStore {
    pub inner: Arc<dyn Driver>,
    pub plan: Plan,
    /// Cannot tell whether it is being written to.
    pub blind: bool,
    /// Says at the end that the view is gone.
    pub loses_pin: bool,
    /// Names a loss at every drain.
    pub loses_a_file: bool,
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({:?})", self.inner)
    }
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn Driver>, plan: Plan) -> Self {
        Self { inner, plan, blind: false, loses_pin: false, loses_a_file: false }
    }

    async fn follow(&self, call: &str, context: &Context) -> Result<()> {
        match (self.plan)(call) {
            Fault::None => Ok(()),
            Fault::Fail(error) => Err(error),
            Fault::Wait(time) => {
                let until = tokio::time::Instant::now() + time;
                while tokio::time::Instant::now() < until {
                    context.check()?;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(())
            }
            Fault::Stuck(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
        }
    }
}

#[async_trait]
impl Driver for FaultyStore {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        self.follow("probe", context).await?;
        let mut probe = self.inner.probe(context).await?;
        probe.capability.observes_writes &= !self.blind;
        Ok(probe)
    }

    async fn prepare(&self, context: &Context) -> Result<Hold> {
        self.follow("prepare", context).await?;
        self.inner.prepare(context).await
    }

    async fn observe(&self, context: &Context) -> Result<Option<Position>> {
        self.follow("observe", context).await?;
        if self.blind { Ok(None) } else { self.inner.observe(context).await }
    }

    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        self.follow("cut", context).await?;
        let mut pin = self.inner.cut(context, cut).await?;
        pin.remains.push(format!("remains of {cut}"));
        Ok(pin)
    }

    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained> {
        self.follow("drain", context).await?;
        let mut drained = self.inner.drain(context, pin, sink, parent).await?;
        if self.loses_a_file {
            drained.losses.push(Loss { what: "log/today".to_owned(), why: "it changed while it was read".to_owned() });
        }
        Ok(drained)
    }

    async fn still_valid(&self, context: &Context, pin: &Pin) -> Result<Validity> {
        self.follow("still_valid", context).await?;
        if self.loses_pin {
            return Ok(Validity::Lost("the session that held it was closed by the server".to_owned()));
        }
        self.inner.still_valid(context, pin).await
    }

    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()> {
        self.follow("edges", context).await?;
        self.inner.edges(context, pin, query, visit).await
    }

    async fn release(&self, context: &Context, remains: &[String]) -> Result<()> {
        self.follow(&format!("release {}", remains.join(",")), context).await?;
        self.inner.release(context, &[]).await
    }

    async fn identity(&self, context: &Context) -> Result<Identity> {
        self.inner.identity(context).await
    }

    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored> {
        self.inner.restore(context, source, request).await
    }

    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification> {
        self.inner.verify(context, source).await
    }

    async fn stamp(&self, context: &Context, stamp: &Stamp) -> Result<()> {
        self.inner.stamp(context, stamp).await
    }

    async fn read_stamp(&self, context: &Context) -> Result<Option<Stamp>> {
        self.inner.read_stamp(context).await
    }

    /// Runs nothing; the plan is asked before and after.
    async fn execute(&self, context: &Context, statement: &str) -> Result<()> {
        self.follow(&format!("begin {statement}"), context).await?;
        self.follow(&format!("end {statement}"), context).await
    }
}

/// What becomes of a write to a faulty bucket.
pub enum WriteFault {
    /// It is written.
    None,
    /// It fails and nothing is written.
    Fail(Error),
    /// It is written, and the answer is lost.
    AnswerLost,
    /// It is written, and the answer is this error.
    WrittenBut(Error),
}

/// Asked at every write and delete, by the object's name.
pub type WritePlan = Arc<dyn Fn(&str) -> WriteFault + Send + Sync>;

/// A bucket that behaves but for its plan.
pub struct FaultyBucket {
    pub inner: Arc<dyn Depot>,
    pub plan: WritePlan,
}

impl fmt::Debug for FaultyBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyBucket({:?})", self.inner)
    }
}

impl Depot for FaultyBucket {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.inner.read(name)
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.inner.read_range(name, offset, length)
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        match (self.plan)(name) {
            WriteFault::None => self.inner.write(name, parts, mode),
            WriteFault::Fail(error) => Err(error),
            WriteFault::WrittenBut(error) => self.inner.write(name, parts, mode).and(Err(error)),
            WriteFault::AnswerLost => {
                self.inner.write(name, parts, mode)?;
                Err(Error::new(Kind::Unreachable, "the connection was reset while the answer was awaited").temporary())
            }
        }
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.inner.stat(name)
    }

    fn delete(&self, name: &str) -> Result<()> {
        match (self.plan)(name) {
            WriteFault::None => self.inner.delete(name),
            WriteFault::Fail(error) => Err(error),
            WriteFault::WrittenBut(error) => self.inner.delete(name).and(Err(error)),
            WriteFault::AnswerLost => self.inner.delete(name),
        }
    }

    fn capability(&self) -> DepotCapability {
        self.inner.capability()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}
