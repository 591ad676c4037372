//! The record of what writers did: one line when a version is begun, one when all five stores have
//! acknowledged it, one for each pause. It lies beside the stores, never in one.
//!
//! Times are microseconds of this machine's wall clock since 1970. They are compared with times that
//! were taken on the same machine only.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::content::Version;
use crate::{Attempted, Result};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// The first store is about to be asked.
    Begun(Version),
    /// All stores have acknowledged.
    Acknowledged(Version),
    /// The parts of this bundle are there; the request that makes them an object is about to be sent.
    BundleBegun(u64),
    /// The bundle is the object.
    BundleAcknowledged(u64),
    /// Someone asked for a pause.
    PauseAsked,
    /// Writers are held back and nothing is in flight.
    Paused,
    /// Writers go on, because of this: `hook`, `lease` or `refused`.
    Resumed(String),
}

/// Appends to the record. A line that was written survives the death of this process.
#[derive(Debug)]
pub struct Recorder(Mutex<File>);

impl Recorder {
    /// Opens the record, and makes it if need be.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self(Mutex::new(file.attempted(&format!("open the record {}", path.display()))?)))
    }

    /// Writes one line.
    pub fn note(&self, happening: &Happening) -> Result<()> {
        let mut file = self.0.lock().map_err(|_| "the record's lock is poisoned".to_owned())?;
        let at = now_micros();
        let line = match happening {
            Happening::Begun(version) => format!("begun {} {} {at}\n", version.writer, version.number),
            Happening::Acknowledged(version) => format!("acknowledged {} {} {at}\n", version.writer, version.number),
            Happening::BundleBegun(number) => format!("bundle-begun {number} {at}\n"),
            Happening::BundleAcknowledged(number) => format!("bundle-acknowledged {number} {at}\n"),
            Happening::PauseAsked => format!("asked {at}\n"),
            Happening::Paused => format!("paused {at}\n"),
            Happening::Resumed(by) => format!("resumed {by} {at}\n"),
        };
        file.write_all(line.as_bytes()).attempted("write the record")
    }
}

/// Microseconds since 1970.
pub fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The record, read.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Per version: when it was first begun, and when it was acknowledged.
    pub versions: BTreeMap<Version, (u64, Option<u64>)>,
    /// Per bundle: when its end was begun, and when it was acknowledged.
    pub bundles: BTreeMap<u64, (u64, Option<u64>)>,
    /// Everything in order, with its time.
    pub happenings: Vec<(Happening, u64)>,
}

impl Record {
    /// Reads the record; none is an empty one. A last line without its end is left out.
    pub fn load(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("cannot read the record {}: {error}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut record = Self::default();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let (happening, at) = parse_line(line).ok_or_else(|| format!("the record has the line `{line}`"))?;
            match &happening {
                // A version that is tried again was begun when it was begun first.
                Happening::Begun(version) => _ = record.versions.entry(*version).or_insert((at, None)),
                Happening::Acknowledged(version) => {
                    record.versions.entry(*version).or_insert((at, None)).1.get_or_insert(at);
                }
                Happening::BundleBegun(number) => _ = record.bundles.entry(*number).or_insert((at, None)),
                Happening::BundleAcknowledged(number) => {
                    record.bundles.entry(*number).or_insert((at, None)).1.get_or_insert(at);
                }
                _ => {}
            }
            record.happenings.push((happening, at));
        }
        Ok(record)
    }

    /// The versions that a writer has begun: the last one, and whether it is acknowledged.
    pub fn last_of(&self, writer: u32) -> Option<(Version, bool)> {
        let range = Version { writer, number: 0 }..=Version { writer, number: u64::MAX };
        self.versions.range(range).next_back().map(|(version, (_, done))| (*version, done.is_some()))
    }

    /// The pauses: when asked for, when all was quiet, when writers went on and by whom. One that
    /// still lasts has no end.
    pub fn pauses(&self) -> Vec<Pause> {
        let mut pauses: Vec<Pause> = Vec::new();
        for (happening, at) in &self.happenings {
            let open = pauses.last_mut().filter(|pause| pause.ended.is_none());
            match (happening, open) {
                (Happening::PauseAsked, None) => pauses.push(Pause { asked: *at, quiet: None, ended: None }),
                (Happening::Paused, Some(pause)) => _ = pause.quiet.get_or_insert(*at),
                (Happening::Resumed(by), Some(pause)) => pause.ended = Some((*at, by.clone())),
                _ => {}
            }
        }
        pauses
    }
}

/// One pause, as the application saw it. Times in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// When it was asked for; new versions are held back from here on.
    pub asked: u64,
    /// When nothing was in flight any more.
    pub quiet: Option<u64>,
    /// When writers went on, and by whom.
    pub ended: Option<(u64, String)>,
}

fn parse_line(line: &str) -> Option<(Happening, u64)> {
    let words: Vec<&str> = line.split(' ').collect();
    let at = words.last()?.parse().ok()?;
    let version = || Some(Version { writer: words.get(1)?.parse().ok()?, number: words.get(2)?.parse().ok()? });
    let number = || words.get(1)?.parse().ok();
    let happening = match *words.first()? {
        "begun" => Happening::Begun(version()?),
        "acknowledged" => Happening::Acknowledged(version()?),
        "bundle-begun" => Happening::BundleBegun(number()?),
        "bundle-acknowledged" => Happening::BundleAcknowledged(number()?),
        "asked" => Happening::PauseAsked,
        "paused" => Happening::Paused,
        "resumed" => Happening::Resumed((*words.get(1)?).to_owned()),
        _ => return None,
    };
    Some((happening, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("record");
        let version = Version { writer: 3, number: 1 };
        let recorder = Recorder::open(&path).expect("opens");
        for happening in [
            Happening::Begun(version),
            Happening::PauseAsked,
            Happening::Acknowledged(version),
            Happening::Paused,
            Happening::Resumed("lease".to_owned()),
            Happening::Begun(Version { number: 2, ..version }),
            Happening::BundleBegun(1),
            Happening::BundleAcknowledged(1),
            Happening::BundleBegun(2),
        ] {
            recorder.note(&happening).expect("writes");
        }
        let record = Record::load(&path).expect("reads");
        assert_eq!(record.last_of(3), Some((Version { number: 2, ..version }, false)));
        assert!(record.versions[&version].1.is_some());
        assert_eq!(record.bundles.values().map(|(_, done)| done.is_some()).collect::<Vec<_>>(), [true, false]);
        let pauses = record.pauses();
        assert_eq!(pauses.len(), 1);
        assert_eq!(pauses[0].ended.as_ref().map(|(_, by)| by.as_str()), Some("lease"));
        assert_eq!(Record::load(&folder.path().join("none")).expect("none").versions.len(), 0);
    }

    #[test]
    fn a_torn_last_line_is_left_out() {
        let record = Record::parse("begun 0 1 10\nbegun 0 2 2").expect("reads");
        assert_eq!(record.versions.len(), 1);
        assert!(Record::parse("begun 0 x 10\n").is_err());
    }
}
