//! Judges a restored copy by the record alone: every version that all stores acknowledged before
//! the cut must be there, none begun after it may be, what is there must be whole, and at level
//! strict no store may be ahead of the one before it.
//!
//! Reads the copy with the stores' own clients, and of Stillpoint only the statefile: which stores,
//! when each was pinned, which level.

mod changing;
mod look;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::content::{Version, writer_of};
use crate::record::Record;
use crate::settings::Settings;
use crate::{Attempted, Result};

/// What a publication writes, in this order, and in which store it lies. `latest` is there only where
/// objects are overwritten.
const ORDER: [(&str, &str); 6] = [
    ("artifacts", "artifacts"),
    ("latest", "artifacts"),
    ("code", "code"),
    ("meta", "meta"),
    ("cache", "cache"),
    ("config", "config"),
];

/// How many violations are named.
const NAMED_MAX: usize = 20;

/// What one store of the copy holds: per writer the newest version such that all before it are there.
pub type Newest = BTreeMap<u32, u64>;

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verdict {
    /// Versions that were acknowledged before the cut, and so had to be there.
    pub expected: u64,
    /// Versions that were acknowledged after the cut, and so could not be.
    pub later: u64,
    /// Objects whose deletion was acknowledged before the cut, and so could not be there.
    pub deleted: u64,
    /// Uploads in parts that were acknowledged before the cut, each over the one before.
    pub bundles: u64,
    /// Per store: versions found in the copy.
    pub found: BTreeMap<String, u64>,
    /// References followed from rows and values to artifacts and commits.
    pub references: u64,
    /// How many obligations are not met.
    pub violations: u64,
    /// The first of them.
    pub named: Vec<String>,
}

impl Verdict {
    fn violation(&mut self, text: String) {
        self.violations += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(text);
        }
    }
}

/// When a store was pinned: microseconds of the wall clock, before and after.
type Pinned = (u64, u64);

/// The part of a statefile that counts here.
#[derive(Debug)]
pub struct Point {
    strict: bool,
    pinned: BTreeMap<String, Pinned>,
}

impl Point {
    /// Takes it from a statefile, or from the JSON of `stillpoint show` or `backup` around one.
    pub fn of(document: &serde_json::Value) -> Result<Self> {
        let statefile = document.get("statefile").unwrap_or(document);
        let mut pinned = BTreeMap::new();
        let stores = statefile["stores"].as_object().ok_or("this is no statefile: it names no stores")?;
        for (store, state) in stores {
            let time = |index: usize| micros(state["pinned_at"][index].as_str().unwrap_or_default());
            pinned.insert(store.clone(), (time(0)?, time(1)?));
        }
        Ok(Self { strict: statefile["level"] == "strict", pinned })
    }

    /// What a publication writes, as far as the point has the store that it lies in.
    fn written(&self) -> impl Iterator<Item = (&'static str, Pinned)> {
        ORDER.into_iter().filter_map(|(name, store)| Some((name, *self.pinned.get(store)?)))
    }

    /// Stores that the record knows nothing of.
    fn unknown(&self) -> impl Iterator<Item = &String> {
        self.pinned.keys().filter(|store| ORDER.iter().all(|(_, known)| known != store))
    }
}

/// Microseconds since 1970 of `2026-11-21T10:00:03.412345678Z`.
fn micros(text: &str) -> Result<u64> {
    let parse = || {
        let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
        let mut date = date.split('-').map(|part| part.parse::<i64>().ok());
        let (year, month, day) = (date.next()??, date.next()??, date.next()??);
        let mut time = time.split(':');
        let (hour, minute) = (time.next()?.parse::<i64>().ok()?, time.next()?.parse::<i64>().ok()?);
        let (seconds, fraction) = time.next().map(|text| text.split_once('.').unwrap_or((text, "0")))?;
        // Days since 1970 by the civil calendar, years beginning in March.
        let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
        let days = 365 * y + y / 4 - y / 100 + y / 400 + (m * 306 + 5) / 10 + day - 1 - 719_468;
        let seconds = days * 86_400 + hour * 3_600 + minute * 60 + seconds.parse::<i64>().ok()?;
        let fraction = format!("{:0<6}", fraction.get(..6).unwrap_or(fraction)).parse::<i64>().ok()?;
        u64::try_from(seconds * 1_000_000 + fraction).ok()
    };
    parse().ok_or_else(|| format!("`{text}` is no time"))
}

