//! The way back: which way, into what, and what if it fails.
//!
//! Decides and keeps the old; the ways themselves are `master`, `keys` and `folder`.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{self, NodeKind, Tree, check_name};

use super::client::Connection;
use super::config::RestoreBy;
use super::drain::{self, ACL, IMAGE, REPLAY, ServerPart, StoreFacts};
use super::expiry::{Expiry, RewrittenCommands, RewrittenImage, unwrapped};
use super::keys::{self, Writers};
use super::master::{self, Feed};
use super::part::Part;
use super::rdb::Verified;
use super::replica::{Purpose, Replica};
use super::server::{self, Node};
use super::spool::Disk;
use super::{Redis, STAMP_KEY, wire};

/// How the names of kept images begin.
const KEPT: &str = "stillpoint-kept";
/// The list of users is a line per user.
const ACL_BYTES_MAX: u64 = 64 << 20;

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
    let part = request.part.as_ref().filter(|part| !part.names().is_empty()).map(Part::parse).transpose()?;
    let way = way(driver, &mut control, &info, &facts, part.as_ref())?;
    let stamp = driver.raw_stamp()?;
    let mut kept = Vec::new();
    if occupied.is_some() {
        for node in &nodes {
            kept.push(keep(driver, node, &request.restore, context)?);
        }
    }
    let part = part.as_ref();
    let job = Job { driver, context, source, facts: &facts, part, nodes: &nodes, is_touched: Cell::new(false) };
    let outcome = match way {
        Way::Master => job.as_master(&mut control),
        Way::Keys => job.by_keys(occupied.is_some()),
    };
    match outcome {
        Ok(mut restored) => {
            restored.kept_old = kept.iter().map(|path| path.display().to_string()).collect();
            Ok(restored)
        }
        // What was not touched needs no undoing: that would undo what others wrote since.
        Err(error) if !job.is_touched.get() => Err(error),
        Err(error) => Err(Undo { driver, nodes: &nodes, kept: &kept, part, stamp }.run(&way, error)),
    }
}

/// How the target is reached.
enum Way {
    Master,
    Keys,
}

fn way(driver: &Redis, control: &mut Connection, info: &str, facts: &StoreFacts, part: Option<&Part>) -> Result<Way> {
    let refused = match (facts.servers.len(), part) {
        (1, None) if driver.settings.is_encrypted() => {
            // The target would come to us without encryption: TLS between servers wants keys that we lack.
            Some("the target is reached by TLS, and would be fed in the clear".to_owned())
        }
        (1, None) => master::refuses(control, info)?,
        (1, Some(_)) => Some("a part is restored key by key".to_owned()),
        _ => Some("the point is one of a cluster".to_owned()),
    };
    let by_keys = |why: &str| match facts.servers.iter().find_map(|server| server.not_walked.as_ref()) {
        None => Ok(Way::Keys),
        Some(unknown) => {
            Err(Error::new(Kind::Unsupported, format!("{why}; and key by key it cannot be restored: {unknown}"))
                .hint("restore the whole point into a single server of the same version"))
        }
    };
    match (driver.settings.restore_by, refused) {
        (RestoreBy::Keys, _) => by_keys("`restoreBy: keys` is set"),
        (_, None) => Ok(Way::Master),
        (RestoreBy::Auto, Some(why)) => by_keys(&why),
        (RestoreBy::Master, Some(why)) => {
            Err(Error::new(Kind::Unsupported, why).hint("`restoreBy: auto` restores key by key instead"))
        }
    }
}

/// One restore into a target that may be overwritten.
struct Job<'a> {
    driver: &'a Redis,
    context: &'a Context,
    source: &'a dyn Tree,
    facts: &'a StoreFacts,
    part: Option<&'a Part>,
    nodes: &'a [Node],
    /// Whether the target may hold something else than before.
    is_touched: Cell<bool>,
}

