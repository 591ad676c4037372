//! A clock that is wrong: shifts the times that an S3 service tells, in headers and listings, as they
//! pass.
//!
//! Knows the places where such a service writes times, and nothing else of HTTP: a shifted time is as
//! long as the one it replaces. Content that looks like such a place is shifted too.

use jiff::SignedDuration;
use jiff::civil::DateTime;

/// What stands before a time, and how the time is written.
const PLACES: [(&[u8], Form); 4] = [
    (b"Date: ", Form::Http),
    (b"Last-Modified: ", Form::Http),
    (b"<LastModified>", Form::Iso),
    (b"<Initiated>", Form::Iso),
];

#[derive(Debug, Clone, Copy)]
enum Form {
    /// `Sat, 21 Nov 2026 10:00:03 GMT`
    Http,
    /// `2026-11-21T10:00:03`, whatever follows
    Iso,
}

const HTTP: &str = "%a, %d %b %Y %H:%M:%S GMT";
const ISO: &str = "%Y-%m-%dT%H:%M:%S";

impl Form {
    fn length(self) -> usize {
        match self {
            Self::Http => 29,
            Self::Iso => 19,
        }
    }

    fn shifted(self, text: &[u8], seconds: i64) -> Option<Vec<u8>> {
        let format = match self {
            Self::Http => HTTP,
            Self::Iso => ISO,
        };
        let shown = DateTime::strptime(format, std::str::from_utf8(text).ok()?).ok()?;
        let shifted = shown.checked_add(SignedDuration::from_secs(seconds)).ok()?;
        Some(shifted.strftime(format).to_string().into_bytes())
    }
}

/// One direction of one connection.
#[derive(Debug, Default)]
pub(crate) struct Skew {
    /// The end of what came, as long as it may be the begin of a place.
    held: Vec<u8>,
}

impl Skew {
    /// Takes what came, and returns what may go on.
    pub(crate) fn push(&mut self, bytes: &[u8], seconds: i64) -> Vec<u8> {
        let mut left = std::mem::take(&mut self.held);
        left.extend_from_slice(bytes);
        let mut out = Vec::with_capacity(left.len());
        let mut at = 0;
        while at < left.len() {
            let rest = &left[at..];
            let Some((mark, form)) = PLACES.iter().find(|(mark, _)| rest.starts_with(mark) || mark.starts_with(rest))
            else {
                out.push(left[at]);
                at += 1;
                continue;
            };
            let whole = mark.len() + form.length();
            if rest.len() < whole {
                self.held = rest.to_vec();
                break;
            }
            let time = &rest[mark.len()..whole];
            out.extend_from_slice(mark);
            out.extend(form.shifted(time, seconds).unwrap_or_else(|| time.to_vec()));
            at += whole;
        }
        out
    }

    /// What is held back, when nothing comes any more.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shifted_wherever_the_stream_is_cut() {
        let text = "HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 23:59:30 GMT\r\nLast-Modified: never, as it were, not a date\r\n\
                    \r\n<LastModified>2026-11-21T10:00:03.412Z</LastModified><Initiated>2026-12-31T23:59:59.999Z<Dat";
        let expected = text
            .replace("Sat, 21 Nov 2026 23:59:30", "Sun, 22 Nov 2026 00:00:30")
            .replace("2026-11-21T10:00:03", "2026-11-21T10:01:03")
            .replace("2026-12-31T23:59:59", "2027-01-01T00:00:59");
        for length in [1, 2, 7, 30, 1000] {
            let mut skew = Skew::default();
            let mut out: Vec<u8> = text.as_bytes().chunks(length).flat_map(|chunk| skew.push(chunk, 60)).collect();
            out.extend(skew.rest());
            assert_eq!(String::from_utf8(out).expect("text"), expected, "in pieces of {length}");
        }
    }
}
