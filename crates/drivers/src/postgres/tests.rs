//! What is PostgreSQL's own.

mod faults;
mod login;
mod way_back;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stillpoint_core::driver::{Context, Driver, EdgeQuery, RestoreMode, Validity};
use stillpoint_core::error::Kind;
use stillpoint_core::tree::{Tree, TreePath, read_small};
use stillpoint_testkit::conformance::{Content, Harness, Subject};
use stillpoint_testkit::{MemoryTree, servers};

use super::REGISTRATION;
use super::layout::{self, Table, Total};
use super::pool::{self, Pool};
use super::session::{Address, Endpoint, Session};
use super::wire::{Tally, identifier, literal};
use crate::trial::{self, run};

/// A server that is up.
pub(super) struct Rig {
    name: &'static str,
    url: url::Url,
    /// The folder of its programs.
    pub(super) bin: String,
}

/// The rigs that are up.
pub(super) fn rigs() -> Vec<Rig> {
    let find = |name: &'static str| {
        let url = std::env::var(format!("STILLPOINT_RIG_{name}_URL")).ok()?.parse().ok()?;
        let bin = std::env::var(format!("STILLPOINT_RIG_{name}_BIN")).ok()?;
        Some(Rig { name, url, bin })
    };
    let found: Vec<_> = ["POSTGRES", "POSTGRES_16", "POSTGRES_18"].into_iter().filter_map(find).collect();
    if found.is_empty() {
        stillpoint_testkit::skip("postgres", "no rig: cargo xtask rig up postgres");
    }
    found
}

impl Rig {
    pub(super) fn port(&self) -> u16 {
        self.url.port().unwrap()
    }

    pub(super) fn session(&self, database: &str) -> Session {
        Session::connect(&endpoint(&self.url), database, &Context::default()).unwrap()
    }

    /// Settings of a store of one database, as the superuser.
    fn settings(&self, database: &str, more: Value) -> Value {
        let mut all = json!({
            "host": self.url.host_str().unwrap(), "port": self.url.port().unwrap(), "user": self.url.username(),
            "password": self.url.password().unwrap(), "tools": self.bin, "databases": [database],
        });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }
}

/// Settings of a store of all databases of a server that one test has for itself, and `more`.
pub(super) fn on_server(port: u16, bin: &str, more: Value) -> Value {
    let mut all = json!({
        "host": "127.0.0.1", "port": port, "user": "postgres", "password": servers::POSTGRES_PASSWORD, "tools": bin,
    });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

/// A database of the test's own; gone with the value.
pub(super) struct Own<'a> {
    pub(super) rig: &'a Rig,
    pub(super) name: String,
    scratch: tempfile::TempDir,
}

impl<'a> Own<'a> {
    pub(super) fn new(rig: &'a Rig) -> Self {
        Self::with(rig, "")
    }

    fn with(rig: &'a Rig, options: &str) -> Self {
        let name = format!("trial_{:016x}", fastrand::u64(..));
        rig.session("postgres").execute(&format!("CREATE DATABASE {} {options}", identifier(&name))).unwrap();
        Self { rig, name, scratch: tempfile::tempdir().unwrap() }
    }

    pub(super) fn session(&self) -> Session {
        self.rig.session(&self.name)
    }

    pub(super) fn execute(&self, sql: &str) {
        self.session().execute(sql).unwrap();
    }

    pub(super) fn open(&self, more: Value) -> Arc<dyn Driver> {
        trial::open(&REGISTRATION, self.rig.settings(&self.name, more), self.scratch.path()).unwrap()
    }

    fn file(&self, tree: &MemoryTree, path: &str) -> Vec<u8> {
        let path = format!("databases/{}/{path}", layout::database_folder(&self.name));
        read_small(tree, &TreePath::parse(&path).unwrap(), 1 << 30).unwrap()
    }

    pub(super) fn text(&self, tree: &MemoryTree, path: &str) -> String {
        String::from_utf8(self.file(tree, path)).unwrap()
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", identifier(&self.name));
        drop(self.rig.session("postgres").execute(&sql));
    }
}

fn endpoint(url: &url::Url) -> Endpoint {
    Endpoint {
        address: Address::Tcp { host: url.host_str().unwrap().to_owned(), port: url.port().unwrap() },
        user: url.username().to_owned(),
        password: url.password().map(str::to_owned),
        tls: None,
        tls_required: false,
        connect_time_max: Duration::from_secs(10),
    }
}

