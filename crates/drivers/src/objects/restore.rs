//! The way back: into a directory beside and swapped, or into an empty bucket; and verify.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering as AtomicOrdering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{self, Existing, ExtractOptions, Node, NodeKind, Tree, TreePath, check_name};

use super::bucket::generic::Bucket;
use super::bucket::write::{Job, is_try_of};
use super::bucket::{self, crew};
use super::client::{Directory, Place};
use super::drain::SUMMARY_BYTES_MAX;
use super::spool::Sorter;
use super::wire::{OBJECTS, STAMP_KEY, SUMMARY, Summary};
use super::{Objects, Where, keys};

/// Differences beyond this number are not listed.
pub(super) const DIFFERENCES_MAX: usize = 100;

/// Writes the point's objects, or those below `part`.
pub(super) fn restore(
    driver: &Objects,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    check_name(request.restore.as_bytes())?;
    let bytes = tree::read_small(source, &TreePath::root().join(SUMMARY)?, SUMMARY_BYTES_MAX)?;
    let summary = Summary::parse(&bytes)?;
    context.expect_bytes(summary.bytes);
    let top = match summary.mode.is_copy() {
        true => top_of(source, request.part.as_ref())?,
        // There is no folder of objects to look into.
        false if matches!(driver.place, Where::S3(_)) => path_of(request.part.as_ref())?,
        false => {
            return Err(Error::new(
                Kind::Unsupported,
                "the point holds no bytes of these objects, only where they are",
            )
            .hint("restore into a bucket of the same service"));
        }
    };
    match &driver.place {
        Where::Directory(directory) => into_directory(directory, context, source, request, &summary, &top),
        Where::Bucket(bucket) => into_bucket(driver, bucket, context, source, request, &top),
        Where::S3(s3) => {
            bucket::write::restore(&Job { driver, s3, context, source, request, summary: &summary, top: &top })
        }
    }
}

/// The part of the tree that is restored, with `objects` as its first name.
fn path_of(part: Option<&TreePath>) -> Result<TreePath> {
    let mut top = TreePath::root().join(OBJECTS)?;
    let names = part.map_or(&[][..], TreePath::names);
    let names = names.strip_prefix(&[OBJECTS.to_vec()][..]).unwrap_or(names);
    names.iter().try_for_each(|name| top.push(name))?;
    Ok(top)
}

fn top_of(source: &dyn Tree, part: Option<&TreePath>) -> Result<TreePath> {
    let top = path_of(part)?;
    match source.get(&top)? {
        Some(_) => Ok(top),
        None if top.names().len() == 1 => Err(Error::new(Kind::Corrupt, "the point holds no objects of this store")),
        None => Err(Error::new(Kind::NotFound, format!("the point holds nothing at `{top}`"))),
    }
}

fn into_directory(
    directory: &Directory,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
    summary: &Summary,
    top: &TreePath,
) -> Result<Restored> {
    if summary.bucket_only > 0 {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{} objects have keys that no directory can hold", summary.bucket_only),
        )
        .hint("restore into a bucket, or export: the manifest says which key each path stands for"));
    }
    let names = &top.names()[1..];
    let target = if names.is_empty() {
        directory.root.clone()
    } else {
        directory.root.join(OsStr::from_bytes(&keys::unescape(names)?))
    };
    let occupied = if names.is_empty() { directory.occupied()? } else { existing(&target) };
    if let (RestoreMode::Fresh, Some(what)) = (request.mode, &occupied) {
        return Err(Error::new(Kind::AlreadyExists, format!("{} holds {what}", target.display()))
            .hint("restore to another path, or replace it with --in-place"));
    }
    let kept = with_ending(&target, &format!(".before-{}", request.restore));
    if kept.exists() {
        return Err(Error::new(Kind::AlreadyExists, format!("{} is there from an earlier restore", kept.display()))
            .hint("move it away, then restore again"));
    }
    let folder = target.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder).or_io(|| format!("cannot create {}", folder.display()))?;
    // A mount point cannot be renamed over, but an empty one can be filled from within.
    let is_mount = request.mode == RestoreMode::Fresh && is_mount_point(&target, folder);
    let staging = if is_mount { &target } else { folder };
    let (staging, swapping) = names_beside(staging, &target, request)?;
    context.check()?;
    let loaded = load(context, source, top, &staging, summary.escaped > 0).and_then(|restored| {
        context.check()?;
        if is_mount {
            return fill(&staging, &target, restored);
        }
        let what = || format!("cannot rename {}", staging.display());
        std::fs::rename(&staging, &swapping).or_io(what)?;
        // A crash from here on must not be able to bring the first name back.
        std::fs::File::open(folder).and_then(|folder| folder.sync_all()).or_io(what)?;
        swap(&swapping, &target, &kept, occupied.is_some(), restored)
    });
    // What stays behind under these names is replaced by the next try.
    loaded.map_err(|error| without(&staging, without(&with_ending(&staging, "-plain"), error)))
}

