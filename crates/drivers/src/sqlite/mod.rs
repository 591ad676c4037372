//! `sqlite`: SQLite databases, one or many, in WAL or rollback-journal mode.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | a read transaction begins on a connection of its own; its view never moves |
//! | pin | WAL: a read mark in the log, writers go on. Rollback journal: a clone of the file where the file system has reflinks, else a shared lock, and commits of writers wait for the drain |
//! | position | `data_version` of an observer that stays outside transactions: it changes whenever another connection commits |
//! | incremental | the whole file is taken from the parent if its files were surely not written; otherwise pages are read in order and the repository keeps what is new |
//! | way back | written beside, proven by SQLite, swapped in by one rename; the old file stays |
//! | versions | every file format of SQLite 3; the library is compiled in |
//! | privileges | read and write permission on the database, its `-wal` and `-shm` and their folder: readers of WAL write to shared memory |
//!
//! Manual: <https://www.sqlite.org/isolation.html>, <https://www.sqlite.org/wal.html>,
//! <https://www.sqlite.org/lockingv3.html>, <https://www.sqlite.org/dbpage.html>.
//!
//! Locks of SQLite vanish when any descriptor of the file is closed in the same process; see
//! [`client`] and `still_valid`.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
mod swap;
#[cfg(test)]
mod tests;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};

pub use config::{Rollback, Settings};

use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "sqlite",
    about: "SQLite databases, by a pinned read transaction",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Sqlite::open(request)?)),
    schema: || schemars::schema_for!(Settings),
    into_folder: config::into_folder,
};

/// One store of SQLite databases, as the engine sees it.
pub struct Sqlite {
    inner: Arc<Inner>,
}

/// What blocking tasks share.
struct Inner {
    settings: Settings,
    scratch: PathBuf,
    state: Mutex<cut::State>,
}

impl std::fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sqlite").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

impl Sqlite {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        let settings = settings.validate().map_err(|error| error.store(request.store.as_str()))?;
        let inner = Inner { settings, scratch: request.scratch.clone(), state: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs what may wait for a lock or a disk away from the async threads.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|error| Error::internal("a blocking task ended early").source(error))?
    }
}

impl Inner {
    /// A file in the scratch folder, its own for each database.
    fn scratch_file(&self, target: &cut::Target) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.scratch).or_io(|| format!("cannot create {}", self.scratch.display()))?;
        let mut hash = Sha256::new();
        target.below.iter().for_each(|name| hash.update(name));
        hash.update(target.path.as_os_str().as_encoded_bytes());
        Ok(self.scratch.join(format!("sqlite-{}", hex::encode(&hash.finalize()[..12]))))
    }

    fn probe(&self) -> Result<Probe> {
        let mut missing_privileges = Vec::new();
        let mut warnings = Vec::new();
        for target in self.targets()? {
            let label = target.path.display().to_string();
            if let Some(kind) = client::network_file_system(&target.path) {
                warnings.push(format!("{label} lies on {kind}: SQLite's locks may not work there"));
            }
            let connection = match client::open_reader(&target.path, self.settings.busy_timeout()) {
                Err(error) if error.kind() == Kind::PermissionDenied => {
                    let hint = error.hint_text().unwrap_or_default().to_owned();
                    missing_privileges.push(format!("{error}: {hint}"));
                    continue;
                }
                other => other?,
            };
            let journal: String = client::pragma(&connection, "journal_mode")?;
            if journal != "wal" {
                warnings.push(format!(
                    "{label} is in rollback-journal mode ({journal}): unless its file system can clone files, its \
                     writers wait for the whole drain; `PRAGMA journal_mode = WAL` in the application avoids that"
                ));
            }
            if !client::offers_pages(&connection)? {
                warnings.push(format!("{label} is copied through the scratch folder, which must have room for it"));
            }
        }
        Ok(Probe {
            version: rusqlite::version().to_owned(),
            identity: restore::identity(self)?,
            capability: Capability {
                pin: PinKind::Snapshot,
                observes_writes: true,
                incremental: true,
                edges: true,
                swaps_in_place: true,
                partial_restore: self.settings.directory.is_some(),
            },
            missing_privileges,
            warnings,
        })
    }

    fn execute(&self, statement: &str) -> Result<()> {
        use client::Attempt;
        let targets = self.targets()?;
        for target in &targets {
            let connection = client::open_writer(&target.path, self.settings.busy_timeout())?;
            connection
                .execute_batch(statement)
                .attempt(|| format!("the statement failed on {}", target.path.display()))?;
        }
        Ok(())
    }
}

#[async_trait]
impl Driver for Sqlite {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        context.check()?;
        self.blocking(Inner::probe).await
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

    async fn release(&self, _: &Context, remains: &[String]) -> Result<()> {
        let remains = remains.to_vec();
        self.blocking(move |inner| cut::release(inner, &remains)).await
    }

    async fn identity(&self, _: &Context) -> Result<Identity> {
        self.blocking(restore::identity).await
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

    async fn execute(&self, context: &Context, statement: &str) -> Result<()> {
        context.check()?;
        let statement = statement.to_owned();
        self.blocking(move |inner| inner.execute(&statement)).await
    }
}
