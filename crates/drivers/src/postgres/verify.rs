//! Whether a server holds what a point holds: rows, sequences, large objects, definitions.
//!
//! Rows are compared by count and by a sum of hashes that knows no order, the point's as it was counted
//! in the drain, the server's from its own COPY of the same columns. Definitions are compared by the tables
//! of contents of two archives: the point's, and one that `pg_dump` makes of the server now. The stamp and
//! what belongs to it are no difference.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::sync::Mutex;

use stillpoint_core::driver::{Context, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::Tree;

use super::config::Roles;
use super::drain::{STRIDE_BLOCKS, copy_statement};
use super::layout::{self, Table};
use super::restore::archive::{Archive, Entry};
use super::restore::source::{self, Stored, StoredDatabase};
use super::restore::{Way, pool};
use super::session::Session;
use super::tools::{self, Tools};
use super::wire::{Tally, identifier, qualified};
use super::{Postgres, client, stamp};

/// Differences beyond this number are not listed.
const DIFFERENCES_MAX: usize = 100;
/// What one call takes of a COPY.
const BUFFER_BYTES: usize = 256 << 10;

/// What was found so far.
#[derive(Default)]
struct Found {
    checked: u64,
    differences: Vec<String>,
}

impl Found {
    fn differs(&mut self, what: String) {
        if self.differences.len() < DIFFERENCES_MAX {
            self.differences.push(what);
        }
    }
}

/// Compares the server with what `source` holds.
pub(super) fn verify(driver: &Postgres, context: &Context, source: &dyn Tree) -> Result<Verification> {
    let way = Way::new(driver, context, source);
    let stored = Stored::read(source, None)?;
    let mut found = Found::default();
    let mut admin = stamp::admin(driver, context, &[])?;
    let major = client::facts(&mut admin)?.major();
    context.expect_bytes(stored.databases.iter().map(|database| database.size().1).sum());
    for database in &stored.databases {
        let name = driver.settings.target_name(&database.about.name, stored.databases.len());
        if !client::has_database(&mut admin, name)? {
            found.differs(format!("{name}: the database is missing"));
            continue;
        }
        let tools = way.tools(&stored, major)?;
        rows(&way, name, database, major, &mut found)?;
        let mut session = way.connect(name)?;
        sequences(&way, &mut session, name, database, &mut found)?;
        large_objects(&way, &mut session, name, database, &mut found)?;
        soundness(&way, &mut session, name, database, &mut found)?;
        session.close();
        definitions(&way, name, database, &tools, &mut found)?;
    }
    Ok(Verification { checked: found.checked, differences: found.differences })
}

/// A part of a table for one connection.
struct Job<'a> {
    table: &'a Table,
    statement: String,
}

/// Compares every table's rows.
fn rows(way: &Way<'_>, name: &str, stored: &StoredDatabase, major: u32, found: &mut Found) -> Result<()> {
    let mut session = way.connect(name)?;
    let here = tables_here(&mut session)?;
    session.close();
    let mut jobs = Vec::new();
    let mut missing = BTreeSet::new();
    for table in stored.tables_with_rows() {
        let label = (table.schema.clone(), table.name.clone());
        let Some(here) = here.get(&label) else {
            found.differs(format!("{name}.{}.{}: the table is missing", table.schema, table.name));
            missing.insert(table.oid);
            continue;
        };
        let missing_columns: Vec<&str> =
            table.columns.iter().filter(|column| !here.columns.contains(*column)).map(String::as_str).collect();
        if !missing_columns.is_empty() {
            found.differs(format!(
                "{name}.{}.{}: columns missing: {}",
                table.schema,
                table.name,
                missing_columns.join(", ")
            ));
            missing.insert(table.oid);
            continue;
        }
        let can_split = major >= 14 && table.filter.is_none() && here.blocks > STRIDE_BLOCKS;
        let (files, stride) = if can_split { (here.blocks.div_ceil(STRIDE_BLOCKS), STRIDE_BLOCKS) } else { (1, 0) };
        let part = Table { files, stride, ..table.clone() };
        jobs.extend(
            (0..files).map(|index| Job { table, statement: copy_statement(&part, index, &stored.about.encoding) }),
        );
    }
    let tallies: Mutex<BTreeMap<u32, Tally>> = Mutex::default();
    pool::run(way, (name, ""), jobs, &|session, job| {
        let tally = tally(way, session, &job.statement)?;
        lock(&tallies).entry(job.table.oid).or_default().merge(&tally);
        Ok(())
    })?;
    let tallies = tallies.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut suspects = Vec::new();
    for table in stored.tables_with_rows().filter(|table| !missing.contains(&table.oid)) {
        let (here, total) = (tallies.get(&table.oid).copied().unwrap_or_default(), stored.total(table)?);
        found.checked += total.rows;
        if (here.rows, format!("{:016x}", here.hash)) != (total.rows, total.hash.clone()) {
            suspects.push((table, here, total.rows));
        }
    }
    judge_suspects(way, name, stored, (&here, suspects), found)
}

