//! What a target was before a restore, and how it becomes that again after a failure.
//!
//! Contents and users are saved before the first write; what an earlier try saved that was killed is
//! taken up instead of the half that it left. That there is a half is told by the note of the target, if
//! it follows still, and by a file beside what was saved, as long as the restore has not ended.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::{Context, RestoreRequest};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::config::Endpoint;
use super::keys::{self, Writers};
use super::loan::Note;
use super::master::{Feed, Led};
use super::part::Part;
use super::replica::{Purpose, Replica};
use super::server::{self, Node};
use super::wire::unwrapped;
use super::{Redis, users};

/// How the names of kept files begin.
const KEPT: &str = "stillpoint-kept";

/// What a target was.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Before {
    /// What each server held; none if they held nothing.
    images: Vec<PathBuf>,
    /// What an earlier try saved on another machine.
    elsewhere: Option<PathBuf>,
    /// The users of each server, where users are restored as well.
    users: Vec<String>,
    /// What else is kept, for people: lists of users.
    pub others: Vec<PathBuf>,
    /// The stamp that it bore: images are loaded without it.
    pub stamp: Option<Vec<u8>>,
    /// Whether an earlier try saved it, so that the target holds a half.
    #[serde(skip)]
    pub is_of_earlier: bool,
}

impl Before {
    /// Saves what the servers hold, if they hold anything.
    pub fn save(driver: &Redis, nodes: &[Node], restore: &str, is_occupied: bool, context: &Context) -> Result<Self> {
        let mut before = Self { stamp: driver.raw_stamp()?, ..Self::default() };
        for node in nodes.iter().filter(|_| is_occupied) {
            before.images.push(image(driver, node, restore, context)?);
        }
        Ok(before)
    }

    /// What the note of a restore that was killed says.
    pub fn noted(note: &Note) -> Result<Self> {
        let (images, elsewhere): (Vec<_>, Vec<_>) = note.kept.iter().cloned().partition(|path| path.exists());
        let elsewhere = elsewhere.into_iter().next();
        Ok(Self { images, elsewhere, stamp: note.stamp()?, is_of_earlier: true, ..Self::default() })
    }

    /// Saves the users as well, unless an earlier try did before it changed them.
    pub fn save_users(&mut self, driver: &Redis, nodes: &[Node], restore: &str) -> Result<()> {
        if !self.users.is_empty() {
            return Ok(());
        }
        for node in nodes {
            let (mut control, _) = server::open(&driver.access, &node.endpoint)?;
            let lines = users::list(&mut control)?;
            if users::has_any(&lines, driver.access.user()) {
                self.others.push(keep(driver, node, restore, "acl", &mut lines.as_bytes(), &Context::default())?);
            }
            self.users.push(lines);
        }
        Ok(())
    }

    /// The image of the one server, for its note.
    pub fn image(&self) -> Option<PathBuf> {
        self.images.first().or(self.elsewhere.as_ref()).cloned()
    }

    /// What the servers held.
    pub fn images(&self) -> &[PathBuf] {
        &self.images
    }

    /// Names what is kept beside.
    pub fn also(&mut self, path: PathBuf) {
        if !self.images.contains(&path) && !self.others.contains(&path) {
            self.others.push(path);
        }
    }

    /// Everything that was kept, for people.
    pub fn paths(&self) -> Vec<String> {
        let all = self.images.iter().chain(&self.elsewhere).chain(&self.others);
        all.map(|path| path.display().to_string()).collect()
    }
}

fn image(driver: &Redis, node: &Node, restore: &str, context: &Context) -> Result<PathBuf> {
    let replica = Replica::attach(Purpose::image(driver, node, 1), context)?;
    keep(driver, node, restore, "rdb", &mut replica.image().reader(), context)
}

fn folder(driver: &Redis) -> &Path {
    driver.settings.keep_old.as_ref().unwrap_or(&driver.kept)
}

