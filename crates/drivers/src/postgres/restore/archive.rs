//! The archive of definitions: its table of contents, and what `pg_restore` does with parts of it.
//!
//! Which definitions come when is decided here by lists of the table of contents; how they are written
//! is the tool's. Errors of the tool are the server's, so they are taken apart and passed on: none is
//! passed over, and what this role may not do is told from what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use stillpoint_core::driver::{Context, Loss};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::super::tools::{self, Tools};

/// One definition of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Entry {
    /// Its number within the archive.
    pub(in super::super) id: u32,
    /// Its line, as `pg_restore -L` wants it back.
    line: String,
    /// Class and number of the object at the source.
    object: (u32, u32),
    /// Kind, schema, name and owner, separated by blanks; the archive's numbers are not in it.
    pub(in super::super) text: String,
    /// The numbers of what it needs.
    pub(in super::super) needs: Vec<u32>,
}

/// Kinds of more than one word; the longest that fits is meant.
const LONG_KINDS: &[&str] = &[
    "ACCESS METHOD",
    "CHECK CONSTRAINT",
    "DATABASE PROPERTIES",
    "DEFAULT ACL",
    "EVENT TRIGGER",
    "FK CONSTRAINT",
    "FOREIGN DATA WRAPPER",
    "FOREIGN TABLE",
    "INDEX ATTACH",
    "MATERIALIZED VIEW DATA",
    "MATERIALIZED VIEW",
    "OPERATOR CLASS",
    "OPERATOR FAMILY",
    "PROCEDURAL LANGUAGE",
    "PUBLICATION TABLES IN SCHEMA",
    "PUBLICATION TABLE",
    "ROW SECURITY",
    "SECURITY LABEL",
    "SEQUENCE OWNED BY",
    "SEQUENCE SET",
    "SHELL TYPE",
    "STATISTICS DATA",
    "SUBSCRIPTION TABLE",
    "TABLE ATTACH",
    "TABLE DATA",
    "TEXT SEARCH CONFIGURATION",
    "TEXT SEARCH DICTIONARY",
    "TEXT SEARCH PARSER",
    "TEXT SEARCH TEMPLATE",
    "USER MAPPING",
    "LARGE OBJECT",
    "BLOB METADATA",
];

impl Entry {
    /// Its kind, e.g. `FK CONSTRAINT`.
    pub(in super::super) fn kind(&self) -> &str {
        let fits = |kind: &&&str| self.text.strip_prefix(**kind).is_some_and(|rest| rest.starts_with(' '));
        match LONG_KINDS.iter().filter(fits).max_by_key(|kind| kind.len()) {
            Some(kind) => kind,
            None => self.text.split(' ').next().unwrap_or_default(),
        }
    }

    /// Schema, name and owner.
    pub(in super::super) fn name(&self) -> &str {
        self.text[self.kind().len()..].trim_start()
    }

    /// For tables, views and the like: its number at the source.
    pub(super) fn relation(&self) -> Option<u32> {
        const CLASS: u32 = 1259;
        let is_relation = self.kind().ends_with("TABLE") || self.kind().ends_with("VIEW") || self.kind() == "SEQUENCE";
        (self.object.0 == CLASS && is_relation).then_some(self.object.1)
    }

    /// Whether it acts on definitions made after it, so that it must come last.
    fn is_event_trigger(&self) -> bool {
        self.kind() == "EVENT TRIGGER" || (self.kind() == "COMMENT" && self.name().starts_with("- EVENT TRIGGER "))
    }
}

/// The step of a restore that a list of definitions belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// What comes before the rows.
    Tables,
    /// Indexes, constraints, triggers and the like.
    Indexes,
    /// Event triggers, which would act on the steps before them.
    EventTriggers,
}

/// How the tool treats owners, privileges and tablespaces.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Manner {
    pub(super) without_owners: bool,
    pub(super) without_tablespaces: bool,
    /// How many connections the step may use.
    pub(super) connections: usize,
}

/// An archive in the scratch folder, and its contents.
#[derive(Debug)]
pub(in super::super) struct Archive {
    path: PathBuf,
    pub(in super::super) entries: Vec<Entry>,
}

