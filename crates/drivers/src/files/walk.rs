//! The walk over a tree in sorted order, and the judgement of what of it the cut showed.
//!
//! One walk serves PREPARE, DRAIN and references, so that all three see the same names in the same
//! order. Where nothing holds the view, [`Judge`] tells by file times, by the list from before the
//! cut and by what the watch saw, whether an entry is as the cut showed it. It prefers to name a
//! loss that is none over hiding one that is.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::FileTime;

use super::client::{Names, Stat, file_system, look, look_at, open_below};
use super::config::Checked;
use super::spool::{Reader, Record, Writer};

/// Losses are listed one by one up to this number; the rest is counted.
const LOSSES_MAX: usize = 10_000;
/// A btrfs snapshot shows the subvolumes inside it as empty directories with this inode.
const ABSENT_SUBVOLUME_INODE: u64 = 2;
const LIST_BUFFER_BYTES: usize = 64 * 1024;

/// One entry as the walk found it.
pub(super) struct Found<'a> {
    /// The directory that it is in.
    pub(super) at: BorrowedFd<'a>,
    /// Its name there.
    pub(super) name: &'a CStr,
    /// Its path from the top.
    pub(super) path: &'a [u8],
    /// What it is.
    pub(super) stat: Stat,
}

/// Takes what a walk finds, depth first, in ascending order of names.
pub(super) trait Visit {
    /// A directory; `false` passes over it.
    fn enter(&mut self, found: &Found<'_>) -> Result<bool>;
    /// The end of the directory entered last.
    fn leave(&mut self, at: BorrowedFd<'_>, path: &[u8]) -> Result<()>;
    /// Anything else.
    fn entry(&mut self, found: &Found<'_>) -> Result<()>;
}

/// A walk over one tree.
pub(super) struct Walk<'a> {
    checked: &'a Checked,
    context: &'a Context,
    top_device: u64,
    is_btrfs: bool,
    path: Vec<u8>,
    buffer: Vec<MaybeUninit<u8>>,
    /// What was left out and should be known.
    pub(super) notes: Vec<String>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(checked: &'a Checked, context: &'a Context) -> Self {
        let buffer = vec![MaybeUninit::uninit(); LIST_BUFFER_BYTES];
        Self { checked, context, top_device: 0, is_btrfs: false, path: Vec::new(), buffer, notes: Vec::new() }
    }

    /// Walks everything below the open directory `top`, which itself is not visited.
    pub(super) fn run(&mut self, top: BorrowedFd<'_>, visit: &mut dyn Visit) -> Result<()> {
        self.top_device = look_at(top).or_io(|| "cannot look at the top directory".to_owned())?.device;
        self.is_btrfs = file_system(top)?.0 == "btrfs";
        self.path.clear();
        // Opened anew: walks of one top directory must not share how far it was listed.
        let Some(fresh) = open_below(top, OsStr::new("."))? else {
            return Err(Error::new(Kind::NotFound, "the top directory is gone"));
        };
        self.directory(fresh.as_fd(), visit)
    }

    fn directory(&mut self, at: BorrowedFd<'_>, visit: &mut dyn Visit) -> Result<()> {
        let shown = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
        let names = Names::read(at, &mut self.buffer).map_err(|error| error.context("directory", shown(&self.path)))?;
        let depth = self.path.len();
        for index in 0..names.len() {
            if index % 64 == 0 {
                self.context.check()?;
            }
            let name = names.get(index);
            self.path.truncate(depth);
            if depth > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            if self.checked.is_excluded(Path::new(OsStr::from_bytes(&self.path))) {
                continue;
            }
            let Some(stat) = look(at, name).or_io(|| format!("cannot look at `{}`", shown(&self.path)))? else {
                continue; // Vanished since it was listed; the list from before the cut will tell.
            };
            if stat.is_dir() {
                self.below(at, name, stat, visit)?;
            } else {
                visit.entry(&Found { at, name, path: &self.path, stat })?;
            }
        }
        self.path.truncate(depth);
        Ok(())
    }

    fn below(&mut self, at: BorrowedFd<'_>, name: &CStr, stat: Stat, visit: &mut dyn Visit) -> Result<()> {
        let os_name = OsStr::from_bytes(name.to_bytes());
        let path = || String::from_utf8_lossy(&self.path).into_owned();
        let opened = open_below(at, os_name).map_err(|error| error.context("path", path()))?;
        let Some(fd) = opened else { return Ok(()) };
        if !visit.enter(&Found { at, name, path: &self.path, stat })? {
            return Ok(());
        }
        if self.checked.settings.one_file_system && stat.device != self.top_device {
            let note = format!("`{}` is on another file system; its content is left out (oneFileSystem)", path());
            self.notes.push(note);
        } else if self.is_btrfs && stat.inode == ABSENT_SUBVOLUME_INODE {
            self.notes.push(format!("`{}` is a subvolume of its own; its content is left out", path()));
        } else {
            let depth = self.path.len();
            self.directory(fd.as_fd(), visit)?;
            self.path.truncate(depth);
        }
        visit.leave(fd.as_fd(), &self.path)
    }
}

/// Writes what a walk finds to a spool, and counts it.
pub(super) struct Listing<'a> {
    pub(super) spool: Option<&'a mut Writer>,
    /// Files with further hard links, for whoever watches.
    pub(super) linked: &'a mut dyn FnMut(&[u8]) -> Result<()>,
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Whether any time had a fraction of a second.
    pub(super) has_fine_times: bool,
}

impl Visit for Listing<'_> {
    fn enter(&mut self, found: &Found<'_>) -> Result<bool> {
        if let Some(spool) = &mut self.spool {
            spool.enter(found.name.to_bytes(), &found.stat)?;
        }
        Ok(true)
    }

