//! Settings of the `files` driver. Pure: nothing here touches a store.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::check_name;

/// Names that begin so, at the top of a tree, are ours: stamp, clones, what a restore keeps.
pub(super) const OWN_PREFIX: &str = ".stillpoint-";

/// What stands under the store in `platform.yaml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Settings {
    /// The directory that is the store. Either this or `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Several directories that make one store, each under a name of its own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub paths: BTreeMap<String, PathBuf>,
    /// Left out. `*.tmp` matches a name at any depth, `cache/*.bin` a path from the top, `a/**`
    /// all below `a`; `?` is one character.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Whether directories on other file systems are left out. Default true.
    pub one_file_system: bool,
    /// How the view of the cut is held. Default `auto`: the best that the file system offers.
    pub snapshot: Snapshot,
    /// How many files a cut may clone by reflink. Default 1,000, about 20 ms.
    pub reflink_files_max: u64,
    /// Whether extended attributes are kept. Default true.
    pub xattrs: bool,
    /// How many directories are watched, so that a cut needs no pause. 0 switches it off.
    /// Default 100,000; each costs the kernel a kilobyte.
    pub watch_directories_max: usize,
}

/// How the view of the cut is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Snapshot {
    /// btrfs, else LVM, else reflink of few files, else none.
    #[default]
    Auto,
    /// A read-only btrfs snapshot of the subvolume that holds the path.
    Btrfs,
    /// An LVM snapshot of the volume that holds the path.
    Lvm,
    /// A clone of each file that shares its blocks, on XFS and btrfs. The cut grows with the files.
    Reflink,
    /// Nothing: what changes after the cut is detected and named.
    None,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            path: None,
            paths: BTreeMap::new(),
            exclude: Vec::new(),
            one_file_system: true,
            snapshot: Snapshot::Auto,
            reflink_files_max: 1000,
            xattrs: true,
            watch_directories_max: 100_000,
        }
    }
}

/// The settings with every directory moved into `folder`.
pub(super) fn into_folder(settings: &crate::Settings, folder: &Path) -> crate::Settings {
    let mut moved = settings.clone();
    let text = |path: PathBuf| serde_json::Value::from(path.to_string_lossy());
    if settings.contains_key("path") {
        moved.insert("path".to_owned(), text(folder.to_owned()));
    }
    if let Some(serde_json::Value::Object(paths)) = moved.get_mut("paths") {
        paths.iter_mut().for_each(|(label, path)| *path = text(folder.join(label)));
    }
    moved
}

/// One directory of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Its name in the tree under `roots/`; `None` for the one under `data/`.
    pub(super) label: Option<String>,
    /// Where it is, absolute.
    pub(super) path: PathBuf,
}

/// Settings after their check.
#[derive(Debug, Clone)]
pub(super) struct Checked {
    /// The store's name, which keeps apart what several stores leave on one file system.
    pub(super) store: String,
    pub(super) places: Vec<Place>,
    pub(super) exclude: Vec<Pattern>,
    pub(super) settings: Settings,
}

impl Settings {
    /// Refuses what cannot be. After it, the settings cannot fail.
    pub(super) fn validate(self, store: &str) -> Result<Checked> {
        let places = match (&self.path, self.paths.is_empty()) {
            (Some(path), true) => vec![Place { label: None, path: absolute(path)? }],
            (None, false) => {
                let place = |(label, path): (&String, &PathBuf)| {
                    check_name(label.as_bytes()).map_err(|error| config("`paths` needs plain names").source(error))?;
                    Ok(Place { label: Some(label.clone()), path: absolute(path)? })
                };
                self.paths.iter().map(place).collect::<Result<Vec<_>>>()?
            }
            (None, true) => return Err(config("`path` is missing").hint("path: /absolute/directory")),
            (Some(_), false) => return Err(config("`path` and `paths` exclude each other")),
        };
        for (number, one) in places.iter().enumerate() {
            for two in &places[number + 1..] {
                if one.path.starts_with(&two.path) || two.path.starts_with(&one.path) {
                    let message = format!("`{}` and `{}` overlap", one.path.display(), two.path.display());
                    return Err(config(message).hint("name the outer one only"));
                }
            }
        }
        let exclude = self.exclude.iter().map(|text| Pattern::new(text)).collect::<Result<Vec<_>>>()?;
        Ok(Checked { store: store.to_owned(), places, exclude, settings: self })
    }
}

fn config(message: impl Into<String>) -> Error {
    Error::new(Kind::Config, message)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    if !path.is_absolute() {
        return Err(config(format!("`{shown}` is not an absolute path")));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(config(format!("`{shown}` holds `..`")));
    }
    if path.parent().is_none() {
        return Err(config("`/` cannot be a store").hint("name the directories that hold state"));
    }
    Ok(path.components().collect())
}

