//! The files that a restore is writing: made when their first byte comes, finished after the last.
//!
//! Apart from the reading side, because pieces of one file arrive from several workers in the order
//! of the packs, not of the file. Handles are few: files of one piece are opened and closed by one
//! call, and of the others only the latest stay open.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use stillpoint_core::tree::Metadata;
use stillpoint_core::{Error, Kind, Result};

use super::attributes::{Losses, apply};
use super::place::{Place, os_error, shown};
use super::sparse;

/// Files kept open between two pieces.
const OPEN_FILES_MAX: usize = 128;

/// One file on its way.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The folder, as the place counts.
    pub(crate) folder: u32,
    /// Its name there.
    pub(crate) name: Box<[u8]>,
    /// Its length in bytes.
    pub(crate) size: u64,
    /// What is set at the end.
    pub(crate) meta: Metadata,
    /// Pieces that are still to come.
    pub(crate) left: AtomicU64,
    /// The open handle and the file's identity, once made.
    pub(crate) state: Mutex<SlotState>,
}

/// What is known of a file once it was made.
#[derive(Debug, Default)]
pub(crate) struct SlotState {
    handle: Option<Arc<OwnedFd>>,
    /// Device and inode: a file opened again must be the one that was made.
    identity: Option<(u64, u64)>,
}

/// Writes pieces of files below a place.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    place: &'a Place,
    slots: &'a [Slot],
    owners: bool,
    losses: &'a Losses,
    open: Mutex<VecDeque<u32>>,
}

impl<'a> Files<'a> {
    /// A writer for `slots`.
    pub(crate) fn new(place: &'a Place, slots: &'a [Slot], owners: bool, losses: &'a Losses) -> Self {
        Self { place, slots, owners, losses, open: Mutex::default() }
    }

    /// Writes `data` at `offset` of the file; with the last piece the file is finished.
    pub(crate) fn write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let slot = &self.slots[index as usize];
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > slot.size) {
            let message = format!("the pieces of `{}` are longer than the file", shown(&slot.name));
            return Err(Error::new(Kind::Corrupt, message));
        }
        if offset == 0 && data.len() as u64 == slot.size && slot.left.load(Ordering::Acquire) == 1 {
            let handle = self.make(slot)?;
            write_parts(&handle, slot, 0, data)?;
            slot.left.store(0, Ordering::Release);
            return apply(&handle, &slot.name, &slot.meta, self.owners, self.losses);
        }
        let handle = self.handle(index, slot)?;
        write_parts(&handle, slot, offset, data)?;
        if slot.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(index, slot, &handle)?;
        }
        Ok(())
    }

    /// Makes a file without any piece.
    pub(crate) fn write_empty(&self, index: u32) -> Result<()> {
        let slot = &self.slots[index as usize];
        let handle = self.make(slot)?;
        apply(&handle, &slot.name, &slot.meta, self.owners, self.losses)
    }

    fn finish(&self, index: u32, slot: &Slot, handle: &OwnedFd) -> Result<()> {
        lock(&self.open).retain(|open| *open != index);
        lock(&slot.state).handle = None;
        apply(handle, &slot.name, &slot.meta, self.owners, self.losses)
    }

    /// The handle of a file of several pieces, which is made on first use.
    fn handle(&self, index: u32, slot: &Slot) -> Result<Arc<OwnedFd>> {
        let handle = {
            let mut state = lock(&slot.state);
            if let Some(handle) = &state.handle {
                return Ok(Arc::clone(handle));
            }
            let handle = match state.identity {
                None => {
                    let handle = self.make(slot)?;
                    let stat = rustix::fs::fstat(&handle).map_err(|errno| cannot("look at", slot, errno))?;
                    state.identity = Some((stat.st_dev, stat.st_ino));
                    handle
                }
                Some(identity) => self.open_again(slot, identity)?,
            };
            let handle = Arc::new(handle);
            state.handle = Some(Arc::clone(&handle));
            handle
        };
        let evicted = {
            let mut open = lock(&self.open);
            open.push_back(index);
            if open.len() > OPEN_FILES_MAX { open.pop_front() } else { None }
        };
        if let Some(evicted) = evicted {
            lock(&self.slots[evicted as usize].state).handle = None;
        }
        Ok(handle)
    }

    /// Creates the file anew, as one hole of its full length.
    fn make(&self, slot: &Slot) -> Result<OwnedFd> {
        let around = self.place.folder(slot.folder)?;
        self.place.clear(&around, &slot.name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = rustix::fs::openat(&around, &*slot.name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| cannot("make", slot, errno))?;
        Ok(handle)
    }

    fn open_again(&self, slot: &Slot, identity: (u64, u64)) -> Result<OwnedFd> {
        let around = self.place.folder(slot.folder)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = rustix::fs::openat(&around, &*slot.name, flags, Mode::empty())
            .map_err(|errno| cannot("open", slot, errno))?;
        let stat = rustix::fs::fstat(&handle).map_err(|errno| cannot("look at", slot, errno))?;
        if (stat.st_dev, stat.st_ino) != identity {
            let message = format!("`{}` was replaced while it was restored", shown(&slot.name));
            return Err(Error::new(Kind::Conflict, message).hint("nothing else may write into the target of a restore"));
        }
        Ok(handle)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cannot(what: &str, slot: &Slot, errno: Errno) -> Error {
    os_error(format!("cannot {what} the file `{}`", shown(&slot.name)), errno)
}

/// Writes what is no hole. A hole at the end of the file needs its length set.
fn write_parts(handle: &OwnedFd, slot: &Slot, offset: u64, data: &[u8]) -> Result<()> {
    let mut written_to = 0;
    sparse::parts(data, offset, |range| {
        written_to = range.end;
        let mut rest = &data[range.clone()];
        let mut at = offset + range.start as u64;
        while !rest.is_empty() {
            match rustix::io::pwrite(handle, rest, at) {
                Ok(0) => return Err(cannot("write", slot, Errno::IO)),
                Ok(count) => {
                    rest = &rest[count..];
                    at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(cannot("write", slot, errno)),
            }
        }
        Ok(())
    })?;
    if written_to < data.len() && offset + data.len() as u64 == slot.size {
        // Another worker may have written behind this point only if the file were longer.
        rustix::fs::ftruncate(handle, slot.size).map_err(|errno| cannot("extend", slot, errno))?;
    }
    Ok(())
}
