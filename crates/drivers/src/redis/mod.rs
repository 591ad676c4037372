//! `redis`: a Redis or Valkey server, or all masters of a cluster.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | an offset in the replication stream of every master, read in one round trip |
//! | pin | we are attached as a replica since before the cut: image and commands up to the offset are its view |
//! | position | replication id and offset; what is observed leaves out the master's own signs of life |
//! | incremental | no: an image has no parts that are known to be unchanged; the repository keeps what is new |
//! | way back | as the target's master; or key by key where the target refuses one |
//! | versions | Redis 7 and later (6 with `mode: rdb`), Valkey 7.2 and later; tested with Redis 7.0 and Valkey 9.1 |
//! | privileges | `+psync +replconf +ping +info`; more makes the point richer, see the README |
//!
//! Manual: <https://redis.io/docs/latest/operate/oss_and_stack/management/replication/>,
//! <https://valkey.io/topics/replication/>. Why the wire is our own: `docs/decisions/0009`.

mod client;
mod commands;
mod config;
mod cut;
mod drain;
mod edges;
mod effects;
mod expiry;
mod folder;
mod image;
mod kept;
mod keys;
mod loan;
mod master;
mod packed;
mod part;
mod rdb;
mod replica;
mod restore;
mod server;
mod spool;
mod streams;
#[cfg(test)]
mod tests;
mod users;
mod verify;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::EdgeQuery;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::{Identity, Stamp};

pub use config::Settings;

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration};

/// The key that bears the stamp, in database 0.
const STAMP_KEY: &str = "stillpoint:stamp";

/// What stands at the top of every point.
const HOW_TO_RESTORE: &str = include_str!("HOW-TO-RESTORE.txt");

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "redis",
    about: "a Redis or Valkey server or cluster, by its replication stream",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Redis::open(request)?, &PHASES).expecting_edges(Redis::expect_edges))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(config::into_folder),
    policy: |settings| Ok(config::policy(settings)),
};

/// The phases, by the pages they stand on.
static PHASES: Phases<Redis> = Phases {
    probe: Redis::probe,
    prepare: cut::prepare,
    observe: cut::observe,
    cut: cut::cut,
    drain: |driver, context, pin, sink, _| drain::drain(driver, context, pin, sink),
    still_valid: cut::still_valid,
    edges: edges::edges,
    release: |driver, _| {
        cut::release(driver);
        Ok(())
    },
    identity: Redis::identity,
    restore: |driver, context, source, request| match &driver.settings.directory {
        Some(folder) => folder::restore(driver, folder, context, source, request),
        None => restore::restore(driver, context, source, request),
    },
    verify: |driver, context, source| match &driver.settings.directory {
        Some(folder) => folder::verify(driver, folder, context, source),
        None => verify::verify(driver, context, source),
    },
    stamp: Redis::stamp,
    read_stamp: Redis::read_stamp,
    occupied: Redis::occupied,
    execute: Some(Redis::execute),
};

/// One server, or one cluster.
struct Redis {
    settings: Settings,
    access: client::Access,
    scratch: PathBuf,
    /// Where a restore keeps what it replaces, unless the settings say otherwise.
    kept: PathBuf,
    /// What references will ask, told before `prepare`.
    queries: Mutex<Vec<edges::Query>>,
    state: Mutex<cut::State>,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis").field("url", &self.settings.url).finish_non_exhaustive()
    }
}

/// Whether a key is the stamp, which is no content.
fn is_stamp(database: u32, name: &[u8]) -> bool {
    database == 0 && name == STAMP_KEY.as_bytes()
}