/// Where the content is loaded, and what it is called while it is put in place. What an earlier try was loading is
/// removed: it was never in use. What one was putting in place may be the old content, and stops the restore.
fn names_beside(folder: &Path, target: &Path, request: &RestoreRequest) -> Result<(PathBuf, PathBuf)> {
    // Sibling stores may be restored under one name: the target tells the folders apart.
    let mark = hex::encode(&Sha256::digest(target.as_os_str().as_bytes())[..6]);
    let named = |what: &str, name: &str| folder.join(format!(".tmp-stillpoint-{what}-{name}-{mark}"));
    let earlier = request.earlier();
    for name in [&request.restore].into_iter().chain(&earlier) {
        let swapping = named("restore", name);
        if std::fs::symlink_metadata(&swapping).is_ok() {
            return Err(Error::new(Kind::AlreadyExists, format!("{} is there already", swapping.display())).hint(
                format!(
                    "a restore died while it put it in place: it may hold the old content of {}; compare the two, \
                     then move it away",
                    target.display()
                ),
            ));
        }
    }
    for name in &earlier {
        let loading = named("loading", name);
        remove(&loading)?;
        remove(&with_ending(&loading, "-plain"))?;
    }
    Ok((named("loading", &request.restore), named("restore", &request.restore)))
}

/// Removes what a failed restore leaves; a failure of that goes with the first one.
fn without(path: &Path, error: Error) -> Error {
    match remove(path) {
        Ok(()) => error,
        Err(left) => error.context("left behind", left),
    }
}

fn is_mount_point(target: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev());
    matches!((device(target), device(parent)), (Ok(a), Ok(b)) if a != b)
}

/// Moves what was loaded within an empty target to its top.
fn fill(staging: &Path, target: &Path, restored: Restored) -> Result<Restored> {
    let what = || format!("cannot put the objects in place in {}", target.display());
    for entry in std::fs::read_dir(staging).or_io(what)? {
        let entry = entry.or_io(what)?;
        let to = target.join(entry.file_name());
        renameat_with(CWD, entry.path(), CWD, &to, RenameFlags::NOREPLACE)
            .map_err(|error| Error::io(what(), error.into()))?;
    }
    std::fs::remove_dir(staging).or_io(what)?;
    std::fs::File::open(target).and_then(|folder| folder.sync_all()).or_io(what)?;
    Ok(restored)
}

