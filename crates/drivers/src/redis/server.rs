//! What servers say of themselves: version, role, readiness, facts for the point; and of clusters,
//! which masters hold which slots.
//!
//! Only asks; changes nothing on any server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::client::{Access, Connection};
use super::config::Endpoint;
use super::loan::Note;
use super::wire::{self, Reply};

/// The oldest version whose replication is known here.
const MAJOR_MIN: u32 = 6;
/// The first version that sends times of expiry as moments to its replicas.
const MAJOR_ABSOLUTE: u32 = 7;
/// Parts of the names of settings that hold secrets: `masterauth`, `primaryauth`, `requirepass`.
const SECRET_SETTINGS: [&str; 3] = ["pass", "auth", "secret"];
/// How many slots a cluster has.
pub(super) const SLOTS: u16 = 16_384;

/// A range of slots, both ends included.
pub(super) type Slots = (u16, u16);

/// One server of the store, as found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Node {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Its id in its cluster; empty without cluster.
    pub id: String,
    /// The slots that it holds; none without cluster.
    pub slots: Vec<Slots>,
}

impl Node {
    /// The name of its folder in the tree: the first slot, so that folders sort like slots.
    pub fn folder(&self) -> String {
        let first = self.slots.first().map_or(0, |(from, _)| *from);
        format!("{first:05}")
    }

    /// Whether it holds `slot`.
    pub fn holds(&self, slot: u16) -> bool {
        self.slots.iter().any(|(from, to)| (*from..=*to).contains(&slot))
    }
}

/// What one server said of itself before the cut; part of `store.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ServerFacts {
    /// `redis` or `valkey`.
    pub software: String,
    /// Its version.
    pub version: String,
    /// Where it was.
    pub endpoint: String,
    /// Its id in its cluster.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The slots that it held.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<Slots>,
    /// How many databases it has.
    pub databases: u32,
    /// The modules that a target must have as well; `None` where we might not ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<Vec<String>>,
    /// Its memory in use, in bytes.
    pub used_memory: u64,
}

/// A server's answers that are kept as files.
#[derive(Debug, Clone, Default)]
pub(super) struct Papers {
    /// `ACL LIST`, if we may ask.
    pub acl: Option<String>,
    /// `CONFIG GET *` without secrets, if we may ask.
    pub config: Option<String>,
}

/// `redis` or `valkey`, and the version.
pub(super) fn version(info: &str) -> (String, String) {
    match wire::info(info, "valkey_version") {
        Some(version) => ("valkey".to_owned(), version.to_owned()),
        None => ("redis".to_owned(), wire::info(info, "redis_version").unwrap_or("unknown").to_owned()),
    }
}

/// Refuses what is no server that can be worked with: a Sentinel, one that loads or is too old.
pub(super) fn check_is_ready(connection: &mut Connection, info: &str) -> Result<()> {
    // The name that Valkey has for it comes second.
    if ["redis_mode", "server_mode"].iter().any(|name| wire::info(info, name) == Some("sentinel")) {
        return Err(sentinel(connection));
    }
    let (software, version) = version(info);
    let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if major < MAJOR_MIN {
        return Err(Error::new(Kind::Unsupported, format!("{software} {version} is too old"))
            .hint(format!("version {MAJOR_MIN} and later are supported")));
    }
    if wire::info(info, "loading") == Some("1") {
        return Err(Error::new(Kind::Unreachable, format!("{} is loading its data", connection.endpoint())).temporary());
    }
    Ok(())
}

/// Refuses what cannot be the store itself: a replica, and what is not ready.
pub(super) fn check_is_master(connection: &mut Connection, info: &str) -> Result<()> {
    check_is_ready(connection, info)?;
    if wire::info(info, "role") != Some("master") {
        if let Some(note) = Note::of_led(connection, info)? {
            let message = format!("the restore `{}` into {} was interrupted", note.restore, connection.endpoint());
            return Err(Error::new(Kind::Conflict, message)
                .hint(format!("run it again: it goes on; or give it up: {}", note.farewell())));
        }
        let host = wire::info(info, "master_host").unwrap_or("?");
        let port = wire::info(info, "master_port").unwrap_or("?");
        return Err(Error::new(Kind::Conflict, format!("{} is a replica", connection.endpoint())).hint(format!(
            "a replica lags behind what was acknowledged; name its master: url: redis://{host}:{port}"
        )));
    }
    Ok(())
}

