//! The example platform with servers of its own: what the soak, the bench of the pause and the tests
//! of the whole run on.
//!
//! Knows which programs there are, how they are started and where the addresses go; what is done to
//! them is the caller's. Everything lies in one temporary folder, everything runs on loopback.

mod stage;

pub use stage::{Copy, LINES, Options, Stage};

use std::collections::BTreeMap;
use std::path::PathBuf;

/// The platform's description with addresses between braces.
pub const TEMPLATE: &str = include_str!("../../../../examples/model-registry/platform.yaml");

/// The query that names the edges of the cache, in the redis driver's language.
pub const CACHE_QUERY: &str = "GET model:*:latest";

/// Paths of programs that are there.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The folder of PostgreSQL's programs.
    pub postgres_bin: PathBuf,
    /// redis-server.
    pub redis_server: PathBuf,
    /// MinIO.
    pub minio: PathBuf,
    /// Ours.
    pub stillpoint: PathBuf,
    /// The example application.
    pub registry: PathBuf,
}

/// A folder in memory, if the system has one with so much room.
pub fn memory_folder(bytes_min: u64) -> Option<PathBuf> {
    let folder = PathBuf::from("/dev/shm");
    let room = rustix::fs::statvfs(&folder).ok()?;
    (room.f_bavail * room.f_frsize >= bytes_min).then_some(folder)
}

/// Fills addresses into a description. What is not filled in is an error: a platform with half an
/// address must not be tried.
///
/// # Errors
/// The first line that still names something.
pub fn fill(template: &str, values: &BTreeMap<&str, String>) -> Result<String, String> {
    let mut text = template.to_owned();
    for (name, value) in values {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    let left = text.lines().find(|line| !line.trim_start().starts_with('#') && unfilled(line));
    left.map_or(Ok(text.clone()), |line| Err(format!("platform.yaml: nothing was filled in here: {}", line.trim())))
}

/// Whether a line holds `{name}`; flow mappings have blanks inside their braces.
fn unfilled(line: &str) -> bool {
    line.split('{').skip(1).any(|rest| {
        let name: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || "_03".contains(*c)).collect();
        !name.is_empty() && rest[name.len()..].starts_with('}')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_filled_in_is_named() {
        let values = BTreeMap::from([("port", "7".to_owned())]);
        assert_eq!(fill("a: { b: {port} }", &values), Ok("a: { b: 7 }".to_owned()));
        assert!(fill("url: {bucket}", &values).is_err());
    }
}
