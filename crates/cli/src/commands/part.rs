//! How much of the data is re-read: `--data` and `--sample 5%`, shared by `check` and `verify`.

use std::time::{SystemTime, UNIX_EPOCH};

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_repo::Data;

/// A random part of `percent`, another one at every call.
pub fn sample(percent: f64) -> Data {
    // Any seed does, as long as tomorrow's differs; the clock is enough.
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    Data::Sample { percent, seed }
}

/// Reads `5%` or `5`.
pub fn percent(text: &str) -> Result<f64> {
    let number = text.trim().trim_end_matches('%').trim_end().parse::<f64>().ok();
    number.filter(|number| *number > 0.0 && *number <= 100.0).ok_or_else(|| {
        Error::new(Kind::Config, format!("`{text}` is not a part between 0 and 100 %")).hint("for example --sample 5%")
    })
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn parts_are_percent() {
        assert_eq!(
            (percent("5%").ok(), percent("0.5").ok(), percent("100 %").ok()),
            (Some(5.0), Some(0.5), Some(100.0))
        );
        for bad in ["", "%", "0", "101", "-1", "five", "NaN"] {
            assert!(percent(bad).is_err(), "{bad}");
        }
    }
}
