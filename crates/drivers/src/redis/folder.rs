//! The way back into a folder: what a plain server starts from, with nothing of ours in between.
//!
//! The image and the commands become the two parts of an append-only file, which a server of version 7
//! or later reads in this order and ends up exactly at the cut. Nothing is connected to.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use stillpoint_core::driver::{Context, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::Tree;

use super::Redis;
use super::config::Ttl;
use super::drain::{IMAGE, REPLAY, ServerPart, StoreFacts, now_millis};
use super::expiry::{Expiry, RewrittenCommands, RewrittenImage};
use super::rdb::Verified;
use super::wire::unwrapped;

/// Where servers look for their append-only file.
const PARTS: &str = "appendonlydir";
const BASE: &str = "appendonly.aof.1.base.rdb";
const COMMANDS: &str = "appendonly.aof.1.incr.aof";
const MANIFEST: &str = "appendonly.aof.manifest";
const MANIFEST_TEXT: &str =
    "file appendonly.aof.1.base.rdb seq 1 type b\nfile appendonly.aof.1.incr.aof seq 1 type i\n";
/// The stamp of a folder.
pub(super) const STAMP: &str = "stillpoint-stamp.json";

/// Plants a stamp in the folder.
pub(super) fn stamp(folder: &Path, text: &[u8]) -> Result<()> {
    let message = || format!("cannot plant the stamp in {}", folder.display());
    std::fs::create_dir_all(folder).or_io(message)?;
    let beside = folder.join(format!(".{STAMP}"));
    let mut file = File::create(&beside).or_io(message)?;
    file.write_all(text).and_then(|()| file.sync_all()).or_io(message)?;
    std::fs::rename(&beside, folder.join(STAMP)).or_io(message)?;
    File::open(folder).and_then(|folder| folder.sync_all()).or_io(message)
}

/// What lies in the folder, the stamp left out.
pub(super) fn occupied(folder: &Path) -> Result<Option<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("cannot list {}", folder.display()), error)),
    };
    for entry in entries {
        let name = entry.or_io(|| format!("cannot list {}", folder.display()))?.file_name();
        if name != STAMP {
            return Ok(Some(format!("`{}`", name.display())));
        }
    }
    Ok(None)
}

fn place(folder: &Path, part: &ServerPart) -> PathBuf {
    if part.folder.is_empty() { folder.to_owned() } else { folder.join("shards").join(&part.folder) }.join(PARTS)
}

/// Image and commands of one server, with the times that the policy wants.
fn readers<'a>(
    source: &'a dyn Tree,
    part: &ServerPart,
    expiry: Expiry,
) -> Result<[(&'static str, Box<dyn Read + 'a>); 2]> {
    let image = Box::new(Verified::new(source.open(&part.path(IMAGE)?)?));
    let replay = source.open(&part.path(REPLAY)?)?;
    if expiry == Expiry::Keep {
        return Ok([(BASE, image), (COMMANDS, replay)]);
    }
    let replay = RewrittenCommands::new(BufReader::new(replay), expiry);
    Ok([(BASE, Box::new(RewrittenImage::new(image, expiry)?)), (COMMANDS, Box::new(replay))])
}

/// Writes the whole point beside, and puts it in place at the end.
pub(super) fn restore(
    driver: &Redis,
    folder: &Path,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    let facts = StoreFacts::read(source)?;
    if request.part.as_ref().is_some_and(|part| !part.names().is_empty()) {
        return Err(Error::new(Kind::Unsupported, "a part of a point cannot be written as files")
            .hint("restore the part into a server"));
    }
    let occupied = occupied(folder)?;
    if let (RestoreMode::Fresh, Some(what)) = (request.mode, &occupied) {
        return Err(Error::new(Kind::AlreadyExists, format!("{} holds {what}", folder.display()))
            .hint("restore to another folder, or replace it with --in-place"));
    }
    let above = folder.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(above).or_io(|| format!("cannot create {}", above.display()))?;
    let kept_old = clear_up(folder, above, request)?;
    let beside = beside(folder, &request.restore);
    let beside = tempfile::Builder::new().prefix(&beside).rand_bytes(0).tempdir_in(above);
    let beside = beside.or_io(|| format!("cannot write beside {}", folder.display()))?;
    let expiry = Expiry::new(driver.settings.ttl, facts.at_millis, now_millis());
    let mut restored = Restored { kept_old, ..Restored::default() };
    for part in &facts.servers {
        let parts = place(beside.path(), part);
        std::fs::create_dir_all(&parts).or_io(|| format!("cannot create {}", parts.display()))?;
        for (name, reader) in readers(source, part, expiry)? {
            restored.bytes += write(&parts.join(name), reader, context)?;
        }
        write(&parts.join(MANIFEST), Box::new(MANIFEST_TEXT.as_bytes()), context)?;
        restored.items += part.keys.values().sum::<u64>();
    }
    for part in &facts.servers {
        sync_up_to(&place(beside.path(), part), above)?;
    }
    let beside = beside.keep();
    if folder.exists() {
        let kept = kept_by(folder, &request.restore);
        exchange(&beside, folder, &kept)?;
        if !remove_empty(&kept)? {
            restored.kept_old.push(kept.display().to_string());
        }
    } else if let Err(error) = std::fs::rename(&beside, folder) {
        return Err(discard(&beside, Error::io(format!("cannot put {} in place", folder.display()), error)));
    }
    sync_up_to(folder, above)?;
    Ok(restored)
}

