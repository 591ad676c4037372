//! Whether two addresses are one place, or one lies in the other.
//!
//! Local paths are compared as the kernel sees them: symbolic links followed, `..` resolved, and by
//! device and inode, so that a bind mount hides nothing. Everything else is compared as text, part
//! by part.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// How the first of two places lies to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    /// They are one place.
    Same,
    /// The first lies inside the second.
    Inside,
    /// The first contains the second.
    Around,
    /// They have nothing in common.
    Apart,
}

/// How `one` lies to `other`. Reads metadata of local paths; changes nothing.
pub(super) fn relation(one: &str, other: &str) -> Relation {
    match (local(one), local(other)) {
        (Some(one), Some(other)) => local_relation(&canonical(&one), &canonical(&other)),
        (None, None) => {
            let (one, other) = (parts(one), parts(other));
            by_prefix(one == other, one.starts_with(&other), other.starts_with(&one))
        }
        _ => Relation::Apart,
    }
}

fn by_prefix(same: bool, inside: bool, around: bool) -> Relation {
    match (same, inside, around) {
        (true, _, _) => Relation::Same,
        (_, true, _) => Relation::Inside,
        (_, _, true) => Relation::Around,
        _ => Relation::Apart,
    }
}

/// The path of a local address: absolute paths and `file://`.
fn local(endpoint: &str) -> Option<PathBuf> {
    let path = endpoint.strip_prefix("file://").unwrap_or(endpoint);
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// `s3://Bucket/a/` and `s3://bucket/a` are one place; what comes before the first single slash is
/// a host or bucket, whose letters have no case.
fn parts(endpoint: &str) -> Vec<String> {
    let (scheme, rest) = endpoint.split_once("://").unwrap_or(("", endpoint));
    let mut parts = vec![scheme.to_lowercase()];
    for (index, part) in rest.split('/').filter(|part| !part.is_empty()).enumerate() {
        parts.push(if index == 0 { part.to_lowercase() } else { part.to_owned() });
    }
    parts
}

fn local_relation(one: &Path, other: &Path) -> Relation {
    let by_name = by_prefix(one == other, one.starts_with(other), other.starts_with(one));
    if by_name != Relation::Apart {
        return by_name;
    }
    // The same directory under two names: a bind mount, or a hard-linked file.
    let (one_is, other_is) = (inode(one), inode(other));
    let has_ancestor = |path: &Path, wanted: Option<(u64, u64)>| {
        wanted.is_some() && path.ancestors().skip(1).any(|ancestor| inode(ancestor) == wanted)
    };
    by_prefix(one_is.is_some() && one_is == other_is, has_ancestor(one, other_is), has_ancestor(other, one_is))
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Follows links as far as the path exists, and cleans up the rest by itself.
fn canonical(path: &Path) -> PathBuf {
    let mut missing: Vec<OsString> = Vec::new();
    let mut existing = clean(path);
    loop {
        if let Ok(found) = existing.canonicalize() {
            return missing.into_iter().rev().fold(found, |path, name| path.join(name));
        }
        match (existing.parent().map(Path::to_owned), existing.file_name().map(OsString::from)) {
            (Some(parent), Some(name)) => {
                missing.push(name);
                existing = parent;
            }
            _ => return clean(path),
        }
    }
}

/// Takes out `.`, and `..` where what it leaves does not exist; where it does, links count.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                cleaned = cleaned.canonicalize().unwrap_or(cleaned);
                cleaned.pop();
            }
            other => cleaned.push(other),
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_compared_part_by_part() {
        assert_eq!(relation("s3://prod/a/", "S3://PROD/a"), Relation::Same);
        assert_eq!(relation("s3://prod/a/b", "s3://prod/a"), Relation::Inside);
        assert_eq!(relation("s3://prod", "s3://prod/a"), Relation::Around);
        assert_eq!(relation("s3://prod/ab", "s3://prod/a"), Relation::Apart);
        assert_eq!(relation("s3://prod/A", "s3://prod/a"), Relation::Apart);
        assert_eq!(relation("db:5432/app", "db:5432/app"), Relation::Same);
        assert_eq!(relation("/a", "memory:/a"), Relation::Apart);
        assert_eq!(relation("file:///nowhere/x", "/nowhere/x"), Relation::Same);
    }

    #[test]
    fn paths_are_compared_as_the_kernel_sees_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let text = |name: &str| at(name).to_string_lossy().into_owned();
        std::fs::create_dir_all(at("source/deep")).expect("creates");
        std::os::unix::fs::symlink(at("source"), at("link")).expect("links");
        std::fs::write(at("source/file"), "x").expect("writes");
        std::fs::hard_link(at("source/file"), at("hard")).expect("links");
        assert_eq!(relation(&text("link"), &text("source")), Relation::Same);
        assert_eq!(relation(&text("link/new/deeper"), &text("source")), Relation::Inside);
        assert_eq!(relation(&text("link/../source"), &text("source")), Relation::Same);
        assert_eq!(relation(&text("new/../source/deep"), &text("source")), Relation::Inside);
        assert_eq!(relation(&folder.path().to_string_lossy(), &text("source")), Relation::Around);
        assert_eq!(relation(&text("hard"), &text("source/file")), Relation::Same);
        assert_eq!(relation(&text("other"), &text("source")), Relation::Apart);
        assert_eq!(relation(&text("source2"), &text("source")), Relation::Apart);
    }
}
