//! Git's small formats, read and written. Pure; bytes come from repositories and from points, and
//! both may be hostile.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, Kind, Result};

/// What a name points at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// An object, by its id in hexadecimal.
    Object(String),
    /// Another name.
    Symbolic(String),
}

/// All names of one repository and what they point at. `HEAD` is one of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Refs(pub(super) BTreeMap<String, Target>);

/// What a point says of one repository, in `repository.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Description {
    /// Path within the store, for people and for the way back.
    pub(super) path: String,
    /// `sha1` or `sha256`.
    pub(super) object_format: String,
    /// `files` or `reftable`.
    pub(super) ref_storage: String,
    /// Whether the git directory is the `.git` of a working tree.
    pub(super) working_tree: bool,
    /// What `HEAD` holds: an object id or `ref: NAME`.
    pub(super) head: String,
    /// Names that point at names, besides `HEAD`.
    pub(super) symbolic: BTreeMap<String, String>,
    /// The packs in the order in which they are indexed, each with its number of objects.
    pub(super) packs: Vec<Pack>,
    /// How many names point at objects.
    pub(super) refs: u64,
    /// Hash of all names and what they point at.
    pub(super) refs_sha256: String,
    /// Where the repository borrowed objects; the packs hold them, so that it need not any more.
    pub(super) alternates: Vec<String>,
    /// Whether history is cut off (`shallow`) by design.
    pub(super) shallow: bool,
    /// Whether objects are left on a promising remote (a partial clone): they are not in the point.
    pub(super) partial: bool,
}

/// One pack of a point.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pack {
    /// Its file name.
    pub(super) name: String,
    /// Number of objects.
    pub(super) objects: u64,
}

impl Refs {
    /// All object ids, each once.
    pub(super) fn tips(&self) -> Vec<String> {
        let mut tips: Vec<String> = self.objects().map(|(_, id)| id.clone()).collect();
        tips.sort_unstable();
        tips.dedup();
        tips
    }

    /// Names that point at objects, sorted.
    pub(super) fn objects(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter().filter_map(|(name, target)| match target {
            Target::Object(id) => Some((name, id)),
            Target::Symbolic(_) => None,
        })
    }

    /// Hash of all names and what they point at, in hexadecimal.
    pub(super) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for (name, target) in &self.0 {
            let (mark, text) = match target {
                Target::Object(id) => ("", id),
                Target::Symbolic(name) => ("ref: ", name),
            };
            hash.update(format!("{name}\0{mark}{text}\n"));
        }
        hex::encode(hash.finalize())
    }

    /// The names below `refs/` that point at objects, as a `packed-refs` file.
    pub(super) fn packed(&self) -> Vec<u8> {
        let mut text = String::from("# pack-refs with: sorted \n");
        for (name, id) in self.objects().filter(|(name, _)| name.starts_with("refs/")) {
            text.push_str(&format!("{id} {name}\n"));
        }
        text.into_bytes()
    }

    /// What stands in the file `HEAD`.
    pub(super) fn head(&self) -> Result<String> {
        match self.0.get("HEAD") {
            Some(Target::Object(id)) => Ok(id.clone()),
            Some(Target::Symbolic(name)) => Ok(format!("ref: {name}")),
            None => Err(Error::new(Kind::Corrupt, "the repository has no HEAD")),
        }
    }

    /// Names that point at names, besides `HEAD`.
    pub(super) fn symbolic(&self) -> BTreeMap<String, String> {
        let symbolic = self.0.iter().filter_map(|(name, target)| match target {
            Target::Symbolic(to) if name != "HEAD" => Some((name.clone(), to.clone())),
            _ => None,
        });
        symbolic.collect()
    }
}

/// Whether the text is an object id of either hash.
pub(super) fn is_object_id(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
}

/// Whether git would take the name for a ref below `refs/`, as far as safety goes: it must not
/// leave `refs/` when it becomes a path, nor break a line.
pub(super) fn is_ref_name(name: &str) -> bool {
    let bad_byte = |b: u8| b < 0x20 || b == 0x7f || b" ~^:?*[\\".contains(&b);
    name.starts_with("refs/")
        && !name.bytes().any(bad_byte)
        && !name.contains("..")
        && !name.contains("@{")
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock"))
}

/// The content of a loose ref or of `HEAD`.
pub(super) fn parse_loose(text: &[u8]) -> Option<Target> {
    let text = std::str::from_utf8(text).ok()?.trim_end();
    match text.strip_prefix("ref:") {
        Some(name) => Some(Target::Symbolic(name.trim().to_owned())),
        None => is_object_id(text).then(|| Target::Object(text.to_owned())),
    }
}

/// The content of `packed-refs`: names with ids; peeled values and the header are left out.
pub(super) fn parse_packed(text: &[u8]) -> Result<Vec<(String, String)>> {
    let text = std::str::from_utf8(text).map_err(|_| Error::new(Kind::Corrupt, "packed-refs is not text"))?;
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with(['#', '^']) && !line.is_empty()) {
        let (id, name) = line.split_once(' ').unwrap_or_default();
        if !is_object_id(id) || !is_ref_name(name) {
            return Err(Error::new(Kind::Corrupt, format!("packed-refs holds the line {line:?}")));
        }
        found.push((name.to_owned(), id.to_owned()));
    }
    Ok(found)
}

