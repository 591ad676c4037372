//! The environment's stamp, and the moment in which a restored database opens.
//!
//! The stamp is one row of `stillpoint.stamp` in every database of the store. Beside it, a restored
//! database keeps in `stillpoint.opening` what lets its users in: planting the stamp carries that out, so
//! that nobody works in a copy that does not say it is one. Neither table is part of a point, nor a
//! difference.

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Stamp;

use super::restore::database::content;
use super::session::Session;
use super::wire::{literal, qualified};
use super::{Postgres, STAMP_SCHEMA};

/// The stamp's table.
const STAMP: &str = "stamp";
/// The database's own settings may make it read-only.
const BEGIN: &str = "BEGIN READ WRITE";
/// What is left to do when the stamp is planted.
const OPENING: &str = "opening";

/// Plants the stamp in every database of the store, and opens those that a restore left closed.
pub(super) fn stamp(driver: &Postgres, stamp: &Stamp) -> Result<()> {
    let context = Context::default();
    let text =
        serde_json::to_string(stamp).map_err(|error| Error::internal("a stamp does not serialize").source(error))?;
    let names = databases(driver, &context)?;
    if names.is_empty() {
        return Err(Error::new(Kind::NotFound, "there is no database to plant the stamp in"));
    }
    // All are stamped before the first one opens.
    for name in &names {
        let mut session = driver.connect(name, &context)?;
        let table = qualified(STAMP_SCHEMA, STAMP);
        if !has_table(&mut session, STAMP)? {
            session.execute(&format!(
                "{BEGIN}; CREATE SCHEMA IF NOT EXISTS {STAMP_SCHEMA}; {}; COMMIT",
                table_of(STAMP)
            ))?;
        }
        session.execute(&format!(
            "{BEGIN}; DELETE FROM {table}; INSERT INTO {table} VALUES ({}); COMMIT",
            literal(&text)
        ))?;
        session.close();
    }
    names.iter().try_for_each(|name| open(&mut driver.connect(name, &context)?))
}

/// Carries out what a restore left for this moment.
fn open(session: &mut Session) -> Result<()> {
    if !has_table(session, OPENING)? {
        return Ok(());
    }
    let table = qualified(STAMP_SCHEMA, OPENING);
    let rows = session.query(&format!("SELECT statement FROM {table} ORDER BY position"))?;
    let statements: Vec<String> = rows.iter().map(|row| row.string(0)).collect::<Result<_>>()?;
    if statements.is_empty() {
        return Ok(());
    }
    // One transaction: it is open and nothing is left to do, or it is closed. The table stays: removing it
    // would wake event triggers.
    session.execute(&format!("{BEGIN}; {}; DELETE FROM {table}; COMMIT", statements.join("; ")))
}

/// The statement that makes one of our tables.
fn table_of(name: &str) -> String {
    let columns =
        if name == STAMP { "stamp pg_catalog.text" } else { "position pg_catalog.int4, statement pg_catalog.text" };
    format!("CREATE TABLE {} ({columns})", qualified(STAMP_SCHEMA, name))
}

/// Makes our tables in the database of `session`, and notes what [`stamp`] is to do in it. Done before
/// event triggers are there, which would act on it.
pub(super) fn plan_opening(session: &mut Session, statements: &[String]) -> Result<()> {
    let rows: Vec<String> =
        statements.iter().enumerate().map(|(at, statement)| format!("({at}, {})", literal(statement))).collect();
    session.execute(&format!(
        "CREATE SCHEMA {STAMP_SCHEMA}; {}; {}; INSERT INTO {} VALUES {}",
        table_of(STAMP),
        table_of(OPENING),
        qualified(STAMP_SCHEMA, OPENING),
        rows.join(", ")
    ))
}

/// Reads the stamp of the first database that has one.
pub(super) fn read_stamp(driver: &Postgres) -> Result<Option<Stamp>> {
    let context = Context::default();
    for name in databases(driver, &context)? {
        let mut session = driver.connect(&name, &context)?;
        if !has_table(&mut session, STAMP)? {
            continue;
        }
        let rows = session.query(&format!("SELECT stamp FROM {}", qualified(STAMP_SCHEMA, STAMP)))?;
        if let Some(row) = rows.first() {
            return serde_json::from_str(row.text(0)?).map(Some).map_err(|error| {
                Error::new(Kind::Corrupt, format!("the stamp in `{name}` is not readable")).source(error)
            });
        }
    }
    Ok(None)
}

/// What the store's databases hold here, for people.
pub(super) fn occupied(driver: &Postgres) -> Result<Option<String>> {
    let context = Context::default();
    for name in databases(driver, &context)? {
        let mut session = driver.connect(&name, &context)?;
        if let Some(seen) = content(&mut session)? {
            return Ok(Some(format!("database {name}: {seen}")));
        }
    }
    Ok(None)
}

/// The databases of the store that are there and open. What restores give another name counts under that
/// name; the name it had at its source does not, for the source may be on the same server.
fn databases(driver: &Postgres, context: &Context) -> Result<Vec<String>> {
    let settings = &driver.settings;
    let mut session = admin(driver, context, &[])?;
    let rows = session.query(
        "SELECT datname FROM pg_catalog.pg_database WHERE NOT datistemplate AND datallowconn ORDER BY datname",
    )?;
    let names: Vec<String> = rows.iter().map(|row| row.string(0)).collect::<Result<_>>()?;
    let is_renamed = |name: &String| settings.rename.values().any(|to| to == name);
    Ok(names
        .into_iter()
        .filter(|name| is_renamed(name) || (settings.has_database(name) && !settings.rename.contains_key(name)))
        .filter(|name| !name.contains("__stillpoint_") && !name.contains("__before_"))
        .collect())
}

/// A session on a database that is none of `avoided`: those are about to be renamed or removed.
pub(super) fn admin(driver: &Postgres, context: &Context, avoided: &[&str]) -> Result<Session> {
    let first = driver.settings.database.as_deref().unwrap_or("postgres");
    let mut last = None;
    for name in [first, "postgres", "template1"] {
        if avoided.contains(&name) {
            continue;
        }
        match driver.connect(name, context) {
            Ok(session) => return Ok(session),
            Err(error) if error.kind() == Kind::NotFound => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last
        .unwrap_or_else(|| Error::new(Kind::NotFound, "there is no database to connect to"))
        .hint("name one that is not restored itself: stores.<name>.database"))
}

fn has_table(session: &mut Session, name: &str) -> Result<bool> {
    let row = session.query_one(&format!(
        "SELECT pg_catalog.to_regclass({}) IS NOT NULL",
        literal(&qualified(STAMP_SCHEMA, name))
    ))?;
    Ok(row.truth(0))
}