impl Archive {
    /// Reads the table of contents.
    pub(in super::super) fn open(tools: &Tools, path: &Path, context: &Context) -> Result<Self> {
        let mut command = tools.offline("pg_restore");
        command.arg("--list").arg("--verbose").arg(path);
        let output = tools::run(&mut command, context)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::new(Kind::Corrupt, "pg_restore cannot read the archive of definitions")
                .context("because", said.trim())
                .hint("the tools must not be older than those that made the point: `tools:` names their folder"));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Self { path: path.to_owned(), entries: entries(&text) })
    }

    /// Makes the definitions of one step in `database`. Returns what the role was not allowed to do.
    ///
    /// The program's connections may deadlock with each other, and it goes on without what failed then:
    /// `again` runs such statements once more, one after the other.
    pub(super) fn restore(
        &self,
        tools: &Tools,
        database: &str,
        (step, manner): (Step, Manner),
        again: &mut dyn FnMut(&str) -> Result<()>,
        context: &Context,
    ) -> Result<Vec<Loss>> {
        let mut command = tools.command("pg_restore", database);
        if !self.choose(&mut command, (step, manner), None)? {
            return Ok(Vec::new());
        }
        command.arg("--dbname").arg(connection_text(database));
        // Indexes are sorted in memory as far as this goes; a lost restore is begun anew.
        command.env(
            "PGOPTIONS",
            "-c maintenance_work_mem=256MB -c synchronous_commit=off -c default_transaction_read_only=off",
        );
        if step == Step::Indexes && manner.connections > 1 {
            command.arg("--jobs").arg(manner.connections.to_string());
        }
        command.arg(&self.path);
        judge(&tools::run(&mut command, context)?, again)
    }

    /// The statements that would make these definitions, for a session of our own.
    pub(super) fn script(
        &self,
        tools: &Tools,
        (step, manner): (Step, Manner),
        wanted: &BTreeSet<u32>,
        context: &Context,
    ) -> Result<String> {
        let mut command = tools.offline("pg_restore");
        if !self.choose(&mut command, (step, manner), Some(wanted))? {
            return Ok(String::new());
        }
        command.arg("--file=-").arg(&self.path);
        let output = tools::run(&mut command, context)?;
        judge(&output, &mut |_| Err(Error::internal("a script needs no second try")))?;
        let text = String::from_utf8(output.stdout)
            .map_err(|error| Error::new(Kind::Unsupported, "definitions of the point are no UTF-8").source(error))?;
        Ok(without_psql(&text))
    }

    /// Tells the program which definitions are meant, and how. `false` if there are none.
    fn choose(
        &self,
        command: &mut Command,
        (step, manner): (Step, Manner),
        wanted: Option<&BTreeSet<u32>>,
    ) -> Result<bool> {
        let is_last = step == Step::EventTriggers;
        let chosen: Vec<&Entry> = self
            .entries
            .iter()
            .filter(|entry| step == Step::Tables || entry.is_event_trigger() == is_last)
            .filter(|entry| wanted.is_none_or(|wanted| wanted.contains(&entry.id)))
            .collect();
        let list: String = chosen.iter().map(|entry| format!("{}\n", entry.line)).collect();
        let list_path = self.path.with_extension("list");
        std::fs::write(&list_path, list).or_io(|| format!("cannot write {}", list_path.display()))?;
        command.arg("--use-list").arg(&list_path);
        command.arg(if step == Step::Tables { "--section=pre-data" } else { "--section=post-data" });
        if manner.without_owners {
            command.args(["--no-owner", "--no-privileges"]);
        }
        if manner.without_tablespaces {
            command.arg("--no-tablespaces");
        }
        Ok(!chosen.is_empty())
    }
}

/// A script without the lines that are meant for psql alone: newer tools guard scripts by a random word.
fn without_psql(script: &str) -> String {
    let guard = script.lines().find_map(|line| line.strip_prefix("\\restrict ")).map(str::to_owned);
    let Some(guard) = guard else { return script.to_owned() };
    let is_guard = |line: &&str| *line == format!("\\restrict {guard}") || *line == format!("\\unrestrict {guard}");
    script.lines().filter(|line| !is_guard(line)).collect::<Vec<_>>().join("\n")
}

