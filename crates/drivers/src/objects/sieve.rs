//! What a cut shows where nothing holds it: for each object there is, and for each that is missing, what it
//! was at the cut, by the names of changes where they were watched, by times where not.
//!
//! Reads lists, and asks no store.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use stillpoint_core::driver::Loss;
use stillpoint_core::error::Result;
use stillpoint_core::tree::{FileTime, NodeKind, Tree, TreePath};

use super::cut::{DOUBTS_MAX, View, next_of};
use super::spool::{Sorted, Sorter};
use super::wire::{self, Record};
use super::{Objects, Where, keys};
use crate::watch::{Change, Event};

/// Losses that are listed one by one; the rest is counted.
const LOSSES_MAX: usize = 1_000;

/// Changes before the cut, folded: what is known to exist or not.
#[derive(Debug, Default, Clone)]
pub(super) struct Early {
    known: HashMap<Vec<u8>, bool>,
    folders_gone: Vec<Vec<u8>>,
}

impl Early {
    /// Takes in what happened next.
    pub fn fold(&mut self, events: &[Event]) {
        for event in events {
            let key = event.path.as_os_str().as_bytes().to_vec();
            let gone = matches!(event.change, Change::Removed | Change::MovedOut);
            if !event.is_dir {
                self.known.insert(key, !gone);
            } else if gone {
                self.known.iter_mut().filter(|(known, _)| is_below(known, &key)).for_each(|(_, there)| *there = false);
                self.folders_gone.push(key);
            }
        }
    }

    /// Whether a key was there at the cut, given whether it was during `prepare`.
    fn existed(&self, key: &[u8], before: bool) -> bool {
        match self.known.get(key) {
            Some(&known) => known,
            None => before && !self.folders_gone.iter().any(|folder| is_below(key, folder)),
        }
    }
}

