//! Writes a stored tree into a local directory: pack-ordered, on all cores, verified.
//!
//! The tree is walked in its own order, which makes folders, links and special files at once and
//! gathers the files into a *window*. When the window is full, its pieces are sorted by where they
//! lie in the packs and read in large ranges by all workers; each blob is decrypted, decompressed,
//! hashed and written wherever it belongs. Then hard links are made, and folders in which nothing
//! more can change get their modes and times. So memory depends on the window, not on the tree.
//!
//! This module walks; `window` carries out, `files` writes, `place` guards the target,
//! `attributes` sets what `stat` shows. Nothing here decides what is restored.

mod attributes;
mod files;
mod links;
pub(crate) mod place;
mod sparse;
#[cfg(test)]
mod tests;
mod window;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;
use stillpoint_core::driver::Context;
use stillpoint_core::tree::{Existing, ExtractOptions, Extracted, Metadata, Node, NodeKind};
use stillpoint_core::{Error, Kind, Result};

use crate::Id;
use crate::format::tree::TreeNode;
use crate::tree::blobs::Loader;
use crate::tree::entries::Entries;
use attributes::{Losses, apply, apply_at};
use links::Links;
use place::{Place, TOP, names_in, os_error, remove, shown};
use window::{Link, Window, locate, piece_of};

/// Extracts the directory whose tree is `tree` into `to`, which gets `meta` if there is one.
///
/// # Errors
/// `AlreadyExists` if `to` holds anything and the options say so; `Corrupt` if a blob is damaged or
/// missing, naming a file that needs it. What was written by then stays.
pub(crate) fn extract(
    loader: &Arc<Loader>,
    tree: &Id,
    meta: Option<&Metadata>,
    to: &Path,
    options: &ExtractOptions,
    context: &Context,
) -> Result<Extracted> {
    let mut restore = Restore {
        loader,
        context,
        place: Place::open(to, options.existing)?,
        owners: options.owners,
        losses: Losses::default(),
        window: Window::default(),
        links: Links::default(),
        counts: Extracted::default(),
    };
    restore.walk(tree, meta)?;
    let Restore { place, losses, mut counts, .. } = restore;
    rustix::fs::syncfs(place.top()).map_err(|errno| os_error("cannot flush what was restored to disk", errno))?;
    counts.losses = losses.into_list();
    Ok(counts)
}

struct Restore<'a> {
    loader: &'a Arc<Loader>,
    context: &'a Context,
    place: Place,
    owners: bool,
    losses: Losses,
    window: Window,
    links: Links,
    counts: Extracted,
}

/// A directory that is being walked.
struct Level {
    folder: u32,
    entries: Entries,
    /// What the directory itself gets in the end; `None` leaves it as it is.
    meta: Option<Metadata>,
    /// Names found in a directory that was there before, sorted; those not in the tree are removed.
    found: VecDeque<Vec<u8>>,
}