    fn leave(&mut self, _: BorrowedFd<'_>, _: &[u8]) -> Result<()> {
        self.spool.as_mut().map_or(Ok(()), |spool| spool.leave())
    }

    fn entry(&mut self, found: &Found<'_>) -> Result<()> {
        self.files += 1;
        self.has_fine_times |= found.stat.ctime.nanos != 0;
        if found.stat.is_file() {
            self.bytes += found.stat.size;
            if found.stat.links > 1 {
                (self.linked)(found.path)?;
            }
        }
        match &mut self.spool {
            Some(spool) => spool.entry(found.name.to_bytes(), &found.stat),
            None => Ok(()),
        }
    }
}

/// How it is told whether an entry is as the cut showed it, where nothing holds the view.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    /// No change acknowledged before the cut has a later time; all begun after it have.
    pub(super) cut_at: FileTime,
    /// Whether file times can be held against this machine's clock. Otherwise everything that
    /// differs from the list counts as changed after the cut.
    pub(super) times_are_ours: bool,
    /// What happened to names between the list and the cut; `None` if nobody saw all of it.
    pub(super) names: Option<NamesChanged>,
}

/// Names that appeared and vanished between the list and the cut.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NamesChanged {
    pub(super) added: BTreeSet<Vec<u8>>,
    pub(super) removed: BTreeSet<Vec<u8>>,
}

impl NamesChanged {
    pub(super) fn add(&mut self, path: &[u8]) {
        self.added.insert(path.to_vec());
    }

    /// Also forgets what was added below a directory that went.
    pub(super) fn remove(&mut self, path: &[u8]) {
        self.added.remove(path);
        let below = [path, b"/"].concat();
        let gone: Vec<_> =
            self.added.range(below.clone()..).take_while(|added| added.starts_with(&below)).cloned().collect();
        for added in gone {
            self.added.remove(&added);
        }
        self.removed.insert(path.to_vec());
    }
}

