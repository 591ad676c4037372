//! Listings: several ranges of keys at a time, pages as they come, and of each key the version that
//! the cut shows.
//!
//! Which version that is decides the service's time of it. Three things blur that time: many services
//! cut it off to the second, and date an upload in parts by its begin; and the clock that dates a version
//! may be another than the one that dated the cut. What is in doubt for any of these reasons is kept with
//! the id of the other candidate, and named. Services that tell fractions of a second are taken to date
//! uploads by their end, as MinIO does.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::FileTime;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::answers::{Entry, Page};
use super::request::Client;
use super::verbs::What;

/// Ranges that are listed at a time.
pub(in super::super) const RANGES_MAX: usize = 8;
/// Pages that wait to be worked on, of all ranges together.
const PAGES_MAX: usize = 2 * RANGES_MAX;
/// Fewer prefixes than this are no reason to list in ranges.
const PREFIXES_MIN: usize = 4;

/// A page of one of the ranges, with its permit to take up memory.
type Arrived = (usize, Result<Page>, Option<tokio::sync::OwnedSemaphorePermit>);

/// A listing that is about to be made.
pub(in super::super) struct Listing<'a> {
    pub client: &'a Client,
    pub handle: &'a Handle,
    /// What the keys begin with; they are told whole.
    pub prefix: &'a str,
    pub what: What,
    /// Keys at which ranges end, ascending; each belongs to the range that it ends.
    pub splits: Vec<Vec<u8>>,
}

