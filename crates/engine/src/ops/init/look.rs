//! Finds what could be protected: in folders, in the environment, behind well-known ports.
//!
//! Only looks. Opens files to read a few bytes, connects to ports without saying a word, and never
//! shows the value of a variable, which may hold a password.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::error::IoContext;

use super::address;

/// How deep folders are searched.
const DEPTH_MAX: usize = 6;

/// How many entries are looked at in all.
const ENTRIES_MAX: usize = 50_000;

/// How long a local port may take to answer.
const CONNECT_MILLIS: u64 = 80;

/// What every SQLite database begins with.
const SQLITE_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Folders whose name says that they hold objects, by habit.
const OBJECT_FOLDERS: [&str; 12] = [
    "objects",
    "artifacts",
    "blobs",
    "bucket",
    "buckets",
    "models",
    "media",
    "uploads",
    "storage",
    "datasets",
    "assets",
    "checkpoints",
];

/// Folders that are made from others and not searched.
const DERIVED_FOLDERS: [&str; 6] = ["node_modules", "target", "__pycache__", "venv", "site-packages", "lost+found"];

/// Servers by their usual port.
const SERVERS: [(u16, &str); 12] = [
    (5432, "PostgreSQL"),
    (3306, "MySQL or MariaDB"),
    (6379, "Redis or Valkey"),
    (9200, "Elasticsearch or OpenSearch"),
    (8123, "ClickHouse"),
    (9092, "Kafka"),
    (27017, "MongoDB"),
    (2181, "ZooKeeper"),
    (2379, "etcd"),
    (9000, "MinIO or ClickHouse"),
    (6443, "Kubernetes"),
    (8000, "DynamoDB local"),
];

/// Variables that by habit say where a store is.
const VARIABLES: [(&str, &str); 14] = [
    ("DATABASE_URL", "a database"),
    ("POSTGRES_URL", "PostgreSQL"),
    ("PGHOST", "PostgreSQL"),
    ("MYSQL_URL", "MySQL"),
    ("REDIS_URL", "Redis"),
    ("MONGODB_URI", "MongoDB"),
    ("CLICKHOUSE_URL", "ClickHouse"),
    ("ELASTICSEARCH_URL", "Elasticsearch"),
    ("OPENSEARCH_URL", "OpenSearch"),
    ("KAFKA_BOOTSTRAP_SERVERS", "Kafka"),
    ("AWS_S3_BUCKET", "an S3 bucket"),
    ("S3_BUCKET", "an S3 bucket"),
    ("AWS_ENDPOINT_URL_S3", "an S3 server"),
    ("KUBECONFIG", "Kubernetes"),
];

/// What was seen.
#[derive(Debug, Default, Serialize)]
pub struct Surroundings {
    /// What can be protected.
    pub stores: Vec<Found>,
    /// What was seen and is in no point: nobody named it, or there is no driver for it yet.
    pub unprotected: Vec<Seen>,
    /// Whether the search stopped before its end, because there was too much to look at.
    pub stopped_early: bool,
}

/// Something that can be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// A name for it.
    pub name: String,
    /// The driver.
    pub driver: &'static str,
    /// Where it is: an absolute path, or an address without secrets.
    pub at: String,
    /// The driver's settings that name it, in the order in which they are written.
    pub settings: Vec<(String, String)>,
    /// Why it is taken for what it is.
    pub because: String,
}

impl Found {
    fn at_path(name: String, driver: &'static str, path: &Path, because: String) -> Self {
        let at = path.display().to_string();
        Self { name, driver, settings: vec![("path".to_owned(), at.clone())], at, because }
    }
}

/// Something that was seen and is in no point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// What it seems to be.
    pub what: String,
    /// Where it was seen.
    pub at: String,
    /// The store that it would be, with gaps to fill in, if there is a driver for it.
    pub store: Option<Found>,
}