#[test]
fn a_session_asks_copies_both_ways_and_survives_errors() {
    for Rig { name, url, .. } in rigs() {
        let mut session = Session::connect(&endpoint(&url), "postgres", &Context::default()).unwrap();
        assert!(session.major() >= 15, "{name}");
        assert_eq!(session.query_one("SELECT 1, NULL, 'a'").unwrap().optional(1).unwrap(), None);
        let error = session.query("SELECT * FROM pg_catalog.nothing").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        session.execute("CREATE TEMPORARY TABLE t (n bigint, x text)").unwrap();
        session.copy_in("COPY pg_temp.t FROM STDIN").unwrap();
        session.copy_write(b"1\tone\n2\ttwo\n").unwrap();
        session.copy_write(format!("3\t{}\n", "long ".repeat(1_000_000)).as_bytes()).unwrap();
        assert_eq!(session.copy_finish().unwrap(), 3);
        session
            .execute("INSERT INTO pg_temp.t SELECT n, repeat('x', (n % 700)::int) FROM generate_series(4, 20000) n")
            .unwrap();
        let mut sums = Vec::new();
        for bytes in [100, 4096, 1 << 20, 8 << 20] {
            let (mut tally, mut buffer, mut all) = (Tally::default(), vec![0; bytes], Vec::new());
            session.copy_out("COPY pg_temp.t TO STDOUT").unwrap();
            loop {
                let count = session.copy_read(&mut buffer, &mut tally).unwrap();
                if count == 0 {
                    break;
                }
                all.extend_from_slice(&buffer[..count]);
            }
            let mut again = Tally::default();
            all.split_inclusive(|&byte| byte == b'\n').for_each(|row| again.row(row));
            assert_eq!((again, tally.rows), (tally, 20000), "{name} {bytes}");
            sums.push(tally);
        }
        assert!(sums.windows(2).all(|pair| pair[0] == pair[1]));
        session.copy_in("COPY pg_temp.t FROM STDIN").unwrap();
        session.copy_write(b"wrong\trow\n").unwrap();
        assert!(session.copy_finish().is_err());
        let context = Context::default();
        session.set_context(&context);
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            context.cancel();
        });
        assert_eq!(session.execute("SELECT pg_sleep(60)").unwrap_err().kind(), Kind::Cancelled);
        stopper.join().unwrap();
        assert!(!session.is_usable());
    }
}

#[test]
fn a_wrong_password_and_a_dead_server_are_told_apart() {
    for Rig { name, url, .. } in rigs() {
        let mut wrong = endpoint(&url);
        wrong.password = Some("wrong".to_owned());
        let error = Session::connect(&wrong, "postgres", &Context::default()).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unauthenticated, false), "{name}");
        let mut dead = endpoint(&url);
        dead.address = Address::Tcp { host: "127.0.0.1".to_owned(), port: 1 };
        let error = Session::connect(&dead, "postgres", &Context::default()).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{name}");
        let error = Session::connect(&endpoint(&url), "no such database", &Context::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{name}");
    }
}

#[test]
fn a_point_holds_what_the_cut_showed_and_is_readable() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute(
            "CREATE SCHEMA a; CREATE TABLE a.models (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, \
             twice bigint GENERATED ALWAYS AS (length(name) * 2) STORED); \
             INSERT INTO a.models (name) SELECT 'model ' || n FROM generate_series(1, 1000) n; \
             CREATE TABLE a.\"o'dd.\"\"na/me\" (x bytea); INSERT INTO a.\"o'dd.\"\"na/me\" VALUES ('\\x00ff'), (NULL); \
             CREATE TABLE a.empty (); INSERT INTO a.empty DEFAULT VALUES; \
             CREATE TABLE a.parts (at date, v int) PARTITION BY RANGE (at); \
             CREATE TABLE a.part1 PARTITION OF a.parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01'); \
             INSERT INTO a.parts VALUES ('2026-06-01', 1); \
             CREATE MATERIALIZED VIEW a.seen AS SELECT count(*) FROM a.models; \
             CREATE UNLOGGED TABLE a.unlogged AS SELECT 1 AS n; \
             SELECT lo_from_bytea(4711, repeat('x', 5000)::bytea); \
             CREATE SCHEMA stillpoint; CREATE TABLE stillpoint.stamp (stamp text)",
        );
        let driver = own.open(json!({}));
        let pin = trial::pin(&driver, 1);
        own.execute(
            "INSERT INTO a.models (name) VALUES ('late'); DELETE FROM a.models WHERE id <= 10; CREATE TABLE a.later (); \
             SELECT lo_unlink(4711)",
        );
        let (drain, drained) = trial::drain(&driver, &pin, None).unwrap();
        let tree = drain.tree;
        assert_eq!(run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid);
        run(driver.release(&Context::default(), &[])).unwrap();
        assert_eq!(drained.losses, [], "{}", rig.name);
        let models = own.text(&tree, "data/a.models/00000000.copy");
        assert_eq!(models.lines().count(), 1000);
        assert!(models.starts_with("1\tmodel 1\n") && !models.contains("late"));
        assert_eq!(own.text(&tree, "data/a.o'dd%2E\"na%2Fme/00000000.copy"), "\\\\x00ff\n\\N\n");
        assert_eq!(own.text(&tree, "data/a.empty/00000000.copy"), "\n");
        assert_eq!(own.text(&tree, "data/a.part1/00000000.copy"), "2026-06-01\t1\n");
        assert_eq!(own.text(&tree, "data/a.unlogged/00000000.copy"), "1\n");
        let objects = own.text(&tree, "large-objects/00000000.copy");
        assert_eq!(
            objects.lines().map(|line| line[..9].to_owned()).collect::<Vec<_>>(),
            ["4711\t0\t\\\\", "4711\t2048", "4711\t4096"]
        );
        assert!(own.text(&tree, "large-objects/index.ndjson").contains("4711"));
        assert!(
            own.text(&tree, "sequences.sql").contains("'a.models_id_seq'")
                || own.text(&tree, "sequences.sql").contains("models_id_seq")
        );
        for (file, word) in [("pre-data.sql", "CREATE TABLE a.models"), ("post-data.sql", "PRIMARY KEY")] {
            assert!(own.text(&tree, file).contains(word), "{file}");
        }
        assert!(!own.text(&tree, "pre-data.sql").contains("stillpoint"), "the stamp is part of no point");
        assert!(own.file(&tree, "schema.dump").starts_with(b"PGDMP"));
        let tables: Vec<Table> = layout::parse_lines("tables", &own.file(&tree, "tables.ndjson")).unwrap();
        assert_eq!(tables.len(), 7, "{tables:?}");
        let totals = read_small(&tree, &TreePath::parse("totals.ndjson").unwrap(), 1 << 20).unwrap();
        let totals: Vec<Total> = layout::parse_lines("totals", &totals).unwrap();
        let total = totals.iter().find(|total| total.table == "models").unwrap();
        assert_eq!((total.rows, total.bytes), (1000, models.len() as u64));
        assert_eq!(drained.checksums["a.models"], format!("1000:{}", total.hash));
        assert_eq!(drained.items, 1000 + 2 + 1 + 1 + 1 + 3);
        let globals = read_small(&tree, &TreePath::parse("globals.sql").unwrap(), 1 << 20).unwrap();
        assert!(String::from_utf8(globals).unwrap().contains("SCRAM-SHA-256"));
    }
}

