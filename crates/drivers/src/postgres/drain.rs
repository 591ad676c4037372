//! The tree of a point: definitions first, because they need locks that others may queue up for; then
//! the rows of every table, in the order of names; last what was counted.
//!
//! Rows are read by the repository's threads, through [`copy`](super::copy); this page only says what
//! there is to read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillpoint_core::driver::{Context, Drained, Loss, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Metadata, Reader, Sink, Tree, bytes};

use super::Postgres;
use super::catalog::{self, Relation, Sequence};
use super::config::Roles;
use super::copy::Streams;
use super::cut::{self, DatabaseView, View};
use super::dump::{self, Definitions, Dump, LeftOut};
use super::extents::{self, Base, Unchanged};
use super::layout::{self, LargeObject, Table, TableKind, Total};
use super::session::Session;
use super::tools::Tools;
use super::wire::{identifier, literal};

/// What stands at the top of every point.
const HOW_TO: &str = include_str!("HOW-TO-RESTORE.txt");
/// Blocks of a large table that make one file: 8 MiB of 8 KiB blocks. Fixed, so that files keep their
/// borders from point to point. Tests do with less, so that small tables have many files.
pub(super) const STRIDE_BLOCKS: u64 = if cfg!(test) { 16 } else { 1024 };
/// Ranges of a table can be read without reading all of it from this version on.
const RANGES_SINCE: u32 = 14;
/// How long commits that are not on disk yet are waited for, at most and beyond what the manual says.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(3);
const SETTLE_MARGIN: Duration = Duration::from_millis(200);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);
/// A server at which somebody commits has brought them there long before.
const NUDGE_AFTER: Duration = Duration::from_millis(100);
/// A checksum for each table, up to so many tables; one for each database beyond.
const CHECKSUMS_MAX: usize = 2000;

/// What one drain works with.
struct Drain<'a> {
    driver: &'a Postgres,
    context: &'a Context,
    view: Arc<View>,
    tools: Arc<Tools>,
    streams: Arc<Streams>,
    folder: Metadata,
    file: Metadata,
    drained: Drained,
    /// Which streams belong to which table, for the totals.
    copied: Vec<Copied>,
    parent: Option<&'a dyn Tree>,
}

/// The streams of one table.
struct Copied {
    database: String,
    schema: String,
    table: String,
    streams: Vec<usize>,
    /// Those of them that the parent point holds already.
    reused: BTreeSet<usize>,
}

/// Everything that is known of a database before its rows are read.
struct Contents {
    description: layout::Database,
    relations: Vec<Relation>,
    columns: BTreeMap<u32, Vec<String>>,
    /// What must stay for rows to keep their text, by table.
    forms: BTreeMap<u32, String>,
    sequences: String,
    objects: Vec<LargeObject>,
    /// Files of the large objects' content.
    object_copies: Vec<String>,
    left_out: LeftOut,
}

/// Copies the view into the sink.
pub(super) fn drain(
    driver: &Postgres,
    context: &Context,
    pin: &Pin,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
) -> Result<Drained> {
    let view = driver.view(pin)?;
    let scratch = dump::folder(&driver.scratch)?;
    let wanted = view.facts.major();
    let tools = Tools::find(&driver.settings, &driver.endpoint, scratch.path(), wanted)?;
    let mut drain = Drain {
        driver,
        context,
        tools: Arc::new(tools),
        streams: Arc::default(),
        folder: Metadata::folder(view.time),
        file: Metadata::stream(view.time),
        drained: Drained { unit: "rows".to_owned(), ..Drained::default() },
        copied: Vec::new(),
        parent,
        view,
    };
    let done = drain.run(sink, scratch.path());
    let Drain { streams, drained, .. } = drain;
    done?;
    drop(streams);
    Ok(drained)
}