/// Looks into `paths`, the environment and local ports. `named` says that a person named the
/// paths: each of them is then a store even if nothing tells its kind. `leave_out` is the bucket.
pub fn around(paths: &[PathBuf], named: bool, leave_out: &Path) -> Result<Surroundings> {
    let mut search = Search { leave_out, entries: 0, found: Vec::new(), stopped: false };
    for path in paths {
        if let Some(found) = address::store(&path.to_string_lossy())? {
            search.found.push(found);
            continue;
        }
        let path = fs::canonicalize(path).or_io(|| format!("cannot look at `{}`", path.display()))?;
        let before = search.found.len();
        search.look(&path, 0)?;
        if named && search.found.len() == before {
            search.add("files", &path, "named by you; a folder of files".to_owned());
        }
    }
    let mut surroundings = Surroundings { stores: search.found, stopped_early: search.stopped, ..Default::default() };
    environment(&mut surroundings);
    ports(&mut surroundings);
    rename(&mut surroundings.stores);
    Ok(surroundings)
}

struct Search<'a> {
    leave_out: &'a Path,
    entries: usize,
    found: Vec<Found>,
    stopped: bool,
}

impl Search<'_> {
    fn add(&mut self, driver: &'static str, path: &Path, because: String) {
        if self.found.iter().any(|found| Path::new(&found.at) == path) {
            return;
        }
        let stem = if driver == "sqlite" { path.file_stem() } else { path.file_name() };
        let name = label(stem.unwrap_or_default().to_string_lossy().trim_end_matches(".git"), driver);
        self.found.push(Found::at_path(name, driver, path, because));
    }

    fn look(&mut self, path: &Path, depth: usize) -> Result<()> {
        if path == self.leave_out {
            return Ok(());
        }
        let kind = fs::symlink_metadata(path).or_io(|| format!("cannot look at `{}`", path.display()))?.file_type();
        if kind.is_file() && is_sqlite(path) {
            self.add("sqlite", path, "begins like a SQLite database".to_owned());
        }
        if !kind.is_dir() {
            return Ok(());
        }
        if let Some(because) = git_kind(path) {
            self.add("git", path, because.to_owned());
            return Ok(());
        }
        // What cannot be opened belongs to someone else; a driver would say so.
        let Ok(listing) = fs::read_dir(path) else { return Ok(()) };
        let mut inside: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
        inside.sort();
        let repositories = inside.iter().filter(|path| path.is_dir() && git_kind(path).is_some()).count();
        if repositories > 1 {
            self.add("git", path, format!("a folder of {repositories} git repositories"));
            inside.retain(|path| git_kind(path).is_none());
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if OBJECT_FOLDERS.contains(&name.as_str()) && !inside.is_empty() && !inside.iter().any(|path| is_sqlite(path)) {
            self.add("objects", path, format!("a folder called `{name}`"));
            return Ok(());
        }
        if depth >= DEPTH_MAX {
            return Ok(());
        }
        for path in inside {
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                self.stopped = true;
                return Ok(());
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with('.') && !DERIVED_FOLDERS.contains(&name.as_ref()) {
                self.look(&path, depth + 1)?;
            }
        }
        Ok(())
    }
}

fn is_sqlite(path: &Path) -> bool {
    let mut begin = [0; 16];
    let regular = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    regular && fs::File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok() && &begin == SQLITE_MAGIC
}

fn git_kind(path: &Path) -> Option<&'static str> {
    if path.join(".git").exists() {
        return Some("a git working folder");
    }
    let bare = path.join("HEAD").is_file() && path.join("objects").is_dir() && path.join("refs").is_dir();
    bare.then_some("a bare git repository")
}

fn environment(surroundings: &mut Surroundings) {
    for (name, what) in VARIABLES {
        let Ok(value) = std::env::var(name) else { continue };
        let file = value.strip_prefix("sqlite://").or_else(|| value.strip_prefix("sqlite:")).map(PathBuf::from);
        match file.filter(|file| file.is_absolute() && is_sqlite(file)) {
            Some(path) if surroundings.stores.iter().all(|found| Path::new(&found.at) != path) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let because = format!("the variable {name} names it");
                surroundings.stores.push(Found::at_path(label(&stem, "sqlite"), "sqlite", &path, because));
            }
            Some(_) => {}
            None => {
                let named = surroundings.stores.iter().any(|found| value.contains(&host_of(found)));
                if !named {
                    let at = format!("the variable {name}");
                    surroundings.unprotected.push(Seen { what: what.to_owned(), store: form(what, &at), at });
                }
            }
        }
    }
}

