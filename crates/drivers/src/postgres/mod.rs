//! `postgres`: a PostgreSQL server, or some of its databases, by what any role with read access may do.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | one statement per database, all databases at once, fixes and exports a snapshot |
//! | pin | an open read-only transaction per database; writers are never held up, vacuum keeps what it shows |
//! | position | the snapshot: it changes with every transaction that ends, and with nothing else |
//! | incremental | files of a table whose rows all were there at the parent's view, in the same number, are not read |
//! | way back | into a new database, or beside the old one and swapped by renaming |
//! | versions | 12 and newer; tested with 15, 16 and 18. The server's own `pg_dump` must be installed |
//! | privileges | `pg_read_all_data`; `BYPASSRLS` where row security hides rows |
//!
//! Manual: <https://www.postgresql.org/docs/current/sql-set-transaction.html>,
//! <https://www.postgresql.org/docs/current/protocol.html>,
//! <https://www.postgresql.org/docs/current/mvcc-caveats.html>.
//!
//! TRUNCATE and rewriting DDL are not transactional for older snapshots: the table seems empty to them.
//! Every table is locked against both from `prepare` on; see [`cut`] and `drain`.

mod catalog;
mod client;
mod config;
mod copy;
mod cut;
mod drain;
mod dump;
mod edges;
mod endpoint;
mod extents;
#[cfg(test)]
mod faults;
mod layout;
mod pool;
mod probe;
mod restore;
mod session;
mod stamp;
mod swap;
#[cfg(test)]
mod tests;
mod tls;
mod tools;
mod verify;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stillpoint_core::error::{Error, Result};

pub use config::{Roles, Settings, Tls};

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration};
use session::{Address, Endpoint};

/// The schema that holds the environment stamp. What else is in it is the user's.
const STAMP_SCHEMA: &str = "stillpoint";
/// Our tables in it: the stamp, and what is left to do when it is planted. They are part of no point.
const STAMP_TABLES: [&str; 2] = ["stamp", "opening"];

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "postgres",
    about: "a PostgreSQL server or some of its databases, by an exported snapshot",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Postgres::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: None,
    policy: config::policy,
};

/// The phases, by the pages they stand on.
static PHASES: Phases<Postgres> = Phases {
    probe: probe::probe,
    prepare: cut::prepare,
    observe: cut::observe,
    cut: cut::cut,
    drain: drain::drain,
    still_valid: cut::still_valid,
    edges: edges::edges,
    release: cut::release,
    identity: Postgres::identity,
    restore: restore::restore,
    verify: verify::verify,
    stamp: stamp::stamp,
    read_stamp: stamp::read_stamp,
    occupied: stamp::occupied,
    execute: Some(edges::execute),
};

/// One server.
struct Postgres {
    settings: Settings,
    endpoint: Endpoint,
    scratch: PathBuf,
    state: Mutex<cut::State>,
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, settings, .. } = self;
        f.debug_struct("Postgres")
            .field("endpoint", endpoint)
            .field("databases", &settings.databases)
            .finish_non_exhaustive()
    }
}

impl Postgres {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let named = |error: Error| error.store(request.store.as_str());
        let settings: Settings = crate::settings(request)?;
        settings.validate().map_err(named)?;
        let port = settings.port;
        let address = match (&settings.host, &settings.socket) {
            (Some(host), _) => Address::Tcp { host: host.clone(), port },
            (None, Some(folder)) => Address::Unix { folder: folder.clone(), port },
            (None, None) => return Err(Error::internal("the settings name no server")),
        };
        let endpoint = Endpoint {
            address,
            user: settings.user.clone(),
            password: settings.password.as_ref().map(request.secrets).transpose().map_err(named)?,
            tls: tls::client_config(settings.tls(), settings.ca_file.as_deref()).map_err(named)?,
            tls_required: matches!(settings.tls(), Tls::Require | Tls::VerifyFull),
            connect_time_max: settings.connect_time_max(),
        };
        Ok(Self { settings, endpoint, scratch: request.scratch.clone(), state: Mutex::default() })
    }
}
