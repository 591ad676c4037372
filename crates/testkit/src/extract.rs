//! Writes a tree in memory to a local directory, and compares the two.
//!
//! A plain, slow twin of what the repository does at full speed, so that drivers whose restore is
//! an extraction can be tested without one. Runs as root or not; never follows a link.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, mknodat, utimensat};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Difference, ExtractOptions, Extracted, Metadata, NodeKind, check_name};

use crate::tree::{Body, Entry, Folder};

const DIFFERENCES_MAX: usize = 100;

/// Fails if `to` holds anything.
pub(crate) fn refuse_content(to: &Path) -> Result<()> {
    match fs::read_dir(to) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::AlreadyExists, format!("`{}` is not empty", to.display()))),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(format!("cannot list `{}`", to.display()), error)),
    }
}

/// Makes the directory `to` equal to `folder`.
pub(crate) fn folder(folder: &Folder, to: &Path, options: &ExtractOptions, context: &Context) -> Result<Extracted> {
    let mut work = Work { context, owners: options.owners, linked: HashMap::new(), done: Extracted::default() };
    fs::create_dir_all(to).or_io(|| format!("cannot make `{}`", to.display()))?;
    work.fill(folder, to)?;
    Ok(work.done)
}

struct Work<'a> {
    context: &'a Context,
    owners: bool,
    linked: HashMap<(u64, u64), PathBuf>,
    done: Extracted,
}

impl Work<'_> {
    fn fill(&mut self, folder: &Folder, to: &Path) -> Result<()> {
        for present in fs::read_dir(to).or_io(|| format!("cannot list `{}`", to.display()))? {
            let present = present.or_io(|| format!("cannot list `{}`", to.display()))?;
            if !folder.entries.contains_key(present.file_name().as_bytes()) {
                clear(&present.path())?;
            }
        }
        for (name, entry) in &folder.entries {
            self.context.check()?;
            check_name(name)?;
            let path = to.join(std::ffi::OsStr::from_bytes(name));
            let keep = entry.node.kind == NodeKind::Dir && fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
            if !keep {
                clear(&path)?;
            }
            self.make(entry, &path)?;
        }
        Ok(())
    }

    fn make(&mut self, entry: &Entry, path: &Path) -> Result<()> {
        let meta = &entry.node.meta;
        let failed = || format!("cannot make `{}`", path.display());
        match (&entry.node.kind, &entry.body) {
            (NodeKind::Dir, Body::Folder(below)) => {
                fs::create_dir_all(path).or_io(failed)?;
                self.fill(below, path)?;
            }
            (NodeKind::File { .. }, Body::Data(data)) => {
                let key = (meta.device, meta.inode);
                if let Some(first) = self.linked.get(&key).filter(|_| meta.links > 1) {
                    return fs::hard_link(first, path).or_io(failed);
                }
                fs::write(path, data.as_slice()).or_io(failed)?;
                self.linked.insert(key, path.to_owned());
                self.done.files += 1;
                self.done.bytes += data.len() as u64;
                self.context.advance(data.len() as u64, 1);
            }
            (NodeKind::Symlink { target }, _) => {
                std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), path).or_io(failed)?;
            }
            (NodeKind::Fifo, _) => special(path, FileType::Fifo, 0)?,
            (NodeKind::Socket, _) => special(path, FileType::Socket, 0)?,
            (NodeKind::CharDevice { device }, _) => special(path, FileType::CharacterDevice, *device)?,
            (NodeKind::BlockDevice { device }, _) => special(path, FileType::BlockDevice, *device)?,
            _ => return Err(Error::new(Kind::Corrupt, format!("`{}` has no content", path.display()))),
        }
        self.dress(meta, &entry.node.kind, path)
    }

    fn dress(&mut self, meta: &Metadata, kind: &NodeKind, path: &Path) -> Result<()> {
        let failed = || format!("cannot set the attributes of `{}`", path.display());
        if self.owners {
            std::os::unix::fs::lchown(path, Some(meta.uid), Some(meta.gid)).or_io(failed)?;
        }
        for (name, value) in &meta.xattrs {
            let name = std::ffi::OsStr::from_bytes(name);
            if let Err(error) = xattr::set(path, name, value) {
                self.done.losses.push(format!("{}: attribute {}: {error}", path.display(), name.display()));
            }
        }
        if !matches!(kind, NodeKind::Symlink { .. }) {
            fs::set_permissions(path, fs::Permissions::from_mode(meta.mode)).or_io(failed)?;
        }
        let time = Timespec { tv_sec: meta.mtime.seconds, tv_nsec: meta.mtime.nanos.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(std::io::Error::from).or_io(failed)
    }
}

fn special(path: &Path, kind: FileType, device: u64) -> Result<()> {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), device)
        .map_err(std::io::Error::from)
        .or_io(|| format!("cannot make `{}`", path.display()))
}

fn clear(path: &Path) -> Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    gone.or_io(|| format!("cannot remove `{}`", path.display()))
}

/// Compares names, types and every byte; at most [`DIFFERENCES_MAX`] differences.
pub(crate) fn compare(folder: &Folder, with: &Path) -> Result<Vec<Difference>> {
    let mut found = Vec::new();
    walk(folder, with, "", &mut found)?;
    found.truncate(DIFFERENCES_MAX);
    Ok(found)
}

fn walk(folder: &Folder, with: &Path, prefix: &str, found: &mut Vec<Difference>) -> Result<()> {
    let listed = fs::read_dir(with).or_io(|| format!("cannot list `{}`", with.display()))?;
    for present in listed {
        let name = present.or_io(|| format!("cannot list `{}`", with.display()))?.file_name();
        if !folder.entries.contains_key(name.as_bytes()) {
            found.push(Difference { path: format!("{prefix}{}", name.display()), what: "not in the point".into() });
        }
    }
    for (name, entry) in &folder.entries {
        if found.len() >= DIFFERENCES_MAX {
            break;
        }
        let at = with.join(std::ffi::OsStr::from_bytes(name));
        let path = format!("{prefix}{}", String::from_utf8_lossy(name));
        let what = match fs::symlink_metadata(&at) {
            Err(_) => Some("missing"),
            Ok(meta) => match (&entry.body, &entry.node.kind) {
                (Body::Folder(below), _) if meta.is_dir() => {
                    walk(below, &at, &format!("{path}/"), found)?;
                    None
                }
                (Body::Data(data), _) if meta.is_file() => {
                    let same = meta.size() == data.len() as u64
                        && fs::read(&at).or_io(|| format!("cannot read `{}`", at.display()))? == **data;
                    (!same).then_some("content differs")
                }
                (_, NodeKind::Symlink { target }) if meta.is_symlink() => {
                    let points = fs::read_link(&at).or_io(|| format!("cannot read `{}`", at.display()))?;
                    (points.as_os_str().as_bytes() != target).then_some("points elsewhere")
                }
                (Body::Nothing, kind)
                    if !meta.is_dir() && !meta.is_file() && !matches!(kind, NodeKind::Symlink { .. }) =>
                {
                    None
                }
                _ => Some("is of another type"),
            },
        };
        found.extend(what.map(|what| Difference { path, what: what.into() }));
    }
    Ok(())
}
