//! Drivers tried by hand: what the tests of every driver do with one, beside the conformance suite.
//!
//! Whatever a test does not expect to fail panics here. Knows no kind of store.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Pin, RestoreMode, RestoreRequest, Restored, Validity,
};
use stillpoint_core::error::Result;
use stillpoint_core::id::{CutId, RunId, StoreName};
use stillpoint_core::tree::{Tree, TreePath};
use stillpoint_testkit::{Drain, MemorySink, MemoryTree};

use crate::{OpenRequest, Registration};

/// Calls `with` with what a driver of these settings is opened with. A secret resolves to its own reference.
pub(crate) fn request<T>(settings: Value, scratch: &Path, with: impl FnOnce(&OpenRequest<'_>) -> T) -> T {
    with(&OpenRequest {
        store: &StoreName::new("trial").unwrap(),
        settings: &serde_json::from_value(settings).unwrap(),
        scratch: scratch.to_owned(),
        kept: scratch.join("kept"),
        secrets: &|secret| Ok(secret.0.clone()),
    })
}

pub(crate) fn open(driver: &Registration, settings: Value, scratch: &Path) -> Result<Arc<dyn Driver>> {
    request(settings, scratch, driver.open)
}

pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(crate) fn cut_id(attempt: u32) -> CutId {
    CutId { run: RunId::from_random([7; 8]), attempt }
}

/// Prepares and cuts.
pub(crate) fn pin(driver: &Arc<dyn Driver>, attempt: u32) -> Pin {
    let context = Context::default();
    run(async {
        driver.prepare(&context).await.unwrap();
        driver.cut(&context, &cut_id(attempt)).await.unwrap()
    })
}

pub(crate) fn drain(driver: &Arc<dyn Driver>, pin: &Pin, parent: Option<&MemoryTree>) -> Result<(Drain, Drained)> {
    let mut sink = MemorySink::with_parent(parent);
    let parent = parent.map(|tree| tree as &dyn Tree);
    let drained = run(driver.drain(&Context::default(), pin, &mut sink, parent))?;
    Ok((sink.finish()?, drained))
}

/// Prepares, cuts, drains and releases; the pin must hold to the end.
pub(crate) fn back_up(driver: &Arc<dyn Driver>, parent: Option<&MemoryTree>) -> (MemoryTree, Drained) {
    let pin = pin(driver, 1);
    let (drain, drained) = drain(driver, &pin, parent).unwrap();
    assert_eq!(drain.torn, []);
    assert_eq!(run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid);
    run(driver.release(&Context::default(), &[])).unwrap();
    (drain.tree, drained)
}

/// Restores the whole tree, or a part of it, as the restore `r1`.
pub(crate) fn restore(
    driver: &Arc<dyn Driver>,
    tree: &dyn Tree,
    mode: RestoreMode,
    part: Option<&str>,
) -> Result<Restored> {
    let part = part.map(|part| TreePath::parse(part).unwrap());
    let request = RestoreRequest { mode, part, restore: "r1".to_owned() };
    run(driver.restore(&Context::default(), tree, &request))
}

/// What `verify` finds.
pub(crate) fn differences(driver: &Arc<dyn Driver>, tree: &dyn Tree) -> Vec<String> {
    run(driver.verify(&Context::default(), tree)).unwrap().differences
}

pub(crate) fn edges(driver: &Arc<dyn Driver>, pin: Option<&Pin>, query: &EdgeQuery) -> Result<Vec<Edge>> {
    let mut found = Vec::new();
    run(driver.edges(&Context::default(), pin, query, &mut |edge| {
        found.push(edge);
        Ok(())
    }))?;
    Ok(found)
}
