//! The way back: which way, into what, and what if it fails.
//!
//! Decides and keeps the old; the ways themselves are `master`, `keys` and `folder`.

use std::cell::{Cell, RefCell};
use std::io::BufReader;

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{self, NodeKind, Tree, check_name};

use super::client::{Connection, refusal};
use super::config::RestoreBy;
use super::drain::{self, ACL, IMAGE, REPLAY, ServerPart, StoreFacts};
use super::expiry::{Expiry, RewrittenCommands, RewrittenImage};
use super::kept::{self, Before, Undo, Unfinished};
use super::keys::{self, Writers};
use super::loan::{Loan, Note};
use super::master::{self, Feed, Led};
use super::part::Part;
use super::rdb::Verified;
use super::server::{self, Node};
use super::{Redis, users, wire};

/// The list of users is a line per user.
const ACL_BYTES_MAX: u64 = 64 << 20;
/// How often a server is asked whether it is through.
const LOOK: std::time::Duration = std::time::Duration::from_millis(100);

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
    let part = request.part.as_ref().filter(|part| !part.names().is_empty()).map(Part::parse).transpose()?;
    let part = part.as_ref();
    let mut target = Target::look(driver, &facts)?;
    target.refuse(request.mode, part)?;
    let bytes = facts.servers.iter().map(|part| part.image_bytes + part.cut_offset - part.image_offset).sum();
    context.expect_bytes(bytes);
    let way = way(driver, &mut target, &facts, part)?;
    let unfinished = Unfinished::new(driver, target.control.endpoint(), request);
    let (before, loan) = target.before(driver, &request.restore, part.is_none(), &unfinished, context)?;
    let advertise = driver.settings.advertise.as_deref();
    let led = Led { access: &driver.access, advertise, loan: RefCell::new(loan) };
    let Target { mut control, nodes, follower, occupied, .. } = target;
    // What an earlier try left half written counts as touched: after a further failure the old content comes back.
    let is_touched = Cell::new(before.is_of_earlier);
    let begin = || unfinished.begin(&before);
    let job = Job { driver, context, source, facts: &facts, part, nodes: &nodes, led: &led, begin: &begin, is_touched };
    let outcome = match way {
        Way::Master => job.as_master(&mut control),
        Way::Keys => job.by_keys(&mut control, follower.is_some(), occupied.is_some()),
    };
    let end = || kept::end(driver, &nodes, &led, &unfinished);
    let error = match outcome {
        Ok(mut restored) => {
            end()?;
            restored.kept_old = before.paths();
            restored.losses.extend(led.loan.borrow().loss());
            return Ok(restored);
        }
        // What was not touched needs no undoing: that would undo what others wrote since.
        Err(error) if !job.is_touched.get() => match end() {
            Ok(()) => error,
            Err(stuck) => error.context("the target could not be told that it is over", stuck),
        },
        Err(error) => {
            let is_led = matches!(way, Way::Master);
            let unfinished = &unfinished;
            Undo { driver, nodes: &nodes, before: &before, part, led: &led, is_led, unfinished }.run(error)
        }
    };
    let loss = led.loan.borrow().loss();
    Err(match loss {
        Some(loss) => error.context("lost", format!("{}: {}", loss.what, loss.why)),
        None => error,
    })
}

/// The target as it was found.
struct Target {
    control: Connection,
    info: String,
    nodes: Vec<Node>,
    /// Its modules, if it tells.
    modules: Option<Vec<String>>,
    /// What it says of a restore that was killed, and that it follows still.
    follower: Option<Note>,
    /// What it holds; of a follower, what it held before.
    occupied: Option<String>,
}

impl Target {
    /// Refuses servers that could not load the point.
    fn look(driver: &Redis, facts: &StoreFacts) -> Result<Self> {
        let (mut control, info) = server::open(&driver.access, &driver.endpoint()?)?;
        server::check_is_ready(&mut control, &info)?;
        let follower = Note::of_follower(&mut control, &info)?;
        if follower.is_none() {
            server::check_is_master(&mut control, &info)?;
        }
        let modules = server::modules(&mut control)?;
        refuse_unfit(&mut control, &info, facts, modules.as_deref())?;
        let nodes = server::masters(&mut control, &info)?;
        let occupied = match &follower {
            Some(note) => note.occupied(),
            None => occupied(driver, &nodes)?,
        };
        Ok(Self { control, info, nodes, modules, follower, occupied })
    }

