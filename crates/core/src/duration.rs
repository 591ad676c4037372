//! Spans of time as people write them: `800ms`, `5s`, `36h`, `7d`.

use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// Units and their milliseconds, longest name first so that `ms` is not read as `m`.
const UNITS: [(&str, u64); 7] =
    [("ms", 1), ("s", 1_000), ("min", 60_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 604_800_000)];

/// Parses a whole number and a unit, with or without a space between: ms, s, m or min, h, d, w.
///
/// A day has 24 hours here. The error says what is allowed.
pub fn parse(text: &str) -> Result<Duration> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = (&trimmed[..digits], trimmed[digits..].trim_start());
    let found = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, millis)| *millis);
    let millis = match (number.parse::<u64>(), found) {
        (Ok(number), Some(millis)) => number.checked_mul(millis),
        _ => None,
    };
    millis.map(Duration::from_millis).ok_or_else(|| {
        Error::new(Kind::Config, format!("`{text}` is not a span of time"))
            .hint("a whole number and a unit: 800ms, 5s, 10min, 36h, 7d, 4w")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_number_and_a_unit() {
        for (text, millis) in
            [("800ms", 800), ("5s", 5_000), ("5 s", 5_000), ("2min", 120_000), ("2m", 120_000), ("36h", 129_600_000)]
        {
            assert_eq!(parse(text).expect(text), Duration::from_millis(millis), "{text}");
        }
        assert_eq!(parse("1w").expect("valid"), parse("7d").expect("valid"));
        for text in ["", "5", "s", "-5s", "5 days", "1.5h", "99999999999999999999s", "18446744073709551615w", "５s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
