//! Who a store is, and that looking does not change it.

use stillpoint_core::driver::Context;

use super::world::{Verdict, World, content, difference, ensure};
use crate::sink::MemorySink;

pub(super) fn probe_changes_nothing(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let context = Context::default();
    let before = world.block(source.driver.observe(&context))?;
    let first = world.block(source.driver.probe(&context))?;
    let second = world.block(source.driver.probe(&context))?;
    let after = world.block(source.driver.observe(&context))?;
    ensure!(first == second, "probe answered {first:?}, then {second:?}");
    ensure!(before == after, "the position went from {before:?} to {after:?}");
    let held = source.subject.read()?;
    ensure!(held == content(), "probe changed the content: {}", difference(&content(), &held));
    Ok(())
}

pub(super) fn identity_is_stable(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let context = Context::default();
    let first = world.block(source.driver.identity(&context))?;
    source.subject.put("another", b"write")?;
    let second = world.block(source.subject.open()?.identity(&context))?;
    ensure!(first == second, "identity answered {first:?}, then {second:?}");
    let probed = world.block(source.driver.probe(&context))?.identity;
    ensure!(first == probed, "identity answered {first:?}, probe {probed:?}");
    ensure!(!first.endpoint.is_empty(), "the identity has no endpoint");
    Ok(())
}

pub(super) fn source_and_target_differ(world: &World<'_>) -> Verdict {
    let context = Context::default();
    let source = world.filled()?;
    let other = world.filled()?;
    let mut identities =
        vec![world.block(source.driver.identity(&context))?, world.block(other.driver.identity(&context))?];
    let target = world.target()?;
    // A target that does not exist yet may not know who it is; its tree then names it.
    if let Ok(identity) = world.block(target.driver.identity(&context)) {
        identities.push(identity);
    }
    for (number, one) in identities.iter().enumerate() {
        for two in &identities[number + 1..] {
            let same_native = one.native.is_some() && one.native == two.native;
            ensure!(one.endpoint != two.endpoint && !same_native, "{one:?} and {two:?} are the same");
        }
    }
    Ok(())
}

pub(super) fn absent_store_fails(world: &World<'_>) -> Verdict {
    let absent = world.target()?;
    let driver = absent.driver.as_ref();
    let Ok(pin) = world.pin(driver) else {
        world.release(driver)?;
        return Ok(());
    };
    let mut sink = MemorySink::new();
    let drained = world.block(driver.drain(&Context::default(), &pin, &mut sink, None));
    ensure!(drained.is_err() || sink.finish().is_err(), "a store that is not there was drained: {drained:?}");
    world.release(driver)
}

/// The part that writes nothing.
pub(super) mod live {
    use super::super::world::{Live, Verdict, ensure};
    use super::Context;

    pub(in super::super) fn probe_repeats(live: &Live<'_>) -> Verdict {
        let context = Context::default();
        let first = live.block(live.driver.probe(&context))?;
        let second = live.block(live.driver.probe(&context))?;
        ensure!(first.identity == second.identity, "probe found {:?}, then {:?}", first.identity, second.identity);
        ensure!(first.capability == second.capability, "the capability changed between two probes");
        let identity = live.block(live.driver.identity(&context))?;
        ensure!(identity == first.identity, "identity answered {identity:?}, probe {:?}", first.identity);
        ensure!(first.missing_privileges.is_empty(), "privileges are missing: {:?}", first.missing_privileges);
        Ok(())
    }
}
