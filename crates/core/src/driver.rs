//! The contract between the engine and one kind of store.
//!
//! Kept apart from the coordinator, so that a driver can be written, and tested with the
//! conformance suite, by someone who never read how cuts are coordinated. Nothing here performs
//! I/O.
//!
//! A [`Driver`] value stands for one store at one endpoint. Restoring into another environment is
//! done by a second value, opened with the target's configuration: `identity`, `stamp` and
//! `read_stamp` always speak of the value's own endpoint.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::capability::Probe;
use crate::error::{Error, Kind, Result};
use crate::id::CutId;
use crate::position::{Identity, Position, Stamp};
use crate::tree::{Sink, Tree, TreePath};

/// What the engine gives to every call: a way to stop it, and counters to report progress.
///
/// Cheap to clone; clones share state.
#[derive(Debug, Clone, Default)]
pub struct Context {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    bytes_done: AtomicU64,
    items_done: AtomicU64,
    bytes_expected: AtomicU64,
}

impl Context {
    /// Asks whoever works under this context to stop soon.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether someone asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Relaxed)
    }

    /// Fails with `Cancelled` once someone asked to stop. Long loops call it at every turn.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::new(Kind::Cancelled, "stopped on request")) } else { Ok(()) }
    }

    /// Counts work done: bytes and items (files, rows, objects).
    pub fn advance(&self, bytes: u64, items: u64) {
        self.shared.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        self.shared.items_done.fetch_add(items, Ordering::Relaxed);
    }

    /// States how many bytes the call will move in all, if known.
    pub fn expect_bytes(&self, bytes: u64) {
        self.shared.bytes_expected.store(bytes, Ordering::Relaxed);
    }

    /// Bytes done, items done, bytes expected (0 when unknown).
    pub fn progress(&self) -> (u64, u64, u64) {
        (
            self.shared.bytes_done.load(Ordering::Relaxed),
            self.shared.items_done.load(Ordering::Relaxed),
            self.shared.bytes_expected.load(Ordering::Relaxed),
        )
    }
}

/// What `prepare` hands back: how long the held resources stay safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// How long after `prepare` a `cut` may still come. After it the engine prepares again.
    pub safe_for: Duration,
    /// Estimated bytes to drain, for the progress display; `None` when unknown.
    pub bytes_estimate: Option<u64>,
}

/// A fixed view, as the driver describes it; journalled, and part of the statefile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pin {
    /// The cut this pin belongs to.
    pub cut: CutId,
    /// The view's coordinate.
    pub position: Position,
    /// What `release` needs to clean up after a crash, when the driver value is gone: snapshot
    /// paths, session ids. No secrets.
    pub remains: Vec<String>,
}

/// Whether a pin still shows what it showed at the cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validity {
    /// It does.
    Valid,
    /// It does not; the reason is for people. The point must not be sealed.
    Lost(String),
}

/// A loss that is known and named: a file that changed between cut and drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Loss {
    /// What is concerned: a path, a key, a row.
    pub what: String,
    /// Why it is not what the cut showed.
    pub why: String,
}

/// What a drain yielded, besides the streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Drained {
    /// Rows, objects, commits, files: the store's own count.
    pub items: u64,
    /// What `items` counts, e.g. `rows`.
    pub unit: String,
    /// Bytes of the store's content that the point holds, reused ones included.
    pub bytes: u64,
    /// Bytes that were read from the store, the rest was reused from the parent.
    pub bytes_read: u64,
    /// The store's own checksums by name, for `verify` and for people.
    pub checksums: std::collections::BTreeMap<String, String>,
    /// Known losses. Not empty makes the verdict `restorable with named loss`.
    pub losses: Vec<Loss>,
    /// Things that people should know, without loss: pipes and sockets left out, …
    pub notes: Vec<String>,
}

/// How a restore treats what is at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreMode {
    /// The target must be absent or empty; anything else is `AlreadyExists`.
    Fresh,
    /// The target is replaced: load beside, swap at the end, keep the old beside it.
    InPlace,
}

/// What a restore is to do.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// What to do with what is there.
    pub mode: RestoreMode,
    /// Restore only this part of the store's tree; `None` for all of it.
    pub part: Option<TreePath>,
    /// Names the run; also the suffix of what is kept beside. Each try of a restore has a name of its own:
    /// `<name>`, then `<name>-try2`, `<name>-try3` and so on.
    pub restore: String,
}

