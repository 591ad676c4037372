//! The oracle: knows which writes were acknowledged when, and judges what a restore brought back.
//!
//! Every write acknowledged before the cut must be there, none begun after it may be; writes in
//! flight may go either way, but whole. It knows keys and values only, so that one oracle judges
//! several stores of different kinds, and what was written to them in which order.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::conformance::Content;

/// Records writes as they happen. Shared between writers by reference.
#[derive(Debug, Default)]
pub struct Oracle {
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    clock: u64,
    writes: Vec<Write>,
}

#[derive(Debug, Clone)]
struct Write {
    writer: String,
    store: String,
    key: String,
    /// `None` for a deletion.
    value: Option<Vec<u8>>,
    begun: u64,
    acknowledged: Option<u64>,
}

/// A write that has begun; hand it back to [`Oracle::acknowledged`] once the store answered.
#[derive(Debug)]
#[must_use]
pub struct Ticket(usize);

/// A moment of the oracle's own clock, which ticks at each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// When a cut happened: between these moments it fixed the view.
#[derive(Debug, Clone, Copy)]
pub struct CutInterval {
    /// Taken before the cut was called.
    pub begin: Moment,
    /// Taken after it returned.
    pub end: Moment,
}

/// One obligation that a restored store does not meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The key concerned.
    pub key: String,
    /// What is wrong with it, for people.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` {}", self.key, self.what)
    }
}

impl Oracle {
    /// An oracle that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The moment now.
    pub fn now(&self) -> Moment {
        let mut log = self.log.lock().expect("no holder panics");
        log.clock += 1;
        Moment(log.clock)
    }

    /// A writer is about to write `value` (`None`: to delete) under `key` of `store`. Call before
    /// the store is asked. Writes of one key must not overlap; writes of one writer neither.
    pub fn begun(&self, writer: &str, store: &str, key: &str, value: Option<&[u8]>) -> Ticket {
        let mut log = self.log.lock().expect("no holder panics");
        log.clock += 1;
        let begun = log.clock;
        log.writes.push(Write {
            writer: writer.to_owned(),
            store: store.to_owned(),
            key: key.to_owned(),
            value: value.map(<[u8]>::to_vec),
            begun,
            acknowledged: None,
        });
        Ticket(log.writes.len() - 1)
    }

    /// The store acknowledged the write.
    pub fn acknowledged(&self, ticket: Ticket) {
        let mut log = self.log.lock().expect("no holder panics");
        log.clock += 1;
        log.writes[ticket.0].acknowledged = Some(log.clock);
    }

    /// How many writes were acknowledged so far.
    pub fn acknowledged_count(&self) -> usize {
        self.log.lock().expect("no holder panics").writes.iter().filter(|write| write.acknowledged.is_some()).count()
    }

    /// What is wrong with the restored content of one store. Keys that no writer touched are not
    /// judged. Empty means that every obligation holds.
    pub fn violations(&self, store: &str, cut: CutInterval, restored: &Content) -> Vec<Violation> {
        let log = self.log.lock().expect("no holder panics");
        let mut by_key: BTreeMap<&str, Vec<&Write>> = BTreeMap::new();
        for write in log.writes.iter().filter(|write| write.store == store) {
            by_key.entry(&write.key).or_default().push(write);
        }
        by_key.iter().filter_map(|(key, writes)| judge(key, writes, cut, restored.get(*key))).collect()
    }

