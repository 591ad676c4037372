//! Rows, large objects and sequences: from the tree into tables that have no index yet.
//!
//! A table of its own is filled by one connection in one transaction that empties it first, so that its
//! rows are stored frozen and need no second write. The few tables that are larger than a fair share of
//! one connection are filled by several at once instead, file by file.

use std::io::Read;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::TreePath;

use super::super::layout::{LargeObject, Table, Total};
use super::super::session::Session;
use super::super::wire::{ServerMessage, Tally, identifier, literal, qualified};
use super::binary::{self, Converter, Field};
use super::source::{self, StoredDatabase};
use super::{Way, pool};

/// What one call to the server carries.
const BUFFER_BYTES: usize = 256 << 10;
/// Large objects made by one statement.
const OBJECTS_PER_STATEMENT: usize = 500;

/// Tables with less are filled as they are: preparations would cost more than they gain.
const LARGE_BYTES_MIN: u64 = 1 << 20;

/// What one statement loads of a table that several connections fill: small enough that all of them are
/// busy to the end.
const PART_BYTES: u64 = 16 << 20;

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

/// A piece of work for one connection: a table, some of its files, and whether they are all it has, so
/// that it can be emptied first.
struct Job<'a> {
    load: &'a Load<'a>,
    fields: Option<Vec<Field>>,
    files: Range<u64>,
    is_whole: bool,
}

/// Fills the tables.
pub(super) fn tables(way: &Way<'_>, database: &str, stored: &StoredDatabase, loads: &[Load<'_>]) -> Result<()> {
    let bytes: u64 = loads.iter().map(|load| load.total.bytes).sum();
    let share = bytes / (way.settings.connections as u64).max(1);
    let mut largest: Vec<&Load<'_>> = loads.iter().filter(|load| load.table.files > 0).collect();
    largest.sort_by_key(|load| std::cmp::Reverse(load.total.bytes));
    let mut session = way.connect(database)?;
    let begin = format!("{BEGIN}; {}", replica_role(&mut session)?);
    let mut jobs = Vec::new();
    for load in largest {
        // Preparations cost more than few rows would gain.
        let is_large = load.total.bytes >= LARGE_BYTES_MIN;
        let fields = if is_large { fields(&mut session, load, &stored.about.encoding)? } else { None };
        let is_alone = load.total.bytes <= share || load.table.files == 1;
        let is_whole = is_alone && is_large && load.is_ours && load.table.filter.is_none();
        let part_bytes = if is_whole { u64::MAX } else { PART_BYTES };
        jobs.extend(parts(load, part_bytes).into_iter().map(|files| Job {
            load,
            fields: fields.clone(),
            files,
            is_whole,
        }));
    }
    session.close();
    // Rows move to another partition where types or collations hash or sort otherwise than at the source,
    // as enums always do. The server chooses the partition then, after every one of them was emptied.
    let misplaced = Mutex::new(Vec::new());
    pool::run(way, (database, &begin), jobs, &|session, job| match fill(way, session, stored, job, &job.load.into) {
        Err(error) if is_misplaced(&error) => {
            misplaced.lock().unwrap_or_else(PoisonError::into_inner).push((job.load, job.files.clone()));
            if session.in_transaction() { session.execute("ROLLBACK") } else { Ok(()) }
        }
        done => done.map_err(|error| of(job.load, error)),
    })?;
    let misplaced = misplaced.into_inner().unwrap_or_else(PoisonError::into_inner);
    pool::run(way, (database, &begin), misplaced, &|session, (load, files)| {
        let top = root(session, &load.into.0, &load.into.1)?.unwrap_or_else(|| load.into.clone());
        let job = Job { load, fields: None, files: files.clone(), is_whole: false };
        fill(way, session, stored, &job, &top).map_err(|error| of(load, error))
    })
}

/// Cuts a table's files into pieces of about this size.
fn parts(load: &Load<'_>, part_bytes: u64) -> Vec<Range<u64>> {
    let (mut parts, mut begin, mut bytes) = (Vec::new(), 0, 0);
    for file in 0..load.table.files {
        bytes += file_tally(load, file).map_or(PART_BYTES, |tally| tally.bytes);
        if bytes >= part_bytes || file + 1 == load.table.files {
            parts.push(begin..file + 1);
            (begin, bytes) = (file + 1, 0);
        }
    }
    parts
}

fn file_tally(load: &Load<'_>, file: u64) -> Option<Tally> {
    load.total.file(usize::try_from(file).ok()?)
}

/// Keeps triggers of tables that exist already from firing, where this role may.
fn replica_role(session: &mut Session) -> Result<&'static str> {
    const REPLICA: &str = "SET session_replication_role = replica";
    match session.execute(REPLICA) {
        Ok(()) => Ok(REPLICA),
        // Tables that we made have no triggers yet.
        Err(error) if error.kind() == Kind::PermissionDenied => Ok(BEGIN),
        Err(error) => Err(error),
    }
}

/// How rows are stored and sent.
#[derive(Debug, Clone, Copy)]
struct Form<'a> {
    is_frozen: bool,
    encoding: &'a str,
    /// The forms of the columns, where rows are sent in binary.
    fields: Option<&'a [Field]>,
}