/// What a judge hands on: entries that the cut showed.
pub(super) trait Yield {
    fn enter(&mut self, found: &Found<'_>) -> Result<()>;
    fn leave(&mut self) -> Result<()>;
    /// `torn` says why the entry may not be what the cut showed.
    fn entry(&mut self, found: &Found<'_>, torn: Option<&'static str>) -> Result<()>;
}

/// Hands on what the cut showed, and names what it showed and is lost.
pub(super) struct Judge<'a, Y> {
    inner: Y,
    /// `None` where the view is held: then everything is as the cut showed it.
    rule: Option<&'a Rule>,
    spool: Option<Reader>,
    /// For each open directory, whether the spool stands in the same one.
    beside: Vec<bool>,
    /// Added before the cut and not met so far.
    unmet: BTreeSet<Vec<u8>>,
    losses: Vec<Loss>,
    losses_unlisted: u64,
}

/// What becomes of one entry.
enum Verdict {
    AsCut,
    Torn(&'static str),
    AfterCut,
}

impl<'a, Y: Yield> Judge<'a, Y> {
    pub(super) fn new(inner: Y, rule: Option<&'a Rule>, spool: Option<Reader>) -> Self {
        let unmet = rule.and_then(|rule| rule.names.as_ref()).map(|names| names.added.clone()).unwrap_or_default();
        let beside = vec![spool.is_some()];
        Self { inner, rule, spool, beside, unmet, losses: Vec::new(), losses_unlisted: 0 }
    }

    /// Ends the top directory; returns what was handed on to, and the losses.
    pub(super) fn finish(mut self, top: BorrowedFd<'_>) -> Result<(Y, Vec<Loss>)> {
        self.missing_until(None, top, b"")?;
        for path in std::mem::take(&mut self.unmet) {
            self.lose(&path, "deleted or renamed after the cut");
        }
        if self.losses_unlisted > 0 {
            let why = format!("{} more like these are not listed", self.losses_unlisted);
            self.losses.push(Loss { what: "…".to_owned(), why });
        }
        Ok((self.inner, self.losses))
    }

    fn lose(&mut self, path: &[u8], why: &str) {
        if self.losses.len() < LOSSES_MAX {
            self.losses.push(Loss { what: String::from_utf8_lossy(path).into_owned(), why: why.to_owned() });
        } else {
            self.losses_unlisted += 1;
        }
    }

