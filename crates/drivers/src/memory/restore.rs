//! The way back: restore beside, swap at the end; and verify.

use std::collections::BTreeMap;
use std::sync::Arc;

use stillpoint_core::driver::{Context, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{NodeKind, Tree, TreePath};

use super::client::{Store, Value};
use super::drain::{VALUES, decode, encode};
use super::{Memory, client};

const DIFFERENCES_MAX: usize = 100;

/// Loads everything into a map of its own first: until the swap, a failure has changed nothing.
pub(super) fn restore(
    driver: &Memory,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    let name = &driver.settings.name;
    let present = client::find(name).ok();
    let holds_data = present.as_ref().is_some_and(|store| !store.view().is_empty());
    if request.mode == RestoreMode::Fresh && holds_data {
        return Err(Error::new(Kind::AlreadyExists, format!("the store `{name}` holds data"))
            .hint("restore into a new name, or in place if the old content is to be replaced"));
    }
    let mut loaded = BTreeMap::new();
    for (number, (key, name)) in names(source, request.part.as_ref())?.into_iter().enumerate() {
        context.check()?;
        let bytes = read(source, &name)?;
        context.advance(bytes.len() as u64, 1);
        loaded.insert(key, Value { bytes: Arc::new(bytes), version: number as u64 });
    }
    let restored = Restored {
        items: loaded.len() as u64,
        bytes: loaded.values().map(|value| value.bytes.len() as u64).sum(),
        kept_old: Vec::new(),
        losses: Vec::new(),
    };
    if request.part.is_some()
        && let Some(store) = &present
    {
        // A part replaces only itself: what the store holds besides stays.
        let rest = store.view();
        loaded.extend(rest.iter().filter(|(key, _)| !loaded.contains_key(*key)).map(clone_pair).collect::<Vec<_>>());
    }
    let kept = holds_data.then(|| format!("{name}.before-{}", request.restore));
    Store::create(name).swap(loaded, kept.as_deref());
    Ok(Restored { kept_old: kept.into_iter().collect(), ..restored })
}

fn clone_pair((key, value): (&String, &Value)) -> (String, Value) {
    (key.clone(), value.clone())
}

/// Compares every value with the point, and looks for keys that the point does not have.
pub(super) fn verify(driver: &Memory, context: &Context, source: &dyn Tree) -> Result<Verification> {
    let view = client::find(&driver.settings.name)?.view();
    let stored = names(source, None)?;
    let mut verification = Verification { checked: stored.len() as u64, differences: Vec::new() };
    let mut differs = |key: &str, what: &str| {
        if verification.differences.len() < DIFFERENCES_MAX {
            verification.differences.push(format!("key {key}: {what}"));
        }
    };
    for (key, name) in &stored {
        context.check()?;
        match view.get(key) {
            None => differs(key, "missing"),
            Some(value) if *value.bytes != read(source, name)? => differs(key, "value differs"),
            Some(_) => {}
        }
    }
    for key in view.keys().filter(|key| !stored.contains_key(*key)) {
        differs(key, "not in the point");
    }
    Ok(verification)
}

/// The keys of the point, each with its path; with `part`, only that one.
fn names(source: &dyn Tree, part: Option<&TreePath>) -> Result<BTreeMap<String, TreePath>> {
    let values = TreePath::parse(VALUES)?;
    if source.get(&values)?.is_none() {
        return Err(Error::new(Kind::Corrupt, "the point holds no `values/` of a memory store"));
    }
    let mut names = BTreeMap::new();
    source.list(&values, &mut |node| {
        let key = decode(&node.name)?;
        if !matches!(node.kind, NodeKind::File { .. }) {
            return Err(Error::new(Kind::Corrupt, format!("the value of `{key}` is not a file")));
        }
        names.insert(key, values.join(&node.name)?);
        Ok(true)
    })?;
    let Some(part) = part else { return Ok(names) };
    names.retain(|key, path| path == part || part.names() == [VALUES.as_bytes()] || is_key(part, key));
    if names.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("the point holds no `{part}`"))
            .hint("name a key as the point spells it, e.g. values/a%2Fb, or as the store does, e.g. a/b"));
    }
    Ok(names)
}

/// Whether `part` is the key itself, as the store spells it.
fn is_key(part: &TreePath, key: &str) -> bool {
    encode(&part.to_string()) == encode(key)
}

fn read(source: &dyn Tree, path: &TreePath) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.open(path)?.read_to_end(&mut bytes).map_err(|error| Error::io(format!("cannot read `{path}`"), error))?;
    Ok(bytes)
}
