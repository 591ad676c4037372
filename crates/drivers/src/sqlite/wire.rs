//! Pure forms: `database.json`, patterns, names in the tree, and which queries only read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use crate::place;

/// The schema that `database.json` states.
pub(super) const SCHEMA: &str = "stillpoint.dev/sqlite/v1";

/// The description of one database beside its content.
pub(super) const DESCRIPTION: &[u8] = b"database.json";

/// The table that holds the environment stamp.
pub(super) const STAMP_TABLE: &str = "stillpoint_stamp";

/// What is known of one pinned database; `database.json` in its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The file's name at the source, for people.
    pub file: String,
    /// Bytes per page.
    pub page_bytes: u64,
    /// Pages in the view.
    pub pages: u64,
    /// `wal` or `rollback`.
    pub journal: String,
    /// `PRAGMA application_id`.
    pub application_id: i64,
    /// `PRAGMA user_version`.
    pub user_version: i64,
    /// `PRAGMA schema_version`.
    pub schema_version: i64,
    /// `PRAGMA encoding`.
    pub encoding: String,
    /// SHA-256 over the definitions of all tables, indexes, views and triggers, hex.
    pub schema_sha256: String,
    /// Rows by table; virtual tables and the stamp are left out. Empty when not counted.
    pub rows: BTreeMap<String, u64>,
    /// Rows whose foreign key finds nothing, as the source had them. `None` when not looked for.
    pub foreign_keys_broken: Option<u64>,
    /// The files' state that goes with exactly this view; `None` when writers were too near.
    /// Equality with a later state proves that nothing was written in between.
    pub files_state: Option<String>,
}

impl Description {
    /// Parses what stands in a point.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let description: Self = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(Kind::Corrupt, "`database.json` is not readable").source(error))?;
        if description.schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the database is stored as `{}`", description.schema))
                .hint(format!("this version reads `{SCHEMA}`; use a newer stillpoint")));
        }
        Ok(description)
    }

    /// The text as it is stored.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal("a database description does not serialize").source(error))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Rows of all tables.
    pub fn rows_total(&self) -> u64 {
        self.rows.values().sum()
    }
}

/// What the database's content is called in its folder: `app.db` becomes `app.sqlite`.
pub(super) fn content_name(path: &Path) -> Vec<u8> {
    let stem = path.file_stem().unwrap_or(OsStr::new("database"));
    // Room for the ending within the 255 bytes of a name.
    let mut name = stem.as_bytes()[..stem.len().min(240)].to_vec();
    name.extend_from_slice(b".sqlite");
    name
}

/// Whether `path`, given by its parts below the directory, matches `pattern`.
///
/// `*` and `?` match within one part, `**` matches any number of parts.
pub(super) fn matches(pattern: &str, path: &[Vec<u8>]) -> bool {
    let parts: Vec<&[u8]> = pattern.split('/').filter(|part| !part.is_empty()).map(str::as_bytes).collect();
    matches_parts(&parts, path)
}

fn matches_parts(pattern: &[&[u8]], path: &[Vec<u8>]) -> bool {
    match pattern.split_first() {
        None => path.is_empty(),
        Some((&b"**", rest)) => (0..=path.len()).any(|skipped| matches_parts(rest, &path[skipped..])),
        Some((first, rest)) => path
            .split_first()
            .is_some_and(|(name, deeper)| place::matches_name(first, name) && matches_parts(rest, deeper)),
    }
}

/// Whether a file beside a database belongs to it and is none itself.
pub(super) fn is_companion(name: &[u8]) -> bool {
    [&b"-wal"[..], b"-shm", b"-journal"].iter().any(|ending| name.ends_with(ending))
        || name.starts_with(b".stillpoint-")
}

/// Refuses text that is no plain query. SQLite itself refuses writes on these connections; this
/// check gives the better message, and keeps transaction statements away from the pin.
pub(super) fn check_query(sql: &str) -> Result<()> {
    let mut rest = sql.trim_start();
    loop {
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once('\n').map_or("", |(_, after)| after).trim_start();
        } else if let Some(comment) = rest.strip_prefix("/*") {
            rest = comment.split_once("*/").map_or("", |(_, after)| after).trim_start();
        } else {
            break;
        }
    }
    let word: String = rest.chars().take_while(char::is_ascii_alphabetic).collect();
    if ["select", "with", "values"].contains(&word.to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    Err(Error::new(Kind::Config, "the query is no SELECT").hint("query: SELECT object_key, id FROM models"))
}

