//! One database at the target as a whole: made, opened, removed; and whether it holds anything.
//!
//! A database is built under a name of its own and lets nobody in. What it becomes when it opens, its
//! privileges and limits, is kept within it until the stamp is planted: see `stamp.rs`.

use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::STAMP_SCHEMA;
use super::super::layout::Database;
use super::super::session::Session;
use super::super::stamp::IS_OURS;
use super::super::wire::{identifier, literal};
use super::Way;
use super::grants;
use super::source::StoredDatabase;

/// The longest name, in bytes; a build-time constant of the server (NAMEDATALEN - 1).
const NAME_BYTES_MAX: usize = 63;

/// `name` with an ending, cut where both together are too long for the server.
pub(in super::super) fn beside(name: &str, ending: &str) -> String {
    let mut room = NAME_BYTES_MAX.saturating_sub(ending.len()).min(name.len());
    while !name.is_char_boundary(room) {
        room -= 1;
    }
    let mut whole = format!("{}{ending}", &name[..room]);
    let mut end = whole.len().min(NAME_BYTES_MAX);
    while !whole.is_char_boundary(end) {
        end -= 1;
    }
    whole.truncate(end);
    whole
}

/// The name under which a database is built.
pub(in super::super) fn building_name(name: &str, restore: &str) -> String {
    beside(name, &format!("__stillpoint_{restore}"))
}

/// The name that the old database gets.
pub(in super::super) fn kept_name(name: &str, restore: &str) -> String {
    beside(name, &format!("__before_{restore}"))
}

/// Makes the database, empty and closed.
pub(super) fn create(
    session: &mut Session,
    name: &str,
    about: &Database,
    major: u32,
    losses: &mut Vec<Loss>,
) -> Result<()> {
    let mut sql =
        format!("CREATE DATABASE {} TEMPLATE template0 ENCODING {}", identifier(name), literal(&about.encoding));
    let provider = about.provider.as_str();
    if major >= 15 {
        sql.push_str(&format!(" LOCALE_PROVIDER {}", identifier(provider)));
    } else if provider != "libc" {
        return Err(Error::new(Kind::Unsupported, format!("the server has no collations by `{provider}`"))
            .context("database", &about.name)
            .hint("restore into version 15 or newer"));
    }
    sql.push_str(&format!(" LC_COLLATE {} LC_CTYPE {}", literal(&about.collate), literal(&about.ctype)));
    match (provider, &about.locale) {
        ("icu", Some(locale)) => sql.push_str(&format!(" ICU_LOCALE {}", literal(locale))),
        ("builtin", Some(locale)) => sql.push_str(&format!(" BUILTIN_LOCALE {}", literal(locale))),
        _ => {}
    }
    if let (Some(rules), true) = (&about.icu_rules, major >= 16) {
        sql.push_str(&format!(" ICU_RULES {}", literal(rules)));
    }
    if about.tablespace != "pg_default" {
        let known = format!("SELECT 1 FROM pg_catalog.pg_tablespace WHERE spcname = {}", literal(&about.tablespace));
        match session.query(&known)?.is_empty() {
            false => sql.push_str(&format!(" TABLESPACE {}", identifier(&about.tablespace))),
            true => losses.push(Loss {
                what: format!("tablespace {} of {}", about.tablespace, about.name),
                why: "there is none here; the default one is used".to_owned(),
            }),
        }
    }
    session.execute(&sql).map_err(|error| {
        error.context("database", &about.name).hint(
            "the role must be allowed to create databases (ALTER ROLE … CREATEDB), and the server must know the locale",
        )
    })?;
    session.execute(&format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", identifier(name)))?;
    if major >= 15 {
        drift(session, name, about, losses)?;
    }
    Ok(())
}

/// Names a collation library of another version. Indexes are built anew, so they are sound; the order of
/// texts, and what a unique index takes for equal, may differ.
fn drift(session: &mut Session, name: &str, about: &Database, losses: &mut Vec<Loss>) -> Result<()> {
    let row = session.query_one(&format!(
        "SELECT pg_catalog.pg_database_collation_actual_version(oid) FROM pg_catalog.pg_database WHERE datname = {}",
        literal(name)
    ))?;
    if let (Some(source), Some(here)) = (&about.collation_version, row.optional(0)?)
        && source != here
    {
        losses.push(Loss {
            what: format!("collation {} of {}", about.collate, about.name),
            why: format!("version {source} at the source, {here} here: texts may be sorted in another order"),
        });
    }
    Ok(())
}

/// What is done last, under the final name, so that the database lets its users in.
pub(super) fn opening(
    session: &mut Session,
    name: &str,
    stored: &StoredDatabase,
    with_grants: bool,
) -> Result<Vec<String>> {
    let about = &stored.about;
    let what = format!("DATABASE {}", identifier(name));
    let mut all = match (&about.grants, with_grants) {
        (Some(grants), true) => grants::statements(session, &what, &about.owner, grants)?,
        _ => vec![format!("GRANT CONNECT, TEMPORARY ON {what} TO PUBLIC")],
    };
    if about.connection_limit >= 0 {
        all.push(format!("ALTER {what} CONNECTION LIMIT {}", about.connection_limit));
    }
    if about.is_template {
        all.push(format!("ALTER {what} IS_TEMPLATE true"));
    }
    if !about.allow_connections {
        all.push(format!("ALTER {what} ALLOW_CONNECTIONS false"));
    }
    Ok(all)
}

/// Whether the schema of the stamp holds anything that is not ours.
pub(in super::super) fn stamp_schema_has_more(session: &mut Session) -> Result<bool> {
    let row = session.query_one(&format!(
        "WITH it AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = {}) SELECT \
         EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace IN (SELECT oid FROM it) \
           AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c') AND NOT {IS_OURS}) \
         OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace IN (SELECT oid FROM it)) \
         OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE typnamespace IN (SELECT oid FROM it) \
           AND typtype IN ('e', 'd', 'r'))",
        literal(STAMP_SCHEMA)
    ))?;
    Ok(row.truth(0))
}

/// What a database holds, for people; `None` if it is as good as new. The stamp counts as nothing.
pub(in super::super) fn content(session: &mut Session) -> Result<Option<String>> {
    let row = session.query_one(&format!(
        "WITH ours AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_' \
           AND nspname <> 'information_schema'), \
         members AS (SELECT classid, objid FROM pg_catalog.pg_depend WHERE deptype = 'e') \
         SELECT (SELECT pg_catalog.count(*) FROM pg_catalog.pg_class c WHERE c.relnamespace IN (SELECT oid FROM ours) \
             AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT {IS_OURS} \
             AND NOT EXISTS (SELECT FROM members m WHERE m.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND m.objid = c.oid)), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_proc p WHERE p.pronamespace IN (SELECT oid FROM ours) \
             AND NOT EXISTS (SELECT FROM members m WHERE m.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND m.objid = p.oid)), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace n WHERE n.oid IN (SELECT oid FROM ours) AND n.nspname NOT IN ('public', {stamp}) \
             AND NOT EXISTS (SELECT FROM members m WHERE m.classid = 'pg_catalog.pg_namespace'::pg_catalog.regclass AND m.objid = n.oid)), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_type t WHERE t.typnamespace IN (SELECT oid FROM ours) \
             AND t.typtype IN ('e', 'd', 'r') \
             AND NOT EXISTS (SELECT FROM members m WHERE m.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND m.objid = t.oid)), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_largeobject_metadata), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_extension WHERE extname <> 'plpgsql')",
        stamp = literal(STAMP_SCHEMA)
    ))?;
    let names = ["tables and views", "functions", "schemas", "types", "large objects", "extensions"];
    let mut seen = Vec::new();
    for (column, name) in names.iter().enumerate() {
        let count: u64 = row.number(column)?;
        if count > 0 {
            seen.push(format!("{count} {name}"));
        }
    }
    Ok((!seen.is_empty()).then(|| seen.join(", ")))
}

/// Ends the sessions of others in a database. Who may not end them hears why.
pub(in super::super) fn end_sessions(session: &mut Session, name: &str) -> Result<()> {
    session.execute(&format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
         WHERE datname = {} AND pid <> pg_catalog.pg_backend_pid()",
        literal(name)
    ))
}

