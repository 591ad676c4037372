//! Indexes that are built while other tables are still being filled.
//!
//! `pg_restore` makes them when all rows are there. Those that look at nothing but columns of one table
//! need not wait for the others, so that reading, sending and sorting go on at the same time. Their
//! statements are the tool's own; whatever cannot be made here, for whatever reason, is left to the tool,
//! which comes last and says why.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_core::error::Result;

use super::Way;
use super::archive::{Archive, Entry, Manner, Step};
use super::source::StoredDatabase;
use super::statements::{statements, words};
use crate::postgres::tools::Tools;

/// What makes one index, or one constraint with its index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Index {
    /// Its number in the archive.
    pub(super) id: u32,
    pub(super) sql: String,
}

/// The indexes of a database that depend on one table alone, by the table's number at the source.
pub(super) fn plan(
    way: &Way<'_>,
    database: &str,
    stored: &StoredDatabase,
    (archive, tools, manner): (&Archive, &Tools, Manner),
) -> Result<BTreeMap<u32, Vec<Index>>> {
    // Scripts are in the encoding of the database.
    if stored.about.encoding != "UTF8" {
        return Ok(BTreeMap::new());
    }
    let of_table = candidates(archive, stored, &plain_tables(way, database)?);
    let ids: BTreeSet<u32> = of_table.keys().copied().collect();
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let script = archive.script(tools, (Step::Indexes, manner), &ids, way.context)?;
    let chosen: Vec<&Entry> = archive.entries.iter().filter(|entry| ids.contains(&entry.id)).collect();
    let by_text = by_text(&chosen);
    let mut found: BTreeMap<u32, Vec<Index>> = BTreeMap::new();
    for block in blocks(&script).into_iter().filter(Block::is_plain) {
        if let Some([id]) = by_text.get(block.about.as_str()).map(Vec::as_slice) {
            found.entry(of_table[id]).or_default().push(Index { id: *id, sql: block.sql });
        }
    }
    Ok(found)
}

/// The entries by what their headings in a script say: with their owners, or without.
fn by_text<'a>(entries: &[&'a Entry]) -> BTreeMap<&'a str, Vec<u32>> {
    let mut all: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for entry in entries {
        all.entry(&entry.text).or_default().push(entry.id);
        if let Some((without_owner, _)) = entry.text.rsplit_once(' ') {
            all.entry(without_owner).or_default().push(entry.id);
        }
    }
    all
}

/// Tables whose rows stay where they are sent: no partitions, which the server may have to choose.
fn plain_tables(way: &Way<'_>, database: &str) -> Result<BTreeSet<(String, String)>> {
    let mut session = way.connect(database)?;
    let rows = session.query(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
         ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND NOT c.relispartition AND c.oid >= 16384",
    )?;
    session.close();
    rows.iter().map(|row| Ok((row.string(0)?, row.string(1)?))).collect()
}

/// Entries of indexes and constraints that need one table, which is a plain one.
fn candidates(archive: &Archive, stored: &StoredDatabase, plain: &BTreeSet<(String, String)>) -> BTreeMap<u32, u32> {
    let relations: BTreeMap<u32, u32> =
        archive.entries.iter().filter_map(|entry| Some((entry.id, entry.relation()?))).collect();
    let tables = stored.tables_with_rows();
    let plain: BTreeSet<u32> = tables
        .filter(|table| plain.contains(&(table.schema.clone(), table.name.clone())))
        .map(|table| table.oid)
        .collect();
    let indexes = archive.entries.iter().filter(|entry| matches!(entry.kind(), "INDEX" | "CONSTRAINT"));
    let of_one = indexes.filter_map(|entry| {
        let needed: BTreeSet<u32> = entry.needs.iter().filter_map(|id| relations.get(id)).copied().collect();
        let only = needed.first().copied().filter(|oid| needed.len() == 1 && plain.contains(oid))?;
        Some((entry.id, only))
    });
    of_one.collect()
}

/// What a script says under one of its headings.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// Kind, schema and name; also the owner, if it is told.
    about: String,
    sql: String,
}