/// Quotes a name for SQL.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Splits `rows:<table>.<column>`.
pub(super) fn parse_kind(kind: &str) -> Result<(&str, &str)> {
    kind.strip_prefix("rows:")
        .and_then(|rest| rest.rsplit_once('.'))
        .filter(|(table, column)| !table.is_empty() && !column.is_empty())
        .ok_or_else(|| {
            Error::new(Kind::Config, format!("a database holds no `{kind}`")).hint("kind: rows:<table>.<column>")
        })
}

/// Finds this process's lock of the given kind on an inode in the text of `/proc/locks`.
///
/// Device numbers are not compared: some file systems show another one there than `stat` does.
pub(super) fn holds_lock(locks: &str, process: u32, mode: &str, inode: u64, first: u64, last: u64) -> bool {
    lock_lines(locks).any(|lock| {
        lock.process == i64::from(process)
            && lock.mode == mode
            && lock.inode == inode
            && lock.start <= last
            && lock.end >= first
    })
}

/// Whether anyone holds a write lock on byte `at` of an inode, in the text of `/proc/locks`.
pub(super) fn is_write_locked(locks: &str, inode: u64, at: u64) -> bool {
    lock_lines(locks).any(|lock| lock.mode == "WRITE" && lock.inode == inode && lock.start <= at && lock.end >= at)
}

struct LockLine<'a> {
    mode: &'a str,
    process: i64,
    inode: u64,
    start: u64,
    end: u64,
}

/// Lines look like `12: POSIX  ADVISORY  READ 4321 fe:00:1234567 123 127`; those of waiters have
/// `->` behind the number and are passed over.
fn lock_lines(locks: &str) -> impl Iterator<Item = LockLine<'_>> {
    locks.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[_, class, _, mode, process, file, start, end] = fields.as_slice() else { return None };
        if class == "->" || class == "FLOCK" {
            return None;
        }
        Some(LockLine {
            mode,
            process: process.parse().ok()?,
            inode: file.rsplit(':').next()?.parse().ok()?,
            start: start.parse().ok()?,
            end: if end == "EOF" { u64::MAX } else { end.parse().ok()? },
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Vec<u8>> {
        text.split('/').map(|part| part.as_bytes().to_vec()).collect()
    }

    #[test]
    fn patterns_match_names_and_folders() {
        for (pattern, name) in [
            ("*.db", "a.db"),
            ("**/*.db", "a.db"),
            ("**/*.db", "x/y/a.db"),
            ("tenants/*/main.?b", "tenants/7/main.db"),
            ("a**b", "a--b"),
            ("**", "x/y"),
        ] {
            assert!(matches(pattern, &path(name)), "{pattern} {name}");
        }
        for (pattern, name) in [("*.db", "x/a.db"), ("*.db", "a.dbx"), ("a/?", "a/bc"), ("a/**/c", "a/b")] {
            assert!(!matches(pattern, &path(name)), "{pattern} {name}");
        }
    }

    #[test]
    fn only_queries_pass() {
        for good in ["SELECT 1", " -- c\n/* d */ with x as (select 1) select * from x", "VALUES (1)"] {
            assert!(check_query(good).is_ok(), "{good}");
        }
        for bad in ["", "COMMIT", "pragma query_only=0", "DELETE FROM x", "selectx 1", "-- select", "ATTACH 'x' AS y"] {
            assert!(check_query(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kinds_name_a_table_and_a_column() {
        assert_eq!(parse_kind("rows:models.key").expect("valid"), ("models", "key"));
        assert_eq!(parse_kind("rows:a.b.c").expect("valid"), ("a.b", "c"));
        for bad in ["keys", "rows:", "rows:models", "rows:.x", "rows:x."] {
            assert!(parse_kind(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn locks_are_found_by_process_inode_and_range() {
        let locks = "1: POSIX  ADVISORY  READ  77 fe:00:123 124 124\n\
                     2: -> POSIX  ADVISORY  WRITE 78 fe:00:123 124 124\n\
                     3: FLOCK  ADVISORY  WRITE 77 fe:00:123 0 EOF\n\
                     4: POSIX  ADVISORY  WRITE 80 fe:00:9 120 120\n\
                     broken line\n";
        assert!(holds_lock(locks, 77, "READ", 123, 123, 127));
        assert!(!holds_lock(locks, 78, "READ", 123, 123, 127));
        assert!(!holds_lock(locks, 77, "READ", 123, 125, 127));
        assert!(!holds_lock(locks, 77, "WRITE", 123, 0, 1000));
        assert!(is_write_locked(locks, 9, 120));
        assert!(!is_write_locked(locks, 123, 124));
    }

    #[test]
    fn content_names_never_meet_the_description() {
        assert_eq!(content_name(Path::new("/x/app.db")), b"app.sqlite");
        assert_eq!(content_name(Path::new("/x/database.json")), b"database.sqlite");
        assert_eq!(content_name(Path::new("/x/.db")), b".db.sqlite");
    }
}
