//! The way back: which way, into what, and what if it fails.
//!
//! Decides and keeps the old; the ways themselves are `master`, `keys` and `folder`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{NodeKind, Tree, check_name};

use super::client::Connection;
use super::config::{RestoreBy, Ttl};
use super::drain::{IMAGE, REPLAY, ServerPart, StoreFacts};
use super::master::{self, Feed};
use super::replica::{Purpose, Replica};
use super::server::{self, Node};
use super::spool::Disk;
use super::{Redis, STAMP_KEY, wire};

/// How the names of kept images begin.
const KEPT: &str = "stillpoint-kept";

/// Writes the point, or a part of it, into the target.
pub(super) fn restore(
    driver: &Redis,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    context.check()?;
    check_name(request.restore.as_bytes())?;
    let facts = StoreFacts::read(source)?;
    let endpoint = driver.endpoint()?;
    let (mut control, info) = server::open(&driver.access, &endpoint)?;
    server::check_is_master(&mut control, &info)?;
    refuse_unfit(&mut control, &info, &facts)?;
    let nodes = server::masters(&mut control, &info)?;
    let occupied = occupied(driver, &nodes)?;
    if let (RestoreMode::Fresh, Some(what)) = (request.mode, &occupied) {
        return Err(Error::new(Kind::AlreadyExists, format!("{endpoint} holds {what}"))
            .hint("restore into an empty server, or replace it with --in-place"));
    }
    let bytes = facts.servers.iter().map(|part| part.image_bytes + part.cut_offset - part.image_offset).sum();
    context.expect_bytes(bytes);
    let mut kept = Vec::new();
    if occupied.is_some() {
        for node in &nodes {
            kept.push(keep(driver, node, &request.restore, context)?);
        }
    }
    let outcome = fill(driver, context, source, &facts, &mut control, &info);
    match outcome {
        Ok(mut restored) => {
            restored.kept_old = kept.iter().map(|path| path.display().to_string()).collect();
            Ok(restored)
        }
        Err(error) => Err(undo(driver, &nodes, &kept, error)),
    }
}

/// Loads the point into a target that may be overwritten.
fn fill(
    driver: &Redis,
    context: &Context,
    source: &dyn Tree,
    facts: &StoreFacts,
    control: &mut Connection,
    info: &str,
) -> Result<Restored> {
    let refused = master::refuses(control, info)?;
    let [part] = facts.servers.as_slice() else {
        return Err(Error::new(Kind::Unsupported, "key by key"));
    };
    if let Some(why) = refused {
        return Err(Error::new(Kind::Unsupported, why));
    }
    let image = source.open(&part.path(IMAGE)?)?;
    let feed = Feed { image, image_bytes: Some(size(source, part)?), replay: source.open(&part.path(REPLAY)?)? };
    let bytes = master::feed(control, driver.settings.advertise.as_deref(), feed, context)?;
    control.command(&["DEL", STAMP_KEY])?;
    let items = server::key_count(control)?;
    Ok(Restored { items, bytes, ..Restored::default() })
}

/// Bytes of the image as the tree has it.
fn size(source: &dyn Tree, part: &ServerPart) -> Result<u64> {
    let path = part.path(IMAGE)?;
    match source.get(&path)?.map(|node| node.kind) {
        Some(NodeKind::File { size }) => Ok(size),
        _ => Err(Error::new(Kind::Corrupt, format!("the point lacks `{path}`"))),
    }
}

/// Refuses targets that could not load the point.
fn refuse_unfit(control: &mut Connection, info: &str, facts: &StoreFacts) -> Result<()> {
    let clients = control.ask(&[b"CLIENT", b"LIST"])?.text();
    if clients.lines().any(|line| line.contains(" name=sentinel-")) {
        return Err(Error::new(Kind::Conflict, format!("a Sentinel watches {}", control.endpoint()))
            .hint("it would undo the restore: SENTINEL REMOVE <name> first, and MONITOR again afterwards"));
    }
    let (software, version) = server::version(info);
    let has = match control.ask(&[b"MODULE", b"LIST"])? {
        wire::Reply::Array(modules) => modules.iter().filter_map(server::module).collect(),
        _ => Vec::new(),
    };
    for part in &facts.servers {
        let from = &part.server;
        if !server::can_load((&from.software, &from.version), (&software, &version)) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{software} {version} cannot load what {} {} wrote", from.software, from.version),
            )
            .hint("restore into the same software, of the same version or a later one"));
        }
        for module in &from.modules {
            let name = module.split(' ').next().unwrap_or_default();
            if !has.iter().any(|found: &String| found.split(' ').next() == Some(name)) {
                return Err(Error::new(Kind::Unsupported, format!("the target lacks the module `{name}`"))
                    .hint("load the module there first"));
            }
        }
    }
    Ok(())
}

