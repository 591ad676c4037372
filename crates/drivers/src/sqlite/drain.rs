//! DRAIN and the edges of references: what is read from a pinned view.

use std::fs::File;
use std::sync::Arc;

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{self, Content, ContentEnd, FileTime, Metadata, Reader, Sink, Tree, TreePath};

use super::client::{self, Attempt};
use super::cut::{Held, Target, View};
use super::wire::{self, Description, SCHEMA, STAMP_TABLE, quoted};
use super::{Sqlite, restore};

/// The instructions at the top of every point.
const HOW_TO: &[u8] = include_bytes!("HOW-TO-RESTORE.txt");
/// Their name.
const HOW_TO_NAME: &[u8] = b"HOW-TO-RESTORE.txt";
/// The folder of a store with many databases.
const MANY: &[u8] = b"databases";
/// How much of a view is read under one hold of its connection.
const BATCH_BYTES: u64 = 256 << 10;
/// More than the description of 100,000 tables takes.
pub(super) const DESCRIPTION_BYTES_MAX: u64 = 32 << 20;

/// Copies every view into the sink; reuses those whose files did not change since the parent.
pub(super) fn drain(
    driver: &Sqlite,
    context: &Context,
    pin: &Pin,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
) -> Result<Drained> {
    let views = driver.views(pin)?;
    let mut drained = Drained { unit: "rows".to_owned(), ..Drained::default() };
    let newest = views.iter().map(|view| view.meta.mtime).max().unwrap_or_default();
    let folder = Metadata::folder(newest);
    if driver.settings.path.is_some() {
        for view in &views {
            drain_one(driver, context, view, sink, parent, &mut drained)?;
        }
        note_waits(&views, &mut drained);
        return Ok(drained);
    }
    add_text(sink, HOW_TO_NAME, newest, HOW_TO)?;
    sink.enter(MANY, &folder)?;
    let mut inside: Vec<Vec<u8>> = Vec::new();
    for view in &views {
        context.check()?;
        let shared = inside.iter().zip(&view.target.below).take_while(|(a, b)| a == b).count();
        for _ in shared..inside.len() {
            sink.leave()?;
        }
        for name in &view.target.below[shared..] {
            sink.enter(name, &folder)?;
        }
        inside.clone_from(&view.target.below);
        drain_one(driver, context, view, sink, parent, &mut drained)?;
    }
    for _ in inside {
        sink.leave()?;
    }
    sink.leave()?;
    note_waits(&views, &mut drained);
    Ok(drained)
}

/// Says for how long writers had to wait where a lock was the pin.
fn note_waits(views: &[Arc<View>], drained: &mut Drained) {
    for view in views.iter().filter(|view| view.held == Held::SharedLock) {
        let file = view.target.path.file_name().unwrap_or_default().to_string_lossy();
        let seconds = view.since.elapsed().as_secs_f64();
        drained
            .notes
            .push(format!("writers of {file} waited up to {seconds:.1} s during the drain: its lock was the pin"));
    }
}

/// Where a database lies in the tree.
pub(super) fn folder(target: &Target) -> Result<TreePath> {
    let mut path = TreePath::root();
    if !target.below.is_empty() {
        path.push(MANY)?;
        target.below.iter().try_for_each(|name| path.push(name))?;
    }
    Ok(path)
}

fn drain_one(
    driver: &Sqlite,
    context: &Context,
    view: &Arc<View>,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
    drained: &mut Drained,
) -> Result<()> {
    let name = wire::content_name(&view.target.path);
    let unchanged = match parent {
        Some(parent) => unchanged_since(view, parent)?,
        None => None,
    };
    let reused = unchanged.is_some();
    let description = match unchanged {
        Some(description) => description,
        None => view.with(|connection| {
            client::interruptible(context, connection, || describe(driver, view, connection, &mut drained.notes))
        })?,
    };
    let bytes = description.pages * description.page_bytes;
    drained.items += description.rows_total();
    drained.bytes += bytes;
    let broken = description.foreign_keys_broken.unwrap_or(0);
    if broken > 0 {
        drained.notes.push(format!("{}: {broken} rows break a foreign key, at the source too", description.file));
    }
    let text = description.to_bytes()?;
    let mut names = vec![wire::DESCRIPTION, &name];
    if view.target.below.is_empty() {
        names.push(HOW_TO_NAME);
    }
    names.sort_unstable();
    for entry in names {
        if entry == wire::DESCRIPTION {
            add_text(sink, entry, view.meta.mtime, &text)?;
        } else if entry == HOW_TO_NAME {
            add_text(sink, entry, view.meta.mtime, HOW_TO)?;
        } else if reused {
            sink.reuse(entry, &view.meta)?;
            context.advance(bytes, description.rows_total());
        } else {
            drained.bytes_read += bytes;
            sink.file(entry, &view.meta, Some(bytes), content(driver, context, view, &description)?)?;
        }
    }
    Ok(())
}