#[test]
fn large_tables_are_cut_into_files_with_fixed_borders() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute(
            "CREATE TABLE public.wide (id int, pad text) WITH (fillfactor = 10); \
             ALTER TABLE public.wide ALTER pad SET STORAGE PLAIN; \
             INSERT INTO public.wide SELECT n, repeat('x', 800) FROM generate_series(1, 100) n",
        );
        let driver = own.open(json!({}));
        let (tree, drained) = trial::back_up(&driver, None);
        let tables: Vec<Table> = layout::parse_lines("tables", &own.file(&tree, "tables.ndjson")).unwrap();
        assert_eq!((tables[0].files, tables[0].stride), (7, 16), "{tables:?}");
        let name = |n| format!("data/public.wide/{}", layout::file_name(n));
        let rows: String = (0..7).map(|n| own.text(&tree, &name(n))).collect();
        let ids: Vec<usize> = rows.lines().map(|line| line.split('\t').next().unwrap().parse().unwrap()).collect();
        assert_eq!(ids, (1..=100).collect::<Vec<_>>());
        assert_eq!(drained.items, 100);
    }
}

#[test]
fn all_databases_of_a_server_are_one_store_whatever_their_encoding() {
    for Rig { bin, .. } in rigs() {
        let server = servers::Postgres::start(bin.as_ref(), &[]).unwrap();
        let make = "TEMPLATE template0 LOCALE 'C' ENCODING";
        for (name, options) in
            [("plain", ""), ("latin", "LATIN1"), ("raw", "SQL_ASCII"), ("left_out", ""), ("closed", "")]
        {
            let options = if options.is_empty() { String::new() } else { format!("{make} '{options}'") };
            server.sql("postgres", &format!("CREATE DATABASE {name} {options}")).unwrap();
        }
        server.sql("postgres", "ALTER DATABASE closed ALLOW_CONNECTIONS false").unwrap();
        server.sql("plain", "CREATE TABLE t AS SELECT 'grün' AS x").unwrap();
        server.sql("latin", "CREATE TABLE t AS SELECT chr(252) AS x").unwrap();
        server.sql("raw", "CREATE TABLE t AS SELECT E'\\xfc\\xff'::text AS x").unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let settings = on_server(server.port(), &bin, json!({ "host": "localhost", "excludeDatabases": ["left_*"] }));
        let context = Context::default();
        let driver = trial::open(&REGISTRATION, settings.clone(), scratch.path()).unwrap();
        let error = run(driver.prepare(&context)).unwrap_err();
        assert_eq!(error.kind(), Kind::PermissionDenied, "{error:?}");
        assert!(error.to_string().contains("`closed`") && error.hint_text().unwrap().contains("excludeDatabases"));
        let mut settings = settings;
        settings["excludeDatabases"] = json!(["left_*", "closed"]);
        let driver = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        run(driver.prepare(&context)).unwrap();
        server.sql("postgres", "CREATE DATABASE late").unwrap();
        for number in 1..=2 {
            let error = run(driver.cut(&context, &trial::cut_id(number))).unwrap_err();
            assert_eq!((error.kind(), error.is_temporary()), (Kind::Conflict, true), "{error:?}");
        }
        server.sql("postgres", "DROP DATABASE late").unwrap();
        run(driver.cut(&context, &trial::cut_id(3))).unwrap();
        run(driver.release(&context, &[])).unwrap();
        let identity = run(driver.identity(&context)).unwrap();
        assert_eq!(identity.endpoint, format!("127.0.0.1:{}", server.port()));
        assert!(identity.native.unwrap().parse::<u64>().is_ok());
        let (tree, drained) = trial::back_up(&driver, None);
        let read = |path: &str| read_small(&tree, &TreePath::parse(path).unwrap(), 1 << 20).unwrap();
        let about = layout::Server::parse(&read("server.json")).unwrap();
        assert_eq!(about.databases, ["latin", "plain", "postgres", "raw"]);
        assert_eq!(read("databases/plain/data/public.t/00000000.copy"), "grün\n".as_bytes());
        assert_eq!(read("databases/latin/data/public.t/00000000.copy"), b"\xfc\n");
        assert_eq!(read("databases/raw/data/public.t/00000000.copy"), b"\xfc\xff\n");
        assert_eq!(drained.items, 3);
        assert!(drained.checksums.contains_key("plain/public.t"), "{:?}", drained.checksums);
        run(driver.execute(&context, "CREATE TABLE made (n int); INSERT INTO made VALUES (1)")).unwrap();
        assert_eq!(server.sql("postgres", "SELECT n FROM public.made").unwrap(), "1");
    }
}

