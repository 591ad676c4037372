//! PREPARE, CUT, the seal's check and release.
//!
//! The rule where nothing holds the view: the cut takes the time T, finely, and returns only when
//! the clock that the kernel stamps files with has passed T (a few milliseconds). Every write that
//! was acknowledged before the cut then has a change time of at most T, and every one begun after
//! it a later one. That stands as long as nobody sets the clock, which is noticed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;
use stillpoint_core::tree::FileTime;

use super::client::{Clock, Stat, Top, file_system, look, look_at};
use super::config::{Checked, Snapshot};
use super::snapshot::{self, Method};
use super::spool::{Spool, Writer};
use super::walk::{Listing, NamesChanged, Rule, Walk};
use crate::watch::{Change, Watch};

/// The list from before the cut ages: what happened since must be found in the watch or guessed.
const SAFE_FOR: Duration = Duration::from_secs(600);
/// The coarse clock ticks at least every 10 ms; a machine that takes longer is not running.
const CLOCK_TICK_MAX: Duration = Duration::from_secs(5);
/// How far another machine's clock, or one that counts whole seconds, may be off.
const FOREIGN_CLOCK_SLACK_SECONDS: i64 = 60;
/// Names that may change between PREPARE and CUT before the watch stops keeping them.
const EVENTS_MAX: usize = 200_000;

/// One place's view of the cut, ready to be walked.
#[derive(Debug)]
pub(super) struct View {
    /// Index into the settings' places.
    pub(super) place: usize,
    /// What is walked: the place itself, or the snapshot of it.
    pub(super) top: Arc<Top>,
    /// How changes are told apart; `None` if the view is held.
    pub(super) rule: Option<Rule>,
    pub(super) spool: Option<Arc<Spool>>,
    /// A change time up to this one can not be met again by a later change.
    pub(super) settled: FileTime,
    /// The device of the place itself.
    pub(super) device: u64,
    pub(super) notes: Vec<String>,
    /// The place itself, where the snapshot may lack the content of what was written meanwhile.
    pub(super) live: Option<Arc<Top>>,
    /// What clones were cloned from, by path.
    pub(super) originals: Option<Arc<HashMap<Vec<u8>, Stat>>>,
}

impl View {
    /// What the entry at `path` was in the place itself.
    pub(super) fn original(&self, path: &[u8], found: Stat) -> Stat {
        self.originals.as_ref().and_then(|originals| originals.get(path)).copied().unwrap_or(found)
    }
}

/// What `prepare` leaves for the cut.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) clock: Arc<Clock>,
    places: Vec<Ready>,
}

#[derive(Debug)]
struct Ready {
    top: Arc<Top>,
    method: Method,
    stat: Stat,
    times_are_ours: bool,
    spool: Option<Arc<Spool>>,
    pub(super) watch: Option<Watch>,
    /// Names that changed since the list, as far as taken from the watch.
    names: Option<NamesChanged>,
    notes: Vec<String>,
}

/// A cut that was made and not released.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) pin: Pin,
    pub(super) views: Arc<Vec<View>>,
    clock: Arc<Clock>,
    /// The inode of each place at the cut: another one means that it was swapped.
    inodes: Vec<u64>,
}

/// Opens, watches and lists every place. Takes as long as a walk.
pub(super) fn prepare(checked: &Checked, context: &Context, scratch: &Path) -> Result<(Prepared, Hold)> {
    let mut bytes = 0;
    let clock = Arc::new(Clock::watch());
    let mut places = Vec::new();
    for index in 0..checked.places.len() {
        context.check()?;
        let (ready, listed_bytes) = prepare_place(checked, context, scratch, index)?;
        bytes += listed_bytes;
        places.push(ready);
    }
    let prepared = Prepared { clock, places };
    // So that the snapshot's files count as settled, unless they change from here on.
    prepared.pass_tick()?;
    Ok((prepared, Hold { safe_for: SAFE_FOR, bytes_estimate: (bytes > 0).then_some(bytes) }))
}

