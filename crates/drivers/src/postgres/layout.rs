//! What stands where in a point: names of files and folders, and the JSON that describes a server, its
//! databases and its tables. Pure; written by the drain, read by the way back.
//!
//! ```text
//! HOW-TO-RESTORE.txt
//! databases/<database>/data/<schema>.<table>/<8 digits>.copy   rows, COPY text
//! databases/<database>/database.json                           Database
//! databases/<database>/large-objects/index.ndjson              one LargeObject a line
//! databases/<database>/large-objects/<8 digits>.copy           COPY text: oid, offset, bytes
//! databases/<database>/post-data.sql, pre-data.sql             for people and for psql
//! databases/<database>/schema.dump                             the same, as pg_dump -Fc has it
//! databases/<database>/sequences.sql                           one setval a line
//! databases/<database>/statistics.sql                          where pg_dump can (18)
//! databases/<database>/tables.ndjson                           one Table a line, largest first
//! globals.sql                                                  roles, tablespaces
//! server.json                                                  Server
//! totals.ndjson                                                one Total a line
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::wire::Tally;

/// The schema that `server.json` states.
pub(super) const SCHEMA: &str = "stillpoint.dev/postgres/v1";

pub(super) const HOW_TO: &str = "HOW-TO-RESTORE.txt";
pub(super) const DATABASES: &str = "databases";
pub(super) const GLOBALS: &str = "globals.sql";
pub(super) const SERVER: &str = "server.json";
pub(super) const TOTALS: &str = "totals.ndjson";
pub(super) const DATA: &str = "data";
pub(super) const DATABASE: &str = "database.json";
pub(super) const LARGE_OBJECTS: &str = "large-objects";
pub(super) const INDEX: &str = "index.ndjson";
pub(super) const POST_DATA: &str = "post-data.sql";
pub(super) const PRE_DATA: &str = "pre-data.sql";
pub(super) const DUMP: &str = "schema.dump";
pub(super) const SEQUENCES: &str = "sequences.sql";
pub(super) const STATISTICS: &str = "statistics.sql";
pub(super) const TABLES: &str = "tables.ndjson";

/// How many large objects one file holds, by rank of their oid. Fixed, so that unchanged ones give the
/// same bytes.
pub(super) const LARGE_OBJECTS_PER_FILE: u64 = 1000;

/// `server.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Server {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The server's version in its own words.
    pub version: String,
    /// `server_version_num`.
    pub version_number: u32,
    /// The cluster's identifier; empty where the role may not read it.
    pub system_identifier: String,
    /// The timeline of its log.
    pub timeline: u32,
    /// Whether the point was taken from a standby.
    pub standby: bool,
    /// The databases of the point, by name.
    pub databases: Vec<String>,
    /// What `globals.sql` holds: `withPasswords`, `withoutPasswords` or `none`.
    pub roles: String,
    /// Settings of the server that a restored one should be compared with.
    pub settings: BTreeMap<String, String>,
    /// The program that wrote the definitions: `pg_dump (PostgreSQL) 16.4`.
    pub tool: String,
}

/// `database.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Database {
    pub name: String,
    pub oid: u32,
    pub owner: String,
    /// `UTF8`, `LATIN1`, `SQL_ASCII` …: the encoding of the database and of the files in `data`.
    pub encoding: String,
    pub collate: String,
    pub ctype: String,
    /// `libc`, `icu` or `builtin`.
    pub provider: String,
    /// Locale of the providers `icu` and `builtin`.
    pub locale: Option<String>,
    /// Tailoring rules of the provider `icu`.
    pub icu_rules: Option<String>,
    /// What the provider's collation was when the database was made.
    pub collation_version: Option<String>,
    pub tablespace: String,
    /// -1: no limit.
    pub connection_limit: i32,
    pub allow_connections: bool,
    pub is_template: bool,
    pub comment: Option<String>,
    /// Grants as `aclexplode` reads them, e.g. `app=CTc/postgres`; `None` is the default.
    pub grants: Option<Vec<String>>,
    /// `ALTER DATABASE … SET`: role (empty: all), then `name=value`.
    pub settings: Vec<(String, String)>,
    /// Name, schema and version of each extension.
    pub extensions: Vec<(String, String, String)>,
    /// The view of the cut, as `pg_current_snapshot()` has it.
    pub snapshot: String,
    /// Whether everything that the view shows was on the server's disk when the point was made.
    #[serde(default)]
    pub settled: bool,
    /// Large objects in the point.
    pub large_objects: u64,
    /// Whether the large objects' content is in the point.
    pub large_objects_kept: bool,
}

/// A line of `tables.ndjson`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    pub schema: String,
    pub name: String,
    pub oid: u32,
    pub kind: TableKind,
    /// Its folder in `data`.
    pub folder: String,
    /// The columns in the files, in order. Generated ones are not.
    pub columns: Vec<String>,
    /// The SQL condition of the rows that are in the files, for an extension's own tables.
    pub filter: Option<String>,
    /// Files `00000000.copy` to `files - 1`.
    pub files: u64,
    /// Each file holds the rows of so many 8 KiB blocks; 0: one file for all.
    pub stride: u64,
    /// Blocks of 8 KiB at the cut.
    pub blocks: u64,
    /// For a materialized view: whether it was filled.
    pub populated: bool,
    /// Whether rows are in the point, as far as the settings go.
    pub rows_kept: bool,
    /// What must be equal for unchanged rows to have unchanged text; absent where that cannot be said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<String>,
}

/// What a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum TableKind {
    /// With rows of its own; partitions, too.
    Table,
    /// Its rows are those of its partitions.
    Partitioned,
    /// To be filled anew.
    MaterializedView,
    /// Its rows are elsewhere.
    Foreign,
}