#[test]
fn what_the_settings_leave_out_is_in_no_point() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute(
            "CREATE SCHEMA app; CREATE SCHEMA logs; CREATE TABLE app.models (id serial); CREATE TABLE app.tmp_1 (id serial); \
             CREATE TABLE app.cache AS SELECT 1 AS n; CREATE TABLE logs.lines (x text); \
             CREATE FUNCTION logs.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        );
        let driver = own.open(json!({
            "excludeSchemas": ["logs"], "excludeTables": ["app.tmp_?"], "excludeRows": ["app.cache"], "roles": "none",
        }));
        let (tree, _) = trial::back_up(&driver, None);
        let definitions = own.text(&tree, "pre-data.sql");
        for (word, there) in [("app.models", true), ("app.cache", true), ("tmp_1", false), ("logs", false)] {
            assert_eq!(definitions.contains(word), there, "{word}");
        }
        let tables: Vec<Table> = layout::parse_lines("tables", &own.file(&tree, "tables.ndjson")).unwrap();
        let kept: Vec<_> = tables.iter().map(|table| (table.name.as_str(), table.rows_kept)).collect();
        assert_eq!(kept, [("cache", false), ("models", true)]);
        let sequences = own.text(&tree, "sequences.sql");
        assert!(sequences.contains("models_id_seq") && !sequences.contains("tmp_1_id_seq"), "{sequences}");
        assert!(tree.get(&TreePath::parse("globals.sql").unwrap()).unwrap().is_none());
    }
}

