//! The way back: restore beside and swap, verify, identity and stamp.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};
use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::position::{Identity, Stamp};
use stillpoint_core::tree::{self, Metadata, NodeKind, Tree, TreePath, check_name};

use super::client::{self, Attempt};
use super::swap::{self, Loaded, kept_path};
use super::wire::{self, Description, STAMP_TABLE, quoted};
use super::{Sqlite, drain};
use crate::place;

/// Differences beyond this number are not listed.
const DIFFERENCES_MAX: usize = 100;

/// One database of a point and where it goes.
struct Stored {
    folder: TreePath,
    content: TreePath,
    meta: Metadata,
    bytes: u64,
    description: Description,
    target: PathBuf,
}

/// Restores every database of the point, or the one that `part` names.
pub(super) fn restore(
    driver: &Sqlite,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    check_name(request.restore.as_bytes())?;
    let stored = stored_databases(driver, source, request.part.as_ref())?;
    context.expect_bytes(stored.iter().map(|database| database.bytes).sum());
    for database in &stored {
        refuse_existing(driver, &database.target, request)?;
    }
    let mut restored = Restored::default();
    // Everything is loaded and checked before anything is swapped: a failure has changed nothing yet.
    let mut loaded = Vec::new();
    let done = stored.iter().enumerate().try_for_each(|(number, database)| {
        let target = database.target.clone();
        let partial = partial_path(&target, request, number);
        let folder = target.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(folder).or_io(|| format!("cannot create {}", folder.display()))?;
        loaded.push(Loaded { partial: partial.clone(), target });
        load(driver, context, source, database, &partial, &mut restored)
    });
    let done = done.and_then(|()| context.check());
    let refuse = |target: &Path| refuse_existing(driver, target, request);
    match done.and_then(|()| swap::swap_all(&loaded, request, driver.settings.busy_timeout(), &refuse)) {
        Ok(kept_old) => restored.kept_old = kept_old,
        Err(error) => {
            for ending in ["", "-wal", "-shm", "-journal"] {
                for one in &loaded {
                    // What failed is reported; a left-over that cannot be deleted is overwritten next time.
                    std::fs::remove_file(client::beside(&one.partial, ending)).ok();
                }
            }
            return Err(error);
        }
    }
    restored.items = stored.iter().map(|database| database.description.rows_total()).sum();
    restored.bytes = stored.iter().map(|database| database.bytes).sum();
    Ok(restored)
}

/// Finds the databases of a point, and the place of each one in this store.
fn stored_databases(driver: &Sqlite, source: &dyn Tree, part: Option<&TreePath>) -> Result<Vec<Stored>> {
    let mut folders = Vec::new();
    find_descriptions(source, &TreePath::root(), &mut folders)?;
    if let Some(part) = part.filter(|part| !part.names().is_empty()) {
        folders.retain(|folder| folder == part || folder.names().get(1..) == Some(part.names()));
        if folders.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("the point holds no database at `{part}`")));
        }
    }
    if folders.is_empty() {
        return Err(Error::new(Kind::Corrupt, "the point holds no database of this store"));
    }
    folders.into_iter().map(|folder| stored_database(driver, source, folder)).collect::<Result<Vec<_>>>().and_then(
        |stored| match (&driver.settings.path, stored.len()) {
            (Some(_), 2..) => Err(Error::new(
                Kind::Config,
                format!("the point holds {} databases, the target takes one", stored.len()),
            )
            .hint("restore into a `directory`, or name one database as the part to restore")),
            _ => Ok(stored),
        },
    )
}

fn find_descriptions(source: &dyn Tree, folder: &TreePath, found: &mut Vec<TreePath>) -> Result<()> {
    let mut deeper = Vec::new();
    source.list(folder, &mut |node| {
        match node.kind {
            NodeKind::Dir => deeper.push(folder.join(&node.name)?),
            NodeKind::File { .. } if node.name == wire::DESCRIPTION => found.push(folder.clone()),
            _ => {}
        }
        Ok(true)
    })?;
    deeper.iter().try_for_each(|folder| find_descriptions(source, folder, found))
}

