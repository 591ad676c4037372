//! The journal's copy in the bucket, from which another machine can take over.
//!
//! `journal/<run>/NNNN.json`, each written once, each naming the hash of the one before, all under
//! the repository's key: who can only write to the bucket cannot make an engine "undo" anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::RunId;
use stillpoint_repo::depot::{Depot, WriteMode};
use tokio::sync::oneshot;

use super::{Entry, Replay};

/// Keyed hash over bytes; in product code `Repository::authenticate("journal", bytes)`.
pub type Authenticate = Arc<dyn Fn(&[u8]) -> [u8; 32] + Send + Sync>;

/// Where the journals lie in a bucket.
const FOLDER: &str = "journal/";

/// Parts of one run that a reader accepts at most; a run has about ten.
const PARTS_MAX: usize = 1000;

#[derive(Debug, Serialize, Deserialize)]
struct Part {
    run: RunId,
    number: u32,
    /// The authentication of the part before; empty for the first.
    after: String,
    entries: Vec<Entry>,
    #[serde(default)]
    authentication: String,
}

impl Part {
    /// The bytes that are authenticated: the JSON of the rest, with sorted keys.
    fn canonical_bytes(&self) -> Result<Vec<u8>> {
        canonical_bytes(serde_json::to_value(self).map_err(no_json)?)
    }
}

/// As [`Part::canonical_bytes`] over the fields as they were read, also those that this version does
/// not know or would write differently, so that old parts stay valid.
fn canonical_bytes(mut part: serde_json::Value) -> Result<Vec<u8>> {
    if let Some(object) = part.as_object_mut() {
        object.remove("authentication");
    }
    serde_json::to_vec(&part).map_err(no_json)
}

fn no_json(error: serde_json::Error) -> Error {
    Error::internal("a journal part has no JSON").source(error)
}

/// Writes a run's entries to the bucket, a part at a time.
pub struct BucketJournal {
    bucket: Arc<dyn Depot>,
    authenticate: Authenticate,
    run: RunId,
    number: u32,
    after: String,
    waiting: Vec<Entry>,
}

impl fmt::Debug for BucketJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketJournal").field("run", &self.run).field("number", &self.number).finish_non_exhaustive()
    }
}

fn name(run: &RunId, number: u32) -> String {
    format!("journal/{run}/{number:04}.json")
}

impl BucketJournal {
    /// A copy of `run`'s journal; nothing is written yet.
    pub fn new(bucket: Arc<dyn Depot>, authenticate: Authenticate, run: RunId) -> Self {
        Self { bucket, authenticate, run, number: 0, after: String::new(), waiting: Vec::new() }
    }

    /// Whether anything of the run is in the bucket.
    pub fn has_begun(&self) -> bool {
        self.number > 0
    }

    /// Remembers an entry for the next part.
    pub fn push(&mut self, entry: Entry) {
        self.waiting.push(entry);
    }

    /// Writes what waits, if anything, as one part. Blocks.
    ///
    /// After a failure the entries still wait, and a later call tries again under the same number.
    pub fn copy(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let mut part = Part {
            run: self.run.clone(),
            number: self.number,
            after: self.after.clone(),
            entries: self.waiting.clone(),
            authentication: String::new(),
        };
        part.authentication = hex::encode((self.authenticate)(&part.canonical_bytes()?));
        let bytes = serde_json::to_vec(&part).map_err(|e| Error::internal("a journal part has no JSON").source(e))?;
        let name = name(&self.run, self.number);
        match self.bucket.write(&name, &[&bytes], &WriteMode::Create) {
            Ok(_) => {}
            // An earlier try of ours got through although it looked failed.
            Err(error) if error.kind() == Kind::AlreadyExists && self.is_own(&name)? => {
                return self.continue_after(&name);
            }
            Err(error) => return Err(error.operation("copy the journal to the bucket")),
        }
        self.after = part.authentication;
        self.number += 1;
        self.waiting.clear();
        Ok(())
    }