#[test]
fn the_name_of_the_stamp_belongs_to_whoever_had_it_first() {
    for rig in rigs() {
        let own = Own::new(&rig);
        let driver = own.open(json!({}));
        let context = Context::default();
        run(driver.stamp(&context, &way_back::the_stamp())).unwrap();
        assert_eq!(run(driver.occupied(&context)).unwrap(), None);
        own.execute("CREATE TABLE stillpoint.theirs AS SELECT 7 AS n");
        assert!(run(driver.occupied(&context)).unwrap().unwrap().contains("1 tables"));
        let (tree, _) = trial::back_up(&driver, None);
        assert_eq!(own.text(&tree, "data/stillpoint.theirs/00000000.copy"), "7\n");
        let definitions = own.text(&tree, "pre-data.sql");
        assert!(
            definitions.contains("stillpoint.theirs") && !definitions.contains("stillpoint.stamp"),
            "{definitions}"
        );
        trial::restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
        assert_eq!(own.session().query_one("SELECT n FROM stillpoint.theirs").unwrap().text(0).unwrap(), "7");
        run(driver.stamp(&context, &way_back::the_stamp())).unwrap();
        assert_eq!(run(driver.read_stamp(&context)).unwrap(), Some(way_back::the_stamp()));
        assert_eq!(trial::differences(&driver, &tree), Vec::<String>::new());
        let kept = format!("DROP DATABASE IF EXISTS {}__before_r1 WITH (FORCE)", own.name);
        rig.session("postgres").execute(&kept).unwrap();

        own.execute("DROP TABLE stillpoint.stamp; CREATE VIEW stillpoint.stamp AS SELECT (1 / 0)::text AS stamp");
        assert_eq!(run(driver.read_stamp(&context)).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(run(driver.stamp(&context, &way_back::the_stamp())).unwrap_err().kind(), Kind::Conflict);
        own.execute(
            "DROP VIEW stillpoint.stamp; INSERT INTO stillpoint.opening VALUES (0, 'CREATE TABLE public.made (n int)')",
        );
        assert_eq!(run(driver.stamp(&context, &way_back::the_stamp())).unwrap_err().kind(), Kind::Conflict);
    }
}

#[test]
fn what_merely_has_the_name_of_the_stamp_is_not_left_out_in_silence() {
    for rig in rigs() {
        let own = Own::new(&rig);
        let context = Context::default();
        own.execute("CREATE SCHEMA stillpoint; CREATE TABLE stillpoint.stamp (id int, ink text)");
        let driver = own.open(json!({}));
        assert!(run(driver.occupied(&context)).unwrap().unwrap().contains("1 tables"));
        let error = run(driver.prepare(&context)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
        assert!(error.to_string().contains("`stillpoint.stamp`"), "{error}");
        assert!(error.hint_text().unwrap().contains("excludeTables"), "{error:?}");
        let warnings = run(driver.probe(&context)).unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.contains("`stillpoint.stamp`")), "{warnings:?}");
        trial::back_up(&own.open(json!({ "excludeTables": ["stillpoint.stamp"] })), None);

        own.execute("DROP TABLE stillpoint.stamp; CREATE TABLE stillpoint.theirs AS SELECT 7 AS n");
        run(driver.stamp(&context, &way_back::the_stamp())).unwrap();
        let (tree, _) = trial::back_up(&driver, None);
        let schema = format!("databases/{}/schemas/stillpoint", own.name);
        let error = trial::restore(&driver, &tree, RestoreMode::InPlace, Some(&schema)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
        assert_eq!(run(driver.read_stamp(&context)).unwrap(), Some(way_back::the_stamp()));
        let table = format!("databases/{}/data/stillpoint.theirs", own.name);
        trial::restore(&driver, &tree, RestoreMode::InPlace, Some(&table)).unwrap();
        assert_eq!(run(driver.read_stamp(&context)).unwrap(), Some(way_back::the_stamp()));
    }
}

#[test]
fn databases_of_one_store_must_agree_on_whose_they_are() {
    for rig in rigs() {
        let (one, two) = (Own::new(&rig), Own::new(&rig));
        let context = Context::default();
        let both = one.open(json!({ "databases": [one.name, two.name] }));
        let of = |own: &Own<'_>, environment: &str| {
            let stamp =
                stillpoint_core::position::Stamp { environment: environment.to_owned(), ..way_back::the_stamp() };
            run(own.open(json!({})).stamp(&context, &stamp)).unwrap();
        };
        let read = || run(both.read_stamp(&context));
        of(&one, "staging");
        assert_eq!(read().unwrap().unwrap().environment, "staging", "the other one holds nothing");
        two.execute("CREATE TABLE public.t (n int)");
        let error = read().unwrap_err();
        assert_eq!(error.kind(), Kind::Fenced, "{error:?}");
        assert!(error.to_string().contains(&format!("`{}` bears no stamp", two.name)), "{error}");
        of(&two, "production");
        let error = read().unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
        assert!(error.to_string().contains("churn · production"), "{error}");
        of(&two, "staging");
        assert_eq!(read().unwrap().unwrap().environment, "staging");
        // A table of the stamp without a row says nothing, and neither order hides the other.
        one.execute("DELETE FROM stillpoint.stamp; CREATE TABLE public.t (n int)");
        assert_eq!(read().unwrap_err().kind(), Kind::Fenced);
    }
}

#[test]
fn tables_that_change_their_names_during_the_cut_are_named() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT 1 AS n");
        let driver = own.open(json!({}));
        run(driver.prepare(&Context::default())).unwrap();
        let pin = run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        // A schema's name can change although its tables are held.
        own.execute("ALTER SCHEMA public RENAME TO old; CREATE SCHEMA public; CREATE TABLE public.t AS SELECT 2 AS n");
        let error = trial::drain(&driver, &pin, None).unwrap_err();
        assert_eq!(error.kind(), Kind::PinLost, "{error:?}");
        assert!(error.to_string().contains("`public.t`"), "{error}");
        run(driver.release(&Context::default(), &[])).unwrap();

        let pin = trial::pin(&driver, 2);
        trial::drain(&driver, &pin, None).unwrap();
        own.execute("ALTER SCHEMA public RENAME TO older; CREATE SCHEMA public; CREATE VIEW public.t AS SELECT 3 AS n");
        let lost = run(driver.still_valid(&Context::default(), &pin)).unwrap();
        assert!(matches!(&lost, Validity::Lost(why) if why.contains("`public.t`")), "{lost:?}");
        run(driver.release(&Context::default(), &[])).unwrap();
    }
}

