//! What goes wrong, and what the user reads. Tests only, apart from the others because each makes a
//! server misbehave.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use stillpoint_core::driver::{Context, Driver, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, Metadata, Node, Sink};
use stillpoint_testkit::servers;

use super::REGISTRATION;
use super::tests::{Own, Rig, on_server, rigs};
use crate::trial::{self, run};

fn prepare(driver: &Arc<dyn Driver>) -> Result<()> {
    run(driver.prepare(&Context::default())).map(drop)
}

/// The sentence, the hint and all causes, as a terminal shows them.
fn shown(error: &Error) -> String {
    format!("{error:?}\nhint: {}", error.hint_text().unwrap_or_default())
}

/// Ends all sessions of ours on the test's own database.
fn end_sessions(own: &Own<'_>) {
    let sql = format!(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{}' AND pid <> pg_backend_pid()",
        own.name
    );
    own.rig.session("postgres").execute(&sql).unwrap();
}

/// Hands contents to nobody until `server.json` comes; then does what the test wants, and reads them.
struct Late<'a> {
    contents: Vec<Box<dyn Content>>,
    hook: Option<Box<dyn FnOnce() + Send + 'a>>,
    bytes: u64,
}

impl<'a> Late<'a> {
    fn new(hook: impl FnOnce() + Send + 'a) -> Self {
        Self { contents: Vec::new(), hook: Some(Box::new(hook)), bytes: 0 }
    }
}

impl Sink for Late<'_> {
    fn enter(&mut self, _: &[u8], _: &Metadata) -> Result<()> {
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        Ok(())
    }

    fn file(&mut self, name: &[u8], _: &Metadata, _: Option<u64>, content: Box<dyn Content>) -> Result<()> {
        self.contents.push(content);
        if name == b"server.json" {
            if let Some(hook) = self.hook.take() {
                hook();
            }
            for mut content in self.contents.drain(..) {
                let mut buffer = vec![0; 1 << 20];
                loop {
                    match content.read(&mut buffer)? {
                        0 => break,
                        count => self.bytes += count as u64,
                    }
                }
                content.finish()?;
            }
        }
        Ok(())
    }

    fn node(&mut self, _: &Node) -> Result<()> {
        Ok(())
    }

    fn parent(&mut self, _: &[u8]) -> Result<Option<Node>> {
        Ok(None)
    }

    fn reuse(&mut self, _: &[u8], _: &Metadata) -> Result<()> {
        Ok(())
    }
}

fn drain_late(driver: &Arc<dyn Driver>, pin: &Pin, hook: impl FnOnce() + Send) -> Result<u64> {
    let mut sink = Late::new(hook);
    run(driver.drain(&Context::default(), pin, &mut sink, None))?;
    Ok(sink.bytes)
}

#[test]
fn a_server_that_is_down_a_wrong_password_and_a_missing_database_are_named() {
    for rig in rigs() {
        let own = Own::new(&rig);
        let error = prepare(&own.open(json!({ "port": 1 }))).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true));
        assert!(shown(&error).contains("cannot connect to 127.0.0.1:1"), "{}", shown(&error));
        let error = prepare(&own.open(json!({ "password": "wrong" }))).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unauthenticated, false));
        assert!(shown(&error).contains("password authentication failed for user \"postgres\""), "{}", shown(&error));
        assert!(!shown(&error).contains("wrong"), "a password is no part of a message");
        let error = prepare(&own.open(json!({ "databases": ["absent"] }))).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(shown(&error).contains("absent"), "{}", shown(&error));
        let error = prepare(&own.open(json!({ "tools": "/nonexistent" }))).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(shown(&error).contains("install postgresql-client-"), "{}", shown(&error));
        let error = prepare(&own.open(json!({ "tls": "require" }))).unwrap_err();
        assert!(shown(&error).contains("offers no TLS"), "{}", shown(&error));
    }
}

