//! The environment's stamp, and the moment in which a restored database opens.
//!
//! The stamp is one row of `stillpoint.stamp` in every database of the store. Beside it, a restored
//! database keeps in `stillpoint.opening` what lets its users in: planting the stamp carries that out, so
//! that nobody works in a copy that does not say it is one. Neither table is part of a point, nor a
//! difference.

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::{Context, Loss, RestoreRequest};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::TreePath;

use super::layout::Database;
use super::restore::database::content;
use super::session::Session;
use super::wire::{identifier, literal, qualified};
use super::{Postgres, STAMP_SCHEMA};

/// The stamp's table.
const STAMP: &str = "stamp";
/// The database's own settings may make it read-only.
const BEGIN: &str = "BEGIN READ WRITE";
/// What is left to do when the stamp is planted.
const OPENING: &str = "opening";
/// The place of a restore's note in it, before the statements.
const NOTE: i32 = -1;

/// Whether the relation `c` has the form of one of our tables: what merely has the name is the user's.
pub(super) const IS_OURS: &str = "(c.relkind = 'r' AND c.relnamespace = (SELECT oid FROM pg_catalog.pg_namespace \
    WHERE nspname = 'stillpoint') AND (c.relname::pg_catalog.text, (SELECT pg_catalog.string_agg(a.attname || ' ' || \
    pg_catalog.format_type(a.atttypid, NULL), ', ' ORDER BY a.attnum) FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)) IN (('stamp', 'stamp text'), \
    ('opening', 'position integer, statement text')))";

/// What a restore notes in each database that it has built, before the swap. A later try finds it there
/// where this one was ended between the swap and its report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The try that built the database.
    pub(super) restore: String,
    /// The part of the point that it holds.
    part: Option<String>,
    /// What the database is at the source, and its view there.
    view: String,
    /// What the restore could not bring back.
    pub(super) losses: Vec<Loss>,
}

impl Note {
    pub(super) fn new(request: &RestoreRequest, about: &Database, losses: &[Loss]) -> Self {
        Self {
            restore: request.restore.clone(),
            part: request.part.as_ref().map(TreePath::to_string),
            view: format!("{} {}", about.oid, about.snapshot),
            losses: losses.to_vec(),
        }
    }

    /// Whether it is of this restore, or of an earlier try of it.
    pub(super) fn is_of(&self, request: &RestoreRequest, about: &Database) -> bool {
        let of_this = Self { restore: self.restore.clone(), ..Self::new(request, about, &self.losses) };
        *self == of_this && (self.restore == request.restore || request.earlier().contains(&self.restore))
    }

    /// Leaves the note in the database of `session`, whatever its own settings say of writing.
    pub(super) fn leave(&self, session: &mut Session) -> Result<()> {
        let text =
            serde_json::to_string(self).map_err(|error| Error::internal("a note does not serialize").source(error))?;
        let table = qualified(STAMP_SCHEMA, OPENING);
        session.execute(&format!("{BEGIN}; INSERT INTO {table} VALUES ({NOTE}, {}); COMMIT", literal(&text)))
    }

    /// The note in the database of `session`.
    pub(super) fn read(session: &mut Session) -> Result<Option<Self>> {
        match has_table(session, OPENING) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            // What somebody else made says nothing of our restores.
            Err(error) if error.kind() == Kind::Conflict => return Ok(None),
            Err(error) => return Err(error),
        }
        let table = qualified(STAMP_SCHEMA, OPENING);
        let rows = session.query(&format!("SELECT statement FROM {table} WHERE position = {NOTE}"))?;
        Ok(rows.first().and_then(|row| serde_json::from_str(row.text(0).ok()?).ok()))
    }
}

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
    let rows = session.query(&format!("SELECT statement FROM {table} WHERE position > {NOTE} ORDER BY position"))?;
    let statements: Vec<String> = rows.iter().map(|row| row.string(0)).collect::<Result<_>>()?;
    if statements.is_empty() {
        return Ok(());
    }
    if let Some(unknown) = statements.iter().find(|statement| !is_opening(statement, session.database())) {
        return Err(Error::new(Kind::Conflict, format!("`{STAMP_SCHEMA}.{OPENING}` holds what no restore has left"))
            .context("statement", unknown)
            .hint("look who wrote it; DELETE FROM stillpoint.opening, then let the users in by hand"));
    }
    // One transaction: it is open and nothing is left to do, or it is closed. The table stays: removing it
    // would wake event triggers. So does the note: users are in from here on, and another try of the same
    // restore must not replace what they write.
    session.execute(&format!("{BEGIN}; {}; DELETE FROM {table} WHERE position > {NOTE}; COMMIT", statements.join("; ")))
}