/// The name of what a restore keeps of a server.
fn name(endpoint: &Endpoint, restore: &str) -> String {
    format!("{KEPT}-{}-{restore}", endpoint.to_string().replace([':', '[', ']'], "-"))
}

/// The file that says what a target was, from the first write of a restore until it has ended.
pub(super) struct Unfinished {
    own: PathBuf,
    /// Those of earlier tries, the latest first.
    earlier: Vec<PathBuf>,
}

impl Unfinished {
    /// Of this restore.
    pub fn new(driver: &Redis, endpoint: &Endpoint, request: &RestoreRequest) -> Self {
        let path = |restore: &str| folder(driver).join(format!("{}.unfinished", name(endpoint, restore)));
        Self { own: path(&request.restore), earlier: request.earlier().iter().map(|restore| path(restore)).collect() }
    }

    /// What the target was before an earlier try, if that was killed after it had begun to write.
    pub fn earlier(&self) -> Result<Option<Before>> {
        for path in &self.earlier {
            let bytes = match std::fs::read(path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
            };
            let before = serde_json::from_slice(&bytes).map(|before| Before { is_of_earlier: true, ..before });
            return before.map(Some).map_err(|error| {
                Error::new(Kind::Corrupt, format!("{} is damaged", path.display()))
                    .source(error)
                    .hint("it says where an earlier try kept the old content; without it, what is there now counts")
            });
        }
        Ok(None)
    }

    /// Right before the first write.
    pub fn begin(&self, before: &Before) -> Result<()> {
        let message = || format!("cannot write {}", self.own.display());
        let text = serde_json::to_vec(before).map_err(|e| Error::internal("a note does not serialize").source(e))?;
        let folder = self.own.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(folder).or_io(|| format!("cannot create {}", folder.display()))?;
        let mut file = tempfile::Builder::new().prefix(".stillpoint-kept-").tempfile_in(folder).or_io(message)?;
        file.write_all(&text).and_then(|()| file.as_file().sync_all()).or_io(message)?;
        file.persist(&self.own).map_err(|error| Error::io(message(), error.error))?;
        File::open(folder).and_then(|folder| folder.sync_all()).or_io(message)
    }

    /// The target is what it shall be, or again what it was.
    pub fn end(&self) -> Result<()> {
        for path in std::iter::once(&self.own).chain(&self.earlier) {
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(format!("cannot remove {}", path.display()), error)),
            }
        }
        Ok(())
    }
}

/// Ends a restore: nothing of the target or beside what was kept says any more that it runs.
pub(super) fn end(driver: &Redis, nodes: &[Node], led: &Led<'_>, unfinished: &Unfinished) -> Result<()> {
    // Only a single server bears a note.
    if let [node] = nodes {
        let (mut control, _) = server::open(&driver.access, &node.endpoint)?;
        led.loan.borrow().end(&mut control)?;
    }
    unfinished.end()
}

/// Writes what is to be kept to a file, for nobody else to read; what is there under its name is whole.
fn keep(
    driver: &Redis,
    node: &Node,
    restore: &str,
    ending: &str,
    reader: &mut dyn Read,
    context: &Context,
) -> Result<PathBuf> {
    let folder = folder(driver);
    std::fs::create_dir_all(folder).or_io(|| format!("cannot create {}", folder.display()))?;
    let path = unused(folder, &name(&node.endpoint, restore), ending);
    let message = || format!("cannot keep the old content at {}", path.display());
    let mut file = tempfile::Builder::new().prefix(".stillpoint-kept-").tempfile_in(folder).or_io(message)?;
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
    File::open(folder).and_then(|folder| folder.sync_all()).or_io(message)?;
    Ok(path)
}

/// A name that no file has yet: an earlier try of the same restore may have kept something.
fn unused(folder: &Path, name: &str, ending: &str) -> PathBuf {
    let numbered = |number: u32| folder.join(format!("{name}-{number}.{ending}"));
    let first = folder.join(format!("{name}.{ending}"));
    std::iter::once(first).chain((2..).map(numbered)).find(|path| !path.exists()).unwrap_or_default()
}