/// Refuses to follow the commands of servers before 7: they send times of expiry as `in 60 seconds`,
/// which would count anew from the restore.
pub(super) fn check_sends_absolute_times(info: &str) -> Result<()> {
    let (software, version) = version(info);
    let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if major >= MAJOR_ABSOLUTE {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, format!("the commands of {software} {version} hold relative times of expiry"))
        .hint("`mode: rdb` makes the image at the cut, so that no command has to be followed"))
}

/// Names the masters that a Sentinel knows.
fn sentinel(connection: &mut Connection) -> Error {
    let error = Error::new(Kind::Config, format!("{} is a Sentinel, no server", connection.endpoint()));
    let masters = match connection.command(&["SENTINEL", "MASTERS"]) {
        Ok(masters) => masters,
        Err(cause) => return error.source(cause).hint("name the master that it watches"),
    };
    let named = masters.items().iter().map(|master| {
        let facts: BTreeMap<String, String> =
            master.items().chunks_exact(2).map(|pair| (pair[0].text(), pair[1].text())).collect();
        let fact = |name: &str| facts.get(name).cloned().unwrap_or_default();
        format!("url: redis://{}:{} (`{}`)", fact("ip"), fact("port"), fact("name"))
    });
    let named: Vec<String> = named.collect();
    error.hint(format!("name the master that it watches: {}", named.join(", or ")))
}

/// The masters of the store: the one server, or all masters of its cluster, by first slot.
///
/// # Errors
/// `Conflict` while slots migrate, or while some are held by nobody.
pub(super) fn masters(connection: &mut Connection, info: &str) -> Result<Vec<Node>> {
    if wire::info(info, "cluster_enabled") != Some("1") {
        let endpoint = connection.endpoint().clone();
        return Ok(vec![Node { endpoint, id: String::new(), slots: Vec::new() }]);
    }
    let text = connection.command(&["CLUSTER", "NODES"])?.text();
    let nodes = parse_nodes(&text, &connection.endpoint().host)?;
    let held: u32 = nodes.iter().flat_map(|node| &node.slots).map(|(from, to)| u32::from(to - from) + 1).sum();
    if held != u32::from(SLOTS) {
        let message = format!("the cluster holds {held} of its {SLOTS} slots");
        return Err(Error::new(Kind::Conflict, message)
            .temporary()
            .hint("see CLUSTER INFO; every slot needs a master"));
    }
    Ok(nodes)
}

/// Asks every master of a cluster whether it holds what another one said, and nothing moves: a node
/// tells only of itself that slots leave it or come to it.
///
/// # Errors
/// `Conflict` while slots migrate.
pub(super) fn check_settled(access: &Access, nodes: &[Node]) -> Result<()> {
    for node in nodes.iter().filter(|node| !node.slots.is_empty()) {
        let mut connection = Connection::open(access, &node.endpoint)?;
        let text = connection.command(&["CLUSTER", "NODES"])?.text();
        let seen = parse_nodes(&text, &node.endpoint.host)?;
        if !seen.iter().any(|other| other.id == node.id && other.slots == node.slots) {
            return Err(Error::new(
                Kind::Conflict,
                format!("{} holds other slots than the cluster says", node.endpoint),
            )
            .temporary()
            .hint("wait until the resharding has ended"));
        }
    }
    Ok(())
}