/// The statement that takes rows. Without columns the list is left out: SQL has no empty one.
fn copy_statement(load: &Load<'_>, into: (&str, &str), form: Form<'_>) -> String {
    let columns: Vec<String> = load.table.columns.iter().map(|name| identifier(name)).collect();
    let list = if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) };
    let mut options = Vec::new();
    if form.is_frozen {
        options.push("FREEZE".to_owned());
    }
    if form.fields.is_some() {
        options.push("FORMAT binary".to_owned());
    }
    if form.encoding != "UTF8" {
        options.push(format!("ENCODING {}", literal(form.encoding)));
    }
    let options = if options.is_empty() { String::new() } else { format!(" WITH ({})", options.join(", ")) };
    format!("COPY {}{list} FROM STDIN{options}", qualified(into.0, into.1))
}

/// The forms of the columns, if all have one. In binary the server would read text in the session's
/// encoding, so databases of other encodings are left out.
fn fields(session: &mut Session, load: &Load<'_>, encoding: &str) -> Result<Option<Vec<Field>>> {
    match encoding {
        "UTF8" => binary::fields(session, (&load.into.0, &load.into.1), &load.table.columns),
        _ => Ok(None),
    }
}

/// Files of a table in one statement; a whole table in one transaction that empties it first.
fn fill(
    way: &Way<'_>,
    session: &mut Session,
    stored: &StoredDatabase,
    job: &Job<'_>,
    into: &(String, String),
) -> Result<()> {
    let load = job.load;
    let paths: Vec<TreePath> = job.files.clone().map(|file| stored.rows(load.table, file)).collect::<Result<_>>()?;
    let encoding = stored.about.encoding.as_str();
    let mut fields = job.fields.as_deref();
    let rows = loop {
        if job.is_whole {
            session.execute(&format!("BEGIN; TRUNCATE TABLE ONLY {}", qualified(&into.0, &into.1)))?;
        }
        let form = Form { is_frozen: job.is_whole, encoding, fields };
        match copy(way, session, &copy_statement(load, (&into.0, &into.1), form), &paths, form.fields)? {
            Some(rows) => break rows,
            // Written in another way than we read: the server reads it.
            None => fields = None,
        }
        if job.is_whole {
            session.execute("ROLLBACK")?;
        }
    };
    let expected: Option<u64> = job.files.clone().map(|file| Some(file_tally(load, file)?.rows)).sum();
    expect(load, rows, expected.unwrap_or(rows))?;
    if job.is_whole { session.execute("COMMIT") } else { Ok(()) }
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

/// Streams files of the tree into one COPY; returns the rows that the server took, or `None` if they
/// cannot be sent in this form.
fn copy(
    way: &Way<'_>,
    session: &mut Session,
    statement: &str,
    files: &[TreePath],
    fields: Option<&[Field]>,
) -> Result<Option<u64>> {
    session.copy_in(statement)?;
    let mut converter = fields.map(Converter::new);
    let mut buffer = vec![0; BUFFER_BYTES];
    if converter.is_some() {
        session.copy_write(binary::HEAD)?;
    }
    for path in files {
        match stream(way, session, path, &mut buffer, converter.as_mut()) {
            Ok(true) => {}
            // The first failure counts; one of the connection leaves nothing to say good-bye to.
            stopped => {
                if session.is_usable() {
                    session.copy_fail("the point could not be sent")?;
                }
                return stopped.map(|_| None);
            }
        }
    }
    if converter.is_some() {
        session.copy_write(binary::END)?;
    }
    let rows = session.copy_finish()?;
    way.context.advance(0, rows);
    Ok(Some(rows))
}

/// Sends one file; `false` if it cannot be turned into the form that is wanted.
fn stream(
    way: &Way<'_>,
    session: &mut Session,
    path: &TreePath,
    buffer: &mut [u8],
    mut converter: Option<&mut Converter<'_>>,
) -> Result<bool> {
    let mut reader = way.source.open(path)?;
    let mut turned = Vec::new();
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
            return Ok(converter.is_none_or(|converter| converter.is_complete()));
        }
        match &mut converter {
            None => session.copy_write(&buffer[..filled])?,
            Some(converter) => {
                turned.clear();
                if converter.push(&buffer[..filled], &mut turned).is_none() {
                    return Ok(false);
                }
                session.copy_write(&turned)?;
            }
        }
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
        copy(way, session, "COPY pg_temp.stillpoint_pieces FROM STDIN", std::slice::from_ref(path), None)?;
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
    // A statement that fails would end the transaction: text surely works.
    let job = Job { load, fields: None, files: 0..load.table.files, is_whole: false };
    session.execute("SAVEPOINT rows")?;
    match fill(way, session, stored, &job, &load.into) {
        Err(error) if is_misplaced(&error) => {
            session.execute("ROLLBACK TO SAVEPOINT rows")?;
            let Some(top) = root(session, &load.into.0, &load.into.1)? else { return Err(of(load, error)) };
            fill(way, session, stored, &job, &top).map_err(|error| of(load, error))?;
        }
        done => done.map_err(|error| of(load, error))?,
    }
    session.execute("RELEASE SAVEPOINT rows")
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
