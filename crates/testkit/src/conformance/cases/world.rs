//! What every case needs: filled stores, cuts, drains and restores in one line each.

use std::cell::Cell;
use std::future::Future;
use std::sync::Arc;

use stillpoint_core::driver::{Context, Drained, Driver, Loss, Pin, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::{CutId, RunId};
use stillpoint_core::tree::Tree;

use super::super::harness::{Content, Harness, Subject};
use crate::sink::{Drain, MemorySink};
use crate::tree::MemoryTree;

/// How a case ends early.
#[derive(Debug)]
pub(super) enum Stop {
    /// The duty is broken; what was seen.
    Broken(String),
    /// The case does not apply here; why.
    Skip(String),
}

pub(super) type Verdict<T = ()> = Result<T, Stop>;

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Broken(format!("{error:?}"))
    }
}

impl Stop {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Broken(text) | Self::Skip(text) => text,
        }
    }
}

/// Fails the case with a text unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::conformance::cases::world::Stop::Broken(format!($($text)+)));
        }
    };
}
pub(super) use ensure;

/// A throw-away store with a driver value on it. The value goes first, then the store.
pub(super) struct Opened {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) subject: Box<dyn Subject>,
}

/// A drain and what it said of itself.
pub(super) struct Yield {
    pub(super) drained: Drained,
    pub(super) drain: Drain,
}

impl Yield {
    /// All named losses: those that the driver listed and those that streams reported.
    pub(super) fn losses(&self) -> Vec<Loss> {
        self.drained.losses.iter().chain(&self.drain.torn).cloned().collect()
    }
}

/// One case's world: the harness and a runtime.
pub(super) struct World<'a> {
    pub(super) harness: &'a dyn Harness,
    runtime: tokio::runtime::Runtime,
}

fn runtime() -> Verdict<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Stop::Broken(format!("no runtime: {error}")))
}

impl<'a> World<'a> {
    pub(super) fn new(harness: &'a dyn Harness) -> Verdict<Self> {
        begin_run();
        Ok(Self { harness, runtime: runtime()? })
    }

    pub(super) fn block<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// A source that holds [`content`].
    pub(super) fn filled(&self) -> Verdict<Opened> {
        self.filled_with(&content())
    }

    pub(super) fn filled_with(&self, content: &Content) -> Verdict<Opened> {
        let subject = self.harness.source()?;
        for (key, value) in content {
            subject.put(key, value)?;
        }
        let held = subject.read()?;
        ensure!(held == *content, "the harness does not read back what it wrote: {}", difference(content, &held));
        Ok(Opened { driver: subject.open()?, subject })
    }

    pub(super) fn target(&self) -> Verdict<Opened> {
        let subject = self.harness.target()?;
        Ok(Opened { driver: subject.open()?, subject })
    }

    pub(super) fn prepare(&self, driver: &dyn Driver) -> Verdict {
        self.block(driver.prepare(&Context::default()))?;
        Ok(())
    }

    pub(super) fn cut(&self, driver: &dyn Driver, cut: &CutId) -> Verdict<Pin> {
        Ok(self.block(driver.cut(&Context::default(), cut))?)
    }

    /// Prepares and cuts.
    pub(super) fn pin(&self, driver: &dyn Driver) -> Verdict<Pin> {
        self.prepare(driver)?;
        self.cut(driver, &cut_id(1))
    }

    pub(super) fn drain(&self, driver: &dyn Driver, pin: &Pin, parent: Option<&MemoryTree>) -> Verdict<Yield> {
        let mut sink = MemorySink::with_parent(parent);
        let tree = parent.map(|tree| tree as &dyn Tree);
        let drained = self.block(driver.drain(&Context::default(), pin, &mut sink, tree))?;
        Ok(Yield { drained, drain: sink.finish()? })
    }

    /// Prepares, cuts, drains and releases a store that nobody writes to.
    pub(super) fn point(&self, store: &Opened, parent: Option<&MemoryTree>) -> Verdict<Yield> {
        let pin = self.pin(store.driver.as_ref())?;
        let point = self.drain(store.driver.as_ref(), &pin, parent)?;
        let losses = point.losses();
        ensure!(losses.is_empty(), "a store at rest has losses: {losses:?}");
        self.release(store.driver.as_ref())?;
        Ok(point)
    }

