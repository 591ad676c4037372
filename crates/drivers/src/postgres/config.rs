//! Settings of the `postgres` driver. Pure: nothing here touches a server.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::Secret;

use super::wire::identifier;
use crate::place::matches_name;

/// What stands under the store in `platform.yaml`: a server, and which of its databases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// The server's name or address. Either this or `socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The folder of the server's Unix socket, e.g. `/var/run/postgresql`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Default 5432. It names the socket's file, too.
    #[serde(default = "port")]
    pub port: u16,
    /// The role. Backups need no superuser: see the driver's README.
    pub user: String,
    /// Its password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// The database of the first connection. Default: the only one that `databases` names, if it is
    /// one, else `postgres`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// How the connection is protected. Default: `verify-full`; `prefer` to this machine itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Certificates, in PEM, of who vouches for the server. Default: those that the system trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Whether a standby may be backed up in place of its primary. What the primary has acknowledged and
    /// the standby has not applied yet is missing from the point, which says how far it was behind.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_standby: bool,
    /// Which databases, by name or with `*` and `?`. Default: all but templates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<String>,
    /// Databases that are left out of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_databases: Vec<String>,
    /// Which schemas. Default: all. Definitions of other schemas are left out as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schemas: Vec<String>,
    /// Schemas that are left out of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_schemas: Vec<String>,
    /// Which tables, as `schema.table`. Default: all of the schemas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
    /// Tables that are left out, definition and rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_tables: Vec<String>,
    /// Tables whose definition is kept and whose rows are left out: caches, queues, logs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_rows: Vec<String>,
    /// Whether roles and their password hashes are part of a point. Default `withPasswords` where the
    /// role may read them (superusers), else `withoutPasswords`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roles: Option<Roles>,
    /// Connections that copy data at the same time; one more per database holds the view. 1 to 64,
    /// default 4.
    #[serde(default = "connections")]
    pub connections: usize,
    /// The folder of `pg_dump` and `pg_restore`. Default: the newest that is installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<PathBuf>,
    /// The database that queries of references and SQL steps run in. Default as for `database`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_database: Option<String>,
    /// For restores: under which name a database of the point comes back. Others keep their name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rename: BTreeMap<String, String>,
    /// How long a connection may take to come up, in seconds. Default 10.
    #[serde(default = "connect_seconds")]
    pub connect_timeout_seconds: u32,
    /// How long `prepare` waits for tables that someone holds exclusively, in seconds. Default 10.
    #[serde(default = "lock_seconds")]
    pub lock_timeout_seconds: u32,
}

/// How a connection over TCP is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Tls {
    /// Never encrypted.
    Disable,
    /// Encrypted if the server can; its certificate is not checked.
    Prefer,
    /// Encrypted or not at all; the certificate is not checked.
    Require,
    /// Encrypted, and the certificate must be the host's, by someone who is trusted.
    VerifyFull,
}

/// What of the server's roles is part of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Roles {
    /// With the hashes of their passwords; needs `pg_read_all_data`, or a superuser.
    WithPasswords,
    /// Without them: passwords must be set anew after a restore.
    WithoutPasswords,
    /// No roles, no tablespaces.
    None,
}

fn port() -> u16 {
    5432
}

fn connections() -> usize {
    4
}

fn connect_seconds() -> u32 {
    10
}

fn lock_seconds() -> u32 {
    10
}

