//! Views that a file system keeps: btrfs snapshots, LVM snapshots, reflink clones.
//!
//! Each is made under a name of ours, noted among the pin's remains before it is made, and removed
//! only if the remains name such a thing: what a journal says is not believed further than that.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, Mode, OFlags, ioctl_ficlone, mknodat, openat};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::tree::NodeKind;

use super::client::{Stat, Top, file_system, link_target, look_at};
use super::config::{Checked, OWN_PREFIX, Snapshot};
use super::cut::own_name;
use super::walk::{Found, Visit, Walk};

/// How one place's view is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Method {
    /// A read-only snapshot of the subvolume; the place is `below` it.
    Btrfs { subvolume: PathBuf, below: PathBuf },
    /// A snapshot of the logical volume, mounted read-only; the place is `below` the mount.
    Lvm { volume: String, kind: String, below: PathBuf },
    /// Clones of all files.
    Reflink,
    /// Nothing holds it.
    Watched,
}

/// A view that was made.
pub(super) struct Taken {
    /// What to walk.
    pub(super) path: PathBuf,
    /// For clones, what they were cloned from.
    pub(super) originals: Option<HashMap<Vec<u8>, Stat>>,
}

/// Finds the best method that the settings allow and the machine offers.
///
/// A method asked for by name that cannot be had is an error; `auto` falls back and leaves a note.
/// Whether clones work is found out by a try, which leaves nothing behind, if `may_try`.
pub(super) fn choose(
    checked: &Checked,
    path: &Path,
    top: &Top,
    may_try: bool,
    notes: &mut Vec<String>,
) -> Result<Method> {
    let asked = checked.settings.snapshot;
    let is_auto = asked == Snapshot::Auto;
    if asked == Snapshot::None {
        return Ok(Method::Watched);
    }
    if !checked.settings.one_file_system {
        // A snapshot ends where the file system does; what lies on others would be missing.
        return if is_auto { Ok(Method::Watched) } else { Err(refuse("snapshots need `oneFileSystem: true`")) };
    }
    let mut why_not = Vec::new();
    if is_auto || asked == Snapshot::Btrfs {
        match btrfs(path, top)? {
            Ok(method) => return Ok(method),
            Err(why) => why_not.push(why),
        }
    }
    if is_auto || asked == Snapshot::Lvm {
        match lvm(path)? {
            Ok(method) => return Ok(method),
            Err(why) => why_not.push(why),
        }
    }
    if is_auto || asked == Snapshot::Reflink {
        match reflink(path, top, may_try)? {
            Ok(method) => return Ok(method),
            Err(why) => why_not.push(why),
        }
    }
    if is_auto {
        notes.extend(why_not.into_iter().filter(|why| why.starts_with("btrfs, but")));
        return Ok(Method::Watched);
    }
    Err(refuse(&why_not.join("; ")))
}

fn refuse(why: &str) -> Error {
    Error::new(Kind::Unsupported, format!("no snapshot can be taken: {why}")).hint("snapshot: auto  uses what there is")
}

/// The method, or why not.
type Choice = Result<std::result::Result<Method, String>>;

fn btrfs(path: &Path, top: &Top) -> Choice {
    /// The inode of every subvolume's top.
    const SUBVOLUME_INODE: u64 = 256;
    if file_system(top.fd.as_fd())?.0 != "btrfs" {
        return Ok(Err("the file system is not btrfs".to_owned()));
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(Err("btrfs, but only root may make and remove snapshots".to_owned()));
    }
    if which("btrfs").is_none() {
        return Ok(Err("btrfs, but the tool `btrfs` is not installed".to_owned()));
    }
    let real = real(path)?;
    for above in real.ancestors() {
        let meta = fs::metadata(above).or_io(|| format!("cannot look at `{}`", above.display()))?;
        if meta.ino() == SUBVOLUME_INODE {
            let below = real.strip_prefix(above).unwrap_or(Path::new("")).to_owned();
            return Ok(Ok(Method::Btrfs { subvolume: above.to_owned(), below }));
        }
    }
    Ok(Err("btrfs, but no subvolume was found above the path".to_owned()))
}

