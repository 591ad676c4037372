//! The local directory that a tree is restored into, reached so that nothing in it leads out.
//!
//! Apart from the rest of the restore because it alone stands between hostile input and the
//! machine: names come from buckets, and whoever may write at the target can plant symbolic links
//! while a restore runs. So every path is resolved from one open directory downwards by the kernel
//! with symbolic links forbidden, files are only ever created anew, and no absolute path is used.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use stillpoint_core::tree::{Existing, check_name};
use stillpoint_core::{Error, Kind, Result};

/// The index of the top folder.
pub(crate) const TOP: u32 = 0;

/// Longest relative path handed to the kernel at once; its limit is 4,096 with the final zero.
const PATH_BYTES_MAX: usize = 4000;

/// Folders kept open between uses.
const OPEN_FOLDERS_MAX: usize = 32;

/// Turns an error number into ours, with what was attempted.
pub(crate) fn os_error(message: impl Into<String>, errno: Errno) -> Error {
    Error::io(message, errno.into())
}

/// Shows a name or path from a tree to people.
pub(crate) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// The target directory, and the folders below it that are still in use.
#[derive(Debug)]
pub(crate) struct Place {
    top: Arc<OwnedFd>,
    shown: String,
    existing: Existing,
    folders: Vec<Folder>,
    free: Vec<u32>,
    open: Mutex<VecDeque<(u32, Arc<OwnedFd>)>>,
    /// Off once the kernel said that it lacks `openat2`; then each part is opened on its own.
    whole_paths: AtomicBool,
}

#[derive(Debug)]
struct Folder {
    parent: u32,
    name: Box<[u8]>,
}

impl Place {
    /// Opens the directory `to`, made with its parents if absent.
    ///
    /// # Errors
    /// `AlreadyExists` if it holds anything and `existing` says `Refuse`.
    pub(crate) fn open(to: &Path, existing: Existing) -> Result<Self> {
        let shown = to.display().to_string();
        std::fs::create_dir_all(to).map_err(|error| Error::io(format!("cannot make the directory {shown}"), error))?;
        let place = Self { existing, ..Self::existing_at(to)? };
        if existing == Existing::Refuse && !names_in(&place.top, 1)?.is_empty() {
            return Err(Error::new(Kind::AlreadyExists, format!("the directory {} is not empty", place.shown))
                .hint("restore into an empty directory"));
        }
        Ok(place)
    }

    /// Opens a directory to look at it; nothing is made or changed through it.
    pub(crate) fn existing_at(at: &Path) -> Result<Self> {
        let shown = at.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = rustix::fs::open(at, flags, Mode::empty())
            .map_err(|errno| os_error(format!("cannot open the directory {shown}"), errno))?;
        Ok(Self {
            top: Arc::new(top),
            shown,
            existing: Existing::Refuse,
            folders: vec![Folder { parent: TOP, name: Box::default() }],
            free: Vec::new(),
            open: Mutex::default(),
            whole_paths: AtomicBool::new(true),
        })
    }

    /// What to do with what is found.
    pub(crate) fn existing(&self) -> Existing {
        self.existing
    }

    /// The open top directory.
    pub(crate) fn top(&self) -> &OwnedFd {
        &self.top
    }