/// Makes the names in a folder, and in all above it up to `above`, outlast a crash.
fn sync_up_to(folder: &Path, above: &Path) -> Result<()> {
    for folder in folder.ancestors() {
        File::open(folder).and_then(|open| open.sync_all()).or_io(|| format!("cannot sync {}", folder.display()))?;
        if folder == above {
            break;
        }
    }
    Ok(())
}

/// Puts `new` in the place of `folder`, and that at `kept`. At once where names can be exchanged: who is
/// killed in between leaves the old folder or the new one. After an error the old one is in its place.
fn exchange(new: &Path, folder: &Path, kept: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("cannot put {} in place", folder.display()), error);
    // First the new folder gets the name of what is kept: so one exchange gives both their names.
    std::fs::rename(new, kept).map_err(|error| discard(new, failed(error)))?;
    match renameat_with(CWD, kept, CWD, folder, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(()),
        Err(Errno::INVAL | Errno::NOSYS) => {}
        Err(errno) => return Err(discard(kept, failed(errno.into()))),
    }
    std::fs::rename(kept, new).map_err(|error| discard(kept, failed(error)))?;
    std::fs::rename(folder, kept).map_err(|error| discard(new, failed(error)))?;
    let Err(error) = std::fs::rename(new, folder) else { return Ok(()) };
    match std::fs::rename(kept, folder) {
        Ok(()) => Err(discard(new, failed(error))),
        Err(stuck) => Err(failed(error)
            .context("taking it back failed too", stuck)
            .hint(format!("the old folder is {}: rename it by hand", kept.display()))),
    }
}

/// Removes a folder that held nothing but a stamp; `false` if a server has written into it meanwhile.
fn remove_empty(folder: &Path) -> Result<bool> {
    if occupied(folder)?.is_some() {
        return Ok(false);
    }
    let message = || format!("cannot remove the empty {}", folder.display());
    match std::fs::remove_file(folder.join(STAMP)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(message(), error)),
        _ => {}
    }
    match std::fs::remove_dir(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(error) => Err(Error::io(message(), error)),
    }
}

/// Where a restore keeps the old folder.
fn kept_by(folder: &Path, restore: &str) -> PathBuf {
    PathBuf::from(format!("{}.before-{restore}", folder.display()))
}

/// Where a restore writes the new folder, before that has its place.
fn beside(folder: &Path, restore: &str) -> String {
    format!(".stillpoint-{}-{restore}", folder.file_name().unwrap_or_default().display())
}

/// Removes what earlier tries of the restore that were killed had written, and names what they kept.
fn clear_up(folder: &Path, above: &Path, request: &RestoreRequest) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    for restore in request.earlier() {
        let left = above.join(beside(folder, &restore));
        match std::fs::remove_dir_all(&left) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(format!("cannot remove {}", left.display()), error)),
        }
        let old = kept_by(folder, &restore);
        if old.exists() {
            kept.push(old.display().to_string());
        }
    }
    Ok(kept)
}

/// Removes what was written, and adds to the error if that fails too.
fn discard(new: &Path, error: Error) -> Error {
    match std::fs::remove_dir_all(new) {
        Ok(()) => error,
        Err(left) => error.context("what was written stays", format!("{}: {left}", new.display())),
    }
}

