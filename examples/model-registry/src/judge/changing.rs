//! Objects that do not stay: `latest` of each model is overwritten by every publication, checkpoints
//! are deleted some publications later, and one key holds bundle after bundle, uploaded slowly in parts.
//!
//! What is judged here is whether a copy shows each of them as it was at the cut: no older content and
//! no newer, nothing that was deleted, nothing missing that was not.

use std::collections::{BTreeMap, BTreeSet};

use super::{Newest, Pinned, Verdict, bounds, version};
use crate::content::{BUNDLE_KEY, CHECKPOINTS_KEPT, Version, bundle};
use crate::record::Record;

/// What a copy holds of them.
#[derive(Debug, Default)]
pub struct Changing {
    /// Per writer: the version that `latest` names.
    pub latest: Newest,
    checkpoints: BTreeMap<u32, BTreeSet<u64>>,
    bundle: u64,
}

impl Changing {
    /// Takes an object if it is one of these; false if its key is none of theirs.
    pub fn take(&mut self, key: &str, bytes: &[u8], verdict: &mut Verdict) -> bool {
        if key == BUNDLE_KEY {
            let number = first_line(bytes).strip_prefix("bundle ").and_then(|number| number.parse().ok());
            self.bundle = number.unwrap_or(0);
            check(key, bundle(self.bundle).concat() == bytes, bytes, verdict);
            return true;
        }
        if let Some(model) = key.strip_prefix("latest/") {
            let number = first_line(bytes).split(' ').next().and_then(|number| number.parse().ok());
            let Some(version) = version(model, number.unwrap_or(0)) else { return false };
            check(key, version.latest() == bytes, bytes, verdict);
            self.latest.insert(version.writer, version.number);
            return true;
        }
        let Some(found) = checkpoint_of_key(key).filter(|version| version.checkpoint_key() == key) else {
            return false;
        };
        check(key, found.checkpoint() == bytes, bytes, verdict);
        self.checkpoints.entry(found.writer).or_default().insert(found.number)
    }

    /// Judges one writer's checkpoints; the bucket was pinned at `pinned`.
    pub fn judge_checkpoints(&self, writer: u32, record: &Record, pinned: Pinned, verdict: &mut Verdict) {
        let (settled, begun) = bounds(writer, record, pinned);
        let nothing = BTreeSet::new();
        let found = self.checkpoints.get(&writer).unwrap_or(&nothing);
        for number in settled.saturating_sub(CHECKPOINTS_KEPT) + 1..=settled {
            // Its deletion belongs to a publication that may have begun.
            if number + CHECKPOINTS_KEPT > begun && !found.contains(&number) {
                verdict.violation(format!(
                    "artifacts: checkpoint {number} of model-{writer} was acknowledged before the cut; it is not there"
                ));
            }
        }
        for number in found {
            if number + CHECKPOINTS_KEPT <= settled {
                verdict.violation(format!(
                    "artifacts: the deletion of checkpoint {number} of model-{writer} was acknowledged before the cut; it is there"
                ));
            }
            if *number > begun {
                verdict.violation(format!(
                    "artifacts: checkpoint {number} of model-{writer} is there; only {begun} were begun when the cut ended"
                ));
            }
        }
        verdict.deleted += settled.saturating_sub(CHECKPOINTS_KEPT);
    }

    /// Judges the bundle.
    pub fn judge_bundle(&self, record: &Record, (begin, end): Pinned, verdict: &mut Verdict) {
        let newest = |is_so: &dyn Fn(&(u64, Option<u64>)) -> bool| {
            record.bundles.iter().rev().find(|(_, times)| is_so(times)).map_or(0, |(number, _)| *number)
        };
        let settled = newest(&|(_, done)| done.is_some_and(|done| done < begin));
        let begun = newest(&|(begun, _)| *begun <= end);
        if self.bundle < settled || self.bundle > begun {
            verdict.violation(format!(
                "artifacts: `{BUNDLE_KEY}` is bundle {}; {settled} was acknowledged before the cut, {begun} begun when it ended",
                self.bundle
            ));
        }
        verdict.bundles += settled;
    }
}

