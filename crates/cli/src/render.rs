//! How facts look on a screen: units, tables, the error screen. No colour carries meaning alone.
//!
//! Pure: everything here makes text from values. Who prints is `main`.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use stillpoint_core::error::Error;
use stillpoint_engine::config::Mistakes;

use crate::exit::{self, Exit};
use crate::hints::{self, Leaves};

/// Column at which the exit code stands in the last line of an error.
const EXIT_COLUMN: usize = 72;

/// `12.4 GiB`; exact below 1 KiB.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `41,022`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// `1 file`, `2 files`.
pub fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// `21 ms`, `0.8 s`, `2 min 24 s`, `3 h 5 min`.
pub fn duration(time: Duration) -> String {
    let micros = time.as_micros();
    let seconds = time.as_secs();
    match micros {
        0 => "0 ms".to_owned(),
        1..1_000 => format!("{micros} µs"),
        1_000..100_000 => format!("{} ms", (micros + 500) / 1_000),
        100_000..60_000_000 => format!("{:.1} s", time.as_secs_f64()),
        _ if seconds < 3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ if seconds < 172_800 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// `27 min ago`, as seen from `now`; times in the future are shown as `just now`.
pub fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = u64::try_from(now.as_second() - then.as_second()).unwrap_or(0);
    match seconds {
        0..2 => "just now".to_owned(),
        2..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// `2026-11-21 10:00:03.412 UTC`.
pub fn time(then: Timestamp) -> String {
    then.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S%.3f UTC").to_string()
}

/// `2026-11-21 10:00:03 UTC`, for lists.
pub fn time_short(then: Timestamp) -> String {
    then.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// A table without lines, indented by two; the columns in `right` are aligned right.
pub fn table(header: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&title| title.to_owned()).collect();
    let lines = || std::iter::once(&header).filter(|header| !header.is_empty()).chain(rows);
    let columns = lines().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in lines() {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = " ".repeat(widths[column] - cell.chars().count());
            let (before, after) = if right.contains(&column) { (gap, String::new()) } else { (String::new(), gap) };
            line.push_str(&format!("  {before}{cell}{after}"));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The error screen: what failed, each cause on its own line, the hint, the state things are in.
pub fn error(failure: &Error, leaves: Leaves) -> (String, Exit) {
    let exit = exit::of(failure);
    let mut text = String::new();
    let mistakes = std::error::Error::source(failure).and_then(|source| source.downcast_ref::<Mistakes>());
    if let Some(mistakes) = mistakes {
        for mistake in &mistakes.list {
            let (file, place) = (&mistakes.file, mistake.place);
            text.push_str(&format!("error: {file}:{}:{}: {}\n", place.line, place.column, mistake.message));
            text.push_str(&format!("  hint: {}\n", mistake.hint));
        }
    } else {
        text.push_str(&format!("error: {failure}\n"));
        for cause in causes(failure) {
            text.push_str(&format!("  caused by: {cause}\n"));
        }
        if let Some(hint) = hints::of(failure) {
            text.push_str(&format!("  hint: {hint}\n"));
        }
    }
    text.push_str(&last_line(hints::state(leaves, failure), exit));
    (text, exit)
}

/// A closing line with the exit code at its fixed column.
pub fn last_line(state: &str, exit: Exit) -> String {
    let gap = EXIT_COLUMN.saturating_sub(state.chars().count()).max(2);
    format!("{state}{:gap$}exit {}\n", "", exit.code)
}

/// The messages of the causes, outermost first, without repeats.
pub fn causes(failure: &Error) -> Vec<String> {
    let mut shown = vec![failure.to_string()];
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        let message = error.to_string();
        if shown.last().is_none_or(|last| !last.contains(&message)) {
            shown.push(message);
        }
        cause = error.source();
    }
    shown.remove(0);
    shown
}

/// The error as `--json` prints it.
pub fn error_json(failure: &Error, leaves: Leaves) -> serde_json::Value {
    let mistakes = std::error::Error::source(failure).and_then(|source| source.downcast_ref::<Mistakes>());
    let mistakes: Vec<_> = mistakes
        .iter()
        .flat_map(|mistakes| &mistakes.list)
        .map(|mistake| {
            serde_json::json!({
                "line": mistake.place.line, "column": mistake.place.column,
                "message": mistake.message, "hint": mistake.hint,
            })
        })
        .collect();
    let mut value = serde_json::json!({
        "error": {
            "kind": failure.kind(),
            "message": failure.to_string(),
            "store": failure.store_name(),
            "operation": failure.operation_name(),
            "causes": causes(failure),
            "hint": hints::of(failure),
            "state": hints::state(leaves, failure),
        },
        "exit": exit::of(failure).code,
    });
    if !mistakes.is_empty() {
        value["error"]["mistakes"] = mistakes.into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use stillpoint_core::error::Kind;

    #[test]
    fn numbers_carry_units() {
        let shown = [0, 1023, 1024, 1_048_575, 1_048_576, 13_314_398_618, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "12.4 GiB", "16.0 EiB"]);
        assert_eq!([0, 999, 1_000, 41_022, 1_234_567].map(count), ["0", "999", "1,000", "41,022", "1,234,567"]);
        let micros = [0, 300, 21_000, 800_000, 144_000_000, 11_100_000_000].map(Duration::from_micros).map(duration);
        assert_eq!(micros, ["0 ms", "300 µs", "21 ms", "0.8 s", "2 min 24 s", "3 h 5 min"]);
    }

    #[test]
    fn the_error_screen_walks_the_chain_once() {
        let failure = Error::new(Kind::PermissionDenied, "role \"backup\" may not read schema \"billing\"")
            .store("meta")
            .operation("prepare")
            .hint("GRANT pg_read_all_data TO backup;")
            .source(std::io::Error::other("permission denied for schema billing"));
        let (text, exit) = error(&failure, Leaves::NoPoint);
        insta::assert_snapshot!(text, @r#"
        error: store `meta`: role "backup" may not read schema "billing" (prepare)
          caused by: permission denied for schema billing
          hint: GRANT pg_read_all_data TO backup;
        No point was made.                                                      exit 4
        "#);
        assert_eq!(exit.code, 4);
    }
}
