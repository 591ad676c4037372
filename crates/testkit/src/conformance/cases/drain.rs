//! What a drain yields: the whole view, explained, counted, and little of it twice.

use std::time::{Duration, Instant};

use stillpoint_core::driver::Context;
use stillpoint_core::tree::Tree;

use super::world::{Stop, Verdict, World, content, cut_id, difference, ensure, is_cancelled, size};
use crate::fault::TrippingSink;
use crate::sink::MemorySink;
use crate::tree::MemoryTree;

/// How long a call may go on after its context was cancelled.
const STOP_MAX: Duration = Duration::from_secs(10);

pub(super) fn tree_is_sorted_and_explains_itself(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    // The sink itself refuses names that are unsorted or invalid and directories left open.
    let point = world.point(&source, None)?;
    let files = point.drain.tree.files();
    let how = files.get("HOW-TO-RESTORE.txt").map(|text| String::from_utf8_lossy(text).into_owned());
    let how = how.ok_or_else(|| Stop::Broken("there is no HOW-TO-RESTORE.txt".to_owned()))?;
    ensure!(how.trim().len() > 40, "HOW-TO-RESTORE.txt says nothing: {how:?}");
    ensure!(files.len() > 1, "HOW-TO-RESTORE.txt is all there is");
    Ok(())
}

pub(super) fn drain_counts_what_it_yields(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let pin = world.pin(driver)?;
    let mut sink = MemorySink::new();
    let context = Context::default();
    let drained = world.block(driver.drain(&context, &pin, &mut sink, None))?;
    sink.finish()?;
    ensure!(drained.items > 0 && !drained.unit.is_empty(), "{} `{}`", drained.items, drained.unit);
    ensure!(drained.bytes > 0, "a store with content has {} bytes", drained.bytes);
    let progress = context.progress();
    ensure!(progress.0 > 0, "no bytes of progress were counted");
    world.release(driver)
}

pub(super) fn drain_stops_on_request(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let pin = world.pin(driver)?;
    let cancelled = Context::default();
    cancelled.cancel();
    let mut sink = MemorySink::new();
    let outcome = world.block(driver.drain(&cancelled, &pin, &mut sink, None));
    ensure!(is_cancelled(&outcome), "a drain under a cancelled context returned {outcome:?}");

    let context = Context::default();
    let mut sink = MemorySink::new();
    let begun = Instant::now();
    {
        let mut tripping = TrippingSink::acting(&mut sink, || context.cancel());
        // A small store may be through before it looks; stopping late is what is not allowed.
        let outcome = world.block(driver.drain(&context, &pin, &mut tripping, None));
        ensure!(outcome.is_ok() || is_cancelled(&outcome), "a cancelled drain failed otherwise: {outcome:?}");
    }
    ensure!(begun.elapsed() < STOP_MAX, "the drain went on for {:?}", begun.elapsed());
    world.release(driver)?;
    source.subject.put("after", b"1")?;
    world.point(&source, None)?;
    Ok(())
}

pub(super) fn drain_passes_on_a_failing_sink(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    for calls in [0, 1, 2] {
        let pin = world.pin(driver)?;
        let mut sink = MemorySink::new();
        let mut tripping = TrippingSink::failing(&mut sink, calls);
        let outcome = world.block(driver.drain(&Context::default(), &pin, &mut tripping, None));
        ensure!(outcome.is_err(), "the sink failed at call {calls}, the drain did not");
        world.release(driver)?;
    }
    world.point(&source, None)?;
    Ok(())
}

pub(super) fn incremental_equals_full(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let mut expected = content();
    let mut parent = world.point(&source, None)?.drain.tree;
    for turn in 0_u8..3 {
        let new = format!("turn/{turn}");
        source.subject.put(&new, &[turn; 100])?;
        expected.insert(new, vec![turn; 100]);
        // As many bytes as before: size alone must not decide.
        source.subject.put("one", &[turn + 1])?;
        expected.insert("one".to_owned(), vec![turn + 1]);
        let gone = format!("small/{turn}");
        source.subject.delete(&gone)?;
        expected.remove(&gone);
        parent = world.point(&source, Some(&parent))?.drain.tree;
        let seen = world.view(&parent)?;
        ensure!(seen == expected, "after increment {turn}: {}", difference(&expected, &seen));
    }
    Ok(())
}