/// A line of `totals.ndjson`: what was copied of one table. [`LARGE_OBJECTS`] stands for a table where
/// the schema is empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Total {
    pub database: String,
    pub schema: String,
    pub table: String,
    pub rows: u64,
    pub bytes: u64,
    /// Wrapping sum of the hashes of all rows as COPY text has them, in hex.
    pub hash: String,
    /// The same for each file: rows, bytes, hash.
    pub files: Vec<(u64, u64, String)>,
}

impl Total {
    /// Sums up the files of a table.
    pub(super) fn new(database: &str, schema: &str, table: &str, files: &[Tally]) -> Self {
        let mut sum = Tally::default();
        files.iter().for_each(|file| sum.merge(file));
        let hex = |tally: &Tally| format!("{:016x}", tally.hash);
        Self {
            database: database.to_owned(),
            schema: schema.to_owned(),
            table: table.to_owned(),
            rows: sum.rows,
            bytes: sum.bytes,
            hash: hex(&sum),
            files: files.iter().map(|file| (file.rows, file.bytes, hex(file))).collect(),
        }
    }

    /// The tally of file `index`, as it was copied.
    pub(super) fn file(&self, index: usize) -> Option<Tally> {
        let (rows, bytes, hash) = self.files.get(index)?;
        Some(Tally { rows: *rows, bytes: *bytes, hash: u64::from_str_radix(hash, 16).ok()? })
    }
}

/// A line of `large-objects/index.ndjson`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LargeObject {
    pub oid: u32,
    pub owner: String,
    pub grants: Option<Vec<String>>,
    pub comment: Option<String>,
}

/// The name of file `index`.
pub(super) fn file_name(index: u64) -> String {
    format!("{index:08}.copy")
}

/// The folder of a database in the tree.
pub(super) fn database_folder(name: &str) -> String {
    escaped(name)
}

/// The folder of a table in `data`. `oid` tells apart what is too long for a file name.
pub(super) fn table_folder(schema: &str, name: &str, oid: u32) -> String {
    let whole = format!("{}.{}", escaped(schema), escaped(name));
    if whole.len() <= 255 {
        return whole;
    }
    let mut end = 230;
    while !whole.is_char_boundary(end) || whole[end.saturating_sub(2)..end].contains('%') {
        end -= 1;
    }
    format!("{}%~{oid}", &whole[..end])
}

/// A name as a part of a file name: `%`, `/`, `.` and control characters become `%` and two digits.
fn escaped(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '%' | '/' | '.' | '\x7f' | '\0'..='\x1f' => text.push_str(&format!("%{:02X}", character as u32)),
            other => text.push(other),
        }
    }
    text
}

/// One JSON line for each value.
pub(super) fn lines<T: Serialize>(values: impl IntoIterator<Item = T>) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for value in values {
        serde_json::to_writer(&mut text, &value).map_err(unserializable)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// A JSON document for people, too.
pub(super) fn document<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(unserializable)?;
    text.push(b'\n');
    Ok(text)
}

fn unserializable(error: serde_json::Error) -> Error {
    Error::internal("a description does not serialize").source(error)
}

/// Reads what [`document`] wrote; `name` is for the error.
pub(super) fn parse<T: for<'a> Deserialize<'a>>(name: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text)
        .map_err(|error| Error::new(Kind::Corrupt, format!("`{name}` is not readable")).source(error))
}

/// Reads what [`lines`] wrote; `name` is for the error.
pub(super) fn parse_lines<T: for<'a> Deserialize<'a>>(name: &str, text: &[u8]) -> Result<Vec<T>> {
    text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(|line| parse(name, line)).collect()
}

impl Server {
    /// Parses `server.json`; an unknown form is refused.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let form: serde_json::Value = parse(SERVER, text)?;
        match form.get("schema").and_then(serde_json::Value::as_str) {
            Some(SCHEMA) => parse(SERVER, text),
            other => Err(Error::new(Kind::Unsupported, format!("the server is stored as `{}`", other.unwrap_or("?")))
                .hint(format!("this version reads `{SCHEMA}`; use a newer stillpoint"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_a_folder_of_its_own_whatever_it_is_called() {
        assert_eq!(table_folder("public", "models", 1), "public.models");
        assert_eq!(table_folder("a.b", "c", 1), "a%2Eb.c");
        assert_eq!(table_folder("a", "b.c", 1), "a.b%2Ec");
        assert_eq!(database_folder(".."), "%2E%2E");
        assert_eq!(database_folder("a/b%\n"), "a%2Fb%25%0A");
        let long = "/".repeat(63);
        let (one, two) = (table_folder(&long, &long, 1), table_folder(&long, &long, 2));
        assert!(one.len() <= 255 && one != two);
        let umlauts = "ä.".repeat(21);
        assert!(table_folder(&umlauts, &long, 7).len() <= 255);
    }

    #[test]
    fn descriptions_of_another_form_are_refused() {
        assert_eq!(
            Server::parse(b"{\"schema\":\"stillpoint.dev/postgres/v9\"}").unwrap_err().kind(),
            Kind::Unsupported
        );
        assert_eq!(Server::parse(b"{").unwrap_err().kind(), Kind::Corrupt);
        let total = Total::new("app", "public", "t", &[Tally { rows: 1, bytes: 2, hash: 3 }; 2]);
        assert_eq!((total.rows, total.bytes, total.hash.as_str()), (2, 4, "0000000000000006"));
        assert_eq!(total.file(1), Some(Tally { rows: 1, bytes: 2, hash: 3 }));
        let text = lines([&total, &total]).unwrap();
        assert_eq!(parse_lines::<Total>(TOTALS, &text).unwrap(), [total.clone(), total]);
    }
}
