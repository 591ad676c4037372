//! The environment stamp, what a target holds already, and statements of pause steps.
//!
//! The stamp is one row of `stillpoint.stamp` in each of the store's databases; that schema is part of
//! no point and of no comparison.

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Stamp;

use super::client::list_databases;
use super::session::Session;
use super::wire::{identifier, literal};
use super::{Postgres, STAMP_SCHEMA};

/// Plants the stamp in every database of the store.
pub(super) fn stamp(driver: &Postgres, stamp: &Stamp) -> Result<()> {
    let text = serde_json::to_string(stamp).map_err(|e| Error::internal("a stamp does not serialize").source(e))?;
    let (mut session, _) = look(driver)?;
    let context = Context::default();
    for database in driver.databases(&mut session)? {
        let mut session = driver.connect(&database.name, &context)?;
        let schema = identifier(STAMP_SCHEMA);
        session.execute(&format!(
            "BEGIN; CREATE SCHEMA IF NOT EXISTS {schema}; \
             CREATE TABLE IF NOT EXISTS {schema}.stamp (stamp text NOT NULL); \
             DELETE FROM {schema}.stamp; INSERT INTO {schema}.stamp VALUES ({}); COMMIT",
            literal(&text)
        ))?;
    }
    Ok(())
}

/// Reads the stamp of the first database that has one.
pub(super) fn read_stamp(driver: &Postgres) -> Result<Option<Stamp>> {
    let context = Context::default();
    for name in present(driver)? {
        let mut session = driver.connect(&name, &context)?;
        let sql = format!("SELECT to_regclass({})", literal(&format!("{}.stamp", identifier(STAMP_SCHEMA))));
        if session.query_one(&sql)?.bytes(0).is_none() {
            continue;
        }
        let rows = session.query(&format!("SELECT stamp FROM {}.stamp", identifier(STAMP_SCHEMA)))?;
        if let Some(row) = rows.first() {
            let stamp = serde_json::from_str(row.text(0)?)
                .map_err(|error| Error::new(Kind::Corrupt, "the stamp is not readable").source(error))?;
            return Ok(Some(stamp));
        }
    }
    Ok(None)
}

/// What the store's databases hold already.
pub(super) fn occupied(driver: &Postgres) -> Result<Option<String>> {
    let context = Context::default();
    for name in present(driver)? {
        let mut session = driver.connect(&name, &context)?;
        if let Some(what) = content(&mut session)? {
            return Ok(Some(format!("database `{name}`: {what}")));
        }
    }
    Ok(None)
}

/// What a database holds that is not the system's, an extension's or ours; the first thing found.
pub(super) fn content(session: &mut Session) -> Result<Option<String>> {
    // Objects of extensions do not count, and 16384 is the first identifier that is not the system's.
    let own = |class: &str, oid: &str| {
        format!(
            "NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = '{class}'::regclass AND d.objid = {oid} \
             AND d.deptype IN ('e', 'i'))"
        )
    };
    let schema = literal(STAMP_SCHEMA);
    let relations = own("pg_class", "c.oid");
    let routines = own("pg_proc", "p.oid");
    let types = own("pg_type", "t.oid");
    let row = session.query_one(&format!(
        "SELECT (SELECT 'table or view ' || n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n \
         ON n.oid = c.relnamespace WHERE c.oid >= 16384 AND n.nspname <> {schema} AND c.relkind IN ('r', 'p', 'v', 'm', \
         'f', 'S') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND {relations} LIMIT 1), \
         (SELECT 'function ' || n.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace n \
         ON n.oid = p.pronamespace WHERE p.oid >= 16384 AND n.nspname !~ '^pg_' AND {routines} LIMIT 1), \
         (SELECT 'type ' || n.nspname || '.' || t.typname FROM pg_type t JOIN pg_namespace n \
         ON n.oid = t.typnamespace WHERE t.oid >= 16384 AND n.nspname <> {schema} AND n.nspname !~ '^pg_' \
         AND {types} LIMIT 1), \
         (SELECT 'large object ' || oid FROM pg_largeobject_metadata LIMIT 1)"
    ))?;
    for column in 0..4 {
        if let Some(found) = row.optional(column)? {
            return Ok(Some(found.to_owned()));
        }
    }
    Ok(None)
}

/// Runs one statement of the operator's, in the database of queries, with his search path.
pub(super) fn execute(driver: &Postgres, statement: &str) -> Result<()> {
    let mut session = driver.connect(driver.settings.query_database(), &Context::default())?;
    session.execute("RESET search_path; RESET row_security; RESET TimeZone; RESET DateStyle")?;
    session.execute(statement)
}

/// The store's databases that are there.
fn present(driver: &Postgres) -> Result<Vec<String>> {
    let (mut session, _) = look(driver)?;
    let all = list_databases(&mut session)?;
    let chosen = all.into_iter().filter(|database| database.open && driver.settings.has_database(&database.name));
    Ok(chosen.map(|database| database.name).collect())
}

/// A session on the first database; on `postgres` where that one is yet to be made.
fn look(driver: &Postgres) -> Result<(Session, ())> {
    let context = Context::default();
    match driver.connect(driver.settings.first_database(), &context) {
        Err(error) if error.kind() == Kind::NotFound && driver.settings.database.is_none() => {
            Ok((driver.connect("postgres", &context)?, ()))
        }
        other => Ok((other?, ())),
    }
}