fn lvm(path: &Path) -> Choice {
    if which("lvs").is_none() || which("findmnt").is_none() || !rustix::process::geteuid().is_root() {
        return Ok(Err("LVM needs root, `lvs` and `findmnt`".to_owned()));
    }
    let real = real(path)?;
    let found = run("findmnt", &["-n", "-r", "-o", "SOURCE,FSTYPE,TARGET", "-T", &text(&real)?])?;
    let mut fields = found.split_whitespace();
    let (Some(device), Some(kind), Some(target)) = (fields.next(), fields.next(), fields.next()) else {
        return Ok(Err("the mount of the path was not found".to_owned()));
    };
    let Ok(volume) = run("lvs", &["--noheadings", "-o", "lv_full_name", device]) else {
        return Ok(Err(format!("`{device}` is no logical volume")));
    };
    let below = real.strip_prefix(target).unwrap_or(Path::new("")).to_owned();
    Ok(Ok(Method::Lvm { volume: volume.trim().to_owned(), kind: kind.to_owned(), below }))
}

fn reflink(path: &Path, top: &Top, may_try: bool) -> Choice {
    let (kind, _, _) = file_system(top.fd.as_fd())?;
    if !matches!(kind.as_str(), "btrfs" | "xfs" | "bcachefs") {
        return Ok(Err(format!("{kind} has no reflinks")));
    }
    if !may_try {
        return Ok(Ok(Method::Reflink));
    }
    // Only a try tells: XFS may have been made without, and the folder may be read-only.
    let home = clone_home(path)?;
    let Ok(folder) = tempfile::Builder::new().prefix(&format!("{OWN_PREFIX}try-")).tempdir_in(&home) else {
        return Ok(Err(format!("`{}` cannot be written to", home.display())));
    };
    let failed = || format!("cannot write below `{}`", home.display());
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::write(&from, [0; 4096]).or_io(failed)?;
    let (from, to) = (fs::File::open(from).or_io(failed)?, fs::File::create(to).or_io(failed)?);
    Ok(match ioctl_ficlone(&to, &from) {
        Ok(()) => Ok(Method::Reflink),
        Err(_) => Err(format!("this {kind} was made without reflinks")),
    })
}

/// Where clones lie: beside the place if that is the same file system, else within it.
fn clone_home(path: &Path) -> Result<PathBuf> {
    let real = real(path)?;
    let failed = || format!("cannot look at `{}`", real.display());
    let device = fs::metadata(&real).or_io(failed)?.dev();
    match real.parent() {
        Some(parent) if fs::metadata(parent).or_io(failed)?.dev() == device => Ok(parent.to_owned()),
        _ => Ok(real),
    }
}

/// Makes the view of one place, and adds to `remains` what `remove` is to remove.
pub(super) fn take(
    checked: &Checked,
    place: usize,
    method: &Method,
    top: &Top,
    cut: &CutId,
    remains: &mut Vec<String>,
) -> Result<Taken> {
    match method {
        Method::Btrfs { subvolume, below } => {
            let path = subvolume.join(own_name("snapshot", checked, cut, place));
            if path.exists() {
                // The tool would put the new snapshot inside the old one.
                return Err(Error::new(Kind::AlreadyExists, format!("`{}` is there already", path.display())));
            }
            remains.push(format!("btrfs:{}", text(&path)?));
            run("btrfs", &["subvolume", "snapshot", "-r", &text(subvolume)?, &text(&path)?])?;
            Ok(Taken { path: path.join(below), originals: None })
        }
        Method::Lvm { volume, kind, below } => {
            let name = own_name("snapshot", checked, cut, place);
            take_lvm(volume, kind, below, &name, remains)
        }
        Method::Reflink => {
            let path = clone_home(&checked.places[place].path)?.join(own_name("clone", checked, cut, place));
            remains.push(format!("clone:{}", text(&path)?));
            let originals = clone_tree(checked, top, &path)?;
            Ok(Taken { path, originals: Some(originals) })
        }
        Method::Watched => Err(Error::internal("a watched place has no snapshot")),
    }
}