fn stored_database(driver: &Sqlite, source: &dyn Tree, folder: TreePath) -> Result<Stored> {
    let bytes = tree::read_small(source, &folder.join(wire::DESCRIPTION)?, drain::DESCRIPTION_BYTES_MAX)?;
    let description = Description::parse(&bytes)?;
    let mut content = None;
    source.list(&folder, &mut |node| {
        if let NodeKind::File { size } = node.kind
            && node.name.ends_with(b".sqlite")
        {
            content = Some((folder.join(&node.name)?, size, node.meta));
        }
        Ok(content.is_none())
    })?;
    let (content, size, meta) =
        content.ok_or_else(|| Error::new(Kind::Corrupt, format!("the point lacks the database beside `{folder}`")))?;
    if size != description.pages * description.page_bytes {
        return Err(Error::new(Kind::Corrupt, format!("`{content}` has not the size that its description states")));
    }
    let target = match (&driver.settings.path, &driver.settings.directory) {
        (Some(path), _) => path.clone(),
        (None, Some(directory)) if folder.names().len() > 1 => {
            directory.join(folder.names()[1..].iter().map(|name| OsStr::from_bytes(name)).collect::<PathBuf>())
        }
        (None, Some(directory)) => directory.join(&description.file),
        (None, None) => return Err(Error::internal("the settings name no database")),
    };
    if target.file_name().is_none_or(|name| check_name(name.as_bytes()).is_err())
        || Path::new(&description.file).components().count() != 1
    {
        return Err(Error::new(Kind::Corrupt, "the point names a database that is no plain file"));
    }
    Ok(Stored { folder, content, meta, bytes: size, description, target })
}

/// Refuses a target that must not be touched, before anything is written.
fn refuse_existing(driver: &Sqlite, target: &Path, request: &RestoreRequest) -> Result<()> {
    let exists = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|file| file.len() > 0);
    if request.mode == RestoreMode::InPlace {
        let kept = kept_path(target, request);
        return if kept.exists() {
            Err(Error::new(Kind::AlreadyExists, format!("{} is there from an earlier restore", kept.display()))
                .hint("move it away, then restore again"))
        } else {
            Ok(())
        };
    }
    for path in [target.to_owned(), client::beside(target, "-wal"), client::beside(target, "-journal")] {
        if exists(&path) && !holds_nothing(driver, &path) {
            return Err(Error::new(Kind::AlreadyExists, format!("{} exists", path.display()))
                .hint("restore to another path, or replace it with --in-place"));
        }
    }
    Ok(())
}

/// Where a database is loaded, beside its target.
fn partial_path(target: &Path, request: &RestoreRequest, number: usize) -> PathBuf {
    let file = target.file_name().unwrap_or_default().as_bytes();
    let mut name = format!(".stillpoint-restore-{}-{number}-", request.restore).into_bytes();
    name.extend_from_slice(&file[..file.len().min(100)]);
    target.parent().unwrap_or(Path::new("/")).join(OsStr::from_bytes(&name))
}

/// Writes the database beside the target and checks it there.
fn load(
    driver: &Sqlite,
    context: &Context,
    source: &dyn Tree,
    database: &Stored,
    partial: &Path,
    restored: &mut Restored,
) -> Result<()> {
    let what = || format!("cannot write {}", partial.display());
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(partial)
        .or_io(what)?;
    copy_content(context, source, &database.content, &mut file, partial)?;
    file.sync_all().or_io(what)?;
    drop(file);
    if database.bytes > 0 {
        let connection = client::open_writer(partial, driver.settings.busy_timeout())?;
        client::interruptible(context, &connection, || check_integrity(&connection, database, restored))?;
        // A stamp in the pages tells of an earlier restore of the source, not of this copy.
        connection
            .execute_batch(&format!("DROP TABLE IF EXISTS {STAMP_TABLE}"))
            .attempt(|| "cannot drop the stamp of the source".to_owned())?;
        connection.close().map_err(|(_, error)| client::failed(what(), error))?;
    }
    let meta = &database.meta;
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(partial, Some(meta.uid), Some(meta.gid)).or_io(what)?;
    }
    std::fs::set_permissions(partial, std::fs::Permissions::from_mode(meta.mode & 0o777)).or_io(what)?;
    File::open(partial).and_then(|file| file.sync_all()).or_io(what)
}