/// The statements that make one of our tables. Publications of all tables take it in, and rows that are
/// published can only be removed where something identifies them.
fn table_of(name: &str) -> String {
    let table = qualified(STAMP_SCHEMA, name);
    let columns =
        if name == STAMP { "stamp pg_catalog.text" } else { "position pg_catalog.int4, statement pg_catalog.text" };
    format!("CREATE TABLE {table} ({columns}); ALTER TABLE {table} REPLICA IDENTITY FULL")
}

/// Makes our tables in the database of `session`, and notes what [`stamp`] is to do in it. Done before
/// event triggers are there, which would act on it.
pub(super) fn plan_opening(session: &mut Session, statements: &[String]) -> Result<()> {
    let rows: Vec<String> =
        statements.iter().enumerate().map(|(at, statement)| format!("({at}, {})", literal(statement))).collect();
    session.execute(&format!(
        "CREATE SCHEMA IF NOT EXISTS {STAMP_SCHEMA}; {}; {}; INSERT INTO {} VALUES {}",
        table_of(STAMP),
        table_of(OPENING),
        qualified(STAMP_SCHEMA, OPENING),
        rows.join(", ")
    ))
}

/// Reads the stamps of all databases. They must agree: one that belongs elsewhere, or bears no stamp and holds
/// something, must not be taken for the copy that its neighbour is.
pub(super) fn read_stamp(driver: &Postgres) -> Result<Option<Stamp>> {
    let context = Context::default();
    let (mut stamped, mut bare) = (Vec::new(), Vec::new());
    for name in databases(driver, &context)? {
        match stamp_of(&mut driver.connect(&name, &context)?)? {
            Some(stamp) => stamped.push((name, stamp)),
            None => bare.push(name),
        }
    }
    let Some((name, stamp)) = stamped.first() else { return Ok(None) };
    let whose = |stamp: &Stamp| format!("{} · {}", stamp.platform, stamp.environment);
    if let Some((other, its)) = stamped.iter().find(|(_, other)| whose(other) != whose(stamp)) {
        return Err(Error::new(
            Kind::Conflict,
            format!("database `{name}` belongs to {}, and database `{other}` to {}", whose(stamp), whose(its)),
        )
        .hint("they are no store together: name by `databases` or `excludeDatabases` which ones are meant"));
    }
    for other in bare {
        let mut session = driver.connect(&other, &context)?;
        // One that is not open yet lacks its stamp only because a restore was ended before it was planted.
        if Note::read(&mut session)?.is_none()
            && let Some(seen) = content(&mut session)?
        {
            return Err(Error::new(
                Kind::Fenced,
                format!(
                    "database `{name}` belongs to {}, and database `{other}` bears no stamp: it may be somebody's original",
                    whose(stamp)
                ),
            )
            .context("holds", seen)
            .hint("look whose it is; `excludeDatabases` leaves it alone"));
        }
    }
    Ok(stamped.into_iter().next().map(|(_, stamp)| stamp))
}

fn stamp_of(session: &mut Session) -> Result<Option<Stamp>> {
    if !has_table(session, STAMP)? {
        return Ok(None);
    }
    session.execute("BEGIN READ ONLY")?;
    let rows = session.query(&format!("SELECT stamp FROM {}", qualified(STAMP_SCHEMA, STAMP)))?;
    session.execute("COMMIT")?;
    let Some(row) = rows.first() else { return Ok(None) };
    let unreadable = || Error::new(Kind::Corrupt, format!("the stamp in `{}` is not readable", session.database()));
    serde_json::from_str(row.text(0)?).map(Some).map_err(|error| unreadable().source(error))
}

