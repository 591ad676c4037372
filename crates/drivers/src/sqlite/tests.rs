//! The quirks of SQLite: journal modes, locks, crashed writers, file formats. Common duties are
//! proven by the conformance suite at the end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use serde_json::json;
use stillpoint_core::driver::{Context, Drained, Driver, EdgeQuery, RestoreMode, RestoreRequest, Restored, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::TreePath;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};
use stillpoint_testkit::{MemoryTree, skip};

use super::{REGISTRATION, Settings, Sqlite};
use crate::trial::{self, cut_id, drain, edges, pin, run};

fn open_with(settings: serde_json::Value, scratch: &Path) -> Arc<dyn Driver> {
    trial::open(&REGISTRATION, settings, scratch).unwrap()
}

fn open(path: &Path) -> Arc<dyn Driver> {
    let scratch = path.parent().unwrap().join("scratch");
    open_with(json!({ "path": path, "busyTimeoutMillis": 2000 }), &scratch)
}

fn back_up(path: &Path, parent: Option<&MemoryTree>) -> (MemoryTree, Drained) {
    trial::back_up(&open(path), parent)
}

fn restore(path: &Path, tree: &MemoryTree, mode: RestoreMode) -> Result<Restored> {
    trial::restore(&open(path), tree, mode, None)
}

fn differences(path: &Path, tree: &MemoryTree) -> Vec<String> {
    trial::differences(&open(path), tree)
}

fn create(path: &Path, sql: &str) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(20)).unwrap();
    connection.execute_batch(sql).unwrap();
    connection
}

const WAL: &str = "PRAGMA journal_mode = WAL;";

fn count(path: &Path, table: &str) -> i64 {
    Connection::open(path).unwrap().query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
}

/// Writers that insert 1, 2, 3 … at full speed and tell what they began and what was acknowledged.
struct Writer {
    begun: Arc<AtomicI64>,
    acknowledged: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn start(path: &Path) -> Self {
        let (begun, acknowledged) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let shared = (begun.clone(), acknowledged.clone(), stop.clone());
        let connection = create(path, "PRAGMA synchronous = OFF; CREATE TABLE log (n INTEGER PRIMARY KEY, text);");
        let thread = std::thread::spawn(move || {
            let (begun, acknowledged, stop) = shared;
            let mut n = 0;
            while !stop.load(Ordering::SeqCst) {
                n += 1;
                begun.store(n, Ordering::SeqCst);
                // Beside a reader of a rollback journal a writer may be told that it is busy: nothing
                // was written then, and it tries the same row again.
                loop {
                    match connection.execute("INSERT INTO log VALUES (?1, ?2)", params![n, "x".repeat(100)]) {
                        Ok(_) => break,
                        Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {}
                        Err(error) => panic!("row {n}: {error}"),
                    }
                }
                acknowledged.store(n, Ordering::SeqCst);
            }
        });
        Self { begun, acknowledged, stop, threads: vec![thread] }
    }

    /// Also runs `sql` over and over, from another connection.
    fn also(mut self, path: &Path, sql: &'static str) -> Self {
        let (path, stop) = (path.to_owned(), self.stop.clone());
        self.threads.push(std::thread::spawn(move || {
            let connection = create(&path, "");
            while !stop.load(Ordering::SeqCst) {
                // Busy is what a checkpoint or VACUUM beside a reader may answer.
                connection.execute_batch(sql).ok();
                std::thread::sleep(Duration::from_millis(2));
            }
        }));
        self
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    fn await_rows(&self, count: i64) {
        while self.acknowledged.load(Ordering::SeqCst) < count {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes points while writers run and judges each by what was acknowledged and begun.
fn points_beside_writers(path: &Path, writer: Writer, rounds: u32) {
    let context = Context::default();
    // A writer at full speed on a busy machine may keep a rollback-journal reader waiting for long.
    let driver = open_with(json!({ "path": path, "busyTimeoutMillis": 60000 }), &path.with_extension("scratch"));
    writer.await_rows(200);
    let folder = tempfile::tempdir().unwrap();
    for round in 1..=rounds {
        run(driver.prepare(&context)).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        let acknowledged = writer.acknowledged.load(Ordering::SeqCst);
        let pin = run(driver.cut(&context, &cut_id(round))).unwrap();
        let begun = writer.begun.load(Ordering::SeqCst);
        let (drain, _) = drain(&driver, &pin, None).unwrap();
        assert_eq!(run(driver.still_valid(&context, &pin)).unwrap(), Validity::Valid);
        run(driver.release(&context, &[])).unwrap();
        let target = folder.path().join(format!("{round}.db"));
        restore(&target, &drain.tree, RestoreMode::Fresh).unwrap();
        let restored = Connection::open(&target).unwrap();
        let (rows, last): (i64, i64) =
            restored.query_row("SELECT count(*), max(n) FROM log", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(rows, last, "no row is missing in between");
        assert!(last >= acknowledged, "{last} holds what was acknowledged before the cut, {acknowledged}");
        assert!(last <= begun, "{last} holds nothing that began after the cut, {begun}");
        assert!(differences(&target, &drain.tree).is_empty());
    }
    writer.end();
}

#[test]
fn wal_writers_at_full_speed_go_on_and_the_point_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, WAL));
    let writer = Writer::start(&path).also(&path, "PRAGMA wal_checkpoint(TRUNCATE)");
    points_beside_writers(&path, writer, 8);
}

#[test]
fn vacuum_and_schema_changes_during_the_drain_do_not_show() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, WAL));
    let writer = Writer::start(&path)
        .also(&path, "VACUUM")
        .also(&path, "CREATE TABLE IF NOT EXISTS other (a); DROP TABLE other; PRAGMA user_version = 7;");
    points_beside_writers(&path, writer, 5);
}