#[test]
fn missing_privileges_are_named_with_what_grants_them() {
    for rig in rigs() {
        let own = Own::new(&rig);
        let role = format!("weak_{:08x}", fastrand::u32(..));
        own.execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'weak'; CREATE SCHEMA billing; CREATE TABLE billing.invoices (id serial); \
             CREATE TABLE public.open (id int); GRANT SELECT ON public.open TO {role}; \
             ALTER TABLE public.open ENABLE ROW LEVEL SECURITY; SELECT lo_create(1)"
        ));
        let as_role = json!({ "user": role, "password": "weak" });
        let driver = own.open(as_role.clone());
        let error = prepare(&driver).unwrap_err();
        assert_eq!(error.kind(), Kind::PermissionDenied);
        let read = shown(&error);
        assert!(read.contains("billing.invoices") && read.contains("GRANT pg_read_all_data TO"), "{read}");
        let probe = run(driver.probe(&Context::default())).unwrap();
        let missing = probe.missing_privileges.join("\n");
        for word in ["billing.invoices", "invoices_id_seq", "BYPASSRLS", "pg_largeobject"] {
            assert!(missing.contains(word), "{word} in {missing}");
        }
        own.execute(&format!(
            "GRANT USAGE ON SCHEMA billing TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA billing, public TO {role}; \
             GRANT SELECT ON ALL SEQUENCES IN SCHEMA billing TO {role}"
        ));
        let error = prepare(&driver).unwrap_err();
        assert!(shown(&error).contains("row security hides rows of table `public.open`"), "{}", shown(&error));
        let mut excluded = as_role;
        excluded["excludeRows"] = json!(["public.open"]);
        let driver = own.open(excluded);
        let (tree, drained) = trial::back_up(&driver, None);
        assert_eq!(drained.losses.len(), 1, "the large object");
        assert!(drained.losses[0].why.contains("may not read them"), "{:?}", drained.losses);
        assert!(drained.notes.iter().any(|note| note.contains("passwords of roles")));
        assert!(own.text(&tree, "pre-data.sql").contains("CREATE TABLE public.open"));
        drop(driver);
        own.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"));
    }
}

#[test]
fn a_lost_connection_is_noticed_in_every_phase() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT n FROM generate_series(1, 1000) n");
        let context = Context::default();
        let driver = own.open(json!({}));
        prepare(&driver).unwrap();
        end_sessions(&own);
        let error = run(driver.cut(&context, &trial::cut_id(1))).unwrap_err();
        assert!(error.is_temporary(), "{}", shown(&error));
        assert_eq!(error.kind(), Kind::Unreachable, "{}", shown(&error));
        run(driver.release(&context, &[])).unwrap();

        let pin = trial::pin(&driver, 2);
        end_sessions(&own);
        let error = trial::drain(&driver, &pin, None).unwrap_err();
        assert!(error.is_temporary(), "{}", shown(&error));
        assert!(matches!(run(driver.still_valid(&context, &pin)).unwrap(), Validity::Lost(_)));
        run(driver.release(&context, &[])).unwrap();

        let pin = trial::pin(&driver, 3);
        let error = drain_late(&driver, &pin, || end_sessions(&own)).unwrap_err();
        assert!(error.is_temporary(), "{}", shown(&error));
        assert!(matches!(error.kind(), Kind::Unreachable | Kind::PinLost), "{}", shown(&error));
        run(driver.release(&context, &[])).unwrap();

        let pin = trial::pin(&driver, 4);
        trial::drain(&driver, &pin, None).unwrap();
        end_sessions(&own);
        let lost = run(driver.still_valid(&context, &pin)).unwrap();
        assert!(matches!(&lost, Validity::Lost(why) if why.contains("view of database")), "{lost:?}");
        run(driver.release(&context, &[])).unwrap();
        trial::back_up(&driver, None);
    }
}

#[test]
fn tables_that_vanish_after_the_cut_are_in_the_point() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT n FROM generate_series(1, 1000) n");
        let driver = own.open(json!({}));
        let pin = trial::pin(&driver, 1);
        let mut dropper = None;
        let bytes = drain_late(&driver, &pin, || {
            let mut session = own.session();
            dropper = Some(std::thread::spawn(move || session.execute("DROP TABLE public.t")));
            std::thread::sleep(Duration::from_millis(300));
        })
        .unwrap();
        assert!(bytes > 3893, "the rows are in the point");
        let dropper = dropper.unwrap();
        assert!(!dropper.is_finished(), "it waits for the view");
        assert_eq!(run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid);
        run(driver.release(&Context::default(), &[])).unwrap();
        dropper.join().unwrap().unwrap();
    }
}