impl Redis {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let named = |error: Error| error.store(request.store.as_str());
        let settings: Settings = crate::settings(request)?;
        settings.validate().map_err(named)?;
        let password = settings.password.as_ref().map(|secret| (request.secrets)(secret)).transpose()?;
        let access = client::Access::new(&settings, password).map_err(named)?;
        Ok(Self {
            settings,
            access,
            scratch: request.scratch.clone(),
            kept: request.kept.clone(),
            queries: Mutex::default(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, cut::State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server that is named; refuses where a folder is.
    fn endpoint(&self) -> Result<config::Endpoint> {
        match &self.settings.directory {
            None => self.settings.endpoint(),
            Some(path) => Err(Error::new(Kind::Unsupported, format!("{} is a folder, no server", path.display()))
                .hint("start a server there, and name that")),
        }
    }

    fn expect_edges(&self, queries: &[EdgeQuery]) -> Result<()> {
        let queries = queries.iter().map(edges::Query::parse).collect::<Result<_>>()?;
        *self.queries.lock().unwrap_or_else(PoisonError::into_inner) = queries;
        Ok(())
    }

    /// A collector for the image of one server, if anybody will ask.
    fn collector(&self) -> Option<Arc<edges::Collector>> {
        let queries = self.queries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (!queries.is_empty()).then(|| Arc::new(edges::Collector::new(queries, self.scratch.clone())))
    }

    fn identity(&self) -> Result<Identity> {
        if let Some(folder) = &self.settings.directory {
            return crate::place::identity("redis", folder);
        }
        let endpoint = self.endpoint()?;
        let (mut connection, info) = server::open(&self.access, &endpoint)?;
        self.identity_of(&mut connection, &info)
    }

    /// Of a cluster, the ids of its masters, which outlive restarts; of a server its run id, which
    /// does not, but is never copied either.
    fn identity_of(&self, connection: &mut client::Connection, info: &str) -> Result<Identity> {
        let nodes = server::masters(connection, info)?;
        let ids: Vec<&str> = nodes.iter().map(|node| node.id.as_str()).filter(|id| !id.is_empty()).collect();
        let native = if ids.is_empty() {
            wire::info(info, "run_id").map(str::to_owned)
        } else {
            let mut sorted = ids;
            sorted.sort_unstable();
            Some(hex::encode(&Sha256::digest(sorted.join(","))[..20]))
        };
        let mut endpoint = connection.endpoint().clone();
        if endpoint.host == "localhost" || endpoint.host == "::1" {
            endpoint.host = "127.0.0.1".to_owned();
        }
        Ok(Identity { driver: "redis".to_owned(), native, endpoint: format!("redis://{endpoint}") })
    }

    fn probe(&self) -> Result<Probe> {
        let endpoint = self.endpoint()?;
        let (mut connection, info) = server::open(&self.access, &endpoint)?;
        server::check_is_master(&mut connection, &info)?;
        if self.settings.mode == config::Mode::Replica {
            server::check_sends_absolute_times(&info)?;
        }
        let mut missing_privileges = Vec::new();
        if let wire::Reply::Error(text) = connection.ask(&[b"REPLCONF", b"capa", b"psync2"])?
            && text.starts_with("NOPERM")
        {
            missing_privileges.push(format!("ACL SETUSER {} +psync +replconf +ping +info", self.access.user()));
        }
        let mut warnings = Vec::new();
        warnings.extend(server::memory_warning(&info));
        if connection.config("databases")?.is_none() {
            warnings.push(format!(
                "the settings of the server are not in the point: ACL SETUSER {} +config|get",
                self.access.user()
            ));
        }
        let (software, version) = server::version(&info);
        // It is shown behind the driver's name.
        let version = if software == "redis" { version } else { format!("{software} {version}") };
        Ok(Probe {
            version,
            identity: self.identity_of(&mut connection, &info)?,
            capability: Capability {
                pin: if self.settings.mode == config::Mode::Rdb { PinKind::Snapshot } else { PinKind::Log },
                observes_writes: self.settings.mode == config::Mode::Replica,
                incremental: false,
                edges: true,
                swaps_in_place: true,
                partial_restore: true,
            },
            missing_privileges,
            warnings,
        })
    }

    /// The connection to the server, or one to the master that holds the stamp's slot.
    fn stamp_holder(&self, mut connection: client::Connection, info: &str) -> Result<client::Connection> {
        server::check_is_master(&mut connection, info)?;
        let nodes = server::masters(&mut connection, info)?;
        let slot = commands::slot(STAMP_KEY.as_bytes());
        match nodes.iter().find(|node| node.holds(slot)) {
            Some(node) => client::Connection::open(&self.access, &node.endpoint),
            None => Ok(connection),
        }
    }

    fn stamp(&self, stamp: &Stamp) -> Result<()> {
        let text = serde_json::to_vec(stamp).map_err(|e| Error::internal("a stamp does not serialize").source(e))?;
        if let Some(folder) = &self.settings.directory {
            return folder::stamp(folder, &text);
        }
        self.write_stamp(&text)
    }

    /// Sets the stamp of a server to these bytes.
    fn write_stamp(&self, text: &[u8]) -> Result<()> {
        let (connection, info) = server::open(&self.access, &self.endpoint()?)?;
        self.stamp_holder(connection, &info)?.call(&[b"SET", STAMP_KEY.as_bytes(), text]).map(drop)
    }

    /// The bytes of a server's stamp; of one that a killed restore left behind, those of the stamp it bore.
    fn raw_stamp(&self) -> Result<Option<Vec<u8>>> {
        let (mut connection, info) = server::open(&self.access, &self.endpoint()?)?;
        if let Some(note) = loan::Note::of_follower(&mut connection, &info)? {
            return note.stamp();
        }
        match self.stamp_holder(connection, &info)?.call(&[b"GET", STAMP_KEY.as_bytes()])? {
            wire::Reply::Bulk(bytes) => Ok(Some(bytes)),
            _ => Ok(None),
        }
    }

    fn read_stamp(&self) -> Result<Option<Stamp>> {
        let bytes = match &self.settings.directory {
            Some(folder) => match std::fs::read(folder.join(folder::STAMP)) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io("cannot read the stamp", error)),
            },
            None => match self.raw_stamp()? {
                Some(bytes) => bytes,
                None => return Ok(None),
            },
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|error| Error::new(Kind::Corrupt, "the stamp is not readable").source(error))
    }

    fn occupied(&self) -> Result<Option<String>> {
        if let Some(folder) = &self.settings.directory {
            return folder::occupied(folder);
        }
        let endpoint = self.endpoint()?;
        let (mut connection, info) = server::open(&self.access, &endpoint)?;
        if let Some(note) = loan::Note::of_follower(&mut connection, &info)? {
            return Ok(note.occupied());
        }
        let nodes = server::masters(&mut connection, &info)?;
        restore::occupied(self, &nodes)
    }

    /// Runs one command on every master; its words are separated by spaces.
    fn execute(&self, statement: &str) -> Result<()> {
        let words: Vec<&str> = statement.split_whitespace().collect();
        if words.is_empty() {
            return Err(Error::new(Kind::Config, "the statement is empty").hint("CLIENT PAUSE 5000 WRITE"));
        }
        let endpoint = self.endpoint()?;
        let (mut connection, info) = server::open(&self.access, &endpoint)?;
        for node in server::masters(&mut connection, &info)? {
            client::Connection::open(&self.access, &node.endpoint)?.command(&words)?;
        }
        Ok(())
    }
}

/// Counts the keys of an RDB file by database, looking into every value on the way.
///
/// # Errors
/// `Corrupt` for bytes that are no such file, `Unsupported` for a version with unknown parts.
pub fn count_keys(image: impl std::io::Read) -> Result<std::collections::BTreeMap<u32, u64>> {
    let mut walker = rdb::Walker::new(image)?;
    let mut counts = std::collections::BTreeMap::new();
    loop {
        match walker.next()? {
            rdb::Item::End => return Ok(counts),
            rdb::Item::Key(key) => {
                walker.visit_value(key.kind, &mut |_| Ok(()))?;
                *counts.entry(key.database).or_default() += 1;
            }
            _ => {}
        }
    }
}

/// Counts the commands of a stream as a master sends it, or of an append-only file.
///
/// # Errors
/// `Corrupt` for bytes that are no such stream, `Unreachable` for one that ends within a command.
pub fn count_commands(mut stream: impl std::io::BufRead) -> Result<u64> {
    let mut count = 0;
    while wire::read_command(&mut stream, u64::MAX)?.is_some() {
        count += 1;
    }
    Ok(count)
}

/// Whether bytes are one whole answer of a server.
pub fn is_reply(mut bytes: &[u8]) -> bool {
    wire::read_reply(&mut bytes).is_ok() && bytes.is_empty()
}
