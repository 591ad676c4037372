//! Depots: where a bucket lies, as the code that talks to it sees it.
//!
//! One synchronous trait, because the hot path runs on threads of its own; depots that speak
//! asynchronous protocols block inside. Retry, time-out, bandwidth limit, tracing and chaos are
//! layers: depots that wrap depots.
//!
//! Names are relative, `/`-separated, never empty, without `.` and `..` parts.

pub mod contended;
pub mod fs;
pub mod layers;
pub mod memory;
pub mod object;
mod prefixed;
mod probe;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

pub use prefixed::Prefixed;
pub use probe::probe;

/// An opaque version of one object (etag, generation), for conditional updates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Version(pub String);

/// What a write does with what is there.
///
/// The bytes of `Create` and `Update` must be the writer's own (hold a random id, say): if an
/// answer is lost, whose write it was is told by comparing bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteMode {
    /// Fails with `AlreadyExists` if the name is taken. Exactly one of many racing writers wins
    /// where [`DepotCapability::conditional_create`] says so.
    Create,
    /// Overwrites or creates.
    Replace,
    /// Replaces only if the object's version is still this one; else `Conflict`.
    /// Refused with `Unsupported` where [`DepotCapability::conditional_update`] is false.
    Update(Version),
}

/// One object, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Full name within the depot.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// When it was written, as the service says.
    pub modified: SystemTime,
    /// Its version, where the service has one.
    pub version: Option<Version>,
}

/// What a depot was found to be able to do, by trying it at `init`, not by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct DepotCapability {
    /// `WriteMode::Create` is atomic among racing writers.
    pub conditional_create: bool,
    /// `WriteMode::Update` works and is atomic.
    pub conditional_update: bool,
    /// The bucket keeps old versions of objects.
    pub versioning: bool,
    /// The bucket can hold objects against deletion.
    pub object_lock: bool,
}

/// A place for named, immutable-by-habit byte strings.
///
/// # Guarantees (duty of the depot)
/// When `write` returns, the bytes survive a crash of this machine (file systems fsync file and
/// directory) and every reader sees all of them or none. `list` shows every write that returned
/// before it began. Errors are classified: only `Status::Temporary` is worth a retry.
pub trait Depot: Send + Sync + fmt::Debug {
    /// The whole object, with the version that was read.
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)>;

    /// `length` bytes from `offset`; fewer only at the end of the object.
    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes>;

    /// Writes the object whole. The parts are written one after the other, as one object; passing
    /// parts saves a copy of a pack.
    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>>;

    /// Calls `visit` for each object whose name begins with `prefix` (whole path parts: `data/`),
    /// in no certain order, until it returns `false`.
    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()>;

    /// The object without its bytes, or `None`.
    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>>;

    /// Deletes the object; no error if it is absent. An object under lock is `PermissionDenied`.
    fn delete(&self, name: &str) -> Result<()>;

    /// What this depot can do; probed once and remembered.
    fn capability(&self) -> DepotCapability;

    /// Whether a write mostly waits for a network, so that several at once, beside computing, pay
    /// off. Layers forward it.
    fn waits(&self) -> bool {
        true
    }

    /// Where it is, for people, without secrets: `/srv/backup`, `s3://bucket/prefix`.
    fn location(&self) -> String;
}

/// What every depot is opened with, besides its address.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Upload limit in bytes per second; 0 means unlimited.
    pub upload_bytes_per_second: u64,
    /// Download limit in bytes per second; 0 means unlimited.
    pub download_bytes_per_second: u64,
    /// Cancelling it ends the wait between repetitions.
    pub context: Context,
}

/// Opens the depot that `url` names, without bandwidth limits; see [`open_with`].
pub fn open(
    url: &str,
    options: &BTreeMap<String, String>,
    credentials: &BTreeMap<String, String>,
) -> Result<Arc<dyn Depot>> {
    open_with(url, options, credentials, &OpenOptions::default())
}

/// Opens the depot that `url` names: `/absolute/path`, `file:///path`, `s3://bucket/prefix`,
/// `gs://…` or `az://…`, with the layers that every depot gets: tracing, bandwidth, repetition,
/// and turns where a service lacks conditional writes. Touches nothing yet.
pub fn open_with(
    url: &str,
    options: &BTreeMap<String, String>,
    credentials: &BTreeMap<String, String>,
    settings: &OpenOptions,
) -> Result<Arc<dyn Depot>> {
    let path =
        if url.starts_with('/') { Some(url) } else { url.strip_prefix("file://").filter(|p| p.starts_with('/')) };
    let bare: Arc<dyn Depot> = match path {
        Some(path) => Arc::new(fs::FsDepot::open(path)?),
        None if object::is_address(url) => Arc::new(object::open(url, options, credentials)?),
        None => {
            return Err(Error::new(Kind::Config, format!("bucket `{url}` is not an address that is understood")).hint(
                "an absolute path, file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
            ));
        }
    };
    let mut depot: Arc<dyn Depot> = Arc::new(layers::Trace::new(bare));
    let (up, down) = (settings.upload_bytes_per_second, settings.download_bytes_per_second);
    if up > 0 || down > 0 {
        depot = Arc::new(layers::Bandwidth::new(depot, up, down));
    }
    if path.is_none() {
        depot = Arc::new(contended::Contended::new(depot));
    }
    Ok(Arc::new(layers::Retry::new(depot, layers::RetryPolicy::default(), settings.context.clone())))
}

/// Refuses names that the contract does not allow, so that no depot has to trust its caller.
fn check_name(name: &str) -> Result<()> {
    let bad = name.is_empty()
        || name.contains('\0')
        || name.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if bad { Err(Error::new(Kind::Config, format!("object name {name:?} is not allowed"))) } else { Ok(()) }
}

/// As [`check_name`], for what names begin with: empty, or with one `/` at the end.
fn check_prefix(prefix: &str) -> Result<()> {
    if prefix.is_empty() { Ok(()) } else { check_name(prefix.strip_suffix('/').unwrap_or(prefix)) }
}

fn total_bytes(parts: &[&[u8]]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}