#[test]
fn truncation_cannot_empty_a_point() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT n FROM generate_series(1, 1000) n");
        let driver = own.open(json!({}));
        prepare(&driver).unwrap();
        let error = own.session().execute("SET lock_timeout = '100ms'; TRUNCATE public.t").unwrap_err();
        assert_eq!(error.kind(), Kind::Locked, "{}", shown(&error));
        own.execute("CREATE TABLE public.late AS SELECT 1 AS n");
        let pin = run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        own.execute("TRUNCATE public.late");
        let error = trial::drain(&driver, &pin, None).unwrap_err();
        assert_eq!(error.kind(), Kind::PinLost, "{}", shown(&error));
        assert!(shown(&error).contains("`public.late`"), "{}", shown(&error));
        run(driver.release(&Context::default(), &[])).unwrap();

        own.execute("DROP TABLE public.late");
        prepare(&driver).unwrap();
        own.execute("CREATE TABLE public.late AS SELECT 1 AS n");
        let pin = run(driver.cut(&Context::default(), &trial::cut_id(2))).unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        assert_eq!(own.text(&drain.tree, "data/public.late/00000000.copy"), "1\n");
        run(driver.release(&Context::default(), &[])).unwrap();
    }
}

#[test]
fn a_table_that_someone_holds_is_named_with_who_holds_it() {
    for rig in rigs() {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t (n int)");
        let mut migration = own.session();
        migration.execute("BEGIN; LOCK TABLE public.t IN ACCESS EXCLUSIVE MODE").unwrap();
        let error = prepare(&own.open(json!({ "lockTimeoutSeconds": 1 }))).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Locked, true));
        let read = shown(&error);
        assert!(read.contains("table `public.t`") && read.contains(&migration.process().to_string()), "{read}");
    }
}

#[test]
fn a_server_that_restarts_during_the_drain_makes_no_point() {
    for Rig { bin, .. } in rigs() {
        let mut server = servers::Postgres::start(bin.as_ref(), &[]).unwrap();
        server.sql("postgres", "CREATE TABLE t AS SELECT n FROM generate_series(1, 1000) n").unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let settings = on_server(server.port(), &bin, json!({}));
        let driver = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        let pin = trial::pin(&driver, 1);
        let error = drain_late(&driver, &pin, || {
            server.kill().unwrap();
            server.start_again().unwrap();
        })
        .unwrap_err();
        assert!(error.is_temporary(), "{}", shown(&error));
        let lost = run(driver.still_valid(&Context::default(), &pin)).unwrap();
        assert!(matches!(lost, Validity::Lost(_)), "{lost:?}");
        run(driver.release(&Context::default(), &[])).unwrap();
        trial::back_up(&driver, None);
        server.stop().unwrap();
        let error = prepare(&driver).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{}", shown(&error));
    }
}

#[test]
fn a_standby_is_drained_and_its_conflicts_are_told() {
    for Rig { bin, .. } in rigs() {
        let primary = servers::Postgres::start(bin.as_ref(), &["autovacuum=off"]).unwrap();
        primary
            .sql(
                "postgres",
                "CREATE TABLE t AS SELECT n FROM generate_series(1, 1000) n; CREATE UNLOGGED TABLE u (n int)",
            )
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(folder.path(), Some(65534), Some(65534)).ok();
        let mut copy = servers::not_as_root(&std::path::Path::new(&bin).join("pg_basebackup"));
        copy.args(["-R", "-X", "stream", "-c", "fast", "-D"]).arg(folder.path().join("data"));
        assert!(copy.args(["-d", &primary.url("postgres")]).status().unwrap().success());
        let settings = ["max_standby_streaming_delay=0", "max_standby_archive_delay=0"];
        let standby = servers::Postgres::over(bin.as_ref(), folder, &settings).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let settings = on_server(standby.port(), &bin, json!({}));
        let driver = trial::open(&REGISTRATION, settings.clone(), scratch.path()).unwrap();
        let probe = run(driver.probe(&Context::default())).unwrap();
        assert!(probe.warnings.iter().any(|warning| warning.contains("allowStandby")), "{:?}", probe.warnings);
        assert_eq!(run(driver.prepare(&Context::default())).unwrap_err().kind(), Kind::Unsupported);
        let mut settings = settings;
        settings["allowStandby"] = json!(true);
        let driver = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        assert_eq!(run(driver.observe(&Context::default())).unwrap(), None);
        let probe = run(driver.probe(&Context::default())).unwrap();
        assert!(probe.warnings.iter().any(|warning| warning.contains("standby")), "{:?}", probe.warnings);
        assert!(!probe.capability.observes_writes);
        let (_, drained) = trial::back_up(&driver, None);
        assert!(drained.notes.iter().any(|note| note.contains("received and not applied")), "{:?}", drained.notes);
        assert_eq!(drained.items, 1000);
        assert!(drained.losses.iter().any(|loss| loss.what.contains("public.u")), "{:?}", drained.losses);
        let pin = trial::pin(&driver, 2);
        let error = drain_late(&driver, &pin, || {
            primary.sql("postgres", "DELETE FROM t").unwrap();
            primary.sql("postgres", "VACUUM t").unwrap();
            std::thread::sleep(Duration::from_secs(2));
        })
        .unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::PinLost, true), "{}", shown(&error));
        assert!(shown(&error).contains("standby"), "{}", shown(&error));
        run(driver.release(&Context::default(), &[])).unwrap();
    }
}