/// What puts the old content back after a failure, or empties a target that was empty.
pub(super) struct Undo<'a> {
    pub driver: &'a Redis,
    pub nodes: &'a [Node],
    pub before: &'a Before,
    /// All that may be touched, where a part was restored.
    pub part: Option<&'a Part>,
    /// The server that we lead, or may have led in an earlier try.
    pub led: &'a Led<'a>,
    /// Whether that is the way.
    pub is_led: bool,
    /// What says that the restore has not ended.
    pub unfinished: &'a Unfinished,
}

impl Undo<'_> {
    /// Undoes; returns why that was necessary, and whether it failed.
    pub fn run(&self, cause: Error) -> Error {
        // Each is tried, whatever became of the others.
        let outcomes = [self.content(), self.users(), self.stamp()];
        let mut failures: Vec<String> = outcomes.into_iter().filter_map(|one| Some(one.err()?.to_string())).collect();
        if failures.is_empty() {
            // Only now: a further try is to know that there is a half.
            let ended = end(self.driver, self.nodes, self.led, self.unfinished);
            failures.extend(ended.err().map(|error| error.to_string()));
        }
        if failures.is_empty() {
            return cause;
        }
        let failures = failures.join("; ");
        let message = format!("{}; and the old content could not be put back: {failures}", cause.message());
        let hint = match self.before.paths().as_slice() {
            [] => "the target held nothing before".to_owned(),
            kept => format!("the old content is kept: {}", kept.join(", ")),
        };
        Error::new(cause.kind(), message).source(cause).hint(hint)
    }

    /// The run may have been cancelled; the old content comes back all the same: no context is asked.
    fn content(&self) -> Result<()> {
        if let Some(path) = &self.before.elsewhere {
            let message = format!("an earlier try of this restore saved it to {}, on another machine", path.display());
            return Err(Error::new(Kind::NotFound, message));
        }
        match (self.is_led, self.nodes) {
            (true, [node]) => self.as_master(node),
            _ => self.by_keys(),
        }
    }

    fn as_master(&self, node: &Node) -> Result<()> {
        let (mut control, _) = server::open(&self.driver.access, &node.endpoint)?;
        let Some(path) = self.before.images.first() else {
            self.led.let_go(&mut control)?;
            control.command(&["FLUSHALL", "SYNC"])?;
            control.ask(&[b"FUNCTION", b"FLUSH", b"SYNC"])?;
            return Ok(());
        };
        let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
        let bytes = file.metadata().or_io(|| format!("cannot read {}", path.display()))?.len();
        let feed = Feed { image: Box::new(file), image_bytes: Some(bytes), replay: Box::new(std::io::empty()) };
        self.led.feed(&mut control, feed, &Context::default(), &Default::default()).map(drop)
    }

    fn by_keys(&self) -> Result<()> {
        let context = Context::default();
        let mut writers = Writers::open(self.driver, self.nodes)?;
        keys::clear(&mut writers, &context, self.part)?;
        for path in &self.before.images {
            let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
            keys::put_back(&mut writers, Box::new(file), &context, self.part)?;
        }
        Ok(())
    }

    fn users(&self) -> Result<()> {
        for (node, lines) in self.nodes.iter().zip(&self.before.users) {
            let (mut control, _) = server::open(&self.driver.access, &node.endpoint)?;
            users::put_back(&mut control, self.driver.access.user(), lines)?;
            // What could not be saved now could not be saved before, and is as it was on the target's disk.
            users::save(&mut control)?;
        }
        Ok(())
    }

    /// A part leaves the stamp alone; all else takes it away.
    fn stamp(&self) -> Result<()> {
        match &self.before.stamp {
            Some(stamp) if self.part.is_none() => self.driver.write_stamp(stamp),
            _ => Ok(()),
        }
    }
}