impl Block {
    /// Whether it looks at columns only: a function or a condition may read other tables.
    fn is_plain(&self) -> bool {
        let all = statements(&self.sql);
        let Some(first) = all.iter().find(|text| !text.starts_with("SET ")) else { return false };
        let words = words(first);
        let has = |keyword: &str| words.iter().any(|word| word.is(keyword));
        let opened = words.iter().filter(|word| !word.is_quoted && word.text == "(").count();
        let makes_index = words.first().is_some_and(|word| word.is("CREATE")) && has("INDEX");
        let adds_key = words.first().is_some_and(|word| word.is("ALTER")) && has("CONSTRAINT");
        opened == 1 && !has("WHERE") && (makes_index || (adds_key && (has("PRIMARY") || has("UNIQUE"))))
    }
}

/// Takes a script apart at its headings, `-- Name: …; Type: …; Schema: …; Owner: …`. Settings that the tool
/// changes between two of them become part of all that follow.
fn blocks(script: &str) -> Vec<Block> {
    let mut parts: Vec<(Option<&str>, String)> = vec![(None, String::new())];
    for line in script.lines() {
        match line.strip_prefix("-- Name: ") {
            Some(about) => parts.push((Some(about), String::new())),
            None => parts.last_mut().into_iter().for_each(|(_, body)| {
                body.push_str(line);
                body.push('\n');
            }),
        }
    }
    let mut tablespace = "SET default_tablespace = ''".to_owned();
    let mut found = Vec::new();
    for (about, body) in &parts {
        let all = statements(body);
        let own: Vec<&str> = all.iter().copied().filter(|text| !text.starts_with("SET ")).collect();
        if let (Some(about), false) = (about.and_then(heading), own.is_empty()) {
            found.push(Block { about, sql: format!("{tablespace};\n{}", own.join(";\n")) });
        }
        let changed = all.iter().rev().find(|text| text.starts_with("SET default_tablespace"));
        changed.into_iter().for_each(|text| tablespace = (*text).to_owned());
    }
    found
}

/// `t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app` as the archive's list has it.
fn heading(text: &str) -> Option<String> {
    let (name, rest) = text.split_once("; Type: ")?;
    let (kind, rest) = rest.split_once("; Schema: ")?;
    let (schema, rest) = rest.split_once("; Owner: ")?;
    let owner = rest.split_once("; Tablespace: ").map_or(rest, |(owner, _)| owner);
    let owner = if owner == "-" { String::new() } else { format!(" {owner}") };
    Some(format!("{kind} {schema} {name}{owner}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "--\n-- PostgreSQL database dump\n--\n\nSET statement_timeout = 0;\n\
        SELECT pg_catalog.set_config('search_path', '', false);\n\nSET default_tablespace = '';\n\n\
        --\n-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app\n--\n\n\
        ALTER TABLE ONLY public.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\nALTER TABLE public.t CLUSTER ON t_pkey;\n\n\n\
        SET default_tablespace = fast;\n\n\
        --\n-- Name: t_v; Type: INDEX; Schema: public; Owner: app; Tablespace: fast\n--\n\nCREATE INDEX t_v ON public.t USING btree (v);\n\n\
        --\n-- Name: t_f; Type: INDEX; Schema: public; Owner: app\n--\n\nCREATE INDEX t_f ON public.t USING btree (public.f(v));\n\n\
        --\n-- Name: t_w; Type: INDEX; Schema: public; Owner: -\n--\n\nCREATE UNIQUE INDEX t_w ON public.t USING btree (v) WHERE (id > 1);\n";

    #[test]
    fn scripts_are_taken_apart_at_their_headings_and_keep_their_tablespaces() {
        let found = blocks(SCRIPT);
        let sql: Vec<&str> = found.iter().map(|block| block.sql.as_str()).collect();
        assert_eq!(
            sql[0],
            "SET default_tablespace = '';\nALTER TABLE ONLY public.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\
             ALTER TABLE public.t CLUSTER ON t_pkey"
        );
        assert_eq!(sql[1], "SET default_tablespace = fast;\nCREATE INDEX t_v ON public.t USING btree (v)");
        assert_eq!(found[0].about, "CONSTRAINT public t t_pkey app");
        assert_eq!(found[1].about, "INDEX public t_v app");
        assert_eq!(found[3].about, "INDEX public t_w");
    }

    #[test]
    fn what_may_read_more_than_its_columns_waits_for_all_rows() {
        let plain: Vec<bool> = blocks(SCRIPT).iter().map(Block::is_plain).collect();
        assert_eq!(plain, [true, true, false, false]);
    }
}
