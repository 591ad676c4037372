//! Random lives: any setting, any order of answers, faults, deaths and cancels at any time.

use proptest::prelude::*;

use super::super::*;
use super::world::*;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn pick(mask: u8) -> std::collections::BTreeSet<&'static str> {
    NAMES.iter().enumerate().filter(|(index, _)| mask & (1 << index) != 0).map(|(_, name)| *name).collect()
}

fn setting() -> impl Strategy<Value = Setting> {
    let masks = prop::array::uniform5(prop_oneof![3 => Just(0_u8), 1 => 0_u8..16]);
    let level = prop_oneof![4 => Just(Level::Strict), 1 => Just(Level::Ordered), 1 => Just(Level::Independent)];
    let accept = prop::collection::vec(prop_oneof![Just(Level::Ordered), Just(Level::Independent)], 0..2);
    (masks, level, accept, 0_u32..4, any::<bool>(), 0_u8..4, prop_oneof![9 => Just(0_u64), 1 => Just(2)]).prop_map(
        |([blind, leaky, busy, torn, lost], level, accept, pause_steps, flag, shape, missing)| {
            let groups = match shape {
                0 => vec![vec!["a", "b", "c", "d"]],
                1 => vec![vec!["a"], vec!["b", "c"], vec!["d"]],
                2 => vec![vec!["d"], vec!["c"], vec!["b"], vec!["a"]],
                _ => vec![vec!["a"]],
            };
            let references = if shape == 3 { Vec::new() } else { vec![("a", "b"), ("c", "d"), ("a", "d"), ("b", "d")] };
            Setting {
                groups,
                blind: pick(blind),
                level,
                accept,
                order_holds: flag,
                pause_steps,
                references,
                leaky: pick(leaky),
                busy: pick(busy),
                accept_named_loss: flag,
                hold_micros: if flag { 3_600_000_000 } else { 3_000_000 },
                torn: pick(torn & lost),
                lost: pick(lost & torn),
                missing,
            }
        },
    )
}

fn live(setting: Setting, mut tape: Tape) -> World {
    let mut world = World::new(setting);
    world.happen(Happening::Begin);
    for _ in 0..400 {
        if world.conclusion.is_some() || tape.is_over() {
            break;
        }
        world.write(&mut tape);
        match tape.choose(24) {
            20 => world.pass(u64::from(tape.choose(4_000)) * 1_000),
            21 if tape.rarely(3) => world.happen(Happening::Cancel { reason: "enough".to_owned() }),
            22 if tape.rarely(4) => {
                let dead_for = u64::from(tape.choose(8_000)) * 1_000;
                world.crash_for(dead_for, &mut || tape.choose(2) == 1);
            }
            23 if tape.rarely(6) => world.happen(Happening::LeaseLost { reason: "taken".to_owned() }),
            _ => {
                let waiting: Vec<_> = world.in_flight.keys().copied().collect();
                let fault = if tape.rarely(12) {
                    [Fault::Before, Fault::Unclear, Fault::After][tape.choose(3) as usize]
                } else {
                    Fault::None
                };
                match waiting.get(tape.choose(waiting.len() as u16) as usize) {
                    Some(id) => world.answer(*id, fault),
                    None => world.pass(1_000_000),
                }
            }
        }
        assert!(world.machine == world.replayed(), "a replay of the journal so far leads elsewhere");
    }
    world.finish();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn every_life_keeps_the_promises(setting in setting(), tape in prop::collection::vec(any::<u16>(), 0..1_500)) {
        live(setting, Tape::new(tape));
    }
}

proptest! {
    #[test]
    fn accepted_levels_are_never_undercut(setting in setting(), tape in prop::collection::vec(any::<u16>(), 0..600)) {
        let world = live(setting, Tape::new(tape));
        if let Some(Conclusion::Sealed { level, .. }) = &world.conclusion {
            prop_assert!(world.machine.spec().accepts(*level), "{level:?} was not accepted");
        }
    }

    #[test]
    fn journals_and_effects_survive_json(setting in setting(), tape in prop::collection::vec(any::<u16>(), 0..600)) {
        let world = live(setting, Tape::new(tape));
        for (event, effects) in &world.journal {
            let text = serde_json::to_string(&(event, effects)).expect("serializes");
            let again: (Event, Vec<Effect>) = serde_json::from_str(&text).expect("parses");
            prop_assert_eq!(&(again.0, again.1), &(event.clone(), effects.clone()));
        }
    }
}
