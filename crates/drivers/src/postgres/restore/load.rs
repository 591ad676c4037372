//! Rows, large objects and sequences: from the tree into tables that have no index yet.
//!
//! A table of its own is filled by one connection in one transaction that empties it first, so that its
//! rows are stored frozen and need no second write. The few tables that are larger than a fair share of
//! one connection are filled by several at once instead, file by file.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::TreePath;

use super::super::layout::{LargeObject, Table, Total};
use super::super::session::Session;
use super::super::wire::{ServerMessage, identifier, literal, qualified};
use super::source::{self, StoredDatabase};
use super::{Way, pool};

/// What one call to the server carries.
const BUFFER_BYTES: usize = 256 << 10;
/// Large objects made by one statement.
const OBJECTS_PER_STATEMENT: usize = 500;

/// Every loading session: a crash loses the whole database that is being built, so single commits need
/// not wait for the disk.
pub(super) const BEGIN: &str = "SET synchronous_commit = off";

/// A table of the point, and the table that its rows go into.
pub(super) struct Load<'a> {
    pub(super) table: &'a Table,
    pub(super) total: &'a Total,
    /// Schema and name at the target.
    pub(super) into: (String, String),
    /// Whether nobody but us wrote into it, so that it may be emptied.
    pub(super) is_ours: bool,
}

/// A piece of work for one connection.
enum Job<'a> {
    /// A table with all its files.
    Whole(&'a Load<'a>),
    /// One file of a table.
    File(&'a Load<'a>, u64),
}

/// Fills the tables.
pub(super) fn tables(way: &Way<'_>, database: &str, stored: &StoredDatabase, loads: &[Load<'_>]) -> Result<()> {
    let bytes: u64 = loads.iter().map(|load| load.total.bytes).sum();
    let share = bytes / (way.settings.connections as u64).max(1);
    let mut largest: Vec<&Load<'_>> = loads.iter().filter(|load| load.table.files > 0).collect();
    largest.sort_by_key(|load| std::cmp::Reverse(load.total.bytes));
    let mut jobs = Vec::new();
    for load in largest {
        let is_alone = load.total.bytes <= share || load.table.files == 1;
        match is_alone && load.is_ours && load.table.filter.is_none() {
            true => jobs.push(Job::Whole(load)),
            false => jobs.extend((0..load.table.files).map(|file| Job::File(load, file))),
        }
    }
    let begin = format!("{BEGIN}; {}", replica_role(way, database)?);
    // Rows move to another partition where types or collations hash or sort otherwise than at the source,
    // as enums always do. The server chooses the partition then, after every one of them was emptied.
    let misplaced = Mutex::new(Vec::new());
    let later = |load, file| misplaced.lock().unwrap_or_else(PoisonError::into_inner).push((load, file));
    pool::run(way, (database, &begin), jobs, &|session, job| {
        let (load, done) = match job {
            Job::Whole(load) => (load, whole(way, session, stored, load)),
            Job::File(load, file) => (load, one_file(way, session, stored, load, *file, &load.into)),
        };
        match (done, job) {
            (Err(error), Job::Whole(load)) if is_misplaced(&error) => {
                (0..load.table.files).for_each(|file| later(*load, file));
                session.execute("ROLLBACK")
            }
            (Err(error), Job::File(load, file)) if is_misplaced(&error) => {
                later(*load, *file);
                Ok(())
            }
            (done, _) => done.map_err(|error| of(load, error)),
        }
    })?;
    let misplaced = misplaced.into_inner().unwrap_or_else(PoisonError::into_inner);
    pool::run(way, (database, &begin), misplaced, &|session, (load, file)| {
        let top = root(session, &load.into.0, &load.into.1)?.unwrap_or_else(|| load.into.clone());
        one_file(way, session, stored, load, *file, &top).map_err(|error| of(load, error))
    })
}