    /// Refuses what would overwrite more than was asked for.
    fn refuse(&self, mode: RestoreMode, part: Option<&Part>) -> Result<()> {
        let endpoint = self.control.endpoint();
        if let (RestoreMode::Fresh, Some(what)) = (mode, &self.occupied) {
            return Err(Error::new(Kind::AlreadyExists, format!("{endpoint} holds {what}"))
                .hint("restore into an empty server, or replace it with --in-place"));
        }
        match (&self.follower, part) {
            (Some(note), Some(_)) => {
                let message = format!("the restore `{}` into {endpoint} was interrupted", note.restore);
                Err(Error::new(Kind::Conflict, message).hint("restore a whole point first: that takes it up"))
            }
            _ => Ok(()),
        }
    }

    /// Keeps what there is, or takes up what was kept.
    fn before(
        &mut self,
        driver: &Redis,
        restore: &str,
        is_whole: bool,
        unfinished: &Unfinished,
        context: &Context,
    ) -> Result<(Before, Loan)> {
        let (mut before, loan) = match &self.follower {
            Some(note) => (Before::noted(note)?, Loan::take_up(&mut self.control, note, restore)?),
            None => {
                let note = Note::read(&mut self.control)?;
                let forgotten = note.map(|note| Loan::take_up(&mut self.control, &note, restore)).transpose()?;
                let save = || Before::save(driver, &self.nodes, restore, self.occupied.is_some(), context);
                let mut before = match (unfinished.earlier()?, &forgotten) {
                    (Some(mut earlier), Some(_)) => {
                        // Whoever let it go by hand may have written since: what it holds now is kept as well.
                        save()?.images().iter().cloned().for_each(|path| earlier.also(path));
                        earlier
                    }
                    (Some(earlier), None) => earlier,
                    (None, _) => save()?,
                };
                let mut loan = Loan::new(Note::new(restore, before.image(), before.stamp.as_deref()));
                if let Some(forgotten) = forgotten {
                    forgotten.put_back(&mut self.control)?;
                    forgotten.end(&mut self.control)?;
                    forgotten.kept().into_iter().for_each(|path| before.also(path));
                    loan.is_password_lost = forgotten.is_password_lost;
                }
                (before, loan)
            }
        };
        if driver.settings.acl && is_whole {
            before.save_users(driver, &self.nodes, restore)?;
        }
        Ok((before, loan))
    }
}

/// How the target is reached.
enum Way {
    Master,
    Keys,
}

/// Why we cannot be the target's master, if so.
fn refused(driver: &Redis, target: &mut Target, facts: &StoreFacts, part: Option<&Part>) -> Result<Option<String>> {
    let [server] = facts.servers.as_slice() else { return Ok(Some("the point is one of a cluster".to_owned())) };
    if part.is_some() {
        return Ok(Some("a part is restored key by key".to_owned()));
    }
    if driver.settings.is_encrypted() {
        // The target would come to us without encryption: TLS between servers wants keys that we lack.
        return Ok(Some("the target is reached by TLS, and would be fed in the clear".to_owned()));
    }
    // A server that loads values of a module that it lacks ends itself; key by key it refuses them.
    if !server.module_types.is_empty() && (server.server.modules.is_none() || target.modules.is_none()) {
        let types: Vec<&str> = server.module_types.iter().map(String::as_str).collect();
        return Ok(Some(format!("whether the target has the modules of {} is not known", types.join(", "))));
    }
    match target.follower {
        // It obeyed once.
        Some(_) => Ok(None),
        None => master::refuses(&mut target.control, &target.info),
    }
}

