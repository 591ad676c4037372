//! Parts of a point: one database, one schema, one table.
//!
//! A part is named by a path of the point's tree: `databases/app` is a database, `databases/app/data/
//! public.models` a table by the folder of its rows, and `databases/app/schemas/public` a schema, which
//! has no folder of its own. Schemas and tables go into the database that is there, or into a new one. What
//! belongs to them comes along (indexes, constraints, sequences, triggers, comments, grants, partitions); what points out
//! of the part, such as a foreign key to a table outside, is left out and named.
//!
//! All of it happens in one transaction of one session: others see the old until the new is whole, and a
//! failure or a crash at any moment leaves nothing. While it is replaced, the old is locked.

use std::collections::BTreeSet;

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::TreePath;

use super::super::config::Roles;
use super::super::layout::{self, Table, TableKind};
use super::super::session::Session;
use super::super::stamp::Note;
use super::super::swap::{self, Swap, Swapped};
use super::super::tools::Tools;
use super::super::wire::{Row, identifier, literal, qualified};
use super::super::{STAMP_SCHEMA, client, stamp};
use super::archive::{Archive, Entry, Manner, Step, closure};
use super::source::{self, Stored, StoredDatabase};
use super::{Way, check, database, finish, grants, load};

/// The folder of schemas in the path of a part.
const SCHEMAS: &str = "schemas";

/// What of a point is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// One database, by its folder.
    Database(String),
    /// One schema of a database.
    Schema(String, String),
    /// One table of a database, by its folder.
    Table(String, String),
}

impl Part {
    /// Reads the path of a part.
    pub(super) fn of(path: Option<&TreePath>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Whole) };
        let names: Vec<String> = path.names().iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match names.as_slice() {
            [] | [layout::DATABASES] => Ok(Self::Whole),
            [layout::DATABASES, database] => Ok(Self::Database((*database).to_owned())),
            [layout::DATABASES, database, SCHEMAS, schema] => Ok(Self::Schema((*database).to_owned(), (*schema).to_owned())),
            [layout::DATABASES, database, layout::DATA, table] => Ok(Self::Table((*database).to_owned(), (*table).to_owned())),
            _ => Err(Error::new(Kind::NotFound, format!("`{path}` names no part of a server"))
                .hint("databases/<database>, databases/<database>/schemas/<schema>, or databases/<database>/data/<schema>.<table>")),
        }
    }

    /// The name of the only database that is wanted.
    pub(super) fn database(&self) -> Option<String> {
        match self {
            Self::Whole => None,
            Self::Database(folder) | Self::Schema(folder, _) | Self::Table(folder, _) => Some(unescaped(folder)),
        }
    }

    /// Whether it goes into a database that is there.
    pub(super) fn is_below_database(&self) -> bool {
        matches!(self, Self::Schema(..) | Self::Table(..))
    }
}

/// The name that a folder stands for.
fn unescaped(folder: &str) -> String {
    let mut name = Vec::new();
    let mut rest = folder.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match (byte, digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(value)) => {
                name.push(value);
                rest = &after[2..];
            }
            _ => {
                name.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&name).into_owned()
}

/// Restores a schema or a table into a database that is there, or into a new one.
pub(super) fn restore(way: &Way<'_>, stored: &Stored, part: &Part, request: &RestoreRequest) -> Result<Restored> {
    let Some(of) = stored.databases.first() else { return Err(Error::internal("a part without a database")) };
    let name = way.settings.target_name(&of.about.name, 1).to_owned();
    check::is_ours(way.settings, &name)?;
    let mut restored = Restored::default();
    let mut admin = stamp::admin(way.driver, way.context, &[&name])?;
    let target = check::target(way, &mut admin, stored, &mut restored.losses)?;
    let tools = way.tools(stored, target.major)?;
    let path = source::to_scratch(way.source, &of.file(layout::DUMP)?, way.scratch(), way.context)?;
    let archive = Archive::open(&tools, &path, way.context)?;
    let mut chosen = Chosen::new(of, &archive.entries, part)?;
    chosen.name_what_is_cut(&archive.entries, &mut restored.losses);
    context_of(way, of, &chosen)?;
    let earlier = made_earlier(way, &mut admin, (of, &name), request)?;
    if let Some(losses) = earlier {
        restored.losses = losses;
    } else if client::has_database(&mut admin, &name)? {
        let mut session = way.connect(&name)?;
        chosen.add_schemas(&archive.entries, &mut session)?;
        into_old(way, &mut session, (of, &name), &chosen, (&archive, &tools), request, &mut restored)?;
    } else {
        chosen.add_support(&archive.entries);
        let building = database::building_name(&name, &request.restore);
        for restore in std::iter::once(request.restore.clone()).chain(request.earlier()) {
            database::remove(way, &mut admin, &database::building_name(&name, &restore))?;
        }
        database::create(&mut admin, &building, &of.about, target.major, &mut restored.losses)?;
        let note = Note::new(request, &of.about, &restored.losses);
        let done = into_new(way, &mut admin, (of, &name, &building), &chosen, (&archive, &tools), &note);
        if let Err(error) = done {
            return Err(match database::remove(way, &mut admin, &building) {
                Ok(()) => error,
                Err(cause) => error.context("left behind", format!("database {building} ({cause})")),
            });
        }
    }
    for table in chosen.with_rows() {
        let total = of.total(table)?;
        restored.items += total.rows;
        restored.bytes += total.bytes;
    }
    Ok(restored)
}