    /// What is wrong between stores at level strict: the restored writes of each writer, over all
    /// stores, must be the first ones it made. `restored` maps stores to their content; every
    /// value that a writer writes must be unlike its other values of the same key.
    pub fn order_violations(&self, restored: &BTreeMap<String, Content>) -> Vec<String> {
        let log = self.log.lock().expect("no holder panics");
        let mut first_missing: BTreeMap<&str, &Write> = BTreeMap::new();
        let mut violations = Vec::new();
        for (number, write) in log.writes.iter().enumerate() {
            let same_key = |other: &&Write| other.store == write.store && other.key == write.key;
            if log.writes[number + 1..].iter().any(|other| same_key(&other)) {
                continue; // Overwritten later: its absence says nothing.
            }
            let found = restored.get(&write.store).and_then(|content| content.get(&write.key));
            if found != write.value.as_ref() {
                first_missing.entry(&write.writer).or_insert(write);
            } else if let Some(missing) = first_missing.get(write.writer.as_str()) {
                violations.push(format!(
                    "{}/{} of writer {} is there, its earlier write {}/{} is not",
                    write.store, write.key, write.writer, missing.store, missing.key
                ));
            }
        }
        violations
    }
}

/// Judges one key: allowed is what the last acknowledged write before the cut left, and what any
/// write that was in flight during the cut would have left.
fn judge(key: &str, writes: &[&Write], cut: CutInterval, found: Option<&Vec<u8>>) -> Option<Violation> {
    let settled = writes.iter().rposition(|write| write.acknowledged.is_some_and(|at| at < cut.begin.0));
    let in_flight = &writes[settled.map_or(0, |index| index + 1)..];
    let base = settled.and_then(|index| writes[index].value.as_ref());
    let mut allowed =
        std::iter::once(base).chain(in_flight.iter().filter(|w| w.begun < cut.end.0).map(|w| w.value.as_ref()));
    if allowed.any(|value| value == found) {
        return None;
    }
    let late = in_flight.iter().any(|write| write.begun > cut.end.0 && write.value.as_ref() == found);
    let what = match found {
        None => "was acknowledged before the cut and is missing".to_owned(),
        Some(_) if late => "was written after the cut and is there".to_owned(),
        Some(bytes) => format!("holds {} bytes that no write in question made", bytes.len()),
    };
    Some(Violation { key: key.to_owned(), what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(oracle: &Oracle, store: &str, key: &str, value: &[u8]) {
        let ticket = oracle.begun("w", store, key, Some(value));
        oracle.acknowledged(ticket);
    }

    #[test]
    fn acknowledged_must_be_there_and_later_must_not() {
        let oracle = Oracle::new();
        write(&oracle, "s", "before", b"1");
        let begin = oracle.now();
        let _in_flight = oracle.begun("w", "s", "during", Some(b"2"));
        let end = oracle.now();
        write(&oracle, "s", "after", b"3");
        let cut = CutInterval { begin, end };
        let content = |keys: &[(&str, &str)]| -> Content {
            keys.iter().map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec())).collect()
        };
        assert!(oracle.violations("s", cut, &content(&[("before", "1")])).is_empty());
        assert!(oracle.violations("s", cut, &content(&[("before", "1"), ("during", "2")])).is_empty());
        assert_eq!(oracle.violations("s", cut, &content(&[])).len(), 1, "lost");
        assert_eq!(oracle.violations("s", cut, &content(&[("before", "1"), ("after", "3")])).len(), 1, "leaked");
        assert_eq!(oracle.violations("s", cut, &content(&[("before", "1"), ("during", "")])).len(), 1, "torn");
    }

    #[test]
    fn a_later_write_without_an_earlier_one_breaks_the_order() {
        let oracle = Oracle::new();
        write(&oracle, "rows", "1", b"a");
        write(&oracle, "files", "1", b"b");
        let one = |key: &str, value: &[u8]| Content::from([(key.to_owned(), value.to_vec())]);
        let whole = BTreeMap::from([("rows".to_owned(), one("1", b"a")), ("files".to_owned(), one("1", b"b"))]);
        assert!(oracle.order_violations(&whole).is_empty());
        let first_only = BTreeMap::from([("rows".to_owned(), one("1", b"a"))]);
        assert!(oracle.order_violations(&first_only).is_empty());
        let second_only = BTreeMap::from([("files".to_owned(), one("1", b"b"))]);
        assert_eq!(oracle.order_violations(&second_only).len(), 1);
    }
}