impl Listing<'_> {
    /// Calls `visit` for all entries. Those of one key follow each other, the newest first, if one
    /// range's are looked at alone; the number of the range comes along.
    pub fn run(self, context: &Context, visit: &mut dyn FnMut(usize, Entry) -> Result<()>) -> Result<()> {
        let (sender, receiver) = channel::<Arrived>();
        let room = Arc::new(Semaphore::new(PAGES_MAX));
        let mut from = None;
        let ends = self.splits.iter().cloned().map(Some).chain([None]);
        for (number, to) in ends.enumerate() {
            let range =
                Range { client: self.client.clone(), prefix: self.prefix.to_owned(), what: self.what, from, to };
            from = range.to.clone();
            let (sender, room) = (sender.clone(), room.clone());
            self.handle.spawn(async move {
                let (mut next, mut order) = (range.first(), Order::default());
                loop {
                    let permit = room.clone().acquire_owned().await.ok();
                    let page = range.client.list(range.what, &range.prefix, None, &next).await;
                    let page = page.and_then(|mut page| {
                        if range.what == What::Versions {
                            order.put(&mut page.entries)?;
                        }
                        Ok(range.within(page))
                    });
                    next = page.as_ref().map_or_else(|_| Vec::new(), |page| page.next.clone());
                    // Nobody listens any more once the listing has failed or was stopped.
                    if sender.send((number, page, permit)).is_err() || next.is_empty() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        // Pages go out in the order in which they come; ends are told by the senders' going.
        for (number, page, permit) in receiver {
            context.check()?;
            page?.entries.into_iter().try_for_each(|entry| visit(number, entry))?;
            drop(permit);
        }
        Ok(())
    }
}

/// The order in which a service lists versions: by key, the newest of each first. Some list the versions of
/// a page first and its markers after them.
#[derive(Debug, Default)]
struct Order {
    is_mended: bool,
    /// The last key of the pages so far.
    last: Vec<u8>,
}

impl Order {
    /// Puts a page in order, and makes sure that it follows the one before.
    fn put(&mut self, entries: &mut [Entry]) -> Result<()> {
        let is_behind = |pair: &[Entry]| {
            pair[1].key < pair[0].key || (pair[1].key == pair[0].key && pair[1].is_latest && !pair[0].is_latest)
        };
        self.is_mended |= entries.windows(2).any(is_behind);
        if self.is_mended {
            entries.sort_by(|a, b| {
                a.key.cmp(&b.key).then(b.is_latest.cmp(&a.is_latest)).then(b.modified.cmp(&a.modified))
            });
        }
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(()) };
        if first.key < self.last {
            return Err(Error::new(Kind::Unsupported, "the service lists versions in another order than that of keys")
                .hint(
                    "nothing tells there which version was the newest at a cut: suspend versioning, or leave it out",
                ));
        }
        self.last.clone_from(&last.key);
        Ok(())
    }
}

struct Range {
    client: Client,
    prefix: String,
    what: What,
    /// The key behind which it begins.
    from: Option<Vec<u8>>,
    /// The key at which it ends, inclusive.
    to: Option<Vec<u8>>,
}

impl Range {
    fn first(&self) -> Vec<(String, String)> {
        let name = if self.what == What::Versions { "key-marker" } else { "start-after" };
        // Where a key is no text, the range begins at the front, and what is before it is dropped.
        let from = self.from.as_deref().and_then(|key| std::str::from_utf8(key).ok());
        from.map(|key| (name.to_owned(), key.to_owned())).into_iter().collect()
    }

    fn within(&self, mut page: Page) -> Page {
        page.entries.retain(|entry| self.from.as_ref().is_none_or(|from| entry.key > *from));
        if let Some(to) = &self.to
            && page.entries.last().is_some_and(|last| last.key > *to)
        {
            page.entries.retain(|entry| entry.key <= *to);
            page.next.clear();
        }
        page
    }
}

/// Keys to split at, from the folders that a bucket shows at a glance.
pub(in super::super) async fn probe_splits(client: &Client, prefix: &str) -> Result<Vec<Vec<u8>>> {
    let page = client.list(What::Objects, prefix, Some("/"), &[]).await?;
    let mut splits = Vec::new();
    if page.prefixes.len() >= PREFIXES_MIN {
        for folder in spread(&page.prefixes) {
            // Not every clone goes on rightly behind a key that is not there.
            if let Ok(folder) = String::from_utf8(folder) {
                splits.extend(client.first(What::Objects, &folder).await?.map(|first| first.key));
            }
        }
    }
    Ok(splits)
}

/// A few of many keys, evenly spread, ascending.
pub(in super::super) fn spread(keys: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut chosen: Vec<_> =
        (1..RANGES_MAX).filter_map(|number| keys.get(keys.len() * number / RANGES_MAX)).cloned().collect();
    chosen.sort();
    chosen.dedup();
    chosen
}

/// Of one key, what the cut shows.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Chosen {
    /// The version, or a marker that says the object was deleted.
    pub entry: Entry,
    /// The other candidate, where it is in doubt which of the two it was: a version id, `absent`, or `deleted`.
    /// Never with a marker: where a deletion is in doubt, the object is chosen.
    pub other: Option<String>,
}

/// The cut, as far as a service's times tell it.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Moment {
    /// The cut.
    pub at: FileTime,
    /// Uploads in parts that are dated from here on may have been completed after the cut.
    pub uploads_from: FileTime,
    /// How far the clocks that date objects may be from the one that dated the cut.
    pub difference: Duration,
    /// Whether the service was seen to tell fractions of a second: then a whole second is one moment of a
    /// thousand, and not a time that was cut off.
    pub tells_fractions: bool,
}

/// On which side of the cut a version was written.
enum Side {
    Before,
    /// By its time before; the time does not tell for sure.
    PerhapsBefore,
    /// By its time after; the time does not tell for sure.
    PerhapsAfter,
    After,
}

impl Moment {
    /// Later than everything.
    pub const END: Self = Self {
        at: FileTime { seconds: i64::MAX, nanos: 0 },
        uploads_from: FileTime { seconds: i64::MAX, nanos: 0 },
        difference: Duration::ZERO,
        tells_fractions: false,
    };