/// What an earlier try of the same restore could not bring back, if it made the database and was ended before
/// it could say so.
fn made_earlier(
    way: &Way<'_>,
    admin: &mut Session,
    (stored, name): (&StoredDatabase, &str),
    request: &RestoreRequest,
) -> Result<Option<Vec<Loss>>> {
    if !client::has_database(admin, name)? {
        return Ok(None);
    }
    let note = Note::read(&mut way.connect(name)?)?;
    Ok(note.filter(|note| note.is_of(request, &stored.about)).map(|note| note.losses))
}

/// Into a database that holds other things, which stay as they are.
fn into_old(
    way: &Way<'_>,
    session: &mut Session,
    (stored, name): (&StoredDatabase, &str),
    chosen: &Chosen<'_>,
    programs: (&Archive, &Tools),
    request: &RestoreRequest,
    restored: &mut Restored,
) -> Result<()> {
    let there = occupied(session, chosen)?;
    if let (Some(seen), RestoreMode::Fresh) = (&there, request.mode) {
        return Err(Error::new(Kind::AlreadyExists, format!("{seen} is there already"))
            .context("database", name)
            .hint("replace it with --in-place: the old one is kept under another name"));
    }
    if let (Some(_), Some(STAMP_SCHEMA)) = (&there, chosen.schema.as_deref()) {
        return Err(Error::new(
            Kind::Conflict,
            format!("the schema `{STAMP_SCHEMA}` bears the environment's stamp: it cannot be replaced as a whole"),
        )
        .context("database", name)
        .hint("restore its tables one by one: databases/<database>/data/<schema>.<table>"));
    }
    // A failure or a lost connection takes all of it back.
    session.execute("BEGIN")?;
    if there.is_some() {
        move_aside(session, name, chosen, request, restored)?;
    }
    fill(way, session, stored, chosen, programs)?;
    way.context.check()?;
    session.execute("COMMIT")
}

/// Into a database of its own, which holds nothing else.
fn into_new(
    way: &Way<'_>,
    admin: &mut Session,
    (stored, name, building): (&StoredDatabase, &str, &str),
    chosen: &Chosen<'_>,
    programs: (&Archive, &Tools),
    note: &Note,
) -> Result<()> {
    let mut session = way.connect(building)?;
    session.execute("BEGIN")?;
    fill(way, &mut session, stored, chosen, programs)?;
    session.execute("COMMIT")?;
    let opening = database::opening(admin, name, stored, way.settings.roles != Some(Roles::None))?;
    stamp::plan_opening(&mut session, &opening)?;
    note.leave(&mut session)?;
    session.close();
    way.context.check()?;
    let reconnect = || stamp::admin(way.driver, &Context::default(), &[name]);
    let swap = Swap { built: building.to_owned(), name: name.to_owned(), old_to: None };
    match swap::swap_all(admin, &reconnect, &[swap]) {
        Swapped::Done(_) => Ok(()),
        Swapped::Undone(error) | Swapped::Unclear(error) => Err(error),
    }
}

fn context_of(way: &Way<'_>, stored: &StoredDatabase, chosen: &Chosen<'_>) -> Result<()> {
    let bytes = chosen.with_rows().map(|table| Ok(stored.total(table)?.bytes)).sum::<Result<u64>>()?;
    way.context.expect_bytes(bytes);
    Ok(())
}

/// What of a database is restored.
struct Chosen<'a> {
    /// The schema, if one was asked for.
    schema: Option<String>,
    tables: Vec<&'a Table>,
    /// The definitions.
    entries: BTreeSet<u32>,
}

