//! The way back: extract beside, swap by rename, keep the old; verify; and the stamp.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps, renameat_with, utimensat};
use rustix::io::Errno;
use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::{Existing, ExtractOptions, Metadata, NodeKind, Tree, TreePath};

use super::config::{Checked, OWN_PREFIX, Place};
use super::drain::{DATA, ROOTS};

const STAMP: &str = ".stillpoint-stamp.json";
const STAMP_BYTES_MAX: u64 = 64 * 1024;

/// Restores all places, or the one that the part lies in.
pub(super) fn restore(
    checked: &Checked,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    context.check()?;
    if !is_plain(&request.restore) {
        return Err(Error::new(Kind::Config, format!("`{}` cannot be part of a file name", request.restore)));
    }
    check_shape(checked, source)?;
    let work = Work { context, source, request, restored: Restored::default() };
    match &request.part {
        Some(part) => work.part(checked, part),
        None => work.whole(checked),
    }
}

fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// Where a place's content is in the point.
fn tree_path(place: &Place) -> Result<TreePath> {
    match &place.label {
        None => TreePath::root().join(DATA.as_bytes()),
        Some(label) => TreePath::root().join(ROOTS.as_bytes())?.join(label.as_bytes()),
    }
}

/// Refuses a point of another shape than the settings: nothing may be left out silently.
fn check_shape(checked: &Checked, source: &dyn Tree) -> Result<()> {
    for place in &checked.places {
        let path = tree_path(place)?;
        if source.get(&path)?.is_none_or(|node| node.kind != NodeKind::Dir) {
            let message = format!("the point holds no directory `{path}` of this store");
            return Err(Error::new(Kind::NotFound, message)
                .hint("`path` restores a store that had `path`; `paths` needs the same names as the source"));
        }
    }
    let roots = TreePath::root().join(ROOTS.as_bytes())?;
    if checked.places[0].label.is_none() || source.get(&roots)?.is_none() {
        return Ok(());
    }
    source.list(&roots, &mut |node| {
        let is_known = |place: &Place| place.label.as_deref().is_some_and(|label| label.as_bytes() == node.name);
        if checked.places.iter().any(is_known) {
            return Ok(true);
        }
        let name = String::from_utf8_lossy(&node.name).into_owned();
        Err(Error::new(Kind::Config, format!("the point holds `{name}`, for which `paths` has no place"))
            .hint(format!("paths: {{ {name}: /where/it/belongs }}")))
    })
}

struct Work<'a> {
    context: &'a Context,
    source: &'a dyn Tree,
    request: &'a RestoreRequest,
    restored: Restored,
}