/// A database as a connection string, so that no name is read as one.
fn connection_text(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// The entries of `pg_restore --list --verbose`.
fn entries(list: &str) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    for line in list.lines() {
        if let Some(needs) = line.strip_prefix(";\tdepends on: ") {
            if let Some(entry) = found.last_mut() {
                entry.needs = needs.split_whitespace().filter_map(|number| number.parse().ok()).collect();
            }
            continue;
        }
        let Some((id, rest)) = line.split_once("; ") else { continue };
        let Ok(id) = id.parse() else { continue };
        // The catalog's numbers at the source: `1259 16403`.
        let mut parts = rest.splitn(3, ' ');
        let (Some(class), Some(object), Some(text)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (Ok(class), Ok(object)) = (class.parse(), object.parse()) else { continue };
        found.push(Entry {
            id,
            line: line.to_owned(),
            object: (class, object),
            text: text.to_owned(),
            needs: Vec::new(),
        });
    }
    found
}

/// One statement that failed, as the tool tells it.
#[derive(Debug, Default)]
struct Failure {
    /// The definition it belongs to, where the tool says so.
    entry: String,
    message: String,
    statement: String,
}

/// The failures that the tool tells of, in order.
fn failures(said: &str) -> Vec<Failure> {
    let mut found: Vec<Failure> = Vec::new();
    let (mut entry, mut is_statement) = (String::new(), false);
    for line in said.lines() {
        if let Some(rest) = line.strip_prefix("pg_restore: ") {
            is_statement = false;
            if let Some((_, of)) = rest.split_once("from TOC entry ") {
                entry = of.splitn(4, ' ').nth(3).unwrap_or(of).trim().to_owned();
            }
            if let Some((_, message)) = rest.split_once("error: ") {
                let message = message.strip_prefix("could not execute query: ERROR:  ").unwrap_or(message).to_owned();
                found.push(Failure { entry: entry.clone(), message, statement: String::new() });
            }
            continue;
        }
        let Some(last) = found.last_mut() else { continue };
        if let Some(statement) = line.strip_prefix("Command was: ") {
            is_statement = true;
            last.statement.push_str(statement);
        } else if is_statement {
            last.statement.push('\n');
            last.statement.push_str(line);
        }
    }
    found
}

/// Whether the tool came to its end: it says so last, by how many errors it passed over. Its workers tell
/// more than that count has, never less. Without that word it was ended, and what was still to come is
/// missing.
fn came_to_its_end(output: &std::process::Output, said: &str, seen: usize) -> bool {
    let counted = said.lines().find_map(|line| line.split_once("errors ignored on restore: "));
    let counted = counted.and_then(|(_, count)| count.trim().parse::<usize>().ok());
    output.status.code() == Some(1) && counted.is_some_and(|counted| (1..=seen).contains(&counted))
}

/// What the tool's exit and its messages mean.
fn judge(output: &std::process::Output, again: &mut dyn FnMut(&str) -> Result<()>) -> Result<Vec<Loss>> {
    if output.status.success() {
        return Ok(Vec::new());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut all = failures(&said);
    let is_whole = came_to_its_end(output, &said, all.len());
    // A newer tool says this to an older server at its begin.
    all.retain(|failure| !failure.message.contains("parameter \"transaction_timeout\""));
    if !is_whole && all.iter().all(|failure| is_refusal(&failure.message)) {
        return Err(Error::new(Kind::Io, format!("pg_restore did not come to its end: {}", output.status))
            .context("and said", said.trim().chars().take(2000).collect::<String>()));
    }
    let (refused, failed): (Vec<Failure>, Vec<Failure>) =
        all.into_iter().partition(|failure| is_refusal(&failure.message));
    let deadlocked = failed.iter().any(|failure| failure.message.contains("deadlock detected"));
    for failure in &failed {
        if !is_whole || !deadlocked || failure.statement.is_empty() {
            return Err(error_of(&failure.message, &failure.entry, &failure.statement));
        }
        again(&failure.statement)?;
    }
    let loss = |failure: Failure| {
        let first = failure.statement.lines().next().unwrap_or_default().to_owned();
        let what = if failure.entry.is_empty() { first } else { failure.entry };
        Loss { what, why: format!("not restored: {}", failure.message) }
    };
    Ok(refused.into_iter().map(loss).collect())
}

/// Whether the server refused because of missing rights; the tool passes no SQLSTATE on.
fn is_refusal(message: &str) -> bool {
    [
        "permission denied",
        "must be owner",
        "must be superuser",
        "must be member",
        "Must be superuser",
        "Non-superusers",
        "Only roles with",
        "must be able to SET ROLE",
    ]
    .iter()
    .any(|known| message.contains(known))
}

fn error_of(message: &str, entry: &str, statement: &str) -> Error {
    let known = [
        ("No space left on device", Kind::Exhausted),
        ("could not extend file", Kind::Exhausted),
        ("connection", Kind::Unreachable),
        ("terminating", Kind::Unreachable),
        ("password authentication failed", Kind::Unauthenticated),
        ("does not exist", Kind::NotFound),
        ("is not available", Kind::NotFound),
        ("could not open extension control file", Kind::NotFound),
        ("not support", Kind::Unsupported),
    ];
    let kind = known.iter().find(|(text, _)| message.contains(text)).map_or(Kind::Io, |(_, kind)| *kind);
    let mut error = Error::new(kind, "pg_restore could not make a definition");
    match (entry, statement.lines().next()) {
        ("", Some(line)) => error = error.context("by", line),
        ("", None) => {}
        (entry, _) => error = error.context("of", entry),
    }
    error = error.context("because", message);
    if kind == Kind::Unreachable {
        error = error.temporary();
    }
    error
}

/// The definitions that make up what `is_root` picks: these, what belongs to them, and nothing that
/// needs what is not among them.
pub(super) fn closure(entries: &[Entry], is_root: impl Fn(&Entry) -> bool) -> BTreeSet<u32> {
    /// Kinds that stand on their own: needed, but made for more than one table.
    const FOREIGN: &[&str] =
        &["SCHEMA", "EXTENSION", "TYPE", "DOMAIN", "FUNCTION", "COLLATION", "SERVER", "PUBLICATION"];
    let by_id: BTreeMap<u32, &Entry> = entries.iter().map(|entry| (entry.id, entry)).collect();
    let mut wanted: BTreeSet<u32> = entries.iter().filter(|entry| is_root(entry)).map(|entry| entry.id).collect();
    let is_table = |id: &u32| {
        by_id
            .get(id)
            .is_some_and(|entry| matches!(entry.kind(), "TABLE" | "FOREIGN TABLE" | "VIEW" | "MATERIALIZED VIEW"))
    };
    loop {
        let mut more: BTreeSet<u32> = BTreeSet::new();
        for entry in entries.iter().filter(|entry| !wanted.contains(&entry.id)) {
            let belongs = entry.needs.iter().any(|id| wanted.contains(id));
            let stays_within = entry.needs.iter().all(|id| !is_table(id) || wanted.contains(id));
            let is_other = is_table(&entry.id) || FOREIGN.contains(&entry.kind());
            if belongs && stays_within && !is_other {
                more.insert(entry.id);
            }
        }
        // A sequence is made before its table and tied to it afterwards.
        for entry in entries.iter().filter(|entry| wanted.contains(&entry.id) && entry.kind() == "SEQUENCE OWNED BY") {
            more.extend(entry.needs.iter().filter(|id| by_id.get(id).is_some_and(|entry| entry.kind() == "SEQUENCE")));
        }
        more.retain(|id| !wanted.contains(id));
        if more.is_empty() {
            return wanted;
        }
        wanted.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = ";\n; Archive created at 2026-11-21\n;     dbname: ef\n;\n\
        3; 2615 23024 SCHEMA - app ef_owner\n215; 1259 16403 TABLE app people ef\n;\tdepends on: 3\n\
        216; 1259 16404 SEQUENCE app people_id_seq ef\n;\tdepends on: 215 3\n\
        4000; 0 0 SEQUENCE OWNED BY app people_id_seq ef\n;\tdepends on: 216\n\
        300; 1259 16405 TABLE app teams ef\n400; 2606 1 FK CONSTRAINT app people people_team ef\n;\tdepends on: 215 300\n\
        401; 1259 2 INDEX app by_name ef\n;\tdepends on: 215\n402; 3466 3 EVENT TRIGGER - note ef\n\
        403; 0 0 COMMENT - EVENT TRIGGER note ef\n";

    #[test]
    fn the_table_of_contents_is_read_with_its_dependencies() {
        let entries = entries(LIST);
        assert_eq!(entries.len(), 9);
        let kinds: Vec<_> = entries.iter().map(Entry::kind).collect();
        assert_eq!(
            kinds,
            [
                "SCHEMA",
                "TABLE",
                "SEQUENCE",
                "SEQUENCE OWNED BY",
                "TABLE",
                "FK CONSTRAINT",
                "INDEX",
                "EVENT TRIGGER",
                "COMMENT"
            ]
        );
        assert_eq!((entries[5].name(), entries[5].needs.as_slice()), ("app people people_team ef", &[215, 300][..]));
        assert!(entries[7].is_event_trigger() && entries[8].is_event_trigger() && !entries[6].is_event_trigger());
    }

    #[test]
    fn a_table_alone_brings_what_belongs_to_it_only() {
        let entries = entries(LIST);
        let wanted = closure(&entries, |entry| entry.id == 215);
        assert_eq!(wanted.into_iter().collect::<Vec<_>>(), [215, 216, 401, 4000]);
        let both = closure(&entries, |entry| entry.kind() == "TABLE");
        assert!(both.contains(&400), "both ends of the key are there");
    }

    #[test]
    fn what_is_refused_is_told_from_what_fails() {
        let output = |said: &str| std::process::Output {
            status: std::os::unix::process::ExitStatusExt::from_raw(256),
            stdout: Vec::new(),
            stderr: said.as_bytes().to_vec(),
        };
        let refused = "pg_restore: while PROCESSING TOC:\npg_restore: from TOC entry 12; 0 0 COMMENT EXTENSION plpgsql \n\
                       pg_restore: error: could not execute query: ERROR:  must be owner of extension plpgsql\nCommand was: x\n\
                       pg_restore: warning: errors ignored on restore: 1\n";
        let mut never = |_: &str| panic!("nothing is to be tried again");
        let losses = judge(&output(refused), &mut never).unwrap();
        assert_eq!((losses.len(), losses[0].what.as_str()), (1, "COMMENT EXTENSION plpgsql"));
        let failed =
            format!("{refused}pg_restore: error: could not execute query: ERROR:  role \"x\" does not exist\n");
        assert_eq!(judge(&output(&failed), &mut never).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(judge(&output(""), &mut never).unwrap_err().kind(), Kind::Io);
        let killed =
            std::process::Output { status: std::os::unix::process::ExitStatusExt::from_raw(9), ..output(refused) };
        assert_eq!(judge(&killed, &mut never).unwrap_err().kind(), Kind::Io, "a signal");
        for cut_short in [refused.replace("errors ignored on restore: 1", ""), refused.replace(": 1\n", ": 2\n")] {
            assert_eq!(judge(&output(&cut_short), &mut never).unwrap_err().kind(), Kind::Io, "{cut_short}");
        }
        let deadlocked = "pg_restore: error: could not execute query: ERROR:  deadlock detected\nDETAIL:  Process 1 waits\n\
                          Command was: ALTER TABLE a\n    ADD CONSTRAINT b UNIQUE (c);\n\n\n\
                          pg_restore: error: could not execute query: ERROR:  there is no unique constraint\nCommand was: ALTER TABLE d;\n\
                          pg_restore: warning: errors ignored on restore: 2\n";
        let mut tried = Vec::new();
        let mut again = |statement: &str| {
            tried.push(statement.trim().to_owned());
            Ok(())
        };
        assert_eq!(judge(&output(deadlocked), &mut again).unwrap(), []);
        assert_eq!(tried, ["ALTER TABLE a\n    ADD CONSTRAINT b UNIQUE (c);", "ALTER TABLE d;"]);
    }
}