impl Job<'_> {
    fn expiry(&self) -> Expiry {
        Expiry::new(self.driver.settings.ttl, self.facts.at_millis, drain::now_millis())
    }

    fn as_master(&self, control: &mut Connection) -> Result<Restored> {
        let [part] = self.facts.servers.as_slice() else { return Err(Error::internal("a cluster has no one master")) };
        let image = Verified::new(self.source.open(&part.path(IMAGE)?)?);
        let replay = self.source.open(&part.path(REPLAY)?)?;
        let bytes = size(self.source, part)?;
        let expiry = self.expiry();
        let feed = if expiry == Expiry::Keep {
            Feed { image: Box::new(image), image_bytes: Some(bytes), replay }
        } else {
            let replay = RewrittenCommands::new(BufReader::new(replay), expiry);
            Feed { image: Box::new(RewrittenImage::new(image, expiry)?), image_bytes: None, replay: Box::new(replay) }
        };
        let bytes =
            master::feed(control, self.driver.settings.advertise.as_deref(), feed, self.context, &self.is_touched)?;
        wait_for_rewrite(control, self.context)?;
        control.command(&["DEL", STAMP_KEY])?;
        let losses = self.acl(control)?;
        Ok(Restored { items: server::key_count(control)?, bytes, losses, ..Restored::default() })
    }

    fn by_keys(&self, is_occupied: bool) -> Result<Restored> {
        let mut writers = Writers::open(self.driver, self.nodes)?;
        keys::check(&mut writers, self.context, self.source, self.facts, self.part)?;
        self.is_touched.set(true);
        if is_occupied {
            keys::clear(&mut writers, self.context, self.part)?;
        }
        let written = keys::restore(&mut writers, self.context, self.source, self.facts, self.part, self.expiry())?;
        let mut losses = Vec::new();
        let mut items = 0;
        for node in self.nodes {
            let mut control = Connection::open(&self.driver.access, &node.endpoint)?;
            items += server::key_count(&mut control)?;
            if self.part.is_none() {
                losses.extend(self.acl(&mut control)?);
            }
        }
        let items = if self.part.is_some() { written.keys } else { items };
        Ok(Restored { items, bytes: written.bytes, losses, ..Restored::default() })
    }

    /// Brings the users back, but for `default`: its password is the target's own.
    fn acl(&self, control: &mut Connection) -> Result<Vec<Loss>> {
        let Some(part) = self.facts.servers.first().filter(|_| self.driver.settings.acl) else { return Ok(Vec::new()) };
        let path = part.path(ACL)?;
        if self.source.get(&path)?.is_none() {
            let why = "the backup's user might not ask for it (+acl|list)".to_owned();
            return Ok(vec![Loss { what: "ACL users".to_owned(), why }]);
        }
        let text = tree::read_small(self.source, &path, ACL_BYTES_MAX)?;
        for line in String::from_utf8_lossy(&text).lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let ["user", name, rules @ ..] = words.as_slice() else { continue };
            if *name == "default" || *name == self.driver.access.user() {
                continue;
            }
            // A user that is there already must not keep rules of its own.
            control.command(&["ACL", "DELUSER", name])?;
            let mut command = vec!["ACL", "SETUSER", name];
            command.extend(rules);
            control.command(&command)?;
        }
        Ok(Vec::new())
    }
}