pub(super) fn incremental_reads_what_changed(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let full = world.point(&source, None)?;
    let all = size(&content());
    ensure!(full.drained.bytes_read >= all / 2, "a full drain says that it read {} bytes", full.drained.bytes_read);
    let max = world.harness.incremental_read_bytes_max(all);
    source.subject.put("deep/er/and/deeper", &[9; 1024])?;
    let next = world.point(&source, Some(&full.drain.tree))?;
    ensure!(next.drained.bytes_read <= max, "1 KiB changed, {} bytes were read", next.drained.bytes_read);
    ensure!(next.drain.bytes_read <= max, "1 KiB changed, streams of {} bytes were yielded", next.drain.bytes_read);
    let rest = world.point(&source, Some(&next.drain.tree))?;
    ensure!(rest.drained.bytes_read <= max, "nothing changed, {} bytes were read", rest.drained.bytes_read);
    ensure!(rest.drained.items == next.drained.items, "reused items must be counted as well");
    Ok(())
}

pub(super) fn incremental_doubts_a_foreign_parent(world: &World<'_>) -> Verdict {
    let mut other = content();
    for value in other.values_mut() {
        value.iter_mut().for_each(|byte| *byte = !*byte); // As many bytes, all of them others.
    }
    let foreign = world.filled_with(&other)?;
    let foreign = world.point(&foreign, None)?.drain.tree;
    let source = world.filled()?;
    let tree = world.point(&source, Some(&foreign))?.drain.tree;
    let seen = world.view(&tree)?;
    ensure!(seen == content(), "content came from another store's point: {}", difference(&content(), &seen));
    Ok(())
}

pub(super) fn edges_show_the_pinned_view(world: &World<'_>) -> Verdict {
    let source = world.filled()?;
    let driver = source.driver.as_ref();
    let Some((query, expected)) = source.subject.edges()? else {
        return Err(Stop::Broken("the capability says that there are edges, the harness names none".to_owned()));
    };
    world.block(driver.expect_edges(std::slice::from_ref(&query)))?;
    let pin = world.pin(driver)?;
    source.subject.put("later/one", b"1")?;
    let ask = |driver: &dyn stillpoint_core::driver::Driver, pin| -> Verdict<std::collections::BTreeSet<Vec<u8>>> {
        let mut found = std::collections::BTreeSet::new();
        world.block(driver.edges(&Context::default(), pin, &query, &mut |edge| {
            found.insert(edge.referent);
            Ok(())
        }))?;
        Ok(found)
    };
    let point = world.drain(driver, &pin, None)?;
    let found = ask(driver, Some(&pin))?;
    ensure!(found == expected, "the pinned view has {} edges, {} were expected", found.len(), expected.len());
    world.release(driver)?;
    let target = world.target()?;
    restore_for_edges(world, &target, &point.drain.tree)?;
    let found = ask(target.driver.as_ref(), None)?;
    ensure!(found == expected, "the restored store has {} edges, {} were expected", found.len(), expected.len());
    Ok(())
}

fn restore_for_edges(world: &World<'_>, target: &super::world::Opened, tree: &MemoryTree) -> Verdict {
    let tree: &dyn Tree = tree;
    world.restore(target.driver.as_ref(), tree, stillpoint_core::driver::RestoreMode::Fresh)?;
    Ok(())
}

/// The part that writes nothing. The tree goes nowhere: a live store may be of any size.
pub(super) mod live {
    use super::super::world::{Live, Verdict, cut_id, ensure, is_cancelled};
    use super::Context;
    use crate::sink::CountingSink;

    pub(in super::super) fn tree_is_sorted_and_explains_itself(live: &Live<'_>) -> Verdict {
        let pin = live.pin(&cut_id(1))?;
        let mut sink = CountingSink::new();
        let outcome = live.block(live.driver.drain(&Context::default(), &pin, &mut sink, None));
        let validity = live.block(live.driver.still_valid(&Context::default(), &pin));
        live.release()?;
        let drained = outcome?;
        ensure!(sink.is_explained, "there is no HOW-TO-RESTORE.txt at the top");
        ensure!(sink.entries > 1, "HOW-TO-RESTORE.txt is all there is");
        ensure!(drained.items > 0, "the store was drained and has no {}", drained.unit);
        ensure!(
            validity.as_ref().is_ok_and(|v| *v == stillpoint_core::driver::Validity::Valid),
            "the pin did not last for the drain: {validity:?}"
        );
        Ok(())
    }

    pub(in super::super) fn drain_stops_on_request(live: &Live<'_>) -> Verdict {
        let pin = live.pin(&cut_id(1))?;
        let context = Context::default();
        context.cancel();
        let outcome = live.block(live.driver.drain(&context, &pin, &mut CountingSink::new(), None));
        live.release()?;
        ensure!(is_cancelled(&outcome), "a drain under a cancelled context returned {outcome:?}");
        Ok(())
    }
}

/// Used by `release`, which drains the same way.
pub(super) fn second_cut(world: &World<'_>, driver: &dyn stillpoint_core::driver::Driver) -> Verdict {
    world.prepare(driver)?;
    let pin = world.cut(driver, &cut_id(2))?;
    world.drain(driver, &pin, None)?;
    world.release(driver)
}