fn prepare_place(checked: &Checked, context: &Context, scratch: &Path, index: usize) -> Result<(Ready, u64)> {
    let path = &checked.places[index].path;
    let top = Arc::new(Top::open(path)?);
    let stat = look_at(top.fd.as_fd()).or_io(|| format!("cannot look at `{}`", path.display()))?;
    let (_, is_local, _) = file_system(top.fd.as_fd())?;
    let mut notes = Vec::new();
    // The watch comes first, so that nothing falls between it and the list.
    let watch = if is_local { watch(checked, path, &mut notes)? } else { None };
    let mut method = snapshot::choose(checked, path, &top, true, &mut notes)?;
    if let Method::Btrfs { .. } | Method::Lvm { .. } = method {
        // Flushed now, so that the snapshot has little left to flush within the cut.
        rustix::fs::syncfs(&top.fd)
            .map_err(std::io::Error::from)
            .or_io(|| format!("cannot sync `{}`", path.display()))?;
        let ready = Ready { top, method, stat, times_are_ours: is_local, spool: None, watch, names: None, notes };
        return Ok((ready, 0));
    }
    let (spool, listed) = list(checked, context, scratch, &top, watch.as_ref())?;
    if method == Method::Reflink && listed.files > checked.settings.reflink_files_max {
        if checked.settings.snapshot == Snapshot::Reflink {
            let message = format!("`{}` holds {} files, too many to be cloned in a cut", path.display(), listed.files);
            return Err(Error::new(Kind::Exhausted, message).hint("raise reflinkFilesMax, or set snapshot: auto"));
        }
        notes.push(format!("{} files are too many to be cloned in a cut; changes are watched for", listed.files));
        method = Method::Watched;
    }
    let times_are_ours = is_local && (listed.has_fine_times || listed.files == 0);
    if !times_are_ours {
        notes.push("file times cannot be trusted here: whatever changes during the run is named".to_owned());
    }
    let names = watch.is_some().then(NamesChanged::default);
    let spool = (method == Method::Watched).then(|| Arc::new(spool));
    Ok((Ready { top, method, stat, times_are_ours, spool, watch, names, notes }, listed.bytes))
}