/// The least privileges that a backup by these settings needs, as SQL; of an example where they name nothing.
pub(super) fn policy(settings: &crate::Settings) -> Result<Option<String>> {
    let mut all: serde_json::Map<String, Value> = settings.clone().into_iter().collect();
    all.entry("user").or_insert_with(|| "backup".into());
    if !all.contains_key("socket") {
        all.entry("host").or_insert_with(|| "db.internal".into());
    }
    let settings: Settings = serde_json::from_value(Value::Object(all))
        .map_err(|error| Error::new(Kind::Config, format!("settings: {error}")))?;
    let user = identifier(&settings.user);
    let mut text = format!(
        "-- PostgreSQL 14 and newer; for psql, as a superuser. Before 14: see the driver's page.\n\
         CREATE ROLE {user} LOGIN;\n\
         GRANT pg_read_all_data TO {user};\n"
    );
    let mut databases = settings.named_databases().unwrap_or_default();
    databases.extend([settings.first_database(), settings.query_database()]);
    databases.sort_unstable();
    databases.dedup();
    for database in databases {
        text.push_str(&format!("GRANT CONNECT ON DATABASE {} TO {user};\n", identifier(database)));
    }
    if settings.named_databases().is_none() {
        text.push_str("-- The same for every database of the store that not everybody may connect to.\n");
    }
    text.push_str(&format!("-- Its password:\n-- \\password {}\n", settings.user));
    text.push_str(&format!("-- Only where row security hides rows:\n-- ALTER ROLE {user} BYPASSRLS;\n"));
    text.push_str(&format!(
        "-- At the target of a restore it needs to make databases. Owners, roles and what only superusers may make are\n\
         -- left out and named as losses, unless it is a superuser there.\n-- ALTER ROLE {user} CREATEDB;\n"
    ));
    Ok(Some(text))
}