    fn side(&self, entry: &Entry) -> Side {
        let nanos = |time: FileTime| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
        let time = FileTime { seconds: entry.modified.0, nanos: entry.modified.1 };
        let (at, dated, difference) = (nanos(self.at), nanos(time), self.difference.as_nanos() as i128);
        // A time without fraction is taken for one that was cut off, and stands for all of its second.
        let is_cut_off = time.nanos == 0 && !self.tells_fractions;
        let in_parts = entry.etag.as_deref().is_some_and(|etag| etag.contains('-'));
        if dated - difference > at {
            Side::After
        } else if dated > at {
            Side::PerhapsAfter
        } else if dated + difference + if is_cut_off { 999_999_999 } else { 0 } > at
            || (is_cut_off && in_parts && dated + difference >= nanos(self.uploads_from))
        {
            Side::PerhapsBefore
        } else {
            Side::Before
        }
    }
}

/// Chooses among the versions of one key after the other.
///
/// Of two versions between which the cut lies, by times that do not tell for sure, the one that is dated
/// before it is chosen. Where there is none, the later one is: an object too many harms nobody, one too few does.
#[derive(Debug)]
pub(in super::super) struct Chooser {
    moment: Moment,
    /// Of the key at hand, the first version that is dated after the cut and may have come before it.
    soon: Option<Entry>,
    /// Of the key at hand, the first that is not dated later than the cut, while it is in doubt.
    open: Option<Entry>,
    /// The key of which the answer is known.
    done: Option<Vec<u8>>,
    /// Versions that are later than the cut.
    pub later: u64,
}

impl Chooser {
    /// Chooses for a cut.
    pub fn new(moment: Moment) -> Self {
        Self { moment, soon: None, open: None, done: None, later: 0 }
    }

    /// Takes note that the service tells fractions of a second.
    pub fn tells_fractions(&mut self) {
        self.moment.tells_fractions = true;
    }

    /// Takes the next version; adds to `known` what became known by it.
    pub fn push(&mut self, entry: Entry, known: &mut Vec<Chosen>) {
        if self.done.as_ref().is_some_and(|done| *done == entry.key) {
            return;
        }
        if self.open.as_ref().or(self.soon.as_ref()).is_some_and(|pending| pending.key != entry.key) {
            self.finish(known);
        }
        if let Some(open) = self.open.take() {
            if open.is_marker && entry.is_marker && !matches!(self.moment.side(&entry), Side::Before) {
                // Both deletions may have come after the cut: what they hid comes yet.
                self.open = Some(entry);
                return;
            }
            // The next older one of a key in doubt.
            self.done = Some(entry.key.clone());
            match (open.is_marker, entry.is_marker) {
                (true, false) => known.push(Chosen { entry, other: Some(DELETED.to_owned()) }),
                (true, true) => self.keep_soon(DELETED, known),
                (false, _) => known.push(Chosen { entry: open, other: Some(named(&entry, ABSENT)) }),
            }
            self.soon = None;
            return;
        }
        match self.moment.side(&entry) {
            Side::After => self.later += 1,
            Side::PerhapsAfter => {
                self.later += 1;
                if !entry.is_marker || self.soon.as_ref().is_none_or(|soon| soon.is_marker) {
                    self.soon = Some(entry);
                }
            }
            Side::PerhapsBefore => self.open = Some(entry),
            Side::Before => {
                self.done = Some(entry.key.clone());
                if entry.is_marker && self.soon.as_ref().is_some_and(|soon| !soon.is_marker) {
                    return self.keep_soon(DELETED, known);
                }
                let other = self.soon.take().filter(|_| !entry.is_marker);
                known.push(Chosen { entry, other: other.map(|other| named(&other, DELETED)) });
            }
        }
    }

    /// Chooses the version that is dated after the cut, if it is an object.
    fn keep_soon(&mut self, other: &str, known: &mut Vec<Chosen>) {
        if let Some(entry) = self.soon.take().filter(|soon| !soon.is_marker) {
            self.later -= 1;
            known.push(Chosen { entry, other: Some(other.to_owned()) });
        }
    }

