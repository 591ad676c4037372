//! Owners, modes, times and extended attributes of what a restore made.
//!
//! Apart because what the target cannot hold (an owner without privileges, an attribute that the
//! file system does not know) is a named loss and not a failure. The order matters: owners first,
//! as changing them drops set-uid bits and capabilities; times last, as everything else moves them.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use stillpoint_core::Result;
use stillpoint_core::tree::{FileTime, Metadata};

use super::place::{handle_path, os_error, shown};

/// Most losses that are listed one by one; the rest is counted.
const LOSSES_MAX: usize = 1000;

/// What could not be reproduced exactly, gathered from all workers.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    listed: Mutex<(Vec<String>, u64)>,
}

impl Losses {
    /// Adds one; `what` is for people.
    pub(crate) fn add(&self, what: String) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if listed.0.len() < LOSSES_MAX {
            listed.0.push(what);
        } else {
            listed.1 += 1;
        }
    }

    /// The list, with a last line that counts what was left out.
    pub(crate) fn into_list(self) -> Vec<String> {
        let (mut list, more) = self.listed.into_inner().unwrap_or_else(PoisonError::into_inner);
        if more > 0 {
            list.push(format!("{more} more"));
        }
        list
    }
}

/// Sets what `meta` says of the open file or directory `handle`, which people know as `name`.
pub(crate) fn apply(handle: &OwnedFd, name: &[u8], meta: &Metadata, owners: bool, losses: &Losses) -> Result<()> {
    if owners && let Err(errno) = rustix::fs::fchown(handle, owner(meta.uid), group(meta.gid)) {
        lose_owner(name, errno, losses)?;
    }
    for (key, value) in &meta.xattrs {
        if let Err(errno) = rustix::fs::fsetxattr(handle, key.as_slice(), value, XattrFlags::empty()) {
            lose_attribute(name, key, errno, losses)?;
        }
    }
    let fail = |errno| os_error(format!("cannot set the mode or times of `{}`", shown(name)), errno);
    rustix::fs::fchmod(handle, mode(meta.mode)).map_err(fail)?;
    rustix::fs::futimens(handle, &times(meta)).map_err(fail)
}

/// Sets what `meta` says of `name` in `around`, which is a link or a special file and cannot be
/// opened. `is_link` leaves out the mode, which links do not have.
pub(crate) fn apply_at(
    around: &OwnedFd,
    name: &[u8],
    meta: &Metadata,
    is_link: bool,
    owners: bool,
    losses: &Losses,
) -> Result<()> {
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    if owners && let Err(errno) = rustix::fs::chownat(around, name, owner(meta.uid), group(meta.gid), nofollow) {
        lose_owner(name, errno, losses)?;
    }
    let fail = |errno| os_error(format!("cannot set the mode or times of `{}`", shown(name)), errno);
    if !meta.xattrs.is_empty() || !is_link {
        // A handle on the entry itself pins it: what another process puts in its place is safe.
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
        let handle = rustix::fs::openat(around, name, flags, Mode::empty()).map_err(fail)?;
        for (key, value) in &meta.xattrs {
            let result = if is_link {
                let mut path = handle_path_bytes(around);
                path.push(b'/');
                path.extend_from_slice(name);
                rustix::fs::lsetxattr(path.as_slice(), key.as_slice(), value, XattrFlags::empty())
            } else {
                rustix::fs::setxattr(handle_path(&handle), key.as_slice(), value, XattrFlags::empty())
            };
            if let Err(errno) = result {
                lose_attribute(name, key, errno, losses)?;
            }
        }
        if !is_link {
            rustix::fs::chmod(handle_path(&handle), mode(meta.mode)).map_err(fail)?;
        }
    }
    rustix::fs::utimensat(around, name, &times(meta), nofollow).map_err(fail)
}

fn handle_path_bytes(handle: &OwnedFd) -> Vec<u8> {
    handle_path(handle).into_bytes()
}

fn owner(uid: u32) -> Option<Uid> {
    (uid != u32::MAX).then(|| Uid::from_raw(uid))
}

fn group(gid: u32) -> Option<Gid> {
    (gid != u32::MAX).then(|| Gid::from_raw(gid))
}

/// The permission bits with set-uid, set-gid and sticky, and nothing else.
pub(crate) fn mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

fn times(meta: &Metadata) -> Timestamps {
    let of = |time: FileTime| Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.min(999_999_999).into() };
    Timestamps { last_access: of(meta.atime), last_modification: of(meta.mtime) }
}

fn lose_owner(name: &[u8], errno: Errno, losses: &Losses) -> Result<()> {
    match errno {
        Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::NOTSUP => {
            losses.add(format!("owner of `{}`: {errno}", shown(name)));
            Ok(())
        }
        errno => Err(os_error(format!("cannot set the owner of `{}`", shown(name)), errno)),
    }
}

fn lose_attribute(name: &[u8], key: &[u8], errno: Errno, losses: &Losses) -> Result<()> {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::IO => {
            Err(os_error(format!("cannot set attribute `{}` of `{}`", shown(key), shown(name)), errno))
        }
        errno => {
            losses.add(format!("attribute `{}` of `{}`: {errno}", shown(key), shown(name)));
            Ok(())
        }
    }
}