fn existing(path: &Path) -> Option<String> {
    std::fs::symlink_metadata(path).is_ok().then(|| "an object or a folder of objects".to_owned())
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn remove(path: &Path) -> Result<()> {
    let done = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    done.or_io(|| format!("cannot remove {}", path.display()))
}

/// Writes what lies at `top` to `staging`, under the objects' own names, and flushes it.
fn load(context: &Context, source: &dyn Tree, top: &TreePath, staging: &Path, is_escaped: bool) -> Result<Restored> {
    remove(staging)?;
    let mut restored = Restored::default();
    if let Some(Node { kind: NodeKind::File { size }, meta, .. }) = source.get(top)? {
        let what = || format!("cannot write {}", staging.display());
        let mut file = std::fs::File::create_new(staging).or_io(what)?;
        let mut reader = source.open(top)?;
        std::io::copy(&mut reader, &mut file).or_io(what)?;
        let time = std::time::UNIX_EPOCH
            + std::time::Duration::new(u64::try_from(meta.mtime.seconds).unwrap_or(0), meta.mtime.nanos);
        file.set_modified(time).and_then(|()| file.sync_all()).or_io(what)?;
        (restored.items, restored.bytes) = (1, size);
        context.advance(size, 1);
        return Ok(restored);
    }
    let options = ExtractOptions { existing: Existing::Refuse, owners: rustix::process::geteuid().is_root() };
    let extracted = source.extract(top, staging, &options, context)?;
    (restored.items, restored.bytes) = (extracted.files, extracted.bytes);
    let why = "could not be reproduced exactly";
    restored.losses = extracted.losses.into_iter().map(|what| Loss { what, why: why.to_owned() }).collect();
    if is_escaped {
        unescape_folder(staging, &top.names()[1..])?;
    }
    let what = || format!("cannot flush {}", staging.display());
    let folder = std::fs::File::open(staging).or_io(what)?;
    rustix::fs::syncfs(&folder).map_err(|error| Error::io(what(), error.into()))?;
    Ok(restored)
}

/// Gives the files of an extracted folder the names that their keys have.
fn unescape_folder(staging: &Path, above: &[Vec<u8>]) -> Result<()> {
    let plain = with_ending(staging, "-plain");
    remove(&plain)?;
    std::fs::create_dir(&plain).or_io(|| format!("cannot create {}", plain.display()))?;
    let prefix = if above.is_empty() { Vec::new() } else { keys::unescape(above)? };
    rename_below(staging, &plain, &mut above.to_vec(), prefix.len())?;
    remove(staging)?;
    std::fs::rename(&plain, staging).or_io(|| format!("cannot rename {}", plain.display()))
}

fn rename_below(folder: &Path, plain: &Path, names: &mut Vec<Vec<u8>>, prefix: usize) -> Result<()> {
    let what = || format!("cannot rename below {}", folder.display());
    for entry in std::fs::read_dir(folder).or_io(what)? {
        let entry = entry.or_io(what)?;
        names.push(entry.file_name().as_bytes().to_vec());
        if entry.file_type().or_io(what)?.is_dir() {
            rename_below(&entry.path(), plain, names, prefix)?;
        } else {
            let key = keys::unescape(names)?;
            let below = if prefix == 0 { &key[..] } else { key[prefix..].strip_prefix(b"/").unwrap_or_default() };
            if !keys::fits_directory(below) {
                return Err(Error::new(Kind::Corrupt, format!("`{}` is the key of no file", keys::shown(&key))));
            }
            let to = plain.join(OsStr::from_bytes(below));
            let parent = to.parent().unwrap_or(plain);
            std::fs::create_dir_all(parent).or_io(what)?;
            std::fs::rename(entry.path(), &to).or_io(what)?;
        }
        names.pop();
    }
    Ok(())
}

/// Puts what was loaded in the target's place, at once, and keeps what was there. A failure leaves the
/// target as it was, or names where its content is; only what was loaded is ever removed.
fn swap(loaded: &Path, target: &Path, kept: &Path, occupied: bool, mut restored: Restored) -> Result<Restored> {
    let failed = |error: std::io::Error| {
        let busy = matches!(error.kind(), std::io::ErrorKind::ResourceBusy | std::io::ErrorKind::CrossesDevices);
        let error = Error::io(format!("cannot put {} in place", target.display()), error);
        if busy { error.hint("a mount point cannot be replaced: name a directory below it as `path`") } else { error }
    };
    // Only where `loaded` surely holds what was loaded.
    let discarded = |error: std::io::Error| without(loaded, failed(error));
    let taken_back = |error: std::io::Error, undone: rustix::io::Result<()>, old: &Path, new: &Path| match undone {
        Ok(()) => discarded(error),
        Err(errno) => failed(error).context("taking it back failed too", errno).hint(format!(
            "the old content is in {}, the restored content in {}: rename them by hand",
            old.display(),
            new.display()
        )),
    };
    let exchange = || renameat_with(CWD, loaded, CWD, target, RenameFlags::EXCHANGE);
    if std::fs::symlink_metadata(target).is_err() {
        renameat_with(CWD, loaded, CWD, target, RenameFlags::NOREPLACE).map_err(|error| discarded(error.into()))?;
    } else {
        match exchange() {
            Ok(()) => {
                // What was the target has the other name now.
                let is_empty =
                    !occupied && remove(&loaded.join(STAMP_KEY)).is_ok() && std::fs::remove_dir(loaded).is_ok();
                if !is_empty {
                    std::fs::rename(loaded, kept).map_err(|error| taken_back(error, exchange(), loaded, target))?;
                    restored.kept_old.push(kept.display().to_string());
                }
            }
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                in_two_steps(loaded, target, kept)
                    .map_err(|(error, undone)| taken_back(error, undone, kept, loaded))?;
                restored.kept_old.push(kept.display().to_string());
            }
            Err(error) => return Err(discarded(error.into())),
        }
    }
    let folder = target.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .or_io(|| format!("cannot flush {}", folder.display()))?;
    Ok(restored)
}