fn copy_content(context: &Context, source: &dyn Tree, from: &TreePath, to: &mut File, name: &Path) -> Result<()> {
    use std::io::Write;
    let mut reader = source.open(from)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        context.check()?;
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io(format!("cannot read `{from}` from the point"), error)),
        };
        to.write_all(&buffer[..count]).or_io(|| format!("cannot write {}", name.display()))?;
        context.advance(count as u64, 0);
    }
}

/// Lets SQLite prove the restored file. What a source allowed itself against its own rules is
/// named; damage fails.
fn check_integrity(connection: &Connection, database: &Stored, restored: &mut Restored) -> Result<()> {
    let findings = match findings(connection, "integrity_check") {
        // Collations or functions of the application are unknown here: check all but their order.
        Err(error) if error.kind() == Kind::Config => findings(connection, "quick_check")?,
        other => other?,
    };
    for finding in findings {
        if finding.starts_with("NULL value in ") || finding.starts_with("CHECK constraint failed in ") {
            let why = "breaks a rule of its own schema, and did so at the source".to_owned();
            restored.losses.push(Loss { what: format!("{}: {finding}", database.description.file), why });
        } else {
            return Err(Error::new(Kind::Corrupt, format!("the restored database is damaged: {finding}"))
                .context("database", &database.folder)
                .hint(
                    "it was damaged at the source already: take an earlier point, or export the file and repair it",
                ));
        }
    }
    if let Some(expected) = database.description.foreign_keys_broken {
        let broken = drain::count_broken_foreign_keys(connection)?;
        if broken != expected {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{broken} rows break a foreign key, at the source it were {expected}"),
            ));
        }
    }
    Ok(())
}

fn findings(connection: &Connection, check: &str) -> Result<Vec<String>> {
    let what = || format!("cannot run {check}");
    let mut statement = connection.prepare(&format!("PRAGMA {check}(100)")).attempt(what)?;
    let rows = statement.query_map([], |row| row.get::<_, String>(0)).attempt(what)?;
    let mut findings = Vec::new();
    for row in rows {
        let row = row.attempt(what)?;
        if row.contains("no such collation sequence") || row.contains("unknown function") {
            return Err(Error::new(Kind::Config, row));
        }
        if row != "ok" {
            findings.push(row);
        }
    }
    Ok(findings)
}

/// Compares schema and every row of every table with the point's databases.
pub(super) fn verify(driver: &Sqlite, context: &Context, source: &dyn Tree) -> Result<Verification> {
    let mut verification = Verification::default();
    for database in stored_databases(driver, source, None)? {
        let label = database.target.display().to_string();
        if !database.target.exists() {
            verification.differences.push(format!("{label} is missing"));
            continue;
        }
        let copy = driver.scratch_file(&super::cut::Target {
            below: database.folder.names().to_vec(),
            path: database.target.clone(),
        })?;
        let mut file = File::create(&copy).or_io(|| format!("cannot write {}", copy.display()))?;
        copy_content(context, source, &database.content, &mut file, &copy)?;
        drop(file);
        let busy = driver.settings.busy_timeout();
        let ours = client::open_reader(&client::resolve(&database.target)?, busy)?;
        let theirs = client::open_reader(&copy, busy)?;
        client::begin_view(&ours)?;
        client::interruptible(context, &ours, || compare(&ours, &theirs, &label, &mut verification))?;
        drop(theirs);
        for ending in ["", "-wal", "-shm"] {
            // The scratch folder goes as a whole after the run; this only frees space early.
            std::fs::remove_file(client::beside(&copy, ending)).ok();
        }
        if verification.differences.len() >= DIFFERENCES_MAX {
            break;
        }
    }
    verification.differences.truncate(DIFFERENCES_MAX);
    Ok(verification)
}

