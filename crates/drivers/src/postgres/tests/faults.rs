//! What goes wrong on the way back, and what is left then: nothing, or what is said.

use super::super::swap::{Swap, Swapped, swap_all};
use super::way_back::{Names, count, every_feature, open, restore_as, rig_of, small, the_stamp, there};
use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use stillpoint_core::driver::RestoreRequest;

/// Ends sessions in the database that is being built, again and again after a pause of `millis`, while
/// `work` runs; how many were ended.
fn while_sessions_die<T>(rig: &Rig, names: &Names<'_>, millis: u64, work: impl FnOnce() -> T) -> (T, u64) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut admin = rig.session("postgres");
            let mut ended = 0;
            std::thread::sleep(Duration::from_millis(millis));
            while !stop.load(Ordering::Relaxed) && ended == 0 {
                let sql = format!(
                    "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
                     WHERE datname LIKE '{}%\\_\\_stillpoint\\_%' AND backend_type = 'client backend' LIMIT 1) s",
                    names.name("").replace('_', "\\_")
                );
                ended += admin.query_one(&sql).unwrap().number::<u64>(0).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
            ended
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        (done, killer.join().unwrap())
    })
}

#[test]
fn a_connection_that_is_lost_in_any_phase_leaves_nothing_behind() {
    let rigs = rigs();
    let Some(rig) = rig_of(&rigs, "POSTGRES") else { return };
    let names = Names::new(&[rig]);
    let scratch = tempfile::tempdir().unwrap();
    let source = every_feature(rig, &names, "source");
    let (tree, _) = trial::back_up(&open(rig, &source, json!({}), &scratch), None);
    let target = open(rig, &names.name("copy"), json!({}), &scratch);
    let begun = std::time::Instant::now();
    trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
    let whole = begun.elapsed().as_millis() as u64;
    let mut failures = 0;
    for step in 0..12 {
        rig.drop_database(&names.name("copy")).unwrap();
        let (done, ended) = while_sessions_die(rig, &names, whole * step / 12, || {
            trial::restore(&target, &tree, RestoreMode::Fresh, None)
        });
        match done {
            Ok(_) => {
                assert_eq!(there(rig, &names), ["copy", "source"], "step {step}");
                assert_eq!(trial::differences(&target, &tree), Vec::<String>::new(), "step {step}, {ended} ended");
            }
            Err(error) => {
                failures += 1;
                assert!(error.is_temporary() || ended > 0, "step {step}: {error:?}");
                assert_eq!(there(rig, &names), ["source"], "step {step}: {error:?}");
            }
        }
    }
    assert!(failures > 3, "only {failures} of 12 were hit");
}

#[test]
fn a_restore_that_was_killed_is_tried_again() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let name = small(&rig, &names, "app");
        let (tree, _) = trial::back_up(&open(&rig, &name, json!({}), &scratch), None);
        // What a process that is killed leaves: a database that is half built.
        let left = small(&rig, &names, "copy__stillpoint_r1");
        rig.user(&left).execute("DROP TABLE people CASCADE").unwrap();
        // And an empty database that somebody made for the restore.
        rig.session("postgres").execute(&format!("CREATE DATABASE {}", names.name("copy"))).unwrap();
        let target = open(&rig, &names.name("copy"), json!({}), &scratch);
        assert_eq!(run(target.occupied(&Context::default())).unwrap(), None);
        // Each try has a name of its own.
        let restored = restore_as(&target, &tree, ("r1-try3", RestoreMode::InPlace), None).unwrap();
        assert_eq!(restored.kept_old, Vec::<String>::new());
        assert_eq!(there(&rig, &names), ["app", "copy"]);
        assert_eq!(trial::differences(&target, &tree), Vec::<String>::new());
    }
}

#[test]
fn a_database_that_a_killed_restore_closed_is_opened_by_the_next_try() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let name = small(&rig, &names, "app");
        let target = open(&rig, &name, json!({}), &scratch);
        let (tree, _) = trial::back_up(&target, None);
        small(&rig, &names, "app__stillpoint_r1");
        rig.session("postgres").execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).unwrap();
        let restored = restore_as(&target, &tree, ("r1-try2", RestoreMode::InPlace), None).unwrap();
        assert_eq!(restored.kept_old.len(), 1);
        for name in [name.clone(), format!("{name}__before_r1-try2")] {
            assert_eq!(count(&rig, &name, "SELECT count(*) FROM people"), 20000, "{name} is open");
        }
    }
}