/// Refuses a database in which a table of the user's has the name of one of ours: it would be in no point, and
/// where it stands no stamp can be planted.
pub(super) fn refuse_strangers(session: &mut Session, is_chosen: impl Fn(&str, &str) -> bool) -> Result<()> {
    let rows = session.query(&format!(
        "SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = {} AND c.relname IN ({}, {}) AND NOT {IS_OURS}",
        literal(STAMP_SCHEMA),
        literal(STAMP),
        literal(OPENING)
    ))?;
    for row in &rows {
        let name = row.text(0)?;
        if is_chosen(STAMP_SCHEMA, name) {
            let label = format!("{STAMP_SCHEMA}.{name}");
            return Err(Error::new(
                Kind::Conflict,
                format!(
                    "`{label}` of database `{}` has the name of the environment's stamp and is none",
                    session.database()
                ),
            )
            .hint(format!(
                "rename it; or leave it out by `excludeTables: [{label}]`, knowing that no point holds it"
            )));
        }
    }
    Ok(())
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

/// Whether one of our tables is there. Refuses what merely has its name: whoever may make a schema could
/// have made a table there that runs his code as this role, or says what he likes.
fn has_table(session: &mut Session, name: &str) -> Result<bool> {
    let rows = session.query(&format!(
        "SELECT c.relkind = 'r' AND NOT (c.relhasrules OR c.relhastriggers OR c.relhasindex OR c.relrowsecurity \
           OR c.relhassubclass OR c.relispartition OR c.relchecks > 0) AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a \
           WHERE a.attrelid = c.oid AND a.attnum > 0 AND (a.atthasdef OR a.attidentity <> '' OR a.atttypid NOT IN \
           (0, 'pg_catalog.text'::pg_catalog.regtype, 'pg_catalog.int4'::pg_catalog.regtype))) \
         AND (r.rolsuper OR r.rolname = current_user OR r.oid = (SELECT datdba FROM pg_catalog.pg_database \
           WHERE datname = pg_catalog.current_database())) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         JOIN pg_catalog.pg_roles r ON r.oid = c.relowner WHERE n.nspname = {} AND c.relname = {}",
        literal(STAMP_SCHEMA),
        literal(name)
    ))?;
    match rows.first() {
        None => Ok(false),
        Some(row) if row.truth(0) => Ok(true),
        Some(_) => Err(Error::new(
            Kind::Conflict,
            format!("`{STAMP_SCHEMA}.{name}` of database `{}` is not the table of the stamp", session.database()),
        )
        .hint(
            "it must be a plain table of this role, of the database's owner or of a superuser: rename what is there",
        )),
    }
}

/// Whether a statement does no more than let users into the database: privileges on it, and its limits. The
/// table it was read from lies where others may write.
fn is_opening(statement: &str, database: &str) -> bool {
    let of_database = format!("DATABASE {} ", identifier(database));
    let Some((before, after)) = statement.split_once(&of_database) else { return false };
    if !before.chars().all(|c| c.is_ascii_uppercase() || matches!(c, ' ' | ',')) {
        return false;
    }
    if before == "ALTER " {
        let limit = after.strip_prefix("CONNECTION LIMIT ").is_some_and(|n| n.bytes().all(|c| c.is_ascii_digit()));
        return limit || matches!(after, "IS_TEMPLATE true" | "ALLOW_CONNECTIONS false");
    }
    let role = match before.split(' ').next() {
        Some("GRANT") => after.strip_prefix("TO ").map(|role| role.strip_suffix(" WITH GRANT OPTION").unwrap_or(role)),
        Some("REVOKE") => after.strip_prefix("FROM "),
        _ => None,
    };
    before.ends_with(" ON ") && role.is_some_and(is_role)
}

/// Whether a text is one name, as it is or in quotes.
fn is_role(text: &str) -> bool {
    match text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(within) => !within.replace("\"\"", "").contains('"'),
        None => !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '$')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_statements_that_let_users_in_are_carried_out() {
        for known in [
            "REVOKE ALL ON DATABASE \"a b\" FROM PUBLIC",
            "GRANT CONNECT, TEMPORARY ON DATABASE \"a b\" TO PUBLIC",
            "GRANT CREATE ON DATABASE \"a b\" TO \"x\"\"y\" WITH GRANT OPTION",
            "ALTER DATABASE \"a b\" CONNECTION LIMIT 7",
            "ALTER DATABASE \"a b\" ALLOW_CONNECTIONS false",
        ] {
            assert!(is_opening(known, "a b"), "{known}");
            assert!(!is_opening(known, "other"), "{known}");
        }
        for other in [
            "GRANT pg_read_all_data TO evil",
            "ALTER ROLE evil SUPERUSER",
            "GRANT CREATE ON DATABASE \"a b\" TO x; ALTER ROLE x SUPERUSER",
            "GRANT CREATE ON DATABASE \"a b\" TO \"x\"; ALTER ROLE \"x\"",
            "SELECT f(); GRANT CREATE ON DATABASE \"a b\" TO x",
            "ALTER DATABASE \"a b\" OWNER TO x",
            "ALTER DATABASE \"a b\" CONNECTION LIMIT 7; SELECT f()",
        ] {
            assert!(!is_opening(other, "a b"), "{other}");
        }
    }
}