    /// Makes the folder `name` in `parent` for this process only; its real mode comes with
    /// [`Place::leave`]. Returns its index and whether it was there before.
    pub(crate) fn enter(&mut self, parent: u32, name: &[u8]) -> Result<(u32, bool)> {
        check_name(name)?;
        let around = self.folder(parent)?;
        let mut there = false;
        let fail = |errno| os_error(format!("cannot make the directory `{}`", shown(name)), errno);
        match rustix::fs::mkdirat(&around, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) if self.existing == Existing::Replace => {
                there = self.keep_or_clear(&around, name)?;
                if !there {
                    rustix::fs::mkdirat(&around, name, Mode::RWXU).map_err(fail)?;
                }
            }
            Err(errno) => return Err(fail(errno)),
        }
        Ok((self.look(parent, name)?, there))
    }

    /// Counts the folder `name` in `parent` in, without making it.
    pub(crate) fn look(&mut self, parent: u32, name: &[u8]) -> Result<u32> {
        check_name(name)?;
        let folder = Folder { parent, name: name.into() };
        if let Some(index) = self.free.pop() {
            self.folders[index as usize] = folder;
            return Ok(index);
        }
        self.folders.push(folder);
        Ok(u32::try_from(self.folders.len() - 1).expect("folders in use are bounded by the plan"))
    }

    /// Keeps a directory that is there, made accessible; removes anything else of that name.
    fn keep_or_clear(&self, around: &OwnedFd, name: &[u8]) -> Result<bool> {
        let fail = |errno| os_error(format!("cannot replace `{}`", shown(name)), errno);
        let stat = rustix::fs::statat(around, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            rustix::fs::unlinkat(around, name, AtFlags::empty()).map_err(fail)?;
            return Ok(false);
        }
        if stat.st_mode & 0o700 != 0o700 {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let handle = rustix::fs::openat(around, name, flags, Mode::empty()).map_err(fail)?;
            rustix::fs::chmod(handle_path(&handle), Mode::RWXU).map_err(fail)?;
        }
        Ok(true)
    }

    /// Forgets a folder in which nothing more is to be done.
    pub(crate) fn leave(&mut self, folder: u32) {
        debug_assert_ne!(folder, TOP, "the top stays");
        self.lock().retain(|(index, _)| *index != folder);
        self.folders[folder as usize].name = Box::default();
        self.free.push(folder);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(u32, Arc<OwnedFd>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of `folder` from the top, for people and for hard links.
    pub(crate) fn path(&self, folder: u32) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = folder;
        while at != TOP {
            let entry = &self.folders[at as usize];
            names.push(entry.name.to_vec());
            at = entry.parent;
        }
        names.reverse();
        names
    }

    /// The open directory of `folder`.
    pub(crate) fn folder(&self, folder: u32) -> Result<Arc<OwnedFd>> {
        if folder == TOP {
            return Ok(Arc::clone(&self.top));
        }
        let mut names = Vec::new();
        let mut at = folder;
        let base = loop {
            if at == TOP {
                break Arc::clone(&self.top);
            }
            if let Some((_, handle)) = self.lock().iter().find(|(index, _)| *index == at) {
                break Arc::clone(handle);
            }
            let entry = &self.folders[at as usize];
            names.push(&entry.name[..]);
            at = entry.parent;
        };
        if names.is_empty() {
            return Ok(base);
        }
        names.reverse();
        let handle = self.descend(base, &names)?;
        let mut open = self.lock();
        if open.len() == OPEN_FOLDERS_MAX {
            open.pop_front();
        }
        open.push_back((folder, Arc::clone(&handle)));
        Ok(handle)
    }

    /// Opens the folder at `names` below the top, whether or not it is in use here.
    pub(crate) fn folder_at(&self, names: &[&[u8]]) -> Result<Arc<OwnedFd>> {
        self.descend(Arc::clone(&self.top), names)
    }

    fn descend(&self, base: Arc<OwnedFd>, names: &[&[u8]]) -> Result<Arc<OwnedFd>> {
        let mut base = base;
        let mut rest = names;
        while !rest.is_empty() {
            let whole = self.whole_paths.load(Ordering::Relaxed);
            let mut path = rest[0].to_vec();
            let mut taken = 1;
            while whole && taken < rest.len() && path.len() + 1 + rest[taken].len() <= PATH_BYTES_MAX {
                path.push(b'/');
                path.extend_from_slice(rest[taken]);
                taken += 1;
            }
            match open_below(&base, &path, whole) {
                Ok(handle) => {
                    base = Arc::new(handle);
                    rest = &rest[taken..];
                }
                Err(Errno::NOSYS | Errno::PERM) if whole => self.whole_paths.store(false, Ordering::Relaxed),
                Err(Errno::LOOP | Errno::XDEV | Errno::NOTDIR) => {
                    let name = shown(&path);
                    return Err(Error::new(Kind::Conflict, format!("`{name}` was replaced while it was restored"))
                        .hint("nothing else may write into the target of a restore"));
                }
                Err(errno) => return Err(os_error(format!("cannot open the directory `{}`", shown(&path)), errno)),
            }
        }
        Ok(base)
    }

    /// Makes `name` in `folder` free to be created: refuses or removes what is there.
    pub(crate) fn clear(&self, around: &OwnedFd, name: &[u8]) -> Result<()> {
        if self.existing == Existing::Refuse {
            return Ok(()); // Creation fails by itself if the name is taken.
        }
        remove(around, name)
    }
}

/// Opens a directory below `base`; `path` has several parts only if `whole`.
fn open_below(base: &OwnedFd, path: &[u8], whole: bool) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if whole {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(base, path, flags, Mode::empty(), resolve)
    } else {
        rustix::fs::openat(base, path, flags, Mode::empty())
    }
}

/// The path by which the kernel reaches an open handle, for calls that take only paths.
pub(crate) fn handle_path(handle: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

/// At most `limit` names in an open directory, without `.` and `..`.
pub(crate) fn names_in(directory: &OwnedFd, limit: usize) -> Result<Vec<Vec<u8>>> {
    let fail = |errno| os_error("cannot list a directory of the target", errno);
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
            if names.len() == limit {
                break;
            }
        }
    }
    Ok(names)
}

