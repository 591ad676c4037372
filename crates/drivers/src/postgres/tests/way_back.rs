//! The way back, judged by the server's own programs: two databases are equal when `pg_dump` says the
//! same of both.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use stillpoint_core::driver::RestoreMode;
use stillpoint_core::position::Stamp;

use super::*;

/// A schema that uses every feature that a backup can lose.
const EVERY_FEATURE: &str = include_str!("../testdata/every_feature.sql");

/// Names of a test's own: databases and roles that begin so go with the value.
struct Names<'a> {
    rigs: Vec<&'a Rig>,
    begin: String,
}

impl<'a> Names<'a> {
    fn new(rigs: &[&'a Rig]) -> Self {
        Self { rigs: rigs.to_vec(), begin: format!("way_{:08x}_", fastrand::u32(..)) }
    }

    fn name(&self, end: &str) -> String {
        format!("{}{end}", self.begin)
    }
}

impl Drop for Names<'_> {
    fn drop(&mut self) {
        for rig in &self.rigs {
            let mut admin = rig.session("postgres");
            let own = format!("LIKE '{}%'", self.begin.replace('_', "\\_"));
            let names = |admin: &mut Session, sql: &str| -> Vec<String> {
                admin.query(sql).unwrap_or_default().iter().map(|row| row.string(0).unwrap()).collect()
            };
            let list = format!("SELECT datname FROM pg_database WHERE datname {own} OR datname LIKE '\"{}%'", self.begin);
            for name in names(&mut admin, &list) {
                drop(admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", identifier(&name))));
                let mut session = rig.session(&name);
                let list = "SELECT subname FROM pg_subscription WHERE subdbid = \
                            (SELECT oid FROM pg_database WHERE datname = current_database())";
                for name in names(&mut session, list) {
                    let name = identifier(&name);
                    drop(session.execute(&format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)")));
                    drop(session.execute(&format!("DROP SUBSCRIPTION {name}")));
                }
                drop(session);
                drop(admin.execute(&format!("DROP DATABASE {} WITH (FORCE)", identifier(&name))));
            }
            for name in names(&mut admin, &format!("SELECT rolname FROM pg_roles WHERE rolname {own}")) {
                drop(admin.execute(&format!("DROP ROLE {}", identifier(&name))));
            }
        }
    }
}

impl Rig {
    fn major(&self) -> u32 {
        self.session("postgres").major()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(std::path::Path::new(&self.bin).join(program));
        command
            .env("PGHOST", self.url.host_str().unwrap())
            .env("PGPORT", self.url.port().unwrap().to_string())
            .env("PGUSER", self.url.username())
            .env("PGPASSWORD", self.url.password().unwrap())
            .env("PGOPTIONS", "-c client_min_messages=error");
        command
    }

    /// A program of this rig that talks to the server of another one.
    fn program_for(&self, other: &Rig, program: &str) -> Command {
        let mut command = Command::new(std::path::Path::new(&self.bin).join(program));
        command.envs(other.command(program).get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
    }

    /// Runs a script through psql.
    fn psql(&self, database: &str, script: &str) {
        let mut command = self.command("psql");
        command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
    }

    /// What pg_dump says of a database, without what is of the moment and the stamp.
    fn dump(&self, other: Option<&Rig>, database: &str, args: &[&str]) -> Vec<String> {
        // The programs of the newer side read both.
        let mut command = other.unwrap_or(self).program_for(self, "pg_dump");
        let output = command.args(["--exclude-schema=stillpoint"]).args(args).arg("-d").arg(database).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let of_moment = ["\\restrict", "\\unrestrict", "-- Dumped"];
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .filter(|line| !of_moment.iter().any(|begin| line.starts_with(begin)))
            .map(|line| line.replace(database, "THE_DATABASE"))
            .collect()
    }
}

/// Asserts that two dumps are equal, showing the first lines that are not.
fn assert_same(what: &str, mut one: Vec<String>, mut other: Vec<String>, in_order: bool) {
    if !in_order {
        one.sort();
        other.sort();
    }
    if one == other {
        return;
    }
    let missing: Vec<&String> = one.iter().filter(|line| !other.contains(line)).take(20).collect();
    let extra: Vec<&String> = other.iter().filter(|line| !one.contains(line)).take(20).collect();
    if missing.is_empty() && extra.is_empty() {
        let at = one.iter().zip(&other).position(|(one, other)| one != other).unwrap_or_default();
        let near = |lines: &[String]| lines[at.saturating_sub(3)..lines.len().min(at + 12)].join("\n");
        panic!("{what}: another order at line {at}\n--- source\n{}\n--- copy\n{}", near(&one), near(&other));
    }
    panic!("{what}: {} and {} lines\nonly in the source: {missing:#?}\nonly in the copy: {extra:#?}", one.len(), other.len());
}

fn the_stamp() -> Stamp {
    Stamp {
        platform: "churn".to_owned(),
        environment: "staging".to_owned(),
        point: "p1".to_owned(),
        restore: "r1".to_owned(),
        at: "2026-11-21T10:00:00Z".parse().unwrap(),
    }
}

/// A database with every feature; its roles begin like its name.
fn every_feature(rig: &Rig, names: &Names<'_>, end: &str) -> String {
    let name = names.name(end);
    rig.session("postgres").execute(&format!("CREATE DATABASE {} TEMPLATE template0", identifier(&name))).unwrap();
    rig.psql(&name, &EVERY_FEATURE.replace("every_", &names.name("")));
    name
}

/// Opens a driver for one database of a rig.
fn open(rig: &Rig, database: &str, more: Value, scratch: &tempfile::TempDir) -> Arc<dyn Driver> {
    trial::open(&REGISTRATION, rig.settings(database, more), scratch.path()).unwrap()
}

/// Asserts that the copy is what its source was, by dumps of both.
fn assert_equal(source: (&Rig, &str), copy: (&Rig, &str)) {
    // Settings of the database have no order.
    let args = ["--schema-only", "--create"];
    let (one, other) = (source.0.dump(Some(copy.0), source.1, &args), copy.0.dump(Some(copy.0), copy.1, &args));
    assert_same(&format!("{} to {} {args:?}", source.0.name, copy.0.name), one, other, false);
    assert_equal_but_for_the_database(source, copy);
}

fn assert_equal_but_for_the_database(source: (&Rig, &str), copy: (&Rig, &str)) {
    let newer = Some(copy.0);
    let what = format!("{} to {}", source.0.name, copy.0.name);
    for (args, in_order) in [
        (&["--schema-only"][..], true),
        (&["--inserts", "--rows-per-insert=1", "--data-only", "--large-objects"][..], false),
    ] {
        let (one, other) = (source.0.dump(newer, source.1, args), copy.0.dump(newer, copy.1, args));
        assert_same(&format!("{what} {args:?}"), one, other, in_order);
    }
}

#[test]
fn every_feature_comes_back_on_the_same_version_under_another_name() {
    for rig in rigs() {
        let names = Names::new(&[&rig]);
        let scratch = tempfile::tempdir().unwrap();
        let source = every_feature(&rig, &names, "source");
        let (tree, _) = trial::back_up(&open(&rig, &source, json!({}), &scratch), None);
        let copy = names.name("copy");
        let target = open(&rig, &copy, json!({}), &scratch);
        let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(restored.losses, [], "{}", rig.name);
        assert_eq!(run(target.read_stamp(&Context::default())).unwrap(), None);
        assert_eq!(trial::differences(&target, &tree), Vec::<String>::new(), "{}", rig.name);
        run(target.stamp(&Context::default(), &the_stamp())).unwrap();
        assert_eq!(run(target.read_stamp(&Context::default())).unwrap(), Some(the_stamp()));
        assert_eq!(trial::differences(&target, &tree), Vec::<String>::new(), "{}", rig.name);
        assert_equal((&rig, &source), (&rig, &copy));
    }
}

/// The rig of a name, if it is up.
fn rig_of<'a>(rigs: &'a [Rig], name: &str) -> Option<&'a Rig> {
    let found = rigs.iter().find(|rig| rig.name == name);
    if found.is_none() {
        stillpoint_testkit::skip(name, "no rig: cargo xtask rig up postgres");
    }
    found
}

/// Takes out what the build of another server lacks: ICU, libxml.
const PORTABLE: &str = "DROP COLLATION IF EXISTS types.german_phonebook, types.ignore_case; \
                        UPDATE types.everything SET markup = NULL";

#[test]
fn every_feature_comes_back_on_a_newer_version_with_its_roles() {
    let rigs = rigs();
    let (Some(old), Some(new)) = (rig_of(&rigs, "POSTGRES"), rig_of(&rigs, "POSTGRES_18")) else { return };
    let names = Names::new(&[old, new]);
    let scratch = tempfile::tempdir().unwrap();
    let source = every_feature(old, &names, "source");
    old.session(&source).execute(PORTABLE).unwrap();
    let (tree, _) = trial::back_up(&open(old, &source, json!({}), &scratch), None);
    let target = open(new, &source, json!({}), &scratch);
    let restored = trial::restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
    // Extensions are those of the newer server; nothing else is different.
    assert!(restored.losses.iter().all(|loss| loss.what.starts_with("extension")), "{:?}", restored.losses);
    run(target.stamp(&Context::default(), &the_stamp())).unwrap();
    assert_eq!(trial::differences(&target, &tree), Vec::<String>::new());
    // The newer server writes views in its own words, and an older archive means other defaults: what
    // PostgreSQL's programs restore of the same archive is the measure.
    let reference = names.name("reference");
    new.session("postgres").execute(&format!("CREATE DATABASE {} TEMPLATE template0", identifier(&reference))).unwrap();
    let archive = scratch.path().join("reference.dump");
    let dumped = old.command("pg_dump").arg("-Fc").arg("-f").arg(&archive).arg("-d").arg(&source).output().unwrap();
    assert!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
    let loaded = new.command("pg_restore").arg("-d").arg(&reference).arg(&archive).output().unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    assert_equal_but_for_the_database((new, &reference), (new, &source));
    let globals = |rig: &Rig| -> Vec<String> {
        let output = new.program_for(rig, "pg_dumpall").arg("--globals-only").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        // Before 16 a membership does not say whether it inherits.
        let inherits = |line: &str| line.replace(", INHERIT TRUE", "").replace(" WITH INHERIT TRUE", "").replace(", INHERIT FALSE", "").replace(" WITH INHERIT FALSE", "");
        text.lines().filter(|line| line.contains(&names.begin)).map(inherits).collect()
    };
    assert!(globals(old).len() > 10);
    assert_same("roles", globals(old), globals(new), false);
}