/// A target that keeps an append-only file writes it anew after the load; until then a crash would
/// bring the old content back.
fn wait_for_rewrite(control: &mut Connection, context: &Context) -> Result<()> {
    loop {
        context.check()?;
        let info = control.info("persistence")?;
        let is = |name: &str| wire::info(&info, name) == Some("1");
        if !is("aof_enabled") || !(is("aof_rewrite_in_progress") || is("aof_rewrite_scheduled")) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let info = control.info("persistence")?;
    if wire::info(&info, "aof_enabled") == Some("1") && wire::info(&info, "aof_last_bgrewrite_status") != Some("ok") {
        return Err(Error::new(Kind::Io, "the target could not write its append-only file anew")
            .hint("see its log: the disk may be full"));
    }
    Ok(())
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
    let databases: Option<u32> = control.config("databases")?.and_then(|count| count.parse().ok());
    for part in &facts.servers {
        let from = &part.server;
        // A server that loads a database beyond its last one ends itself.
        if let (Some(count), Some(highest)) = (databases, part.keys.keys().max())
            && *highest >= count
        {
            return Err(Error::new(
                Kind::Config,
                format!("the target has {count} databases, the point uses {}", highest + 1),
            )
            .hint("raise `databases` in the target's configuration"));
        }
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
        disk: Disk::new(driver.scratch.clone(), u64::MAX, 1),
        image_only: true,
        collector: None,
    };
    let replica = Replica::attach(purpose, context)?;
    let message = || format!("cannot keep the old content at {}", path.display());
    // For nobody else to read; and what is there under its name is whole.
    let mut file = tempfile::Builder::new().prefix(".stillpoint-kept-").tempfile_in(&folder).or_io(message)?;
    let mut reader = replica.image().reader();
    let mut piece = vec![0; 1 << 20];
    loop {
        context.check()?;
        let count = reader.read(&mut piece).map_err(|error| unwrapped(error, "cannot keep the old content"))?;
        if count == 0 {
            break;
        }
        file.write_all(&piece[..count]).or_io(message)?;
    }
    file.as_file().sync_all().or_io(message)?;
    file.persist_noclobber(&path).map_err(|error| Error::io(message(), error.error))?;
    File::open(&folder).and_then(|folder| folder.sync_all()).or_io(message)?;
    Ok(path)
}

/// A name that no file has yet: an earlier try of the same restore may have kept something.
fn unused(folder: &Path, name: &str) -> PathBuf {
    let numbered = |number: u32| folder.join(format!("{name}-{number}.rdb"));
    let first = folder.join(format!("{name}.rdb"));
    std::iter::once(first).chain((2..).map(numbered)).find(|path| !path.exists()).unwrap_or_default()
}

/// What puts the old content back after a failure, or empties a target that was empty.
struct Undo<'a> {
    driver: &'a Redis,
    nodes: &'a [Node],
    kept: &'a [PathBuf],
    /// All that may be touched, where a part was restored.
    part: Option<&'a Part>,
    /// The stamp that the target bore: images are fed without it.
    stamp: Option<Vec<u8>>,
}

impl Undo<'_> {
    fn run(&self, way: &Way, cause: Error) -> Error {
        let undone = match way {
            Way::Master => {
                self.nodes.iter().enumerate().try_for_each(|(at, node)| self.as_master(node, self.kept.get(at)))
            }
            Way::Keys => self.by_keys(),
        };
        match undone.and_then(|()| self.stamp()) {
            Ok(()) => cause,
            Err(error) => {
                let kept: Vec<_> = self.kept.iter().map(|path| path.display().to_string()).collect();
                let message = format!("{}; and the old content could not be put back: {error}", cause.message());
                Error::new(cause.kind(), message)
                    .source(cause)
                    .hint(format!("the old content is kept: {}", kept.join(", ")))
            }
        }
    }

    /// The run may have been cancelled; the old content comes back all the same: no context is asked.
    fn as_master(&self, node: &Node, kept: Option<&PathBuf>) -> Result<()> {
        let (mut control, _) = server::open(&self.driver.access, &node.endpoint)?;
        let Some(path) = kept else {
            control.command(&["FLUSHALL", "SYNC"])?;
            control.ask(&[b"FUNCTION", b"FLUSH", b"SYNC"])?;
            return Ok(());
        };
        let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
        let bytes = file.metadata().or_io(|| format!("cannot read {}", path.display()))?.len();
        let feed = Feed { image: Box::new(file), image_bytes: Some(bytes), replay: Box::new(std::io::empty()) };
        let advertise = self.driver.settings.advertise.as_deref();
        master::feed(&mut control, advertise, feed, &Context::default(), &Cell::default()).map(drop)
    }

    fn by_keys(&self) -> Result<()> {
        let context = Context::default();
        let mut writers = Writers::open(self.driver, self.nodes)?;
        keys::clear(&mut writers, &context, self.part)?;
        for path in self.kept {
            let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
            keys::put_back(&mut writers, Box::new(file), &context, self.part)?;
        }
        Ok(())
    }

    /// A part leaves the stamp alone; all else takes it away.
    fn stamp(&self) -> Result<()> {
        match &self.stamp {
            Some(stamp) if self.part.is_none() => self.driver.write_stamp(stamp),
            _ => Ok(()),
        }
    }
}