impl Work<'_> {
    fn whole(mut self, checked: &Checked) -> Result<Restored> {
        if self.request.mode == RestoreMode::Fresh {
            for place in &checked.places {
                refuse_content(&place.path)?;
            }
        }
        // Everything is extracted before anything is swapped: a failure has changed nothing yet.
        let mut beside = Vec::new();
        for place in &checked.places {
            self.context.check()?;
            let folder = Beside::make(&place.path, self.request)?;
            self.extract(&tree_path(place)?, &folder.path)?;
            beside.push(folder);
        }
        self.context.check()?;
        let mut swapped: Vec<(&Place, Option<String>)> = Vec::new();
        for (place, folder) in checked.places.iter().zip(beside) {
            match folder.swap_in(&place.path, self.request) {
                Ok(kept) => swapped.push((place, kept)),
                Err(error) => {
                    for (place, kept) in swapped.iter().rev() {
                        swap_back(place, kept.as_deref(), self.request)?;
                    }
                    return Err(error);
                }
            }
        }
        self.restored.kept_old.extend(swapped.into_iter().filter_map(|(_, kept)| kept));
        Ok(self.restored)
    }

    /// Restores one file or directory, named as in the tree or relative to the store's directory.
    fn part(mut self, checked: &Checked, part: &TreePath) -> Result<Restored> {
        let (place, below) = locate(checked, part)?;
        let mut in_tree = tree_path(place)?;
        for name in &below {
            in_tree.push(name)?;
        }
        let node = self.source.get(&in_tree)?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("the point holds no `{part}`"))
                .hint("name a path relative to the store's directory")
        })?;
        if self.request.mode == RestoreMode::Fresh {
            refuse_content(&place.path)?;
        }
        let Some((last, folders)) = below.split_last() else {
            return Err(Error::new(Kind::Config, "the part is the whole store").hint("leave the part out"));
        };
        let mut folder = place.path.clone();
        folder.extend(folders.iter().map(|name| OsStr::from_bytes(name)));
        refuse_links(&place.path, &folder)?;
        fs::create_dir_all(&folder).or_io(|| format!("cannot make `{}`", folder.display()))?;
        let target = folder.join(OsStr::from_bytes(last));
        let mut beside = Beside::make(&place.path.join("part"), self.request)?;
        let made = beside.path.join("part");
        match &node.kind {
            NodeKind::Dir => self.extract(&in_tree, &made)?,
            NodeKind::File { .. } => self.write_file(&in_tree, &node.meta, &made)?,
            NodeKind::Symlink { target } => {
                std::os::unix::fs::symlink(OsStr::from_bytes(target), &made)
                    .or_io(|| format!("cannot make `{}`", made.display()))?;
                self.restored.items += 1;
            }
            _ => return Err(Error::new(Kind::Unsupported, format!("`{part}` is a special file"))),
        }
        if fs::symlink_metadata(&target).is_ok() {
            let kept = place.path.join(format!("{OWN_PREFIX}before-{}", self.request.restore));
            fs::create_dir_all(&kept).or_io(|| format!("cannot make `{}`", kept.display()))?;
            let kept = kept.join(OsStr::from_bytes(last));
            if fs::symlink_metadata(&kept).is_ok() {
                return Err(Error::new(Kind::AlreadyExists, format!("`{}` is there already", kept.display())));
            }
            // Not exchanged: the old content must not come into a folder that a later try removes.
            in_two_steps(&made, &target, &kept).map_err(|swap| match swap {
                Swap::Undone(error) => error,
                Swap::Open(error) => {
                    beside.is_disposable = false;
                    error
                }
            })?;
            self.restored.kept_old.push(kept.display().to_string());
            return Ok(self.restored);
        }
        rename(&made, &target)?;
        Ok(self.restored)
    }

    fn extract(&mut self, from: &TreePath, to: &Path) -> Result<()> {
        let owners = rustix::process::geteuid().is_root();
        let options = ExtractOptions { existing: Existing::Refuse, owners };
        let extracted = self.source.extract(from, to, &options, self.context)?;
        self.restored.items += extracted.files;
        self.restored.bytes += extracted.bytes;
        let losses = extracted.losses.into_iter();
        self.restored.losses.extend(losses.map(|what| Loss { what, why: "cannot be reproduced here".to_owned() }));
        if let Some(node) = self.source.get(from)? {
            dress(to, &node.meta, owners)?;
        }
        Ok(())
    }

    fn write_file(&mut self, from: &TreePath, meta: &Metadata, to: &Path) -> Result<()> {
        let failed = || format!("cannot write `{}`", to.display());
        let mut file = fs::File::create_new(to).or_io(failed)?;
        let bytes = std::io::copy(&mut self.source.open(from)?, &mut file).or_io(failed)?;
        file.sync_all().or_io(failed)?;
        self.context.advance(bytes, 1);
        self.restored.items += 1;
        self.restored.bytes += bytes;
        dress(to, meta, rustix::process::geteuid().is_root())
    }
}

/// Mode, owner, attributes and times of one file or directory.
fn dress(path: &Path, meta: &Metadata, owners: bool) -> Result<()> {
    let failed = || format!("cannot set the attributes of `{}`", path.display());
    if owners {
        std::os::unix::fs::lchown(path, Some(meta.uid), Some(meta.gid)).or_io(failed)?;
    }
    for (name, value) in &meta.xattrs {
        let name = OsStr::from_bytes(name);
        match xattr::set(path, name, value) {
            Err(error) if Errno::from_io_error(&error) != Some(Errno::NOTSUP) => return Err(error).or_io(failed),
            _ => {}
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(meta.mode)).or_io(failed)?;
    set_time(path, meta.mtime.seconds, meta.mtime.nanos.into())
}

fn set_time(path: &Path, seconds: i64, nanos: i64) -> Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(std::io::Error::from)
        .or_io(|| format!("cannot set the time of `{}`", path.display()))
}