fn take_lvm(volume: &str, kind: &str, below: &Path, name: &Path, remains: &mut Vec<String>) -> Result<Taken> {
    let group = volume.split('/').next().unwrap_or(volume);
    let name = name.to_string_lossy().trim_start_matches('.').replace('.', "-");
    remains.push(format!("lvm:{group}/{name}"));
    // Thin volumes need no size; classic ones overflow when the origin changes by more than this.
    let thin = run("lvcreate", &["-y", "-kn", "-s", "-n", &name, volume]);
    if thin.is_err() {
        run("lvcreate", &["-y", "-s", "-l", "20%ORIGIN", "-n", &name, volume])?;
    }
    let mount = std::env::temp_dir().join(format!(".{name}"));
    fs::create_dir_all(&mount).or_io(|| format!("cannot make `{}`", mount.display()))?;
    remains.push(format!("mount:{}", text(&mount)?));
    let options = if kind == "xfs" { "ro,nouuid" } else { "ro" };
    run("mount", &["-t", kind, "-o", options, &format!("/dev/{group}/{name}"), &text(&mount)?])?;
    Ok(Taken { path: mount.join(below), originals: None })
}

/// Clones every file into a tree of the same shape.
fn clone_tree(checked: &Checked, top: &Top, to: &Path) -> Result<HashMap<Vec<u8>, Stat>> {
    fs::create_dir(to).or_io(|| format!("cannot make `{}`", to.display()))?;
    let stat = look_at(top.fd.as_fd()).or_io(|| format!("cannot look at `{}`", to.display()))?;
    let mut cloner =
        Cloner { top, to, originals: HashMap::from([(Vec::new(), stat)]), xattrs: checked.settings.xattrs };
    Walk::new(checked, &Context::default()).run(top.fd.as_fd(), &mut cloner)?;
    Ok(cloner.originals)
}

struct Cloner<'a> {
    top: &'a Top,
    to: &'a Path,
    originals: HashMap<Vec<u8>, Stat>,
    xattrs: bool,
}