#[test]
fn sessions_that_copy_read_no_view_and_queries_of_references_do() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT 'key' AS k; CREATE VIEW public.v AS SELECT k FROM public.t");
        let known = "SELECT 1 FROM pg_settings WHERE name = 'restrict_nonsystem_relation_kind'";
        if own.session().query(known).unwrap().is_empty() {
            stillpoint_testkit::skip(rig.name, "the server knows no restrict_nonsystem_relation_kind");
            continue;
        }
        let pool = Arc::new(Pool::new(&endpoint(&rig.url), &own.name, 1));
        let mut control = own.session();
        control.execute(pool::BEGIN).unwrap();
        let exported = control.query_one("SELECT pg_export_snapshot()").unwrap();
        pool.show(exported.text(0).unwrap());
        let mut lease = pool.take(&Context::default()).unwrap();
        assert_eq!(lease.session().unwrap().query("SELECT k FROM public.t").unwrap().len(), 1);
        assert!(lease.session().unwrap().query("SELECT k FROM public.v").is_err());
        let driver = own.open(json!({}));
        let pin = trial::pin(&driver, 1);
        let query = EdgeQuery::From("SELECT k FROM v".to_owned());
        assert_eq!(trial::edges(&driver, Some(&pin), &query).unwrap().len(), 1);
        run(driver.release(&Context::default(), &[])).unwrap();
    }
}

#[test]
fn a_point_of_a_server_at_rest_is_a_base_for_the_next_one() {
    for Rig { name, bin, .. } in rigs() {
        let server = servers::Postgres::start(bin.as_ref(), &["autovacuum=off", "full_page_writes=off"]).unwrap();
        server.sql("postgres", "CREATE TABLE t AS SELECT n, repeat('x', 500) FROM generate_series(1, 3000) n").unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let settings = on_server(server.port(), &bin, json!({}));
        let driver = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        let is_settled = |tree: &MemoryTree| {
            let path = TreePath::parse("databases/postgres/database.json").unwrap();
            let about: layout::Database =
                layout::parse("database", &read_small(tree, &path, 1 << 20).unwrap()).unwrap();
            about.settled
        };
        let (mut parent, _) = trial::back_up(&driver, None);
        for happening in [
            "SELECT 1",
            // A new segment begins with a header that nobody has written yet.
            "SELECT pg_switch_wal()",
            "SET synchronous_commit = off; UPDATE t SET n = -n WHERE n = 5",
            "CHECKPOINT",
        ] {
            server.sql("postgres", happening).unwrap();
            let before = run(driver.observe(&Context::default())).unwrap();
            let (tree, drained) = trial::back_up(&driver, Some(&parent));
            assert!(is_settled(&tree), "{name}: {happening}");
            assert_eq!(run(driver.observe(&Context::default())).unwrap(), before, "{name}: the backup is no write");
            assert!(drained.bytes_read * 2 < drained.bytes, "{name}: {happening}: {drained:?}");
            parent = tree;
        }
    }
}

/// What two points have below `data`, and what they counted.
fn rows_of(own: &Own<'_>, tree: &MemoryTree) -> (Vec<(String, Vec<u8>)>, Vec<Total>) {
    let folder = TreePath::parse(&format!("databases/{}/data", own.name)).unwrap();
    let mut files = Vec::new();
    let mut tables = Vec::new();
    tree.list(&folder, &mut |node| {
        tables.push(node.name);
        Ok(true)
    })
    .unwrap();
    for table in tables {
        let path = folder.join(&table).unwrap();
        tree.list(&path, &mut |node| {
            let path = path.join(&node.name)?;
            files.push((path.to_string(), read_small(tree, &path, 1 << 30)?));
            Ok(true)
        })
        .unwrap();
    }
    let totals = read_small(tree, &TreePath::parse("totals.ndjson").unwrap(), 1 << 20).unwrap();
    (files, layout::parse_lines("totals", &totals).unwrap())
}

/// Something that may happen to a table between two points.
fn happening(random: &mut fastrand::Rng) -> String {
    let table = ["a", "b", "kids_1", "kids_2"][random.usize(..4)];
    let (from, to) = (random.u32(..3000), random.u32(1..40));
    let range = format!("id BETWEEN {from} AND {}", from + to);
    match random.u32(..22) {
        0..4 => format!("UPDATE public.{table} SET v = v || 'u' WHERE {range}"),
        4..7 => format!("DELETE FROM public.{table} WHERE {range}"),
        7..10 => format!("INSERT INTO public.{table} SELECT n, 'new' FROM generate_series({from}, {}) n", from + to),
        10 => format!("BEGIN; UPDATE public.{table} SET v = 'gone' WHERE {range}; ROLLBACK"),
        11 => format!("VACUUM public.{table}"),
        12 => format!("VACUUM FREEZE public.{table}"),
        13 => format!("VACUUM FULL public.{table}"),
        14 => format!("CLUSTER public.{table} USING {table}_id"),
        15 => format!(
            "TRUNCATE public.{table}; INSERT INTO public.{table} SELECT n, 'anew' FROM generate_series(1, 500) n"
        ),
        16 => format!(
            "BEGIN; INSERT INTO public.{table} VALUES ({from}, 'x'); SAVEPOINT s; DELETE FROM public.{table} WHERE {range}; \
             ROLLBACK TO s; INSERT INTO public.{table} VALUES ({to}, 'y'); COMMIT"
        ),
        17 => {
            "ALTER TYPE public.mood RENAME VALUE 'sad' TO 'glum'; ALTER TYPE public.mood RENAME VALUE 'glum' TO 'sad'; \
               ALTER TYPE public.mood ADD VALUE IF NOT EXISTS 'new'"
                .to_owned()
        }
        18 => "UPDATE public.typed SET n = n + 1 WHERE n % 50 = 0".to_owned(),
        19 => "ALTER TABLE public.typed DROP COLUMN IF EXISTS extra; ALTER TABLE public.typed ADD extra int DEFAULT 7"
            .to_owned(),
        20 => format!(
            "DELETE FROM public.{table}; INSERT INTO public.{table} SELECT n, 'same' FROM generate_series(1, 400) n"
        ),
        _ => format!("SELECT count(*) FROM public.{table} WHERE {range} FOR UPDATE"),
    }
}