fn is_below(key: &[u8], folder: &[u8]) -> bool {
    folder.is_empty() || key.strip_prefix(folder).is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// Changes after the cut, by name.
#[derive(Debug, Default)]
pub(super) struct Late {
    first: HashMap<Vec<u8>, Change>,
    /// Names to which more happened than a change of mode, owner or times.
    content: HashSet<Vec<u8>>,
    folders_gone: Vec<Vec<u8>>,
}

impl Late {
    /// Folds what happened.
    pub fn of(events: &[Event]) -> Self {
        let mut late = Self::default();
        for event in events {
            let key = event.path.as_os_str().as_bytes().to_vec();
            if event.is_dir {
                if matches!(event.change, Change::Removed | Change::MovedOut) {
                    late.folders_gone.push(key);
                }
                continue;
            }
            if event.change != Change::Attributes {
                late.content.insert(key.clone());
            }
            late.first.entry(key).or_insert(event.change);
        }
        late
    }
}

/// Decides for each object, and for each that is missing, what it was at the cut.
pub(super) struct Sieve<'a> {
    at: FileTime,
    /// Until when, after the cut, the times of new objects do not tell that they came after it.
    doubt_until: FileTime,
    knowledge: Option<(&'a Early, Late)>,
    parent: Option<&'a dyn Tree>,
    kept: Sorter,
    losses: Vec<Loss>,
    losses_more: u64,
    left_out: u64,
    /// Objects of a bucket that were replaced since `prepare`, by their time before the cut.
    replaced: u64,
    replaced_named: Vec<String>,
    /// New objects of a bucket that are dated after the cut by so little that they are kept.
    soon: u64,
    soon_named: Vec<String>,
    /// Keys that were there before the cut by name of a change, and that no list has shown yet.
    unseen: HashSet<&'a [u8]>,
}

enum Verdict {
    InView,
    Overwritten,
    /// New, and dated after the cut by less than clocks may differ.
    SoonAfter,
    LaterObject,
}

impl<'a> Sieve<'a> {
    /// For the cut at `at`; without knowledge of changes, times decide.
    pub fn new(
        driver: &Objects,
        at: FileTime,
        knowledge: Option<(&'a Early, Late)>,
        parent: Option<&'a dyn Tree>,
    ) -> Result<Self> {
        let unseen = knowledge.as_ref().map_or_else(HashSet::new, |(early, _)| {
            early.known.iter().filter(|(_, there)| **there).map(|(key, _)| key.as_slice()).collect()
        });
        let difference = match driver.place {
            Where::Directory(_) => Duration::ZERO,
            Where::Bucket(_) | Where::S3(_) => driver.settings.clock_difference()?,
        };
        let nanos = u64::from(at.nanos) + u64::from(difference.subsec_nanos());
        let seconds = difference.as_secs() + nanos / 1_000_000_000;
        let seconds = at.seconds.saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX));
        Ok(Self {
            at,
            doubt_until: FileTime { seconds, nanos: (nanos % 1_000_000_000) as u32 },
            knowledge,
            parent,
            kept: Sorter::new(&driver.scratch)?,
            losses: Vec::new(),
            losses_more: 0,
            left_out: 0,
            replaced: 0,
            replaced_named: Vec::new(),
            soon: 0,
            soon_named: Vec::new(),
            unseen,
        })
    }

    /// Sifts the objects that are there now, beside those of before the cut.
    pub fn run(mut self, now: Sorted, before: Option<&Sorted>) -> Result<View> {
        let mut now = now.entries()?;
        let mut before = before.map(Sorted::entries).transpose()?;
        let mut current = now.next_entry()?;
        let mut earlier = next_of(&mut before)?;
        loop {
            let order = match (&current, &earlier) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            if order.is_le() {
                let (sort_key, payload) = current.take().expect("compared above");
                if order.is_eq() && earlier.as_ref().is_some_and(|(_, before)| *before == payload) {
                    // A bucket's object that nobody wrote since, whatever the service's clock shows.
                    self.kept.push(sort_key, payload)?;
                } else {
                    self.present(sort_key, payload, order.is_eq())?;
                }
                current = now.next_entry()?;
            }
            if order.is_ge() {
                let (sort_key, _) = earlier.take().expect("compared above");
                if order.is_gt() {
                    self.absent(&keys::unescape(&keys::split_sort_key(&sort_key))?, true);
                }
                earlier = next_of(&mut before)?;
            }
        }
        for key in std::mem::take(&mut self.unseen) {
            self.absent(key, false);
        }
        self.finish()
    }

    fn present(&mut self, sort_key: Vec<u8>, payload: Vec<u8>, before: bool) -> Result<()> {
        let key = keys::unescape(&keys::split_sort_key(&sort_key))?;
        self.unseen.remove(key.as_slice());
        let record = Record::parse(&payload)?;
        let was_listed = before;
        let before = before || self.is_in_parent(&sort_key, &record)?;
        match self.judge(&key, &record, before) {
            Verdict::LaterObject => {
                self.left_out += 1;
                return Ok(());
            }
            Verdict::Overwritten => {
                self.lose(&key, "was overwritten after the cut; the point holds the newer content");
            }
            // One too many harms nobody, one too few does.
            Verdict::SoonAfter => {
                self.soon += 1;
                if self.soon_named.len() < DOUBTS_MAX {
                    self.soon_named.push(format!("`{}`", keys::shown(&key)));
                }
            }
            // Times are cut off to the second, and those of uploads in parts are those of their begin: the write may
            // have come after the cut.
            Verdict::InView if was_listed && record.file.is_none() => {
                self.replaced += 1;
                if self.replaced_named.len() < DOUBTS_MAX {
                    self.replaced_named.push(format!("`{}`", keys::shown(&key)));
                }
            }
            Verdict::InView => {}
        }
        self.kept.push(sort_key, payload)
    }

    /// Whether the parent point shows a bucket's object that was written after the cut.
    fn is_in_parent(&self, sort_key: &[u8], record: &Record) -> Result<bool> {
        let Some(parent) = self.parent.filter(|_| record.file.is_none() && record.changed_time() > self.at) else {
            return Ok(false);
        };
        let names = keys::split_sort_key(sort_key);
        for is_folder in [false, true] {
            let mut path = TreePath::root().join(wire::OBJECTS)?;
            wire::object_path(&names, is_folder).iter().try_for_each(|name| path.push(name))?;
            if parent.get(&path)?.is_some_and(|node| node.kind != NodeKind::Dir) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn judge(&self, key: &[u8], record: &Record, before: bool) -> Verdict {
        let Some((early, late)) = &self.knowledge else {
            return match record.changed_time() <= self.at {
                true => Verdict::InView,
                false if before => Verdict::Overwritten,
                false if record.changed_time() <= self.doubt_until => Verdict::SoonAfter,
                false => Verdict::LaterObject,
            };
        };
        let existed = match late.first.get(key) {
            // Nobody wrote since the cut, as far as a watch can see; the time sees the rest.
            None if record.changed_time() <= self.at || early.known.contains_key(key) => return Verdict::InView,
            None => true,
            Some(_) if !late.content.contains(key) && record.modified_time() <= self.at => return Verdict::InView,
            Some(Change::Created) => false,
            Some(Change::MovedIn) => early.existed(key, before),
            Some(_) => true,
        };
        if existed { Verdict::Overwritten } else { Verdict::LaterObject }
    }

    /// An object that was there once and is not any more.
    fn absent(&mut self, key: &[u8], before: bool) {
        self.unseen.remove(key);
        match &self.knowledge {
            None => self.lose(key, "was deleted while the point was taken, shortly before the cut or after it"),
            Some((early, late)) => {
                let is_gone_late = late.first.contains_key(key) || late.folders_gone.iter().any(|f| is_below(key, f));
                if early.existed(key, before) {
                    let why = if is_gone_late { "was deleted after the cut" } else { "vanished unseen" };
                    self.lose(key, why);
                }
            }
        }
    }

    fn lose(&mut self, key: &[u8], why: &str) {
        if self.losses.len() < LOSSES_MAX {
            self.losses.push(Loss { what: keys::shown(key), why: why.to_owned() });
        } else {
            self.losses_more += 1;
        }
    }

    fn finish(mut self) -> Result<View> {
        if self.losses_more > 0 {
            let what = format!("{} more objects", self.losses_more);
            self.losses.push(Loss { what, why: "were overwritten or deleted after the cut".to_owned() });
        }
        let mut notes = Vec::new();
        if self.left_out > 0 {
            notes.push(format!("{} objects came after the cut and were left out", self.left_out));
        }
        if self.replaced > 0 {
            notes.push(format!(
                "{} objects were replaced while the point was taken, by the service's times before the cut, which do \
                 not tell for sure: {}",
                self.replaced,
                self.replaced_named.join(", ")
            ));
        }
        if self.soon > 0 {
            notes.push(format!(
                "{} new objects are dated after the cut by less than clocks may differ, and are in the point: {}",
                self.soon,
                self.soon_named.join(", ")
            ));
        }
        Ok(View { records: self.kept.finish()?, at: self.at, losses: self.losses, notes, holds: false })
    }
}
