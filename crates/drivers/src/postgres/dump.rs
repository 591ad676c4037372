//! Definitions, written by the server's own programs under the view of the cut.
//!
//! Every version of the server has its own catalogs, and `pg_dump` knows them all; nothing here reads
//! them but for names to leave out. Rows are none of its business.

use std::path::{Path, PathBuf};
use std::process::Command;

use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::config::{Roles, Settings};
use super::restore::database::stamp_schema_has_more;
use super::session::Session;
use super::tools::{self, Tools};
use super::wire::identifier;

/// Of what a program complains, the end is kept.
const COMPLAINT_BYTES_MAX: usize = 4000;
/// The first version that writes statistics.
const STATISTICS_SINCE: u32 = 18;

/// The files that describe one database.
#[derive(Debug)]
pub(super) struct Definitions {
    pub(super) dump: PathBuf,
    pub(super) pre_data: PathBuf,
    pub(super) post_data: PathBuf,
    pub(super) statistics: Option<PathBuf>,
}

/// What the settings leave out of the definitions.
#[derive(Debug, Default, Clone)]
pub(super) struct LeftOut {
    pub(super) schemas: Vec<String>,
    pub(super) tables: Vec<(String, String)>,
}

/// What a database is dumped with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dump<'a> {
    pub(super) tools: &'a Tools,
    pub(super) settings: &'a Settings,
    pub(super) database: &'a str,
    /// The exported view.
    pub(super) snapshot: &'a str,
    pub(super) server_major: u32,
    pub(super) left_out: &'a LeftOut,
    /// An empty private folder.
    pub(super) folder: &'a Path,
}

impl Dump<'_> {
    /// Writes the definitions of the database into the folder.
    pub(super) fn run(&self, context: &Context) -> Result<Definitions> {
        let dump = self.folder.join("schema.dump");
        run(self.pg_dump().args(["--format=custom", "--schema-only", "--create", "--file"]).arg(&dump), context)?;
        let section = |name: &str| -> Result<PathBuf> {
            let path = self.folder.join(format!("{name}.sql"));
            let mut command = self.tools.offline("pg_restore");
            run(command.arg(format!("--section={name}")).arg("--file").arg(&path).arg(&dump), context)?;
            Ok(path)
        };
        let (pre_data, post_data) = (section("pre-data")?, section("post-data")?);
        let statistics = if self.tools.major >= STATISTICS_SINCE && self.server_major >= STATISTICS_SINCE {
            let path = self.folder.join("statistics.sql");
            run(self.pg_dump().args(["--format=plain", "--statistics-only", "--file"]).arg(&path), context)?;
            Some(path)
        } else {
            None
        };
        Ok(Definitions { dump, pre_data, post_data, statistics })
    }

    fn pg_dump(&self) -> Command {
        let mut command = self.tools.command("pg_dump", self.database);
        command.args(["--no-password", "--no-sync", "--snapshot", self.snapshot]);
        command.arg(format!("--lock-wait-timeout={}s", self.settings.lock_timeout_seconds));
        // Patterns in quotes stand for themselves.
        for schema in &self.left_out.schemas {
            command.arg(format!("--exclude-schema={}", identifier(schema)));
        }
        for (schema, table) in &self.left_out.tables {
            command.arg(format!("--exclude-table={}.{}", identifier(schema), identifier(table)));
        }
        command
    }
}

/// Writes roles and tablespaces of the server to a file in `folder`; `None` where they are not wanted.
pub(super) fn globals(
    tools: &Tools,
    first_database: &str,
    roles: Roles,
    folder: &Path,
    context: &Context,
) -> Result<Option<PathBuf>> {
    let path = folder.join("globals.sql");
    let mut command = tools.command("pg_dumpall", first_database);
    command.args(["--no-password", "--globals-only", "--no-sync", "--database", first_database, "--file"]).arg(&path);
    match roles {
        Roles::None => return Ok(None),
        Roles::WithPasswords => {}
        Roles::WithoutPasswords => {
            command.arg("--no-role-passwords");
        }
    }
    run(&mut command, context)?;
    Ok(Some(path))
}