/// Reads `CLUSTER NODES`; `our_host` stands where a node does not know its own address.
fn parse_nodes(text: &str, our_host: &str) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [id, address, flags, _, _, _, _, _, slots @ ..] = words.as_slice() else { continue };
        if slots.iter().any(|slot| slot.starts_with('[')) {
            return Err(Error::new(Kind::Conflict, "slots of the cluster are migrating")
                .temporary()
                .hint("wait until the resharding has ended"));
        }
        if !flags.contains("master") || slots.is_empty() {
            continue;
        }
        if flags.contains("fail") {
            return Err(Error::new(Kind::Unreachable, format!("the master {address} has failed")).temporary());
        }
        let address = address.split(['@', ',']).next().unwrap_or_default();
        let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) =
            parsed.ok_or_else(|| Error::new(Kind::Corrupt, "the cluster names an address that is none"))?;
        let host = if host.is_empty() { our_host } else { host };
        let range = |slot: &&str| {
            let (from, to) = slot.split_once('-').unwrap_or((slot, slot));
            Some((from.parse().ok()?, to.parse().ok()?))
        };
        let mut slots: Vec<Slots> = slots.iter().filter_map(range).collect();
        slots.sort_unstable();
        let endpoint = Endpoint { host: host.to_owned(), port };
        nodes.push(Node { endpoint, id: (*id).to_owned(), slots });
    }
    nodes.sort_by_key(|node| node.slots.first().copied());
    Ok(nodes)
}

/// Facts and papers of one server.
pub(super) fn facts(connection: &mut Connection, node: &Node, info: &str) -> Result<(ServerFacts, Papers)> {
    let (software, version) = version(info);
    let modules = modules(connection)?;
    let databases = connection.config("databases")?.and_then(|count| count.parse().ok()).unwrap_or(0);
    let facts = ServerFacts {
        software,
        version,
        endpoint: node.endpoint.to_string(),
        node: node.id.clone(),
        slots: node.slots.clone(),
        databases,
        modules,
        used_memory: wire::info_number(info, "used_memory").unwrap_or(0),
    };
    let lines = |reply: Reply| match reply {
        Reply::Array(lines) => Some(lines.iter().map(|line| line.text() + "\n").collect()),
        _ => None,
    };
    let acl = lines(connection.ask(&[b"ACL", b"LIST"])?);
    let config = match connection.ask(&[b"CONFIG", b"GET", b"*"])? {
        Reply::Array(pairs) => Some(settings(&pairs)),
        _ => None,
    };
    Ok((facts, Papers { acl, config }))
}

/// The modules of a server; `None` where we may not ask.
pub(super) fn modules(connection: &mut Connection) -> Result<Option<Vec<String>>> {
    match connection.ask(&[b"MODULE", b"LIST"])? {
        Reply::Array(modules) => Ok(Some(modules.iter().filter_map(module).collect())),
        _ => Ok(None),
    }
}

fn module(facts: &Reply) -> Option<String> {
    let facts: Vec<String> = facts.items().iter().map(Reply::text).collect();
    let fact = |name: &str| facts.iter().position(|fact| fact == name).and_then(|at| facts.get(at + 1)).cloned();
    Some(format!("{} {}", fact("name")?, fact("ver").unwrap_or_default()))
}

/// Settings as a configuration file has them, without secrets.
fn settings(pairs: &[Reply]) -> String {
    let mut lines: Vec<String> = pairs
        .chunks_exact(2)
        .map(|pair| (pair[0].text(), pair[1].text()))
        .filter(|(name, _)| !SECRET_SETTINGS.iter().any(|secret| name.contains(secret)))
        .map(|(name, value)| {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("{name} \"{value}\"\n")
        })
        .collect();
    lines.sort_unstable();
    lines.concat()
}

/// What a server may need beside its data while it forks, and whether it has that.
///
/// Pages that are written while the child lives are copied: in the worst case all of them.
pub(super) fn memory_warning(info: &str) -> Option<String> {
    let used = wire::info_number(info, "used_memory_rss").or_else(|| wire::info_number(info, "used_memory"))?;
    let total = wire::info_number(info, "total_system_memory").filter(|total| *total > 0)?;
    let mib = |bytes: u64| bytes >> 20;
    (used.saturating_mul(2) > total).then(|| {
        format!(
            "the server uses {} MiB of {} MiB: while its child makes the image, every page that is written is copied, \
             and both together may not fit",
            mib(used),
            mib(total)
        )
    })
}

/// Whether a child runs already, which makes ours wait.
pub(super) fn child_in_progress(info: &str) -> Option<&'static str> {
    let runs = |name: &str| wire::info(info, name) == Some("1");
    if runs("rdb_bgsave_in_progress") {
        Some("a background save runs")
    } else if runs("aof_rewrite_in_progress") {
        Some("an AOF rewrite runs")
    } else {
        None
    }
}