impl<'a> Chosen<'a> {
    fn new(stored: &'a StoredDatabase, entries: &[Entry], part: &Part) -> Result<Self> {
        let (schema, wanted) = match part {
            Part::Schema(_, folder) => {
                let schema = unescaped(folder);
                let wanted = of_schema(entries, &schema);
                (Some(schema), wanted)
            }
            Part::Table(_, folder) => {
                let table = stored.tables.iter().find(|table| table.folder == *folder);
                let roots = table.map(|table| with_partitions(entries, table)).unwrap_or_default();
                (None, closure(entries, |entry| roots.contains(&entry.id)))
            }
            Part::Whole | Part::Database(_) => return Err(Error::internal("a database is no part of itself")),
        };
        if wanted.is_empty() {
            return Err(Error::new(Kind::NotFound, "the point holds no such part")
                .context("database", &stored.about.name)
                .hint("stillpoint show lists what is in a point"));
        }
        let relations: BTreeSet<u32> =
            entries.iter().filter(|entry| wanted.contains(&entry.id)).filter_map(Entry::relation).collect();
        let tables = stored.tables.iter().filter(|table| relations.contains(&table.oid)).collect();
        Ok(Self { schema, tables, entries: wanted })
    }

    /// Adds the schemas that the database of `session` lacks.
    fn add_schemas(&mut self, entries: &[Entry], session: &mut Session) -> Result<()> {
        for table in &self.tables {
            let there = session.query_one(&format!(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = {})",
                literal(&table.schema)
            ))?;
            if !there.truth(0) {
                let name = format!("- {} ", table.schema);
                let schema = entries.iter().filter(|entry| entry.kind() == "SCHEMA" && entry.name().starts_with(&name));
                self.entries.extend(schema.map(|entry| entry.id));
            }
        }
        Ok(())
    }

    /// Adds what the definitions need and no table is: schemas, types, functions, extensions.
    fn add_support(&mut self, entries: &[Entry]) {
        const SUPPORT: &[&str] = &[
            "SCHEMA",
            "EXTENSION",
            "TYPE",
            "SHELL TYPE",
            "DOMAIN",
            "FUNCTION",
            "PROCEDURE",
            "AGGREGATE",
            "COLLATION",
            "OPERATOR",
            "OPERATOR CLASS",
            "OPERATOR FAMILY",
            "TEXT SEARCH CONFIGURATION",
            "TEXT SEARCH DICTIONARY",
            "SERVER",
            "FOREIGN DATA WRAPPER",
            "CAST",
            "SEQUENCE",
        ];
        loop {
            let needed: BTreeSet<u32> = entries
                .iter()
                .filter(|entry| self.entries.contains(&entry.id))
                .flat_map(|entry| entry.needs.iter().copied())
                .collect();
            let more: Vec<u32> = entries
                .iter()
                .filter(|entry| needed.contains(&entry.id) && SUPPORT.contains(&entry.kind()))
                .map(|entry| entry.id)
                .filter(|id| !self.entries.contains(id))
                .collect();
            if more.is_empty() {
                return;
            }
            self.entries.extend(more);
        }
    }

    fn with_rows(&self) -> impl Iterator<Item = &'a Table> {
        self.tables.iter().copied().filter(|table| table.kind == TableKind::Table && table.rows_kept)
    }

    /// Names the definitions that belong to the part and point out of it.
    fn name_what_is_cut(&self, entries: &[Entry], losses: &mut Vec<Loss>) {
        for entry in entries.iter().filter(|entry| !self.entries.contains(&entry.id)) {
            let belongs = entry.needs.iter().any(|id| self.entries.contains(id));
            if belongs && matches!(entry.kind(), "FK CONSTRAINT" | "TABLE ATTACH" | "PUBLICATION TABLE") {
                losses.push(Loss {
                    what: format!("{} {}", entry.kind().to_lowercase(), entry.name()),
                    why: "it points out of the part that was restored".to_owned(),
                });
            }
        }
    }
}

