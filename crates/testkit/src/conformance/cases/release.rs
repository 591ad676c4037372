//! Letting go, from wherever a run ended.

use std::sync::Arc;

use stillpoint_core::driver::Context;

use super::drain::second_cut;
use super::world::{Verdict, World, content, difference, ensure};

pub(super) fn release_from_every_state(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let release_twice = || -> Verdict {
        world.release(driver)?;
        world.release(driver)
    };
    release_twice()?;
    world.prepare(driver)?;
    release_twice()?;
    world.pin(driver)?;
    release_twice()?;
    let pin = world.pin(driver)?;
    world.drain(driver, &pin, None)?;
    release_twice()?;
    world.block(driver.release(&Context::default(), &pin.remains))?;
    second_cut(world, driver)?;
    let held = source.subject.read()?;
    ensure!(held == content(), "cutting and releasing changed the content: {}", difference(&content(), &held));
    Ok(())
}

pub(super) fn release_after_a_crash(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let pin = world.pin(source.driver.as_ref())?;
    // A process that dies runs no destructors.
    std::mem::forget(Arc::clone(&source.driver));
    let next = source.subject.open()?;
    world.block(next.release(&Context::default(), &pin.remains))?;
    world.block(next.release(&Context::default(), &pin.remains))?;
    source.subject.put("after-the-crash", b"1")?;
    second_cut(world, next.as_ref())?;
    let mut expected = content();
    expected.insert("after-the-crash".to_owned(), b"1".to_vec());
    let held = source.subject.read()?;
    ensure!(held == expected, "the release changed the content: {}", difference(&expected, &held));
    Ok(())
}

/// The part that writes nothing.
pub(super) mod live {
    use super::super::world::{Live, Verdict, cut_id};
    use super::Context;

    pub(in super::super) fn release_from_every_state(live: &Live<'_>) -> Verdict {
        live.release()?;
        live.block(live.driver.prepare(&Context::default()))?;
        live.release()?;
        let pin = live.pin(&cut_id(1))?;
        live.release()?;
        live.release()?;
        Ok(live.block(live.driver.release(&Context::default(), &pin.remains))?)
    }
}