fn write(path: &Path, mut reader: Box<dyn Read + '_>, context: &Context) -> Result<u64> {
    let message = || format!("cannot write {}", path.display());
    let mut file = File::create_new(path).or_io(message)?;
    let mut piece = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        context.check()?;
        let count = reader.read(&mut piece).map_err(|error| unwrapped(error, "cannot read the point"))?;
        if count == 0 {
            break;
        }
        file.write_all(&piece[..count]).or_io(message)?;
        bytes += count as u64;
        context.advance(count as u64, 0);
    }
    file.sync_all().or_io(message)?;
    Ok(bytes)
}

/// Compares the files with the point, byte by byte; changed times cannot be compared.
pub(super) fn verify(driver: &Redis, folder: &Path, context: &Context, source: &dyn Tree) -> Result<Verification> {
    let facts = StoreFacts::read(source)?;
    let mut verification = Verification::default();
    if driver.settings.ttl != Ttl::Keep {
        return Err(Error::new(
            Kind::Unsupported,
            "files with other times of expiry cannot be compared with the point",
        )
        .hint("start a server from them, and verify that"));
    }
    for part in &facts.servers {
        for (name, mut expected) in readers(source, part, Expiry::Keep)? {
            let path = place(folder, part).join(name);
            let mut found = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    verification.differences.push(format!("{} is missing", path.display()));
                    continue;
                }
                Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
            };
            if !equal(&mut expected, &mut found, context)? {
                verification.differences.push(format!("{} differs", path.display()));
            }
        }
        verification.checked += part.keys.values().sum::<u64>();
    }
    Ok(verification)
}

fn equal(one: &mut dyn Read, other: &mut dyn Read, context: &Context) -> Result<bool> {
    let mut pieces = [vec![0; 1 << 20], vec![0; 1 << 20]];
    loop {
        context.check()?;
        let [a, b] = &mut pieces;
        let count = one.read(a).map_err(|error| unwrapped(error, "cannot read the point"))?;
        if count == 0 {
            let more = other.read(b).or_io(|| "cannot read a file".to_owned())?;
            return Ok(more == 0);
        }
        match other.read_exact(&mut b[..count]) {
            Ok(()) if a[..count] == b[..count] => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(Error::io("cannot read a file", error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_kept_is_left_in_its_place() {
        let home = tempfile::tempdir().unwrap();
        let (new, folder) = (home.path().join("new"), home.path().join("data"));
        for (path, text) in [(&new, "new"), (&folder, "old")] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join("file"), text).unwrap();
        }
        let read = |folder: &Path| std::fs::read_to_string(folder.join("file")).unwrap();
        let error = exchange(&new, &folder, &home.path().join("absent/kept")).unwrap_err();
        assert!(error.message().contains("cannot put"), "{error}");
        assert_eq!(read(&folder), "old");
        assert!(!new.exists());
        std::fs::create_dir(&new).unwrap();
        std::fs::write(new.join("file"), "new").unwrap();
        let kept = home.path().join("kept");
        exchange(&new, &folder, &kept).unwrap();
        assert_eq!((read(&folder), read(&kept), new.exists()), ("new".to_owned(), "old".to_owned(), false));
    }

    #[test]
    fn only_a_folder_that_is_empty_still_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("data");
        stamp(&folder, b"{}").unwrap();
        std::fs::write(folder.join("dump.rdb"), "written meanwhile").unwrap();
        assert!(!remove_empty(&folder).unwrap());
        assert!(folder.join("dump.rdb").exists() && folder.join(STAMP).exists());
        std::fs::remove_file(folder.join("dump.rdb")).unwrap();
        assert!(remove_empty(&folder).unwrap());
        assert!(!folder.exists());
    }

    #[test]
    fn a_later_try_removes_what_a_killed_one_wrote_and_names_what_it_kept() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("data");
        let request =
            |restore: &str| RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: restore.to_owned() };
        for name in [beside(&folder, "r1"), beside(&folder, "r0"), "data.before-r1".to_owned()] {
            std::fs::create_dir(home.path().join(name)).unwrap();
        }
        assert_eq!(clear_up(&folder, home.path(), &request("r1")).unwrap(), Vec::<String>::new());
        let kept = clear_up(&folder, home.path(), &request("r1-try2")).unwrap();
        assert_eq!(kept, [home.path().join("data.before-r1").display().to_string()]);
        assert!(!home.path().join(beside(&folder, "r1")).exists());
        assert!(home.path().join(beside(&folder, "r0")).exists());
    }
}