fn add_text(sink: &mut dyn Sink, name: &[u8], mtime: FileTime, text: &[u8]) -> Result<()> {
    sink.file(name, &Metadata::stream(mtime), Some(text.len() as u64), tree::bytes(text))
}

/// The parent's description, if the files were surely not written since.
fn unchanged_since(view: &View, parent: &dyn Tree) -> Result<Option<Description>> {
    let Some(state) = &view.files_state else { return Ok(None) };
    let folder = folder(&view.target)?;
    let path = folder.join(wire::DESCRIPTION)?;
    if parent.get(&path)?.is_none() {
        return Ok(None);
    }
    let bytes = tree::read_small(parent, &path, DESCRIPTION_BYTES_MAX)?;
    // A parent of another version is no reason to fail: it is only read again.
    let Ok(description) = Description::parse(&bytes) else { return Ok(None) };
    if description.files_state.as_ref() != Some(state) {
        return Ok(None);
    }
    let stored = parent.get(&folder.join(&wire::content_name(&view.target.path))?)?;
    let bytes = description.pages * description.page_bytes;
    let whole = stored.is_some_and(|node| node.kind == tree::NodeKind::File { size: bytes });
    Ok(whole.then_some(description))
}

/// Reads what is to be known of a view. Runs on the pinned connection.
fn describe(driver: &Sqlite, view: &View, connection: &Connection, notes: &mut Vec<String>) -> Result<Description> {
    let number = |name| client::pragma::<i64>(connection, name);
    let file = view.target.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut rows = std::collections::BTreeMap::new();
    let mut foreign_keys_broken = None;
    if driver.settings.inspect {
        for table in restore::tables(connection)? {
            let sql = format!("SELECT count(*) FROM {}", quoted(&table));
            let count: i64 = connection
                .query_row(&sql, [], |row| row.get(0))
                .attempt(|| format!("cannot count the rows of table `{table}` of {file}"))?;
            rows.insert(table, count as u64);
        }
        match count_broken_foreign_keys(connection) {
            Ok(count) => foreign_keys_broken = Some(count),
            Err(error) if error.kind() == Kind::Config => {
                notes.push(format!("{file}: foreign keys cannot be checked: {error}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Description {
        schema: SCHEMA.to_owned(),
        page_bytes: number("page_size")? as u64,
        pages: number("page_count")? as u64,
        journal: if view.held == Held::Wal { "wal" } else { "rollback" }.to_owned(),
        application_id: number("application_id")?,
        user_version: number("user_version")?,
        schema_version: number("schema_version")?,
        encoding: client::pragma(connection, "encoding")?,
        schema_sha256: schema_hash(connection)?,
        rows,
        foreign_keys_broken,
        files_state: view.files_state.clone(),
        file,
    })
}

/// Counts rows whose foreign key finds nothing; free where no table has one.
pub(super) fn count_broken_foreign_keys(connection: &Connection) -> Result<u64> {
    let what = || "cannot check foreign keys".to_owned();
    let mut statement = connection.prepare("PRAGMA foreign_key_check").attempt(what)?;
    let mut rows = statement.query([]).attempt(what)?;
    let mut count = 0;
    while rows.next().attempt(what)?.is_some() {
        count += 1;
    }
    Ok(count)
}

fn schema_hash(connection: &Connection) -> Result<String> {
    let what = || "cannot read the schema".to_owned();
    let sql = format!(
        "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema \
         WHERE tbl_name <> '{STAMP_TABLE}' ORDER BY type, name, tbl_name"
    );
    let mut statement = connection.prepare(&sql).attempt(what)?;
    let mut rows = statement.query([]).attempt(what)?;
    let mut hash = Sha256::new();
    while let Some(row) = rows.next().attempt(what)? {
        for column in 0..4 {
            let text: String = row.get(column).attempt(what)?;
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// The database as a stream: pages of the view, in order.
fn content(
    driver: &Sqlite,
    context: &Context,
    view: &Arc<View>,
    description: &Description,
) -> Result<Box<dyn Content>> {
    if view.with(client::offers_pages)? {
        return Ok(Box::new(Pages {
            view: view.clone(),
            context: context.clone(),
            next: 1,
            pages: description.pages,
            page_bytes: description.page_bytes,
            buffer: Vec::new(),
            taken: 0,
        }));
    }
    copied_content(driver, context, view)
}

/// Without the page table, SQLite copies the view to a scratch file first.
pub(super) fn copied_content(driver: &Sqlite, context: &Context, view: &View) -> Result<Box<dyn Content>> {
    let copy = driver.scratch_file(&view.target)?;
    view.with(|connection| {
        let what = || "cannot copy the view to the scratch folder".to_owned();
        let mut target = Connection::open(&copy).attempt(what)?;
        let backup = rusqlite::backup::Backup::new(connection, &mut target).attempt(what)?;
        while backup.step(1024).attempt(what)? != rusqlite::backup::StepResult::Done {
            context.check()?;
        }
        Ok(())
    })?;
    let file = File::open(&copy).or_io(|| format!("cannot open {}", copy.display()))?;
    Ok(Box::new(Reader(file)))
}

/// Pages of a view, read in batches, so that one pinned connection serves streams and queries.
struct Pages {
    view: Arc<View>,
    context: Context,
    next: u64,
    pages: u64,
    page_bytes: u64,
    buffer: Vec<u8>,
    taken: usize,
}

impl Pages {
    fn fill(&mut self) -> Result<()> {
        self.context.check()?;
        self.buffer.clear();
        self.taken = 0;
        let count = (BATCH_BYTES / self.page_bytes).max(1).min(self.pages + 1 - self.next);
        let (next, buffer) = (self.next, &mut self.buffer);
        self.view.with(|connection| client::read_pages(connection, next, count, buffer))?;
        if self.buffer.len() as u64 != count * self.page_bytes {
            return Err(Error::new(Kind::Corrupt, "SQLite returned pages of an unexpected size"));
        }
        self.next += count;
        self.context.advance(self.buffer.len() as u64, 0);
        Ok(())
    }
}

impl Content for Pages {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.taken == self.buffer.len() {
            if self.next > self.pages {
                return Ok(0);
            }
            self.fill()?;
        }
        let count = buffer.len().min(self.buffer.len() - self.taken);
        buffer[..count].copy_from_slice(&self.buffer[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        let open = self.view.with(|connection| Ok(!connection.is_autocommit()))?;
        if !open {
            return Err(Error::new(Kind::PinLost, "the read transaction ended while its pages were read"));
        }
        Ok(ContentEnd::Whole)
    }
}

/// Answers an edge query on the pinned views, or on the live databases.
pub(super) fn edges(
    driver: &Sqlite,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    if let Some(pin) = pin {
        for view in driver.views(pin)? {
            view.with(|connection| client::interruptible(context, connection, || answer(connection, query, visit)))?;
        }
        return Ok(());
    }
    for target in driver.targets()? {
        let connection = client::open_reader(&target.path, driver.settings.busy_timeout())?;
        client::begin_view(&connection)?;
        client::interruptible(context, &connection, || answer(&connection, query, visit))?;
    }
    Ok(())
}

fn answer(
    connection: &Connection,
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    match query {
        EdgeQuery::From(sql) => {
            wire::check_query(sql)?;
            each_row(connection, sql, visit)
        }
        EdgeQuery::Held(kind) => {
            let (table, column) = wire::parse_kind(kind)?;
            let (table, column) = (quoted(table), quoted(column));
            each_row(connection, &format!("SELECT {table}.{column} FROM {table}"), visit)
        }
        EdgeQuery::Which { kind, referents } => {
            let (table, column) = wire::parse_kind(kind)?;
            let (table, column) = (quoted(table), quoted(column));
            // A referent is text, or the same bytes as a blob; SQLite never takes one for the other.
            let sql = format!("SELECT 1 FROM {table} WHERE {table}.{column} = ?1 OR {table}.{column} = ?2 LIMIT 1");
            let what = || format!("cannot look up {kind}");
            let mut statement = connection.prepare(&sql).attempt(what)?;
            for referent in referents {
                let text = String::from_utf8_lossy(referent);
                if statement.exists(rusqlite::params![text, referent]).attempt(what)? {
                    visit(Edge { referent: referent.clone(), owner: String::new() })?;
                }
            }
            Ok(())
        }
    }
}

/// Calls `visit` for each row; a referent that is NULL names nothing and is passed over.
fn each_row(connection: &Connection, sql: &str, visit: &mut (dyn FnMut(Edge) -> Result<()> + Send)) -> Result<()> {
    let what = || format!("the query failed: {sql}");
    let mut statement = connection.prepare(sql).attempt(what)?;
    if !statement.readonly() {
        return Err(Error::new(Kind::Config, format!("the query would write: {sql}")));
    }
    let columns = statement.column_count();
    let mut rows = statement.query([]).attempt(what)?;
    while let Some(row) = rows.next().attempt(what)? {
        let Some(referent) = value_bytes(row.get_ref(0).attempt(what)?) else { continue };
        let owner = if columns > 1 { value_bytes(row.get_ref(1).attempt(what)?) } else { None };
        let owner = String::from_utf8_lossy(&owner.unwrap_or_default()).into_owned();
        visit(Edge { referent, owner })?;
    }
    Ok(())
}

fn value_bytes(value: ValueRef<'_>) -> Option<Vec<u8>> {
    match value {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string().into_bytes()),
        ValueRef::Real(number) => Some(number.to_string().into_bytes()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(bytes.to_vec()),
    }
}
