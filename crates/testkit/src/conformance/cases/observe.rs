//! Whether a store sees its own writes: what the cut without a pause stands on.

use std::time::{Duration, Instant};

use stillpoint_core::driver::{Context, Driver};
use stillpoint_core::position::Position;

use super::world::{Stop, Verdict, World, cut_id, ensure};

/// Beyond the tenfold time of a small store and this, `observe` is said to grow.
const OBSERVE_SLACK: Duration = Duration::from_millis(5);

fn observe(world: &World<'_>, driver: &dyn Driver) -> Verdict<Position> {
    let position = world.block(driver.observe(&Context::default()))?;
    position.ok_or_else(|| Stop::Broken("the capability says that it observes; it does not".to_owned()))
}

pub(super) fn observe_is_equal_without_writes(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    world.prepare(driver)?;
    let before = observe(world, driver)?;
    let again = observe(world, driver)?;
    ensure!(before == again, "{before:?}, then {again:?}, and nobody wrote");
    world.cut(driver, &cut_id(1))?;
    let after = observe(world, driver)?;
    ensure!(before == after, "{before:?} before the cut, {after:?} after it, and nobody wrote");
    world.release(driver)
}

pub(super) fn observe_differs_after_a_write(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    world.prepare(driver)?;
    let mut before = observe(world, driver)?;
    let put = |key: &str, value: &[u8]| source.subject.put(key, value);
    let writes: [(&str, &dyn Fn() -> stillpoint_core::Result<()>); 4] = [
        ("create", &|| put("new/key", b"1")),
        ("replace", &|| put("one", b"2")),
        ("replace by as many bytes", &|| put("one", b"3")),
        ("delete", &|| source.subject.delete("small/1")),
    ];
    for (what, write) in writes {
        write()?;
        let after = observe(world, driver)?;
        ensure!(before != after, "the position stayed {before:?} over a write ({what})");
        before = after;
    }
    world.release(driver)
}

pub(super) fn observe_does_not_grow(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    world.prepare(driver)?;
    let small = median(world, driver)?;
    for number in 0..300 {
        source.subject.put(&format!("many/{number}"), &[7; 4096])?;
    }
    observe(world, driver)?; // May cost as much as there were writes.
    let large = median(world, driver)?;
    ensure!(large <= small * 10 + OBSERVE_SLACK, "observe took {small:?}, and {large:?} with ten times as many items");
    world.release(driver)
}

fn median(world: &World<'_>, driver: &dyn Driver) -> Verdict<Duration> {
    let mut times = Vec::new();
    for _ in 0..15 {
        let begun = Instant::now();
        observe(world, driver)?;
        times.push(begun.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// The part that writes nothing.
pub(super) mod live {
    use super::super::world::{Live, Stop, Verdict, cut_id, ensure};
    use super::{Context, Duration, Instant};

    const OBSERVE_MAX: Duration = Duration::from_secs(1);

    pub(in super::super) fn observe_is_cheap(live: &Live<'_>) -> Verdict {
        live.pin(&cut_id(1))?;
        let context = Context::default();
        let first = live.block(live.driver.observe(&context))?;
        let begun = Instant::now();
        let second = live.block(live.driver.observe(&context))?;
        let took = begun.elapsed();
        live.release()?;
        if first.is_none() && second.is_none() {
            return Err(Stop::Skip("does not observe its writes".to_owned()));
        }
        ensure!(took <= OBSERVE_MAX, "observe took {took:?}");
        Ok(())
    }
}
