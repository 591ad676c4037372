//! PREPARE, CUT, and what the cut means: which objects were there at that moment.
//!
//! A bucket that keeps versions holds the view: of each key, the newest version that is not later than
//! the cut is read, whatever is written or deleted since. Nothing holds other objects. A directory is
//! watched, and whatever happens to a name after the cut is known by name; where it cannot be watched,
//! and for buckets without versions, the times of the objects decide. In both cases objects are write-once
//! by habit: new ones are left out, and what was overwritten or deleted is named as a loss.

use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use stillpoint_core::driver::{Context, Hold, Loss, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;
use stillpoint_core::tree::{FileTime, Tree};

use super::bucket::answers::Versioning;
use super::bucket::listing::Moment;
use super::bucket::s3::S3;
use super::client::Skipped;
use super::config::Mode;
use super::keys;
use super::sieve::{Early, Late, Sieve};
use super::spool::{Entries, Entry, Sorted, Sorter};
use super::wire::STAMP_KEY;
use super::{Objects, Where};
use crate::watch::{Event, Options, Watch};

/// A watch stays good for as long as the process lives.
const SAFE_FOR: Duration = Duration::from_secs(3600);
/// Names of changes that are kept between two looks; about 100 bytes each.
const EVENTS_MAX: usize = if cfg!(test) { 20_000 } else { 200_000 };
/// Keys that are named in a note; the rest is counted.
pub(super) const DOUBTS_MAX: usize = 20;

/// What a driver value holds between calls.
#[derive(Default)]
pub(super) struct State {
    watch: Option<Watch>,
    /// Why there is no watch, for people.
    unwatched: Option<String>,
    /// Keys that were there during `prepare`; those of a bucket with what was listed of each.
    before: Option<Arc<Sorted>>,
    /// Changes between `prepare` and the cut; `None` once some were lost.
    early: Option<Early>,
    /// Whether the bucket keeps versions, so that what the cut shows stays readable.
    holds: bool,
    /// Uploads in parts that are dated from here on may have been completed after the cut.
    uploads_from: FileTime,
    pinned: Option<Pinned>,
}

struct Pinned {
    pin: Pin,
    at: FileTime,
    /// Whether versions hold the view.
    holds: bool,
    /// Events that were taken after the cut.
    late: Vec<Event>,
    view: Option<Arc<View>>,
    /// Keys of the view that the drain lost.
    lost: Option<Arc<Sorted>>,
}

/// What the cut shows, once it was listed.
#[derive(Debug)]
pub(super) struct View {
    /// The objects in it, in the order of the tree.
    pub records: Sorted,
    /// The moment of the cut by the clock that stamps the objects.
    pub at: FileTime,
    /// Objects that were overwritten or deleted since.
    pub losses: Vec<Loss>,
    /// For people.
    pub notes: Vec<String>,
    /// Whether versions hold it.
    pub holds: bool,
}

impl Objects {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Lists all objects into a list in the order of the tree.
    pub(super) fn listing(&self, context: &Context) -> Result<(Sorted, Skipped)> {
        let mut sorter = Sorter::new(&self.scratch)?;
        let skipped = self
            .place
            .as_place()
            .list(context, &mut |key, record| sorter.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?))?;
        Ok((sorter.finish()?, skipped))
    }

    /// The view of a pin, listed at the first call. `parent` tells overwritten objects of a bucket
    /// from new ones.
    pub(super) fn view(&self, context: &Context, pin: &Pin, parent: Option<&dyn Tree>) -> Result<Arc<View>> {
        let mut guard = self.state();
        let state = &mut *guard;
        let lost = || {
            Error::new(Kind::PinLost, "no view of this cut is held")
                .hint("the process that took the cut is gone; take a new point")
        };
        let pinned = state.pinned.as_mut().filter(|pinned| pinned.pin.cut == pin.cut).ok_or_else(lost)?;
        if let Some(view) = &pinned.view {
            return Ok(view.clone());
        }
        if let (Where::S3(s3), Some(parent)) = (&self.place, parent) {
            s3.learn_splits(&super::drain::first_keys(parent)?);
        }
        if let (Where::S3(s3), true) = (&self.place, pinned.holds) {
            let (uploads_from, difference) = (state.uploads_from, self.settings.clock_difference()?);
            let moment = Moment { at: pinned.at, uploads_from, difference, tells_fractions: false };
            let view = Arc::new(self.versions_view(s3, context, moment)?);
            pinned.view = Some(view.clone());
            return Ok(view);
        }
        let (now, skipped) = self.listing(context)?;
        // The changes are taken after the listing, so that the listing shows nothing unheard of.
        let events = state.watch.as_ref().and_then(Watch::take);
        let knowledge = match (events, &state.early) {
            (Some(events), Some(early)) => {
                pinned.late.extend(events);
                Some((early, Late::of(&pinned.late)))
            }
            _ => None,
        };
        let is_blind = matches!(self.place, Where::Directory(_)) && knowledge.is_none();
        let sieve = Sieve::new(self, pinned.at, knowledge, parent)?;
        let mut view = sieve.run(now, state.before.as_deref())?;
        view.notes.extend(notes(&skipped));
        if is_blind {
            let why = state.unwatched.clone().unwrap_or_else(|| "the watch lost sight".to_owned());
            view.notes.push(format!("the directory was not watched ({why}): the files' times decided"));
        }
        let view = Arc::new(view);
        pinned.view = Some(view.clone());
        Ok(view)
    }

    /// Remembers which keys of the view a drain lost.
    pub(super) fn note_lost(&self, pin: &Pin, lost: Sorted) {
        if let Some(pinned) = self.state().pinned.as_mut().filter(|pinned| pinned.pin.cut == pin.cut) {
            pinned.lost = Some(Arc::new(lost));
        }
    }

    /// The keys of the view that the drain lost, in the order of the tree; `None` before it.
    pub(super) fn lost(&self, pin: &Pin) -> Option<Arc<Sorted>> {
        self.state().pinned.as_ref().filter(|pinned| pinned.pin.cut == pin.cut)?.lost.clone()
    }

    /// Of every key, the version that was the newest at the cut. Later ones are no losses: the older
    /// ones are still there.
    fn versions_view(&self, s3: &S3, context: &Context, moment: Moment) -> Result<View> {
        let mut kept = Sorter::new(&self.scratch)?;
        let (mut doubtful, mut named) = (0u64, Vec::new());
        let seen = s3.at_cut(context, moment, &mut |key, record| {
            if let Some(other) = &record.other {
                doubtful += 1;
                if named.len() < DOUBTS_MAX {
                    let version = record.version.as_deref().unwrap_or("null");
                    named.push(format!("`{}`: version {version} or {other}", keys::shown(&key)));
                }
            }
            kept.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?)
        })?;
        let mut notes = Vec::new();
        if seen.later > 0 {
            notes.push(format!("{} versions came after the cut and were left out", seen.later));
        }
        if doubtful > 0 {
            notes.push(format!(
                "of {doubtful} objects the service's times do not tell whether a write came before the cut or after it \
                 (clocks may differ by {}); the first is in the point: {}",
                self.settings.clock_difference,
                named.join("; ")
            ));
        }
        Ok(View { records: kept.finish()?, at: moment.at, losses: Vec::new(), notes, holds: true })
    }
}