#[test]
fn more_tables_than_the_server_can_lock_are_said_to_be_too_many() {
    for Rig { bin, .. } in rigs() {
        let settings = ["max_locks_per_transaction=10", "max_connections=10", "max_prepared_transactions=0"];
        let server = servers::Postgres::start(bin.as_ref(), &settings).unwrap();
        for group in 0..20 {
            let make = "DO $$ BEGIN FOR n IN 0..59 LOOP EXECUTE format('CREATE TABLE t_%s_%s (n int)', GROUP, n); END LOOP; END $$";
            server.sql("postgres", &make.replace("GROUP", &group.to_string())).unwrap();
        }
        let scratch = tempfile::tempdir().unwrap();
        let settings = on_server(server.port(), &bin, json!({ "connections": 1 }));
        let driver = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        let probe = run(driver.probe(&Context::default())).unwrap();
        assert!(probe.warnings.iter().any(|warning| warning.contains("1200 tables")), "{:?}", probe.warnings);
        let error = prepare(&driver).unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted, "{}", shown(&error));
        assert!(shown(&error).contains("raise max_locks_per_transaction"), "{}", shown(&error));
    }
}

/// Answers every login with the messages in `script`.
fn pretend(script: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let script = script.clone();
            std::thread::spawn(move || {
                let mut head = [0; 1024];
                if stream.read(&mut head).is_ok() && stream.write_all(&script).is_ok() {
                    drop(stream.read(&mut head));
                    drop(stream.write_all(b"C\0\0\0\x08SET\0Z\0\0\0\x05I"));
                    drop(stream.read(&mut head));
                    // One row, one column: process 7.
                    drop(stream.write_all(b"D\0\0\0\x0b\0\x01\0\0\0\x017C\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I"));
                    drop(stream.read(&mut head));
                }
            });
        }
    });
    port
}

fn greeting(version: &str) -> Vec<u8> {
    let mut script = b"R\0\0\0\x08\0\0\0\0".to_vec();
    let parameter = [b"server_version\0".as_slice(), version.as_bytes(), b"\0"].concat();
    script.push(b'S');
    script.extend((parameter.len() as u32 + 4).to_be_bytes());
    script.extend(parameter);
    script.extend(b"K\0\0\0\x0c\0\0\0\x09\0\0\0\x01Z\0\0\0\x05I");
    script
}

#[test]
fn old_servers_poolers_and_strangers_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let open = |port: u16| {
        let settings =
            json!({ "host": "127.0.0.1", "port": port, "user": "u", "tls": "disable", "connectTimeoutSeconds": 2 });
        trial::open(&REGISTRATION, settings, scratch.path()).unwrap()
    };
    let error = prepare(&open(pretend(greeting("9.6.24")))).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(shown(&error).contains("PostgreSQL 9.6.24 is not supported"), "{}", shown(&error));
    let error = prepare(&open(pretend(greeting("16.4")))).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(
        shown(&error).contains("pooler") && shown(&error).contains("connect to the server itself"),
        "{}",
        shown(&error)
    );
    let error = prepare(&open(pretend(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()))).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(shown(&error).contains("something else may listen there"), "{}", shown(&error));
    let error = prepare(&open(pretend(Vec::new()))).unwrap_err();
    assert!(error.is_temporary(), "{}", shown(&error));
}