#[test]
fn a_restore_that_was_killed_right_after_its_swap_is_found_in_place() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let name = small(&rig, &names, "app");
        let target = open(&rig, &name, json!({}), &scratch);
        let (tree, _) = trial::back_up(&target, None);
        rig.user(&name).execute("DELETE FROM people WHERE id > 5").unwrap();
        let first = trial::restore(&target, &tree, RestoreMode::InPlace, None).unwrap();
        // The names are exchanged, and what is kept is still closed.
        let kept = format!("{name}__before_r1");
        rig.session("postgres").execute(&format!("ALTER DATABASE {kept} ALLOW_CONNECTIONS false")).unwrap();
        let of_restored = "SELECT oid::text FROM pg_database WHERE datname = current_database()";
        let restored_oid = count(&rig, &name, of_restored);
        let again = restore_as(&target, &tree, ("r1-try2", RestoreMode::InPlace), None).unwrap();
        assert_eq!(again, first);
        assert_eq!(there(&rig, &names), ["app", "app__before_r1"]);
        assert_eq!(count(&rig, &name, of_restored), restored_oid, "nothing was built anew");
        assert_eq!(count(&rig, &kept, "SELECT count(*) FROM people"), 5, "the original is open");
        assert_eq!(trial::differences(&target, &tree), Vec::<String>::new());

        // Another restore is one of its own. A try of it that comes after users were let in changes nothing of theirs.
        let other = restore_as(&target, &tree, ("r2", RestoreMode::InPlace), None).unwrap();
        assert_eq!(other.kept_old, [format!("database {name}__before_r2")]);
        run(target.stamp(&Context::default(), &the_stamp())).unwrap();
        rig.user(&name).execute("DELETE FROM people WHERE id > 7").unwrap();
        let again = restore_as(&target, &tree, ("r2-try2", RestoreMode::InPlace), None).unwrap();
        assert_eq!(again, other);
        assert_eq!(count(&rig, &name, "SELECT count(*) FROM people"), 7);

        // Into a new database, whole and in part.
        let copy = open(&rig, &names.name("copy"), json!({}), &scratch);
        for part in [None, Some(format!("databases/{name}/data/public.people"))] {
            let restore = |try_of: &str, mode| restore_as(&copy, &tree, (try_of, mode), part.as_deref());
            let first = restore("r3", RestoreMode::Fresh).unwrap();
            assert_eq!(restore("r3-try2", RestoreMode::InPlace).unwrap(), first, "{part:?}");
            rig.drop_database(&names.name("copy")).unwrap();
        }
    }
}

#[test]
fn a_swap_whose_session_is_lost_says_what_is_true_and_leaves_nothing_closed() {
    for rig in rigs() {
        for round in 0..12_u64 {
            let names = Names::new(&[&rig]);
            let [new, name, old] = ["new", "name", "old"].map(|end| names.name(end));
            for name in [&new, &name] {
                rig.session("postgres").execute(&format!("CREATE DATABASE {name}")).unwrap();
            }
            let mut admin = rig.session("postgres");
            let process = admin.process();
            let swaps = [Swap { built: new.clone(), name: name.clone(), old_to: Some(old.clone()) }];
            let done = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut killer = rig.session("postgres");
                    std::thread::sleep(Duration::from_micros(round * 700));
                    killer.execute(&format!("SELECT pg_terminate_backend({process})")).unwrap();
                });
                swap_all(&mut admin, &|| Ok(rig.session("postgres")), &swaps)
            });
            let expected = match done {
                Swapped::Done(closed) => {
                    assert_eq!(closed, Vec::<String>::new());
                    ["name", "old"]
                }
                Swapped::Undone(_) => ["name", "new"],
                Swapped::Unclear(error) => panic!("{error:?}"),
            };
            assert_eq!(there(&rig, &names), expected);
            for end in expected {
                rig.session(&names.name(end)).execute("SELECT 1").unwrap();
            }
        }
    }
}

#[test]
fn a_restore_that_is_cancelled_stops_soon_and_cleans_up() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let name = names.name("app");
        rig.session("postgres").execute(&format!("CREATE DATABASE {name}")).unwrap();
        // Its index takes long to build.
        rig.user(&name)
            .execute(
                "CREATE FUNCTION slow(a int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a + length(pg_catalog.pg_sleep(0.2)::text)'; \
                 CREATE TABLE t (a int); CREATE INDEX i ON t ((public.slow(a))); INSERT INTO t SELECT generate_series(1, 10)",
            )
            .unwrap();
        let mut session = rig.session(&name);
        session
            .execute(
                "UPDATE pg_index SET indisready = false, indisvalid = false WHERE indexrelid = 'public.i'::regclass",
            )
            .unwrap();
        session.execute("INSERT INTO public.t SELECT generate_series(1, 2000)").unwrap();
        session
            .execute("UPDATE pg_index SET indisready = true, indisvalid = true WHERE indexrelid = 'public.i'::regclass")
            .unwrap();
        drop(session);
        let (slow, _) = trial::back_up(&open(&rig, &name, json!({}), &scratch), None);
        let target = open(&rig, &names.name("copy"), json!({}), &scratch);
        let context = Context::default();
        let stopper = context.clone();
        let canceller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(3000));
            stopper.cancel();
            std::time::Instant::now()
        });
        let request = RestoreRequest { mode: RestoreMode::Fresh, part: None, restore: "r1".to_owned() };
        let error = run(target.restore(&context, &slow, &request)).unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
        assert!(canceller.join().unwrap().elapsed() < Duration::from_secs(10));
        assert_eq!(there(&rig, &names), ["app"]);
    }
}