#[test]
fn a_point_with_a_parent_equals_one_without_whatever_happened() {
    let mut saved = (0, 0);
    for rig in rigs() {
        let own = Own::new(&rig);
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for table in ["a", "b"] {
            own.execute(&format!(
                "CREATE TABLE public.{table} (id int, v text); CREATE INDEX {table}_id ON public.{table} (id); \
                 INSERT INTO public.{table} SELECT n, repeat('x', 900) FROM generate_series(1, 3000) n"
            ));
        }
        own.execute(
            "CREATE TABLE public.kids (id int, v text) PARTITION BY HASH (id); \
             CREATE TABLE public.kids_1 PARTITION OF public.kids FOR VALUES WITH (MODULUS 1, REMAINDER 0); \
             CREATE TABLE public.kids_2 (id int, v text); CREATE INDEX kids_1_id ON public.kids_1 (id); \
             CREATE INDEX kids_2_id ON public.kids_2 (id); INSERT INTO public.kids SELECT n, 'k' FROM generate_series(1, 9000) n; \
             CREATE TYPE public.mood AS ENUM ('sad', 'ok'); \
             CREATE TABLE public.typed (n int, m public.mood, r regclass, tags text[]); \
             INSERT INTO public.typed SELECT n, 'sad', 'pg_class', ARRAY['a', NULL] FROM generate_series(1, 3000) n",
        );
        let driver = own.open(json!({}));
        let (mut parent, _) = trial::back_up(&driver, None);
        for _ in 0..12 {
            for _ in 0..random.u32(..4) {
                let sql = happening(&mut random);
                // A statement of its own each: VACUUM and ALTER TYPE want that.
                let mut session = own.session();
                for one in sql.split("; ") {
                    if let Err(error) = session.execute(one) {
                        // Names that are there already, and the like.
                        println!("{one}: {error}");
                    }
                }
            }
            let pin = trial::pin(&driver, 1);
            let (with, drained) = trial::drain(&driver, &pin, Some(&parent)).unwrap();
            let (without, _) = trial::drain(&driver, &pin, None).unwrap();
            run(driver.release(&Context::default(), &[])).unwrap();
            assert_eq!(rows_of(&own, &with.tree), rows_of(&own, &without.tree), "seed {seed}");
            saved = (saved.0 + drained.bytes_read, saved.1 + drained.bytes);
            parent = with.tree;
        }
    }
    assert!(saved.0 * 3 < saved.1 * 2 || saved.1 == 0, "reads much of what did not change: {saved:?}");
}

#[test]
fn positions_are_equal_exactly_while_nobody_writes_and_edges_show_the_view() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.refs (id int, key text); INSERT INTO public.refs VALUES (1, 'a/b'), (2, NULL), (3, E't\\tab')");
        let driver = own.open(json!({}));
        let context = Context::default();
        let pin = trial::pin(&driver, 1);
        own.execute("INSERT INTO public.refs VALUES (4, 'late')");
        let before = run(driver.observe(&context)).unwrap().unwrap();
        own.execute("UPDATE public.refs SET id = 5 WHERE id = 4");
        assert_ne!(run(driver.observe(&context)).unwrap().unwrap(), before);
        assert_ne!(pin.position, before);
        let query = EdgeQuery::From("SELECT key, 'refs ' || id FROM refs ORDER BY id;".to_owned());
        let found = trial::edges(&driver, Some(&pin), &query).unwrap();
        let keys: Vec<_> = found.iter().map(|edge| (edge.referent.as_slice(), edge.owner.as_str())).collect();
        assert_eq!(keys, [(&b"a/b"[..], "refs 1"), (b"t\tab", "refs 3")]);
        assert_eq!(trial::edges(&driver, None, &query).unwrap().len(), 3);
        let again = run(driver.cut(&context, &trial::cut_id(1))).unwrap();
        assert_eq!(again, pin);
        let other = run(driver.cut(&context, &trial::cut_id(2))).unwrap();
        assert_eq!(trial::edges(&driver, Some(&other), &query).unwrap().len(), 3);
        assert!(trial::edges(&driver, Some(&pin), &query).is_err());
        let refused = EdgeQuery::From("DELETE FROM refs RETURNING key".to_owned());
        assert!(trial::edges(&driver, None, &refused).is_err());
    }
}