/// A table as the server has it.
struct Here {
    blocks: u64,
    columns: BTreeSet<String>,
    /// The partitioned table at the top, for partitions.
    root: Option<u32>,
}

fn tables_here(session: &mut Session) -> Result<BTreeMap<(String, String), Here>> {
    let rows = session.query(
        "SELECT n.nspname, c.relname, pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::pg_catalog.int8, \
         CASE WHEN c.relispartition THEN pg_catalog.pg_partition_root(c.oid)::pg_catalog.oid END, \
         ARRAY(SELECT a.attname FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r'",
    )?;
    let mut all = BTreeMap::new();
    for row in &rows {
        let root = row.optional(3)?.map(|_| row.number(3)).transpose()?;
        let columns = array(row.text(4)?).into_iter().collect();
        all.insert((row.string(0)?, row.string(1)?), Here { blocks: row.number(2)?, columns, root });
    }
    Ok(all)
}

/// The elements of an array of texts, as the server writes it.
fn array(text: &str) -> Vec<String> {
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    let (mut all, mut one, mut within, mut characters) = (Vec::new(), String::new(), false, inner.chars());
    while let Some(character) = characters.next() {
        match character {
            '\\' => one.extend(characters.next()),
            '"' => within = !within,
            ',' if !within => all.push(std::mem::take(&mut one)),
            other => one.push(other),
        }
    }
    if !inner.is_empty() {
        all.push(one);
    }
    all
}

/// Reads one COPY to its end.
fn tally(way: &Way<'_>, session: &mut Session, statement: &str) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut buffer = vec![0; BUFFER_BYTES];
    session.copy_out(statement)?;
    loop {
        way.context.check()?;
        match session.copy_read(&mut buffer, &mut tally)? {
            0 => break,
            count => way.context.advance(count as u64, 0),
        }
    }
    Ok(tally)
}

/// Tables that differ. A row may lie in another partition than at the source where the server had to
/// choose: then it is the whole partitioned table that must agree.
fn judge_suspects(
    way: &Way<'_>,
    name: &str,
    stored: &StoredDatabase,
    (here, suspects): (&BTreeMap<(String, String), Here>, Vec<(&Table, Tally, u64)>),
    found: &mut Found,
) -> Result<()> {
    let root = |table: &Table| here.get(&(table.schema.clone(), table.name.clone())).and_then(|here| here.root);
    let mut agreeing: BTreeMap<u32, bool> = BTreeMap::new();
    for (table, tally, rows) in suspects {
        if let Some(top) = root(table) {
            let agrees = match agreeing.get(&top) {
                Some(agrees) => *agrees,
                None => {
                    let leaves: Vec<&Table> =
                        stored.tables_with_rows().filter(|table| root(table) == Some(top)).collect();
                    let agrees = partitions_agree(way, name, stored, &leaves)?;
                    agreeing.insert(top, agrees);
                    agrees
                }
            };
            if agrees {
                continue;
            }
        }
        let label = format!("{name}.{}.{}", table.schema, table.name);
        found.differs(match (tally.rows, rows) {
            (here, there) if here < there => format!("{label}: {} rows missing", there - here),
            (here, there) if here > there => format!("{label}: {} rows too many", here - there),
            (_, there) => format!("{label}: the content of its {there} rows differs"),
        });
    }
    Ok(())
}

/// Compares all partitions of one table as one set of rows. Partitions may have their columns in
/// different orders, so both sides are read in the order of names.
fn partitions_agree(way: &Way<'_>, name: &str, stored: &StoredDatabase, leaves: &[&Table]) -> Result<bool> {
    let mut session = way.connect(name)?;
    let (mut here, mut there) = (Tally::default(), Tally::default());
    for table in leaves {
        let mut order: Vec<usize> = (0..table.columns.len()).collect();
        order.sort_by_key(|at| &table.columns[*at]);
        let columns = order.iter().map(|at| table.columns[*at].clone()).collect();
        let sorted = Table { columns, files: 1, stride: 0, ..(*table).clone() };
        here.merge(&tally(way, &mut session, &copy_statement(&sorted, 0, &stored.about.encoding))?);
        for file in 0..table.files {
            let path = stored.rows(table, file)?;
            let mut reader = BufReader::new(way.source.open(&path)?);
            let mut row = Vec::new();
            loop {
                row.clear();
                if reader.read_until(b'\n', &mut row).or_io(|| format!("cannot read `{path}`"))? == 0 {
                    break;
                }
                let fields: Vec<&[u8]> = row.strip_suffix(b"\n").unwrap_or(&row).split(|byte| *byte == b'\t').collect();
                let in_order: Vec<&[u8]> = order.iter().filter_map(|at| fields.get(*at).copied()).collect();
                let mut line = in_order.join(&b'\t');
                line.push(b'\n');
                there.row(&line);
            }
        }
    }
    session.close();
    Ok((here.rows, here.hash) == (there.rows, there.hash))
}