fn notes(skipped: &Skipped) -> Vec<String> {
    let mut notes = Vec::new();
    if skipped.special > 0 {
        notes.push(format!("{} links, pipes, sockets and devices are no objects and were left out", skipped.special));
    }
    if skipped.unfinished > 0 {
        notes.push(format!("{} files bear names of unfinished objects and were left out", skipped.unfinished));
    }
    notes
}

/// The next entry of a list that may be absent.
pub(super) fn next_of(entries: &mut Option<Entries>) -> Result<Option<Entry>> {
    entries.as_mut().map_or(Ok(None), Entries::next_entry)
}

/// Learns whether the bucket holds what a cut shows, and reads the service's clock.
fn prepare_s3(driver: &Objects, s3: &S3, state: &mut State) -> Result<()> {
    let versioning = s3.versioning()?;
    state.holds = versioning == Versioning::Enabled;
    let bucket = s3.client.bucket();
    if !state.holds && driver.settings.mode == Mode::Reference {
        return Err(Error::new(
            Kind::Config,
            format!("the bucket `{bucket}` keeps no versions that a point could refer to"),
        )
        .hint("switch versioning on, or use mode: copy"));
    }
    if let Some(mirror) = &s3.mirror
        && mirror.versioning()? != Versioning::Enabled
    {
        let mirror = mirror.client.bucket();
        return Err(Error::new(
            Kind::Config,
            format!("the mirror `{mirror}` keeps no versions: copies would replace each other"),
        )
        .hint("switch its versioning on"));
    }
    let prepared = s3.now()?;
    if state.holds {
        // Looked at after the time was read, so that what begins between the two is dated later than it.
        state.uploads_from = s3.uploads_from(prepared)?;
    }
    // A privilege that is missing is found out before anyone is held back.
    s3.try_needed(state.holds, driver.settings.mode)
}

/// Begins the watch and lists the keys there are.
pub(super) fn prepare(driver: &Objects, context: &Context) -> Result<Hold> {
    let mut guard = driver.state();
    let state = &mut *guard;
    state.pinned = None;
    if let Where::S3(s3) = &driver.place {
        prepare_s3(driver, s3, state)?;
        if state.holds {
            state.before = None;
            return Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: None });
        }
    }
    begin_watch(driver, state)?;
    let is_bucket = !matches!(driver.place, Where::Directory(_));
    // What happened before the listing is in the listing.
    state.early = state.watch.as_ref().and_then(Watch::take).map(|_| Early::default());
    let mut bytes = 0;
    let mut sorter = Sorter::new(&driver.scratch)?;
    driver.place.as_place().list(context, &mut |key, record| {
        bytes += record.size;
        // A file's times are compared with the watch's help; what it was before is not needed.
        let payload = if is_bucket { record.to_bytes()? } else { Vec::new() };
        sorter.push(keys::sort_key(&keys::escape(&key)), payload)
    })?;
    state.before = Some(Arc::new(sorter.finish()?));
    Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) })
}

