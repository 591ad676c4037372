//! What a cut shows: all that was acknowledged before it, nothing that began after it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stillpoint_core::capability::PinKind;
use stillpoint_core::driver::{Context, Driver, Loss, Validity};

use super::super::harness::Content;
use super::world::{Stop, Verdict, World, content, cut_id, difference, ensure};
use crate::oracle::{CutInterval, Oracle};

pub(super) fn prepare_repeats(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let hold = world.block(driver.prepare(&Context::default()))?;
    ensure!(hold.safe_for >= Duration::from_secs(1), "the hold lasts {:?}", hold.safe_for);
    source.subject.put("while-prepared", b"1")?;
    world.prepare(driver)?;
    source.subject.put("while-prepared-again", b"2")?;
    let mut expected = content();
    expected.insert("while-prepared".to_owned(), b"1".to_vec());
    expected.insert("while-prepared-again".to_owned(), b"2".to_vec());
    let held = source.subject.read()?;
    ensure!(held == expected, "prepare changed the content: {}", difference(&expected, &held));
    let pin = world.cut(driver, &cut_id(1))?;
    let point = world.drain(driver, &pin, None)?;
    let seen = world.view(&point.drain.tree)?;
    ensure!(seen == expected, "the point lacks what came while prepared: {}", difference(&expected, &seen));
    world.release(driver)
}

pub(super) fn cut_repeats_with_one_id(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let first = world.pin(driver)?;
    source.subject.put("after-the-cut", b"1")?;
    let second = world.cut(driver, &cut_id(1))?;
    ensure!(first == second, "the pins differ: {first:?}, {second:?}");
    let point = world.drain(driver, &second, None)?;
    let seen = world.view(&point.drain.tree)?;
    allow_named(&content(), &seen, &point.losses())?;
    world.release(driver)
}

pub(super) fn cut_with_a_new_id_replaces(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    world.pin(driver)?;
    source.subject.put("between", b"1")?;
    source.subject.put("one", b"replaced")?;
    source.subject.delete("text")?;
    let mut expected = content();
    expected.insert("between".to_owned(), b"1".to_vec());
    expected.insert("one".to_owned(), b"replaced".to_vec());
    expected.remove("text");
    let pin = world.cut(driver, &cut_id(2))?;
    let point = world.drain(driver, &pin, None)?;
    let seen = world.view(&point.drain.tree)?;
    ensure!(seen == expected, "the second cut shows something else: {}", difference(&expected, &seen));
    ensure!(point.losses().is_empty(), "writes before the cut became losses: {:?}", point.losses());
    world.release(driver)
}

pub(super) fn cut_separates_writes(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let oracle = Oracle::new();
    let stop = AtomicBool::new(false);
    world.prepare(driver)?;
    let (cut, pin) = std::thread::scope(|scope| -> Verdict<_> {
        let writer = scope.spawn(|| write_until(&stop, &source, &oracle));
        let outcome = cut_among_writes(world, driver, &oracle);
        stop.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| Stop::Broken("the writer panicked".to_owned()))??;
        outcome
    })?;
    let point = world.drain(driver, &pin, None)?;
    let seen = world.view(&point.drain.tree)?;
    let losses = point.losses();
    let mut violations = oracle.violations("store", cut, &seen);
    violations.retain(|violation| !losses.iter().any(|loss| loss.what.contains(&violation.key)));
    let seen_wrong: Vec<_> = violations.iter().map(ToString::to_string).collect();
    ensure!(seen_wrong.is_empty(), "{}", seen_wrong.join("; "));
    ensure!(!seen.keys().all(|key| content().contains_key(key)), "the writer wrote nothing before the cut");
    world.release(driver)
}

/// Cuts once writes are on their way, and lets some more come.
fn cut_among_writes(
    world: &World<'_>,
    driver: &dyn Driver,
    oracle: &Oracle,
) -> Verdict<(CutInterval, stillpoint_core::driver::Pin)> {
    wait_for_writes(oracle, 3)?;
    let begin = oracle.now();
    let pin = world.cut(driver, &cut_id(1))?;
    let end = oracle.now();
    wait_for_writes(oracle, oracle.acknowledged_count() + 3)?;
    Ok((CutInterval { begin, end }, pin))
}

fn wait_for_writes(oracle: &Oracle, count: usize) -> Verdict {
    for _ in 0..20_000 {
        if oracle.acknowledged_count() >= count {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Stop::Broken("no write was acknowledged for 20 s: does the hold block writers?".to_owned()))
}

/// Writes new keys and replaces a few again and again, each value unlike the others.
fn write_until(stop: &AtomicBool, source: &super::world::Opened, oracle: &Oracle) -> Verdict {
    for number in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fresh = format!("writer/{number}");
        let again = format!("again/{}", number % 4);
        for key in [&fresh, &again] {
            let value = format!("{key} written at turn {number}").into_bytes();
            let ticket = oracle.begun("writer", "store", key, Some(&value));
            source.subject.put(key, &value)?;
            oracle.acknowledged(ticket);
        }
    }
    Ok(())
}

pub(super) fn later_writes_do_not_leak(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let watched = world.block(driver.probe(&Context::default()))?.capability.pin == PinKind::Watched;
    let pin = world.pin(driver)?;
    source.subject.put("one", b"2")?;
    source.subject.put("large/0", b"shorter")?;
    source.subject.put("new/a", b"new")?;
    source.subject.delete("small/3")?;
    let point = world.drain(driver, &pin, None)?;
    let losses = point.losses();
    ensure!(watched || losses.is_empty(), "the view is held, yet there are losses: {losses:?}");
    let seen = world.view(&point.drain.tree)?;
    allow_named(&content(), &seen, &losses)?;
    world.release(driver)
}

/// Content must be equal but for keys that a loss names.
fn allow_named(expected: &Content, seen: &Content, losses: &[Loss]) -> Verdict {
    let named = |key: &&String| losses.iter().any(|loss| loss.what.contains(key.as_str()));
    let expected: Content =
        expected.iter().filter(|(key, _)| !named(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    let seen: Content = seen.iter().filter(|(key, _)| !named(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    ensure!(expected == seen, "not as the cut, and not named: {}; named: {losses:?}", difference(&expected, &seen));
    Ok(())
}

pub(super) fn pin_is_valid_after_drain(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let pin = world.pin(driver)?;
    world.drain(driver, &pin, None)?;
    match world.block(driver.still_valid(&Context::default(), &pin))? {
        Validity::Valid => world.release(driver),
        Validity::Lost(why) => Err(Stop::Broken(format!("the pin is said to be lost: {why}"))),
    }
}

/// The part that writes nothing.
pub(super) mod live {
    use super::super::world::{Live, Verdict, cut_id, ensure};
    use super::Context;

    pub(in super::super) fn cut_repeats_with_one_id(live: &Live<'_>) -> Verdict {
        let first = live.pin(&cut_id(1))?;
        let second = live.block(live.driver.cut(&Context::default(), &cut_id(1)))?;
        live.release()?;
        ensure!(first == second, "the pins differ: {first:?}, {second:?}");
        Ok(())
    }
}
