//! Every effect failed once, every answer given twice, every position of the journal a death.

use std::collections::BTreeSet;

use super::super::*;
use super::world::*;

/// Settings that between them ask for every kind of effect.
fn settings() -> Vec<Setting> {
    let blind: BTreeSet<_> = ["b"].into();
    vec![
        Setting::default(),
        Setting { blind: blind.clone(), pause_steps: 2, ..Setting::default() },
        Setting { busy: ["a"].into(), pause_steps: 3, accept: vec![Level::Ordered], ..Setting::default() },
        Setting { missing: 1, ..Setting::default() },
        Setting { blind, lost: ["a"].into(), pause_steps: 1, ..Setting::default() },
    ]
}

/// Runs until `position` events are in the journal, everything going well. False if it ended before.
fn run_to(world: &mut World, position: usize) -> bool {
    world.happen(Happening::Begin);
    while world.journal.len() < position && world.conclusion.is_none() {
        world.write(&mut Tape::default());
        match world.in_flight.keys().next().copied() {
            Some(id) => world.answer(id, Fault::None),
            None => world.pass(1_000_000),
        }
    }
    world.conclusion.is_none()
}

/// Calls `hurt` at every position of every setting's life and lets the run end.
fn at_every_position(mut hurt: impl FnMut(&mut World)) {
    let mut seen = 0;
    for setting in settings() {
        for position in 1.. {
            let mut world = World::new(setting.clone());
            if !run_to(&mut world, position) {
                break;
            }
            hurt(&mut world);
            world.finish();
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} positions");
}

#[test]
fn every_effect_fails_once() {
    for fault in [Fault::Before, Fault::Unclear, Fault::After] {
        let mut failed = BTreeSet::new();
        for setting in settings() {
            for number in 1.. {
                let mut world = World::new(setting.clone());
                world.happen(Happening::Begin);
                let mut hurt = false;
                while world.conclusion.is_none() {
                    world.write(&mut Tape::default());
                    let Some((id, action)) = world.in_flight.iter().next().map(|(id, action)| (*id, action.clone()))
                    else {
                        world.pass(1_000_000);
                        continue;
                    };
                    if id == EffectId(number) {
                        failed.insert(action.name());
                        hurt = true;
                        world.answer(id, fault);
                    } else {
                        world.answer(id, Fault::None);
                    }
                }
                world.check_end();
                if !hurt && EffectId(number) > EffectId(world.machine.effects_asked) {
                    break;
                }
            }
        }
        let expected =
            ["acquire_lease", "prepare", "observe", "pin", "start_watchdog", "pause", "resume", "stop_watchdog"];
        let rest =
            ["drain", "check_reference", "check_pin", "write_snapshot", "write_statefile", "release", "release_lease"];
        for name in expected.into_iter().chain(rest) {
            assert!(failed.contains(name), "{name} never failed");
        }
    }
}

#[test]
fn an_engine_may_die_at_every_position() {
    for done in [false, true] {
        at_every_position(|world| world.crash(&mut || done));
    }
}

#[test]
fn an_engine_may_be_dead_for_longer_than_the_budget() {
    at_every_position(|world| world.crash_for(2 * BUDGET_MICROS, &mut || true));
}

#[test]
fn an_engine_may_die_twice() {
    at_every_position(|world| {
        world.crash(&mut || true);
        if let Some(id) = world.in_flight.keys().next().copied() {
            world.answer(id, Fault::None);
        }
        if world.conclusion.is_none() {
            world.crash(&mut || false);
        }
    });
}

#[test]
fn a_cancel_may_come_at_every_position() {
    at_every_position(|world| {
        let committing = world.machine.is_committing() || world.machine.commit.written;
        world.happen(Happening::Cancel { reason: "enough".to_owned() });
        if !committing {
            assert_eq!(world.machine.state(), State::Unwinding);
        }
    });
}

#[test]
fn a_long_silence_may_come_at_every_position() {
    at_every_position(|world| {
        world.pass(3_600_000_000);
        assert!(!world.machine.pause.as_ref().is_some_and(|pause| pause.holding), "writers wait for ever");
    });
}

#[test]
fn a_clock_that_jumps_back_changes_nothing() {
    at_every_position(|world| {
        world.now = Micros(0);
    });
}

#[test]
fn answers_that_do_not_fit_are_refused_without_a_trace() {
    at_every_position(|world| {
        world.refused(Happening::Begin);
        world.refused(Happening::Answer { effect: EffectId(9_999), outcome: Outcome::Done });
        let Some((id, action)) = world.in_flight.iter().next().map(|(id, action)| (*id, action.clone())) else {
            return;
        };
        let wrong = if action.name() == "drain" { Outcome::Done } else { Outcome::Drained(drained()) };
        world.refused(Happening::Answer { effect: id, outcome: wrong });
    });
    let mut machine = Coordinator::new(Setting::default().spec());
    let tick = Event::new(Micros(1), Happening::Tick);
    assert_eq!(machine.step(tick), Err(IllegalEvent::NotBegun));
}

fn drained() -> Box<StoreDrained> {
    Box::new(StoreDrained { drained: crate::driver::Drained::default(), files: 0, bytes: 0 })
}

#[test]
fn every_action_but_these_has_an_undo() {
    use crate::id::{CutId, RunId};
    let store = StoreName::new("a").expect("valid");
    let cut = CutId { run: RunId::from_random([1; 8]), attempt: 1 };
    assert_eq!(undo_of(&Action::AcquireLease), Some(Action::ReleaseLease));
    let release = Action::Release { store: store.clone(), remains: Vec::new() };
    assert_eq!(undo_of(&Action::Prepare { store: store.clone() }), Some(release.clone()));
    assert_eq!(undo_of(&Action::Pin { store, cut }), Some(release.clone()));
    assert_eq!(undo_of(&Action::StartWatchdog { deadline: Micros(1) }), Some(Action::StopWatchdog));
    assert_eq!(undo_of(&Action::Pause { step: 3 }), Some(Action::Resume { step: 3 }));
    assert_eq!(undo_of(&Action::WriteSnapshot), Some(Action::RemoveSnapshot));
    for action in [Action::WriteStatefile, Action::ReadStatefile, Action::ReleaseLease, release] {
        assert_eq!(undo_of(&action), None);
    }
}
