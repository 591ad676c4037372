//! Who a store is that is nothing but a path, and which names match a pattern.
//!
//! Shared by the drivers of files, so that they tell copies apart in the same way. Never opens the
//! file: closing it would drop locks that others rely on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use stillpoint_core::error::{Error, IoContext, Result};
use stillpoint_core::position::Identity;

/// The identity of what lies, or will lie, at `path`: its path with links resolved, and its inode
/// with device and birth time. Inode numbers are used again after a deletion; the birth time is not.
pub fn identity(driver: &str, path: &Path) -> Result<Identity> {
    let (endpoint, native) = match std::fs::canonicalize(path) {
        Ok(resolved) => {
            let meta = std::fs::metadata(&resolved).or_io(|| format!("cannot look at {}", resolved.display()))?;
            let born = meta.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
            let born = born.map_or(0, |born| born.as_nanos());
            (resolved, Some(format!("{}:{}:{born}", meta.dev(), meta.ino())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => (resolve_absent(path), None),
        Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
    };
    Ok(Identity { driver: driver.to_owned(), native, endpoint: endpoint.display().to_string() })
}

/// Resolves as much of a path as exists.
fn resolve_absent(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut there = path;
    while let (Some(parent), Some(name)) = (there.parent(), there.file_name()) {
        missing.push(name);
        there = parent;
        if let Ok(resolved) = std::fs::canonicalize(there) {
            return missing.iter().rev().fold(resolved, |path, name| path.join(name));
        }
    }
    path.to_owned()
}

/// Whether a name matches a pattern with `*` and `?`.
pub fn matches_name(pattern: &[u8], name: &[u8]) -> bool {
    // Greedy with one place to fall back to: never exponential.
    let (mut p, mut n) = (0, 0);
    let mut fallback = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                fallback = Some((p, n));
                p += 1;
            }
            Some(&expected) if expected == b'?' || expected == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((star, taken)) = fallback else { return false };
                fallback = Some((star, taken + 1));
                p = star + 1;
                n = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|&rest| rest == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recreated_file_is_another_one_and_links_are_resolved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "1").unwrap();
        let first = identity("files", &path).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("link")).unwrap();
        assert_eq!(identity("files", &folder.path().join("link/a")).unwrap(), first);
        std::fs::remove_file(&path).unwrap();
        let absent = identity("files", &folder.path().join("link/a")).unwrap();
        assert_eq!((absent.endpoint.as_str(), absent.native), (first.endpoint.as_str(), None));
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "1").unwrap();
        assert_ne!(identity("files", &path).unwrap().native, first.native);
    }
}