/// Finds the place that a part lies in, and the names below it.
fn locate<'a>(checked: &'a Checked, part: &TreePath) -> Result<(&'a Place, Vec<Vec<u8>>)> {
    let names = part.names();
    let first = &checked.places[0];
    if first.label.is_none() {
        let below = if names.first().is_some_and(|name| name == DATA.as_bytes()) { &names[1..] } else { names };
        return Ok((first, below.to_vec()));
    }
    let names = if names.first().is_some_and(|name| name == ROOTS.as_bytes()) { &names[1..] } else { names };
    let label = names.first().map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
    let place = checked.places.iter().find(|place| place.label.as_deref() == Some(label.as_str()));
    let place = place.ok_or_else(|| Error::new(Kind::NotFound, format!("the store has no place `{label}`")))?;
    Ok((place, names[1..].to_vec()))
}

/// Fails if the directory holds anything but our stamp.
fn refuse_content(path: &Path) -> Result<()> {
    let listed = match fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.or_io(|| format!("cannot list `{}`", path.display()))?,
    };
    for entry in listed {
        let name = entry.or_io(|| format!("cannot list `{}`", path.display()))?.file_name();
        if !is_own(&name) {
            return Err(Error::new(Kind::AlreadyExists, format!("`{}` is not empty", path.display()))
                .context("it holds", name.display())
                .hint("restore into an empty directory, or in place if the old content is to be replaced"));
        }
    }
    Ok(())
}

/// What the store's directories hold, for people; `None` if nothing but our own names.
pub(super) fn occupied(checked: &Checked) -> Result<Option<String>> {
    let mut held = Vec::new();
    for place in &checked.places {
        let found = match names(&place.path) {
            Err(error) if error.kind() == Kind::NotFound => continue,
            found => found?.into_iter().filter(|name| !is_own(name)).count(),
        };
        if found > 0 {
            held.push(format!("{found} entries in `{}`", place.path.display()));
        }
    }
    Ok((!held.is_empty()).then(|| held.join(", ")))
}

fn is_own(name: &OsStr) -> bool {
    name.as_bytes().starts_with(OWN_PREFIX.as_bytes())
}

/// Refuses to write through a link: it may lead out of the place.
fn refuse_links(top: &Path, folder: &Path) -> Result<()> {
    for above in folder.ancestors().take_while(|above| *above != top) {
        if above.is_symlink() {
            return Err(Error::new(Kind::Unsupported, format!("`{}` is a link", above.display())));
        }
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).or_io(|| format!("cannot rename `{}` to `{}`", from.display(), to.display()))
}

/// A folder on the same file system as the target, filled before it is swapped in.
///
/// It has two names. Under the first it is filled; what bears it was never in use and may be removed
/// with all it holds. Before anything of the target can come into it, it takes the second one;
/// what bears that may be the only copy of the old content, and is never removed.
struct Beside {
    path: PathBuf,
    /// The second name; for a mount point, whose old content never comes into the folder, unused.
    swap_path: PathBuf,
    /// Whether the target is a mount point: it cannot be renamed, its content is swapped instead.
    is_within: bool,
    /// Whether all that the folder holds was loaded by this restore.
    is_disposable: bool,
}

impl Beside {
    fn make(target: &Path, request: &RestoreRequest) -> Result<Self> {
        let parent = target.parent().ok_or_else(|| Error::internal("a place has a parent"))?;
        fs::create_dir_all(parent).or_io(|| format!("cannot make `{}`", parent.display()))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // What cannot be renamed, or only by others, is filled from within.
        let is_within = is_mount_point(target) || (target.is_dir() && !is_writable(parent));
        let home = if is_within { target } else { parent };
        let path = home.join(format!("{OWN_PREFIX}loading-{name}-{}", request.restore));
        let swap_path = home.join(format!("{OWN_PREFIX}{name}-{}", request.restore));
        if fs::symlink_metadata(&swap_path).is_ok() {
            return Err(Error::new(Kind::AlreadyExists, format!("`{}` is there already", swap_path.display())).hint(
                format!(
                    "a restore died while it put it in place: it may hold the old content of `{}`; compare the two, \
                     then move it away",
                    target.display()
                ),
            ));
        }
        // Left by an attempt of the same restore that died: under this name nothing was ever in use.
        if path.is_dir() {
            fs::remove_dir_all(&path).or_io(|| format!("cannot remove `{}`", path.display()))?;
        }
        fs::create_dir(&path).or_io(|| format!("cannot make `{}`", path.display()))?;
        Ok(Self { path, swap_path, is_within, is_disposable: true })
    }

