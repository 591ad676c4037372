//! Times as restic writes them: RFC 3339 with nanoseconds.
//!
//! A tree of a million entries holds three million of them, so they are written and read by hand.

use stillpoint_core::tree::FileTime;

const DAY_SECONDS: i64 = 86_400;
/// 0000-01-01 and the last second of 9999; restic's JSON knows no years outside.
const SECONDS_MIN: i64 = -62_167_219_200;
const SECONDS_MAX: i64 = 253_402_300_799;

/// Appends `time` in UTC, as Go does: trailing zeros of the fraction are left out. Years outside
/// 0 to 9999 become the nearest that can be written.
pub fn write(time: FileTime, out: &mut Vec<u8>) {
    let seconds = time.seconds.clamp(SECONDS_MIN, SECONDS_MAX);
    let (year, month, day) = civil(seconds.div_euclid(DAY_SECONDS));
    let second = seconds.rem_euclid(DAY_SECONDS);
    let mut text = *b"0000-00-00T00:00:00";
    put(&mut text[..4], year);
    put(&mut text[5..7], month);
    put(&mut text[8..10], day);
    put(&mut text[11..13], second / 3600);
    put(&mut text[14..16], second / 60 % 60);
    put(&mut text[17..], second % 60);
    out.extend_from_slice(&text);
    if time.nanos > 0 {
        let mut fraction = *b".000000000";
        put(&mut fraction[1..], i64::from(time.nanos.min(999_999_999)));
        let used = fraction.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1);
        out.extend_from_slice(&fraction[..used]);
    }
    out.push(b'Z');
}

fn put(digits: &mut [u8], mut number: i64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Reads RFC 3339 in any zone; `None` if it is none.
pub fn read(text: &str) -> Option<FileTime> {
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes[4] != b'-' || bytes[7] != b'-' || bytes[13] != b':' || bytes[16] != b':' {
        return None;
    }
    let get = |from: usize, to: usize| digits(&bytes[from..to]);
    let (year, month, day) = (get(0, 4)?, get(5, 7)?, get(8, 10)?);
    let (hour, minute, second) = (get(11, 13)?, get(14, 16)?, get(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanos, zone) = fraction(&bytes[19..])?;
    let seconds = days(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second - offset(zone)?;
    Some(FileTime { seconds, nanos })
}

fn digits(text: &[u8]) -> Option<i64> {
    text.iter().try_fold(0, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + i64::from(digit - b'0')))
}

fn fraction(text: &[u8]) -> Option<(u32, &[u8])> {
    let Some(rest) = text.strip_prefix(b".") else {
        return Some((0, text));
    };
    let length = rest.iter().take_while(|digit| digit.is_ascii_digit()).count();
    if length == 0 {
        return None;
    }
    let mut nanos = digits(&rest[..length.min(9)])?;
    for _ in length..9 {
        nanos *= 10;
    }
    Some((u32::try_from(nanos).ok()?, &rest[length..]))
}

/// Seconds east of UTC.
fn offset(zone: &[u8]) -> Option<i64> {
    match zone {
        b"Z" | b"z" => Some(0),
        [sign @ (b'+' | b'-'), hour @ .., b':', m1, m2] if hour.len() == 2 => {
            let seconds = digits(hour)? * 3600 + digits(&[*m1, *m2])? * 60;
            Some(if *sign == b'-' { -seconds } else { seconds })
        }
        _ => None,
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
///
/// Counts in eras of 400 years that begin on March 1, so that the leap day is the last of a year.
fn civil(day: i64) -> (i64, i64, i64) {
    let day = day + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year + era * 400 + i64::from(month <= 2), month, of_year - (153 * from_march + 2) / 5 + 1)
}

/// The inverse of [`civil`].
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * from_march + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(time: FileTime) -> String {
        let mut out = Vec::new();
        write(time, &mut out);
        String::from_utf8(out).unwrap()
    }

    proptest! {
        #[test]
        fn times_survive_and_agree_with_jiff(seconds in SECONDS_MIN..=SECONDS_MAX, nanos in 0..1_000_000_000_u32) {
            let time = FileTime { seconds, nanos };
            prop_assert_eq!(read(&text(time)), Some(time));
            if (-62_000_000_000..250_000_000_000).contains(&seconds) {
                let stamp: jiff::Timestamp = text(time).parse().unwrap();
                let floor = stamp.as_nanosecond().div_euclid(1_000_000_000);
                prop_assert_eq!(i64::try_from(floor).unwrap(), seconds);
            }
        }

        #[test]
        fn other_text_never_panics(text: String) {
            let _ = read(&text);
        }
    }

    #[test]
    fn zones_and_fractions_of_restic_are_read() {
        let time = |seconds, nanos| Some(FileTime { seconds, nanos });
        assert_eq!(read("1970-01-01T01:00:00.5+01:00"), time(0, 500_000_000));
        assert_eq!(read("1969-12-31T23:59:59.000000001Z"), time(-1, 1));
        assert_eq!(read("2026-11-21T10:00:00-00:30"), time(1_795_257_000, 0));
        assert_eq!(text(FileTime { seconds: 0, nanos: 500_000_000 }), "1970-01-01T00:00:00.5Z");
        assert_eq!(text(FileTime { seconds: i64::MAX, nanos: 0 }), "9999-12-31T23:59:59Z");
    }
}