impl Checked {
    /// Whether the entry at `path`, relative to a place's top, is left out.
    pub(super) fn is_excluded(&self, path: &Path) -> bool {
        let bytes = path.as_os_str().as_bytes();
        if bytes.starts_with(OWN_PREFIX.as_bytes()) {
            return true;
        }
        self.exclude.iter().any(|pattern| pattern.matches(bytes))
    }
}

/// One exclude pattern, matched against bytes because file names are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    bytes: Vec<u8>,
    /// Whether it is matched from the top, because it holds a `/`.
    from_top: bool,
}

impl Pattern {
    fn new(text: &str) -> Result<Self> {
        let trimmed = text.strip_prefix('/').unwrap_or(text);
        let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
        if trimmed.is_empty() || trimmed.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(config(format!("`{text}` is no pattern to exclude")).hint("e.g. *.tmp or cache/**"));
        }
        let from_top = trimmed.contains('/') || text.starts_with('/');
        Ok(Self { bytes: trimmed.as_bytes().to_vec(), from_top })
    }

    fn matches(&self, path: &[u8]) -> bool {
        if self.from_top {
            return glob(&self.bytes, path);
        }
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        glob(&self.bytes, name)
    }
}

/// Matches `*` (not over `/`), `**` (over `/`) and `?`. Backtracks to the last star of each kind
/// only, so that no pattern takes more than quadratic time in the length of a path.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    let mut double: Option<(usize, usize)> = None;
    loop {
        if pattern[p..].starts_with(b"**") {
            p += 2;
            // `a/**/b` also matches `a/b`.
            let skip_slash = pattern.get(p) == Some(&b'/') && (t == 0 || text[t - 1] == b'/');
            p += usize::from(skip_slash);
            double = Some((p, t));
            star = None;
            continue;
        }
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        if p == pattern.len() && t == text.len() {
            return true;
        }
        let fits =
            t < text.len() && p < pattern.len() && (pattern[p] == text[t] || (pattern[p] == b'?' && text[t] != b'/'));
        if fits {
            (p, t) = (p + 1, t + 1);
        } else if let Some((after, from)) = star.filter(|(_, from)| *from < text.len() && text[*from] != b'/') {
            star = Some((after, from + 1));
            (p, t) = (after, from + 1);
        } else if let Some((after, from)) = double.filter(|(_, from)| *from < text.len()) {
            double = Some((after, from + 1));
            star = None;
            (p, t) = (after, from + 1);
        } else {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excludes(pattern: &str, path: &str) -> bool {
        let settings = Settings { path: Some("/x".into()), exclude: vec![pattern.to_owned()], ..Settings::default() };
        settings.validate("s").expect("valid").is_excluded(Path::new(path))
    }

    #[test]
    fn patterns_match_names_anywhere_and_paths_from_the_top() {
        for (pattern, path) in [
            ("*.tmp", "a.tmp"),
            ("*.tmp", "deep/er/a.tmp"),
            ("cache/**", "cache/a/b"),
            ("/cache", "cache"),
            ("cache/", "deep/cache"),
            ("a/*/c", "a/b/c"),
            ("a/**/c", "a/c"),
            ("a/**/c", "a/b/b/c"),
            ("**/c.bin", "x/y/c.bin"),
            ("a?c", "abc"),
        ] {
            assert!(excludes(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in
            [("*.tmp", "a.tmp2"), ("/cache", "deep/cache"), ("a/*/c", "a/b/b/c"), ("cache/**", "cache"), ("a?c", "a/c")]
        {
            assert!(!excludes(pattern, path), "{pattern} {path}");
        }
        assert!(excludes("*.tmp", ".stillpoint-stamp.json"), "our own names");
        assert!(!excludes("*.tmp", "a/.stillpoint-x"), "only at the top");
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let single = |path: &str| Settings { path: Some(path.into()), ..Settings::default() };
        for (settings, word) in [
            (Settings::default(), "missing"),
            (single("relative"), "absolute"),
            (single("/a/../b"), ".."),
            (single("/"), "cannot be a store"),
            (Settings { exclude: vec!["a//b".into()], ..single("/a") }, "pattern"),
            (Settings { paths: BTreeMap::from([("a".into(), "/a".into())]), ..single("/b") }, "exclude each other"),
            (
                Settings {
                    paths: BTreeMap::from([("a".into(), "/a".into()), ("b".into(), "/a/b".into())]),
                    ..Settings::default()
                },
                "overlap",
            ),
            (Settings { paths: BTreeMap::from([("a/b".into(), "/a".into())]), ..Settings::default() }, "plain names"),
        ] {
            let error = settings.validate("s").expect_err(word);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