/// Keeps triggers of tables that exist already from firing, where this role may.
fn replica_role(way: &Way<'_>, database: &str) -> Result<&'static str> {
    const REPLICA: &str = "SET session_replication_role = replica";
    let mut session = way.connect(database)?;
    match session.execute(REPLICA) {
        Ok(()) => Ok(REPLICA),
        // Tables that we made have no triggers yet.
        Err(error) if error.kind() == Kind::PermissionDenied => Ok("SET synchronous_commit = off"),
        Err(error) => Err(error),
    }
}

/// The statement that takes rows. Without columns the list is left out: SQL has no empty one.
fn copy_statement(load: &Load<'_>, into: (&str, &str), is_frozen: bool, encoding: &str) -> String {
    let columns: Vec<String> = load.table.columns.iter().map(|name| identifier(name)).collect();
    let list = if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) };
    let mut options = Vec::new();
    if is_frozen {
        options.push("FREEZE".to_owned());
    }
    if encoding != "UTF8" {
        options.push(format!("ENCODING {}", literal(encoding)));
    }
    let options = if options.is_empty() { String::new() } else { format!(" WITH ({})", options.join(", ")) };
    format!("COPY {}{list} FROM STDIN{options}", qualified(into.0, into.1))
}

/// A whole table in one transaction.
fn whole(way: &Way<'_>, session: &mut Session, stored: &StoredDatabase, load: &Load<'_>) -> Result<()> {
    let (schema, name) = (load.into.0.as_str(), load.into.1.as_str());
    session.execute(&format!("BEGIN; TRUNCATE TABLE ONLY {}", qualified(schema, name)))?;
    let files: Vec<TreePath> =
        (0..load.table.files).map(|file| stored.rows(load.table, file)).collect::<Result<_>>()?;
    let statement = copy_statement(load, (schema, name), true, &stored.about.encoding);
    let rows = copy(way, session, &statement, &files)?;
    expect(load, rows, load.total.rows)?;
    session.execute("COMMIT")
}

/// One file of a table, in a statement of its own.
fn one_file(
    way: &Way<'_>,
    session: &mut Session,
    stored: &StoredDatabase,
    load: &Load<'_>,
    file: u64,
    into: &(String, String),
) -> Result<()> {
    let path = [stored.rows(load.table, file)?];
    let statement = copy_statement(load, (&into.0, &into.1), false, &stored.about.encoding);
    let rows = copy(way, session, &statement, &path)?;
    let expected = usize::try_from(file).ok().and_then(|file| load.total.file(file)).map_or(rows, |tally| tally.rows);
    expect(load, rows, expected)
}

/// Whether a row does not belong into the partition it was in at the source.
fn is_misplaced(error: &Error) -> bool {
    sqlstate(error) == Some("23514")
}

/// The server's code for an error.
pub(in super::super) fn sqlstate(error: &Error) -> Option<&str> {
    let said = std::error::Error::source(error)?.downcast_ref::<ServerMessage>()?;
    Some(said.code.as_str())
}

/// The table that a partition belongs to, at the top.
fn root(session: &mut Session, schema: &str, name: &str) -> Result<Option<(String, String)>> {
    let rows = session.query(&format!(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.oid = pg_catalog.pg_partition_root({}::pg_catalog.regclass) AND c.relkind = 'p'",
        literal(&qualified(schema, name))
    ))?;
    rows.first().map(|row| Ok((row.string(0)?, row.string(1)?))).transpose()
}

fn expect(load: &Load<'_>, rows: u64, expected: u64) -> Result<()> {
    if rows == expected {
        return Ok(());
    }
    let Table { schema, name, .. } = load.table;
    Err(Error::new(Kind::Corrupt, format!("{schema}.{name} got {rows} rows, the point says {expected}")))
}

fn of(load: &Load<'_>, error: Error) -> Error {
    error.context("table", format!("{}.{}", load.table.schema, load.table.name))
}

/// Streams files of the tree into one COPY; returns the rows that the server took.
fn copy(way: &Way<'_>, session: &mut Session, statement: &str, files: &[TreePath]) -> Result<u64> {
    session.copy_in(statement)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    for path in files {
        if let Err(error) = stream(way, session, path, &mut buffer) {
            // The first failure counts; one of the connection leaves nothing to say good-bye to.
            if session.is_usable() {
                session.copy_fail("the point could not be read")?;
            }
            return Err(error);
        }
    }
    let rows = session.copy_finish()?;
    way.context.advance(0, rows);
    Ok(rows)
}

fn stream(way: &Way<'_>, session: &mut Session, path: &TreePath, buffer: &mut [u8]) -> Result<()> {
    let mut reader = way.source.open(path)?;
    loop {
        way.context.check()?;
        // Small reads are gathered: each write is a message to the server.
        let mut filled = 0;
        while filled < buffer.len() {
            match reader.read(&mut buffer[filled..]).or_io(|| format!("cannot read `{path}`"))? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return Ok(());
        }
        session.copy_write(&buffer[..filled])?;
        way.context.advance(filled as u64, 0);
    }
}