    /// Ends the last key.
    pub fn finish(&mut self, known: &mut Vec<Chosen>) {
        match self.open.take() {
            Some(open) if !open.is_marker => {
                self.soon = None;
                known.push(Chosen { entry: open, other: Some(ABSENT.to_owned()) });
            }
            Some(_) => self.keep_soon(DELETED, known),
            None => self.keep_soon(ABSENT, known),
        }
        self.soon = None;
    }
}

/// A candidate by its version, or by what a marker means where it stands.
fn named(entry: &Entry, marker: &str) -> String {
    match &entry.version {
        Some(version) if !entry.is_marker => version.clone(),
        _ => marker.to_owned(),
    }
}

/// Instead of a version id: the key had no object.
pub(in super::super) const ABSENT: &str = "absent";

/// Instead of a version id: the key's object was deleted.
const DELETED: &str = "deleted";

/// The key below the prefix.
pub(in super::super) fn below_prefix(mut entry: Entry, prefix: &str) -> Result<Entry> {
    match entry.key.strip_prefix(prefix.as_bytes()) {
        Some(rest) => entry.key = rest.to_vec(),
        None => return Err(Error::new(Kind::Corrupt, "the service lists keys that were not asked for")),
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, version: &str, time: (i64, u32), etag: &str) -> Entry {
        let (is_marker, version) = (etag.is_empty(), Some(version.to_owned()));
        let (etag, key, is_latest) = (Some(etag.to_owned()), key.into(), false);
        Entry { key, version, is_marker, is_latest, modified: time, etag, size: 1, class: None }
    }

    fn moment(at: (i64, u32), uploads_from: i64, difference_seconds: u64) -> Moment {
        let time = |(seconds, nanos)| FileTime { seconds, nanos };
        let difference = Duration::from_secs(difference_seconds);
        Moment { at: time(at), uploads_from: time((uploads_from, 0)), difference, tells_fractions: false }
    }

    fn choose(entries: Vec<Entry>, at: (i64, u32)) -> Vec<(String, String, Option<String>)> {
        choose_by(moment(at, at.0 - 10, 0), entries).0
    }

    fn choose_by(moment: Moment, entries: Vec<Entry>) -> (Vec<(String, String, Option<String>)>, u64) {
        let mut chooser = Chooser::new(moment);
        let mut found = Vec::new();
        entries.into_iter().for_each(|entry| chooser.push(entry, &mut found));
        chooser.finish(&mut found);
        let text = |key: Vec<u8>| String::from_utf8(key).unwrap();
        let found = found.into_iter().map(|c| (text(c.entry.key), c.entry.version.unwrap(), c.other)).collect();
        (found, chooser.later)
    }

    #[test]
    fn the_newest_version_that_is_not_later_is_chosen() {
        let found = choose(
            vec![
                entry("a", "a3", (101, 5), "x"),
                entry("a", "a2", (99, 5), "x"),
                entry("a", "a1", (98, 5), "x"),
                entry("b", "b1", (101, 5), "x"),
                entry("c", "c2", (90, 1), ""),
                entry("c", "c1", (80, 1), "x"),
                entry("d", "d1", (100, 500), "x"),
            ],
            (100, 500),
        );
        let chosen = |key: &str, version: &str| (key.to_owned(), version.to_owned(), None);
        assert_eq!(found, [chosen("a", "a2"), chosen("c", "c2"), chosen("d", "d1")]);
    }

    #[test]
    fn what_the_times_do_not_tell_is_kept_with_both_ids() {
        let found = choose(
            vec![
                entry("a", "a2", (100, 0), "x"),
                entry("a", "a1", (99, 0), "x"),
                entry("b", "b1", (100, 0), "x"),
                entry("c", "c2", (100, 0), "x"),
                entry("c", "c1", (90, 0), ""),
                entry("d", "d2", (95, 0), "x-3"),
                entry("d", "d1", (94, 0), "x"),
                entry("e", "e2", (80, 0), "x-3"),
                entry("e", "e1", (79, 0), "x"),
                entry("f", "f1", (99, 1), "x"),
                entry("g", "g1", (100, 0), "x"),
                entry("h", "h2", (100, 0), ""),
                entry("h", "h1", (90, 0), "x"),
                entry("i", "i2", (100, 0), ""),
                entry("i", "i1", (90, 0), ""),
                entry("j", "j1", (100, 0), ""),
            ],
            (100, 700),
        );
        let doubt =
            |key: &str, version: &str, other: &str| (key.to_owned(), version.to_owned(), Some(other.to_owned()));
        let sure = |key: &str, version: &str| (key.to_owned(), version.to_owned(), None);
        assert_eq!(
            found,
            [
                doubt("a", "a2", "a1"),
                doubt("b", "b1", ABSENT),
                doubt("c", "c2", ABSENT),
                doubt("d", "d2", "d1"),
                sure("e", "e2"),
                sure("f", "f1"),
                doubt("g", "g1", ABSENT),
                doubt("h", "h1", DELETED),
            ]
        );
    }

    #[test]
    fn what_several_deletions_in_doubt_hid_is_kept() {
        let entries = |first: (i64, u32), second: (i64, u32)| {
            vec![
                entry("a", "a4", first, ""),
                entry("a", "a3", first, ""),
                entry("a", "a2", second, ""),
                entry("a", "a1", (90, 1), "x"),
                // The oldest deletion came before the cut for sure.
                entry("b", "b4", first, ""),
                entry("b", "b3", second, ""),
                entry("b", "b2", (90, 1), ""),
                entry("b", "b1", (80, 1), "x"),
                entry("c", "c2", first, ""),
                entry("c", "c1", second, ""),
            ]
        };
        let expected = [("a".to_owned(), "a1".to_owned(), Some(DELETED.to_owned()))];
        assert_eq!(choose(entries((100, 0), (100, 0)), (100, 700)), expected);
        let found = choose_by(moment((100, 500), 90, 2), entries((99, 1), (99, 1))).0;
        assert_eq!(found, expected);
        // Whatever order the service gives them.
        let found = choose_by(moment((100, 500), 90, 2), entries((99, 1), (101, 1))).0;
        assert_eq!(found, expected);
    }

    #[test]
    fn no_upload_is_sure_where_those_under_way_could_not_be_seen() {
        for (from, other) in [(i64::MIN, Some("v1".to_owned())), (90, None)] {
            let mut chooser = Chooser::new(moment((100, 700), from, 0));
            let mut found = Vec::new();
            chooser.push(entry("a", "v2", (80, 0), "x-3"), &mut found);
            chooser.push(entry("a", "v1", (79, 0), "x"), &mut found);
            chooser.finish(&mut found);
            assert_eq!((found.len(), &found[0].other), (1, &other));
        }
    }

    #[test]
    fn what_clocks_that_differ_leave_open_is_kept_and_named() {
        let (found, later) = choose_by(
            moment((100, 500), 90, 2),
            vec![
                // A new object, dated after the cut by a clock that may be ahead.
                entry("a", "a2", (102, 400), "x"),
                entry("a", "a1", (101, 400), "x"),
                entry("b", "b1", (103, 0), "x"),
                // Overwritten: the older content, and the newer one is named.
                entry("c", "c2", (101, 1), "x"),
                entry("c", "c1", (90, 1), "x"),
                // Deleted, by its time after the cut or shortly before it.
                entry("d", "d2", (101, 1), ""),
                entry("d", "d1", (90, 1), "x"),
                entry("e", "e2", (99, 1), ""),
                entry("e", "e1", (90, 1), "x"),
                // Deleted long before, and made again.
                entry("f", "f2", (101, 1), "x"),
                entry("f", "f1", (90, 1), ""),
                // Overwritten shortly before the cut.
                entry("g", "g2", (99, 1), "x"),
                entry("g", "g1", (90, 1), "x"),
                // Made and deleted around the cut.
                entry("h", "h2", (102, 1), ""),
                entry("h", "h1", (101, 1), "x"),
                // Deleted, made again and deleted around the cut.
                entry("i", "i3", (101, 1), "x"),
                entry("i", "i2", (99, 1), ""),
                entry("j", "j1", (101, 1), ""),
                entry("k", "k1", (98, 1), "x"),
            ],
        );
        let doubt =
            |key: &str, version: &str, other: &str| (key.to_owned(), version.to_owned(), Some(other.to_owned()));
        assert_eq!(
            found,
            [
                doubt("a", "a1", ABSENT),
                doubt("c", "c1", "c2"),
                doubt("d", "d1", DELETED),
                doubt("e", "e1", DELETED),
                doubt("f", "f2", DELETED),
                doubt("g", "g2", "g1"),
                doubt("h", "h1", ABSENT),
                doubt("i", "i3", DELETED),
                ("k".to_owned(), "k1".to_owned(), None),
            ]
        );
        // Those of `a`, `b`, `c`, `d`, `h` and `j` that are not kept.
        assert_eq!(later, 6);
    }

    #[test]
    fn markers_that_are_listed_apart_are_put_where_they_belong() {
        let latest = |entry: Entry| Entry { is_latest: true, ..entry };
        let keys = |entries: &[Entry]| -> String {
            entries.iter().map(|entry| entry.version.clone().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let mut page = vec![
            entry("a", "a1", (10, 0), "x"),
            latest(entry("b", "b3", (30, 0), "x")),
            entry("b", "b1", (10, 0), "x"),
            latest(entry("a", "a2", (20, 0), "")),
            entry("b", "b2", (20, 0), ""),
        ];
        let mut order = Order::default();
        order.put(&mut page).unwrap();
        assert_eq!(keys(&page), "a2 a1 b3 b2 b1");
        // One key alone shows it too, and what was seen once is so on later pages.
        let mut page = vec![entry("c", "c1", (10, 0), "x"), latest(entry("c", "c2", (10, 0), ""))];
        Order::default().put(&mut page).unwrap();
        assert_eq!(keys(&page), "c2 c1");
        let mut page = vec![entry("d", "d1", (10, 0), "x"), entry("d", "d2", (20, 0), "")];
        order.put(&mut page).unwrap();
        assert_eq!(keys(&page), "d2 d1");
        // An upload that is dated by its begin stays where the service has it.
        let mut page = vec![latest(entry("e", "e2", (10, 0), "x-2")), entry("e", "e1", (20, 0), "x")];
        Order::default().put(&mut page).unwrap();
        assert_eq!(keys(&page), "e2 e1");
        assert_eq!(order.put(&mut [entry("a", "a3", (40, 0), "x")]).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn a_whole_second_is_a_time_as_any_other_where_fractions_are_told() {
        let entries =
            || vec![entry("a", "a2", (100, 0), ""), entry("a", "a1", (90, 1), "x"), entry("b", "b1", (100, 0), "x-3")];
        let (doubted, _) = choose_by(moment((100, 700), 90, 0), entries());
        assert!(doubted.iter().all(|(_, _, other)| other.is_some()) && doubted.len() == 2, "{doubted:?}");
        let (sure, _) = choose_by(Moment { tells_fractions: true, ..moment((100, 700), 90, 0) }, entries());
        let shown: Vec<&str> = sure.iter().map(|(_, version, _)| version.as_str()).collect();
        assert_eq!(shown, ["a2", "b1"], "the marker, and the object");
        assert!(sure.iter().all(|(_, _, other)| other.is_none()), "{sure:?}");
    }

    #[test]
    fn splits_are_spread_and_ascending() {
        let keys: Vec<Vec<u8>> = (0..100u8).map(|number| vec![number]).collect();
        let splits = spread(&keys);
        assert_eq!(splits.len(), RANGES_MAX - 1);
        assert!(splits.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(spread(&[]), Vec::<Vec<u8>>::new());
    }
}