#[test]
fn servers_that_cannot_take_a_point_are_refused_before_anything_is_written() {
    let rigs = rigs();
    let (Some(old), Some(new)) = (rig_of(&rigs, "POSTGRES"), rig_of(&rigs, "POSTGRES_18")) else { return };
    let names = Names::new(&[old, new]);
    let scratch = tempfile::tempdir().unwrap();
    let name = small(new, &names, "app");
    let (tree, _) = trial::back_up(&open(new, &name, json!({}), &scratch), None);
    let error = trial::restore(&open(old, &name, json!({}), &scratch), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("the target is PostgreSQL 15, the point is of 18"), "{error}");
    assert_eq!(there(old, &names), Vec::<String>::new());

    let wrong = open(new, &names.name("copy"), json!({ "password": "wrong" }), &scratch);
    let error = trial::restore(&wrong, &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error:?}");
    let unnamed = open(new, &names.name("copy"), json!({ "databases": [names.name("copy"), "y"] }), &scratch);
    let error = trial::restore(&unnamed, &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "{error:?}");
    assert!(error.hint_text().unwrap().contains("rename"));

    let Some(bare) = rig_of(&rigs, "POSTGRES_16") else { return };
    let names = Names::new(&[old, bare]);
    let name = small(old, &names, "app");
    old.user(&name).execute("CREATE EXTENSION hstore").unwrap();
    let (tree, _) = trial::back_up(&open(old, &name, json!({}), &scratch), None);
    let error = trial::restore(&open(bare, &name, json!({}), &scratch), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("the target lacks extensions: hstore 1.8"), "{error}");
    assert_eq!(there(bare, &names), Vec::<String>::new());
}

#[test]
fn without_its_roles_a_point_is_refused_or_restored_without_owners() {
    let rigs = rigs();
    let (Some(old), Some(new)) = (rig_of(&rigs, "POSTGRES"), rig_of(&rigs, "POSTGRES_18")) else { return };
    let names = Names::new(&[old, new]);
    let scratch = tempfile::tempdir().unwrap();
    let (name, role) = (small(old, &names, "app"), names.name("owner"));
    old.user(&name)
        .execute(&format!("CREATE ROLE {role}; ALTER TABLE people OWNER TO {role}; GRANT SELECT ON teams TO {role}"))
        .unwrap();
    let (tree, _) = trial::back_up(&open(old, &name, json!({ "roles": "none" }), &scratch), None);
    let error = trial::restore(&open(new, &name, json!({}), &scratch), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
    assert!(format!("{error}").contains(&format!("role \"{role}\" does not exist")), "{error}");
    assert_eq!(there(new, &names), Vec::<String>::new());
    let target = open(new, &name, json!({ "roles": "none" }), &scratch);
    let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
    assert_eq!(restored.losses[0].what, "owners and privileges");
    assert_eq!(trial::differences(&target, &tree), Vec::<String>::new());
}

#[test]
fn a_role_that_is_no_superuser_restores_what_it_may() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let name = small(&rig, &names, "app");
        let (tree, _) = trial::back_up(&open(&rig, &name, json!({}), &scratch), None);
        let role = names.name("maker");
        rig.session("postgres").execute(&format!("CREATE ROLE {role} LOGIN CREATEDB PASSWORD 'x'")).unwrap();
        let more = json!({ "user": role, "password": "x", "roles": "none" });
        let target = open(&rig, &names.name("copy"), more.clone(), &scratch);
        let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
        assert!(
            restored.losses.iter().all(|loss| loss.what.starts_with("owners") || loss.what.starts_with("COMMENT")),
            "{:?}",
            restored.losses
        );
        run(target.stamp(&Context::default(), &the_stamp())).unwrap();
        assert_eq!(trial::differences(&target, &tree), Vec::<String>::new());
        restore_as(&target, &tree, ("r2", RestoreMode::InPlace), None).unwrap();
        assert_eq!(there(&rig, &names), ["app", "copy", "copy__before_r2"]);
        // With owners, what it may not give away is named.
        let role = names.name("other");
        rig.session("postgres").execute(&format!("CREATE ROLE {role} LOGIN CREATEDB PASSWORD 'x'")).unwrap();
        let target = open(&rig, &names.name("second"), json!({ "user": role, "password": "x" }), &scratch);
        let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
        assert!(
            restored.losses.iter().any(|loss| loss.what == format!("owner postgres of {}", names.name("second"))),
            "{:?}",
            restored.losses
        );
        assert_eq!(count(&rig, &names.name("second"), "SELECT count(*) FROM people"), 20000);
    }
}