    pub(super) fn release(&self, driver: &dyn Driver) -> Verdict {
        Ok(self.block(driver.release(&Context::default(), &[]))?)
    }

    pub(super) fn restore(
        &self,
        driver: &dyn Driver,
        tree: &dyn Tree,
        mode: RestoreMode,
    ) -> stillpoint_core::Result<Restored> {
        let request = RestoreRequest { mode, part: None, restore: "restore1".to_owned() };
        self.block(driver.restore(&Context::default(), tree, &request))
    }

    /// What the tree holds, seen by restoring it and reading the target without the driver.
    pub(super) fn view(&self, tree: &dyn Tree) -> Verdict<Content> {
        let target = self.target()?;
        self.restore(target.driver.as_ref(), tree, RestoreMode::Fresh)?;
        Ok(target.subject.read()?)
    }

    pub(super) fn differences(&self, driver: &dyn Driver, tree: &dyn Tree) -> Verdict<Vec<String>> {
        Ok(self.block(driver.verify(&Context::default(), tree))?.differences)
    }
}

/// The world of a live case: one open driver, no hands of its own.
pub(super) struct Live<'a> {
    pub(super) driver: &'a dyn Driver,
    runtime: tokio::runtime::Runtime,
}

impl<'a> Live<'a> {
    pub(super) fn new(driver: &'a dyn Driver) -> Verdict<Self> {
        begin_run();
        Ok(Self { driver, runtime: runtime()? })
    }

    pub(super) fn block<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(super) fn pin(&self, cut: &CutId) -> Verdict<Pin> {
        self.block(self.driver.prepare(&Context::default()))?;
        Ok(self.block(self.driver.cut(&Context::default(), cut))?)
    }

    pub(super) fn release(&self) -> Verdict {
        Ok(self.block(self.driver.release(&Context::default(), &[]))?)
    }
}

thread_local! {
    /// Each case is a run of its own: what a failed one leaves must not get into another's way.
    static RUN: Cell<u64> = const { Cell::new(0) };
}

fn begin_run() {
    RUN.set(fastrand::u64(..));
}

/// The id of the case's run and its `attempt`.
pub(super) fn cut_id(attempt: u32) -> CutId {
    CutId { run: RunId::from_random(RUN.get().to_le_bytes()), attempt }
}

/// What sources are filled with: small and large, empty, nested and incompressible values.
pub(super) fn content() -> Content {
    let mut random = fastrand::Rng::with_seed(7);
    let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.u8(..)).collect() };
    let mut content = Content::new();
    content.insert("empty".to_owned(), Vec::new());
    content.insert("one".to_owned(), vec![0]);
    content.insert("text".to_owned(), b"line\r\nline\n\0\xff".to_vec());
    content.insert("deep/er/and/deeper".to_owned(), bytes(1024));
    for number in 0..24 {
        content.insert(format!("small/{number}"), bytes(number * 37 + 1));
    }
    for number in 0..8 {
        content.insert(format!("large/{number}"), bytes(256 * 1024 - number));
    }
    content
}

/// Bytes in all values.
pub(super) fn size(content: &Content) -> u64 {
    content.values().map(|value| value.len() as u64).sum()
}

/// Where two contents differ, for people.
pub(super) fn difference(expected: &Content, found: &Content) -> String {
    let keys: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let mut lines = keys.into_iter().filter_map(|key| match (expected.get(key), found.get(key)) {
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) => Some(format!("`{key}` has {} bytes, or others than the expected {}", b.len(), a.len())),
        (Some(_), None) => Some(format!("`{key}` is missing")),
        (None, _) => Some(format!("`{key}` is too much")),
    });
    let shown: Vec<_> = lines.by_ref().take(5).collect();
    let more = lines.count();
    format!("{}{}", shown.join("; "), if more > 0 { format!("; and {more} more") } else { String::new() })
}

/// Whether the result is the failure of a call that was asked to stop.
pub(super) fn is_cancelled<T>(result: &stillpoint_core::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == Kind::Cancelled)
}