fn compare(ours: &Connection, theirs: &Connection, label: &str, verification: &mut Verification) -> Result<()> {
    for name in ["page_size", "application_id", "user_version"] {
        let (here, there): (i64, i64) = (client::pragma(ours, name)?, client::pragma(theirs, name)?);
        if here != there {
            verification.differences.push(format!("{label}: {name} is {here}, in the point {there}"));
        }
    }
    let (here, there) = (definitions(ours)?, definitions(theirs)?);
    for (which, only) in [("not in the point", &here - &there), ("missing or different", &there - &here)] {
        for (kind, name, _) in only {
            verification.differences.push(format!("{label}: {kind} `{name}` is {which}"));
        }
    }
    let here: BTreeSet<String> = tables(ours)?.into_iter().collect();
    for table in tables(theirs)?.iter().filter(|table| here.contains(*table)) {
        if let Some(difference) = compare_table(ours, theirs, table, &mut verification.checked)? {
            verification.differences.push(format!("{label}: table `{table}`: {difference}"));
        }
    }
    Ok(())
}

fn definitions(connection: &Connection) -> Result<BTreeSet<(String, String, String)>> {
    let what = || "cannot read the schema".to_owned();
    let sql = format!("SELECT type, name, coalesce(sql, '') FROM sqlite_schema WHERE tbl_name <> '{STAMP_TABLE}'");
    let mut statement = connection.prepare(&sql).attempt(what)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).attempt(what)?;
    rows.collect::<rusqlite::Result<_>>().attempt(what)
}

/// Names of all tables that hold rows of their own; the stamp's is left out.
pub(super) fn tables(connection: &Connection) -> Result<Vec<String>> {
    let what = || "cannot list the tables".to_owned();
    let sql = format!(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 AND name <> '{STAMP_TABLE}' ORDER BY name"
    );
    let mut statement = connection.prepare(&sql).attempt(what)?;
    let rows = statement.query_map([], |row| row.get(0)).attempt(what)?;
    rows.collect::<rusqlite::Result<_>>().attempt(what)
}

/// Walks both tables in the order in which they are stored, which a copy of pages preserves.
fn compare_table(ours: &Connection, theirs: &Connection, table: &str, checked: &mut u64) -> Result<Option<String>> {
    let what = || format!("cannot read table `{table}`");
    let sql = select_all(theirs, table)?;
    let (mut here, mut there) = (ours.prepare(&sql).attempt(what)?, theirs.prepare(&sql).attempt(what)?);
    let columns = there.column_count();
    let (mut here, mut there) = (here.query([]).attempt(what)?, there.query([]).attempt(what)?);
    let mut row = 0u64;
    loop {
        row += 1;
        match (here.next().attempt(what)?, there.next().attempt(what)?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Ok(Some(format!("has more than the {} rows of the point", row - 1))),
            (None, Some(_)) => return Ok(Some(format!("ends after {} rows, the point has more", row - 1))),
            (Some(a), Some(b)) => {
                for column in 0..columns {
                    if a.get_ref(column).attempt(what)? != b.get_ref(column).attempt(what)? {
                        return Ok(Some(format!("row {row} differs")));
                    }
                }
            }
        }
        *checked += 1;
    }
}

