//! `git`: repositories, bare or with working trees, one or thousands in a folder.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | all refs are read, each repository's at one moment; objects are named by their content and never change |
//! | pin | set: the ids that the refs name. They stay until git collects them, by default two weeks after the last ref let go; nothing is planted in the store. The drain proves that all of them were there |
//! | position | a hash of all (repository, ref, id), and one that also tells an update that was taken back |
//! | consistency | one repository: its refs at one moment. Many: read one after the other within milliseconds; `observe` before and after proves that nothing was pushed meanwhile |
//! | incremental | one pack per point, with what the refs reach and the parent point's refs do not |
//! | way back | `git init`, `index-pack` in order, refs in one transaction, `fsck`, then one rename; the old stays beside |
//! | versions | git 2.31 or newer; sha1 and sha256; refs in files, or in reftables where the installed git reads them |
//! | privileges | reading the directories; whose they are does not matter. For a restore, writing beside them |
//!
//! Manual: <https://git-scm.com/docs/git-pack-objects>, <https://git-scm.com/docs/gitrepository-layout>,
//! <https://git-scm.com/docs/git-gc>.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::error::{Error, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};

pub use config::Settings;

use crate::{OpenRequest, Registration, place};

/// The folder of a point that holds one folder per repository.
const REPOSITORIES: &str = "repositories";
/// The file of a point that says how many there are.
const STORE: &str = "store.json";
/// The stamp's file name.
const STAMP: &str = "stillpoint-stamp.json";

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "git",
    about: "git repositories, one or a folder of thousands; refs are the cut",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Git::open(request)?)),
    schema: || schemars::schema_for!(Settings),
    into_folder: config::into_folder,
};

/// One store of git repositories, as the engine sees it.
#[derive(Debug)]
pub struct Git {
    inner: Arc<Inner>,
}

/// What blocking tasks share.
#[derive(Debug)]
struct Inner {
    settings: Settings,
    /// The pin that this value took last, and what it shows.
    pin: Mutex<Option<(Pin, Arc<cut::View>)>>,
    /// What `observe` read last, so that it need not read again what did not change.
    known: client::Known,
    /// The cut that was drained whole.
    drained: Mutex<Option<CutId>>,
}

impl Git {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        settings.validate().map_err(|error| error.store(request.store.as_str()))?;
        Ok(Self {
            inner: Arc::new(Inner {
                settings,
                pin: Mutex::default(),
                known: client::Known::default(),
                drained: Mutex::default(),
            }),
        })
    }

    /// Runs what waits for files or for git on a thread where waiting hurts nobody.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        done.unwrap_or_else(|error| Err(Error::internal("a task of the git driver panicked").source(error)))
    }
}

fn probe(inner: &Inner) -> Result<Probe> {
    let repositories = cut::found(inner)?;
    let mut command = client::git(&repositories[0].git_dir);
    let version = client::output(command.arg("version"), "cannot ask git for its version")?;
    let mut warnings = Vec::new();
    for repository in &repositories {
        let config = client::config_text(repository)?;
        if wire::config_value(&config, "gc", "pruneexpire").is_some_and(|value| value == "now") {
            let place = repository.git_dir.display();
            warnings.push(format!("{place}: gc.pruneExpire is `now`: a collection during a backup makes it fail"));
        }
    }
    Ok(Probe {
        version: String::from_utf8_lossy(&version).trim().trim_start_matches("git version ").to_owned(),
        identity: place::identity("git", &inner.settings.path)?,
        capability: Capability {
            pin: PinKind::Set,
            observes_writes: cut::observes(repositories.len()),
            incremental: true,
            edges: true,
            swaps_in_place: true,
            partial_restore: repositories.len() > 1,
        },
        missing_privileges: Vec::new(),
        warnings,
    })
}

#[async_trait]
impl Driver for Git {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        context.check()?;
        self.blocking(probe).await
    }

    async fn prepare(&self, context: &Context) -> Result<Hold> {
        let context = context.clone();
        self.blocking(move |inner| cut::prepare(inner, &context)).await
    }

    async fn observe(&self, _: &Context) -> Result<Option<Position>> {
        self.blocking(cut::observe).await
    }

    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        let (context, cut) = (context.clone(), cut.clone());
        self.blocking(move |inner| cut::cut(inner, &context, &cut)).await
    }

    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained> {
        drain::drain(&self.inner, context, pin, sink, parent)
    }

    async fn still_valid(&self, _: &Context, pin: &Pin) -> Result<Validity> {
        let pin = pin.clone();
        self.blocking(move |inner| cut::still_valid(inner, &pin)).await
    }

    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()> {
        drain::edges(&self.inner, context, pin, query, visit)
    }

    async fn release(&self, _: &Context, _: &[String]) -> Result<()> {
        cut::release(&self.inner);
        Ok(())
    }

    async fn identity(&self, _: &Context) -> Result<Identity> {
        self.blocking(|inner| place::identity("git", &inner.settings.path)).await
    }

    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored> {
        restore::restore(&self.inner, context, source, request)
    }

    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification> {
        restore::verify(&self.inner, context, source)
    }

    async fn stamp(&self, _: &Context, stamp: &Stamp) -> Result<()> {
        let stamp = stamp.clone();
        self.blocking(move |inner| restore::stamp(inner, &stamp)).await
    }

    async fn read_stamp(&self, _: &Context) -> Result<Option<Stamp>> {
        self.blocking(restore::read_stamp).await
    }

    async fn occupied(&self, _: &Context) -> Result<Option<String>> {
        self.blocking(restore::occupied).await
    }
}
