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

use sha2::{Digest, Sha256};
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::error::{IoContext, Kind, Result};

pub use config::{Rollback, Settings};

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "sqlite",
    about: "SQLite databases, by a pinned read transaction",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Sqlite::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(config::into_folder),
    policy: |_| Ok(None),
};

/// The phases, by the pages they stand on.
static PHASES: Phases<Sqlite> = Phases {
    probe: Sqlite::probe,
    prepare: cut::prepare,
    observe: cut::observe,
    cut: cut::cut,
    drain: drain::drain,
    still_valid: cut::still_valid,
    edges: drain::edges,
    release: cut::release,
    identity: restore::identity,
    restore: restore::restore,
    verify: restore::verify,
    stamp: restore::stamp,
    read_stamp: restore::read_stamp,
    occupied: restore::occupied,
    execute: Some(Sqlite::execute),
};

/// One store of SQLite databases.
struct Sqlite {
    settings: Settings,
    scratch: PathBuf,
    state: Mutex<cut::State>,
}

impl std::fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sqlite").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Sqlite {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        let settings = settings.validate().map_err(|error| error.store(request.store.as_str()))?;
        Ok(Self { settings, scratch: request.scratch.clone(), state: Mutex::default() })
    }

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
