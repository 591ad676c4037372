//! The only page that talks to SQLite and to the files of a database.
//!
//! Two rules of SQLite's locking bind everything here. Its locks belong to the process and vanish
//! when *any* descriptor of the same file is closed, so a database file or its `-shm` is never
//! opened but through SQLite while a connection of ours may hold a lock on it (`-wal` carries no
//! locks). And a connection that stays outside a transaction holds no lock at all.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{FileTime, Metadata};

/// Turns an error of SQLite into ours; `message` says what was attempted.
pub(super) fn failed(message: impl Into<String>, error: rusqlite::Error) -> Error {
    let code = error.sqlite_error_code();
    let wrapped = |kind| Error::new(kind, message.into());
    let classified = match code {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
            wrapped(Kind::Locked)
                .temporary()
                .hint("another connection holds the database; raise `busyTimeoutMillis` or find out who holds it")
        }
        Some(ErrorCode::NotADatabase) => wrapped(Kind::Corrupt)
            .hint("the file is no SQLite database, or it is encrypted; encrypted databases are not supported"),
        Some(ErrorCode::DatabaseCorrupt) => {
            wrapped(Kind::Corrupt).hint("the database is damaged: `sqlite3 <file> 'PRAGMA integrity_check'` says where")
        }
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
            wrapped(Kind::PermissionDenied).hint(
                "reading needs read and write permission on the database, its `-wal` and `-shm` files and their \
                 folder: run as the user that owns them",
            )
        }
        Some(ErrorCode::DiskFull | ErrorCode::OutOfMemory | ErrorCode::TooBig) => wrapped(Kind::Exhausted),
        Some(ErrorCode::OperationInterrupted) => wrapped(Kind::Cancelled),
        Some(ErrorCode::SystemIoFailure | ErrorCode::NoLargeFileSupport) => wrapped(Kind::Io),
        Some(ErrorCode::SchemaChanged) => wrapped(Kind::Conflict).temporary(),
        _ => wrapped(Kind::Config),
    };
    classified.source(error)
}

/// Adds what was attempted to a result of SQLite.
pub(super) trait Attempt<T> {
    /// Classifies the error and says what was attempted.
    fn attempt(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Attempt<T> for rusqlite::Result<T> {
    fn attempt(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| failed(message(), error))
    }
}

/// The path with links resolved, as SQLite names the files beside a database.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let resolved = std::fs::canonicalize(path).or_io(|| format!("cannot find the database {}", path.display()))?;
    if resolved.is_dir() {
        return Err(Error::new(Kind::Config, format!("{} is a directory, not a database", path.display()))
            .hint("use `directory` instead of `path`"));
    }
    Ok(resolved)
}

/// The file beside a database with this ending, e.g. `-wal`.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Opens an existing database for reading. Links must be resolved already.
///
/// The connection may write as far as the file system is concerned, because recovery after a crash
/// of the application and the shared memory of WAL need it; `query_only` keeps it from changing data.
pub(super) fn open_reader(path: &Path, busy: Duration) -> Result<Connection> {
    match open_checked(path, OpenFlags::empty(), path.to_owned(), busy) {
        Err(error) if error.kind() == Kind::PermissionDenied && is_settled_on_read_only_media(path) => {
            open_checked(path, OpenFlags::SQLITE_OPEN_URI, immutable_uri(path), busy)
        }
        other => other,
    }
}

fn open_checked(path: &Path, flags: OpenFlags, name: PathBuf, busy: Duration) -> Result<Connection> {
    let flags = flags | OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let what = || format!("cannot open the database {}", path.display());
    let mut connection = Connection::open_with_flags(name, flags).attempt(what)?;
    wait_when_busy(&mut connection, busy).attempt(what)?;
    connection.execute_batch("PRAGMA query_only = 1; PRAGMA mmap_size = 0;").attempt(what)?;
    // The first read finds damage, encryption, missing permissions and crashed writers.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())).attempt(what)?;
    Ok(connection)
}

/// Opens a database for writing; creates nothing.
pub(super) fn open_writer(path: &Path, busy: Duration) -> Result<Connection> {
    let what = || format!("cannot open the database {}", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).attempt(what)?;
    wait_when_busy(&mut connection, busy).attempt(what)?;
    Ok(connection)
}

/// Waits in small steps: SQLite's own handler sleeps up to 100 ms at a time, which is long within
/// a cut.
fn wait_when_busy(connection: &mut Connection, busy: Duration) -> rusqlite::Result<()> {
    let mut since = Instant::now();
    connection.busy_handler(Some(move |tries: i32| {
        if tries == 0 {
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_micros(if tries < 50 { 200 } else { 1_000 }));
        since.elapsed() < busy
    }))
}

/// Whether nothing can change the database and nothing waits in its log, so that it may be read
/// without the shared memory that WAL needs.
fn is_settled_on_read_only_media(path: &Path) -> bool {
    let read_only =
        rustix::fs::statvfs(path).is_ok_and(|state| state.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    let pending = |ending| std::fs::metadata(beside(path, ending)).is_ok_and(|file| file.len() > 0);
    read_only && !pending("-wal") && !pending("-journal")
}

fn immutable_uri(path: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri.push_str("?immutable=1");
    PathBuf::from(uri)
}

/// Whether the file system is one on which SQLite's locks cannot be relied on; its name for people.
pub(super) fn network_file_system(path: &Path) -> Option<&'static str> {
    let kind = rustix::fs::statfs(path).ok()?.f_type as u64 & 0xffff_ffff;
    Some(match kind {
        0x6969 => "NFS",
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => "SMB",
        0x0102_1997 => "9p",
        0x6573_5546 => "FUSE",
        _ => return None,
    })
}