/// What the target holds, the stamp left out.
pub(super) fn occupied(driver: &Redis, nodes: &[Node]) -> Result<Option<String>> {
    let mut keys = 0;
    let mut functions = 0;
    for node in nodes {
        let mut control = Connection::open(&driver.access, &node.endpoint)?;
        keys += server::key_count(&mut control)?;
        if let wire::Reply::Array(libraries) = control.ask(&[b"FUNCTION", b"LIST"])? {
            functions += libraries.len();
        }
    }
    Ok(match (keys, functions) {
        (0, 0) => None,
        (0, functions) => Some(format!("{functions} libraries of functions")),
        (keys, _) => Some(format!("{keys} keys")),
    })
}

/// Saves what a server holds to a file, before it is replaced.
fn keep(driver: &Redis, node: &Node, restore: &str, context: &Context) -> Result<PathBuf> {
    let folder = driver.settings.keep_old.clone().unwrap_or_else(std::env::temp_dir);
    std::fs::create_dir_all(&folder).or_io(|| format!("cannot create {}", folder.display()))?;
    let at = node.endpoint.to_string().replace([':', '[', ']'], "-");
    let path = unused(&folder, &format!("{KEPT}-{at}-{restore}"));
    let purpose = Purpose {
        access: &driver.access,
        endpoint: &node.endpoint,
        disk: Disk { folder: driver.scratch.clone(), bytes_max: u64::MAX },
        image_only: true,
        collector: None,
    };
    let replica = Replica::attach(purpose, context)?;
    let message = || format!("cannot keep the old content at {}", path.display());
    let mut file = File::create_new(&path).or_io(message)?;
    let mut reader = replica.image().reader();
    let mut piece = vec![0; 1 << 20];
    loop {
        context.check()?;
        let count = reader.read(&mut piece).map_err(|error| match error.downcast::<Error>() {
            Ok(ours) => ours,
            Err(error) => Error::io(message(), error),
        })?;
        if count == 0 {
            break;
        }
        file.write_all(&piece[..count]).or_io(message)?;
    }
    file.sync_all().or_io(message)?;
    Ok(path)
}

/// A name that no file has yet: an earlier try of the same restore may have kept something.
fn unused(folder: &Path, name: &str) -> PathBuf {
    let numbered = |number: u32| folder.join(format!("{name}-{number}.rdb"));
    let first = folder.join(format!("{name}.rdb"));
    std::iter::once(first).chain((2..).map(numbered)).find(|path| !path.exists()).unwrap_or_default()
}

/// Puts the old content back after a failure, or empties a target that was empty.
fn undo(driver: &Redis, nodes: &[Node], kept: &[PathBuf], cause: Error) -> Error {
    let undone = nodes.iter().enumerate().try_for_each(|(at, node)| undo_one(driver, node, kept.get(at)));
    match undone {
        Ok(()) => cause,
        Err(error) => {
            let kept: Vec<_> = kept.iter().map(|path| path.display().to_string()).collect();
            let message = format!("{}; and the old content could not be put back: {error}", cause.message());
            Error::new(cause.kind(), message)
                .source(cause)
                .hint(format!("the old content is kept: {}", kept.join(", ")))
        }
    }
}

fn undo_one(driver: &Redis, node: &Node, kept: Option<&PathBuf>) -> Result<()> {
    let (mut control, _) = server::open(&driver.access, &node.endpoint)?;
    let Some(path) = kept else {
        control.command(&["FLUSHALL", "SYNC"])?;
        control.ask(&[b"FUNCTION", b"FLUSH", b"SYNC"])?;
        return Ok(());
    };
    // The run may have been cancelled; the old content comes back all the same.
    let context = Context::default();
    let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
    let bytes = file.metadata().or_io(|| format!("cannot read {}", path.display()))?.len();
    let feed = Feed { image: Box::new(file), image_bytes: Some(bytes), replay: Box::new(std::io::empty()) };
    master::feed(&mut control, driver.settings.advertise.as_deref(), feed, &context).map(drop)
}