impl Settings {
    /// Refuses what can never work. After it, the settings cannot fail.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: &str, hint: &str| Err(Error::new(Kind::Config, message).hint(hint));
        match (&self.host, &self.socket) {
            (Some(_), Some(_)) => return wrong("both `host` and `socket` are given", "name one of them"),
            (None, None) => {
                return wrong("the server is not named", "host: db.internal, or socket: /var/run/postgresql");
            }
            (None, Some(path)) if !path.is_absolute() => {
                return wrong("`socket` is not absolute", "socket: /var/run/postgresql");
            }
            _ => {}
        }
        if self.host.as_deref() == Some("") || self.user.is_empty() {
            return wrong("`host` and `user` must not be empty", "host: db.internal");
        }
        if !(1..=64).contains(&self.connections) {
            return wrong("`connections` is out of range", "1 to 64");
        }
        if !(1..=3600).contains(&self.connect_timeout_seconds) || !(1..=3600).contains(&self.lock_timeout_seconds) {
            return wrong("a time-out is out of range", "1 to 3600 seconds");
        }
        let lists = [
            &self.databases,
            &self.exclude_databases,
            &self.schemas,
            &self.exclude_schemas,
            &self.tables,
            &self.exclude_tables,
            &self.exclude_rows,
        ];
        if lists.iter().any(|list| list.iter().any(String::is_empty)) {
            return wrong("a pattern is empty", "databases: [app, \"tenant_*\"]");
        }
        if let Some(pattern) = self
            .tables
            .iter()
            .chain(&self.exclude_tables)
            .chain(&self.exclude_rows)
            .find(|pattern| !pattern.contains('.'))
        {
            return Err(
                Error::new(Kind::Config, format!("`{pattern}` names no table")).hint("write schema.table, or *.table")
            );
        }
        let mut names: Vec<_> = self.rename.values().collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return wrong("`rename` gives two databases one name", "rename: { app: app_copy }");
        }
        Ok(())
    }

    /// How the connection is protected.
    pub(super) fn tls(&self) -> Tls {
        let here = self.host.as_deref().is_none_or(|host| {
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        });
        self.tls.unwrap_or(if here { Tls::Prefer } else { Tls::VerifyFull })
    }

    /// How long a connection may take to come up.
    pub(super) fn connect_time_max(&self) -> Duration {
        Duration::from_secs(self.connect_timeout_seconds.into())
    }

    /// The only database of the store, if its settings name just one.
    pub(super) fn only_database(&self) -> Option<&str> {
        match self.databases.as_slice() {
            [name] if !is_pattern(name) => Some(name),
            _ => None,
        }
    }

    /// The databases by name, if the settings name them all without patterns.
    pub(super) fn named_databases(&self) -> Option<Vec<&str>> {
        let named = !self.databases.is_empty() && !self.databases.iter().any(|name| is_pattern(name));
        let mut names: Vec<&str> = self.databases.iter().map(String::as_str).collect();
        names.retain(|name| self.has_database(name));
        names.sort_unstable();
        names.dedup();
        named.then_some(names)
    }

    /// The database of the first connection.
    pub(super) fn first_database(&self) -> &str {
        self.database.as_deref().or(self.only_database()).unwrap_or("postgres")
    }

    /// The database of queries and SQL steps.
    pub(super) fn query_database(&self) -> &str {
        self.query_database.as_deref().or(self.only_database()).or(self.database.as_deref()).unwrap_or("postgres")
    }

    /// The database of queries in what a restore made of the store: `rename` may have given it another
    /// name, and the only database of a point goes into the only one that is named.
    pub(super) fn restored_query_database(&self) -> &str {
        let name = self.query_database();
        match (self.rename.get(name), self.only_database()) {
            (Some(renamed), _) => renamed,
            (None, Some(only)) if !self.has_database(name) => only,
            _ => name,
        }
    }

    /// Whether a database of the server is part of the store.
    pub(super) fn has_database(&self, name: &str) -> bool {
        chosen(name, &self.databases, &self.exclude_databases)
    }

    /// Whether a schema is part of the store.
    pub(super) fn has_schema(&self, name: &str) -> bool {
        chosen(name, &self.schemas, &self.exclude_schemas)
    }

    /// Whether a table is part of the store, with or without rows. Our own two are not.
    pub(super) fn has_table(&self, schema: &str, name: &str) -> bool {
        let is_ours = schema == super::STAMP_SCHEMA && super::STAMP_TABLES.contains(&name);
        !is_ours && self.names_table(schema, name)
    }

    /// Whether the patterns take in a table, whoever it belongs to.
    pub(super) fn names_table(&self, schema: &str, name: &str) -> bool {
        self.has_schema(schema) && chosen(&format!("{schema}.{name}"), &self.tables, &self.exclude_tables)
    }

    /// Whether the rows of a table that is part of the store are, too.
    pub(super) fn has_rows(&self, schema: &str, name: &str) -> bool {
        !matches_any(&format!("{schema}.{name}"), &self.exclude_rows)
    }

    /// The name that a database of a point gets here. `of` is how many databases the point has: the
    /// only database of a point goes into the only one that these settings name.
    pub(super) fn target_name<'a>(&'a self, of_point: &'a str, of: usize) -> &'a str {
        match (self.rename.get(of_point), self.only_database()) {
            (Some(renamed), _) => renamed,
            (None, Some(only)) if of == 1 => only,
            _ => of_point,
        }
    }
}

fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

fn matches_any(name: &str, patterns: &[String]) -> bool {
    patterns.iter().any(|pattern| matches_name(pattern.as_bytes(), name.as_bytes()))
}

