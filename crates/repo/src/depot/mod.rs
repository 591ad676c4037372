//! Depots: where a bucket lies, as the code that talks to it sees it.
//!
//! One synchronous trait, because the hot path runs on threads of its own; depots that speak
//! asynchronous protocols block inside. Retry, time-out, bandwidth limit, tracing and chaos are
//! layers: depots that wrap depots.
//!
//! Names are relative, `/`-separated, never empty, without `.` and `..` parts.

use std::fmt;
use std::time::SystemTime;

use bytes::Bytes;
use stillpoint_core::Result;

/// An opaque version of one object (etag, generation), for conditional updates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Version(pub String);

/// What a write does with what is there.
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

    /// Where it is, for people, without secrets: `/srv/backup`, `s3://bucket/prefix`.
    fn location(&self) -> String;
}
