//! Named scenes: one decision of the machine each.

use std::collections::BTreeSet;

use super::super::*;
use super::world::*;
use crate::error::Kind;
use crate::statefile::Verdict;

fn run(setting: Setting) -> (World, Conclusion) {
    let mut world = World::new(setting);
    world.happen(Happening::Begin);
    let conclusion = world.finish();
    (world, conclusion)
}

fn count(world: &World, name: &str) -> usize {
    world.asked.iter().filter(|action| action.name() == name).count()
}

#[track_caller]
fn sealed(conclusion: Conclusion) -> Level {
    match conclusion {
        Conclusion::Sealed { level, .. } => level,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn failed_with(conclusion: Conclusion) -> Failure {
    match conclusion {
        Conclusion::Failed { failure, .. } => failure,
        other => panic!("{other:?}"),
    }
}

/// Answers everything until the machine is in `state`.
fn until(world: &mut World, state: impl Fn(State) -> bool) {
    for _ in 0..500 {
        if state(world.machine.state()) {
            return;
        }
        let id = *world.in_flight.keys().next().expect("something is under way");
        world.answer(id, Fault::None);
    }
    panic!("never came there");
}

fn set(names: &[&'static str]) -> BTreeSet<&'static str> {
    names.iter().copied().collect()
}

#[test]
fn a_quiet_platform_is_strict_at_once_and_nobody_is_paused() {
    let (world, conclusion) = run(Setting { pause_steps: 2, ..Setting::default() });
    assert_eq!(sealed(conclusion), Level::Strict);
    assert_eq!((count(&world, "pin"), count(&world, "observe"), count(&world, "pause")), (3, 6, 0));
    assert_eq!(world.machine.pause_micros(), 0);
    assert_eq!(world.machine.cut().expect("a cut").tries, 1);
}

#[test]
fn groups_are_pinned_one_after_the_other() {
    let (world, _) = run(Setting::default());
    let pins: Vec<_> =
        world.asked.iter().filter(|a| a.name() == "pin").map(|a| a.store().expect("one").as_str()).collect();
    assert_eq!(pins, ["a", "b", "c"]);
    let mut world = World::new(Setting::default());
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pinning { group: 0 });
    assert_eq!(world.in_flight.len(), 2, "the first group at once, the second not yet");
}

#[test]
fn a_write_during_the_cut_makes_another_try_with_a_new_attempt() {
    let mut world = World::new(Setting::default());
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pinning { group: 1 });
    world.write(&mut Tape::new(vec![5, 5, 5]));
    let conclusion = world.finish();
    assert_eq!(sealed(conclusion), Level::Strict);
    assert_eq!(world.machine.cut().expect("a cut").tries, 2);
    let attempts: BTreeSet<u32> = world
        .asked
        .iter()
        .filter_map(|action| if let Action::Pin { cut, .. } = action { Some(cut.attempt) } else { None })
        .collect();
    assert_eq!(attempts, BTreeSet::from([1, 2]));
    assert_eq!(count(&world, "observe"), 9, "the positions after the first try serve as those before the second");
}

#[test]
fn a_busy_platform_is_paused_after_the_tries() {
    let (world, conclusion) = run(Setting { busy: set(&["b"]), pause_steps: 2, ..Setting::default() });
    assert_eq!(sealed(conclusion), Level::Strict);
    let cut = world.machine.cut().expect("a cut");
    assert_eq!((cut.tries, cut.paused), (4, true));
    let pause: Vec<_> = world.asked.iter().filter(|action| action.is_pause()).map(Action::name).collect();
    assert_eq!(pause, ["start_watchdog", "pause", "pause", "resume", "resume", "stop_watchdog"]);
    let steps: Vec<_> = world
        .asked
        .iter()
        .filter_map(|action| match action {
            Action::Pause { step } => Some(('p', *step)),
            Action::Resume { step } => Some(('r', *step)),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [('p', 0), ('p', 1), ('r', 1), ('r', 0)], "undone in reverse");
}

#[test]
fn a_blind_store_asks_for_the_pause_without_any_try() {
    let (world, conclusion) = run(Setting { blind: set(&["c"]), pause_steps: 1, ..Setting::default() });
    assert_eq!(sealed(conclusion), Level::Strict);
    assert_eq!(count(&world, "pin"), 3);
    assert_eq!(count(&world, "observe"), 4, "those that see are asked, to see the writers paused");
}

#[test]
fn a_pause_that_does_not_hold_is_noticed() {
    let setting =
        Setting { blind: set(&["a"]), busy: set(&["b"]), leaky: set(&["b"]), pause_steps: 1, ..Setting::default() };
    let (world, conclusion) = run(setting.clone());
    let failure = failed_with(conclusion);
    assert_eq!(failure.kind, Kind::Unproven);
    assert!(failure.message.contains("`b` was written to although writers were paused"), "{failure:?}");
    assert_eq!(count(&world, "drain"), 0);
    let (_, conclusion) = run(Setting { accept: vec![Level::Ordered], ..setting });
    assert_eq!(sealed(conclusion), Level::Ordered);
}

#[test]
fn a_lower_level_needs_its_name_among_the_accepted() {
    let busy = Setting { busy: set(&["a", "b", "c"]), ..Setting::default() };
    let failure = failed_with(run(busy.clone()).1);
    assert_eq!(failure.kind, Kind::Unproven);
    assert!(failure.hint.expect("a hint").contains("accept `ordered`"));
    assert_eq!(sealed(run(Setting { accept: vec![Level::Ordered], ..busy.clone() }).1), Level::Ordered);
    assert_eq!(sealed(run(Setting { accept: vec![Level::Independent], ..busy.clone() }).1), Level::Ordered);
    let unordered = Setting { order_holds: false, ..busy };
    failed_with(run(Setting { accept: vec![Level::Ordered], ..unordered.clone() }).1);
    assert_eq!(sealed(run(Setting { accept: vec![Level::Independent], ..unordered }).1), Level::Independent);
}

#[test]
fn a_blind_store_without_a_pause_is_told_before_anything_is_pinned() {
    let (world, conclusion) = run(Setting { blind: set(&["c"]), ..Setting::default() });
    assert_eq!(failed_with(conclusion).kind, Kind::Unproven);
    assert_eq!(count(&world, "pin"), 0);
    let (world, conclusion) = run(Setting { blind: set(&["c"]), accept: vec![Level::Ordered], ..Setting::default() });
    assert_eq!(sealed(conclusion), Level::Ordered);
    assert_eq!((count(&world, "pin"), count(&world, "observe")), (3, 0), "nothing can be proven, so nothing is asked");
}

#[test]
fn ordered_takes_one_try_and_is_strict_where_that_costs_nothing() {
    let ordered = Setting { level: Level::Ordered, pause_steps: 1, ..Setting::default() };
    assert_eq!(sealed(run(ordered.clone()).1), Level::Strict);
    let (world, conclusion) = run(Setting { busy: set(&["a"]), ..ordered });
    assert_eq!(sealed(conclusion), Level::Ordered);
    assert_eq!((count(&world, "pin"), count(&world, "pause")), (3, 0));
}

#[test]
fn a_single_store_is_always_strict() {
    let setting = Setting {
        groups: vec![vec!["a"]],
        references: Vec::new(),
        blind: set(&["a"]),
        busy: set(&["a"]),
        ..Setting::default()
    };
    let (world, conclusion) = run(setting);
    assert_eq!(sealed(conclusion), Level::Strict);
    assert_eq!((count(&world, "pin"), count(&world, "observe")), (1, 0));
}

#[test]
fn a_hanging_pin_ends_the_pause_in_time_and_fails_the_run() {
    let mut world = World::new(Setting { blind: set(&["c"]), pause_steps: 2, ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pinning { group: 0 });
    let hanging: Vec<_> = world.in_flight.keys().copied().collect();
    assert!(world.writers_paused());
    world.pass(BUDGET_MICROS - 1_000_000);
    let resume = world.in_flight.iter().find(|(_, action)| action.name() == "resume").map(|(id, _)| *id);
    assert_eq!(world.in_flight[&resume.expect("the first undo")], Action::Resume { step: 1 });
    // Even its answer does not come: at the deadline nobody waits any more.
    world.pass(1_000_000);
    let resumes = world.in_flight.values().filter(|action| action.name() == "resume").count();
    assert_eq!(resumes, 2);
    assert!(hanging.iter().all(|id| world.asked.contains(&Action::Interrupt { effect: *id })));
    assert_eq!(failed_with(world.finish()).kind, Kind::TimedOut);
}

#[test]
fn an_overlong_pause_degrades_where_that_is_accepted() {
    let setting = Setting { blind: set(&["c"]), pause_steps: 1, accept: vec![Level::Ordered], ..Setting::default() };
    let mut world = World::new(setting);
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pinning { group: 0 });
    world.pass(BUDGET_MICROS);
    assert_eq!(world.machine.state(), State::Resuming);
    assert_eq!(sealed(world.finish()), Level::Ordered);
    let cut = world.machine.cut().expect("a cut");
    assert_eq!((cut.paused, cut.cut.attempt), (false, 2));
}

#[test]
fn writers_that_cannot_be_let_go_fail_the_run_and_keep_the_watchdog() {
    let mut world = World::new(Setting { blind: set(&["c"]), pause_steps: 1, ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Resuming);
    for _ in 0..ATTEMPTS_MAX {
        let id = *world.in_flight.iter().find(|(_, action)| action.name() == "resume").expect("asked").0;
        world.answer(id, Fault::Before);
        world.pass(2_000_000);
    }
    let Conclusion::Failed { failure, warnings, .. } = world.finish() else { panic!("sealed") };
    assert_eq!(failure.operation.as_deref(), Some("resume"));
    assert_eq!(warnings[0].operation.as_deref(), Some("resume"));
    assert_eq!(count(&world, "stop_watchdog"), 0);
}

#[test]
fn a_late_pause_step_is_undone_once_more() {
    let mut world = World::new(Setting { blind: set(&["c"]), pause_steps: 1, ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pausing { steps_done: 0 });
    until(&mut world, |_| true);
    let watchdog = *world.in_flight.keys().next().expect("the watchdog");
    world.answer(watchdog, Fault::None);
    let pause = *world.in_flight.keys().next().expect("the pause step");
    world.happen(Happening::Cancel { reason: "enough".to_owned() });
    let resume = *world.in_flight.iter().find(|(_, action)| action.name() == "resume").expect("at once").0;
    world.answer(resume, Fault::None);
    world.answer(pause, Fault::None);
    assert!(world.writers_paused(), "the step came through after its undo");
    assert_eq!(failed_with(world.finish()).kind, Kind::Cancelled);
    assert_eq!(count(&world, "resume"), 2);
}

#[test]
fn a_hold_that_runs_out_is_renewed_but_not_for_ever() {
    let mut world = World::new(Setting { hold_micros: 1_000, ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Preparing);
    let (a, b) = (EffectId(2), EffectId(3));
    world.answer(a, Fault::None);
    world.answer(b, Fault::None);
    world.pass(5_000);
    assert_eq!(sealed(world.finish()), Level::Strict);
    assert_eq!(count(&world, "prepare"), 5, "a and b again, c not");
    let mut world = World::new(Setting { hold_micros: 1_000, ..Setting::default() });
    world.happen(Happening::Begin);
    while world.conclusion.is_none() {
        let id = *world.in_flight.keys().next().expect("something is under way");
        world.answer(id, Fault::None);
        world.pass(5_000);
    }
    world.check_end();
    let failure = failed_with(world.conclusion.clone().expect("concluded"));
    assert_eq!(failure.kind, Kind::TimedOut, "{failure:?}");
}

#[test]
fn a_lost_pin_and_a_missing_referent_and_a_torn_file_fail_the_run() {
    let (world, conclusion) = run(Setting { lost: set(&["b"]), ..Setting::default() });
    let failure = failed_with(conclusion);
    assert_eq!((failure.kind, failure.store.as_deref()), (Kind::PinLost, Some("b")));
    assert_eq!(count(&world, "write_snapshot"), 0);
    let (_, conclusion) = run(Setting { missing: 1, ..Setting::default() });
    assert_eq!(failed_with(conclusion).kind, Kind::Unproven);
    let torn = Setting { torn: set(&["a"]), ..Setting::default() };
    let (_, conclusion) = run(torn.clone());
    assert!(failed_with(conclusion).hint.expect("a hint").contains("acceptNamedLoss"));
    let (_, conclusion) = run(Setting { accept_named_loss: true, ..torn });
    assert!(matches!(conclusion, Conclusion::Sealed { verdict: Verdict::RestorableWithNamedLoss, .. }));
}

#[test]
fn references_that_share_a_store_wait_for_each_other() {
    let references = vec![("a", "c"), ("b", "d"), ("a", "d")];
    let setting = Setting { groups: vec![vec!["a", "b"], vec!["c", "d"]], references, ..Setting::default() };
    let mut world = World::new(setting);
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::CheckingReferences);
    let under_way: Vec<_> = world.in_flight.values().cloned().collect();
    assert_eq!(under_way, [0, 1].map(|reference| Action::CheckReference { reference }));
    assert_eq!(sealed(world.finish()), Level::Strict);
}

#[test]
fn nobody_stops_the_commit() {
    for what in [Happening::Cancel { reason: "c".to_owned() }, Happening::LeaseLost { reason: "l".to_owned() }] {
        let mut world = World::new(Setting::default());
        world.happen(Happening::Begin);
        until(&mut world, |state| state == State::Committing);
        world.happen(what);
        assert_eq!(world.machine.state(), State::Committing);
        assert_eq!(sealed(world.finish()), Level::Strict);
    }
}

#[test]
fn an_unclear_commit_is_looked_up() {
    for (fault, is_sealed) in [(Fault::After, true), (Fault::Unclear, false), (Fault::Before, false)] {
        let mut world = World::new(Setting::default());
        world.happen(Happening::Begin);
        until(&mut world, |state| state == State::Committing);
        let id = *world.in_flight.keys().next().expect("the commit");
        world.answer(id, fault);
        assert_eq!(matches!(world.finish(), Conclusion::Sealed { .. }), is_sealed, "{fault:?}");
        assert_eq!(count(&world, "read_statefile"), usize::from(fault != Fault::Before), "{fault:?}");
        assert_eq!(count(&world, "remove_snapshot"), usize::from(fault == Fault::Before), "{fault:?}");
    }
}

#[test]
fn a_commit_that_nobody_can_look_up_is_reported_as_unknown() {
    let mut world = World::new(Setting::default());
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Committing);
    let id = *world.in_flight.keys().next().expect("the commit");
    world.answer(id, Fault::After);
    for _ in 0..ATTEMPTS_MAX {
        let id = *world.in_flight.iter().find(|(_, a)| **a == Action::ReadStatefile).expect("asked").0;
        world.answer(id, Fault::Before);
        world.pass(60_000_000);
    }
    let conclusion = world.finish();
    assert!(matches!(conclusion, Conclusion::Failed { commit_unknown: true, .. }), "{conclusion:?}");
    assert!(world.snapshot, "the point may be there and needs it");
}

#[test]
fn a_dead_engine_leaves_its_remains_to_the_next_one() {
    let mut world = World::new(Setting { busy: set(&["a"]), accept: vec![Level::Ordered], ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Draining);
    world.crash(&mut || false);
    let mut remains = Vec::new();
    for action in world.in_flight.values() {
        if let Action::Release { store, remains: left } = action {
            remains.push((store.as_str().to_owned(), left.len()));
        }
    }
    assert_eq!(remains.len(), 3);
    assert!(remains.iter().all(|(_, left)| *left >= 1), "{remains:?}");
    assert_eq!(failed_with(world.finish()).kind, Kind::Cancelled);
}

#[test]
fn a_death_that_outlasts_the_budget_asks_for_each_undo_once() {
    let mut world = World::new(Setting { blind: set(&["c"]), pause_steps: 2, ..Setting::default() });
    world.happen(Happening::Begin);
    until(&mut world, |state| state == State::Pinning { group: 0 });
    world.crash_for(2 * BUDGET_MICROS, &mut || true);
    let resumes = world.in_flight.values().filter(|action| action.name() == "resume").count();
    assert_eq!(resumes, 2, "each step once, and all at once: {:?}", world.in_flight);
    assert_eq!(failed_with(world.finish()).kind, Kind::TimedOut, "the budget ran out first");
}

#[test]
fn the_statefile_is_made_of_what_the_journal_tells() {
    use crate::id::{EnvironmentName, PlatformName, PointId, StoreName};
    let mut world = World::new(Setting::default());
    world.happen(Happening::Begin);
    let head = || StatefileHead {
        point: PointId::from_random([3; 8]),
        platform: PlatformName::new("p").expect("valid"),
        environment: EnvironmentName::new("e").expect("valid"),
        platform_stores: [StoreName::new("elsewhere").expect("valid")].into(),
        parent: None,
        started_at: jiff::Timestamp::UNIX_EPOCH,
        sealed_at: jiff::Timestamp::UNIX_EPOCH,
        tool_version: "0".to_owned(),
        fencing: 4,
    };
    assert!(world.machine.statefile(head()).is_err(), "too early");
    until(&mut world, |state| state == State::Committing);
    let statefile = world.machine.statefile(head()).expect("complete");
    assert_eq!((statefile.stores.len(), statefile.references.len()), (3, 3));
    assert_eq!(statefile.left_out.len(), 1, "a store that the run does not take is named");
    assert_eq!((statefile.totals.files, statefile.totals.bytes_stored, statefile.fencing), (3, 1, 4));
    assert_eq!((statefile.level, statefile.cut_tries), (Level::Strict, 1));
    assert_eq!(world.replayed().statefile(head()).expect("complete"), statefile);
}