#[test]
fn databases_of_other_encodings_come_back_byte_for_byte() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        for (encoding, insert) in [
            ("LATIN1", "INSERT INTO t VALUES (E'\\u00e9 \\u00fc \\u00df')"),
            ("SQL_ASCII", "INSERT INTO t SELECT convert_from('\\xff80e9'::bytea, 'SQL_ASCII')"),
            ("EUC_JP", "INSERT INTO t VALUES ('漢字')"),
        ] {
            let name = names.name(&format!("app_{}", encoding.to_lowercase()));
            rig.session("postgres")
                .execute(&format!(
                    "CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
                ))
                .unwrap();
            rig.user(&name).execute(&format!("CREATE TABLE t (a text); {insert}")).unwrap();
            let (tree, _) = trial::back_up(&open(&rig, &name, json!({}), &scratch), None);
            let copy = format!("{name}_copy");
            let target = open(&rig, &copy, json!({}), &scratch);
            let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
            assert_eq!(restored.losses, [], "{encoding}");
            assert_eq!(trial::differences(&target, &tree), Vec::<String>::new(), "{encoding}");
            let of = |name: &str| {
                rig.session(name).query_one("SELECT (SELECT encode(convert_to(a, current_setting('server_encoding')), 'hex') FROM public.t), current_setting('server_encoding')").unwrap()
            };
            let (one, other) = (of(&name), of(&copy));
            assert_eq!(one, other);
            assert_eq!(one.text(1).unwrap(), encoding);
        }
    }
}

/// A file system of the test's own; gone with the value, also when the test fails.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg(&self.0).status());
    }
}

#[test]
fn a_target_whose_disk_is_full_says_so_and_is_left_clean() {
    let rigs = rigs();
    let Some(rig) = rig_of(&rigs, "POSTGRES") else { return };
    if !rustix::process::geteuid().is_root() {
        return stillpoint_testkit::skip("a full disk", "mounting a small file system needs root");
    }
    let folder = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=30m,mode=777", "tmpfs"])
        .arg(folder.path())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        return stillpoint_testkit::skip("a full disk", "a small file system cannot be mounted here");
    }
    let _mounted = Mounted(folder.path().to_owned());
    let server = servers::Postgres::start(rig.bin.as_ref(), &[]).unwrap();
    let small_rig = Rig { name: "SMALL", url: server.url("postgres").parse().unwrap(), bin: rig.bin.clone() };
    let data = folder.path().join("space");
    std::fs::create_dir(&data).unwrap();
    let owned = std::process::Command::new("chown").arg("65534:65534").arg(&data).status().unwrap();
    assert!(owned.success());
    std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    {
        let names = Names::new(&[&small_rig]);
        let mut admin = small_rig.session("postgres");
        admin.execute(&format!("CREATE TABLESPACE tight LOCATION '{}'", data.display())).unwrap();
        let name = names.name("app");
        admin.execute(&format!("CREATE DATABASE {name}")).unwrap();
        small_rig
            .user(&name)
            .execute("CREATE TABLE big AS SELECT g, repeat(md5(g::text), 10) AS t FROM generate_series(1, 100000) g")
            .unwrap();
        let (tree, _) = trial::back_up(&open(&small_rig, &name, json!({}), &scratch), None);
        // The same database, but in the tablespace that is too small for it.
        let description = format!("databases/{name}/database.json");
        let path: Vec<&[u8]> = description.split('/').map(str::as_bytes).collect();
        let text =
            String::from_utf8(read_small(&tree, &TreePath::parse(&description).unwrap(), 1 << 20).unwrap()).unwrap();
        let tree = tree.without(&path).with_file(&path, text.replace("\"pg_default\"", "\"tight\""));
        let target = open(&small_rig, &names.name("copy"), json!({}), &scratch);
        let error = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted, "{error:?}");
        assert!(format!("{error:?}").contains("No space left on device"), "{error:?}");
        assert_eq!(there(&small_rig, &names), ["app"]);
    }
}