/// Where names cannot be exchanged. A failure comes with what became of the way back.
fn in_two_steps(
    loaded: &Path,
    target: &Path,
    kept: &Path,
) -> std::result::Result<(), (std::io::Error, rustix::io::Result<()>)> {
    std::fs::rename(target, kept).map_err(|error| (error, Ok(())))?;
    std::fs::rename(loaded, target).map_err(|error| (error, rustix::fs::rename(kept, target)))
}

/// Writes the objects to an empty bucket, several at a time.
fn into_bucket(
    driver: &Objects,
    bucket: &Bucket,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
    top: &TreePath,
) -> Result<Restored> {
    // Later tries come in place, whatever the first one was: what it began in an empty bucket goes on there.
    let begun = bucket.restore_begun()?;
    let is_ours = begun.as_ref().is_some_and(|begun| is_try_of(request, begun));
    if request.mode == RestoreMode::InPlace && !is_ours {
        return Err(Error::new(Kind::Unsupported, "a bucket cannot be replaced in place")
            .hint("restore into an empty bucket or prefix, then point the application there"));
    }
    if !is_ours && let Some(what) = bucket.occupied()? {
        let hint = match begun {
            Some(begun) => format!("the restore `{begun}` was begun there and did not end: empty the prefix"),
            None => "restore into an empty bucket or prefix".to_owned(),
        };
        return Err(Error::new(Kind::AlreadyExists, format!("the bucket holds {what}")).hint(hint));
    }
    bucket.begin_restore(&request.restore)?;
    let items = AtomicU64::new(0);
    let bytes = crew::each(
        driver.settings.connections,
        context,
        |give| walk(source, top, &mut |names, node| give((names.to_vec(), node))),
        |(names, node): (Vec<Vec<u8>>, Node)| {
            let bytes = put_one(driver, bucket, source, &names, &node)?;
            items.fetch_add(1, AtomicOrdering::Relaxed);
            context.advance(bytes, 1);
            Ok(bytes)
        },
    )?;
    bucket.end_restore()?;
    Ok(Restored { items: items.into_inner(), bytes, ..Restored::default() })
}

/// Writes one object, unless an earlier try has.
fn put_one(driver: &Objects, bucket: &Bucket, source: &dyn Tree, names: &[Vec<u8>], node: &Node) -> Result<u64> {
    let mut path = TreePath::root().join(OBJECTS)?;
    names.iter().try_for_each(|name| path.push(name))?;
    let key = keys::unescape(names)?;
    match (bucket.put(&key, &mut source.open(&path)?, &node.meta.xattrs), &node.kind) {
        (Err(error), NodeKind::File { size }) if error.kind() == Kind::AlreadyExists => {
            match compare_one(driver, source, &path, &key)? {
                None => Ok(*size),
                Some(_) => Err(error.hint("restore into an empty bucket or prefix")),
            }
        }
        (written, _) => written,
    }
}

/// Told of one object: the names of its path, and its entry.
pub(super) type Visit<'a> = dyn FnMut(&[Vec<u8>], Node) -> Result<()> + 'a;

/// Calls `visit` with the names below `objects` of every object at or below `top`, in order.
pub(super) fn walk(source: &dyn Tree, top: &TreePath, visit: &mut Visit<'_>) -> Result<()> {
    if let Some(node) = source.get(top)?
        && node.kind != NodeKind::Dir
    {
        return visit(&top.names()[1..], node);
    }
    source.list(top, &mut |node| {
        let path = top.join(&node.name)?;
        match node.kind {
            NodeKind::Dir => walk(source, &path, visit)?,
            NodeKind::File { .. } => visit(&path.names()[1..], node)?,
            _ => return Err(Error::new(Kind::Corrupt, format!("`{path}` is no object"))),
        }
        Ok(true)
    })
}