fn way(driver: &Redis, target: &mut Target, facts: &StoreFacts, part: Option<&Part>) -> Result<Way> {
    let refused = refused(driver, target, facts, part)?;
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
    led: &'a Led<'a>,
    /// To be called before the first write.
    begin: &'a dyn Fn() -> Result<()>,
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
        (self.begin)()?;
        let bytes = self.led.feed(control, feed, self.context, &self.is_touched)?;
        wait_for_rewrite(control, self.context)?;
        let losses = self.acl(control)?;
        save(control, self.context)?;
        Ok(Restored { items: server::key_count(control)?, bytes, losses, ..Restored::default() })
    }

    fn by_keys(&self, control: &mut Connection, is_follower: bool, is_occupied: bool) -> Result<Restored> {
        let is_half_written = self.is_touched.get();
        if is_follower {
            self.led.let_go_loaded(control)?;
        }
        let mut writers = Writers::open(self.driver, self.nodes)?;
        keys::check(&mut writers, self.context, self.source, self.facts, self.part)?;
        (self.begin)()?;
        self.is_touched.set(true);
        if is_occupied || is_half_written {
            keys::clear(&mut writers, self.context, self.part)?;
        }
        let written = keys::restore(&mut writers, self.context, self.source, self.facts, self.part, self.expiry())?;
        let mut losses = self.left_out();
        let mut items = 0;
        for node in self.nodes {
            let mut control = Connection::open(&self.driver.access, &node.endpoint)?;
            items += server::key_count(&mut control)?;
            if self.part.is_none() {
                let of_users = self.acl(&mut control)?;
                losses.extend(of_users.into_iter().filter(|loss| !losses.contains(loss)).collect::<Vec<_>>());
                save(&mut control, self.context)?;
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
        let lines = tree::read_small(self.source, &path, ACL_BYTES_MAX)?;
        let (lines, own) = (String::from_utf8_lossy(&lines), self.driver.access.user());
        if !users::has_any(&lines, own) {
            return Ok(Vec::new());
        }
        users::set(control, own, &lines)?;
        Ok(users::save(control)?.into_iter().collect())
    }

    /// What cannot come back key by key.
    fn left_out(&self) -> Vec<Loss> {
        let lost = |module: &String| Loss {
            what: format!("data of the module type `{module}` that belongs to no key"),
            why: "it comes back only where we are the target's master".to_owned(),
        };
        let servers = self.facts.servers.iter().filter(|_| self.part.is_none());
        servers.flat_map(|server| server.module_data.iter().map(lost)).collect()
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
        std::thread::sleep(LOOK);
    }
    let info = control.info("persistence")?;
    if wire::info(&info, "aof_enabled") == Some("1") && wire::info(&info, "aof_last_bgrewrite_status") != Some("ok") {
        return Err(Error::new(Kind::Io, "the target could not write its append-only file anew")
            .hint("see its log: the disk may be full"));
    }
    Ok(())
}

/// A target without an append-only file writes to its disk when enough has changed, and what it has
/// loaded from a master is no change: until then a crash would leave nothing.
fn save(control: &mut Connection, context: &Context) -> Result<()> {
    let is_wanted = control.config("save")?.is_some_and(|rules| !rules.is_empty());
    if !is_wanted || wire::info(&control.info("persistence")?, "aof_enabled") == Some("1") {
        return Ok(());
    }
    loop {
        context.check()?;
        match control.ask(&[b"BGSAVE"])? {
            wire::Reply::Error(text) if text.contains("progress") || text.contains("child process") => {
                std::thread::sleep(LOOK);
            }
            wire::Reply::Error(text) => return Err(refusal(&[b"BGSAVE"], &text)),
            _ => break,
        }
    }
    loop {
        context.check()?;
        let info = control.info("persistence")?;
        if wire::info(&info, "rdb_bgsave_in_progress") != Some("1") {
            return match wire::info(&info, "rdb_last_bgsave_status") {
                Some("ok") => Ok(()),
                _ => Err(Error::new(Kind::Io, "the target could not write what it loaded to its disk")
                    .hint("see its log: the disk may be full")),
            };
        }
        std::thread::sleep(LOOK);
    }
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
fn refuse_unfit(control: &mut Connection, info: &str, facts: &StoreFacts, modules: Option<&[String]>) -> Result<()> {
    let clients = control.ask(&[b"CLIENT", b"LIST"])?.text();
    if clients.lines().any(|line| line.contains(" name=sentinel-")) {
        return Err(Error::new(Kind::Conflict, format!("a Sentinel watches {}", control.endpoint()))
            .hint("it would undo the restore: SENTINEL REMOVE <name> first, and MONITOR again afterwards"));
    }
    let (software, version) = server::version(info);
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
        refuse_without_modules(part, modules)?;
    }
    Ok(())
}

/// Refuses targets that are known to lack a module, or may lack one that is known to be needed.
fn refuse_without_modules(part: &ServerPart, modules: Option<&[String]>) -> Result<()> {
    let name = |module: &str| module.split(' ').next().unwrap_or_default().to_owned();
    let lacks = |what: String| {
        let error = Error::new(Kind::Unsupported, format!("the target lacks {what}"));
        Err(error.hint("load the module there first"))
    };
    let needed: Vec<String> = part.server.modules.iter().flatten().map(|module| name(module)).collect();
    let Some(modules) = modules else {
        if needed.is_empty() {
            return Ok(());
        }
        let message =
            format!("the point needs the modules {}, and the target does not tell its own", needed.join(", "));
        return Err(Error::new(Kind::PermissionDenied, message).hint("ACL SETUSER <user> +module|list"));
    };
    if let Some(missing) = needed.iter().find(|needed| !modules.iter().any(|module| name(module) == **needed)) {
        return lacks(format!("the module `{missing}`"));
    }
    match part.module_types.first().filter(|_| modules.is_empty()) {
        Some(kind) => lacks(format!("the module whose values are of the type `{kind}`")),
        None => Ok(()),
    }
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