fn watch(checked: &Checked, path: &Path, notes: &mut Vec<String>) -> Result<Option<Watch>> {
    let directories_max = checked.settings.watch_directories_max;
    if directories_max == 0 {
        return Ok(None);
    }
    let exclude = checked.clone();
    let options = crate::watch::Options {
        one_file_system: checked.settings.one_file_system,
        directories_max,
        events_max: EVENTS_MAX,
        exclude: Some(Arc::new(move |path| exclude.is_excluded(path))),
    };
    match Watch::begin(path, options) {
        Ok(watch) => Ok(Some(watch)),
        Err(error) if error.kind() == Kind::Exhausted => {
            notes.push(format!("writes are not observed: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

struct Listed {
    files: u64,
    bytes: u64,
    has_fine_times: bool,
}

fn list(
    checked: &Checked,
    context: &Context,
    scratch: &Path,
    top: &Top,
    watch: Option<&Watch>,
) -> Result<(Spool, Listed)> {
    static SPOOLS: AtomicU64 = AtomicU64::new(0);
    std::fs::create_dir_all(scratch).or_io(|| format!("cannot make `{}`", scratch.display()))?;
    let name = format!("files-{}-{}.spool", std::process::id(), SPOOLS.fetch_add(1, Ordering::Relaxed));
    let mut writer = Writer::create(&scratch.join(name))?;
    let mut linked = |path: &[u8]| match watch {
        Some(watch) => watch.add_file(Path::new(OsStr::from_bytes(path))),
        None => Ok(()),
    };
    let mut listing =
        Listing { spool: Some(&mut writer), linked: &mut linked, files: 0, bytes: 0, has_fine_times: false };
    Walk::new(checked, context).run(top.fd.as_fd(), &mut listing)?;
    let listed = Listed { files: listing.files, bytes: listing.bytes, has_fine_times: listing.has_fine_times };
    Ok((writer.finish()?, listed))
}

impl Prepared {
    /// The positions of all watches together; `None` if one place is out of sight.
    pub(super) fn position(&self) -> Option<Position> {
        let positions = self.places.iter().map(|place| Some(place.watch.as_ref()?.position()?.text));
        let texts: Option<Vec<_>> = positions.collect();
        Some(Position::new("inotify", texts?.join("+")))
    }

    /// Whether all places are in sight.
    pub(super) fn blind(&self) -> Vec<String> {
        self.places.iter().filter_map(|place| place.watch.as_ref()?.blind()).collect()
    }

    /// Fixes the view of every place. On failure nothing is left behind.
    pub(super) fn cut(&mut self, checked: &Checked, cut: &CutId) -> Result<Held> {
        let mut remains = Vec::new();
        let views = self.views(checked, cut, &mut remains);
        let outcome = views.and_then(|views| self.pass_tick().map(|()| views));
        match outcome {
            Ok(views) => {
                let latest = views.iter().filter_map(|view| view.rule.as_ref().map(|rule| rule.cut_at)).max();
                let at = latest.unwrap_or_else(|| self.clock.now());
                let pin = Pin { cut: cut.clone(), position: position(&views, at), remains };
                let inodes = self.places.iter().map(|place| place.stat.inode).collect();
                Ok(Held { pin, views: Arc::new(views), clock: Arc::clone(&self.clock), inodes })
            }
            Err(error) => {
                for remain in &remains {
                    // The first failure is the one to report; the journal has no remains of this cut.
                    drop(snapshot::remove(checked, remain));
                }
                Err(error)
            }
        }
    }

    fn views(&mut self, checked: &Checked, cut: &CutId, remains: &mut Vec<String>) -> Result<Vec<View>> {
        let clock = Arc::clone(&self.clock);
        let mut views = Vec::new();
        for (index, ready) in self.places.iter_mut().enumerate() {
            let before = clock.coarse();
            let device = ready.stat.device;
            let notes = ready.notes.clone();
            if ready.method == Method::Watched {
                // Names first, then the time: what comes in between has a time before T and is in.
                ready.take_names();
                let rule =
                    Rule { cut_at: clock.now(), times_are_ours: ready.times_are_ours, names: ready.names.clone() };
                let slack = if rule.times_are_ours { 0 } else { FOREIGN_CLOCK_SLACK_SECONDS };
                let settled = FileTime { seconds: rule.cut_at.seconds - slack, ..rule.cut_at };
                let (top, spool) = (Arc::clone(&ready.top), ready.spool.clone());
                views.push(View {
                    place: index,
                    top,
                    rule: Some(rule),
                    spool,
                    settled,
                    device,
                    notes,
                    live: None,
                    originals: None,
                });
                continue;
            }
            let taken = snapshot::take(checked, index, &ready.method, &ready.top, cut, remains)?;
            // A change in the same tick as the snapshot may have come after it.
            let settled = just_before(before);
            let top = Arc::new(Top::open(&taken.path)?);
            let originals = taken.originals.map(Arc::new);
            let live = matches!(ready.method, Method::Btrfs { .. }).then(|| Arc::clone(&ready.top));
            views.push(View { place: index, top, rule: None, spool: None, settled, device, notes, live, originals });
        }
        Ok(views)
    }

    /// Waits until a file that changes from now on gets a later time than anything before.
    fn pass_tick(&self) -> Result<()> {
        let at = self.clock.now();
        let begun = Instant::now();
        while self.clock.coarse() <= at {
            if begun.elapsed() > CLOCK_TICK_MAX {
                return Err(Error::new(Kind::TimedOut, "the system clock stands still").temporary());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Ready {
    fn take_names(&mut self) {
        let events = self.watch.as_ref().and_then(Watch::take);
        let (Some(names), Some(events)) = (&mut self.names, events) else {
            self.names = None;
            return;
        };
        for event in events {
            let path = event.path.as_os_str().as_bytes();
            match event.change {
                _ if path.is_empty() => {}
                Change::Created | Change::MovedIn => names.add(path),
                Change::Removed | Change::MovedOut => names.remove(path),
                Change::Written | Change::Attributes => {}
            }
        }
    }
}

fn just_before(time: FileTime) -> FileTime {
    match time.nanos {
        0 => FileTime { seconds: time.seconds - 1, nanos: 999_999_999 },
        nanos => FileTime { seconds: time.seconds, nanos: nanos - 1 },
    }
}

fn position(views: &[View], at: FileTime) -> Position {
    let kind = if views.iter().all(|view| view.rule.is_none()) { "snapshot" } else { "change-time" };
    let time = jiff::Timestamp::new(at.seconds, at.nanos.cast_signed());
    let text = time.map_or_else(|_| format!("{}.{:09}", at.seconds, at.nanos), |time| time.to_string());
    Position::new(kind, text)
}

impl Held {
    /// Whether the views still show what they showed at the cut.
    pub(super) fn still_valid(&self, checked: &Checked) -> Result<Validity> {
        let is_watched = self.views.iter().any(|view| view.rule.is_some());
        if is_watched && self.clock.was_set() {
            return Ok(Validity::Lost("the system clock was set: file times tell nothing about the cut".to_owned()));
        }
        for (place, inode) in checked.places.iter().zip(&self.inodes) {
            let now = look(rustix::fs::CWD, place.path.as_path());
            let now = now.or_io(|| format!("cannot look at `{}`", place.path.display()))?;
            let swapped = is_watched && !place.path.is_symlink() && now.is_none_or(|now| now.inode != *inode);
            if swapped {
                return Ok(Validity::Lost(format!("`{}` was replaced as a whole", place.path.display())));
            }
        }
        for remain in &self.pin.remains {
            if let Some(why) = snapshot::lost(remain)? {
                return Ok(Validity::Lost(why));
            }
        }
        Ok(Validity::Valid)
    }
}

/// Removes what cuts left on the file system: the own one, and those of a process that died.
pub(super) fn release(checked: &Checked, held: Option<Held>, remains: &[String]) -> Result<()> {
    let own = held.map(|held| held.pin.remains.clone()).unwrap_or_default();
    let mut first_failure = None;
    // Mounts come after what they show, and go before it.
    for remain in own.iter().rev().chain(remains.iter().rev()) {
        if let Err(error) = snapshot::remove(checked, remain) {
            first_failure.get_or_insert(error);
        }
    }
    first_failure.map_or(Ok(()), Err)
}

/// A name of ours for what a cut makes.
pub(super) fn own_name(what: &str, checked: &Checked, cut: &CutId, place: usize) -> PathBuf {
    PathBuf::from(format!("{}{what}-{}-{cut}-{place}", super::config::OWN_PREFIX, checked.store))
}