    fn is_own(&self, name: &str) -> Result<bool> {
        let (bytes, _) = self.bucket.read(name)?;
        Ok(parse(&bytes, &self.authenticate).is_ok_and(|part| part.run == self.run && part.after == self.after))
    }

    /// Takes the part that is there as written, and keeps waiting what came after it.
    fn continue_after(&mut self, name: &str) -> Result<()> {
        let (bytes, _) = self.bucket.read(name)?;
        let part = parse(&bytes, &self.authenticate)?;
        self.after = part.authentication;
        self.number += 1;
        let written = part.entries.len().min(self.waiting.len());
        self.waiting.drain(..written);
        self.copy()
    }
}

/// A copy with a thread of its own, so that nobody waits for the bucket by accident.
#[derive(Debug)]
pub struct Copier {
    orders: Sender<Order>,
}

enum Order {
    Keep(Entry),
    Copy(Option<oneshot::Sender<Result<()>>>),
    CopyIfBegun(oneshot::Sender<Result<()>>),
}

impl Copier {
    /// Starts the thread. It ends with this value.
    pub fn start(mut journal: BucketJournal) -> Result<Self> {
        let (orders, incoming) = channel();
        let work = move || {
            for order in incoming {
                let (answer, copied) = match order {
                    Order::Keep(entry) => {
                        journal.push(entry);
                        continue;
                    }
                    Order::Copy(answer) => (answer, journal.copy()),
                    Order::CopyIfBegun(answer) if journal.has_begun() => (Some(answer), journal.copy()),
                    Order::CopyIfBegun(answer) => (Some(answer), Ok(())),
                };
                let unheard = match (answer, copied) {
                    (Some(answer), copied) => answer.send(copied).err().and_then(Result::err),
                    (None, copied) => copied.err(),
                };
                // What failed waits, and goes with the next part.
                if let Some(error) = unheard {
                    tracing::debug!(%error, "the journal's copy in the bucket lags behind");
                }
            }
        };
        std::thread::Builder::new()
            .name("journal copy".to_owned())
            .spawn(work)
            .map_err(|error| Error::io("cannot start the thread that copies the journal", error))?;
        Ok(Self { orders })
    }

    /// Remembers an entry for the next part.
    pub fn keep(&self, entry: Entry) {
        self.order(Order::Keep(entry));
    }

    /// Writes what waits, some time soon.
    pub fn copy_soon(&self) {
        self.order(Order::Copy(None));
    }

    /// Writes what waits, and says how that went.
    pub async fn copy(&self) -> Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.order(Order::Copy(Some(sender)));
        receiver.await.unwrap_or_else(|_| Err(Error::internal("the thread that copies the journal broke")))
    }

    /// Like [`copy`](Self::copy), but leaves no first part behind.
    pub async fn copy_if_begun(&self) -> Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.order(Order::CopyIfBegun(sender));
        receiver.await.unwrap_or_else(|_| Err(Error::internal("the thread that copies the journal broke")))
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            tracing::debug!("the thread that copies the journal has ended");
        }
    }
}

fn parse(bytes: &[u8], authenticate: &Authenticate) -> Result<Part> {
    let unreadable = |e| Error::new(Kind::Corrupt, "a journal part in the bucket is not readable").source(e);
    let part: Part = serde_json::from_slice(bytes).map_err(unreadable)?;
    let as_read = canonical_bytes(serde_json::from_slice(bytes).map_err(unreadable)?)?;
    if hex::encode(authenticate(&as_read)) != part.authentication {
        return Err(Error::new(
            Kind::Corrupt,
            "a journal part in the bucket was not written with this repository's key",
        )
        .context("run", &part.run));
    }
    Ok(part)
}