fn check(key: &str, is_right: bool, bytes: &[u8], verdict: &mut Verdict) {
    if !is_right {
        verdict.violation(format!("artifacts: `{key}` holds {} bytes that are not its own", bytes.len()));
    }
}

fn first_line(bytes: &[u8]) -> &str {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    std::str::from_utf8(line).unwrap_or_default()
}

fn checkpoint_of_key(key: &str) -> Option<Version> {
    let (model, number) = key.strip_prefix("checkpoints/")?.split_once('/')?;
    version(model, number.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Versions 1 to 5 are acknowledged before the cut, 6 is on its way, 7 comes later; bundle 1 is
    /// acknowledged, 2 on its way, 3 later.
    fn record() -> Record {
        let times = |number: u64| match number {
            6 => (95, Some(140)),
            7 => (150, None),
            _ => (number * 10, Some(number * 10 + 5)),
        };
        let versions = (1..=7).map(|number| (Version { writer: 0, number }, times(number))).collect();
        let bundles = BTreeMap::from([(1, (10, Some(20))), (2, (90, Some(110))), (3, (120, None))]);
        Record { versions, bundles, happenings: Vec::new() }
    }

    fn judged(checkpoints: &[u64], held: u64) -> Vec<String> {
        let (mut changing, mut verdict) = (Changing::default(), Verdict::default());
        for number in checkpoints {
            let version = Version { writer: 0, number: *number };
            assert!(changing.take(&version.checkpoint_key(), &version.checkpoint(), &mut verdict));
        }
        if held > 0 {
            assert!(changing.take(BUNDLE_KEY, &bundle(held).concat(), &mut verdict));
        }
        changing.judge_checkpoints(0, &record(), (90, 100), &mut verdict);
        changing.judge_bundle(&record(), (90, 100), &mut verdict);
        assert_eq!((verdict.deleted, verdict.bundles), (2, 1));
        verdict.named
    }

    #[test]
    fn what_was_deleted_or_overwritten_before_the_cut_must_be_gone() {
        let fine: [(&[u64], u64); 4] = [(&[3, 4, 5], 1), (&[4, 5], 1), (&[3, 4, 5, 6], 2), (&[4, 5, 6], 2)];
        for (checkpoints, held) in fine {
            assert_eq!(judged(checkpoints, held), Vec::<String>::new());
        }
        assert!(judged(&[2, 3, 4, 5], 1)[0].contains("deletion of checkpoint 2"));
        assert!(judged(&[3, 4], 1)[0].contains("checkpoint 5 of model-0 was acknowledged"));
        assert!(judged(&[4, 5, 7], 1)[0].contains("only 6 were begun"));
        assert!(judged(&[4, 5], 3)[0].contains("is bundle 3; 1 was acknowledged before the cut, 2 begun"));
        assert!(judged(&[4, 5], 0)[0].contains("is bundle 0"));
    }

    #[test]
    fn torn_and_foreign_objects_are_named() {
        let (mut changing, mut verdict) = (Changing::default(), Verdict::default());
        let version = Version { writer: 0, number: 4 };
        assert!(changing.take("latest/model-0", &version.latest(), &mut verdict));
        assert_eq!((verdict.violations, changing.latest[&0]), (0, 4));
        assert!(changing.take("latest/model-0", &version.latest()[1..], &mut verdict));
        assert!(changing.take(BUNDLE_KEY, &bundle(1)[0], &mut verdict));
        assert_eq!(verdict.violations, 2, "{verdict:?}");
        assert!(!changing.take("checkpoints/model-0/4", b"", &mut verdict));
        assert!(!changing.take("models/model-0/4", b"", &mut verdict));
    }
}