/// A query for everything that a table stores: its row ids where it has them, no computed columns.
fn select_all(connection: &Connection, table: &str) -> Result<String> {
    let what = || format!("cannot read the columns of `{table}`");
    let name = quoted(table);
    let sql = "SELECT name FROM pragma_table_xinfo(?1) WHERE hidden = 0 ORDER BY cid";
    let mut statement = connection.prepare(sql).attempt(what)?;
    let columns = statement.query_map([table], |row| row.get::<_, String>(0)).attempt(what)?;
    let mut columns: Vec<String> =
        columns.map(|column| column.map(|name| quoted(&name))).collect::<rusqlite::Result<_>>().attempt(what)?;
    if connection.prepare(&format!("SELECT rowid FROM {name}")).is_ok() {
        columns.insert(0, "rowid".to_owned());
    }
    Ok(format!("SELECT {} FROM {name} NOT INDEXED", columns.join(", ")))
}

/// Who the store is: its path, and the inode with its birth time, which no other file shares.
pub(super) fn identity(driver: &Sqlite) -> Result<Identity> {
    let path = driver.settings.path.as_ref().or(driver.settings.directory.as_ref());
    let path = path.ok_or_else(|| Error::internal("the settings name no database"))?;
    place::identity("sqlite", path)
}

/// What a restore would overwrite; a database that holds nothing but the stamp counts as empty.
pub(super) fn occupied(driver: &Sqlite) -> Result<Option<String>> {
    let targets = match driver.targets() {
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        other => other?,
    };
    for target in targets {
        let bytes = std::fs::metadata(&target.path).or_io(|| "cannot look at the database".to_owned())?.len();
        if bytes > 0 && !holds_nothing(driver, &target.path) {
            return Ok(Some(format!("the database {} of {bytes} bytes", target.path.display())));
        }
    }
    Ok(None)
}

/// Whether this is a database without any table, index, view or trigger but the stamp's.
fn holds_nothing(driver: &Sqlite, path: &Path) -> bool {
    client::open_reader(path, driver.settings.busy_timeout())
        .and_then(|connection| definitions(&connection))
        .is_ok_and(|definitions| definitions.is_empty())
}

/// Plants the stamp in every database.
pub(super) fn stamp(driver: &Sqlite, stamp: &Stamp) -> Result<()> {
    let text = serde_json::to_string(stamp).map_err(|e| Error::internal("a stamp does not serialize").source(e))?;
    for target in driver.targets()? {
        let what = || format!("cannot stamp {}", target.path.display());
        let connection = client::open_writer(&target.path, driver.settings.busy_timeout())?;
        connection
            .execute_batch(&format!(
                "BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS {STAMP_TABLE} \
                 (one INTEGER PRIMARY KEY CHECK (one = 1), stamp TEXT NOT NULL);"
            ))
            .attempt(what)?;
        let sql = format!("INSERT OR REPLACE INTO {STAMP_TABLE} (one, stamp) VALUES (1, ?1)");
        connection.execute(&sql, [&text]).attempt(what)?;
        connection.execute_batch("COMMIT").attempt(what)?;
    }
    Ok(())
}

/// Reads the first stamp there is. A file that is no readable database carries none.
pub(super) fn read_stamp(driver: &Sqlite) -> Result<Option<Stamp>> {
    let targets = match driver.targets() {
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        other => other?,
    };
    for target in targets {
        match read_one_stamp(driver, &target.path) {
            Ok(None) => {}
            Ok(stamp) => return Ok(stamp),
            Err(error) if error.kind() == Kind::Corrupt => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn read_one_stamp(driver: &Sqlite, path: &Path) -> Result<Option<Stamp>> {
    let what = || format!("cannot read the stamp of {}", path.display());
    let connection = client::open_reader(path, driver.settings.busy_timeout())?;
    let sql = format!("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '{STAMP_TABLE}'");
    if connection.query_row(&sql, [], |_| Ok(())).optional().attempt(what)?.is_none() {
        return Ok(None);
    }
    let sql = format!("SELECT stamp FROM {STAMP_TABLE} WHERE one = 1");
    let text: Option<String> = connection.query_row(&sql, [], |row| row.get(0)).optional().attempt(what)?;
    text.map(|text| serde_json::from_str(&text).map_err(|e| Error::new(Kind::Corrupt, what()).source(e))).transpose()
}