#[test]
fn rollback_journal_writers_wait_for_the_drain_and_the_point_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    points_beside_writers(&path, Writer::start(&path), 4);
}

#[test]
fn a_vacuum_waits_while_a_rollback_journal_database_is_pinned() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let writer = create(&path, "CREATE TABLE t (a); INSERT INTO t VALUES (1);");
    writer.busy_timeout(Duration::ZERO).unwrap();
    let driver = open_with(json!({ "path": path, "rollback": "hold" }), folder.path());
    let pinned = pin(&driver, 1);
    let refused = writer.execute_batch("VACUUM").unwrap_err();
    assert_eq!(refused.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy));
    let (drain, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!(drained.items, 1);
    assert!(drained.notes.iter().any(|note| note.starts_with("writers of a.db waited")), "{:?}", drained.notes);
    assert!(drain.tree.files().contains_key("a.sqlite"));
    run(driver.release(&Context::default(), &[])).unwrap();
    writer.execute_batch("VACUUM").unwrap();
}

#[test]
fn every_file_format_comes_back_equal() {
    let folder = tempfile::tempdir().unwrap();
    for page_bytes in [512, 1024, 4096, 65536] {
        for (vacuum, journal) in [("NONE", "WAL"), ("FULL", "DELETE"), ("INCREMENTAL", "PERSIST")] {
            let path = folder.path().join(format!("{page_bytes}-{vacuum}.db"));
            let live = create(
                &path,
                &format!(
                    "PRAGMA page_size = {page_bytes}; PRAGMA auto_vacuum = {vacuum}; PRAGMA journal_mode = {journal};
                     PRAGMA application_id = 77; PRAGMA user_version = 3;
                     CREATE TABLE parent (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE);
                     CREATE TABLE child (a REFERENCES parent (id), b, c AS (a + 1) VIRTUAL, d AS (b || 'x') STORED);
                     CREATE TABLE plain (k TEXT PRIMARY KEY, v) WITHOUT ROWID;
                     CREATE VIRTUAL TABLE found USING fts5(body);
                     CREATE INDEX by_b ON child (b) WHERE b > 3;
                     CREATE VIEW shown AS SELECT name FROM parent;
                     CREATE TRIGGER t AFTER INSERT ON parent BEGIN INSERT INTO plain VALUES (new.name, new.id); END;
                     INSERT INTO parent (name) VALUES ('one'), ('two'), ('it''s \"3\"');
                     INSERT INTO child (a, b) VALUES (1, 2), (2, 9), (NULL, x'00ff');
                     INSERT INTO found VALUES ('many words'), ('few');
                     CREATE TABLE \"odd \"\" name\" (\"a b\"); INSERT INTO \"odd \"\" name\" VALUES (zeroblob(3000000));"
                ),
            );
            let (tree, drained) = back_up(&path, None);
            assert!(drained.items > 10, "{drained:?}");
            let target = folder.path().join(format!("{page_bytes}-{vacuum}.copy.db"));
            let restored = restore(&target, &tree, RestoreMode::Fresh).unwrap();
            assert!(restored.losses.is_empty(), "{restored:?}");
            assert_eq!(differences(&target, &tree), Vec::<String>::new());
            let copy = Connection::open(&target).unwrap();
            let hits: i64 =
                copy.query_row("SELECT count(*) FROM found WHERE found MATCH 'words'", [], |r| r.get(0)).unwrap();
            assert_eq!(hits, 1);
            live.execute("UPDATE plain SET v = 99 WHERE k = 'two'", []).unwrap();
            assert_eq!(differences(&path, &tree).len(), 1);
        }
    }
}