/// Judges the copy that `copy` describes.
pub async fn judge(copy: &Settings, record: &Record, point: &Point) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut found: BTreeMap<&str, Newest> = BTreeMap::new();
    let mut held = look::Held::default();
    let mut changing = copy.overwrites.then(changing::Changing::default);
    for store in point.unknown() {
        verdict.violation(format!("the store `{store}` of the point is none of ours: nobody can judge it"));
    }
    for (store, pinned) in point.written() {
        let newest = match (store, &mut changing) {
            ("artifacts", changing) => look::artifacts(copy, &mut held, changing.as_mut(), &mut verdict).await,
            ("latest", None) => continue,
            ("latest", Some(changing)) => {
                changing.judge_bundle(record, pinned, &mut verdict);
                Ok(std::mem::take(&mut changing.latest))
            }
            ("code", _) => look::code(copy, &mut held, &mut verdict),
            ("meta", _) => look::meta(copy, &mut held, &mut verdict).await,
            ("cache", _) => look::cache(copy, &mut held, &mut verdict),
            _ => look::config(copy, &mut held, &mut verdict),
        };
        found.insert(store, newest.attempted(&format!("look into the restored store `{store}`"))?);
    }
    let named: Vec<&str> = point.written().map(|(store, _)| store).collect();
    held.follow(&named, &mut verdict);
    for (store, newest) in &found {
        verdict.found.insert((*store).to_owned(), newest.values().sum());
    }
    let mut writers: Vec<u32> = record.versions.keys().map(|version| version.writer).collect();
    writers.dedup();
    for writer in writers {
        judge_writer(writer, record, point, &found, &mut verdict);
        if let (Some(changing), Some(pinned)) = (&changing, point.pinned.get("artifacts")) {
            changing.judge_checkpoints(writer, record, *pinned, &mut verdict);
        }
    }
    Ok(verdict)
}

fn versions_of(writer: u32, record: &Record) -> impl Iterator<Item = &(u64, Option<u64>)> {
    let range = Version { writer, number: 0 }..=Version { writer, number: u64::MAX };
    record.versions.range(range).map(|(_, times)| times)
}

/// How many of a writer's versions were acknowledged before a store was pinned, and how many begun when
/// it was.
fn bounds(writer: u32, record: &Record, (begin, end): Pinned) -> (u64, u64) {
    let settled = versions_of(writer, record).filter(|(_, done)| done.is_some_and(|done| done < begin)).count();
    let begun = versions_of(writer, record).filter(|(begun, _)| *begun <= end).count();
    (settled as u64, begun as u64)
}

/// One writer's versions against the bounds that the cut sets for each store.
fn judge_writer(writer: u32, record: &Record, point: &Point, found: &BTreeMap<&str, Newest>, verdict: &mut Verdict) {
    let all = versions_of(writer, record).count() as u64;
    let mut before: Option<(&str, u64)> = None;
    let mut first: Option<(&str, u64)> = None;
    let (mut expected, mut later) = (u64::MAX, u64::MAX);
    for (store, pinned) in point.written() {
        let Some(newest) = found.get(store) else { continue };
        let newest = newest.get(&writer).copied().unwrap_or(0);
        let (settled, begun) = bounds(writer, record, pinned);
        expected = expected.min(settled);
        later = later.min(all - begun);
        if newest < settled {
            verdict.violation(format!(
                "{store}: model-{writer} version {settled} was acknowledged before the cut; the copy ends at {newest}"
            ));
        }
        if newest > begun {
            verdict.violation(format!(
                "{store}: model-{writer} version {newest} is there; only {begun} were begun when the cut ended"
            ));
        }
        if let (true, Some((earlier, there))) = (point.strict, before)
            && newest > there
        {
            verdict.violation(format!(
                "strict: model-{writer} is at version {newest} in {store}, but at {there} in {earlier}, which is written first"
            ));
        }
        if let (true, Some((earlier, there))) = (point.strict, first)
            && newest + 1 < there
        {
            verdict.violation(format!(
                "strict: model-{writer} is at version {there} in {earlier}, but at {newest} in {store}: a whole publication apart"
            ));
        }
        before = Some((store, newest));
        first = first.or(before);
    }
    if first.is_some() {
        verdict.expected += expected;
        verdict.later += later;
    }
}

