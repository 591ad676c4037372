//! Trees and sinks that fail on purpose.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, Difference, ExtractOptions, Extracted, Metadata, Node, Sink, Tree, TreePath};

/// A tree whose content cannot be read to the end: as if the bucket went away during a restore.
///
/// The first `reads_left` calls of `read` succeed; an extraction writes everything and fails then,
/// which leaves as much behind as a failure can.
#[derive(Debug)]
pub struct FailingTree<'a> {
    inner: &'a dyn Tree,
    reads_left: AtomicU64,
}

impl<'a> FailingTree<'a> {
    /// Wraps `inner`; the read after `reads_left` others fails.
    pub fn new(inner: &'a dyn Tree, reads_left: u64) -> Self {
        Self { inner, reads_left: AtomicU64::new(reads_left) }
    }
}

fn fault() -> Error {
    Error::new(Kind::Unreachable, "the bucket went away, on purpose")
}

impl Tree for FailingTree<'_> {
    fn get(&self, path: &TreePath) -> Result<Option<Node>> {
        self.inner.get(path)
    }

    fn list(&self, path: &TreePath, visit: &mut dyn FnMut(Node) -> Result<bool>) -> Result<()> {
        self.inner.list(path, visit)
    }

    fn open(&self, path: &TreePath) -> Result<Box<dyn Read + Send>> {
        let before = self.reads_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        let reader = self.inner.open(path)?;
        Ok(if before.is_ok() { reader } else { Box::new(FailingReader) })
    }

    fn extract(&self, path: &TreePath, to: &Path, options: &ExtractOptions, context: &Context) -> Result<Extracted> {
        self.inner.extract(path, to, options, context)?;
        Err(fault())
    }

    fn compare(&self, path: &TreePath, with: &Path, context: &Context) -> Result<Vec<Difference>> {
        self.inner.compare(path, with, context)
    }
}

struct FailingReader;

impl Read for FailingReader {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other(fault()))
    }
}

/// A sink that fails at a call of choice, and runs an action before each call.
pub struct TrippingSink<'a> {
    inner: &'a mut dyn Sink,
    calls_left: u64,
    before: Box<dyn FnMut() + Send + 'a>,
}

impl<'a> TrippingSink<'a> {
    /// Passes `calls_left` calls through and fails at all later ones.
    pub fn failing(inner: &'a mut dyn Sink, calls_left: u64) -> Self {
        Self { inner, calls_left, before: Box::new(|| ()) }
    }

    /// Passes every call through and runs `action` before each.
    pub fn acting(inner: &'a mut dyn Sink, action: impl FnMut() + Send + 'a) -> Self {
        Self { inner, calls_left: u64::MAX, before: Box::new(action) }
    }

    fn step(&mut self) -> Result<()> {
        (self.before)();
        self.calls_left = self.calls_left.checked_sub(1).ok_or_else(fault)?;
        Ok(())
    }
}

impl Sink for TrippingSink<'_> {
    fn enter(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        self.step()?;
        self.inner.enter(name, meta)
    }

    fn leave(&mut self) -> Result<()> {
        self.step()?;
        self.inner.leave()
    }

    fn file(&mut self, name: &[u8], meta: &Metadata, size: Option<u64>, content: Box<dyn Content>) -> Result<()> {
        self.step()?;
        self.inner.file(name, meta, size, content)
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        self.step()?;
        self.inner.node(node)
    }

    fn parent(&mut self, name: &[u8]) -> Result<Option<Node>> {
        self.inner.parent(name)
    }

    fn reuse(&mut self, name: &[u8], meta: &Metadata) -> Result<()> {
        self.step()?;
        self.inner.reuse(name, meta)
    }
}