/// Reads `run`'s journal from the bucket, as far as it is whole and authentic. `None` if it has no
/// part there. Blocks.
pub fn read_copy(bucket: &dyn Depot, authenticate: &Authenticate, run: &RunId) -> Result<Option<Replay>> {
    let mut names = Vec::new();
    bucket.list(&format!("journal/{run}/"), &mut |info| {
        names.push(info.name);
        Ok(names.len() < PARTS_MAX)
    })?;
    names.sort();
    let mut entries = Vec::new();
    let mut after = String::new();
    for (number, found) in names.iter().enumerate() {
        let (bytes, _) = bucket.read(found)?;
        let part = parse(&bytes, authenticate)?;
        let expected = u32::try_from(number).is_ok_and(|number| *found == name(run, number) && part.number == number);
        if part.run != *run || !expected || part.after != after {
            return Err(Error::new(Kind::Corrupt, "the parts of a journal in the bucket do not follow each other")
                .context("part", found));
        }
        after = part.authentication;
        entries.extend(part.entries);
    }
    Ok(Replay::collect(entries, None))
}

/// What became of old journals.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct OldCopies {
    /// Runs whose journals were removed, or would be.
    pub removed: Vec<RunId>,
    /// Objects that an object lock keeps; a later call removes them.
    pub locked: Vec<String>,
    /// Journals that cannot be read or believed, by folder, with why. They stay.
    pub unreadable: Vec<(String, String)>,
}

/// Removes the journals of runs that ended, and of which nothing was written since `before`. Those of
/// the `spared` runs stay, and those that do not say that their run ended: someone may still have to
/// clean up after it. Blocks.
pub fn forget_ended_copies(
    bucket: &dyn Depot,
    authenticate: &Authenticate,
    spared: &BTreeSet<RunId>,
    before: SystemTime,
    dry_run: bool,
) -> Result<OldCopies> {
    let mut runs: BTreeMap<RunId, (SystemTime, Vec<String>)> = BTreeMap::new();
    bucket.list(FOLDER, &mut |object| {
        let run = object.name.strip_prefix(FOLDER).and_then(|rest| rest.split_once('/'));
        if let Some(run) = run.and_then(|(run, _)| RunId::new(run).ok()) {
            let (newest, names) = runs.entry(run).or_insert((object.modified, Vec::new()));
            *newest = (*newest).max(object.modified);
            names.push(object.name);
        }
        Ok(true)
    })?;
    let mut found = OldCopies::default();
    for (run, (newest, mut names)) in runs {
        if newest >= before || spared.contains(&run) {
            continue;
        }
        names.sort();
        match says_that_it_ended(bucket, authenticate, &run, &names) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                found.unreadable.push((run.to_string(), error.to_string()));
                continue;
            }
            Err(error) => return Err(error.operation("look at an old journal")),
        }
        let mut is_gone = true;
        if !dry_run {
            // The last part, which tells that the run ended, goes last: what is cut off goes on later.
            for name in names {
                match bucket.delete(&name) {
                    Err(error) if error.kind() == Kind::PermissionDenied => {
                        is_gone = false;
                        found.locked.push(name);
                    }
                    other => other.map_err(|error| error.operation("remove an old journal"))?,
                }
            }
        }
        if is_gone {
            found.removed.push(run);
        }
    }
    Ok(found)
}

/// Whether the last part of a run's journal is authentic and says that the run ended.
fn says_that_it_ended(bucket: &dyn Depot, authenticate: &Authenticate, run: &RunId, names: &[String]) -> Result<bool> {
    let Some(last) = names.last() else { return Ok(false) };
    let (bytes, _) = bucket.read(last)?;
    let part = parse(&bytes, authenticate)?;
    if part.run != *run || *last != name(run, part.number) {
        return Err(Error::new(Kind::Corrupt, "a journal part is not where it belongs").context("part", last));
    }
    Ok(part.entries.iter().any(|entry| matches!(entry, Entry::Ended { .. })))
}