#[test]
fn an_empty_database_comes_back_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.db");
    std::fs::write(&path, b"").unwrap();
    let (tree, drained) = back_up(&path, None);
    assert_eq!((drained.items, drained.bytes), (0, 0));
    let target = folder.path().join("copy.db");
    restore(&target, &tree, RestoreMode::Fresh).unwrap();
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 0);
    assert!(differences(&target, &tree).is_empty());
}

#[test]
fn an_unchanged_database_is_not_read_again_and_a_changed_one_is() {
    let folder = tempfile::tempdir().unwrap();
    for journal in ["WAL", "DELETE"] {
        let path = folder.path().join(format!("{journal}.db"));
        let live = create(
            &path,
            &format!("PRAGMA journal_mode = {journal}; CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(100000));"),
        );
        std::thread::sleep(Duration::from_millis(60));
        let (first, drained) = back_up(&path, None);
        assert!(drained.bytes_read > 100_000);
        let (second, drained) = back_up(&path, Some(&first));
        assert_eq!(drained.bytes_read, 0, "{journal}");
        assert_eq!(second.files(), first.files());
        live.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let (third, drained) = back_up(&path, Some(&second));
        assert!(drained.bytes_read > 100_000, "{journal}");
        assert_eq!(drained.items, 2);
        // Written a moment ago: the state of the files proves nothing yet.
        assert!(!String::from_utf8(third.files()["database.json"].clone()).unwrap().contains("db:"), "{journal}");
    }
}

#[test]
fn a_commit_by_another_process_moves_the_position_and_reading_does_not() {
    let folder = tempfile::tempdir().unwrap();
    for journal in ["WAL", "DELETE"] {
        let path = folder.path().join(format!("{journal}.db"));
        let live = create(&path, &format!("PRAGMA journal_mode = {journal}; CREATE TABLE t (a);"));
        let driver = open(&path);
        let context = Context::default();
        run(driver.prepare(&context)).unwrap();
        let before = run(driver.observe(&context)).unwrap().unwrap();
        live.query_row("SELECT count(*) FROM t", [], |_| Ok(())).unwrap();
        let pinned = run(driver.cut(&context, &cut_id(1))).unwrap();
        assert_eq!(run(driver.observe(&context)).unwrap().unwrap(), before, "{journal}");
        assert_eq!(pinned.position, before);
        run(driver.release(&context, &[])).unwrap();
        let before = run(driver.observe(&context)).unwrap().unwrap();
        match std::process::Command::new("sqlite3").arg(&path).arg("INSERT INTO t VALUES (1)").status() {
            Ok(status) => assert!(status.success()),
            Err(_) => {
                skip("a_commit_by_another_process_moves_the_position", "no sqlite3 program; another connection writes");
                live.execute("INSERT INTO t VALUES (1)", []).unwrap();
            }
        }
        assert_ne!(run(driver.observe(&context)).unwrap().unwrap(), before, "{journal}");
    }
}

#[test]
fn a_database_that_was_replaced_is_another_one() {
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("a.db"), folder.path().join("b.db"));
    drop(create(&path, "CREATE TABLE t (a);"));
    drop(create(&other, "CREATE TABLE t (a); INSERT INTO t VALUES (1), (2);"));
    let driver = open(&path);
    let context = Context::default();
    run(driver.prepare(&context)).unwrap();
    let before = run(driver.observe(&context)).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert_ne!(run(driver.observe(&context)).unwrap(), before);
    let pinned = run(driver.cut(&context, &cut_id(1))).unwrap();
    assert_eq!(drain(&driver, &pinned, None).unwrap().1.items, 2);
}

