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
    let beside = tempfile::Builder::new().prefix(".stillpoint-").tempdir_in(above);
    let beside = beside.or_io(|| format!("cannot write beside {}", folder.display()))?;
    let expiry = Expiry::new(driver.settings.ttl, facts.at_millis, now_millis());
    let mut restored = Restored::default();
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
        let kept = PathBuf::from(format!("{}.before-{}", folder.display(), request.restore));
        exchange(&beside, folder, &kept)?;
        if occupied.is_some() {
            restored.kept_old.push(kept.display().to_string());
        } else {
            std::fs::remove_dir_all(&kept).or_io(|| format!("cannot remove the empty {}", kept.display()))?;
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
    let swap = || renameat_with(CWD, new, CWD, folder, RenameFlags::EXCHANGE);
    let (error, undone, old) = match swap() {
        // The old folder has the name of the new one now.
        Ok(()) => match std::fs::rename(new, kept) {
            Ok(()) => return Ok(()),
            Err(error) => (error, swap(), new),
        },
        Err(Errno::INVAL | Errno::NOSYS) => match std::fs::rename(folder, kept) {
            Ok(()) => match std::fs::rename(new, folder) {
                Ok(()) => return Ok(()),
                Err(error) => (error, rustix::fs::rename(kept, folder), kept),
            },
            Err(error) => (error, Ok(()), folder),
        },
        Err(error) => (error.into(), Ok(()), folder),
    };
    match undone {
        Ok(()) => Err(discard(new, failed(error))),
        Err(errno) => Err(failed(error)
            .context("taking it back failed too", errno)
            .hint(format!("the old folder is {}: rename it by hand", old.display()))),
    }
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
}
