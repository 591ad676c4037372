//! The service's clock. It alone dates a cut: ours may be minutes off, and objects bear its times.
//!
//! The header `Date` has a resolution of a second. Asked again and again until the second changes,
//! it tells where the service's clock stands to within the time that an answer takes and that
//! between two questions. Questions do not wait for answers, so that far services are told as well.

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::FileTime;

use super::request::Client;

const SECOND_NANOS: i128 = 1_000_000_000;
/// Time between two questions: how exact the answer becomes, beside the time that it takes.
const STEP: Duration = Duration::from_millis(5);
/// Questions that are under way at a time.
const AHEAD_MAX: usize = 8;
/// Clocks drift apart by less than one part in so many.
const DRIFT: i128 = 10_000;
/// A clock that is known worse is read again, where there is time for that.
const DOUBT_MAX: Duration = Duration::from_millis(20);

/// Where the service's clock stands: what it showed at `origin`, at least and at most, in
/// nanoseconds since 1970.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Clock {
    origin: Instant,
    low: i128,
    high: i128,
}

impl Clock {
    /// Asks until the second changes: about half a second, at most two.
    pub async fn read(client: &Client, prefix: &str) -> Result<Self> {
        let mut clock: Option<Self> = None;
        let begin = Instant::now();
        let mut under_way = FuturesUnordered::new();
        let mut next = tokio::time::Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(next), if under_way.len() < AHEAD_MAX => {
                    under_way.push(look(client, prefix));
                    next = tokio::time::Instant::now() + STEP;
                }
                Some(looked) = under_way.next() => {
                    let (shown, asked, answered) = looked?;
                    let shown = Self::seen(shown.as_second(), asked, answered);
                    let known = clock.map_or(shown, |clock| clock.narrowed(&shown));
                    clock = Some(known);
                    if known.doubt() <= (answered - asked) + STEP * 2 || begin.elapsed() > Duration::from_secs(2) {
                        return Ok(known);
                    }
                }
            }
        }
    }

    fn seen(second: i64, asked: Instant, answered: Instant) -> Self {
        let shown = i128::from(second) * SECOND_NANOS;
        // It was `second` at some moment between the question and the answer.
        let took = (answered - asked).as_nanos() as i128;
        Self { origin: asked, low: shown - took, high: shown + SECOND_NANOS }
    }

    fn at(&self, moment: Instant) -> (i128, i128) {
        let passed = moment.saturating_duration_since(self.origin).as_nanos() as i128
            - self.origin.saturating_duration_since(moment).as_nanos() as i128;
        let drift = passed.abs() / DRIFT;
        (self.low + passed - drift, self.high + passed + drift)
    }

    fn narrowed(&self, other: &Self) -> Self {
        let (low, high) = self.at(other.origin);
        let both = Self { origin: other.origin, low: low.max(other.low), high: high.min(other.high) };
        // A clock that was set in between is believed from now on.
        if both.low < both.high { both } else { *other }
    }

    /// How far its time was unknown when it was read.
    fn doubt(&self) -> Duration {
        Duration::from_nanos(u64::try_from(self.high - self.low).unwrap_or(0))
    }

    /// Whether its time is known well enough to cut by.
    pub fn is_exact(&self) -> bool {
        let (low, high) = self.at(Instant::now());
        high - low <= DOUBT_MAX.as_nanos() as i128
    }

    /// Whether it can still be relied upon, as far as one more look shows.
    pub fn agrees(&self, second: i64, asked: Instant) -> bool {
        let (low, high) = self.at(asked);
        let (answered_low, answered_high) = self.at(Instant::now());
        let shown = i128::from(second) * SECOND_NANOS;
        low.min(answered_low) < shown + SECOND_NANOS && high.max(answered_high) >= shown
    }

    /// A time of the service that had surely come at this moment of ours, as early as can be told.
    pub fn reached(&self, moment: Instant) -> FileTime {
        file_time(self.at(moment).1)
    }

    /// How long to wait until everything that begins bears a later time than `at`, even if it is cut off to
    /// the millisecond.
    pub fn until_after(&self, at: FileTime) -> Duration {
        let (low, _) = self.at(Instant::now());
        let wanted = i128::from(at.seconds) * SECOND_NANOS + (i128::from(at.nanos) / 1_000_000 + 1) * 1_000_000;
        Duration::from_nanos(u64::try_from(wanted - low).unwrap_or(0))
    }
}

/// What the service's clock showed, and between which moments of ours.
async fn look(client: &Client, prefix: &str) -> Result<(jiff::Timestamp, Instant, Instant)> {
    let mut asked = Instant::now();
    // The smallest answer there is; not every clone knows it.
    let shown = match client.versioning().await {
        Err(error) if error.kind() == Kind::Unsupported => {
            asked = Instant::now();
            client.time(prefix).await?
        }
        other => other?.1,
    };
    let shown = shown.ok_or_else(|| Error::new(Kind::Unsupported, "the service does not tell the time"))?;
    Ok((shown, asked, Instant::now()))
}

fn file_time(nanos: i128) -> FileTime {
    FileTime {
        seconds: i64::try_from(nanos.div_euclid(SECOND_NANOS)).unwrap_or(i64::MAX),
        nanos: u32::try_from(nanos.rem_euclid(SECOND_NANOS)).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_across_the_end_of_a_second_tell_the_time_closely() {
        let begin = Instant::now();
        let ms = |count: u64| begin + Duration::from_millis(count);
        // The service's second 1000 ends between 50 and 52 ms from the begin.
        let clock = Clock::seen(1_000, ms(48), ms(50));
        let clock = clock.narrowed(&Clock::seen(1_001, ms(52), ms(54)));
        assert!(clock.doubt() <= Duration::from_millis(7), "{:?}", clock.doubt());
        let (low, high) = clock.at(ms(51));
        assert!(low <= 1_001 * SECOND_NANOS && high >= 1_001 * SECOND_NANOS);
        // The wait is for the doubt, less what has passed since the moment of the cut.
        let (cut, looked) = (ms(200), ms(204));
        let at = clock.reached(cut);
        let behind = clock.at(looked).0;
        let cut_at = i128::from(at.seconds) * SECOND_NANOS + i128::from(at.nanos);
        assert!(cut_at >= clock.at(cut).0 && cut_at - behind <= 4_000_000, "{} ns", cut_at - behind);
        // Set back by a minute: the newer look counts.
        let clock = clock.narrowed(&Clock::seen(941, ms(60), ms(61)));
        assert!(clock.at(ms(60)).1 <= 942 * SECOND_NANOS);
    }
}