    /// Puts the folder in the target's place; returns where the old content is, if there was any.
    fn swap_in(mut self, target: &Path, request: &RestoreRequest) -> Result<Option<String>> {
        sync(&self.path)?;
        let kept = if self.is_within { self.swap_within(target, request)? } else { self.swap_beside(target, request)? };
        sync(target)?;
        Ok(kept)
    }

    fn swap_beside(&mut self, target: &Path, request: &RestoreRequest) -> Result<Option<String>> {
        rename(&self.path, &self.swap_path)?;
        self.path.clone_from(&self.swap_path);
        // A crash from here on must not be able to bring the first name back.
        sync(self.path.parent().unwrap_or(&self.path))?;
        let held = if target.is_dir() { names(target)? } else { Vec::new() };
        if held.iter().all(|name| is_own(name)) {
            return self.replace_empty(target, &held).map(|()| None);
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kept = target.with_file_name(format!("{name}.before-{}", request.restore));
        if fs::symlink_metadata(&kept).is_ok() {
            return Err(Error::new(Kind::AlreadyExists, format!("`{}` is there already", kept.display())));
        }
        self.is_disposable = false;
        let exchanged = exchange(&self.path, target, &kept);
        self.is_disposable = matches!(exchanged, Err(Swap::Undone(_)));
        match exchanged {
            Ok(()) => Ok(Some(kept.display().to_string())),
            Err(Swap::Undone(error) | Swap::Open(error)) => Err(error),
        }
    }

    /// Takes the place of a directory that holds nothing but our own names, which stay in it: they may
    /// be a stamp, or what earlier restores kept.
    fn replace_empty(&mut self, target: &Path, held: &[OsString]) -> Result<()> {
        self.is_disposable = false;
        let mut replaced = Ok(());
        for name in held {
            replaced = replaced.and_then(|()| rename(&target.join(name), &self.path.join(name)));
        }
        let Err(error) = replaced.and_then(|()| rename(&self.path, target)) else { return Ok(()) };
        for name in held.iter().filter(|name| fs::symlink_metadata(self.path.join(name)).is_ok()) {
            if rename(&self.path.join(name), &target.join(name)).is_err() {
                let hint = format!("`{}` keeps what was in `{}`", self.path.display(), target.display());
                return Err(error.hint(hint));
            }
        }
        self.is_disposable = true;
        Err(error)
    }

    /// Moves the old entries into a folder of ours and the new ones up; undone at the first failure.
    fn swap_within(&self, target: &Path, request: &RestoreRequest) -> Result<Option<String>> {
        let kept = target.join(format!("{OWN_PREFIX}before-{}", request.restore));
        let mut moved: Vec<(PathBuf, PathBuf)> = Vec::new();
        let mut move_all = |from: &Path, to: &Path| -> Result<()> {
            for name in names(from)?.into_iter().filter(|name| !is_own(name)) {
                rename(&from.join(&name), &to.join(&name))?;
                moved.push((from.join(&name), to.join(&name)));
            }
            Ok(())
        };
        let holds_content = names(target)?.iter().any(|name| !is_own(name));
        if holds_content {
            fs::create_dir(&kept).or_io(|| format!("cannot make `{}`", kept.display()))?;
        }
        if let Err(error) = move_all(target, &kept).and_then(|()| move_all(&self.path, target)) {
            for (from, to) in moved.iter().rev() {
                rename(to, from)?;
            }
            return Err(error);
        }
        let meta = fs::metadata(&self.path).or_io(|| format!("cannot look at `{}`", self.path.display()))?;
        fs::set_permissions(target, meta.permissions())
            .or_io(|| format!("cannot set the mode of `{}`", target.display()))?;
        set_time(target, meta.mtime(), meta.mtime_nsec())?;
        Ok(holds_content.then(|| kept.display().to_string()))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.is_disposable {
            // What cannot be removed stays under a name of ours, which no drain takes for content.
            drop(fs::remove_dir_all(&self.path));
        }
    }
}

/// Why a swap failed.
#[derive(Debug)]
enum Swap {
    /// Everything is where it was.
    Undone(Error),
    /// It could not be taken back; the error says where what is.
    Open(Error),
}

/// Puts `new` in the target's place and the target at `kept`, or leaves both where they were.
fn exchange(new: &Path, target: &Path, kept: &Path) -> std::result::Result<(), Swap> {
    match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
        // The old content has the new one's name now.
        Ok(()) => rename(new, kept).map_err(|error| {
            let undone = renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE);
            taken_back(error, undone, new, target)
        }),
        Err(Errno::INVAL | Errno::NOSYS) => in_two_steps(new, target, kept),
        Err(errno) => Err(Swap::Undone(Error::io(format!("cannot swap `{}` in", target.display()), errno.into()))),
    }
}