/// Removes whatever is called `name`, a directory with all that is in it; absent is fine.
///
/// Symbolic links are removed, never followed.
pub(crate) fn remove(around: &OwnedFd, name: &[u8]) -> Result<()> {
    let fail = |errno| os_error(format!("cannot remove `{}`", shown(name)), errno);
    match rustix::fs::unlinkat(around, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(fail(errno)),
    }
    remove_directory(around, name)
}

/// Empties and removes a directory without recursion, so that depth costs no stack.
fn remove_directory(around: &OwnedFd, name: &[u8]) -> Result<()> {
    let open = |around: &OwnedFd, name: &[u8]| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(around, name, flags, Mode::empty())
            .map_err(|errno| os_error(format!("cannot empty the directory `{}`", shown(name)), errno))
    };
    let fail = |name: &[u8], errno| os_error(format!("cannot remove `{}`", shown(name)), errno);
    // Sub-directories are moved up beside the top of what is removed, so that one level is enough.
    let mut moved = 0_u64;
    let mut waiting = vec![name.to_vec()];
    while let Some(current) = waiting.pop() {
        let handle = open(around, &current)?;
        loop {
            let names = names_in(&handle, 1024)?;
            if names.is_empty() {
                break;
            }
            for inner in names {
                match rustix::fs::unlinkat(&handle, &inner, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(Errno::ISDIR | Errno::PERM) => {}
                    Err(errno) => return Err(fail(&inner, errno)),
                }
                if rustix::fs::unlinkat(&handle, &inner, AtFlags::REMOVEDIR).is_ok() {
                    continue;
                }
                let aside = loop {
                    moved += 1;
                    let aside = format!(".stillpoint-removed-{}-{moved}", std::process::id()).into_bytes();
                    match rustix::fs::renameat_with(&handle, &inner, around, &aside, rustix::fs::RenameFlags::NOREPLACE)
                    {
                        Ok(()) => break aside,
                        Err(Errno::EXIST) => {}
                        Err(errno) => return Err(fail(&inner, errno)),
                    }
                };
                waiting.push(aside);
            }
        }
        rustix::fs::unlinkat(around, &current, AtFlags::REMOVEDIR).map_err(|errno| fail(&current, errno))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_planted_in_the_target_is_not_followed() {
        let scratch = tempfile::tempdir().expect("scratch");
        let (target, outside) = (scratch.path().join("to"), scratch.path().join("outside"));
        std::fs::create_dir(&outside).expect("outside");
        let mut place = Place::open(&target, Existing::Refuse).expect("opens");
        let (folder, there) = place.enter(TOP, b"a").expect("enters");
        assert!(!there);
        std::fs::remove_dir(target.join("a")).expect("removes");
        std::os::unix::fs::symlink(&outside, target.join("a")).expect("links");
        assert_eq!(place.folder(folder).expect_err("refused").kind(), Kind::Conflict);
        place.whole_paths.store(false, Ordering::Relaxed);
        assert_eq!(place.folder(folder).expect_err("refused without openat2").kind(), Kind::Conflict);
    }

    #[test]
    fn replace_removes_links_and_files_in_the_way_but_keeps_directories() {
        let scratch = tempfile::tempdir().expect("scratch");
        let target = scratch.path().join("to");
        std::fs::create_dir_all(target.join("kept")).expect("kept");
        std::os::unix::fs::symlink("/", target.join("link")).expect("links");
        std::fs::write(target.join("file"), b"x").expect("file");
        assert_eq!(Place::open(&target, Existing::Refuse).expect_err("not empty").kind(), Kind::AlreadyExists);
        let mut place = Place::open(&target, Existing::Replace).expect("opens");
        assert!(place.enter(TOP, b"kept").expect("kept").1);
        assert!(!place.enter(TOP, b"link").expect("link").1);
        assert!(!place.enter(TOP, b"file").expect("file").1);
        assert!(target.join("link").symlink_metadata().expect("there").is_dir());
    }

    #[test]
    fn directories_deeper_than_any_path_are_made_and_removed() {
        let scratch = tempfile::tempdir().expect("scratch");
        let mut place = Place::open(&scratch.path().join("to"), Existing::Refuse).expect("opens");
        let name = [b'd'; 200];
        let mut folder = TOP;
        for _ in 0..60 {
            folder = place.enter(folder, &name).expect("enters").0;
        }
        assert_eq!(place.path(folder).len(), 60);
        place.lock().clear();
        place.folder(folder).expect("opens from the top");
        remove(&place.top, &name).expect("removes all");
        assert!(names_in(&place.top, 1).expect("lists").is_empty());
    }
}