/// One value of a `PRAGMA` that reads.
pub(super) fn pragma<T: rusqlite::types::FromSql>(connection: &Connection, name: &str) -> Result<T> {
    connection.pragma_query_value(None, name, |row| row.get(0)).attempt(|| format!("cannot read `PRAGMA {name}`"))
}

/// Opens a read transaction and fixes its view. Writers of a WAL database go on.
pub(super) fn begin_view(connection: &Connection) -> Result<()> {
    let what = || "cannot fix the view of the database".to_owned();
    connection.execute_batch("BEGIN").attempt(what)?;
    // BEGIN alone takes nothing; the first read does.
    let read = connection.query_row("SELECT count(*) FROM (SELECT 1 FROM sqlite_schema LIMIT 1)", [], |_| Ok(()));
    read.attempt(what).inspect_err(|_| end_view(connection))
}

/// Ends the read transaction, if there is one.
pub(super) fn end_view(connection: &Connection) {
    if !connection.is_autocommit() {
        // A rollback of a read transaction has nothing to undo; what can fail is its absence.
        connection.execute_batch("ROLLBACK").ok();
    }
}

/// Changes whenever another connection committed since the last call on this connection.
pub(super) fn data_version(connection: &Connection) -> Result<i64> {
    pragma(connection, "data_version")
}

/// As [`data_version`], but `None` instead of waiting when a writer keeps new readers out.
pub(super) fn data_version_at_once(connection: &mut Connection, busy: Duration) -> Result<Option<i64>> {
    let what = || "cannot change how long to wait for the database".to_owned();
    connection.busy_timeout(Duration::ZERO).attempt(what)?;
    let version = data_version(connection);
    wait_when_busy(connection, busy).attempt(what)?;
    match version {
        Err(error) if error.kind() == Kind::Locked => Ok(None),
        other => other.map(Some),
    }
}

/// Whether this SQLite offers the pages of a view as a table.
pub(super) fn offers_pages(connection: &Connection) -> Result<bool> {
    connection
        .query_row("SELECT count(*) FROM pragma_module_list WHERE name = 'sqlite_dbpage'", [], |row| row.get(0))
        .map(|count: i64| count > 0)
        .attempt(|| "cannot list SQLite's modules".to_owned())
}

/// Appends the pages from `first` on, `count` of them, to `buffer`.
pub(super) fn read_pages(connection: &Connection, first: u64, count: u64, buffer: &mut Vec<u8>) -> Result<()> {
    let what = || format!("cannot read page {first} and following");
    let mut statement = connection.prepare_cached("SELECT data FROM sqlite_dbpage WHERE pgno = ?1").attempt(what)?;
    for page in first..first + count {
        statement
            .query_row([page as i64], |row| {
                buffer.extend_from_slice(row.get_ref(0)?.as_blob()?);
                Ok(())
            })
            .attempt(what)?;
    }
    Ok(())
}

/// Runs `work`, and interrupts the connection's statement once someone asks to stop.
pub(super) fn interruptible<T>(
    context: &Context,
    connection: &Connection,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    struct Done<'a>(&'a AtomicBool, std::thread::Thread);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            self.1.unpark();
        }
    }
    context.check()?;
    let handle = connection.get_interrupt_handle();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if context.is_cancelled() {
                    handle.interrupt();
                }
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        let _done = Done(&over, watcher.thread().clone());
        work()
    })
}

/// Device and inode of a file.
pub(super) fn inode(path: &Path) -> Result<(u64, u64)> {
    let meta = std::fs::metadata(path).or_io(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.dev(), meta.ino()))
}

/// Owner, mode and times of the database file, for its stream.
pub(super) fn stream_metadata(path: &Path) -> Result<Metadata> {
    let meta = std::fs::metadata(path).or_io(|| format!("cannot look at {}", path.display()))?;
    let mtime = FileTime { seconds: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
    Ok(Metadata { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid(), ..Metadata::stream(mtime) })
}

/// What `stat` says of a database's files: equal texts mean that neither was written in between,
/// if the newest time in them lies safely in the past.
pub(super) fn files_state(path: &Path) -> Result<(String, i128)> {
    let mut newest = 0;
    let mut text = String::new();
    for (label, file) in [("db", path.to_owned()), ("wal", beside(path, "-wal"))] {
        match std::fs::metadata(&file) {
            // An empty log is what every opening connection leaves for as long as it is open.
            Ok(meta) if label == "db" || meta.len() > 0 => {
                let nanos = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
                let mtime = nanos(meta.mtime(), meta.mtime_nsec());
                // SQLite as root sets the owner of the log at every opening, which renews its ctime.
                let ctime = if label == "db" { nanos(meta.ctime(), meta.ctime_nsec()) } else { mtime };
                newest = newest.max(mtime).max(ctime);
                let numbers = (meta.dev(), meta.ino(), meta.len());
                text.push_str(&format!("{label}:{}:{}:{}:{mtime}:{ctime} ", numbers.0, numbers.1, numbers.2));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && label == "wal" => {}
            Err(error) => return Err(Error::io(format!("cannot look at {}", file.display()), error)),
        }
    }
    Ok((text.trim_end().to_owned(), newest))
}

/// The kernel's list of locks, where it can be read.
pub(super) fn kernel_locks() -> Option<String> {
    std::fs::read_to_string("/proc/locks").ok()
}

/// Makes a name survive a crash: flushes the directory that holds it.
pub(super) fn flush_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .or_io(|| format!("cannot flush the folder {}", folder.display()))
}