impl Drain<'_> {
    fn run(&mut self, sink: &mut dyn Sink, scratch: &Path) -> Result<()> {
        let view = Arc::clone(&self.view);
        self.text(sink, layout::HOW_TO, HOW_TO.as_bytes())?;
        sink.enter(layout::DATABASES.as_bytes(), &self.folder)?;
        let mut databases: Vec<&DatabaseView> = view.databases.iter().collect();
        databases.sort_by_key(|database| layout::database_folder(&database.name));
        for (index, database) in databases.iter().enumerate() {
            self.context.check()?;
            let scratch = scratch.join(index.to_string());
            std::fs::create_dir(&scratch).or_io(|| format!("cannot create {}", scratch.display()))?;
            sink.enter(layout::database_folder(&database.name).as_bytes(), &self.folder)?;
            self.database(sink, database, &scratch)?;
            sink.leave()?;
        }
        sink.leave()?;
        self.server(sink, scratch)?;
        let totals = self.totals()?;
        self.text(sink, layout::TOTALS, &layout::lines(&totals)?)
    }

    fn text(&self, sink: &mut dyn Sink, name: &str, text: &[u8]) -> Result<()> {
        sink.file(name.as_bytes(), &self.file, Some(text.len() as u64), bytes(text))
    }

    /// A file that a program wrote. It is open from now on, so that its folder may go.
    fn written(&self, sink: &mut dyn Sink, name: &str, path: &Path) -> Result<()> {
        let file = File::open(path).or_io(|| format!("cannot open {}", path.display()))?;
        let size = file.metadata().or_io(|| format!("cannot look at {}", path.display()))?.len();
        if size == 0 {
            return Err(Error::new(Kind::Io, format!("`{name}` came out empty")));
        }
        sink.file(name.as_bytes(), &self.file, Some(size), Box::new(Reader(file)))
    }

    fn database(&mut self, sink: &mut dyn Sink, database: &DatabaseView, scratch: &Path) -> Result<()> {
        let contents = self.contents(database)?;
        let (tools, driver) = (Arc::clone(&self.tools), self.driver);
        let dump = Dump {
            tools: &tools,
            settings: &driver.settings,
            database: &database.name,
            snapshot: &database.exported,
            server_major: self.view.facts.major(),
            left_out: &contents.left_out,
            folder: scratch,
        };
        let context = self.context;
        // The definitions are written while rows are read already.
        std::thread::scope(|scope| {
            let definitions = scope.spawn(|| dump.run(context));
            let queued = self.rows(sink, database, &contents);
            let definitions = definitions
                .join()
                .unwrap_or_else(|_| Err(Error::internal("the thread that waits for pg_dump panicked")));
            let (tables, definitions) = (queued?, definitions?);
            self.descriptions(sink, database, &contents, &tables, &definitions)
        })
    }

    /// What the database holds, as the view shows it.
    fn contents(&mut self, database: &DatabaseView) -> Result<Contents> {
        let settings = &self.driver.settings;
        let relations = self.held_relations(database)?;
        let mut lease = database.pool.take(self.context)?;
        let session = lease.session()?;
        let columns = catalog::columns(session)?;
        let sequences: Vec<Sequence> = catalog::sequences(session, settings)?;
        if let Some(hidden) = sequences.iter().find(|sequence| !sequence.readable) {
            let label = format!("{}.{}", hidden.schema, hidden.name);
            return Err(Error::new(
                Kind::PermissionDenied,
                format!("role `{}` may not read sequence `{label}` of database `{}`", settings.user, database.name),
            )
            .hint(format!("GRANT pg_read_all_data TO {}", identifier(&settings.user))));
        }
        let objects = catalog::large_objects(session)?;
        let (object_copies, kept) = large_object_copies(session, &objects)?;
        let mut description = catalog::database(session, &self.view.facts, &database.name, &database.snapshot)?;
        description.large_objects = objects.len() as u64;
        description.large_objects_kept = kept;
        if !kept {
            self.drained.losses.push(Loss {
                what: format!("{} large objects of database `{}`", objects.len(), database.name),
                why: format!("role `{}` may not read them; a superuser may", settings.user),
            });
        }
        if !self.view.facts.superuser {
            self.drained.losses.extend(dump::superusers_only(session, &database.name)?);
        }
        let forms = extents::forms(session, &self.view, &description)?;
        let left_out = dump::left_out(session, settings)?;
        let sequences = catalog::sequence_values(session, &sequences)?;
        Ok(Contents { description, relations, columns, forms, sequences, objects, object_copies, left_out })
    }

    /// The relations of the view, all of them held. Those that came between `prepare` and the cut are
    /// locked now, and none may have lost its rows meanwhile: TRUNCATE and rewriting DDL show an older view
    /// an empty table.
    fn held_relations(&self, database: &DatabaseView) -> Result<Vec<Relation>> {
        let mut state = self.driver.state();
        let held = state.held.iter_mut().find(|held| held.database == database.name);
        let held = held.ok_or_else(|| Error::new(Kind::PinLost, "the view was released"))?;
        // The session that holds the tables waits for none.
        held.control.set_context(self.context);
        held.control.set_limit(None);
        let relations = catalog::relations(&mut held.control, &self.driver.settings)?;
        // Tables are locked by name, and names may have been exchanged meanwhile: the server says which they are.
        let locked = catalog::locked(&mut held.control)?;
        let new: Vec<Relation> = relations
            .iter()
            .filter(|relation| relation.lockable() && !locked.contains(&relation.oid))
            .cloned()
            .collect();
        if !new.is_empty() {
            match held.control.execute(&format!("{} NOWAIT", cut::lock_statement(&new))) {
                Ok(()) => {}
                Err(error) if error.kind() == Kind::NotFound => {
                    return Err(changed(&new[0].label(), &database.name).source(error));
                }
                Err(error) if error.kind() == Kind::Locked => {
                    let mut session = self.driver.connect(&database.name, self.context)?;
                    return Err(cut::name_holders(&mut session, error));
                }
                Err(error) => return Err(error),
            }
            let locked = catalog::locked(&mut held.control)?;
            if let Some(other) = new.iter().find(|relation| !locked.contains(&relation.oid)) {
                return Err(changed(&other.label(), &database.name));
            }
        }
        // A schema's name can change while its tables are held: looked at again when all are copied.
        held.copied = relations.iter().filter(|relation| relation.lockable()).map(|relation| relation.oid).collect();
        match held.moved()? {
            Some(label) => Err(changed(&label, &database.name)),
            None => Ok(relations),
        }
    }

    /// Hands the rows of all tables to the sink; returns the tables as they stand in the tree.
    fn rows(&mut self, sink: &mut dyn Sink, database: &DatabaseView, contents: &Contents) -> Result<Vec<Table>> {
        let locks: BTreeMap<u32, String> = contents
            .relations
            .iter()
            .map(|one| (one.oid, format!("{} NOWAIT", cut::lock_statement(std::slice::from_ref(one)))))
            .collect();
        let mut tables: Vec<Table> = Vec::new();
        for relation in &contents.relations {
            tables.push(self.table(relation, contents));
        }
        tables.sort_by(|a, b| a.folder.cmp(&b.folder));
        let unchanged = self.unchanged(database, contents, &tables)?;
        sink.enter(layout::DATA.as_bytes(), &self.folder)?;
        for (position, table) in tables.iter().enumerate().filter(|(_, table)| table.files > 0) {
            self.context.check()?;
            sink.enter(table.folder.as_bytes(), &self.folder)?;
            let (mut streams, mut reused) = (Vec::new(), BTreeSet::new());
            for index in 0..table.files {
                let name = layout::file_name(index);
                if let Some(&tally) = unchanged.get(&(position, index)) {
                    sink.reuse(name.as_bytes(), &self.file)?;
                    self.context.advance(tally.bytes, tally.rows);
                    reused.insert(streams.len());
                    streams.push(self.streams.reused(tally));
                    continue;
                }
                let sql = copy_statement(table, index, &contents.description.encoding);
                let (number, rows) = self.streams.add(&database.pool, self.context, &locks[&table.oid], sql);
                streams.push(number);
                let blocks = if table.stride == 0 { table.blocks } else { table.stride };
                let size = blocks * self.view.facts.block_bytes;
                sink.file(name.as_bytes(), &self.file, Some(size), Box::new(rows))?;
            }
            sink.leave()?;
            let (schema, name) = (table.schema.clone(), table.name.clone());
            self.copied.push(Copied { database: database.name.clone(), schema, table: name, streams, reused });
        }
        sink.leave()?;
        tables.sort_by(|a, b| b.blocks.cmp(&a.blocks).then_with(|| a.folder.cmp(&b.folder)));
        Ok(tables)
    }

    /// A relation as it stands in the tree.
    fn table(&mut self, relation: &Relation, contents: &Contents) -> Table {
        let chosen = self.driver.settings.has_rows(&relation.schema, &relation.name);
        let mut kept = relation.kind == TableKind::Table && chosen;
        if kept && relation.unlogged && self.view.facts.standby {
            kept = false;
            self.drained.losses.push(Loss {
                what: format!("rows of table {}", relation.label()),
                why: "it is unlogged, and a standby has nothing of it".to_owned(),
            });
        }
        let whole = !relation.heap
            || relation.filter.as_ref().is_some_and(|filter| !filter.is_empty())
            || relation.blocks <= STRIDE_BLOCKS
            || self.view.facts.major() < RANGES_SINCE;
        let stride = if whole { 0 } else { STRIDE_BLOCKS };
        Table {
            schema: relation.schema.clone(),
            name: relation.name.clone(),
            oid: relation.oid,
            kind: relation.kind,
            folder: layout::table_folder(&relation.schema, &relation.name, relation.oid),
            columns: contents.columns.get(&relation.oid).cloned().unwrap_or_default(),
            filter: relation.filter.clone().filter(|filter| !filter.is_empty()),
            files: match (kept, whole) {
                (false, _) => 0,
                (true, true) => 1,
                (true, false) => relation.blocks.div_ceil(STRIDE_BLOCKS),
            },
            stride,
            blocks: relation.blocks,
            populated: relation.populated,
            rows_kept: kept,
            form: contents.forms.get(&relation.oid).filter(|_| kept && relation.filter.is_none()).cloned(),
        }
    }

    /// The files that the parent point holds already as the view shows them.
    fn unchanged(&self, database: &DatabaseView, contents: &Contents, tables: &[Table]) -> Result<Unchanged> {
        let Some(parent) = self.parent else { return Ok(Unchanged::new()) };
        let Some(base) = Base::read(parent, &self.view, database) else { return Ok(Unchanged::new()) };
        let manner = (contents.description.encoding.as_str(), self.driver.settings.connections);
        extents::unchanged(self.context, database, (&base, parent), tables, manner)
    }

    /// Whether every commit that the view shows is on the server's disk, so that no crash can take it back
    /// and give its transaction number to another. Those that do not wait for the disk (a setting of the
    /// application's) get there within three rounds of the server's writer (manual, "Asynchronous Commit"),
    /// unless it is held up: the server's own word counts, not the time.
    fn is_settled(&self, database: &DatabaseView) -> Result<bool> {
        if self.view.facts.standby {
            return Ok(false);
        }
        // Between two pages the place of the next record lies behind the header of the next page, where
        // nothing was written yet: 24 bytes, at the begin of a segment 40. A server that switches segments
        // and rests (`archive_timeout`) stands there for good.
        let sql = format!(
            "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0') >= log - CASE WHEN log % segment = 40 THEN 40 \
             WHEN log % page = 24 THEN 24 ELSE 0 END, \
             (SELECT setting FROM pg_settings WHERE name = 'wal_writer_delay') \
             FROM (SELECT pg_wal_lsn_diff({}, '0/0') AS log, current_setting('wal_block_size')::numeric AS page, \
             pg_size_bytes(current_setting('wal_segment_size')) AS segment) l",
            literal(&database.log)
        );
        let (begun, mut nudged) = (Instant::now(), false);
        loop {
            let elapsed = begun.elapsed();
            let row = database.pool.take(self.context)?.session()?.query_one(&sql)?;
            let rounds = Duration::from_millis(row.number::<u64>(1)? * 3) + SETTLE_MARGIN;
            if row.truth(0) {
                return Ok(true);
            }
            if elapsed >= rounds.min(SETTLE_TIME_MAX) {
                return Ok(false);
            }
            if !nudged && elapsed >= NUDGE_AFTER {
                nudged = true;
                self.nudge(database)?;
            }
            self.context.check()?;
            std::thread::sleep(SETTLE_PAUSE);
        }
    }

    /// Makes the server's writer bring its log to the disk. Where nobody commits it leaves there what readers
    /// wrote (hints, with checksums of pages), our own of the last backup among them. A message to nobody is
    /// a record like any other, needs no privilege, and is part of no transaction that a position would show.
    /// Where a slot decodes this database it might be handed on, so there it is not written. Without it the
    /// next point reads all anew, which is no reason to fail this one.
    fn nudge(&self, database: &DatabaseView) -> Result<()> {
        const MESSAGE: &str = "SELECT pg_catalog.pg_logical_emit_message(false, 'stillpoint', '') WHERE NOT EXISTS \
             (SELECT FROM pg_catalog.pg_replication_slots s WHERE s.slot_type = 'logical' \
             AND s.database = pg_catalog.current_database())";
        let done = self.driver.connect(&database.name, self.context).and_then(|mut session| session.execute(MESSAGE));
        match done {
            Err(error) if error.kind() == Kind::Cancelled => Err(error),
            _ => Ok(()),
        }
    }

    /// What describes the database, in the order of names.
    fn descriptions(
        &mut self,
        sink: &mut dyn Sink,
        database: &DatabaseView,
        contents: &Contents,
        tables: &[Table],
        definitions: &Definitions,
    ) -> Result<()> {
        let mut description = contents.description.clone();
        description.settled = self.is_settled(database)?;
        self.text(sink, layout::DATABASE, &layout::document(&description)?)?;
        sink.enter(layout::LARGE_OBJECTS.as_bytes(), &self.folder)?;
        let mut streams = Vec::new();
        for (index, sql) in contents.object_copies.iter().enumerate() {
            let (number, rows) = self.streams.add(&database.pool, self.context, "", sql.clone());
            streams.push(number);
            sink.file(layout::file_name(index as u64).as_bytes(), &self.file, None, Box::new(rows))?;
        }
        if !streams.is_empty() {
            let (schema, table) = (String::new(), layout::LARGE_OBJECTS.to_owned());
            let reused = BTreeSet::new();
            self.copied.push(Copied { database: database.name.clone(), schema, table, streams, reused });
        }
        self.text(sink, layout::INDEX, &layout::lines(&contents.objects)?)?;
        sink.leave()?;
        self.written(sink, layout::POST_DATA, &definitions.post_data)?;
        self.written(sink, layout::PRE_DATA, &definitions.pre_data)?;
        self.written(sink, layout::DUMP, &definitions.dump)?;
        self.text(sink, layout::SEQUENCES, contents.sequences.as_bytes())?;
        if let Some(statistics) = &definitions.statistics {
            self.written(sink, layout::STATISTICS, statistics)?;
        }
        self.text(sink, layout::TABLES, &layout::lines(tables)?)
    }

    /// What concerns the server as a whole.
    fn server(&mut self, sink: &mut dyn Sink, scratch: &Path) -> Result<()> {
        let (driver, facts) = (self.driver, &self.view.facts);
        let default = if facts.superuser { Roles::WithPasswords } else { Roles::WithoutPasswords };
        let roles = driver.settings.roles.unwrap_or(default);
        let first = &self.view.databases[0];
        let globals = dump::globals(&self.tools, &first.name, roles, scratch, self.context)?;
        if let Some(path) = &globals {
            self.written(sink, layout::GLOBALS, path)?;
        }
        if roles == Roles::WithoutPasswords {
            self.drained.notes.push("passwords of roles are not in the point".to_owned());
        }
        let settings = catalog::server_settings(first.pool.take(self.context)?.session()?)?;
        let server = layout::Server {
            schema: layout::SCHEMA.to_owned(),
            version: facts.version.clone(),
            version_number: facts.version_number,
            system_identifier: facts.system_identifier.clone(),
            timeline: facts.timeline,
            standby: facts.standby,
            databases: self.view.databases.iter().map(|database| database.name.clone()).collect(),
            roles: match roles {
                Roles::WithPasswords => "withPasswords",
                Roles::WithoutPasswords => "withoutPasswords",
                Roles::None => "none",
            }
            .to_owned(),
            settings,
            tool: dump::version(&self.tools, self.context)?,
        };
        self.drained.notes.extend(self.view.lag.clone());
        let first = &self.view.databases[0].snapshot;
        if self.view.databases.iter().any(|database| database.snapshot != *first) {
            let note = "writers were busy during the cut: its databases were viewed some milliseconds apart";
            self.drained.notes.push(note.to_owned());
        }
        self.text(sink, layout::SERVER, &layout::document(&server)?)
    }

    /// Waits for all rows and sums them up.
    fn totals(&mut self) -> Result<Vec<Total>> {
        let tallies = self.streams.wait(self.context)?;
        let mut totals = Vec::new();
        for copied in &self.copied {
            let files: Vec<_> = copied.streams.iter().map(|&number| tallies[number]).collect();
            let reused = copied.reused.iter().map(|&position| files[position].bytes).sum::<u64>();
            self.drained.bytes_read += files.iter().map(|file| file.bytes).sum::<u64>() - reused;
            totals.push(Total::new(&copied.database, &copied.schema, &copied.table, &files));
        }
        let many = self.view.databases.len() > 1;
        let folded = totals.len() > CHECKSUMS_MAX;
        let mut by_database: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for total in &totals {
            self.drained.items += total.rows;
            self.drained.bytes += total.bytes;
            let label = if total.schema.is_empty() {
                layout::LARGE_OBJECTS.to_owned()
            } else {
                format!("{}.{}", total.schema, total.table)
            };
            let label = if many { format!("{}/{label}", total.database) } else { label };
            let sum = by_database.entry(&total.database).or_default();
            let hash = super::wire::row_hash(format!("{label}:{}:{}", total.rows, total.hash).as_bytes());
            *sum = (sum.0 + total.rows, sum.1.wrapping_add(hash));
            if !folded {
                self.drained.checksums.insert(label, format!("{}:{}", total.rows, total.hash));
            }
        }
        if folded {
            for (database, (rows, hash)) in by_database {
                self.drained.checksums.insert(database.to_owned(), format!("{rows}:{hash:016x}"));
            }
        }
        Ok(totals)
    }
}