impl RestoreRequest {
    /// Of how many earlier tries the names are told.
    const EARLIER_MAX: usize = 100;
    /// Between the name of a restore and the number of its try; the names of restores never hold it.
    const TRY: &str = "-try";

    /// The name of a try of the restore `name`; the first is number 1.
    pub fn try_name(name: &str, number: u32) -> String {
        if number <= 1 { name.to_owned() } else { format!("{name}{}{number}", Self::TRY) }
    }

    /// The names of earlier tries of the same restore, the latest first: what a process that was killed left
    /// beside bears one of them.
    pub fn earlier(&self) -> Vec<String> {
        let numbered = self.restore.rsplit_once(Self::TRY);
        let numbered = numbered.and_then(|(name, number)| Some((name, number.parse::<u32>().ok()?)));
        let Some((name, number @ 2..)) = numbered else { return Vec::new() };
        (1..number).rev().take(Self::EARLIER_MAX).map(|number| Self::try_name(name, number)).collect()
    }
}

/// What a restore did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restored {
    /// Rows, objects, commits, files written.
    pub items: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Where the old content was kept, if it was replaced.
    pub kept_old: Vec<String>,
    /// What could not be reproduced exactly, for people.
    pub losses: Vec<Loss>,
}

/// What `verify` compared and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Verification {
    /// How many items were compared.
    pub checked: u64,
    /// The differences, at most 100, for people. Empty means equal.
    pub differences: Vec<String>,
}

/// One edge of a reference: the row (or key, file, commit) that refers, and what it refers to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge {
    /// What is referred to: an object key, a commit id, a path.
    pub referent: Vec<u8>,
    /// Who refers, for people: `models id 42`.
    pub owner: String,
}

/// Asks a store which edges leave it, or which referents it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EdgeQuery {
    /// Edges that leave this store; the text is in the driver's language (SQL for databases).
    /// A SQL query yields the referent as first column and, optionally, an owner as second.
    From(String),
    /// Everything in this store that can be referred to, by kind: `keys` for objects,
    /// `commits` for git, `paths` for files. Owners are empty.
    Held(String),
    /// Which of these referents the store holds; for stores that cannot list all they hold, such
    /// as commits of git. The driver yields those that it has, in any order.
    Which {
        /// The kind, as in `Held`.
        kind: String,
        /// Referents to look up, at most 10,000 a call.
        referents: Vec<Vec<u8>>,
    },
}

/// One store that can be cut, drained and restored.
///
/// # Flow
/// `probe`, `expect_edges`, then `prepare` → (`observe` → `cut` → `observe`)* → `drain` → `still_valid` → `edges`
/// → `release`. When a peer fails: `prepare` → `release`. A further try of the cut within one run
/// comes with a new [`CutId`] and replaces the pin of the earlier one.
/// For the way back: `identity`, `read_stamp` (fence), `restore`, `stamp`, `verify`.
///
/// # Guarantees (duty of the driver)
/// `release` succeeds from every state and may be repeated, also by a new value after a crash.
/// `cut` is idempotent per [`CutId`]. Nothing but `restore` and `stamp` changes the store's data.
/// What is expected and absent is an error, never an empty stream.
///
/// # Assumptions (duty of the engine)
/// Calls on one store never overlap, except `cancel` through the [`Context`]. Any await may be the
/// last one. `drain`, `restore`, `verify` and `edges` run on a thread of their own and may block;
/// the others must not block their thread (use a blocking task) and carry a deadline set by the
/// engine.
#[async_trait]
pub trait Driver: fmt::Debug + Send + Sync {
    /// Returns what this store can promise, judged from its live version and settings.
    ///
    /// Must not change the store. An unsupported version is `Kind::Unsupported`, permanent.
    async fn probe(&self, context: &Context) -> Result<Probe>;

    /// Tells which queries [`Driver::edges`] will be asked of the pin, all of them at once.
    ///
    /// Called before `prepare`, for stores whose view passes by once and cannot be asked again.
    /// Replaces what an earlier call told. Refuses with `Config` or `Unsupported` what `edges` would
    /// refuse. Stores whose view can be asked at any time need nothing of it.
    async fn expect_edges(&self, _queries: &[EdgeQuery]) -> Result<()> {
        Ok(())
    }

