//! What a backup of this server would meet: privileges that are missing, and things to know.
//!
//! Looks at every database of the store and changes nothing. Each missing privilege comes with the
//! statement that grants it.

use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Kind, Result};

use super::client::{Facts, Listed};
use super::config::Roles;
use super::layout::TableKind;
use super::session::Session;
use super::tools::Tools;
use super::wire::identifier;
use super::{Postgres, catalog, dump, stamp};

/// Of many alike, so many are named.
const NAMED_MAX: usize = 5;
/// The oldest version that is tested.
const TESTED_SINCE: u32 = 15;
/// A view older than so many transactions holds vacuum up for long already.
const OLD_VIEW: i64 = 100_000_000;

/// Judges the server.
pub(super) fn probe(driver: &Postgres) -> Result<Probe> {
    let context = Context::default();
    let (mut session, facts) = driver.look(&context)?;
    let mut missing = Vec::new();
    let mut warnings = Vec::new();
    let scratch = dump::folder(&driver.scratch)?;
    let tools = Tools::find(&driver.settings, &driver.endpoint, scratch.path(), facts.major())?;
    if tools.major > facts.major() {
        warnings.push(format!(
            "definitions are written by pg_dump {} of a newer version: install postgresql-client-{}",
            tools.major,
            facts.major()
        ));
    }
    server_warnings(driver, &mut session, &facts, &mut warnings)?;
    let databases = driver.databases(&mut session)?;
    for database in &databases {
        match driver.connect(&database.name, &context) {
            Ok(mut session) => look_at(driver, &mut session, database, &facts, &mut missing, &mut warnings)?,
            Err(error) if error.kind() == Kind::PermissionDenied => {
                let user = identifier(&driver.settings.user);
                missing.push(format!("GRANT CONNECT ON DATABASE {} TO {user};", identifier(&database.name)));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Probe {
        version: facts.version.clone(),
        identity: driver.identity()?,
        capability: Capability {
            pin: PinKind::Snapshot,
            observes_writes: !facts.standby,
            incremental: true,
            edges: true,
            swaps_in_place: true,
            partial_restore: true,
        },
        missing_privileges: missing,
        warnings,
    })
}

/// What concerns the server as a whole.
fn server_warnings(driver: &Postgres, session: &mut Session, facts: &Facts, warnings: &mut Vec<String>) -> Result<()> {
    if facts.major() < TESTED_SINCE {
        warnings.push(format!("PostgreSQL {} is older than any version this is tested with", facts.version));
    }
    if facts.standby && !driver.settings.allow_standby {
        warnings.push("the server is a standby: no backup is taken of it without `allowStandby: true`".to_owned());
    } else if facts.standby {
        warnings.push(
            "the server is a standby: it may cancel the view while its log is applied \
             (max_standby_streaming_delay, hot_standby_feedback), and holds no rows of unlogged tables"
                .to_owned(),
        );
    }
    if facts.system_identifier.is_empty() {
        warnings.push(
            "the server's identity cannot be read: GRANT EXECUTE ON FUNCTION pg_control_system(), \
             pg_control_checkpoint() to the backup role"
                .to_owned(),
        );
    }
    let row = session.query_one(
        "SELECT (SELECT count(*) FROM pg_prepared_xacts), (SELECT count(*) FROM pg_replication_slots WHERE slot_type = \
         'logical'), (SELECT count(*) FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')), \
         (SELECT coalesce(max(age(backend_xmin)), 0) FROM pg_stat_activity), has_table_privilege('pg_authid', 'SELECT')",
    )?;
    if driver.settings.roles == Some(Roles::WithPasswords) && !row.truth(4) {
        warnings
            .push("passwords of roles may not be read: GRANT pg_read_all_data, or roles: withoutPasswords".to_owned());
    }
    let mut count = |column: usize, text: &str| -> Result<()> {
        let number: i64 = row.number(column)?;
        if number > 0 {
            warnings.push(format!("{number} {text}"));
        }
        Ok(())
    };
    count(0, "prepared transactions: what they wrote is in no point until they are committed")?;
    count(1, "logical replication slots: slots are not part of a point, consumers must start anew")?;
    count(2, "tablespaces of its own: a restored server needs their folders, or `pg_default` takes their tables")?;
    if row.number::<i64>(3)? > OLD_VIEW {
        warnings.push("some session holds a very old view: vacuum is held up, and a backup adds to it".to_owned());
    }
    Ok(())
}

/// What concerns one database.
fn look_at(
    driver: &Postgres,
    session: &mut Session,
    database: &Listed,
    facts: &Facts,
    missing: &mut Vec<String>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let (name, user) = (&database.name, identifier(&driver.settings.user));
    match stamp::refuse_strangers(session, |schema, table| driver.settings.names_table(schema, table)) {
        Err(error) if error.kind() == Kind::Conflict => warnings.push(format!("no point can be taken: {error}")),
        other => other?,
    }
    let relations = catalog::relations(session, &driver.settings)?;
    let own_rows = |kind| matches!(kind, TableKind::Table | TableKind::Partitioned);
    let unreadable: Vec<String> = relations
        .iter()
        .filter(|relation| own_rows(relation.kind) && !relation.readable)
        .map(|relation| relation.label())
        .collect();
    let sequences = catalog::sequences(session, &driver.settings)?;
    let hidden: Vec<String> = sequences
        .iter()
        .filter(|sequence| !sequence.readable)
        .map(|sequence| format!("{}.{}", sequence.schema, sequence.name))
        .collect();
    if let Some(named) = some_of(&unreadable) {
        missing.push(format!("database `{name}`: may not read {named}: GRANT pg_read_all_data TO {user};"));
    }
    if let Some(named) = some_of(&hidden) {
        missing.push(format!("database `{name}`: may not read sequence {named}: GRANT pg_read_all_data TO {user};"));
    }
    let filtered: Vec<String> =
        relations.iter().filter(|relation| relation.row_security).map(|relation| relation.label()).collect();
    if let Some(named) = some_of(&filtered) {
        missing.push(format!("database `{name}`: row security hides rows of {named}: ALTER ROLE {user} BYPASSRLS;"));
    }
    let objects = session.query_one(
        "SELECT EXISTS (SELECT FROM pg_largeobject_metadata) AND NOT has_table_privilege('pg_largeobject', 'SELECT')",
    )?;
    if objects.truth(0) {
        missing.push(format!(
            "database `{name}`: may not read large objects (pg_largeobject): GRANT pg_read_all_data TO {user};"
        ));
    }
    let named = |warnings: &mut Vec<String>, labels: &[String], text: &str| {
        if let Some(labels) = some_of(labels) {
            warnings.push(format!("database `{name}`: {text}: {labels}"));
        }
    };
    let labels = |choose: &dyn Fn(&catalog::Relation) -> bool| -> Vec<String> {
        relations.iter().filter(|relation| choose(relation)).map(|relation| relation.label()).collect()
    };
    named(warnings, &labels(&|one| one.kind == TableKind::Foreign), "rows of foreign tables are elsewhere");
    named(warnings, &labels(&|one| one.unlogged), "unlogged tables are empty after a crash of the server");
    let locks = relations.iter().filter(|relation| relation.lockable()).count() as u64;
    if locks > facts.locks_max / 2 {
        warnings.push(format!(
            "database `{name}`: {locks} tables are more than half of what the server can lock \
             (max_locks_per_transaction)"
        ));
    }
    collations(session, name, facts, warnings)?;
    subscriptions(session, name, warnings)
}

/// Subscriptions, which a restore disables.
fn subscriptions(session: &mut Session, name: &str, warnings: &mut Vec<String>) -> Result<()> {
    let row = session.query_one(
        "SELECT count(*) FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database \
         WHERE datname = current_database())",
    );
    match row {
        Ok(row) if row.number::<i64>(0)? > 0 => {
            warnings.push(format!("database `{name}`: subscriptions come back disabled"));
        }
        // Only superusers may look at all of it before 15.
        Err(error) if error.kind() == Kind::PermissionDenied => {}
        other => {
            other?;
        }
    }
    Ok(())
}

/// Collations that changed below the indexes.
fn collations(session: &mut Session, name: &str, facts: &Facts, warnings: &mut Vec<String>) -> Result<()> {
    let mut sql = "SELECT count(*) FROM pg_collation WHERE collversion IS NOT NULL \
                   AND collversion IS DISTINCT FROM pg_collation_actual_version(oid)"
        .to_owned();
    if facts.major() >= 15 {
        sql.push_str(
            "; SELECT count(*) FROM pg_database WHERE datname = current_database() AND datcollversion IS NOT NULL \
             AND datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid)",
        );
    }
    let mut changed = 0;
    for row in session.query(&sql)? {
        changed += row.number::<i64>(0)?;
    }
    if changed > 0 {
        warnings.push(format!(
            "database `{name}`: collations changed since they were used for indexes: REINDEX, then ALTER DATABASE … \
             REFRESH COLLATION VERSION"
        ));
    }
    Ok(())
}

/// Names the first few; `None` of none.
fn some_of(labels: &[String]) -> Option<String> {
    let shown = labels.iter().take(NAMED_MAX).map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
    match labels.len() {
        0 => None,
        count if count > NAMED_MAX => Some(format!("{shown} and {} more", count - NAMED_MAX)),
        _ => Some(shown),
    }
}