/// The newest version of each writer such that all before it are there; what lies beyond a gap is a
/// violation of its own.
fn contiguous(store: &str, versions: impl IntoIterator<Item = Version>, verdict: &mut Verdict) -> Newest {
    let mut newest = Newest::new();
    let mut sorted: Vec<Version> = versions.into_iter().collect();
    sorted.sort_unstable();
    for version in sorted {
        let at = newest.entry(version.writer).or_insert(0);
        if version.number == *at + 1 {
            *at = version.number;
        } else {
            verdict.violation(format!(
                "{store}: {} version {} is there, version {} is not",
                version.model(),
                version.number,
                *at + 1
            ));
        }
    }
    newest
}

/// The version that a model's name and a number mean.
fn version(model: &str, number: u64) -> Option<Version> {
    Some(Version { writer: writer_of(model)?, number })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(lines: &[(u64, u64, Option<u64>)]) -> Record {
        let versions =
            lines.iter().map(|(number, begun, done)| (Version { writer: 0, number: *number }, (*begun, *done)));
        Record { versions: versions.collect(), ..Record::default() }
    }

    fn judged(strict: bool, found: &[(&'static str, u64)]) -> Vec<String> {
        let record = record(&[(1, 10, Some(20)), (2, 30, Some(40)), (3, 95, Some(140)), (4, 150, None)]);
        let pinned = found.iter().map(|(store, _)| ((*store).to_owned(), (90, 100))).collect();
        let found = found.iter().map(|(store, newest)| (*store, Newest::from([(0, *newest)]))).collect();
        let mut verdict = Verdict::default();
        judge_writer(0, &record, &Point { strict, pinned }, &found, &mut verdict);
        assert_eq!((verdict.expected, verdict.later), (2, 1));
        verdict.named
    }

    #[test]
    fn acknowledged_must_be_there_and_later_must_not() {
        assert_eq!(judged(true, &[("artifacts", 3), ("meta", 2)]), Vec::<String>::new());
        assert!(judged(true, &[("artifacts", 1)])[0].contains("was acknowledged before the cut"));
        assert!(judged(true, &[("artifacts", 4)])[0].contains("only 3 were begun"));
        assert!(judged(true, &[("artifacts", 2), ("meta", 3)])[0].starts_with("strict:"));
        assert_eq!(judged(true, &[("artifacts", 3), ("latest", 2), ("meta", 2)]), Vec::<String>::new());
        assert!(judged(true, &[("artifacts", 3), ("latest", 1)])[0].starts_with("latest: model-0 version 2 was"));
        assert!(judged(true, &[("artifacts", 2), ("latest", 3)])[0].starts_with("strict:"));
        assert!(judged(true, &[("artifacts", 3), ("latest", 2), ("meta", 3)])[0].contains("but at 2 in latest"));
        assert_eq!(judged(false, &[("artifacts", 2), ("meta", 3)]), Vec::<String>::new());
    }

    #[test]
    fn stores_that_nobody_can_judge_are_named() {
        let times = serde_json::json!({ "pinned_at": ["2026-11-21T10:00:00Z", "2026-11-21T10:00:01Z"] });
        let point = Point::of(&serde_json::json!({ "level": "strict", "stores": { "meta": times, "queue": times } }));
        let point = point.expect("a statefile");
        assert_eq!(point.unknown().collect::<Vec<_>>(), ["queue"]);
        assert_eq!(point.written().map(|(store, _)| store).collect::<Vec<_>>(), ["meta"]);
    }

    #[test]
    fn times_are_read_to_the_microsecond() {
        assert_eq!(micros("1970-01-02T00:00:01.5Z"), Ok(86_401_500_000));
        assert_eq!(micros("2024-02-29T12:00:00Z"), Ok(1_709_208_000_000_000));
        assert_eq!(micros("2026-11-21T10:00:03.412345678Z"), Ok(1_795_255_203_412_345));
        assert!(micros("yesterday").is_err());
    }

    #[test]
    fn a_gap_is_a_violation() {
        let mut verdict = Verdict::default();
        let versions = [1, 2, 4].map(|number| Version { writer: 1, number });
        assert_eq!(contiguous("meta", versions, &mut verdict), Newest::from([(1, 2)]));
        assert_eq!(verdict.violations, 1);
    }
}