fn chosen(name: &str, included: &[String], excluded: &[String]) -> bool {
    (included.is_empty() || matches_any(name, included)) && !matches_any(name, excluded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: serde_json::Value) -> Settings {
        let mut all = serde_json::json!({ "host": "db.internal", "user": "backup" });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn what_names_no_server_or_no_table_is_refused() {
        settings(serde_json::json!({})).validate().unwrap();
        for wrong in [
            serde_json::json!({ "socket": "/run" }),
            serde_json::json!({ "connections": 0 }),
            serde_json::json!({ "tables": ["models"] }),
            serde_json::json!({ "databases": [""] }),
            serde_json::json!({ "rename": { "a": "x", "b": "x" } }),
            serde_json::json!({ "lockTimeoutSeconds": 0 }),
        ] {
            let error = settings(wrong.clone()).validate().unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{wrong}");
            assert!(error.hint_text().is_some(), "{wrong}");
        }
    }

    #[test]
    fn databases_schemas_and_tables_are_chosen_by_pattern() {
        let all = settings(serde_json::json!({}));
        assert!(all.has_database("x") && all.has_table("public", "t") && all.has_rows("public", "t"));
        assert!(!all.has_table("stillpoint", "stamp") && !all.has_table("stillpoint", "opening"));
        assert!(all.has_table("stillpoint", "theirs"), "a schema of that name may be the user's, too");
        let some = settings(serde_json::json!({
            "databases": ["app", "tenant_*"], "excludeDatabases": ["tenant_test*"],
            "excludeTables": ["*.tmp_*"], "excludeRows": ["log.*"],
        }));
        assert!(some.has_database("app") && some.has_database("tenant_1"));
        assert!(!some.has_database("tenant_test1") && !some.has_database("postgres"));
        assert!(!some.has_table("public", "tmp_1") && some.has_table("log", "a") && !some.has_rows("log", "a"));
        assert_eq!((some.first_database(), some.named_databases()), ("postgres", None));
    }

    #[test]
    fn the_only_database_of_a_point_goes_into_the_only_one_that_is_named() {
        let one = settings(serde_json::json!({ "databases": ["copy"] }));
        assert_eq!((one.target_name("app", 1), one.target_name("app", 2)), ("copy", "app"));
        assert_eq!((one.first_database(), one.query_database()), ("copy", "copy"));
        let renamed = settings(serde_json::json!({ "databases": ["copy"], "rename": { "app": "other" } }));
        assert_eq!(renamed.target_name("app", 1), "other");
        assert_eq!(renamed.restored_query_database(), "copy");
    }

    #[test]
    fn queries_run_where_a_restore_put_their_database() {
        let of = |more| settings(more).restored_query_database().to_owned();
        let rename = serde_json::json!({ "app": "app_copy" });
        assert_eq!(of(serde_json::json!({ "databases": ["app"] })), "app");
        assert_eq!(of(serde_json::json!({ "databases": ["app"], "rename": rename })), "app_copy");
        assert_eq!(
            of(serde_json::json!({ "databases": ["app", "b"], "queryDatabase": "app", "rename": rename })),
            "app_copy"
        );
        assert_eq!(of(serde_json::json!({ "databases": ["copy"], "queryDatabase": "app" })), "copy");
        assert_eq!(of(serde_json::json!({ "databases": ["a", "b"], "queryDatabase": "b", "rename": rename })), "b");
    }

    #[test]
    fn the_policy_names_role_and_databases_and_no_more() {
        let of = |settings: serde_json::Value| {
            let text = policy(&serde_json::from_value(settings).unwrap()).unwrap().unwrap();
            let statements = text.lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n");
            (text, statements)
        };
        let (text, statements) = of(serde_json::json!({}));
        let all = "CREATE ROLE \"backup\" LOGIN;\nGRANT pg_read_all_data TO \"backup\";\n\
                   GRANT CONNECT ON DATABASE \"postgres\" TO \"backup\";";
        assert_eq!(statements, all);
        assert!(text.contains("every database of the store"), "{text}");
        let (text, statements) = of(serde_json::json!({ "user": "b\"k", "databases": ["app", "x"], "database": "x" }));
        assert!(statements.contains("\"b\"\"k\"") && statements.contains("DATABASE \"app\""), "{statements}");
        assert!(!statements.contains("SUPERUSER") && !statements.contains("\"postgres\""), "{statements}");
        assert!(!text.contains("every database of the store"), "{text}");
    }

    #[test]
    fn certificates_are_checked_unless_the_server_is_this_machine() {
        assert_eq!(settings(serde_json::json!({})).tls(), Tls::VerifyFull);
        assert_eq!(settings(serde_json::json!({ "host": "127.0.0.1" })).tls(), Tls::Prefer);
        assert_eq!(settings(serde_json::json!({ "host": "localhost", "tls": "require" })).tls(), Tls::Require);
    }
}