#[test]
fn a_crashed_writer_leaves_what_it_committed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    for (journal, companion) in [("WAL", "-wal"), ("DELETE", "-journal")] {
        let path = folder.path().join(format!("{journal}.db"));
        let live =
            create(&path, &format!("PRAGMA journal_mode = {journal}; PRAGMA cache_size = 2; CREATE TABLE t (a);"));
        live.execute_batch("INSERT INTO t VALUES (1);").unwrap();
        // A transaction large enough to spill into the file before it is committed.
        live.execute_batch(
            "BEGIN; WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500)
                            INSERT INTO t SELECT randomblob(1000) FROM n;",
        )
        .unwrap();
        let crashed = folder.path().join(format!("{journal}-crashed.db"));
        for ending in ["", companion] {
            let from = format!("{}{ending}", path.display());
            std::fs::copy(from, format!("{}{ending}", crashed.display())).unwrap();
        }
        drop(live);
        let (tree, drained) = back_up(&crashed, None);
        assert_eq!(drained.items, 1, "{journal}");
        let target = folder.path().join(format!("{journal}-copy.db"));
        restore(&target, &tree, RestoreMode::Fresh).unwrap();
        assert_eq!(count(&target, "t"), 1);
    }
}

#[test]
fn what_is_no_readable_database_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let context = Context::default();
    let missing = run(open(&folder.path().join("none.db")).prepare(&context)).unwrap_err();
    assert_eq!(missing.kind(), Kind::NotFound);
    assert!(missing.to_string().contains("none.db"), "{missing}");
    let text = folder.path().join("text.db");
    std::fs::write(&text, "this is certainly no database, ".repeat(100)).unwrap();
    let foreign = run(open(&text).probe(&context)).unwrap_err();
    assert_eq!(foreign.kind(), Kind::Corrupt);
    assert!(foreign.hint_text().unwrap().contains("encrypted"));
    let directory = run(open(folder.path()).probe(&context)).unwrap_err();
    assert_eq!(directory.kind(), Kind::Config);
    let damaged = folder.path().join("damaged.db");
    drop(create(&damaged, "CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(100));"));
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[4096..4196].fill(0xee);
    std::fs::write(&damaged, bytes).unwrap();
    let driver = open(&damaged);
    let pinned = pin(&driver, 1);
    let error = drain(&driver, &pinned, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
}

#[test]
fn a_lock_that_another_door_dropped_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    for (journal, file) in [("WAL", "-shm"), ("DELETE", "")] {
        let path = folder.path().join(format!("{journal}.db"));
        let _live = create(&path, &format!("PRAGMA journal_mode = {journal}; CREATE TABLE t (a);"));
        let driver = open_with(json!({ "path": path, "rollback": "hold" }), folder.path());
        let pinned = pin(&driver, 1);
        let context = Context::default();
        assert_eq!(run(driver.still_valid(&context, &pinned)).unwrap(), Validity::Valid);
        drop(std::fs::File::open(format!("{}{file}", path.display())).unwrap());
        assert!(matches!(run(driver.still_valid(&context, &pinned)).unwrap(), Validity::Lost(_)), "{journal}");
    }
}

#[test]
fn a_further_try_replaces_the_pin_and_the_same_id_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let live = create(&path, &format!("{WAL} CREATE TABLE t (a);"));
    let driver = open(&path);
    let context = Context::default();
    let first = pin(&driver, 1);
    live.execute("INSERT INTO t VALUES (1)", []).unwrap();
    assert_eq!(run(driver.cut(&context, &cut_id(1))).unwrap(), first);
    assert_eq!(drain(&driver, &first, None).unwrap().1.items, 0);
    let second = run(driver.cut(&context, &cut_id(2))).unwrap();
    assert_eq!(drain(&driver, &second, None).unwrap().1.items, 1);
    assert_eq!(drain(&driver, &first, None).unwrap_err().kind(), Kind::PinLost);
    run(driver.release(&context, &[])).unwrap();
    run(driver.release(&context, &[])).unwrap();
    assert!(matches!(run(driver.still_valid(&context, &second)).unwrap(), Validity::Lost(_)));
}

#[test]
fn in_place_keeps_the_old_and_refuses_while_someone_has_it_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let live = create(&path, &format!("{WAL} CREATE TABLE t (a); INSERT INTO t VALUES (1);"));
    let (tree, _) = back_up(&path, None);
    live.execute_batch("INSERT INTO t VALUES (2);").unwrap();
    assert_eq!(restore(&path, &tree, RestoreMode::Fresh).unwrap_err().kind(), Kind::AlreadyExists);
    let busy = restore(&path, &tree, RestoreMode::InPlace).unwrap_err();
    assert_eq!(busy.kind(), Kind::Locked);
    assert_eq!(live.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).unwrap(), 2);
    drop(live);
    let restored = restore(&path, &tree, RestoreMode::InPlace).unwrap();
    assert_eq!(count(&path, "t"), 1);
    assert_eq!(restored.kept_old.len(), 1);
    assert_eq!(count(Path::new(&restored.kept_old[0]), "t"), 2);
    let names: BTreeSet<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("stillpoint-restore")), "{names:?}");
    assert_eq!(restore(&path, &tree, RestoreMode::InPlace).unwrap_err().kind(), Kind::AlreadyExists);
}

