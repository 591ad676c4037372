//! The files of a point's tree, and the shapes of those that are JSON.
//!
//! One page for both directions, so that what a drain writes and what a restore reads cannot drift
//! apart. Fields are added, never renamed: points outlive versions. Pure.

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

/// What this tree is, at its top.
pub(super) const SERVER: &str = "server.json";
/// Roles, memberships, tablespaces, as `pg_dumpall --globals-only` writes them. Absent where the
/// settings leave roles out.
pub(super) const GLOBALS: &str = "globals.sql";
/// The folder of databases.
pub(super) const DATABASES: &str = "databases";
/// What one database is, in its folder.
pub(super) const DATABASE: &str = "database.json";
/// All definitions, as an archive of `pg_dump`.
pub(super) const ARCHIVE: &str = "schema.dump";
/// The same for readers: what comes before the rows.
pub(super) const PRE_DATA: &str = "pre-data.sql";
/// What comes after the rows: indexes, constraints, triggers.
pub(super) const POST_DATA: &str = "post-data.sql";
/// The planner's statistics, from version 18 on.
pub(super) const STATISTICS: &str = "statistics.sql";
/// Where each sequence stood: one `setval` a line.
pub(super) const SEQUENCES: &str = "sequences.sql";
/// One [`Table`] a line.
pub(super) const TABLES: &str = "tables.ndjson";
/// The folder of the tables' rows.
pub(super) const DATA: &str = "data";
/// The folder of large objects.
pub(super) const LARGE_OBJECTS: &str = "large-objects";
/// One [`LargeObject`] a line, in that folder.
pub(super) const LARGE_OBJECT_INDEX: &str = "index.ndjson";

/// `server.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Server {
    /// Schema of this file; 1.
    pub(super) format: u32,
    /// The server's version in its own words, e.g. `15.18`.
    pub(super) version: String,
    /// `server_version_num`, e.g. 150018.
    pub(super) version_number: u32,
    /// `pg_control_system()`'s identifier, where the role may read it.
    #[serde(default)]
    pub(super) system_identifier: Option<String>,
    /// Bytes of a page; a page of a large object is a quarter of it.
    pub(super) block_bytes: u32,
    /// The version of `pg_dump` that wrote the archives, e.g. 18.
    pub(super) tools_major: u32,
    /// Databases, in the order of their folders.
    pub(super) databases: Vec<DatabaseEntry>,
}

/// A database and the name of its folder below `databases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DatabaseEntry {
    pub(super) name: String,
    pub(super) folder: String,
}

/// `database.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Database {
    pub(super) name: String,
    pub(super) owner: String,
    /// e.g. `UTF8`.
    pub(super) encoding: String,
    /// `libc`, `icu` or `builtin`.
    pub(super) provider: String,
    pub(super) collate: String,
    pub(super) ctype: String,
    /// The locale of ICU or of the builtin provider.
    #[serde(default)]
    pub(super) locale: Option<String>,
    #[serde(default)]
    pub(super) icu_rules: Option<String>,
    /// The version of the collation library at the source.
    #[serde(default)]
    pub(super) collation_version: Option<String>,
    pub(super) tablespace: String,
    pub(super) connection_limit: i64,
    #[serde(default)]
    pub(super) is_template: bool,
    /// `datacl` as text; `None` for the default privileges.
    #[serde(default)]
    pub(super) acl: Option<String>,
    #[serde(default)]
    pub(super) comment: Option<String>,
    /// `ALTER DATABASE … SET` and `ALTER ROLE … IN DATABASE … SET`.
    #[serde(default)]
    pub(super) settings: Vec<Setting>,
    #[serde(default)]
    pub(super) extensions: Vec<Extension>,
    #[serde(default)]
    pub(super) materialized_views: Vec<MaterializedView>,
    /// Whether schemas or tables were left out on purpose, so that definitions are not all there.
    #[serde(default)]
    pub(super) is_partial: bool,
}

/// One setting of a database, for everybody or for one role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setting {
    #[serde(default)]
    pub(super) role: Option<String>,
    pub(super) name: String,
    pub(super) value: String,
}

/// An extension of a database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extension {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) schema: String,
}

/// A materialized view, and whether it held rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MaterializedView {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) populated: bool,
}

/// One line of `tables.ndjson`: a table whose rows are in the point, or were left out on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Table {
    pub(super) schema: String,
    pub(super) name: String,
    /// The name of its folder below `data`.
    pub(super) folder: String,
    /// The columns of the COPY, in its order; empty for a table without columns that hold data.
    pub(super) columns: Vec<String>,
    /// Rows, bytes of COPY text, and the order-free hash of the rows.
    pub(super) rows: u64,
    pub(super) bytes: u64,
    pub(super) checksum: String,
    /// Whether its rows were left out by the settings.
    #[serde(default)]
    pub(super) rows_excluded: bool,
    /// Whether it belongs to an extension that marks it as configuration; then only the rows that are
    /// not the extension's own are in the point.
    #[serde(default)]
    pub(super) extension_condition: Option<String>,
}

/// One line of `large-objects/index.ndjson`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LargeObject {
    pub(super) oid: u32,
    pub(super) owner: String,
    #[serde(default)]
    pub(super) acl: Option<String>,
    #[serde(default)]
    pub(super) comment: Option<String>,
}

/// A name as a folder: bytes that would be misread stand as `%XX`.
pub(super) fn escaped(name: &str) -> String {
    let mut folder = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '%' | '/' | '.' | '\\' => folder.push_str(&format!("%{:02X}", character as u32)),
            _ if character.is_control() => {
                let mut bytes = [0; 4];
                character.encode_utf8(&mut bytes).bytes().for_each(|byte| folder.push_str(&format!("%{byte:02X}")));
            }
            _ => folder.push(character),
        }
    }
    folder
}

/// Reads one JSON file of the tree; `path` is for messages.
pub(super) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], path: &dyn std::fmt::Display) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::new(Kind::Corrupt, format!("`{path}` is not what it must be")).source(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_names_never_meet_and_never_leave_the_tree() {
        let names = ["a.b", "a%2Eb", "a/b", "..", ".", "a\nb", "é", "a b", "a\\b"];
        let folders: std::collections::BTreeSet<_> = names.iter().map(|name| escaped(name)).collect();
        assert_eq!(folders.len(), names.len());
        assert!(folders.iter().all(|folder| stillpoint_core::tree::check_name(folder.as_bytes()).is_ok()));
        assert_eq!(escaped("a.b/é"), "a%2Eb%2Fé");
    }

    #[test]
    fn what_later_versions_add_is_passed_over() {
        let text = br#"{"schema":"a","name":"b","folder":"a.b","columns":[],"rows":1,"bytes":2,"checksum":"x","new":1}"#;
        let table: Table = parse(text, &"tables.ndjson").unwrap();
        assert_eq!((table.rows, table.extension_condition), (1, None));
    }
}