/// How many keys a server holds in all its databases, the stamp left out.
pub(super) fn key_count(connection: &mut Connection) -> Result<u64> {
    let info = connection.info("keyspace")?;
    let keys: u64 = wire::keyspace(&info).iter().map(|(_, keys)| keys).sum();
    if keys == 0 {
        return Ok(0);
    }
    // A node of a cluster that does not hold the stamp's slot says so; then it has no stamp.
    let has_stamp = connection.ask(&[b"EXISTS", super::STAMP_KEY.as_bytes()])? == Reply::Integer(1);
    Ok(keys - u64::from(has_stamp))
}

/// Whether one software in one version loads what another wrote. Later versions load what earlier
/// ones wrote; Redis and Valkey went apart after 7.2, and up to Valkey 8 wrote the same format.
pub(super) fn can_load(from: (&str, &str), to: (&str, &str)) -> bool {
    let number = |version: &str| -> (u32, u32) {
        let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    };
    let (old, new) = (number(from.1), number(to.1));
    match (from.0, to.0) {
        ("redis", "valkey") => old <= (7, 2),
        ("valkey", "redis") => old < (9, 0) && new >= (7, 2),
        _ => old <= new,
    }
}

/// Connects to a server and reads all that `INFO` says.
pub(super) fn open(access: &Access, endpoint: &Endpoint) -> Result<(Connection, String)> {
    let mut connection = Connection::open(access, endpoint)?;
    let info = connection.info("")?;
    Ok((connection, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_a_cluster_are_read() {
        let text = "aa 127.0.0.1:7000@17000,host myself,master - 0 0 1 connected 0-5460 9000\n\
                    bb :7001@17001 master - 0 0 2 connected 5461-8999 9001-16383\n\
                    cc 127.0.0.1:7002@17002 slave aa 0 0 2 connected\n";
        let nodes = parse_nodes(text, "here").unwrap();
        assert_eq!(nodes.len(), 2);
        assert_eq!(nodes[0].slots, [(0, 5460), (9000, 9000)]);
        assert_eq!((nodes[1].endpoint.to_string(), nodes[1].folder()), ("here:7001".to_owned(), "05461".to_owned()));
        assert!(nodes[1].holds(9001) && !nodes[1].holds(9000));
        let migrating = "aa 127.0.0.1:7000@17000 myself,master - 0 0 1 connected 0-5460 [5461->-bb]\n";
        assert_eq!(parse_nodes(migrating, "here").unwrap_err().kind(), Kind::Conflict);
    }

    #[test]
    fn only_later_versions_of_one_family_load_an_image() {
        assert!(can_load(("redis", "7.0.15"), ("redis", "7.0.3")));
        assert!(can_load(("redis", "7.0.15"), ("valkey", "9.1.2")));
        assert!(can_load(("valkey", "8.1.0"), ("redis", "7.4.1")));
        assert!(!can_load(("redis", "7.4.1"), ("redis", "7.0.3")));
        assert!(!can_load(("redis", "7.4.1"), ("valkey", "9.1.2")));
        assert!(!can_load(("valkey", "9.0.0"), ("redis", "8.2.3")));
    }

    #[test]
    fn commands_with_relative_times_are_refused() {
        let error = check_sends_absolute_times("redis_version:6.2.14\r\n").unwrap_err();
        assert!(error.hint_text().unwrap().contains("mode: rdb"), "{error}");
        check_sends_absolute_times("redis_version:7.0.15\r\n").unwrap();
        check_sends_absolute_times("redis_version:7.2.4\r\nvalkey_version:9.1.0\r\n").unwrap();
    }

    #[test]
    fn secrets_stay_out_of_the_settings() {
        let pair = |name: &str, value: &str| [Reply::Bulk(name.into()), Reply::Bulk(value.into())];
        let pairs = [pair("requirepass", "s3cret"), pair("save", "3600 1")].concat();
        let named = ["masterauth", "primaryauth", "tls-key-file-pass"].map(|name| pair(name, "s3cret")).concat();
        let pairs = [pairs, named].concat();
        assert_eq!(settings(&pairs), "save \"3600 1\"\n");
    }
}