    /// Names what the list has before `name` in this directory and the walk has not; then takes
    /// the entry called `name`, if the list has it.
    fn meet(&mut self, found: &Found<'_>) -> Result<Option<Record>> {
        if !self.unmet.is_empty() {
            self.unmet.remove(found.path);
        }
        let folder_bytes = found.path.len() - found.name.to_bytes().len();
        let folder = &found.path[..folder_bytes.saturating_sub(1)];
        self.missing_until(Some(found.name.to_bytes()), found.at, folder)?;
        match &mut self.spool {
            Some(spool) if self.beside.last() == Some(&true) => match spool.peek() {
                Some(record) if record.name == found.name.to_bytes() => spool.take(),
                _ => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn missing_until(&mut self, name: Option<&[u8]>, at: BorrowedFd<'_>, folder: &[u8]) -> Result<()> {
        if self.beside.last() != Some(&true) {
            return Ok(());
        }
        loop {
            let Some(spool) = &mut self.spool else { return Ok(()) };
            let is_before = spool.peek().is_some_and(|record| name.is_none_or(|name| record.name.as_slice() < name));
            if !is_before {
                return Ok(());
            }
            let Some(record) = spool.take()? else { return Ok(()) };
            if record.enters {
                spool.skip()?;
            }
            let separator: &[u8] = if folder.is_empty() { b"" } else { b"/" };
            let path = [folder, separator, &record.name].concat();
            if !self.went_before_cut(&path, at)? {
                let what = if record.enters { "directory " } else { "" };
                self.lose(&path, &format!("{what}deleted or renamed after the cut"));
            }
        }
    }

    /// Whether a name that the list has was gone when the cut came.
    fn went_before_cut(&self, path: &[u8], folder: BorrowedFd<'_>) -> Result<bool> {
        let Some(rule) = self.rule else { return Ok(true) };
        if let Some(names) = &rule.names {
            return Ok(names.removed.contains(path));
        }
        // A directory that did not change after the cut lost no name after it.
        let folder = look_at(folder).or_io(|| "cannot look at a directory".to_owned())?;
        Ok(rule.times_are_ours && folder.mtime <= rule.cut_at)
    }

    fn judge(&self, found: &Found<'_>, before: Option<&Record>) -> Verdict {
        let Some(rule) = self.rule else { return Verdict::AsCut };
        let stat = &found.stat;
        if before.is_some_and(|before| before.stat.is_same(stat)) {
            return Verdict::AsCut;
        }
        if !rule.times_are_ours {
            return match before {
                _ if stat.is_dir() => Verdict::AsCut,
                Some(_) => Verdict::Torn("changed during the run; this file system does not tell when"),
                None => Verdict::Torn("appeared during the run; this file system does not tell when"),
            };
        }
        if stat.ctime <= rule.cut_at {
            return Verdict::AsCut;
        }
        let existed = match &rule.names {
            Some(names) => {
                names.added.contains(found.path) || (before.is_some() && !names.removed.contains(found.path))
            }
            None => before.is_some() || stat.born.is_none_or(|born| born <= rule.cut_at),
        };
        if existed { Verdict::Torn("changed after the cut") } else { Verdict::AfterCut }
    }

    /// What a directory that changed after the cut has lost with it.
    fn judge_directory(&mut self, found: &Found<'_>, before: Option<&Record>) -> bool {
        let other = before.is_some_and(|before| before.stat.inode != found.stat.inode);
        let who = |stat: &Stat| (stat.mode, stat.uid, stat.gid);
        match before {
            Some(_) if other => self.lose(found.path, "directory replaced after the cut"),
            Some(before) if who(&before.stat) != who(&found.stat) => {
                self.lose(found.path, "mode or owner of the directory changed after the cut");
            }
            None if self.rule.is_some_and(|rule| rule.names.is_none()) => {
                self.lose(found.path, "directory made and changed around the cut; what it held then is not known");
            }
            _ => {}
        }
        !other
    }
}

impl<Y: Yield> Visit for Judge<'_, Y> {
    fn enter(&mut self, found: &Found<'_>) -> Result<bool> {
        let before = self.meet(found)?;
        let mut beside = before.as_ref().is_some_and(|before| before.enters);
        let is_kept = match self.judge(found, before.as_ref()) {
            Verdict::AfterCut => false,
            Verdict::AsCut => {
                let same = before.as_ref().is_some_and(|before| before.stat.inode == found.stat.inode);
                if beside
                    && !same
                    && let Some(spool) = &mut self.spool
                {
                    spool.skip()?;
                }
                beside &= same;
                true
            }
            Verdict::Torn(_) => {
                let same = self.judge_directory(found, before.as_ref());
                if beside
                    && !same
                    && let Some(spool) = &mut self.spool
                {
                    spool.skip()?;
                }
                beside &= same;
                true
            }
        };
        if !is_kept {
            if beside && let Some(spool) = &mut self.spool {
                spool.skip()?;
            }
            return Ok(false);
        }
        self.beside.push(beside);
        self.inner.enter(found)?;
        Ok(true)
    }

    fn leave(&mut self, at: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
        self.missing_until(None, at, path)?;
        if self.beside.pop() == Some(true)
            && let Some(spool) = &mut self.spool
        {
            spool.leave()?;
        }
        self.inner.leave()
    }

    fn entry(&mut self, found: &Found<'_>) -> Result<()> {
        let before = self.meet(found)?;
        if before.as_ref().is_some_and(|before| before.enters)
            && let Some(spool) = &mut self.spool
        {
            spool.skip()?;
        }
        match self.judge(found, before.as_ref()) {
            Verdict::AfterCut => Ok(()),
            Verdict::AsCut => self.inner.entry(found, None),
            Verdict::Torn(why) => {
                // A file is named by its stream, once it was read; nothing else has one.
                if !found.stat.is_file() {
                    self.lose(found.path, why);
                }
                self.inner.entry(found, Some(why))
            }
        }
    }
}