/// Compares keys and every byte of the objects with the point; of S3 metadata and tags as well.
pub(super) fn verify(driver: &Objects, context: &Context, source: &dyn Tree) -> Result<Verification> {
    if let Where::S3(s3) = &driver.place {
        let summary = Summary::parse(&tree::read_small(source, &TreePath::root().join(SUMMARY)?, SUMMARY_BYTES_MAX)?)?;
        return bucket::compare::verify(driver, s3, context, source, &summary);
    }
    let top = top_of(source, None)?;
    if let Where::Directory(directory) = &driver.place
        && directory.root.is_dir()
        && source.compare(&top, &directory.root, context)?.is_empty()
    {
        let mut checked = 0;
        walk(source, &top, &mut |_, _| {
            checked += 1;
            Ok(())
        })?;
        return Ok(Verification { checked, differences: Vec::new() });
    }
    // Something differs, or only the stamp, an empty folder or an escaped name does: look closely.
    let mut stored = Sorter::new(&driver.scratch)?;
    walk(source, &top, &mut |names, _| {
        let key = keys::unescape(names)?;
        let is_folder = names.last().is_some_and(|last| last == keys::SELF);
        stored.push(keys::sort_key(&keys::escape(&key)), vec![u8::from(is_folder)])
    })?;
    let mut stored = stored.finish()?.entries()?;
    let there = match &driver.place {
        Where::Directory(directory) if !directory.root.is_dir() => Sorter::new(&driver.scratch)?.finish()?,
        _ => driver.listing(context)?.0,
    };
    let mut there = there.entries()?;
    let mut verification = Verification::default();
    let (mut expected, mut found) = (stored.next_entry()?, there.next_entry()?);
    while verification.differences.len() < DIFFERENCES_MAX {
        let order = match (&expected, &found) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let (sort_key, is_folder) = match (order, &expected, &found) {
            (Ordering::Greater, _, Some((key, _))) => (key.clone(), false),
            (_, Some((key, payload)), _) => (key.clone(), payload == &[1]),
            _ => return Err(Error::internal("two lists were compared wrongly")),
        };
        let names = keys::split_sort_key(&sort_key);
        let key = keys::unescape(&names)?;
        match order {
            Ordering::Less => verification.differences.push(format!("`{}` is missing", keys::shown(&key))),
            Ordering::Greater => verification.differences.push(format!("`{}` is not in the point", keys::shown(&key))),
            Ordering::Equal => {
                context.check()?;
                verification.checked += 1;
                let mut path = top.clone();
                super::wire::object_path(&names, is_folder).iter().try_for_each(|name| path.push(name))?;
                if let Some(difference) = compare_one(driver, source, &path, &key)? {
                    verification.differences.push(difference);
                }
            }
        }
        if order.is_le() {
            expected = stored.next_entry()?;
        }
        if order.is_ge() {
            found = there.next_entry()?;
        }
    }
    Ok(verification)
}

pub(super) fn compare_one(driver: &Objects, source: &dyn Tree, path: &TreePath, key: &[u8]) -> Result<Option<String>> {
    let shown = keys::shown(key);
    let Some(mut here) = driver.place.as_place().open(key)? else { return Ok(Some(format!("`{shown}` is missing"))) };
    let mut there = source.open(path)?;
    let (mut a, mut b) = (vec![0; 128 << 10], vec![0; 128 << 10]);
    let mut offset = 0u64;
    loop {
        let what = || format!("cannot compare the object `{shown}`");
        let count = read_full(&mut there, &mut a).or_io(what)?;
        let other = read_full(&mut here, &mut b).or_io(what)?;
        if a[..count] != b[..other] {
            let same = a[..count].iter().zip(&b[..other]).take_while(|(a, b)| a == b).count() as u64;
            return Ok(Some(format!("`{shown}` differs from byte {} on", offset + same)));
        }
        if count == 0 {
            return Ok(None);
        }
        offset += count as u64;
    }
}

fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_that_cannot_keep_the_old_content_is_taken_back() {
        let home = tempfile::tempdir().unwrap();
        let (new, target) = (home.path().join("new"), home.path().join("target"));
        let read = |path: &Path| std::fs::read_to_string(path.join("a")).unwrap_or_default();
        let make = |path: &Path, text: &str| {
            std::fs::create_dir_all(path).unwrap();
            std::fs::write(path.join("a"), text).unwrap();
        };
        make(&new, "new");
        make(&target, "old");
        // The rename to the kept name fails: its folder is absent.
        swap(&new, &target, &home.path().join("absent/kept"), true, Restored::default()).unwrap_err();
        assert_eq!((read(&target).as_str(), new.exists()), ("old", false));
        // The same without exchange, once the old content has been moved.
        let kept = home.path().join("kept");
        let (_, undone) = in_two_steps(&home.path().join("absent"), &target, &kept).unwrap_err();
        assert_eq!((undone, read(&target).as_str(), kept.exists()), (Ok(()), "old", false));
        make(&new, "new");
        let restored = swap(&new, &target, &kept, true, Restored::default()).unwrap();
        assert_eq!((read(&target).as_str(), read(&kept).as_str(), restored.kept_old.len()), ("new", "old", 1));
    }
}