/// Begins the watch if there is none that still sees.
fn begin_watch(driver: &Objects, state: &mut State) -> Result<()> {
    let Where::Directory(directory) = &driver.place else { return Ok(()) };
    if state.watch.as_ref().is_some_and(|watch| watch.blind().is_none()) {
        return Ok(());
    }
    // What happened between the old watch and the new one is known to nobody.
    state.early = None;
    let settings = driver.settings.clone();
    let exclude = move |path: &std::path::Path| {
        path.as_os_str() == STAMP_KEY || path.file_name().is_some_and(|name| settings.is_unfinished(name.as_bytes()))
    };
    let options = Options { events_max: EVENTS_MAX, exclude: Some(Arc::new(exclude)), ..Options::default() };
    match Watch::begin(&directory.root, options) {
        Ok(watch) => (state.watch, state.unwatched) = (Some(watch), None),
        Err(error) if error.kind() == Kind::Exhausted => {
            (state.watch, state.unwatched) = (None, Some(error.to_string()));
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The watch's position, or `None` where nothing is watched.
pub(super) fn observe(driver: &Objects) -> Result<Option<Position>> {
    let mut guard = driver.state();
    begin_watch(driver, &mut guard)?;
    Ok(guard.watch.as_ref().and_then(Watch::position))
}

/// Notes the moment. What is written from its return on bears a later time, and is seen by the
/// watch after what it reported until then.
pub(super) fn cut(driver: &Objects, context: &Context, cut: &CutId) -> Result<Pin> {
    context.check()?;
    let mut guard = driver.state();
    let state = &mut *guard;
    if let Some(pinned) = state.pinned.as_ref().filter(|pinned| pinned.pin.cut == *cut) {
        return Ok(pinned.pin.clone());
    }
    let at = match &driver.place {
        Where::S3(s3) => cut_s3(s3, state)?,
        _ => now(ClockId::Realtime),
    };
    if matches!(driver.place, Where::Directory(_)) {
        // File times come from a clock that ticks every 1 to 10 ms.
        while now(ClockId::RealtimeCoarse) <= at {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let earlier = state.pinned.take().map(|pinned| pinned.late).unwrap_or_default();
    let events = state.watch.as_ref().and_then(Watch::take);
    state.early = match (state.early.take(), events) {
        (Some(mut early), Some(events)) => {
            early.fold(&earlier);
            early.fold(&events);
            Some(early)
        }
        _ => None,
    };
    let watched = state.watch.as_ref().and_then(Watch::position);
    let time = jiff::Timestamp::new(at.seconds, at.nanos as i32)
        .map_err(|error| Error::internal("the clock shows no time").source(error))?;
    let position = watched.unwrap_or_else(|| Position::new("time", time.to_string()));
    let pin = Pin { cut: cut.clone(), position, remains: Vec::new() };
    state.pinned = Some(Pinned { pin: pin.clone(), at, holds: state.holds, late: Vec::new(), view: None, lost: None });
    Ok(pin)
}

/// The service's time, after which everything that is written bears a later one.
fn cut_s3(s3: &S3, state: &State) -> Result<FileTime> {
    let (versioning, at, wait) = s3.look()?;
    if (versioning == Versioning::Enabled) != state.holds {
        let bucket = s3.client.bucket();
        return Err(Error::new(
            Kind::Conflict,
            format!("the versioning of the bucket `{bucket}` was switched meanwhile"),
        )
        .hint("prepare again")
        .temporary());
    }
    std::thread::sleep(wait);
    Ok(at)
}

fn now(clock: ClockId) -> FileTime {
    let time = clock_gettime(clock);
    FileTime { seconds: time.tv_sec, nanos: time.tv_nsec as u32 }
}

/// What changed since is known by name and every content checks itself, so that a held pin is good.
/// What is only referred to must go on being kept.
pub(super) fn still_valid(driver: &Objects, pin: &Pin) -> Result<Validity> {
    if driver.state().pinned.as_ref().is_none_or(|pinned| pinned.pin.cut != pin.cut) {
        return Ok(Validity::Lost("no view of this cut is held".to_owned()));
    }
    if let (Where::S3(s3), Mode::Reference) = (&driver.place, driver.settings.mode)
        && s3.versioning()? != Versioning::Enabled
    {
        return Ok(Validity::Lost("the bucket does not keep versions any more".to_owned()));
    }
    Ok(Validity::Valid)
}

/// Ends the watch and forgets the lists.
pub(super) fn release(driver: &Objects) {
    *driver.state() = State::default();
}