/// Sequences may be ahead of the point, never behind.
fn sequences(
    way: &Way<'_>,
    session: &mut Session,
    name: &str,
    stored: &StoredDatabase,
    found: &mut Found,
) -> Result<()> {
    let mut here: BTreeMap<String, (i64, i64)> = BTreeMap::new();
    let rows = session.query(
        "SELECT schemaname, sequencename, increment_by, coalesce(last_value, start_value), last_value IS NOT NULL \
         FROM pg_catalog.pg_sequences",
    )?;
    for row in &rows {
        // Whether the last value was handed out counts as half a step.
        let (step, last): (i64, i64) = (row.number(2)?, row.number(3)?);
        let place = place(last, row.truth(4), step);
        here.insert(qualified(row.text(0)?, row.text(1)?), (place, step));
    }
    for statement in super::restore::load::sequence_statements(way, stored)? {
        let words = super::restore::statements::words(&statement);
        let quoted = words.iter().find(|word| word.is_quoted).map(|word| word.text.clone());
        let (Some(sequence), Some((value, is_called))) = (quoted, set_value(&statement)) else {
            return Err(Error::new(Kind::Corrupt, format!("`{}` holds something else", layout::SEQUENCES)));
        };
        found.checked += 1;
        match here.get(&sequence) {
            None => found.differs(format!("{name}.{sequence}: the sequence is missing")),
            Some((at, step)) if *at < place(value, is_called, *step) => {
                found.differs(format!("{name}.{sequence}: the sequence is behind {value}"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Where a sequence stands, so that later is larger whatever its direction.
fn place(value: i64, is_called: bool, step: i64) -> i64 {
    let value = if step < 0 { value.saturating_neg() } else { value };
    value.saturating_mul(2).saturating_add(i64::from(is_called))
}

/// Value and mark of `SELECT pg_catalog.setval('…', 5, true)`.
fn set_value(statement: &str) -> Option<(i64, bool)> {
    let inner = statement.strip_suffix(')')?;
    let mut parts = inner.rsplitn(3, ',');
    let is_called = parts.next()?.trim() == "true";
    Some((parts.next()?.trim().parse().ok()?, is_called))
}

/// Large objects: their content as one set of rows, and their list.
fn large_objects(
    way: &Way<'_>,
    session: &mut Session,
    name: &str,
    stored: &StoredDatabase,
    found: &mut Found,
) -> Result<()> {
    let objects = stored.large_objects(way.source)?;
    if objects.is_empty() {
        return Ok(());
    }
    let rows =
        session.query("SELECT oid, pg_catalog.pg_get_userbyid(lomowner) FROM pg_catalog.pg_largeobject_metadata")?;
    let here: BTreeMap<u32, String> =
        rows.iter().map(|row| Ok((row.number(0)?, row.string(1)?))).collect::<Result<_>>()?;
    found.checked += objects.len() as u64;
    for object in &objects {
        match here.get(&object.oid) {
            None => found.differs(format!("{name}: large object {} is missing", object.oid)),
            Some(owner) if *owner != object.owner && way.settings.roles != Some(Roles::None) => {
                found.differs(format!(
                    "{name}: large object {} belongs to {owner}, not to {}",
                    object.oid, object.owner
                ));
            }
            Some(_) => {}
        }
    }
    let Some(total) = stored.totals.get(&(String::new(), layout::LARGE_OBJECTS.to_owned())) else { return Ok(()) };
    let statement = "COPY (SELECT loid, pageno::bigint * (current_setting('block_size')::bigint / 4), data \
                     FROM pg_catalog.pg_largeobject WHERE loid IN (SELECT oid FROM pg_catalog.pg_largeobject_metadata)) TO STDOUT";
    let tally = tally(way, session, statement)?;
    if (tally.rows, format!("{:016x}", tally.hash)) != (total.rows, total.hash.clone()) {
        found.differs(format!("{name}: the content of the large objects differs"));
    }
    Ok(())
}

/// Indexes and constraints that nobody may rely on; extensions that are missing.
fn soundness(
    way: &Way<'_>,
    session: &mut Session,
    name: &str,
    stored: &StoredDatabase,
    found: &mut Found,
) -> Result<()> {
    let rows = session.query(
        "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_index i \
         JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = 'i' AND NOT (i.indisvalid AND i.indisready)",
    )?;
    for row in &rows {
        found.differs(format!("{name}: index {} is not valid", row.text(0)?));
    }
    let script = source::script(way.source, &stored.file(layout::POST_DATA)?)?.unwrap_or_default();
    let script = script + &source::script(way.source, &stored.file(layout::PRE_DATA)?)?.unwrap_or_default();
    let doubtful: Vec<&str> =
        script.lines().filter(|line| line.contains("NOT VALID") || line.contains("NOT ENFORCED")).collect();
    // Constraints that the source did not vouch for either are as they were.
    let rows = session.query(
        "SELECT pg_catalog.quote_ident(k.conname), pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_constraint k \
         JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE NOT k.convalidated",
    )?;
    for row in &rows {
        let constraint = format!("CONSTRAINT {} ", row.text(0)?);
        if !doubtful.iter().any(|line| line.contains(&constraint)) {
            found.differs(format!("{name}: constraint {} of {} is not valid", row.text(0)?, row.text(1)?));
        }
    }
    let rows = session.query("SELECT extname FROM pg_catalog.pg_extension")?;
    let here: BTreeSet<String> = rows.iter().map(|row| row.string(0)).collect::<Result<_>>()?;
    for (extension, ..) in stored.about.extensions.iter().filter(|(extension, ..)| !here.contains(extension)) {
        found.differs(format!("{name}: extension {extension} is missing"));
    }
    Ok(())
}

/// Compares the tables of contents of the point's archive and of one that is made here and now.
fn definitions(way: &Way<'_>, name: &str, stored: &StoredDatabase, tools: &Tools, found: &mut Found) -> Result<()> {
    let path = source::to_scratch(way.source, &stored.file(layout::DUMP)?, way.scratch(), way.context)?;
    let there = Archive::open(tools, &path, way.context)?;
    let here = path.with_extension("here");
    let mut command = tools.command("pg_dump", name);
    command.args(["--no-password", "--no-sync", "--format=custom", "--schema-only", "--create", "--file"]).arg(&here);
    match super::restore::database::stamp_schema_has_more(&mut way.connect(name)?)? {
        true => command.args(
            super::STAMP_TABLES
                .map(|table| format!("--exclude-table={}.{}", identifier(super::STAMP_SCHEMA), identifier(table))),
        ),
        false => command.arg(format!("--exclude-schema={}", identifier(super::STAMP_SCHEMA))),
    };
    let output = tools::run(&mut command, way.context)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::new(Kind::Io, "pg_dump cannot read the definitions of the restored database")
            .context("database", name)
            .context("because", said.trim().to_owned()));
    }
    let here = Archive::open(tools, &here, way.context)?;
    let with_owners = way.settings.roles != Some(Roles::None);
    let (here, there) = (counted(&here.entries, with_owners), counted(&there.entries, with_owners));
    found.checked += there.values().sum::<u64>();
    for (entry, count) in &there {
        if here.get(entry).copied().unwrap_or(0) < *count {
            found.differs(format!("{name}: {entry} is missing, or belongs to somebody else"));
        }
    }
    for (entry, count) in &here {
        if there.get(entry).copied().unwrap_or(0) < *count {
            found.differs(format!("{name}: {entry} is not in the point"));
        }
    }
    Ok(())
}

/// Definitions with how often they occur. What is said of the database itself goes by its name, which may
/// be another one here.
fn counted(entries: &[Entry], with_owners: bool) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for entry in entries {
        let kind = entry.kind();
        let of_database = kind.starts_with("DATABASE") || entry.name().starts_with("- DATABASE ");
        let of_roles = kind.contains("ACL");
        if of_database || (of_roles && !with_owners) {
            continue;
        }
        let text = match with_owners {
            true => entry.text.clone(),
            false => entry.text.rsplit_once(' ').map_or(entry.text.clone(), |(text, _)| text.to_owned()),
        };
        *all.entry(text).or_default() += 1;
    }
    all
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_the_server_are_taken_apart() {
        assert_eq!(array("{a,\"b,\\\"c\",\"d\\\\e\",\"\"}"), ["a", "b,\"c", "d\\e", ""]);
        assert_eq!(array("{}"), Vec::<String>::new());
    }

    #[test]
    fn sequences_are_compared_in_their_own_direction() {
        assert_eq!(set_value("SELECT pg_catalog.setval('\"a, b\".\"c\"', -7, false)"), Some((-7, false)));
        assert!(place(5, false, 1) < place(5, true, 1) && place(5, true, 1) < place(6, false, 1));
        assert!(place(-5, true, -3) > place(-2, true, -3));
        assert!(place(i64::MAX, true, 1) >= place(i64::MAX - 1, true, 1));
    }
}