#[test]
fn in_place_replaces_a_destroyed_database_and_a_stale_log_is_not_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let live = create(&path, &format!("{WAL} CREATE TABLE t (a); INSERT INTO t VALUES (1);"));
    let (tree, _) = back_up(&path, None);
    live.execute_batch("INSERT INTO t VALUES (2);").unwrap();
    let wal = format!("{}-wal", path.display());
    let stale = std::fs::read(&wal).unwrap();
    drop(live);
    std::fs::write(&path, "destroyed ".repeat(1000)).unwrap();
    std::fs::write(&wal, &stale).unwrap();
    let restored = restore(&path, &tree, RestoreMode::InPlace).unwrap();
    assert_eq!(count(&path, "t"), 1);
    assert!(Path::new(&restored.kept_old[0]).exists());
    assert!(differences(&path, &tree).is_empty());
    std::fs::remove_file(&restored.kept_old[0]).unwrap();
    std::fs::write(&path, "destroyed ".repeat(1000)).unwrap();
    std::fs::write(&wal, "no log either").unwrap();
    restore(&path, &tree, RestoreMode::InPlace).unwrap();
    assert!(!Path::new(&wal).exists());
    assert!(differences(&path, &tree).is_empty());
    // An orphaned log beside an absent database is somebody's data too.
    let other = folder.path().join("other.db");
    std::fs::write(format!("{}-wal", other.display()), &stale).unwrap();
    assert_eq!(restore(&other, &tree, RestoreMode::Fresh).unwrap_err().kind(), Kind::AlreadyExists);
}

#[test]
fn a_damaged_point_leaves_the_target_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, "CREATE TABLE t (a); INSERT INTO t VALUES (1);"));
    let (tree, _) = back_up(&path, None);
    let mut bytes = tree.files()["a.sqlite"].clone();
    bytes[4096..4200].fill(0xee);
    let damaged = tree.clone().with_file(&[b"a.sqlite"], bytes);
    let error = restore(&path, &damaged, RestoreMode::InPlace).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error:?}");
    let short = tree.clone().with_file(&[b"a.sqlite"], vec![0; 10]);
    assert_eq!(restore(&path, &short, RestoreMode::InPlace).unwrap_err().kind(), Kind::Corrupt);
    let without = tree.without(&[b"database.json"]);
    assert_eq!(restore(&path, &without, RestoreMode::InPlace).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(count(&path, "t"), 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().filter(|e| e.as_ref().unwrap().path().is_file()).count(), 1);
}

#[test]
fn the_stamp_is_no_content_and_does_not_travel() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, &format!("{WAL} CREATE TABLE t (a); INSERT INTO t VALUES (1);")));
    let (tree, _) = back_up(&path, None);
    let context = Context::default();
    let stamp = Stamp {
        platform: "churn".to_owned(),
        environment: "staging".to_owned(),
        point: "0123456789".to_owned(),
        restore: "r1".to_owned(),
        at: jiff::Timestamp::UNIX_EPOCH,
    };
    let driver = open(&path);
    assert_eq!(run(driver.read_stamp(&context)).unwrap(), None);
    for _ in 0..2 {
        run(driver.stamp(&context, &stamp)).unwrap();
    }
    assert_eq!(run(driver.read_stamp(&context)).unwrap(), Some(stamp));
    assert!(differences(&path, &tree).is_empty());
    let (stamped, drained) = back_up(&path, None);
    assert_eq!(drained.items, 1);
    let copy = folder.path().join("copy.db");
    restore(&copy, &stamped, RestoreMode::Fresh).unwrap();
    assert_eq!(run(open(&copy).read_stamp(&context)).unwrap(), None);
    assert!(differences(&copy, &stamped).is_empty());
    assert_eq!(run(open(&folder.path().join("none.db")).read_stamp(&context)).unwrap(), None);
}