/// Stores of the conformance suite: databases of a server that nobody else uses, because a position
/// moves with every transaction of the server.
struct PostgresHarness {
    server: servers::Postgres,
    bin: String,
}

impl PostgresHarness {
    fn subject(&self, tables: bool) -> Box<dyn Subject> {
        let name = format!("suite_{:016x}", fastrand::u64(..));
        if tables {
            self.server.sql("postgres", &format!("CREATE DATABASE {name}")).unwrap();
        }
        let url: url::Url = self.server.url(&name).parse().unwrap();
        let subject = PostgresSubject { url, bin: self.bin.clone(), name, scratch: tempfile::tempdir().unwrap() };
        if tables {
            subject.sql(
                &TABLES.map(|table| format!("CREATE TABLE {table} (key text PRIMARY KEY, value bytea);")).concat(),
            );
        }
        Box::new(subject)
    }
}

/// A key below `deep` has a table of its own, so that a part can hold it alone.
const TABLES: [&str; 2] = ["items", "deep"];

fn table_of(key: &str) -> &'static str {
    if key.starts_with("deep/") { "deep" } else { "items" }
}

impl Harness for PostgresHarness {
    fn source(&self) -> stillpoint_core::Result<Box<dyn Subject>> {
        Ok(self.subject(true))
    }

    fn target(&self) -> stillpoint_core::Result<Box<dyn Subject>> {
        Ok(self.subject(false))
    }

    /// A small table is read whole if anything in it changed, and values are written in hex.
    fn incremental_read_bytes_max(&self, content_bytes: u64) -> u64 {
        content_bytes * 3
    }

    fn part_of(&self, tree: &MemoryTree, key: &str) -> stillpoint_core::Result<Option<TreePath>> {
        let mut database = None;
        tree.list(&TreePath::parse("databases")?, &mut |node| {
            database = Some(String::from_utf8(node.name).unwrap());
            Ok(true)
        })?;
        TreePath::parse(&format!("databases/{}/data/public.{}", database.unwrap(), table_of(key))).map(Some)
    }
}

/// One database, read and written by the server's own `psql`.
struct PostgresSubject {
    url: url::Url,
    bin: String,
    name: String,
    scratch: tempfile::TempDir,
}

impl PostgresSubject {
    fn sql(&self, statements: &str) -> String {
        use std::io::Write;
        let mut child = std::process::Command::new(std::path::Path::new(&self.bin).join("psql"))
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-", self.url.as_str()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let text = statements.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success(), "{statements:.200}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for PostgresSubject {
    fn drop(&mut self) {
        let mut other = self.url.clone();
        other.set_path("postgres");
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        drop(servers::sql(self.bin.as_ref(), other.as_str(), &sql));
    }
}

impl Subject for PostgresSubject {
    fn open(&self) -> stillpoint_core::Result<Arc<dyn Driver>> {
        let settings = on_server(self.url.port().unwrap(), &self.bin, json!({ "databases": [self.name] }));
        trial::open(&REGISTRATION, settings, self.scratch.path())
    }

    fn put(&self, key: &str, value: &[u8]) -> stillpoint_core::Result<()> {
        let (table, value) = (table_of(key), hex::encode(value));
        self.sql(&format!(
            "INSERT INTO {table} VALUES ('{key}', '\\x{value}') ON CONFLICT (key) DO UPDATE SET value = excluded.value;"
        ));
        Ok(())
    }

    fn delete(&self, key: &str) -> stillpoint_core::Result<()> {
        self.sql(&format!("DELETE FROM {} WHERE key = '{key}';", table_of(key)));
        Ok(())
    }

    fn read(&self) -> stillpoint_core::Result<Content> {
        let mut content = Content::new();
        let mut other = self.url.clone();
        other.set_path("postgres");
        let sql = format!("SELECT count(*) FROM pg_database WHERE datname = '{}'", self.name);
        if servers::sql(self.bin.as_ref(), other.as_str(), &sql).unwrap() == "0" {
            return Ok(content);
        }
        for table in TABLES {
            if self.sql(&format!("SELECT to_regclass('public.{table}') IS NOT NULL")).trim() != "t" {
                continue;
            }
            for line in self.sql(&format!("SELECT key, encode(value, 'hex') FROM {table}")).lines() {
                let (key, value) = line.split_once('|').unwrap();
                content.insert(key.to_owned(), hex::decode(value).unwrap());
            }
        }
        Ok(content)
    }

    fn edges(&self) -> stillpoint_core::Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        let sql = "SELECT key, 'item' FROM items UNION ALL SELECT key, 'deep' FROM deep";
        Ok(Some((EdgeQuery::From(sql.to_owned()), keys)))
    }
}

#[test]
fn keeps_the_contract() {
    for Rig { name, bin, .. } in rigs() {
        let server = servers::Postgres::start(bin.as_ref(), &["autovacuum=off"]).unwrap();
        let harness = PostgresHarness { server, bin };
        stillpoint_testkit::conformance::run(&harness).assert_clean(&format!("postgres ({name})"));
    }
}