/// Host and port of a store that has an address; what stands in no variable if it has none.
fn host_of(found: &Found) -> String {
    let authority = found.at.split_once("://").and_then(|(_, rest)| rest.split('/').next());
    authority.map_or_else(|| "\0".to_owned(), str::to_owned)
}

/// The store that such a thing would be, if there is a driver for it.
fn form(what: &str, at: &str) -> Option<Found> {
    let host = if at.contains(':') { at } else { "HOST" };
    let address = match what {
        "PostgreSQL" => format!("postgresql://USER@{host}/DATABASE"),
        "Redis" | "Redis or Valkey" => format!("redis://{host}"),
        "an S3 bucket" => "s3://BUCKET/PREFIX".to_owned(),
        _ => return None,
    };
    address::store(&address).ok().flatten()
}

fn ports(surroundings: &mut Surroundings) {
    let answers = |port: u16| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        TcpStream::connect_timeout(&address, Duration::from_millis(CONNECT_MILLIS)).is_ok()
    };
    for (port, what) in SERVERS {
        let at = format!("127.0.0.1:{port}");
        let named = surroundings.stores.iter().any(|found| found.settings.iter().any(|(_, value)| value.contains(&at)));
        if !named && answers(port) {
            surroundings.unprotected.push(Seen { what: what.to_owned(), store: form(what, &at), at });
        }
    }
}

/// Gives every store a name of its own.
fn rename(stores: &mut [Found]) {
    let mut taken = BTreeSet::new();
    for store in stores {
        let base = store.name.clone();
        let mut number = 2;
        while !taken.insert(store.name.clone()) {
            store.name = format!("{base}-{number}");
            number += 1;
        }
    }
}

/// Makes a valid name from any text; `otherwise` if nothing is left of it.
pub fn label(text: &str, otherwise: &str) -> String {
    let mapped: String =
        text.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(50).collect();
    let words: Vec<&str> = mapped.split('-').filter(|word| !word.is_empty()).collect();
    if words.is_empty() { otherwise.to_owned() } else { words.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_known_by_what_they_hold() {
        let folder = tempfile::tempdir().expect("temp");
        let root = fs::canonicalize(folder.path()).expect("real");
        let make = |path: &str| fs::create_dir_all(root.join(path)).expect("folder");
        for path in ["code.git/objects", "code.git/refs", "artifacts/a", "bucket-of-ours/objects/x", "plain", ".hidden"]
        {
            make(path);
        }
        fs::write(root.join("code.git/HEAD"), "ref: refs/heads/main\n").expect("write");
        fs::write(root.join("Meta DB.sqlite"), [&SQLITE_MAGIC[..], &[0; 100]].concat()).expect("write");
        fs::write(root.join(".hidden/x.db"), SQLITE_MAGIC).expect("write");
        let seen = around(std::slice::from_ref(&root), false, &root.join("bucket-of-ours")).expect("looks");
        let stores: Vec<_> = seen.stores.iter().map(|found| (found.name.as_str(), found.driver)).collect();
        assert_eq!(stores, [("meta-db", "sqlite"), ("artifacts", "objects"), ("code", "git")]);
        let plain = around(&[root.join("plain")], true, Path::new("/nowhere")).expect("looks");
        assert_eq!((plain.stores[0].driver, plain.stores.len()), ("files", 1));
    }

    #[test]
    fn names_are_valid_whatever_the_folder_is_called() {
        assert_eq!(label("Mein Büro_2", "x"), "mein-b-ro-2");
        assert_eq!(label("///", "files"), "files");
        let found = || Found::at_path("a".into(), "files", Path::new("/a"), String::new());
        let mut stores = [found(), found(), found()];
        rename(&mut stores);
        assert_eq!(stores.map(|store| store.name), ["a", "a-2", "a-3"]);
    }
}