#[test]
fn edges_come_from_the_pinned_view_and_only_queries_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let live = create(
        &path,
        &format!(
            "{WAL} CREATE TABLE m (id INTEGER PRIMARY KEY, k); INSERT INTO m (k) VALUES ('a'), (NULL), (x'62'), (5);"
        ),
    );
    let driver = open(&path);
    let pinned = pin(&driver, 1);
    live.execute("INSERT INTO m (k) VALUES ('late')", []).unwrap();
    let from = EdgeQuery::From("SELECT k, 'model ' || id FROM m".to_owned());
    let found = edges(&driver, Some(&pinned), &from).unwrap();
    let shown: Vec<_> =
        found.iter().map(|e| (String::from_utf8_lossy(&e.referent).into_owned(), e.owner.as_str())).collect();
    assert_eq!(shown, [("a".to_owned(), "model 1"), ("b".to_owned(), "model 3"), ("5".to_owned(), "model 4")]);
    assert_eq!(edges(&driver, None, &from).unwrap().len(), 4);
    let held = EdgeQuery::Held("rows:m.id".to_owned());
    assert_eq!(edges(&driver, Some(&pinned), &held).unwrap().len(), 4);
    let referents = [&b"a"[..], b"b", b"late", b"no"].map(<[u8]>::to_vec).to_vec();
    let which = EdgeQuery::Which { kind: "rows:m.k".to_owned(), referents };
    let found: Vec<_> = edges(&driver, Some(&pinned), &which).unwrap().into_iter().map(|edge| edge.referent).collect();
    assert_eq!(found, [b"a".to_vec(), b"b".to_vec()]);
    for bad in ["DELETE FROM m RETURNING k", "COMMIT", "PRAGMA query_only = 0", "SELECT nothing FROM nowhere"] {
        let error = edges(&driver, Some(&pinned), &EdgeQuery::From(bad.to_owned())).unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{bad}: {error:?}");
    }
    let writing = "WITH x AS (SELECT 1) DELETE FROM m RETURNING k";
    assert!(edges(&driver, Some(&pinned), &EdgeQuery::From(writing.to_owned())).is_err());
    assert_eq!(run(driver.still_valid(&Context::default(), &pinned)).unwrap(), Validity::Valid);
    assert_eq!(count(&path, "m"), 5);
}

#[test]
fn a_long_query_stops_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, "CREATE TABLE t (a);"));
    let driver = open(&path);
    let pinned = pin(&driver, 1);
    let context = Context::default();
    let stopper = context.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        stopper.cancel();
    });
    let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0";
    let begin = Instant::now();
    let query = EdgeQuery::From(endless.to_owned());
    let error = run(driver.edges(&context, Some(&pinned), &query, &mut |_| Ok(()))).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(begin.elapsed() < Duration::from_secs(5));
    thread.join().unwrap();
}

#[test]
fn many_databases_find_their_places_again() {
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("from");
    let settings = |directory: &Path| json!({ "directory": directory, "include": ["**/*.db"] });
    for (name, rows) in [("b.db", 1), ("a/main.db", 2), ("a/b/deep.db", 3), ("a.db", 4)] {
        let path = from.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let live = create(&path, "CREATE TABLE t (a);");
        (0..rows).for_each(|row| assert_eq!(live.execute("INSERT INTO t VALUES (?1)", [row]).unwrap(), 1));
    }
    std::fs::write(from.join("notes.txt"), "no database").unwrap();
    let driver = open_with(settings(&from), &folder.path().join("s"));
    let pinned = pin(&driver, 1);
    let (drained_tree, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!(drained.items, 10);
    assert!(drained_tree.tree.files().contains_key("databases/a/b/deep.db/deep.sqlite"));
    let to = folder.path().join("to");
    let target = open_with(settings(&to), &folder.path().join("s"));
    let mut request = RestoreRequest {
        mode: RestoreMode::Fresh,
        part: Some(TreePath::parse("databases/a/main.db").unwrap()),
        restore: "r1".to_owned(),
    };
    let context = Context::default();
    assert_eq!(run(target.restore(&context, &drained_tree.tree, &request)).unwrap().items, 2);
    request.part = Some(TreePath::parse("a/none.db").unwrap());
    assert_eq!(run(target.restore(&context, &drained_tree.tree, &request)).unwrap_err().kind(), Kind::NotFound);
    std::fs::remove_dir_all(&to).unwrap();
    request.part = None;
    assert_eq!(run(target.restore(&context, &drained_tree.tree, &request)).unwrap().items, 10);
    assert!(run(target.verify(&context, &drained_tree.tree)).unwrap().differences.is_empty());
    assert_eq!(count(&to.join("a/b/deep.db"), "t"), 3);
    drop(create(&from.join("new.db"), "CREATE TABLE t (a);"));
    assert_ne!(run(driver.observe(&context)).unwrap().unwrap(), pinned.position);
}

#[test]
fn a_statement_runs_for_pause_steps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, "CREATE TABLE flags (paused); INSERT INTO flags VALUES (0);"));
    run(open(&path).execute(&Context::default(), "UPDATE flags SET paused = 1")).unwrap();
    let paused: i64 = Connection::open(&path).unwrap().query_row("SELECT paused FROM flags", [], |r| r.get(0)).unwrap();
    assert_eq!(paused, 1);
    assert!(run(open(&path).execute(&Context::default(), "UPDATE nothing SET x = 1")).is_err());
}