/// The value of `section.key` in a configuration file; names are compared without case.
///
/// Enough for the few keys that say how to read a repository; git itself reads the rest.
pub(super) fn config_value(text: &str, section: &str, key: &str) -> Option<String> {
    let mut current = String::new();
    let mut found = None;
    for line in text.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            current = header.split(']').next().unwrap_or_default().trim().to_ascii_lowercase();
        } else if current == section
            && let Some((name, value)) = line.split_once('=')
            && name.trim().eq_ignore_ascii_case(key)
        {
            found = Some(value.split(['#', ';']).next().unwrap_or_default().trim().trim_matches('"').to_owned());
        }
    }
    found
}

/// A repository's path within the store as one file name: `/` and a leading dot become escapes.
pub(super) fn encode(path: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(path.len());
    for (index, &byte) in path.iter().enumerate() {
        if byte == b'/' || byte == b'%' || (byte == b'.' && index == 0) || byte < 0x20 {
            name.extend(format!("%{byte:02X}").into_bytes());
        } else {
            name.push(byte);
        }
    }
    name
}

/// The reverse of [`encode`]; refuses what could lead out of the store.
pub(super) fn decode(name: &[u8]) -> Result<Vec<u8>> {
    let refuse = || Error::new(Kind::Corrupt, format!("`{}` names no repository", String::from_utf8_lossy(name)));
    let mut path = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            path.push(first);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(refuse)?;
        path.push(u8::from_str_radix(digits, 16).map_err(|_| refuse())?);
        rest = &rest[2..];
    }
    let plain = path.split(|&b| b == b'/').all(|part| !part.is_empty() && part != b".." && !part.contains(&0));
    let inner_dot = path != b"." && path.split(|&b| b == b'/').any(|part| part == b".");
    if !plain || inner_dot || encode(&path) != name {
        return Err(refuse());
    }
    Ok(path)
}

/// Number of objects that the head of a pack announces.
pub(super) fn pack_objects(head: &[u8]) -> Result<u64> {
    match head {
        [b'P', b'A', b'C', b'K', _, _, _, _, count @ ..] if count.len() >= 4 => {
            Ok(u64::from(u32::from_be_bytes([count[0], count[1], count[2], count[3]])))
        }
        _ => Err(Error::new(Kind::Corrupt, "git wrote something that is no pack")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn loose_and_packed_refs_are_read() {
        assert_eq!(parse_loose(format!("{ID}\n").as_bytes()), Some(Target::Object(ID.to_owned())));
        assert_eq!(parse_loose(b"ref: refs/heads/main\n"), Some(Target::Symbolic("refs/heads/main".to_owned())));
        assert_eq!(parse_loose(b""), None);
        assert_eq!(parse_loose(&ID.as_bytes()[1..]), None);
        let text = format!("# pack-refs with: peeled\n{ID} refs/tags/v1\n^{ID}\n{ID} refs/x/\u{fc}\n");
        let found = parse_packed(text.as_bytes()).expect("valid");
        assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["refs/tags/v1", "refs/x/\u{fc}"]);
        for bad in [format!("{ID} ../../etc"), ID.to_owned(), "x refs/heads/a".to_owned(), format!("{ID} refs/a..b")] {
            assert_eq!(parse_packed(bad.as_bytes()).expect_err(&bad).kind(), Kind::Corrupt, "{bad}");
        }
    }

    #[test]
    fn names_that_would_leave_refs_are_no_names() {
        for good in ["refs/heads/a", "refs/keep-around/0", "refs/heads/a.b/c-d"] {
            assert!(is_ref_name(good), "{good}");
        }
        for bad in
            ["HEAD", "refs/", "refs//a", "refs/../a", "refs/.a", "refs/a.lock", "refs/a b", "refs/a\nb", "a/refs/b"]
        {
            assert!(!is_ref_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn paths_become_one_name_and_back() {
        for path in [&b"."[..], b"a", b"group/project.git", b"a%2F", b".hidden/x", "\u{fc}".as_bytes()] {
            let name = encode(path);
            assert!(!name.contains(&b'/') && !name.starts_with(b"."), "{name:?}");
            assert_eq!(decode(&name).expect("own name"), path);
        }
        for name in [&b"%2E%2E"[..], b"a%2F..%2Fb", b"%2Fetc", b"a%2", b"%zz", b"a%2e", b"", b"..", b"a%2F.%2Fb"] {
            assert!(decode(name).is_err(), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn the_few_settings_that_matter_are_read() {
        let text =
            "[core]\n\tbare = true\n[Extensions]\n objectFormat = sha256 # why\n[remote \"a\"]\n promisor = true\n";
        assert_eq!(config_value(text, "extensions", "objectformat").as_deref(), Some("sha256"));
        assert_eq!(config_value(text, "core", "bare").as_deref(), Some("true"));
        assert_eq!(config_value(text, "extensions", "refstorage"), None);
    }

    #[test]
    fn a_pack_says_how_much_it_holds() {
        assert_eq!(pack_objects(b"PACK\0\0\0\x02\0\0\x01\x02rest").expect("a pack"), 258);
        assert!(pack_objects(b"PACK\0\0\0\x02\0").is_err() && pack_objects(b"fatal: no").is_err());
    }
}