/// The same without ever giving the old content the new one's name.
fn in_two_steps(new: &Path, target: &Path, kept: &Path) -> std::result::Result<(), Swap> {
    rename(target, kept).map_err(Swap::Undone)?;
    rename(new, target).map_err(|error| taken_back(error, rustix::fs::rename(kept, target), kept, new))
}

fn taken_back(error: Error, undone: rustix::io::Result<()>, old: &Path, new: &Path) -> Swap {
    match undone {
        Ok(()) => Swap::Undone(error),
        Err(errno) => Swap::Open(error.context("taking it back failed too", errno).hint(format!(
            "the old content is in `{}`, the restored content in `{}`: rename them by hand",
            old.display(),
            new.display()
        ))),
    }
}

/// Undoes the swap of one of several places, after another one failed.
fn swap_back(place: &Place, kept: Option<&str>, request: &RestoreRequest) -> Result<()> {
    let Some(kept) = kept.map(Path::new) else { return Ok(()) };
    if kept.starts_with(&place.path) {
        return Err(Error::new(
            Kind::Io,
            format!("`{}` was restored, another directory was not", place.path.display()),
        )
        .hint(format!("its old content is in `{}`", kept.display())));
    }
    let name = place.path.file_name().unwrap_or_default().to_string_lossy();
    let aside = place.path.with_file_name(format!("{OWN_PREFIX}{name}-undone-{}", request.restore));
    rename(&place.path, &aside)?;
    rename(kept, &place.path)?;
    fs::remove_dir_all(&aside).or_io(|| format!("cannot remove `{}`", aside.display()))
}

fn names(folder: &Path) -> Result<Vec<OsString>> {
    let failed = || format!("cannot list `{}`", folder.display());
    fs::read_dir(folder).or_io(failed)?.map(|entry| Ok(entry.or_io(failed)?.file_name())).collect()
}

fn is_writable(folder: &Path) -> bool {
    rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
}

fn is_mount_point(path: &Path) -> bool {
    let (Ok(own), Some(Ok(above))) = (fs::metadata(path), path.parent().map(fs::metadata)) else { return false };
    own.dev() != above.dev()
}

fn sync(folder: &Path) -> Result<()> {
    let failed = || format!("cannot sync `{}`", folder.display());
    fs::File::open(folder).or_io(failed)?.sync_all().or_io(failed)
}

/// Compares every byte, without our own names and what the settings leave out.
pub(super) fn verify(checked: &Checked, context: &Context, source: &dyn Tree) -> Result<Verification> {
    check_shape(checked, source)?;
    let mut verification = Verification::default();
    for place in &checked.places {
        context.check()?;
        let path = tree_path(place)?;
        verification.checked += count(source, &path, context)?;
        let found = source.compare(&path, &place.path, context)?;
        let counts = |difference: &stillpoint_core::tree::Difference| {
            let path = Path::new(difference.path.trim_start_matches('/'));
            !checked.is_excluded(path)
        };
        verification
            .differences
            .extend(found.iter().filter(|found| counts(found)).map(|found| format!("{}: {}", found.path, found.what)));
    }
    verification.differences.truncate(100);
    Ok(verification)
}

/// Counts what is no directory, with one folder's entries in memory per level.
fn count(source: &dyn Tree, path: &TreePath, context: &Context) -> Result<u64> {
    context.check()?;
    let mut files = 0;
    let mut folders = Vec::new();
    source.list(path, &mut |node| {
        if node.kind == NodeKind::Dir {
            folders.push(node.name)
        } else {
            files += 1
        }
        Ok(true)
    })?;
    for name in folders {
        files += count(source, &path.join(&name)?, context)?;
    }
    Ok(files)
}