#[test]
fn the_cut_is_short_whatever_the_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, &format!("{WAL} CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(50000000));")));
    let driver = open(&path);
    let context = Context::default();
    run(driver.prepare(&context)).unwrap();
    let (_, before, _) = context.progress();
    let pinned = run(driver.cut(&context, &cut_id(1))).unwrap();
    // Cost is judged by what was read, not by time: nothing was.
    assert_eq!(context.progress().1, before);
    assert!(pinned.remains.is_empty());
}

/// A file system that can clone files, or `None` where it cannot be had.
struct Btrfs(tempfile::TempDir);

impl Btrfs {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::File::create(&image).unwrap().set_len(150 << 20).unwrap();
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            std::process::Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        let made = run("mkfs.btrfs", &["-q".as_ref(), image.as_os_str()])
            && run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), mount.as_os_str()]);
        made.then_some(Self(folder))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg(self.path()).status().ok();
    }
}

#[test]
fn a_clone_lets_rollback_journal_writers_go_on() {
    let Some(btrfs) = Btrfs::mount() else {
        return skip("a_clone_lets_rollback_journal_writers_go_on", "needs root, mkfs.btrfs and loop devices");
    };
    let folder = btrfs.path();
    let path = folder.join("a.db");
    let live = create(&path, "CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(1000000));");
    live.busy_timeout(Duration::ZERO).unwrap();
    let driver = open_with(json!({ "path": path, "rollback": "clone" }), &folder.join("absent-scratch"));
    let pinned = pin(&driver, 1);
    assert_eq!(pinned.remains.len(), 1);
    live.execute_batch("INSERT INTO t VALUES (2); VACUUM;").unwrap();
    let (drained_tree, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!(drained.items, 1);
    assert_eq!(run(driver.still_valid(&Context::default(), &pinned)).unwrap(), Validity::Valid);
    let query = EdgeQuery::From("SELECT length(a) FROM t".to_owned());
    assert_eq!(edges(&driver, Some(&pinned), &query).unwrap()[0].referent, b"1000000");
    restore(&folder.join("copy.db"), &drained_tree.tree, RestoreMode::Fresh).unwrap();
    // What a process that died leaves, the next one knows by the pin's remains.
    assert!(Path::new(&pinned.remains[0]).exists());
    run(open(&path).release(&Context::default(), &pinned.remains)).unwrap();
    assert!(!Path::new(&pinned.remains[0]).exists());
    run(open(&path).release(&Context::default(), &[path.display().to_string()])).unwrap();
    assert!(path.exists(), "only clones of ours are deleted");
}

#[test]
fn where_files_cannot_be_cloned_a_wanted_clone_fails() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, "CREATE TABLE t (a);"));
    let driver = open_with(json!({ "path": path, "rollback": "clone" }), folder.path());
    run(driver.prepare(&Context::default())).unwrap();
    match run(driver.cut(&Context::default(), &cut_id(1))) {
        Ok(_) => skip("where_files_cannot_be_cloned_a_wanted_clone_fails", "the file system can clone"),
        Err(error) => assert!(error.hint_text().unwrap().contains("hold"), "{error:?}"),
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("clone")), "{names:?}");
}

#[test]
fn without_the_page_table_the_view_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let live = create(&path, &format!("{WAL} CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(500000));"));
    let settings: Settings = serde_json::from_value(json!({ "path": path })).unwrap();
    let sqlite = Sqlite {
        settings: settings.validate().unwrap(),
        scratch: folder.path().join("scratch"),
        state: Mutex::default(),
    };
    let context = Context::default();
    super::cut::prepare(&sqlite, &context).unwrap();
    let pinned = super::cut::cut(&sqlite, &context, &cut_id(1)).unwrap();
    live.execute_batch("INSERT INTO t VALUES (2); PRAGMA wal_checkpoint;").unwrap();
    let views = sqlite.views(&pinned).unwrap();
    let mut content = super::drain::copied_content(&sqlite, &context, &views[0]).unwrap();
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match content.read(&mut buffer).unwrap() {
            0 => break,
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    let copy = folder.path().join("copy.db");
    std::fs::write(&copy, bytes).unwrap();
    assert_eq!(count(&copy, "t"), 1);
}