/// The error of a table that is not what the view says it is.
fn changed(label: &str, database: &str) -> Error {
    Error::new(
        Kind::PinLost,
        format!("table `{label}` of database `{database}` was made, renamed or emptied during the cut"),
    )
    .temporary()
    .hint("a migration is running: take the point when it is over")
}

/// The COPY of one file.
pub(super) fn copy_statement(table: &Table, index: u64, encoding: &str) -> String {
    let name = super::wire::qualified(&table.schema, &table.name);
    let columns: Vec<String> = table.columns.iter().map(|column| identifier(column)).collect();
    let columns = columns.join(", ");
    // Text as it is in the database; our sessions would have it in UTF-8 otherwise.
    let options = match encoding {
        "UTF8" | "SQL_ASCII" => String::new(),
        other => format!(" WITH (ENCODING {})", literal(other)),
    };
    let condition = match (&table.filter, table.stride) {
        (Some(filter), _) => format!(" {filter}"),
        (None, 0) if !table.columns.is_empty() => {
            return format!("COPY {name} ({columns}) TO STDOUT{options}");
        }
        (None, 0) => String::new(),
        (None, _) => extents::range(table, index),
    };
    format!("COPY (SELECT {columns} FROM ONLY {name}{condition}) TO STDOUT{options}")
}