    /// Does all that can block or take long before the cut: connects, lists, attaches, waits.
    ///
    /// Must not hurt the store or its users. Repeatable; a repeated call renews the hold.
    async fn prepare(&self, context: &Context) -> Result<Hold>;

    /// Returns the store's position now, or `None` where it cannot observe its own writes.
    ///
    /// Called right before and right after `cut`, while users may write. Its cost must not grow
    /// with the data. Equal answers promise that no write became visible in between.
    async fn observe(&self, context: &Context) -> Result<Option<Position>>;

    /// Fixes the view. Its cost must not grow with the data.
    ///
    /// Every write acknowledged before the call is in the view; none begun after its return is.
    /// Repeated with the same id it returns the same pin. With a new id it replaces the pin.
    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin>;

    /// Copies the pinned view into `sink`. Skips what `parent`, the same store's tree in an
    /// earlier point, already holds, through [`Sink::reuse`].
    ///
    /// The tree is readable without Stillpoint and holds a `HOW-TO-RESTORE.txt` at its top.
    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained>;

    /// Checks that the pin still shows what it showed at the cut. Called after the drain, before
    /// the seal.
    async fn still_valid(&self, context: &Context, pin: &Pin) -> Result<Validity>;

    /// Yields edges or referents of the pinned view (`pin` given) or of the live store (`None`,
    /// after a restore). Order is free; memory must not grow with the answer.
    ///
    /// Stores without edges refuse with `Kind::Unsupported`.
    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()>;

    /// Lets go of everything that `prepare` and `cut` hold. Safe from every state, repeatable.
    ///
    /// `remains` comes from the journal when an earlier process died; it is empty otherwise.
    async fn release(&self, context: &Context, remains: &[String]) -> Result<()>;

    /// Who this store is. Fails with `NotFound` only if a fresh target does not exist yet and its
    /// identity cannot be told from its configuration.
    async fn identity(&self, context: &Context) -> Result<Identity>;

    /// Writes what `source` holds into this store.
    ///
    /// Fresh: refuses a target that holds data. In place: loads beside, swaps at the end, keeps
    /// the old and says where. A failed restore leaves the old content usable.
    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored>;

    /// Compares this store with what `source` holds: counts, content, checksums.
    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification>;

    /// Plants the environment stamp. Replaces an older one. The stamp itself is never drained as
    /// the user's data and never counted as a difference by `verify`.
    async fn stamp(&self, context: &Context, stamp: &Stamp) -> Result<()>;

    /// Reads the stamp, or `None` if the store has none or does not exist yet.
    async fn read_stamp(&self, context: &Context) -> Result<Option<Stamp>>;

    /// What a restore would overwrite here, for people: `3 files, 1.2 MiB`; `None` if this store
    /// does not exist yet or is empty. A stamp alone counts as empty.
    ///
    /// Asked by plan and fence before anything is written. Its cost must not grow with the data
    /// beyond a glance: the first thing found is enough. Answering `None` by default is safe only
    /// because a fresh `restore` refuses what holds data by itself.
    async fn occupied(&self, _context: &Context) -> Result<Option<String>> {
        Ok(None)
    }

    /// Runs one statement in the store's language, for the `sql` steps of a pause.
    ///
    /// Called with the operator's own text, never with text from a point. May change the store:
    /// that is its purpose. Stores without a language refuse with `Kind::Unsupported`.
    async fn execute(&self, _context: &Context, _statement: &str) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "this kind of store runs no statements"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_knows_the_names_of_those_before_it() {
        let of = |restore: &str| {
            RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: restore.to_owned() }.earlier()
        };
        assert_eq!(of("7be1-1"), Vec::<String>::new());
        assert_eq!(of("7be1-3"), Vec::<String>::new(), "the third restore of a plan is no try of the second");
        assert_eq!(of("7be1-1-try2"), ["7be1-1"]);
        assert_eq!(of("7be1-1-try4"), ["7be1-1-try3", "7be1-1-try2", "7be1-1"]);
        assert_eq!(of("r-tryx"), Vec::<String>::new());
        assert_eq!(of("r-try1"), Vec::<String>::new());
        let many = of("r-try4000000000");
        assert_eq!((many.len(), many[99].as_str()), (100, "r-try3999999900"));
        assert_eq!(RestoreRequest::try_name("7be1-1", 1), "7be1-1");
        assert_eq!(RestoreRequest::try_name("7be1-1", 4), "7be1-1-try4");
    }
}