#[test]
fn a_database_with_nothing_but_a_stamp_is_empty() {
    let folder = tempfile::tempdir().unwrap();
    let (path, source) = (folder.path().join("a.db"), folder.path().join("s.db"));
    drop(create(&source, "CREATE TABLE t (a);"));
    let (tree, _) = back_up(&source, None);
    let context = Context::default();
    let occupied = |path: &Path| run(open(path).occupied(&context)).unwrap();
    assert_eq!(occupied(&path), None);
    drop(create(&path, "CREATE TABLE stillpoint_stamp (one INTEGER PRIMARY KEY, stamp TEXT);"));
    assert_eq!(occupied(&path), None);
    restore(&path, &tree, RestoreMode::Fresh).unwrap();
    assert!(occupied(&path).is_some());
}

#[test]
fn the_readme_states_the_capability() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(create(&path, "CREATE TABLE t (a);"));
    let one = run(open(&path).probe(&Context::default())).unwrap();
    let driver = open_with(json!({ "directory": folder.path() }), folder.path());
    let many = run(driver.probe(&Context::default())).unwrap();
    assert!(one.warnings.iter().any(|warning| warning.contains("rollback-journal")), "{:?}", one.warnings);
    let shown = |yes: bool| if yes { "yes" } else { "no" };
    for (row, value) in [
        ("pin", "snapshot"),
        ("observes writes", shown(one.capability.observes_writes)),
        ("incremental", shown(one.capability.incremental)),
        ("edges", shown(one.capability.edges)),
        ("swaps in place", shown(one.capability.swaps_in_place)),
        ("partial restore", "with `directory`"),
    ] {
        assert!(REGISTRATION.readme.contains(&format!("| {row} | {value} |")), "{row}");
    }
    assert!(!one.capability.partial_restore && many.capability.partial_restore);
}

/// Makes stores of one table `items (key, value)` in WAL mode.
struct SqliteHarness {
    folder: tempfile::TempDir,
    count: Mutex<u32>,
}

struct SqliteSubject {
    path: PathBuf,
    connection: Mutex<Option<Connection>>,
}

impl SqliteHarness {
    fn subject(&self, create_now: bool) -> Box<dyn Subject> {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        let folder = self.folder.path().join(count.to_string());
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("store.db");
        let sql = format!("{WAL} CREATE TABLE items (key TEXT PRIMARY KEY, value BLOB NOT NULL);");
        let connection = create_now.then(|| create(&path, &sql));
        Box::new(SqliteSubject { path, connection: Mutex::new(connection) })
    }
}

impl Harness for SqliteHarness {
    fn source(&self) -> Result<Box<dyn Subject>> {
        Ok(self.subject(true))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(self.subject(false))
    }

    /// A changed database is read whole; the repository keeps only what is new of it.
    fn incremental_read_bytes_max(&self, content_bytes: u64) -> u64 {
        content_bytes * 2
    }
}

fn harness_failed(error: rusqlite::Error) -> Error {
    Error::new(Kind::Io, "the harness failed").source(error)
}

impl SqliteSubject {
    /// Writers connect once per call where the database came from a restore.
    fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let guard = self.connection.lock().unwrap();
        match &*guard {
            Some(connection) => work(connection),
            None => work(&Connection::open(&self.path).map_err(harness_failed)?),
        }
        .map_err(harness_failed)
    }
}

impl Subject for SqliteSubject {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        // A restore in place refuses while a program has the database open, as it must.
        *self.connection.lock().unwrap() = None;
        Ok(open(&self.path))
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        self.with(|c| c.execute("INSERT OR REPLACE INTO items VALUES (?1, ?2)", params![key, value])).map(drop)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.with(|c| c.execute("DELETE FROM items WHERE key = ?1", [key])).map(drop)
    }

    fn read(&self) -> Result<Content> {
        if !self.path.exists() {
            return Ok(Content::new());
        }
        self.with(|connection| {
            let mut statement = connection.prepare("SELECT key, value FROM items")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::From("SELECT key, 'item' FROM items".to_owned()), keys)))
    }
}

#[test]
fn conformance() {
    let harness = SqliteHarness { folder: tempfile::tempdir().unwrap(), count: Mutex::new(0) };
    let report = conformance::run(&harness);
    report.assert_clean("sqlite");
}