/// The COPYs that read all large objects, and whether we may read them.
fn large_object_copies(session: &mut Session, objects: &[LargeObject]) -> Result<(Vec<String>, bool)> {
    if objects.is_empty() {
        return Ok((Vec::new(), true));
    }
    let row = session.query_one("SELECT has_table_privilege('pg_largeobject', 'SELECT')")?;
    if !row.truth(0) {
        return Ok((Vec::new(), false));
    }
    let files = objects.chunks(layout::LARGE_OBJECTS_PER_FILE as usize);
    let statement = |group: &[LargeObject]| {
        let (from, to) = (group.first().map_or(0, |object| object.oid), group.last().map_or(0, |object| object.oid));
        format!(
            "COPY (SELECT loid, pageno::bigint * (current_setting('block_size')::bigint / 4), data FROM pg_largeobject \
             WHERE loid BETWEEN {from} AND {to} ORDER BY loid, pageno) TO STDOUT"
        )
    };
    Ok((files.map(statement).collect(), true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(stride: u64, files: u64, columns: &[&str], filter: Option<&str>) -> Table {
        Table {
            schema: "s".to_owned(),
            name: "t".to_owned(),
            oid: 1,
            kind: TableKind::Table,
            folder: "s.t".to_owned(),
            columns: columns.iter().map(|&name| name.to_owned()).collect(),
            filter: filter.map(str::to_owned),
            files,
            stride,
            blocks: 0,
            populated: true,
            rows_kept: true,
            form: None,
        }
    }

    #[test]
    fn ranges_leave_no_block_out_and_take_none_twice() {
        let of = |index| copy_statement(&table(10, 3, &["a", "b"], None), index, "UTF8");
        let head = "COPY (SELECT \"a\", \"b\" FROM ONLY \"s\".\"t\" WHERE ctid >= ";
        assert_eq!(of(0), format!("{head}'(0,0)' AND ctid < '(10,0)') TO STDOUT"));
        assert_eq!(of(1), format!("{head}'(10,0)' AND ctid < '(20,0)') TO STDOUT"));
        assert_eq!(of(2), format!("{head}'(20,0)') TO STDOUT"));
    }

    #[test]
    fn tables_of_every_kind_are_copied() {
        assert_eq!(copy_statement(&table(0, 1, &["a"], None), 0, "UTF8"), "COPY \"s\".\"t\" (\"a\") TO STDOUT");
        assert_eq!(
            copy_statement(&table(0, 1, &["a"], None), 0, "LATIN1"),
            "COPY \"s\".\"t\" (\"a\") TO STDOUT WITH (ENCODING 'LATIN1')"
        );
        assert_eq!(
            copy_statement(&table(0, 1, &[], None), 0, "UTF8"),
            "COPY (SELECT  FROM ONLY \"s\".\"t\") TO STDOUT"
        );
        assert_eq!(
            copy_statement(&table(0, 1, &["a"], Some("WHERE a > 1")), 0, "UTF8"),
            "COPY (SELECT \"a\" FROM ONLY \"s\".\"t\" WHERE a > 1) TO STDOUT"
        );
    }
}
