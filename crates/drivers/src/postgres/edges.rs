//! The operator's own SQL: queries of references, on the pinned view or on the live database, and the
//! statements of pause steps.
//!
//! Answers come through COPY, so that memory does not grow with them. Queries run
//! read-only, and everything runs with the role's own search path.

use stillpoint_core::driver::{Context, Edge, EdgeQuery, Pin};
use stillpoint_core::error::{Error, Kind, Result};

use super::Postgres;
use super::pool::BEGIN;
use super::session::Session;
use super::wire::{Tally, identifier, literal};
use crate::phases::Visit;

/// How much of an answer is taken apart at once.
const BATCH_BYTES: usize = 128 << 10;

/// Answers an edge query.
pub(super) fn edges(
    driver: &Postgres,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: Visit<'_>,
) -> Result<()> {
    let mut session = open(driver, context, pin)?;
    match query {
        EdgeQuery::From(sql) => each(&mut session, &question(sql)?, visit),
        EdgeQuery::Held(kind) => {
            let (table, column) = parse_kind(kind)?;
            each(&mut session, &format!("SELECT {column} FROM {table}"), visit)
        }
        EdgeQuery::Which { kind, referents } => {
            let (table, column) = parse_kind(kind)?;
            let asked: Vec<String> =
                referents.iter().map(|referent| literal(&String::from_utf8_lossy(referent))).collect();
            if asked.is_empty() {
                return Ok(());
            }
            let sql =
                format!("SELECT DISTINCT {column}::text FROM {table} WHERE {column}::text IN ({})", asked.join(", "));
            each(&mut session, &sql, visit)
        }
    }
}

/// A session of its own, because the query may set what it likes.
fn open(driver: &Postgres, context: &Context, pin: Option<&Pin>) -> Result<Session> {
    let Some(pin) = pin else {
        // Without a pin it is what a restore made that is asked.
        let mut session = driver.connect(driver.settings.restored_query_database(), context)?;
        session.execute(&format!("RESET search_path; {BEGIN}"))?;
        return Ok(session);
    };
    let database = driver.settings.query_database();
    let mut session = driver.connect(database, context)?;
    let view = driver.view(pin)?;
    let shown = view.databases.iter().find(|shown| shown.name == database).ok_or_else(|| {
        Error::new(Kind::Config, format!("queries run in database `{database}`, which is not part of the store"))
            .hint("name one of the store's databases in `queryDatabase`")
    })?;
    session.execute(&format!("RESET search_path; {BEGIN}; SET TRANSACTION SNAPSHOT {}", literal(&shown.exported)))?;
    Ok(session)
}

/// Runs one statement of the operator's, for pause steps, in the database of queries.
pub(super) fn execute(driver: &Postgres, statement: &str) -> Result<()> {
    let mut session = driver.connect(driver.settings.query_database(), &Context::default())?;
    session.execute("RESET search_path; RESET row_security; RESET TimeZone; RESET DateStyle")?;
    session.execute(statement)
}

/// The query without the semicolon at its end; more than one statement is refused by the server.
fn question(sql: &str) -> Result<String> {
    let trimmed = sql.trim().trim_end_matches(';').trim_end();
    if trimmed.is_empty() {
        return Err(Error::new(Kind::Config, "the query is empty").hint("query: SELECT object_key, id FROM models"));
    }
    // On a line of its own: the query may end in a comment.
    Ok(format!("{trimmed}\n"))
}

/// The table and the column of `rows:table.column` or `rows:schema.table.column`, quoted.
fn parse_kind(kind: &str) -> Result<(String, String)> {
    let parts: Vec<&str> = kind.strip_prefix("rows:").map(|names| names.split('.').collect()).unwrap_or_default();
    match parts.as_slice() {
        [table, column] => Ok((identifier(table), identifier(column))),
        [schema, table, column] => Ok((format!("{}.{}", identifier(schema), identifier(table)), identifier(column))),
        _ => Err(Error::new(Kind::Unsupported, format!("`{kind}` is no kind of referent of a database"))
            .hint("kind: rows:schema.table.column")),
    }
}

/// Calls `visit` for each row; a referent that is NULL names nothing and is passed over.
fn each(session: &mut Session, sql: &str, visit: Visit<'_>) -> Result<()> {
    session.copy_out(&format!("COPY ({sql}) TO STDOUT"))?;
    let mut buffer = vec![0; BATCH_BYTES];
    let mut rest = Vec::new();
    let mut tally = Tally::default();
    loop {
        let count = session.copy_read(&mut buffer, &mut tally)?;
        if count == 0 {
            return Ok(());
        }
        for piece in buffer[..count].split_inclusive(|&byte| byte == b'\n') {
            if piece.last() != Some(&b'\n') {
                rest.extend_from_slice(piece);
            } else if rest.is_empty() {
                edge(piece).map_or(Ok(()), &mut *visit)?;
            } else {
                rest.extend_from_slice(piece);
                edge(&rest).map_or(Ok(()), &mut *visit)?;
                rest.clear();
            }
        }
    }
}

/// The edge that a row of COPY text says.
fn edge(row: &[u8]) -> Option<Edge> {
    let row = row.strip_suffix(b"\n").unwrap_or(row);
    let mut columns = row.split(|&byte| byte == b'\t');
    let referent = value(columns.next().unwrap_or_default())?;
    let owner = columns.next().and_then(value).unwrap_or_default();
    Some(Edge { referent, owner: String::from_utf8_lossy(&owner).into_owned() })
}

/// A value of COPY text; `None` for NULL. The server writes backslashes before these letters, and
/// before nothing else.
fn value(text: &[u8]) -> Option<Vec<u8>> {
    if text == b"\\N" {
        return None;
    }
    if !text.contains(&b'\\') {
        return Some(text.to_vec());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(&byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 11,
                Some(&other) => other,
                None => b'\\',
            },
            other => other,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_edges_and_null_names_nothing() {
        let edge_of = |row: &[u8]| edge(row).map(|edge| (edge.referent, edge.owner));
        assert_eq!(edge_of(b"a/b\tmodels 1\n"), Some((b"a/b".to_vec(), "models 1".to_owned())));
        assert_eq!(edge_of(b"tab\\tback\\\\slash\\n\t\\N\n"), Some((b"tab\tback\\slash\n".to_vec(), String::new())));
        assert_eq!(edge_of(b"\\N\tmodels 2\n"), None);
        assert_eq!(edge_of(b"\n"), Some((Vec::new(), String::new())));
    }

    #[test]
    fn queries_and_kinds_are_checked() {
        assert_eq!(question(" SELECT 1; ").unwrap(), "SELECT 1\n");
        assert!(question(" ; ").is_err());
        assert_eq!(parse_kind("rows:models.key").unwrap(), ("\"models\"".to_owned(), "\"key\"".to_owned()));
        assert_eq!(parse_kind("rows:a.b.c").unwrap().0, "\"a\".\"b\"");
        assert!(parse_kind("keys").is_err());
    }
}
