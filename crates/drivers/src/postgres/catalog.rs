//! What a database holds, as its catalogs say under the view of the session that is asked.
//!
//! Apart from the phases, because the SQL here is long and the same for `probe`, `prepare` and `drain`.
//! Reads only; decides nothing but which relations are the users' own.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_core::error::Result;

use super::client::Facts;
use super::config::Settings;
use super::layout::{self, LargeObject, TableKind};
use super::session::Session;
use super::wire::{Row, literal, qualified};

/// How many sequences are asked for at once.
const SEQUENCES_AT_ONCE: usize = 100;

/// A relation of the users'.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Relation {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) kind: TableKind,
    pub(super) unlogged: bool,
    pub(super) populated: bool,
    pub(super) blocks: u64,
    /// Whether rows lie in numbered blocks, so that ranges of them can be read.
    pub(super) heap: bool,
    pub(super) row_security: bool,
    pub(super) readable: bool,
    /// The condition of an extension that declares which rows are the user's; empty: all.
    pub(super) filter: Option<String>,
}

impl Relation {
    /// As SQL names it.
    pub(super) fn quoted(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// As people do.
    pub(super) fn label(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Whether `LOCK TABLE` can hold it.
    pub(super) fn lockable(&self) -> bool {
        matches!(self.kind, TableKind::Table | TableKind::Partitioned)
    }
}

/// The users' tables, materialized views and foreign tables, as far as the settings choose them.
///
/// Tables of extensions are theirs, but for those that they declare to hold users' rows.
pub(super) fn relations(session: &mut Session, settings: &Settings) -> Result<Vec<Relation>> {
    let rows = session.query(
        "SELECT c.oid, n.nspname, c.relname, c.relkind, c.relpersistence, c.relispopulated, \
         CASE WHEN c.relkind IN ('r', 'm') THEN coalesce(pg_relation_size(c.oid), 0) \
         / current_setting('block_size')::bigint ELSE 0 END, \
         coalesce(a.amname = 'heap', false), \
         row_security_active(c.oid), has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), \
         x.condition \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam \
         LEFT JOIN (SELECT unnest(extconfig) AS relation, unnest(extcondition) AS condition FROM pg_extension) x \
         ON x.relation = c.oid \
         WHERE c.relkind IN ('r', 'p', 'm', 'f') AND c.relpersistence <> 't' \
         AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
         AND (x.relation IS NOT NULL OR NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
         AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype = 'e')) ORDER BY c.oid",
    )?;
    let all: Vec<Relation> = rows.iter().map(relation).collect::<Result<_>>()?;
    Ok(all.into_iter().filter(|relation| settings.has_table(&relation.schema, &relation.name)).collect())
}

fn relation(row: &Row) -> Result<Relation> {
    let kind = match row.text(3)? {
        "p" => TableKind::Partitioned,
        "m" => TableKind::MaterializedView,
        "f" => TableKind::Foreign,
        _ => TableKind::Table,
    };
    Ok(Relation {
        oid: row.number(0)?,
        schema: row.string(1)?,
        name: row.string(2)?,
        kind,
        unlogged: row.text(4)? == "u",
        populated: row.truth(5),
        blocks: row.number(6)?,
        heap: row.truth(7),
        row_security: row.truth(8),
        readable: row.truth(9),
        filter: row.optional(10)?.map(str::to_owned),
    })
}

/// The tables that a session holds a lock on.
pub(super) fn locked(session: &mut Session) -> Result<BTreeSet<u32>> {
    let rows = session.query(
        "SELECT relation FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND granted \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )?;
    rows.iter().map(|row| row.number(0)).collect()
}

/// The tables of the view whose names stand for something else by now, or whose rows were moved: by number
/// and label. The catalog's rows are those of the view; the functions answer with what is now.
pub(super) fn moved(session: &mut Session) -> Result<Vec<(u32, String)>> {
    let rows = session.query(
        "SELECT c.oid, n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND has_schema_privilege(n.oid, 'USAGE') \
         AND (to_regclass(format('%I.%I', n.nspname, c.relname)) IS DISTINCT FROM c.oid::regclass \
         OR (c.relkind = 'r' AND c.relfilenode IS DISTINCT FROM pg_relation_filenode(c.oid)))",
    )?;
    rows.iter().map(|row| Ok((row.number(0)?, row.string(1)?))).collect()
}

/// The columns of every users' table that a COPY carries: all but generated ones.
pub(super) fn columns(session: &mut Session) -> Result<BTreeMap<u32, Vec<String>>> {
    let mut columns: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    session.each_row(
        "SELECT a.attrelid, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
         JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND a.attnum > 0 \
         AND NOT a.attisdropped AND a.attgenerated = '' AND n.nspname !~ '^pg_' \
         AND n.nspname <> 'information_schema' ORDER BY a.attrelid, a.attnum",
        &mut |row| {
            columns.entry(row.number(0)?).or_default().push(row.string(1)?);
            Ok(())
        },
    )?;
    Ok(columns)
}

/// A sequence of the users'.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) readable: bool,
}

/// The users' sequences, as far as the settings choose them. One that belongs to a column goes with its
/// table, as it does for `pg_dump`.
pub(super) fn sequences(session: &mut Session, settings: &Settings) -> Result<Vec<Sequence>> {
    let rows = session.query(
        "SELECT n.nspname, c.relname, has_schema_privilege(n.oid, 'USAGE') AND has_sequence_privilege(c.oid, 'SELECT'), \
         coalesce(o.schema, n.nspname), coalesce(o.name, c.relname) \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN (SELECT d.objid, tn.nspname AS schema, \
         t.relname AS name FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace tn \
         ON tn.oid = t.relnamespace WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass \
         AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0) o ON o.objid = c.oid WHERE c.relkind = 'S' \
         AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
         AND (EXISTS (SELECT FROM pg_extension WHERE c.oid = ANY (extconfig)) OR NOT EXISTS (SELECT FROM pg_depend d \
         WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype = 'e')) \
         ORDER BY 1, 2",
    )?;
    let mut chosen = Vec::new();
    for row in &rows {
        if settings.has_table(row.text(3)?, row.text(4)?) {
            chosen.push(Sequence { schema: row.string(0)?, name: row.string(1)?, readable: row.truth(2) });
        }
    }
    Ok(chosen)
}

/// `sequences.sql`: where each sequence stands. Sequences are not transactional: they may be ahead of
/// the view, never behind it.
pub(super) fn sequence_values(session: &mut Session, sequences: &[Sequence]) -> Result<String> {
    let mut text = String::new();
    for group in sequences.chunks(SEQUENCES_AT_ONCE) {
        let ask = |sequence: &Sequence| {
            format!("SELECT last_value, is_called FROM {}", qualified(&sequence.schema, &sequence.name))
        };
        let rows = session.query(&group.iter().map(ask).collect::<Vec<_>>().join("; "))?;
        for (sequence, row) in group.iter().zip(&rows) {
            let name = literal(&qualified(&sequence.schema, &sequence.name));
            let value: i64 = row.number(0)?;
            text.push_str(&format!("SELECT pg_catalog.setval({name}, {value}, {});\n", row.truth(1)));
        }
    }
    Ok(text)
}

/// The large objects with their owners and grants, by oid.
pub(super) fn large_objects(session: &mut Session) -> Result<Vec<LargeObject>> {
    let rows = session.query(
        "SELECT oid, pg_get_userbyid(lomowner), array_to_json(lomacl::text[])::text, \
         obj_description(oid, 'pg_largeobject') FROM pg_largeobject_metadata ORDER BY oid",
    )?;
    let object = |row: &Row| {
        Ok(LargeObject {
            oid: row.number(0)?,
            owner: row.string(1)?,
            grants: grants(row, 2)?,
            comment: row.optional(3)?.map(str::to_owned),
        })
    };
    rows.iter().map(object).collect()
}

fn grants(row: &Row, column: usize) -> Result<Option<Vec<String>>> {
    row.optional(column)?.map(|json| layout::parse("grants", json.as_bytes())).transpose()
}

/// What `database.json` says; the counts of large objects are filled in later.
pub(super) fn database(session: &mut Session, facts: &Facts, name: &str, snapshot: &str) -> Result<layout::Database> {
    let major = facts.major();
    let provider = if major >= 15 { "d.datlocprovider" } else { "'c'" };
    let locale = match major {
        17.. => "d.datlocale",
        15.. => "d.daticulocale",
        _ => "NULL::text",
    };
    let rules = if major >= 16 { "d.daticurules" } else { "NULL::text" };
    let version = if major >= 15 { "d.datcollversion" } else { "NULL::text" };
    let row = session.query_one(&format!(
        "SELECT d.oid, pg_get_userbyid(d.datdba), pg_encoding_to_char(d.encoding), d.datcollate, d.datctype, \
         {provider}, {locale}, {rules}, {version}, t.spcname, d.datconnlimit, d.datallowconn, d.datistemplate, \
         shobj_description(d.oid, 'pg_database'), array_to_json(d.datacl::text[])::text \
         FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname = {}",
        literal(name)
    ))?;
    let owned = |column: usize| Ok::<_, stillpoint_core::Error>(row.optional(column)?.map(str::to_owned));
    let provider = match row.text(5)? {
        "i" => "icu",
        "b" => "builtin",
        _ => "libc",
    };
    let pairs = session.query(&format!(
        "SELECT coalesce(r.rolname, ''), unnest(s.setconfig) FROM pg_db_role_setting s \
         LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = {} ORDER BY 1, 2",
        row.number::<u32>(0)?
    ))?;
    let extensions = session.query(
        "SELECT e.extname, n.nspname, e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace \
         ORDER BY 1",
    )?;
    Ok(layout::Database {
        name: name.to_owned(),
        oid: row.number(0)?,
        owner: row.string(1)?,
        encoding: row.string(2)?,
        collate: row.string(3)?,
        ctype: row.string(4)?,
        provider: provider.to_owned(),
        locale: owned(6)?,
        icu_rules: owned(7)?,
        collation_version: owned(8)?,
        tablespace: row.string(9)?,
        connection_limit: row.number(10)?,
        allow_connections: row.truth(11),
        is_template: row.truth(12),
        comment: owned(13)?,
        grants: grants(&row, 14)?,
        settings: pairs.iter().map(|row| Ok((row.string(0)?, row.string(1)?))).collect::<Result<_>>()?,
        extensions: extensions
            .iter()
            .map(|row| Ok((row.string(0)?, row.string(1)?, row.string(2)?)))
            .collect::<Result<_>>()?,
        snapshot: snapshot.to_owned(),
        settled: false,
        large_objects: 0,
        large_objects_kept: false,
    })
}

/// Settings of the server that matter to what a restored one does.
pub(super) fn server_settings(session: &mut Session) -> Result<BTreeMap<String, String>> {
    let rows = session.query(
        "SELECT name, setting FROM pg_settings WHERE name IN ('block_size', 'data_checksums', 'default_text_search_config', \
         'lc_messages', 'lc_monetary', 'lc_numeric', 'lc_time', 'max_connections', 'max_locks_per_transaction', \
         'max_prepared_transactions', 'server_encoding', 'shared_preload_libraries', 'TimeZone', 'wal_level') ORDER BY 1",
    )?;
    rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?))).collect()
}