/// Makes the large objects with their content, owners, privileges and comments.
pub(super) fn large_objects(way: &Way<'_>, database: &str, stored: &StoredDatabase, with_owners: bool) -> Result<()> {
    let objects = stored.large_objects(way.source)?;
    if objects.is_empty() {
        return Ok(());
    }
    let mut session = way.connect(database)?;
    session.execute(BEGIN)?;
    for part in objects.chunks(OBJECTS_PER_STATEMENT) {
        let oids: Vec<String> = part.iter().map(|object| object.oid.to_string()).collect();
        session.execute(&format!(
            "SELECT pg_catalog.count(pg_catalog.lo_create(o)) FROM pg_catalog.unnest('{{{}}}'::pg_catalog.oid[]) o",
            oids.join(",")
        ))?;
    }
    let begin = format!(
        "{BEGIN}; CREATE TEMPORARY TABLE stillpoint_pieces (oid pg_catalog.oid, at pg_catalog.int8, bytes pg_catalog.bytea)"
    );
    pool::run(way, (database, &begin), stored.large_object_files(way.source)?, &|session, path| {
        session.execute("TRUNCATE pg_temp.stillpoint_pieces")?;
        copy(way, session, "COPY pg_temp.stillpoint_pieces FROM STDIN", std::slice::from_ref(path))?;
        // By ascending place, so that holes stay holes and each object is written front to end.
        session.execute(
            "SELECT pg_catalog.count(*) FROM (SELECT pg_catalog.lo_put(oid, at, bytes) FROM \
             (SELECT * FROM pg_temp.stillpoint_pieces ORDER BY oid, at) s) t",
        )
    })?;
    for part in objects.chunks(OBJECTS_PER_STATEMENT) {
        let statements: String = part.iter().map(|object| about_object(object, with_owners)).collect();
        if !statements.is_empty() {
            session.execute(&statements)?;
        }
        if with_owners {
            let granted: Vec<_> = part.iter().filter_map(|object| Some((object, object.grants.as_deref()?))).collect();
            for (object, grants) in granted {
                let what = format!("LARGE OBJECT {}", object.oid);
                let sql = super::grants::statements(&mut session, &what, &object.owner, grants)?;
                session.execute(&sql.join("; "))?;
            }
        }
    }
    session.close();
    Ok(())
}

fn about_object(object: &LargeObject, with_owner: bool) -> String {
    let mut text = String::new();
    if with_owner {
        text.push_str(&format!("ALTER LARGE OBJECT {} OWNER TO {};", object.oid, identifier(&object.owner)));
    }
    if let Some(comment) = &object.comment {
        text.push_str(&format!("COMMENT ON LARGE OBJECT {} IS {};", object.oid, literal(comment)));
    }
    text
}

/// Fills one table within the session's transaction.
pub(super) fn in_transaction(
    way: &Way<'_>,
    session: &mut Session,
    stored: &StoredDatabase,
    load: &Load<'_>,
) -> Result<()> {
    (0..load.table.files).try_for_each(|file| {
        session.execute("SAVEPOINT file")?;
        match one_file(way, session, stored, load, file, &load.into) {
            Err(error) if is_misplaced(&error) => {
                session.execute("ROLLBACK TO SAVEPOINT file")?;
                let Some(top) = root(session, &load.into.0, &load.into.1)? else { return Err(of(load, error)) };
                one_file(way, session, stored, load, file, &top).map_err(|error| of(load, error))?;
            }
            done => done.map_err(|error| of(load, error))?,
        }
        session.execute("RELEASE SAVEPOINT file")
    })
}

/// The statements that set the sequences to where they stood; nothing else of the script is run.
pub(in super::super) fn sequence_statements(way: &Way<'_>, stored: &StoredDatabase) -> Result<Vec<String>> {
    let script = source::script(way.source, &stored.file(super::super::layout::SEQUENCES)?)?.unwrap_or_default();
    let all = super::statements::statements(&script).into_iter();
    Ok(all.filter(|text| text.starts_with("SELECT pg_catalog.setval(")).map(str::to_owned).collect())
}

/// Sets the sequences to where they stood.
pub(super) fn sequences(way: &Way<'_>, database: &str, stored: &StoredDatabase) -> Result<()> {
    let mut session = way.connect(database)?;
    session.execute(BEGIN)?;
    for part in sequence_statements(way, stored)?.chunks(200) {
        session.execute(&part.join(";\n"))?;
    }
    session.close();
    Ok(())
}
