//! What is asked of the server as a whole: who it is, what it can, what we may.
//!
//! Every session of the driver begins here, so that a pooler between us and the server, or a server of
//! an unknown version, is found before anything relies on it.

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Identity;

use super::Postgres;
use super::session::{Address, Session};
use super::wire::literal;

/// Older servers lack catalogs that the driver reads (generated columns).
const MAJOR_MIN: u32 = 12;

/// The server as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// Its version in its own words.
    pub(super) version: String,
    pub(super) version_number: u32,
    /// Empty where the role may not read it.
    pub(super) system_identifier: String,
    pub(super) timeline: u32,
    pub(super) standby: bool,
    /// When it started; a restart loses every view.
    pub(super) started: String,
    pub(super) block_bytes: u64,
    /// How many locks all sessions together may hold.
    pub(super) locks_max: u64,
    pub(super) superuser: bool,
    pub(super) bypasses_row_security: bool,
}

impl Facts {
    pub(super) fn major(&self) -> u32 {
        self.version_number / 10_000
    }
}

/// One database as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) oid: u32,
    pub(super) name: String,
    /// Whether it can be connected to at all.
    pub(super) open: bool,
}

impl Postgres {
    /// A session on `database`.
    pub(super) fn connect(&self, database: &str, context: &Context) -> Result<Session> {
        let mut session = Session::connect(&self.endpoint, database, context)?;
        if session.major() < MAJOR_MIN {
            let version = session.parameter("server_version").unwrap_or("?").to_owned();
            return Err(Error::new(Kind::Unsupported, format!("PostgreSQL {version} is not supported"))
                .hint(format!("versions from {MAJOR_MIN} on are; 15 is the oldest that is tested")));
        }
        let process: i32 = session.query_one("SELECT pg_backend_pid()")?.number(0)?;
        if process != session.process() {
            return Err(Error::new(Kind::Unsupported, "a connection pooler stands before the server")
                .hint("connect to the server itself: a pooler such as pgbouncer hands one session's view to another"));
        }
        Ok(session)
    }

    /// A session on the first database, and what the server is.
    pub(super) fn look(&self, context: &Context) -> Result<(Session, Facts)> {
        let mut session = self.connect(self.settings.first_database(), context)?;
        let facts = facts(&mut session)?;
        Ok((session, facts))
    }

    /// The databases of the store, by name. Fails if one is missing that the settings name, or if none
    /// is left.
    pub(super) fn databases(&self, session: &mut Session) -> Result<Vec<Listed>> {
        let all = list_databases(session)?;
        for name in self.settings.named_databases().unwrap_or_default() {
            if !all.iter().any(|database| database.name == name) {
                return Err(Error::new(Kind::NotFound, format!("there is no database `{name}`"))
                    .hint("stores.<name>.databases lists what to back up"));
            }
        }
        let mut chosen: Vec<Listed> =
            all.into_iter().filter(|database| self.settings.has_database(&database.name)).collect();
        // None is left out in silence: an interrupted restore may have closed the one that matters.
        if let Some(closed) = chosen.iter().find(|database| !database.open) {
            return Err(Error::new(Kind::PermissionDenied, format!("database `{}` takes no connections", closed.name))
                .hint("ALTER DATABASE … ALLOW_CONNECTIONS true, or leave it out by `excludeDatabases`; one whose removal was interrupted can only be dropped"));
        }
        if chosen.is_empty() {
            return Err(Error::new(Kind::NotFound, "no database of the server matches `databases`"));
        }
        chosen.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(chosen)
    }

    /// Who the store is. Databases that are named make it a store of its own; the server as a whole is
    /// one otherwise.
    pub(super) fn identity(&self) -> Result<Identity> {
        let context = Context::default();
        let named = self.settings.named_databases();
        let endpoint = match &named {
            Some(names) => format!("{}/{}", self.address(), names.join(",")),
            None => self.address(),
        };
        let (mut session, facts) = match self.look(&context) {
            // The database of the first connection may be the one that a restore will make.
            Err(error) if error.kind() == Kind::NotFound && self.settings.database.is_none() => {
                let mut session = self.connect("postgres", &context)?;
                let facts = facts(&mut session)?;
                (session, facts)
            }
            other => other?,
        };
        let native = match named {
            None => Some(facts.system_identifier.clone()),
            Some(names) => {
                let all = list_databases(&mut session)?;
                let oid = |name: &&str| all.iter().find(|database| database.name == *name).map(|found| found.oid);
                let oids: Option<Vec<String>> = names.iter().map(|name| Some(oid(name)?.to_string())).collect();
                oids.map(|oids| format!("{}/{}", facts.system_identifier, oids.join(",")))
            }
        };
        let native = native.filter(|_| !facts.system_identifier.is_empty());
        Ok(Identity { driver: "postgres".to_owned(), native, endpoint })
    }

    /// Where the server is, in one way of writing.
    fn address(&self) -> String {
        match &self.endpoint.address {
            Address::Tcp { host, port } => {
                let host = host.trim_end_matches('.').to_lowercase();
                let host = if matches!(host.as_str(), "localhost" | "::1") { "127.0.0.1".to_owned() } else { host };
                Address::Tcp { host, port: *port }.to_string()
            }
            unix => unix.to_string(),
        }
    }
}

/// Asks what the server is.
pub(super) fn facts(session: &mut Session) -> Result<Facts> {
    let row = session.query_one(
        "SELECT current_setting('server_version'), current_setting('server_version_num'), pg_is_in_recovery(), \
         pg_postmaster_start_time()::text, current_setting('block_size'), \
         current_setting('max_locks_per_transaction')::bigint * (current_setting('max_connections')::bigint \
         + current_setting('max_prepared_transactions')::bigint), r.rolsuper, r.rolsuper OR r.rolbypassrls \
         FROM pg_roles r WHERE r.rolname = current_user",
    )?;
    let control = "SELECT s.system_identifier, c.timeline_id FROM pg_control_system() s, pg_control_checkpoint() c";
    let (system_identifier, timeline) = match session.query_one(control) {
        Ok(row) => (row.string(0)?, row.number(1)?),
        Err(error) if error.kind() == Kind::PermissionDenied => (String::new(), 0),
        Err(error) => return Err(error),
    };
    Ok(Facts {
        version: row.string(0)?,
        version_number: row.number(1)?,
        standby: row.truth(2),
        started: row.string(3)?,
        block_bytes: row.number(4)?,
        locks_max: row.number(5)?,
        superuser: row.truth(6),
        bypasses_row_security: row.truth(7),
        system_identifier,
        timeline,
    })
}

/// All databases but templates, whether they can be connected to or not.
pub(super) fn list_databases(session: &mut Session) -> Result<Vec<Listed>> {
    // A limit of -2 marks a database whose removal was interrupted.
    let rows = session.query(
        "SELECT oid, datname, datallowconn AND datconnlimit <> -2 FROM pg_database WHERE NOT datistemplate \
         ORDER BY datname",
    )?;
    rows.iter().map(|row| Ok(Listed { oid: row.number(0)?, name: row.string(1)?, open: row.truth(2) })).collect()
}

/// Whether a database of this name is there.
pub(super) fn has_database(session: &mut Session, name: &str) -> Result<bool> {
    let sql = format!("SELECT 1 FROM pg_database WHERE datname = {}", literal(name));
    Ok(!session.query(&sql)?.is_empty())
}
