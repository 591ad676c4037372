//! DRAIN: the tree of the cut as named streams; and the paths in it, for references.
//!
//! The tree: `HOW-TO-RESTORE.txt` and `data/` with the directory's content as it is; a store of
//! several directories has `roots/<name>/` for each instead.

use std::collections::HashSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Loss};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{FileTime, Metadata, Node, NodeKind, Sink, bytes};

use super::client::{FileContent, Owners, Reading, Stat, Top, link_target, look, look_at, xattrs};
use super::config::Checked;
use super::cut::View;
use super::spool::Reader;
use super::walk::{Found, Judge, Walk, Yield};

pub(super) const DATA: &str = "data";
pub(super) const ROOTS: &str = "roots";

const HOW_TO_RESTORE: &str = "\
data/ is the directory as it was, with owners, modes, times, links and attributes; copy it back.
A store of several directories has one folder for each under roots/, under the name it was given.
With restic alone: restic restore <snapshot>:/<store>/data --target /where/it/belongs
Files that changed while they were read are named in the point's statefile.json under `losses`.
";

/// Drains all places of a store.
pub(super) fn drain(
    checked: &Checked,
    context: &Context,
    views: &[View],
    sink: &mut dyn Sink,
    has_parent: bool,
) -> Result<Drained> {
    context.check()?;
    sink.file(b"HOW-TO-RESTORE.txt", &Metadata::stream(FileTime::default()), None, bytes(HOW_TO_RESTORE))?;
    let mut drained = Drained { unit: "files".to_owned(), ..Drained::default() };
    let owners = Owners::read();
    let is_several = checked.places.iter().any(|place| place.label.is_some());
    if is_several {
        sink.enter(ROOTS.as_bytes(), &Metadata::folder(FileTime::default()))?;
    }
    for view in views {
        let name = checked.places[view.place].label.as_deref().unwrap_or(DATA);
        let here = c".";
        let top = look_at(view.top.fd.as_fd()).or_io(|| "cannot look at the top directory".to_owned())?;
        let streams = Streams { checked, context, view, owners: &owners, sink, has_parent, drained: &mut drained };
        let meta = streams.metadata(&view.original(b"", top), view.top.fd.as_fd(), here, true)?;
        streams.sink.enter(name.as_bytes(), &meta)?;
        let mut walk = Walk::new(checked, context);
        let spool = view.spool.as_deref().map(Reader::open).transpose()?;
        let mut judge = Judge::new(streams, view.rule.as_ref(), spool);
        walk.run(view.top.fd.as_fd(), &mut judge)?;
        let (streams, losses) = judge.finish(view.top.fd.as_fd())?;
        streams.sink.leave()?;
        let prefix = if is_several { format!("{ROOTS}/{name}") } else { DATA.to_owned() };
        // Streams are named by their path in the tree; what has none is named alike.
        drained.losses.extend(losses.into_iter().map(|loss| Loss { what: format!("{prefix}/{}", loss.what), ..loss }));
        drained.notes.extend(walk.notes);
        drained.notes.extend(view.notes.iter().cloned());
    }
    if is_several {
        sink.leave()?;
    }
    Ok(drained)
}

/// Turns entries into streams and nodes.
struct Streams<'a> {
    checked: &'a Checked,
    context: &'a Context,
    view: &'a View,
    owners: &'a Owners,
    sink: &'a mut dyn Sink,
    has_parent: bool,
    drained: &'a mut Drained,
}

impl Streams<'_> {
    fn metadata(&self, stat: &Stat, at: BorrowedFd<'_>, name: &CStr, with_xattrs: bool) -> Result<Metadata> {
        let is_linked = stat.links > 1 && !stat.is_dir();
        Ok(Metadata {
            mode: stat.mode & 0o7777,
            mtime: stat.mtime,
            // What is read is thereby accessed; a time that changes with each backup tells nothing
            // and would make every tree a new one.
            atime: stat.mtime,
            // A later change may get the same time as one that came right before the cut. Without
            // a time, the next drain reads the file again.
            ctime: if self.is_settled(stat) { stat.ctime } else { FileTime::default() },
            uid: stat.uid,
            gid: stat.gid,
            user: self.owners.user(stat.uid),
            group: self.owners.group(stat.gid),
            inode: stat.inode,
            // A snapshot has a device of its own each time; the source's is what lasts.
            device: if is_linked { self.view.device } else { 0 },
            links: if stat.is_dir() { 0 } else { stat.links },
            xattrs: if with_xattrs && self.checked.settings.xattrs { xattrs(at, name)? } else { Vec::new() },
        })
    }

    fn is_settled(&self, stat: &Stat) -> bool {
        stat.ctime <= self.view.settled
    }

    /// Where the content of a file is read, and what is wrong with it.
    ///
    /// btrfs flushes, then takes the snapshot: what is written in between may be in it as a name
    /// and a time without its content. Such a file is read where it was written, as long as it is
    /// still the same.
    fn source(&self, found: &Found<'_>, torn: Option<&'static str>) -> Result<Source> {
        let stat = self.view.original(found.path, found.stat);
        let own = Source { top: Arc::clone(&self.view.top), seen: found.stat, stat, torn };
        let Some(live) = self.view.live.as_ref().filter(|_| !self.is_settled(&stat)) else { return Ok(own) };
        let shown = || format!("cannot look at `{}`", String::from_utf8_lossy(found.path));
        let now = look(live.fd.as_fd(), found.path).or_io(shown)?;
        let times = |stat: &Stat| (stat.inode, stat.mtime, stat.ctime);
        Ok(match now.filter(|now| now.is_file() && times(now) == times(&stat)) {
            Some(now) => Source { top: Arc::clone(live), seen: now, stat: now, torn },
            None => Source { torn: Some("written while the snapshot was taken, and changed since"), ..own },
        })
    }

    fn file(&mut self, found: &Found<'_>, torn: Option<&'static str>) -> Result<()> {
        let name = found.name.to_bytes();
        let Source { top, seen, stat, torn } = self.source(found, torn)?;
        self.drained.items += 1;
        self.drained.bytes += stat.size;
        if self.has_parent
            && torn.is_none()
            && self.is_settled(&stat)
            && let Some(parent) = self.sink.parent(name)?
            && is_unchanged(&parent, &stat)
        {
            let mut meta = self.metadata(&stat, found.at, found.name, false)?;
            // A changed attribute changes the inode's time, so these are still right.
            meta.xattrs = parent.meta.xattrs;
            self.context.advance(stat.size, 1);
            return self.sink.reuse(name, &meta);
        }
        let mut meta = self.metadata(&stat, found.at, found.name, true)?;
        if torn.is_some() {
            meta.ctime = FileTime::default();
        }
        if stat.size == 0 && torn.is_none() {
            // Seen empty after the cut and unchanged since: there is nothing to open it for.
            self.context.advance(0, 1);
            return self.sink.file(name, &meta, Some(0), bytes(""));
        }
        self.drained.bytes_read += stat.size;
        let content = FileContent {
            context: self.context.clone(),
            top,
            path: found.path.to_vec(),
            seen,
            torn: torn.map(str::to_owned),
            state: Reading::NotOpened,
        };
        self.sink.file(name, &meta, Some(stat.size), Box::new(content))
    }
}

