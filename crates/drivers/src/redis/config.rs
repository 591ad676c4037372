//! Settings of the `redis` driver. Pure: nothing here touches a store.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::Secret;
use url::Url;

/// The port that servers listen on unless told otherwise.
const PORT: u16 = 6379;

/// What stands under the store in `platform.yaml`: a server, or any node of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// `redis://host:port`, or `rediss://host:port` with TLS. Of a cluster, any node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// A folder instead of a server: a restore writes there what a plain server starts from. Such a
    /// store cannot be backed up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The ACL user. Without it the password is that of the default user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// Certificates that servers are trusted by, as PEM. Default: those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Our own certificate as PEM, where the server asks for one; goes with `key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// The key of `certificate`, as PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// How the view is pinned.
    #[serde(default)]
    pub mode: Mode,
    /// What a restore does with the times at which keys expire.
    #[serde(default)]
    pub ttl: Ttl,
    /// Whether a restore brings the ACL users back, other than `default` and our own. Default false.
    #[serde(default)]
    pub acl: bool,
    /// The address under which the target of a restore reaches this machine. Default: the address
    /// that our own connection to it has on our side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// How a restore reaches the target.
    #[serde(default)]
    pub restore_by: RestoreBy,
    /// Where a restore in place keeps what it replaces. Default: `kept` in the folder that holds the state of
    /// this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_old: Option<PathBuf>,
    /// How much may wait on our disk while the repository is slower than the server, in MiB; 0
    /// means as much as fits. Default 0.
    #[serde(default)]
    pub spool_mib_max: u64,
    /// How long a silent server is waited for, in seconds. Default 60, as servers have it for replicas.
    #[serde(default = "timeout")]
    pub timeout_seconds: u64,
}

/// How the view is pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// We attach as a replica before the cut; the cut is an offset in the stream of commands.
    #[default]
    Replica,
    /// The server forks in the cut. No stream piles up, but the pause contains the fork.
    Rdb,
}

/// What a restore does with the times at which keys expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Ttl {
    /// They stay: what has expired since the cut is gone.
    #[default]
    Keep,
    /// They move by the time since the cut: every key lives on for as long as it had left then.
    Shift,
    /// No key expires any more.
    Freeze,
}

/// How a restore reaches the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RestoreBy {
    /// As its master where that works, else key by key.
    #[default]
    Auto,
    /// As its master only.
    Master,
    /// Key by key, through `RESTORE`.
    Keys,
}

fn timeout() -> u64 {
    60
}

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Endpoint {
    pub host: String,
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// The settings of the same store as files in `folder`; nothing that reaches the source stays.
pub(super) fn into_folder(settings: &crate::Settings, folder: &std::path::Path) -> crate::Settings {
    let mut settings = settings.clone();
    settings.retain(|name, _| name == "ttl");
    settings.insert("directory".to_owned(), serde_json::Value::String(folder.to_string_lossy().into_owned()));
    settings
}

/// What an attachment asks for.
const ATTACH: &str = "+psync +replconf +ping +info";

/// The ACL rules that a store of these settings needs, ready to paste; none for a folder.
pub(super) fn policy(settings: &crate::Settings) -> Option<String> {
    if settings.contains_key("directory") {
        return None;
    }
    let text = |name: &str| settings.get(name).and_then(serde_json::Value::as_str);
    let user = text("user").unwrap_or("backup");
    let users = match settings.get("acl") {
        Some(serde_json::Value::Bool(true)) => " +acl|list +acl|setuser +acl|deluser +acl|save",
        _ => "",
    };
    let target = match text("restoreBy") {
        // Only we write then, and nothing but the stamp.
        Some("master") => format!(
            "~stillpoint:stamp +get +set +del +exists {ATTACH} +replicaof +config|get +config|set +client|list \
             +module|list +function|list +function|flush +flushall +bgsave +command{users}"
        ),
        // The commands behind the image may be any.
        _ => "~* &* +@all".to_owned(),
    };
    Some(format!(
        "# enough to back up, and to compare\n\
         ACL SETUSER {user} on ><password> {ATTACH}\n\
         # settings, users and modules in the point; of a cluster, its nodes\n\
         ACL SETUSER {user} +config|get +acl|list +module|list +cluster|nodes\n\
         # to tell restored copies apart, and to compare where commands follow the image\n\
         ACL SETUSER {user} ~stillpoint:stamp +get +command\n\
         # on the target of a restore\n\
         ACL SETUSER {user} on ><password> {target}\n"
    ))
}

impl Settings {
    /// Refuses what cannot name a server. After it, the settings hold.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: &str, hint: &str| Err(Error::new(Kind::Config, message).hint(hint));
        match (&self.url, &self.directory) {
            (Some(_), Some(_)) => return wrong("both `url` and `directory` are given", "name the server only"),
            (None, None) => return wrong("the server is not named", "url: redis://127.0.0.1:6379"),
            (None, Some(path)) if !path.is_absolute() => {
                return wrong("the directory is not absolute", "write the path from `/` on");
            }
            (None, Some(_)) => return Ok(()),
            (Some(_), None) => {}
        }
        if self.certificate.is_some() != self.key.is_some() {
            return wrong("`certificate` and `key` go together", "give both, or none");
        }
        if self.keep_old.as_ref().is_some_and(|path| !path.is_absolute()) {
            return wrong("`keepOld` is not absolute", "write the path from `/` on");
        }
        if !(1..=3600).contains(&self.timeout_seconds) {
            return wrong("`timeoutSeconds` is out of range", "1 to 3600");
        }
        self.endpoint().map(|_| ())
    }

    /// Host and port of the server that is named.
    pub(super) fn endpoint(&self) -> Result<Endpoint> {
        let text = self.url.as_deref().unwrap_or_default();
        let wrong = |message: String| Error::new(Kind::Config, message).hint("url: redis://127.0.0.1:6379");
        let url = Url::parse(text).map_err(|error| wrong(format!("`{text}` names no server")).source(error))?;
        if !matches!(url.scheme(), "redis" | "rediss" | "valkey" | "valkeys") {
            return Err(wrong(format!("`{}` is no scheme of a Redis server", url.scheme())));
        }
        if url.password().is_some() || !url.username().is_empty() {
            return Err(wrong("the url holds a user or a password".to_owned())
                .hint("user: backup, password: env:REDIS_PASSWORD"));
        }
        if !matches!(url.path(), "" | "/" | "/0") {
            return Err(wrong("the url names one database".to_owned())
                .hint("a store is a whole server; restore one database with a part: databases/1"));
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| wrong("no host".to_owned()))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_lowercase();
        Ok(Endpoint { host, port: url.port().unwrap_or(PORT) })
    }

    /// Whether connections are encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        self.url.as_deref().is_some_and(|url| url.starts_with("rediss:") || url.starts_with("valkeys:"))
    }

    /// How long a silent server is waited for.
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}