/// A table's definition, and those of its partitions at all depths.
fn with_partitions(entries: &[Entry], table: &Table) -> BTreeSet<u32> {
    let own = entries.iter().filter(|entry| entry.relation() == Some(table.oid) && entry.kind().ends_with("TABLE"));
    let mut found: BTreeSet<u32> = own.map(|entry| entry.id).collect();
    let is_table = |id: &u32| entries.iter().any(|entry| entry.id == *id && entry.kind().ends_with("TABLE"));
    let name = |id: &u32| entries.iter().find(|entry| entry.id == *id).map(Entry::name);
    loop {
        // An attachment is called by the partition, and needs both tables.
        let more: Vec<u32> = entries
            .iter()
            .filter(|entry| entry.kind() == "TABLE ATTACH")
            .filter(|entry| entry.needs.iter().any(|id| found.contains(id) && name(id) != Some(entry.name())))
            .flat_map(|entry| entry.needs.iter().copied().filter(|id| is_table(id) && name(id) == Some(entry.name())))
            .filter(|id| !found.contains(id))
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// The definitions of a schema, without those that need a table of another one.
fn of_schema(entries: &[Entry], schema: &str) -> BTreeSet<u32> {
    let starts = |entry: &Entry, with: &str| entry.name().strip_prefix(with).is_some_and(|rest| rest.starts_with(' '));
    let within = |entry: &Entry| {
        starts(entry, schema)
            || (entry.kind() == "SCHEMA" && starts(entry, &format!("- {schema}")))
            || starts(entry, &format!("- SCHEMA {schema}"))
    };
    let mut chosen: BTreeSet<u32> = entries.iter().filter(|entry| within(entry)).map(|entry| entry.id).collect();
    let relations: BTreeSet<u32> = entries
        .iter()
        .filter(|entry| entry.relation().is_some() || entry.kind() == "CONSTRAINT")
        .map(|entry| entry.id)
        .collect();
    // What needs something that was left out is left out as well.
    loop {
        let reaches_out = |entry: &&Entry| entry.needs.iter().any(|id| relations.contains(id) && !chosen.contains(id));
        let out: Vec<u32> = entries
            .iter()
            .filter(|entry| chosen.contains(&entry.id))
            .filter(reaches_out)
            .map(|entry| entry.id)
            .collect();
        if out.is_empty() {
            return chosen;
        }
        chosen.retain(|id| !out.contains(id));
    }
}

/// What of the part is in the database now, for people.
fn occupied(session: &mut Session, chosen: &Chosen<'_>) -> Result<Option<String>> {
    if let Some(schema) = &chosen.schema {
        let oid = format!("(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = {})", literal(schema));
        let row = session.query_one(&format!(
            "SELECT {oid} IS NOT NULL, EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = {oid})"
        ))?;
        // The schema `public` is there in every new database.
        return Ok((row.truth(0) && (schema != "public" || row.truth(1))).then(|| format!("schema {schema}")));
    }
    for table in &chosen.tables {
        let name = qualified(&table.schema, &table.name);
        if session.query_one(&format!("SELECT pg_catalog.to_regclass({}) IS NOT NULL", literal(&name)))?.truth(0) {
            return Ok(Some(format!("table {name}")));
        }
    }
    Ok(None)
}

/// Takes what is there out of the way. Who still points at it is named: views and keys follow what they
/// were made for, not its name.
fn move_aside(
    session: &mut Session,
    database: &str,
    chosen: &Chosen<'_>,
    request: &RestoreRequest,
    restored: &mut Restored,
) -> Result<()> {
    let mut moved = Vec::new();
    if let Some(schema) = &chosen.schema {
        let kept = database::kept_name(schema, &request.restore);
        let rows = session.query(&format!(
            "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {}",
            literal(schema)
        ))?;
        moved.extend(rows.iter().map(|row| row.string(0)).collect::<Result<Vec<_>>>()?);
        let like_old = if schema == "public" { public_again(session)? } else { Vec::new() };
        session.execute(&format!("ALTER SCHEMA {} RENAME TO {}", identifier(schema), identifier(&kept)))?;
        like_old.iter().try_for_each(|statement| session.execute(statement))?;
        restored.kept_old.push(format!("schema {kept} in database {database}"));
    } else {
        // Names of indexes and constraints live in the schema as well: the old table leaves it whole.
        let kept = database::beside("before", &format!("_{}", request.restore));
        session.execute(&format!("CREATE SCHEMA IF NOT EXISTS {}", identifier(&kept)))?;
        for table in &chosen.tables {
            let name = qualified(&table.schema, &table.name);
            let row =
                session.query_one(&format!("SELECT pg_catalog.to_regclass({})::pg_catalog.oid", literal(&name)))?;
            let Some(oid) = row.optional(0)?.map(str::to_owned) else { continue };
            session.execute(&format!("ALTER TABLE {name} SET SCHEMA {}", identifier(&kept)))?;
            restored.kept_old.push(format!("table {} in database {database}", qualified(&kept, &table.name)));
            moved.push(oid);
        }
    }
    name_dependents(session, &moved, &mut restored.losses)
}

/// What makes another schema `public` like the one that is there, for its owner and all who may use it:
/// archives do not hold what every database is born with.
fn public_again(session: &mut Session) -> Result<Vec<String>> {
    let row = session.query_one(
        "SELECT pg_catalog.pg_get_userbyid(nspowner), pg_catalog.array_to_json(coalesce(nspacl, \
         pg_catalog.acldefault('n', nspowner))::pg_catalog.text[])::pg_catalog.text \
         FROM pg_catalog.pg_namespace WHERE nspname = 'public'",
    )?;
    let (owner, held) = (row.text(0)?, row.text(1)?);
    let held: Vec<String> = layout::parse("grants", held.as_bytes())?;
    let mut all = vec![format!("CREATE SCHEMA public AUTHORIZATION {}", identifier(owner))];
    all.append(&mut grants::statements(session, "SCHEMA public", owner, &held)?);
    Ok(all)
}

/// Names the views and foreign keys outside of `moved` that stay with what was moved.
fn name_dependents(session: &mut Session, moved: &[String], losses: &mut Vec<Loss>) -> Result<()> {
    if moved.is_empty() {
        return Ok(());
    }
    let moved = moved.join(", ");
    let rows = session.query(&format!(
        "SELECT DISTINCT 'view ' || r.ev_class::pg_catalog.regclass FROM pg_catalog.pg_depend d \
         JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass \
         WHERE d.refobjid IN ({moved}) AND r.ev_class NOT IN ({moved}) UNION ALL \
         SELECT 'foreign key ' || pg_catalog.quote_ident(conname) || ' of ' || conrelid::pg_catalog.regclass FROM pg_catalog.pg_constraint \
         WHERE contype = 'f' AND confrelid IN ({moved}) AND conrelid NOT IN ({moved})"
    ))?;
    for row in &rows {
        losses.push(Loss { what: row.string(0)?, why: "it stays with the old table: make it anew".to_owned() });
    }
    Ok(())
}

/// Definitions, rows, sequences, indexes and the rest, in the session's transaction.
fn fill(
    way: &Way<'_>,
    session: &mut Session,
    stored: &StoredDatabase,
    chosen: &Chosen<'_>,
    (archive, tools): (&Archive, &Tools),
) -> Result<()> {
    let manner =
        Manner { without_owners: way.settings.roles == Some(Roles::None), without_tablespaces: true, connections: 1 };
    session.execute(&archive.script(tools, (Step::Tables, manner), &chosen.entries, way.context)?)?;
    for table in chosen.with_rows() {
        let into = (table.schema.clone(), table.name.clone());
        let load = load::Load { table, total: stored.total(table)?, into, is_ours: true };
        load::in_transaction(way, session, stored, &load)?;
    }
    let sequences = created_sequences(session)?;
    for statement in load::sequence_statements(way, stored)? {
        if sequences.iter().any(|sequence| statement.starts_with(sequence)) {
            session.execute(&statement)?;
        }
    }
    session.execute(&archive.script(tools, (Step::Indexes, manner), &chosen.entries, way.context)?)?;
    finish::materialized_views(way, session, &chosen.tables)?;
    for table in &chosen.tables {
        if table.kind != TableKind::Foreign {
            session.execute(&format!("ANALYZE {}", qualified(&table.schema, &table.name)))?;
        }
    }
    Ok(())
}

/// The begin of the statement that sets a sequence, for each that this transaction made.
fn created_sequences(session: &mut Session) -> Result<Vec<String>> {
    let rows = session.query(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = 'S' AND c.xmin = pg_catalog.pg_current_xact_id()::pg_catalog.xid",
    )?;
    let begin = |row: &Row| {
        let name = qualified(row.text(0)?, row.text(1)?);
        Ok(format!("SELECT pg_catalog.setval({},", literal(&name)))
    };
    rows.iter().map(begin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_by_paths_of_the_tree() {
        let part = |path: &str| Part::of(Some(&TreePath::parse(path).unwrap()));
        assert_eq!(part("").unwrap(), Part::Whole);
        assert_eq!(part("databases/a%2Fb").unwrap().database().unwrap(), "a/b");
        assert_eq!(part("databases/app/schemas/public").unwrap(), Part::Schema("app".into(), "public".into()));
        assert_eq!(part("databases/app/data/public.t").unwrap(), Part::Table("app".into(), "public.t".into()));
        assert_eq!(part("databases/app/data").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(unescaped("100%25%2E%zz%"), "100%.%zz%");
    }
}