/// Where the content of one file is read.
struct Source {
    top: Arc<Top>,
    /// What is there, which must not change while it is read.
    seen: Stat,
    /// What the file is in the store.
    stat: Stat,
    torn: Option<&'static str>,
}

/// Whether the parent point's file has the content that `stat` stands for.
fn is_unchanged(parent: &Node, stat: &Stat) -> bool {
    let meta = &parent.meta;
    parent.kind == NodeKind::File { size: stat.size }
        && meta.ctime != FileTime::default()
        && (meta.inode, meta.mtime, meta.ctime) == (stat.inode, stat.mtime, stat.ctime)
}

impl Yield for Streams<'_> {
    fn enter(&mut self, found: &Found<'_>) -> Result<()> {
        let stat = self.view.original(found.path, found.stat);
        let meta = self.metadata(&stat, found.at, found.name, true)?;
        self.sink.enter(found.name.to_bytes(), &meta)
    }

    fn leave(&mut self) -> Result<()> {
        self.sink.leave()
    }

    fn entry(&mut self, found: &Found<'_>, torn: Option<&'static str>) -> Result<()> {
        if found.stat.is_file() {
            return self.file(found, torn);
        }
        let kind = found.stat.kind(|| link_target(found.at, found.name))?;
        let stat = self.view.original(found.path, found.stat);
        let meta = self.metadata(&stat, found.at, found.name, true)?;
        self.drained.items += 1;
        self.context.advance(0, 1);
        self.sink.node(&Node { name: found.name.to_bytes().to_vec(), kind, meta })
    }
}

/// Yields the paths that the views hold.
pub(super) fn edges(
    checked: &Checked,
    context: &Context,
    views: &[View],
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let asked: Option<HashSet<&[u8]>> = match query {
        EdgeQuery::Held(kind) if kind == "paths" => None,
        EdgeQuery::Which { kind, referents } if kind == "paths" => Some(referents.iter().map(Vec::as_slice).collect()),
        EdgeQuery::From(_) => {
            return Err(Error::new(Kind::Unsupported, "files name nothing by themselves")
                .hint("a `files` store can be the `to` side of a reference"));
        }
        EdgeQuery::Held(kind) | EdgeQuery::Which { kind, .. } => {
            return Err(Error::new(Kind::Unsupported, format!("a `files` store holds no {kind}")).hint("kind: paths"));
        }
    };
    for view in views {
        let label = checked.places[view.place].label.as_deref();
        let paths = Paths { label, asked: asked.as_ref(), visit: &mut *visit };
        let spool = view.spool.as_deref().map(Reader::open).transpose()?;
        let mut judge = Judge::new(paths, view.rule.as_ref(), spool);
        Walk::new(checked, context).run(view.top.fd.as_fd(), &mut judge)?;
    }
    Ok(())
}

struct Paths<'a> {
    label: Option<&'a str>,
    asked: Option<&'a HashSet<&'a [u8]>>,
    visit: &'a mut (dyn FnMut(Edge) -> Result<()> + Send),
}

impl Yield for Paths<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<()> {
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        Ok(())
    }

    fn entry(&mut self, found: &Found<'_>, _: Option<&'static str>) -> Result<()> {
        let referent = match self.label {
            Some(label) => [label.as_bytes(), b"/", found.path].concat(),
            None => found.path.to_vec(),
        };
        if self.asked.is_some_and(|asked| !asked.contains(referent.as_slice())) {
            return Ok(());
        }
        (self.visit)(Edge { referent, owner: String::new() })
    }
}

/// What a client of a live store sees: nothing holds it, and nothing is judged.
pub(super) fn live_view(place: usize, top: Top) -> Result<View> {
    let device = look_at(top.fd.as_fd()).or_io(|| "cannot look at the top directory".to_owned())?.device;
    Ok(View {
        place,
        top: Arc::new(top),
        rule: None,
        spool: None,
        settled: FileTime::default(),
        device,
        notes: Vec::new(),
        live: None,
        originals: None,
    })
}