impl Restore<'_> {
    fn walk(&mut self, tree: &Id, meta: Option<&Metadata>) -> Result<()> {
        let top = Level {
            folder: TOP,
            entries: Entries::open(self.loader, tree)?,
            meta: meta.cloned(),
            found: self.found(TOP, true)?,
        };
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            self.context.check()?;
            match level.entries.next()? {
                Some(entry) => {
                    while level.found.front().is_some_and(|name| *name < entry.node.name) {
                        let name = level.found.pop_front().expect("a front was seen");
                        remove(&*self.place.folder(level.folder)?, &name)?;
                    }
                    level.found.pop_front_if(|name| *name == entry.node.name);
                    let folder = level.folder;
                    if let Some(below) = self.entry(folder, entry)? {
                        levels.push(below);
                    }
                }
                None => {
                    let level = levels.pop().expect("a last level was seen");
                    for name in &level.found {
                        remove(&*self.place.folder(level.folder)?, name)?;
                    }
                    self.window.folders.push((level.folder, level.meta));
                }
            }
            if self.window.is_full() {
                self.flush()?;
            }
        }
        self.flush()
    }

    /// What is in a folder that was there before, if it must become equal to the tree.
    fn found(&self, folder: u32, there: bool) -> Result<VecDeque<Vec<u8>>> {
        if !there || self.place.existing() == Existing::Refuse {
            return Ok(VecDeque::new());
        }
        let mut names = names_in(&*self.place.folder(folder)?, usize::MAX)?;
        names.sort_unstable();
        Ok(names.into())
    }

    /// Makes or plans one entry; a directory is returned to be walked next.
    fn entry(&mut self, folder: u32, entry: TreeNode) -> Result<Option<Level>> {
        stillpoint_core::tree::check_name(&entry.node.name)?;
        match entry.node.kind {
            NodeKind::Dir => {
                let tree = entry.subtree.ok_or_else(|| {
                    Error::new(Kind::Corrupt, format!("the directory `{}` has no tree", shown(&entry.node.name)))
                })?;
                let (inner, there) = self.place.enter(folder, &entry.node.name)?;
                let entries = Entries::open(self.loader, &tree)?;
                return Ok(Some(Level {
                    folder: inner,
                    entries,
                    meta: Some(entry.node.meta),
                    found: self.found(inner, there)?,
                }));
            }
            NodeKind::File { size } => self.file(folder, size, entry)?,
            NodeKind::Symlink { .. }
            | NodeKind::Fifo
            | NodeKind::Socket
            | NodeKind::CharDevice { .. }
            | NodeKind::BlockDevice { .. } => self.special(folder, &entry.node)?,
        }
        Ok(None)
    }

    fn file(&mut self, folder: u32, size: u64, entry: TreeNode) -> Result<()> {
        let TreeNode { node, content, .. } = entry;
        self.counts.files += 1;
        if node.meta.links > 1 && node.meta.inode != 0 {
            let path = || {
                let mut path = self.place.path(folder);
                path.push(node.name.clone());
                path
            };
            if let Some(first) = self.links.meet(&node.meta, size, &content, path) {
                self.window.links.push(Link { folder, name: node.name.into(), first });
                return Ok(());
            }
        }
        let length = locate(self.loader, &node.name, &content)?;
        if length != size {
            let name = shown(&node.name);
            self.losses.add(format!("length of `{name}`: {length} bytes are stored, {size} were noted"));
        }
        self.counts.bytes += length;
        let name = node.name.clone();
        self.window.add_file(folder, node, length, content.len() as u64);
        let mut offset = 0;
        for id in content {
            let location = piece_of(self.loader, &name, &id)?;
            self.window.add_piece(location, offset);
            offset += u64::from(location.entry.plain_length());
            if self.window.is_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn special(&mut self, folder: u32, node: &Node) -> Result<()> {
        let around = self.place.folder(folder)?;
        self.place.clear(&around, &node.name)?;
        let name = node.name.as_slice();
        let (made, is_link) = match &node.kind {
            NodeKind::Symlink { target } => (rustix::fs::symlinkat(target.as_slice(), &*around, name), true),
            NodeKind::Fifo => (make_special(&around, name, FileType::Fifo, 0), false),
            NodeKind::Socket => (make_special(&around, name, FileType::Socket, 0), false),
            NodeKind::CharDevice { device } => (make_special(&around, name, FileType::CharacterDevice, *device), false),
            NodeKind::BlockDevice { device } => (make_special(&around, name, FileType::BlockDevice, *device), false),
            NodeKind::File { .. } | NodeKind::Dir => return Err(Error::internal("a file is not special")),
        };
        match made {
            Ok(()) => apply_at(&around, name, &node.meta, is_link, self.owners, &self.losses),
            Err(errno @ (Errno::PERM | Errno::OPNOTSUPP)) if !is_link => {
                self.losses.add(format!("special file `{}`: {errno}", shown(name)));
                Ok(())
            }
            Err(errno) => Err(os_error(format!("cannot make `{}`", shown(name)), errno)),
        }
    }

    /// Carries out the window, then what had to wait for it.
    fn flush(&mut self) -> Result<()> {
        self.window.carry_out(self.loader, &self.place, self.owners, &self.losses, self.context)?;
        for link in std::mem::take(&mut self.window.links) {
            self.link(&link)?;
        }
        for (folder, meta) in std::mem::take(&mut self.window.folders) {
            if let Some(meta) = meta {
                let handle = self.place.folder(folder)?;
                let name = self.place.path(folder).pop().unwrap_or_else(|| b".".to_vec());
                apply(&handle, &name, &meta, self.owners, &self.losses)?;
            }
            if folder != TOP {
                self.place.leave(folder);
            }
        }
        Ok(())
    }

    fn link(&self, link: &Link) -> Result<()> {
        let around = self.place.folder(link.folder)?;
        self.place.clear(&around, &link.name)?;
        let (first, folders) = link.first.split_last().expect("a first name is never the top");
        let folders: Vec<&[u8]> = folders.iter().map(Vec::as_slice).collect();
        let from = self.place.folder_at(&folders)?;
        rustix::fs::linkat(&*from, first.as_slice(), &*around, &*link.name, rustix::fs::AtFlags::empty())
            .map_err(|errno| os_error(format!("cannot link `{}`", shown(&link.name)), errno))
    }
}

fn make_special(around: &std::os::fd::OwnedFd, name: &[u8], kind: FileType, device: u64) -> rustix::io::Result<()> {
    rustix::fs::mknodat(around, name, kind, Mode::RUSR | Mode::WUSR, device)
}