impl Cloner<'_> {
    fn note(&mut self, found: &Found<'_>, path: &Path) -> Result<()> {
        self.originals.insert(found.path.to_vec(), found.stat);
        if self.xattrs {
            for (name, value) in super::client::xattrs(found.at, found.name)? {
                xattr::set(path, OsStr::from_bytes(&name), &value)
                    .or_io(|| format!("cannot set the attributes of `{}`", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Visit for Cloner<'_> {
    fn enter(&mut self, found: &Found<'_>) -> Result<bool> {
        let path = self.to.join(OsStr::from_bytes(found.path));
        fs::create_dir(&path).or_io(|| format!("cannot make `{}`", path.display()))?;
        self.note(found, &path)?;
        Ok(true)
    }

    fn leave(&mut self, _: std::os::fd::BorrowedFd<'_>, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn entry(&mut self, found: &Found<'_>) -> Result<()> {
        let path = self.to.join(OsStr::from_bytes(found.path));
        let failed = || format!("cannot make `{}`", path.display());
        let special = |kind: FileType, device: u64| {
            mknodat(rustix::fs::CWD, &path, kind, Mode::from_raw_mode(0o600), device).map_err(std::io::Error::from)
        };
        match found.stat.kind(|| link_target(found.at, found.name))? {
            NodeKind::File { .. } => {
                let Some(from) = self.top.open_file(found.path)? else { return Ok(()) };
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let clone = openat(rustix::fs::CWD, &path, flags, Mode::from_raw_mode(0o600));
                let clone = clone.and_then(|to| ioctl_ficlone(&to, &from).map(|()| to));
                let clone = clone.map_err(std::io::Error::from).or_io(failed)?;
                // The times are from before the clone: were they newer than its content, the next
                // drain would take a later change for this one.
                let size = look_at(clone.as_fd()).or_io(failed)?.size;
                let stat = Stat { size, ..found.stat };
                return self.note(&Found { at: found.at, name: found.name, path: found.path, stat }, &path);
            }
            NodeKind::Symlink { target } => {
                std::os::unix::fs::symlink(OsStr::from_bytes(&target), &path).or_io(failed)?
            }
            NodeKind::Fifo => special(FileType::Fifo, 0).or_io(failed)?,
            NodeKind::Socket => special(FileType::Socket, 0).or_io(failed)?,
            NodeKind::CharDevice { device } => special(FileType::CharacterDevice, device).or_io(failed)?,
            NodeKind::BlockDevice { device } => special(FileType::BlockDevice, device).or_io(failed)?,
            NodeKind::Dir => return Err(Error::internal("a directory is entered, not met")),
        }
        self.originals.insert(found.path.to_vec(), found.stat);
        Ok(())
    }
}

/// Why the view behind one of the remains is gone; `None` while it is there.
pub(super) fn lost(remain: &str) -> Result<Option<String>> {
    let (kind, name) = remain.split_once(':').unwrap_or((remain, ""));
    match kind {
        "lvm" => {
            let state = run("lvs", &["--noheadings", "-o", "lv_attr,data_percent", name])?;
            let mut fields = state.split_whitespace();
            let is_invalid = fields.next().is_some_and(|state| state.starts_with('S') || state.contains('I'));
            let is_full = fields.next().and_then(|part| part.parse::<f64>().ok()).is_some_and(|part| part >= 100.0);
            Ok((is_invalid || is_full).then(|| format!("the LVM snapshot `{name}` overflowed")))
        }
        _ => Ok((!Path::new(name).exists()).then(|| format!("`{name}` is gone"))),
    }
}

/// Removes what one of the remains names. What is gone already is no failure.
pub(super) fn remove(checked: &Checked, remain: &str) -> Result<()> {
    let (kind, name) = remain.split_once(':').unwrap_or((remain, ""));
    let path = Path::new(name);
    if kind == "lvm" {
        let is_ours = name.split('/').nth(1).is_some_and(|name| name.starts_with(OWN_PREFIX.trim_start_matches('.')));
        if !is_ours {
            return Err(foreign(remain));
        }
        return match run("lvs", &["--noheadings", name]) {
            Ok(_) => run("lvremove", &["-f", name]).map(drop),
            Err(_) => Ok(()),
        };
    }
    let is_ours = path.is_absolute()
        && path.file_name().is_some_and(|name| name.as_bytes().starts_with(OWN_PREFIX.as_bytes()))
        && (kind == "mount" || is_near_a_place(checked, path));
    if !is_ours {
        return Err(foreign(remain));
    }
    if fs::symlink_metadata(path).is_err() {
        return Ok(());
    }
    match kind {
        "btrfs" => run("btrfs", &["subvolume", "delete", name]).map(drop),
        "clone" => fs::remove_dir_all(path).or_io(|| format!("cannot remove `{name}`")),
        "mount" => {
            // Not mounted is as good as unmounted; a mount that stays busy fails the removal below.
            drop(run("umount", &[name]));
            fs::remove_dir(path).or_io(|| format!("cannot remove `{name}`"))
        }
        _ => Err(foreign(remain)),
    }
}

fn foreign(remain: &str) -> Error {
    Error::new(Kind::Corrupt, format!("`{remain}` is nothing that a cut of this store leaves"))
        .hint("look at it and remove it by hand if it is not needed")
}

/// Whether `path` lies directly beside, within or above one of the store's own directories.
fn is_near_a_place(checked: &Checked, path: &Path) -> bool {
    let Some(folder) = path.parent() else { return false };
    checked.places.iter().any(|place| {
        let real = real(&place.path).unwrap_or_else(|_| place.path.clone());
        real.starts_with(folder) || place.path.starts_with(folder)
    })
}

fn real(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).or_io(|| format!("cannot resolve `{}`", path.display()))
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Error::new(Kind::Unsupported, format!("`{}` is not valid UTF-8, snapshots need that", path.display()))
    })
}

fn which(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Runs a tool of the system; its words become the error.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .or_io(|| format!("cannot run `{program}`"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or("").to_owned();
    Err(Error::new(Kind::Io, format!("`{program} {}` failed: {said}", arguments.first().unwrap_or(&"")))
        .context("status", output.status))
}