/// Removes a database that a restore was building, whatever state it is in. Absent is fine.
pub(super) fn remove(way: &Way<'_>, admin: &mut Session, name: &str) -> Result<()> {
    let known = format!("SELECT datallowconn FROM pg_catalog.pg_database WHERE datname = {}", literal(name));
    if admin.query(&known)?.is_empty() {
        return Ok(());
    }
    // A subscription keeps its database from being removed, and must be cut off from its publisher first.
    if let Ok(mut session) = way.connect(name) {
        let subscriptions = session.query(
            "SELECT subname FROM pg_catalog.pg_subscription WHERE subdbid = \
             (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
        );
        for row in subscriptions.unwrap_or_default() {
            let name = identifier(row.text(0)?);
            session.execute(&format!("ALTER SUBSCRIPTION {name} DISABLE"))?;
            session.execute(&format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)"))?;
            session.execute(&format!("DROP SUBSCRIPTION {name}"))?;
        }
        session.close();
    }
    let force = if admin.major() >= 13 { " WITH (FORCE)" } else { "" };
    if force.is_empty() {
        end_sessions(admin, name)?;
    }
    admin.execute(&format!("DROP DATABASE IF EXISTS {}{force}", identifier(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beside_fit_the_server_and_keep_their_ending() {
        assert_eq!(building_name("app", "r1"), "app__stillpoint_r1");
        let long = kept_name(&"é".repeat(31), "20261121-100003-abcdef");
        assert!(long.len() <= 63 && long.ends_with("__before_20261121-100003-abcdef"), "{long}");
        assert!(beside("x", &"e".repeat(80)).len() <= 63);
    }
}
