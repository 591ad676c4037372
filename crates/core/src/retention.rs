//! Which points are kept, and why. Decides; deletes nothing.
//!
//! A point is kept if any rule keeps it. The newest restorable point of the whole platform is kept
//! whatever the rules say, and without rules everything is. Points that cover only some stores do
//! not count towards any rule: they are kept as long as they are younger than the newest kept
//! whole point, because nobody asked to lose them.

use jiff::Timestamp;
use jiff::civil::DateTime;
use serde::{Deserialize, Serialize};

use crate::duration;
use crate::error::Result;
use crate::id::PointId;
use crate::platform::RetentionPolicy;
use crate::statefile::Verdict;

/// What must be known of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The point.
    pub point: PointId,
    /// The moment that it shows.
    pub at: Timestamp,
    /// What it is worth.
    pub verdict: Verdict,
    /// Whether it covers every store of the platform.
    pub whole: bool,
}

/// What becomes of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The point.
    pub point: PointId,
    /// The moment that it shows.
    pub at: Timestamp,
    /// Why it is kept, e.g. `daily 3 of 7`; empty if it may be forgotten.
    pub reasons: Vec<String>,
}

impl Decision {
    /// Whether the point is kept.
    pub fn keeps(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// Decides on every point. The answer is sorted, newest first.
///
/// `civil` gives the wall-clock time of the policy's zone; hours, days and so on begin there. Fails
/// with `Config` if `within` is not a span of time.
pub fn decide(
    policy: &RetentionPolicy,
    points: &[Candidate],
    now: Timestamp,
    civil: &dyn Fn(Timestamp) -> DateTime,
) -> Result<Vec<Decision>> {
    let within = policy.within.as_deref().map(duration::parse).transpose()?;
    let mut sorted: Vec<&Candidate> = points.iter().collect();
    sorted.sort_by(|a, b| b.at.cmp(&a.at).then_with(|| a.point.cmp(&b.point)));
    let mut decisions: Vec<Decision> = sorted
        .iter()
        .map(|candidate| Decision { point: candidate.point.clone(), at: candidate.at, reasons: Vec::new() })
        .collect();
    let whole: Vec<usize> = (0..sorted.len()).filter(|index| sorted[*index].whole).collect();
    for (order, index) in whole.iter().take(policy.last as usize).enumerate() {
        decisions[*index].reasons.push(format!("last {} of {}", order + 1, policy.last));
    }
    for (name, count, bucket) in periods(policy) {
        keep_newest_of_each(&mut decisions, &whole, (name, count), &|at| bucket(civil(at)));
    }
    if let (Some(within), Some(text)) = (within, &policy.within) {
        for index in &whole {
            if sorted[*index].at.duration_until(now).unsigned_abs() <= within || sorted[*index].at > now {
                decisions[*index].reasons.push(format!("within {text}"));
            }
        }
    }
    if *policy == (RetentionPolicy { time_zone: policy.time_zone.clone(), ..RetentionPolicy::default() }) {
        decisions.iter_mut().for_each(|decision| decision.reasons.push("no rules".to_owned()));
    }
    keep_what_must_stay(&sorted, &whole, &mut decisions);
    Ok(decisions)
}

/// Gives the same value for all times of one hour, day, …
type Bucket = fn(DateTime) -> (i16, i16, i8);

fn periods(policy: &RetentionPolicy) -> [(&'static str, u32, Bucket); 5] {
    [
        ("hourly", policy.hourly, |at| (at.year(), at.day_of_year(), at.hour())),
        ("daily", policy.daily, |at| (at.year(), at.day_of_year(), 0)),
        ("weekly", policy.weekly, |at| {
            let week = at.date().iso_week_date();
            (week.year(), i16::from(week.week()), 0)
        }),
        ("monthly", policy.monthly, |at| (at.year(), i16::from(at.month()), 0)),
        ("yearly", policy.yearly, |at| (at.year(), 0, 0)),
    ]
}

fn keep_newest_of_each(
    decisions: &mut [Decision],
    whole: &[usize],
    (name, count): (&str, u32),
    bucket: &dyn Fn(Timestamp) -> (i16, i16, i8),
) {
    let mut seen = Vec::new();
    for index in whole {
        if seen.len() >= count as usize {
            return;
        }
        let this = bucket(decisions[*index].at);
        // Not only the latest one: where clocks are set back, an hour comes twice.
        if !seen.contains(&this) {
            seen.push(this);
            decisions[*index].reasons.push(format!("{name} {} of {count}", seen.len()));
        }
    }
}

/// The newest restorable point, and partial points that are not older than the whole ones kept.
fn keep_what_must_stay(sorted: &[&Candidate], whole: &[usize], decisions: &mut [Decision]) {
    let clean = whole.iter().find(|index| sorted[**index].verdict == Verdict::Restorable);
    if let Some(newest) = clean.or(whole.first()) {
        decisions[*newest].reasons.push("newest restorable point".to_owned());
    }
    // A newer point with named losses does not make the clean one less the newest clean one, but
    // it is the newest that there is.
    if let (Some(first), Some(clean)) = (whole.first(), clean)
        && first != clean
    {
        decisions[*first].reasons.push("newest point, with named loss".to_owned());
    }
    let newest_whole = whole.first().map(|index| sorted[*index].at);
    for (candidate, decision) in sorted.iter().zip(decisions) {
        if !candidate.whole && decision.reasons.is_empty() && newest_whole.is_none_or(|whole| candidate.at >= whole) {
            decision.reasons.push("newer than every point of the whole platform".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    use super::*;

    const HOUR_SECONDS: i64 = 3_600;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a timestamp")
    }

    fn point(number: u64, at: Timestamp) -> Candidate {
        Candidate { point: PointId::from_random(number.to_le_bytes()), at, verdict: Verdict::Restorable, whole: true }
    }

    /// `count` points, one each `step_hours`, the newest first.
    fn series(newest: &str, step_hours: i64, count: u64) -> Vec<Candidate> {
        let newest = at(newest);
        let back = |index: u64| newest - SignedDuration::from_secs(index as i64 * step_hours * HOUR_SECONDS);
        (0..count).map(|index| point(index, back(index))).collect()
    }

    fn utc(at: Timestamp) -> DateTime {
        TimeZone::UTC.to_datetime(at)
    }

    fn kept(policy: &RetentionPolicy, points: &[Candidate], now: &str) -> Vec<(String, String)> {
        let decisions = decide(policy, points, at(now), &utc).expect("decides");
        let kept = decisions.iter().filter(|decision| decision.keeps());
        kept.map(|decision| (decision.at.to_string(), decision.reasons.join(", "))).collect()
    }

    #[test]
    fn each_rule_names_itself_and_its_count() {
        let points = series("2026-11-21T10:00:00Z", 12, 10);
        let policy = RetentionPolicy { last: 1, daily: 3, ..RetentionPolicy::default() };
        let kept = kept(&policy, &points, "2026-11-21T11:00:00Z");
        assert_eq!(
            kept,
            [
                ("2026-11-21T10:00:00Z", "last 1 of 1, daily 1 of 3, newest restorable point"),
                ("2026-11-20T22:00:00Z", "daily 2 of 3"),
                ("2026-11-19T22:00:00Z", "daily 3 of 3"),
            ]
            .map(|(at, why)| (at.to_owned(), why.to_owned()))
        );
    }

    #[test]
    fn weeks_follow_iso_across_the_year() {
        // 2026-12-28 is the Monday of ISO week 53, which ends on 2027-01-03.
        let points: Vec<_> =
            ["2027-01-04T00:00:00Z", "2027-01-03T00:00:00Z", "2026-12-28T00:00:00Z", "2026-12-27T00:00:00Z"]
                .iter()
                .enumerate()
                .map(|(number, text)| point(number as u64, at(text)))
                .collect();
        let policy = RetentionPolicy { weekly: 3, ..RetentionPolicy::default() };
        let kept = kept(&policy, &points, "2027-01-04T01:00:00Z");
        let days: Vec<_> = kept.iter().map(|(at, _)| at.get(..10).expect("a date")).collect();
        assert_eq!(days, ["2027-01-04", "2027-01-03", "2026-12-27"]);
    }

    #[test]
    fn days_begin_where_the_caller_says() {
        let points = [point(1, at("2026-11-21T01:00:00Z")), point(2, at("2026-11-20T23:00:00Z"))];
        let policy = RetentionPolicy { daily: 2, ..RetentionPolicy::default() };
        let tokyo = |at: Timestamp| jiff::tz::Offset::constant(9).to_datetime(at);
        let decisions = decide(&policy, &points, at("2026-11-21T02:00:00Z"), &tokyo).expect("decides");
        assert!(!decisions[1].keeps(), "both are on the 21st in Tokyo: {decisions:?}");
        assert_eq!(kept(&policy, &points, "2026-11-21T02:00:00Z").len(), 2, "two days in UTC");
    }

    #[test]
    fn within_keeps_everything_young_and_what_the_clock_calls_future() {
        let points = series("2026-11-21T10:00:00Z", 24, 10);
        let policy = RetentionPolicy { within: Some("3d".to_owned()), ..RetentionPolicy::default() };
        assert_eq!(kept(&policy, &points, "2026-11-21T10:00:00Z").len(), 4);
        assert_eq!(kept(&policy, &points, "2026-11-01T10:00:00Z").len(), 10, "the clock jumped back");
    }

    #[test]
    fn without_rules_nothing_is_forgotten() {
        let points = series("2026-11-21T10:00:00Z", 24, 5);
        assert_eq!(kept(&RetentionPolicy::default(), &points, "2030-01-01T00:00:00Z").len(), 5);
        let zone_only = RetentionPolicy { time_zone: Some("Europe/Zurich".to_owned()), ..RetentionPolicy::default() };
        assert_eq!(kept(&zone_only, &points, "2030-01-01T00:00:00Z").len(), 5);
    }

    #[test]
    fn a_clean_point_survives_newer_ones_with_losses() {
        let mut points = series("2026-11-21T10:00:00Z", 24, 5);
        for point in &mut points[..3] {
            point.verdict = Verdict::RestorableWithNamedLoss;
        }
        let policy = RetentionPolicy { last: 1, ..RetentionPolicy::default() };
        let kept = kept(&policy, &points, "2026-11-21T10:00:00Z");
        assert_eq!(kept[1], ("2026-11-18T10:00:00Z".to_owned(), "newest restorable point".to_owned()));
    }

    #[test]
    fn partial_points_count_for_nothing() {
        let mut points = series("2026-11-21T10:00:00Z", 24, 4);
        points[0].whole = false;
        points[2].whole = false;
        let policy = RetentionPolicy { last: 2, ..RetentionPolicy::default() };
        let kept = kept(&policy, &points, "2026-11-21T10:00:00Z");
        let whys: Vec<_> = kept.iter().map(|(_, why)| why.as_str()).collect();
        assert_eq!(
            whys,
            ["newer than every point of the whole platform", "last 1 of 2, newest restorable point", "last 2 of 2",]
        );
    }

    proptest! {
        #[test]
        fn the_newest_restorable_point_always_stays(
            points in prop::collection::vec((0_i64..40_000, any::<bool>(), any::<bool>()), 1..60),
            counts in prop::array::uniform6(0_u32..4),
            within in prop::option::of(0_u32..2_000),
        ) {
            let [last, hourly, daily, weekly, monthly, yearly] = counts;
            let within = within.map(|hours| format!("{hours}h"));
            let policy = RetentionPolicy { last, hourly, daily, weekly, monthly, yearly, within, time_zone: None };
            let now = at("2026-11-21T10:00:00Z");
            let candidates: Vec<_> = points.iter().enumerate().map(|(number, (hours, clean, whole))| {
                let verdict = if *clean { Verdict::Restorable } else { Verdict::RestorableWithNamedLoss };
                let at = now - SignedDuration::from_secs(hours * HOUR_SECONDS);
                Candidate { verdict, whole: *whole, ..point(number as u64, at) }
            }).collect();
            let decisions = decide(&policy, &candidates, now, &utc).expect("decides");
            prop_assert_eq!(decisions.len(), candidates.len());
            let best = candidates.iter().filter(|c| c.whole && c.verdict == Verdict::Restorable).map(|c| c.at).max();
            if let Some(best) = best {
                prop_assert!(decisions.iter().any(|d| d.at == best && d.keeps()));
            }
            if let Some(newest) = candidates.iter().filter(|c| c.whole).map(|c| c.at).max() {
                prop_assert!(decisions.iter().any(|d| d.at == newest && d.keeps()));
            }
            let daily_kept = decisions.iter().filter(|d| d.reasons.iter().any(|r| r.starts_with("daily"))).count();
            prop_assert!(daily_kept <= daily as usize);
        }
    }
}