/// Hands bytes on between whoever connects and a server, until it is told to drop them all, or those of the
/// connections there are.
struct Wire {
    port: u16,
    cut: Arc<AtomicBool>,
    /// How often the connections there were have been forgotten.
    forgotten: Arc<AtomicU32>,
}

impl Wire {
    fn to(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, cut) = (listener.local_addr().unwrap().port(), Arc::<AtomicBool>::default());
        let (dropped, forgotten) = (Arc::clone(&cut), Arc::<AtomicU32>::default());
        let times = Arc::clone(&forgotten);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(one), false) = (stream, dropped.load(Ordering::Relaxed)) else { return };
                let other = std::net::TcpStream::connect(("127.0.0.1", server)).unwrap();
                let begun = times.load(Ordering::Relaxed);
                for (mut from, mut to) in [(one.try_clone().unwrap(), other.try_clone().unwrap()), (other, one)] {
                    let (dropped, times) = (Arc::clone(&dropped), Arc::clone(&times));
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            while dropped.load(Ordering::Relaxed) || times.load(Ordering::Relaxed) > begun {
                                std::thread::sleep(Duration::from_millis(100));
                            }
                            if to.write_all(&buffer[..count]).is_err() {
                                return;
                            }
                        }
                        drop(to.shutdown(std::net::Shutdown::Both));
                    });
                }
            }
        });
        Self { port, cut, forgotten }
    }

    /// Connections there are bring nothing any more, and nobody is told; new ones work.
    fn forget(&self) {
        self.forgotten.fetch_add(1, Ordering::Relaxed);
    }

    /// From now on nothing arrives, and nobody is told.
    fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
        // The listener looks up, and closes.
        drop(std::net::TcpStream::connect(("127.0.0.1", self.port)));
    }
}

#[test]
fn a_network_that_drops_everything_without_a_word_is_noticed() {
    for rig in rigs().into_iter().take(1) {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT n FROM generate_series(1, 1000) n");
        let wire = Wire::to(rig.port());
        let driver = own.open(json!({ "port": wire.port, "connectTimeoutSeconds": 2 }));
        let pin = trial::pin(&driver, 1);
        let error = drain_late(&driver, &pin, || wire.cut()).unwrap_err();
        assert!(error.is_temporary(), "{}", shown(&error));
        assert!(matches!(error.kind(), Kind::Unreachable | Kind::TimedOut), "{}", shown(&error));
        assert!(matches!(run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Lost(_)));
        run(driver.release(&Context::default(), &[])).unwrap();
    }
}

#[test]
fn connections_that_a_router_forgot_hang_neither_cut_nor_drain() {
    for rig in rigs().into_iter().take(1) {
        let own = Own::new(&rig);
        own.execute("CREATE TABLE public.t AS SELECT n FROM generate_series(1, 1000) n");
        let wire = Wire::to(rig.port());
        let driver = own.open(json!({ "port": wire.port, "connectTimeoutSeconds": 2, "lockTimeoutSeconds": 1 }));
        let context = Context::default();
        prepare(&driver).unwrap();
        wire.forget();
        let begun = Instant::now();
        let error = run(driver.cut(&context, &trial::cut_id(1))).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::TimedOut, true), "{}", shown(&error));
        assert!(begun.elapsed() < Duration::from_secs(10));
        run(driver.release(&context, &[])).unwrap();

        run(driver.observe(&context)).unwrap();
        wire.forget();
        assert!(run(driver.observe(&context)).unwrap_err().is_temporary());
        run(driver.release(&context, &[])).unwrap();

        // Both ends believe in these: the server waits for a query that never comes.
        let pin = trial::pin(&driver, 2);
        let error = drain_late(&driver, &pin, || wire.forget()).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{}", shown(&error));
        assert!(matches!(run(driver.still_valid(&context, &pin)).unwrap(), Validity::Lost(_)));
        run(driver.release(&context, &[])).unwrap();
        trial::back_up(&driver, None);
    }
}