/// The version of the program that writes definitions, in its own words.
pub(super) fn version(tools: &Tools, context: &Context) -> Result<String> {
    let output = tools::run(tools.offline("pg_dump").arg("--version"), context)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn run(command: &mut Command, context: &Context) -> Result<()> {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output = tools::run(command, context)?;
    if output.status.success() {
        return Ok(());
    }
    let said = &output.stderr[output.stderr.len().saturating_sub(COMPLAINT_BYTES_MAX)..];
    Err(failed(&program, &String::from_utf8_lossy(said), &output.status.to_string()))
}

/// What a program's complaint means.
fn failed(program: &str, said: &str, status: &str) -> Error {
    let contains = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let message = format!("{program} failed");
    let error = if contains(&["permission denied"]) {
        Error::new(Kind::PermissionDenied, message).hint("GRANT pg_read_all_data TO the backup role")
    } else if contains(&["lock timeout", "statement timeout"]) {
        Error::new(Kind::Locked, message)
            .temporary()
            .hint("someone waits for a table exclusively; wait for the migration to end, or raise `lockTimeoutSeconds`")
    } else if contains(&["No space left on device", "Disk quota exceeded"]) {
        Error::new(Kind::Exhausted, message).hint("the scratch folder needs room for the definitions")
    } else if contains(&["out of shared memory"]) {
        Error::new(Kind::Exhausted, message).hint("raise max_locks_per_transaction on the server, and restart it")
    } else if contains(&["snapshot"]) && contains(&["invalid snapshot identifier", "does not exist"]) {
        Error::new(Kind::PinLost, message).temporary().hint("the session that held the view ended")
    } else if contains(&["server closed the connection", "terminating connection", "connection to server"]) {
        Error::new(Kind::Unreachable, message).temporary()
    } else if contains(&["server version mismatch"]) {
        Error::new(Kind::Unsupported, message).hint("name newer programs in `tools`")
    } else {
        Error::new(Kind::Io, message)
    };
    let said = if said.trim().is_empty() { status } else { said.trim() };
    error.source(std::io::Error::other(said.lines().collect::<Vec<_>>().join("; ")))
}

/// A private folder below the scratch folder that goes with the value.
pub(super) fn folder(scratch: &Path) -> Result<tempfile::TempDir> {
    std::fs::create_dir_all(scratch).or_io(|| format!("cannot create {}", scratch.display()))?;
    tempfile::Builder::new()
        .prefix("postgres-")
        .tempdir_in(scratch)
        .or_io(|| format!("cannot write to {}", scratch.display()))
}

/// What `pg_dump` leaves out, with a warning that only people would read, where the role is no superuser.
pub(super) fn superusers_only(session: &mut Session, database: &str) -> Result<Vec<Loss>> {
    let row = session.query_one(
        "SELECT (SELECT count(*) FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database \
         WHERE datname = current_database())), (SELECT count(*) FROM pg_user_mappings WHERE umoptions IS NULL)",
    )?;
    let mut losses = Vec::new();
    for (column, what, why) in [
        (0, "subscriptions", "only a superuser is shown their definitions"),
        (1, "user mappings: their options", "the role is not shown whether they have some, such as passwords"),
    ] {
        let count: u64 = row.number(column)?;
        if count > 0 {
            losses.push(Loss { what: format!("database `{database}`: {count} {what}"), why: why.to_owned() });
        }
    }
    Ok(losses)
}

/// What the settings leave out, by exact name, for `pg_dump`.
pub(super) fn left_out(session: &mut Session, settings: &Settings) -> Result<LeftOut> {
    let mut left_out = LeftOut::default();
    let rows = session.query(
        "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1",
    )?;
    for row in &rows {
        let schema = row.text(0)?;
        if !settings.has_schema(schema) || (schema == super::STAMP_SCHEMA && !stamp_schema_has_more(session)?) {
            left_out.schemas.push(schema.to_owned());
        }
    }
    left_out.tables.extend(super::STAMP_TABLES.map(|table| (super::STAMP_SCHEMA.to_owned(), table.to_owned())));
    if settings.tables.is_empty() && settings.exclude_tables.is_empty() {
        return Ok(left_out);
    }
    // A column's sequence goes with its table; `pg_dump` has to be told.
    let rows = session.query(
        "SELECT n.nspname, c.relname, coalesce(o.schema, n.nspname), coalesce(o.name, c.relname) FROM pg_class c \
         JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN (SELECT d.objid, tn.nspname AS schema, \
         t.relname AS name FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace tn \
         ON tn.oid = t.relnamespace WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass \
         AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0) o ON o.objid = c.oid AND c.relkind = 'S' \
         WHERE c.relkind IN ('r', 'p', 'm', 'f', 'S', 'v') AND n.nspname !~ '^pg_' \
         AND n.nspname <> 'information_schema' ORDER BY 1, 2",
    )?;
    for row in &rows {
        if settings.has_schema(row.text(0)?) && !settings.has_table(row.text(2)?, row.text(3)?) {
            left_out.tables.push((row.string(0)?, row.string(1)?));
        }
    }
    Ok(left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_classified_and_kept() {
        let said = "pg_dump: error: query failed: ERROR:  permission denied for table t\n";
        let error = failed("pg_dump", said, "exit 1");
        assert_eq!(error.kind(), Kind::PermissionDenied);
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("permission denied for table t"), "{source}");
        let error = failed("pg_dump", "ERROR:  canceling statement due to statement timeout", "exit 1");
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Locked, true));
        assert_eq!(failed("pg_dump", "", "exit status: 3").kind(), Kind::Io);
        let full = failed("pg_dump", "could not write to output file: No space left on device", "exit 1");
        assert_eq!(full.kind(), Kind::Exhausted);
    }
}