/// Plants the stamp at the top of the first place, and leaves the directory's time as it was.
pub(super) fn stamp(checked: &Checked, stamp: &Stamp) -> Result<()> {
    let top = &checked.places[0].path;
    let failed = || format!("cannot write the stamp into `{}`", top.display());
    let before = fs::metadata(top).or_io(failed)?;
    let text = serde_json::to_vec_pretty(stamp).map_err(|error| Error::internal("a stamp serializes").source(error))?;
    let mut file = tempfile::Builder::new().prefix(OWN_PREFIX).tempfile_in(top).or_io(failed)?;
    std::io::Write::write_all(&mut file, &text).or_io(failed)?;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).or_io(failed)?;
    file.as_file().sync_all().or_io(failed)?;
    file.persist(top.join(STAMP)).map_err(|error| error.error).or_io(failed)?;
    sync(top)?;
    set_time(top, before.mtime(), before.mtime_nsec())
}

/// Reads the stamp; `None` if there is none, or no directory.
pub(super) fn read_stamp(checked: &Checked) -> Result<Option<Stamp>> {
    let path = checked.places[0].path.join(STAMP);
    let failed = || format!("cannot read `{}`", path.display());
    let text = match fs::File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
        file => {
            let mut text = String::new();
            let mut limited = std::io::Read::take(file.or_io(failed)?, STAMP_BYTES_MAX);
            std::io::Read::read_to_string(&mut limited, &mut text).or_io(failed)?;
            text
        }
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Error::new(Kind::Corrupt, format!("`{}` is no stamp", path.display()))
            .hint("whoever wrote it must say to which environment this directory belongs")
            .source(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(path: &Path, content: &str) {
        fs::create_dir(path).expect("mkdir");
        fs::write(path.join("file"), content).expect("write");
    }

    fn content(path: &Path) -> String {
        fs::read_to_string(path.join("file")).unwrap_or_default()
    }

    #[test]
    fn a_swap_that_cannot_keep_the_old_content_is_taken_back() {
        let home = tempfile::tempdir().expect("a folder");
        let (new, target) = (home.path().join("new"), home.path().join("target"));
        folder_with(&new, "new");
        folder_with(&target, "old");
        // The rename to the kept name fails: its folder is absent.
        let nowhere = home.path().join("absent/kept");
        for swapped in [exchange(&new, &target, &nowhere), in_two_steps(&new, &target, &nowhere)] {
            assert!(matches!(swapped, Err(Swap::Undone(_))), "{swapped:?}");
            assert_eq!((content(&target), content(&new)), ("old".to_owned(), "new".to_owned()));
        }
        let kept = home.path().join("kept");
        let swapped = in_two_steps(&home.path().join("absent"), &target, &kept);
        assert!(matches!(swapped, Err(Swap::Undone(_))), "{swapped:?}");
        assert_eq!((content(&target), kept.exists()), ("old".to_owned(), false));
        exchange(&new, &target, &kept).expect("swaps");
        assert_eq!((content(&target), content(&kept)), ("new".to_owned(), "old".to_owned()));
    }

    #[test]
    fn a_folder_that_may_hold_the_old_content_is_refused_and_stays() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("store");
        folder_with(&target, "half restored");
        let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: "r1".to_owned() };
        // A load that died is replaced.
        let loading = home.path().join(".stillpoint-loading-store-r1");
        folder_with(&loading, "half");
        drop(Beside::make(&target, &request).expect("makes"));
        assert!(!loading.exists());
        // As a crash between the two renames leaves it.
        let swapped = home.path().join(".stillpoint-store-r1");
        folder_with(&swapped, "the original");
        let refused = Beside::make(&target, &request).map(|_| ()).expect_err("refuses");
        assert_eq!((refused.kind(), content(&swapped).as_str()), (Kind::AlreadyExists, "the original"));
    }

    #[test]
    fn what_an_empty_directory_keeps_comes_back_when_it_cannot_be_replaced() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("store");
        fs::create_dir(&target).expect("mkdir");
        fs::write(target.join(STAMP), "{}").expect("write");
        let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: "r1".to_owned() };
        let mut beside = Beside::make(&target, &request).expect("makes");
        // Written behind our back: the directory cannot be renamed over.
        fs::write(target.join("late"), "x").expect("write");
        beside.replace_empty(&target, &[STAMP.into()]).expect_err("is not empty");
        drop(beside);
        assert!(target.join(STAMP).exists() && target.join("late").exists());
    }
}
