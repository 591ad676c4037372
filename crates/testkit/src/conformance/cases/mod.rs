//! The cases: each a function that proves one duty, with the world it needs.

mod cut;
mod drain;
mod identity;
mod observe;
mod release;
mod restore;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use stillpoint_core::capability::Capability;
use stillpoint_core::driver::{Context, Driver};

use super::harness::Harness;
use super::report::{Outcome, Report, Row};
use world::{Live, Stop, Verdict, World};

/// One duty and how it is proven.
pub(super) struct Case {
    /// As `docs/driver-spec.md` has it.
    pub(super) name: &'static str,
    /// One sentence.
    pub(super) duty: &'static str,
    /// What the store must be capable of, if the duty binds only some.
    needs: Needs,
    run: fn(&World<'_>) -> Verdict,
}

/// A capability without which a case does not apply.
struct Needs {
    what: &'static str,
    has: fn(&Capability) -> bool,
}

const ALL: Needs = Needs { what: "", has: |_| true };
const OBSERVES: Needs = Needs { what: "does not observe its writes", has: |c| c.observes_writes };
const INCREMENTAL: Needs = Needs { what: "does not drain incrementally", has: |c| c.incremental };
const EDGES: Needs = Needs { what: "has no edges", has: |c| c.edges };
const SWAPS: Needs = Needs { what: "does not restore in place", has: |c| c.swaps_in_place };
const PARTIAL: Needs = Needs { what: "does not restore parts", has: |c| c.partial_restore };

/// A duty that needs no writes, provable on a user's own store.
struct LiveCase {
    name: &'static str,
    duty: &'static str,
    run: fn(&Live<'_>) -> Verdict,
}

macro_rules! case {
    ($module:ident::$name:ident, $needs:ident, $duty:literal) => {
        Case { name: stringify!($name), duty: $duty, needs: $needs, run: $module::$name }
    };
}

macro_rules! live_case {
    ($module:ident::$name:ident, $duty:literal) => {
        LiveCase { name: stringify!($name), duty: $duty, run: $module::live::$name }
    };
}

#[rustfmt::skip]
pub(super) static CASES: &[Case] = &[
    case!(identity::probe_changes_nothing, ALL, "probe leaves content and position as they are and repeats its answer"),
    case!(identity::identity_is_stable, ALL, "identity is the same for every value, and after writes"),
    case!(identity::source_and_target_differ, ALL, "two stores never share an identity"),
    case!(identity::absent_store_fails, ALL, "a store that is not there fails before the drain ends, and yields no empty tree"),
    case!(cut::prepare_repeats, ALL, "prepare may be repeated, hurts no writer and changes no content"),
    case!(cut::cut_repeats_with_one_id, ALL, "cut with the same id returns the same pin and the same view"),
    case!(cut::cut_with_a_new_id_replaces, ALL, "cut with a new id shows what is there now"),
    case!(cut::cut_separates_writes, ALL, "every write acknowledged before the cut is in, none begun after it is"),
    case!(cut::later_writes_do_not_leak, ALL, "writes between cut and drain are not in the point, or are named as losses"),
    case!(cut::pin_is_valid_after_drain, ALL, "still_valid says so when nothing happened to the pin"),
    case!(observe::observe_is_equal_without_writes, OBSERVES, "observe repeats its answer while nobody writes, across the cut too"),
    case!(observe::observe_differs_after_a_write, OBSERVES, "observe differs after each create, replace and delete"),
    case!(observe::observe_does_not_grow, OBSERVES, "the cost of observe does not grow with the data"),
    case!(drain::tree_is_sorted_and_explains_itself, ALL, "the tree is sorted and balanced and holds HOW-TO-RESTORE.txt"),
    case!(drain::drain_counts_what_it_yields, ALL, "items, unit, bytes and progress are counted"),
    case!(drain::drain_stops_on_request, ALL, "drain stops soon when its context is cancelled, and the store goes on"),
    case!(drain::drain_passes_on_a_failing_sink, ALL, "a failing sink fails the drain"),
    case!(drain::incremental_equals_full, INCREMENTAL, "a drain with a parent restores to the same as one without"),
    case!(drain::incremental_reads_what_changed, INCREMENTAL, "a drain with a parent reads little more than what changed"),
    case!(drain::incremental_doubts_a_foreign_parent, INCREMENTAL, "a parent drained from another store is no source of content"),
    case!(drain::edges_show_the_pinned_view, EDGES, "edges answers from the pin, and from the live store without one"),
    case!(release::release_from_every_state, ALL, "release succeeds from every state, repeatedly, and the store can be cut again"),
    case!(release::release_after_a_crash, ALL, "a new value releases what a lost one held, from the pin's remains"),
    case!(restore::restore_into_nothing_equals, ALL, "a fresh restore holds exactly what the cut showed, and verify agrees"),
    case!(restore::restore_refuses_content, ALL, "a fresh restore refuses a target that holds data and leaves it alone"),
    case!(restore::restore_in_place_keeps_the_old, SWAPS, "a restore in place replaces the content and says where the old is"),
    case!(restore::failed_restore_leaves_the_old, SWAPS, "a restore in place that fails leaves the old content, and can be repeated"),
    case!(restore::failed_restore_is_an_error, ALL, "a fresh restore that cannot read the point fails"),
    case!(restore::restore_stops_on_request, ALL, "restore stops when its context is cancelled"),
    case!(restore::verify_finds_a_planted_difference, ALL, "verify finds a changed, a missing and an additional item"),
    case!(restore::hostile_names_are_refused, ALL, "names that could leave the tree never reach the target"),
    case!(restore::incomplete_tree_is_no_success, ALL, "a tree that lacks a part is no successful restore"),
    case!(restore::part_is_restored_alone, PARTIAL, "a part of the tree is restored without the rest"),
    case!(restore::stamp_is_read_back_and_replaced, ALL, "read_stamp returns the last stamp, and nothing where there is none"),
    case!(restore::stamp_is_no_content, ALL, "the stamp is neither drained nor a difference"),
];

#[rustfmt::skip]
static LIVE_CASES: &[LiveCase] = &[
    live_case!(identity::probe_repeats, "probe and identity repeat their answers"),
    live_case!(cut::cut_repeats_with_one_id, "cut with the same id returns the same pin"),
    live_case!(observe::observe_is_cheap, "observe, where it is supported, takes no longer than a network round trip"),
    live_case!(drain::tree_is_sorted_and_explains_itself, "the tree is sorted and balanced and holds HOW-TO-RESTORE.txt"),
    live_case!(drain::drain_stops_on_request, "drain stops when its context is cancelled"),
    live_case!(release::release_from_every_state, "release succeeds from every state, repeatedly"),
];

pub(super) fn run(harness: &dyn Harness) -> Report {
    let mut report = Report::default();
    let capability = World::new(harness).and_then(|world| {
        let source = world.filled()?;
        Ok(world.block(source.driver.probe(&Context::default()))?.capability)
    });
    for case in CASES {
        let outcome = match &capability {
            Err(stop) => Outcome::Failed(format!("the store cannot be probed: {}", stop.text())),
            Ok(capability) => match harness.exempt().iter().find(|(name, _)| *name == case.name) {
                Some((_, reason)) => Outcome::Skipped((*reason).to_owned()),
                None if !(case.needs.has)(capability) => Outcome::Skipped(case.needs.what.to_owned()),
                None => judge(|| (case.run)(&World::new(harness)?)),
            },
        };
        report.rows.push(Row { name: case.name, duty: case.duty, outcome });
    }
    report
}

pub(super) fn run_live(driver: &Arc<dyn Driver>) -> Report {
    let mut report = Report::default();
    for case in LIVE_CASES {
        let outcome = judge(|| (case.run)(&Live::new(driver.as_ref())?));
        report.rows.push(Row { name: case.name, duty: case.duty, outcome });
    }
    report
}

/// Runs one case; a panic of the driver is a failure of the case and not of the suite.
fn judge(run: impl FnOnce() -> Verdict) -> Outcome {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(Stop::Skip(reason))) => Outcome::Skipped(reason),
        Ok(Err(Stop::Broken(seen))) => Outcome::Failed(seen),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Outcome::Failed(format!("panicked: {}", text.unwrap_or_default()))
        }
    }
}
