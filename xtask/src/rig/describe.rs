//! Reads `rigs/<name>/rig.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use toml_edit::{Document, Item};

/// Where a rig's server comes from. Versions are pinned in the description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A Go module with a command, built with `go install`.
    Go(String),
    /// A crate with a binary: name with version, and features.
    Cargo(String, String),
    /// An npm package.
    Npm(String),
    /// A Python package: name with version. Its files come to lie in `pypi/<name>`.
    PyPi(String),
    /// A Debian package, installed for the whole machine where that is possible without asking.
    Debian(String),
}

/// How one knows that a server is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// It answers this path, with whatever status.
    Path(String),
    /// This command succeeds; filled in like the server's own.
    Command(Vec<String>),
}

/// One rig, as described.
#[derive(Debug, Clone)]
pub struct Rig {
    /// The folder's name.
    pub name: String,
    /// One line for people.
    pub about: String,
    /// Where the server comes from.
    pub source: Source,
    /// Path of the program, within the cache or absolute.
    pub binary: String,
    /// Where within the cache a link to the program is made, if it must be called by another name.
    pub link: Option<String>,
    /// Commands that run once before the server starts, such as one that makes its data directory.
    pub prepare: Vec<Vec<String>>,
    /// Program and arguments; `{binary}` and `{bin}`, its folder, `{port}`, `{data}` and `{folder}`,
    /// where all state of the running rig lies, are filled in.
    pub args: Vec<String>,
    /// Whether the server refuses to run as root, and must run as nobody there.
    pub not_root: bool,
    /// The server's own environment.
    pub environment: BTreeMap<String, String>,
    /// How one knows that it is ready.
    pub ready: Ready,
    /// What tests are given, by name of environment variable.
    pub give: BTreeMap<String, String>,
}

impl Rig {
    /// The names of all rigs that have a server to run.
    pub fn names(root: &Path) -> Result<Vec<String>, String> {
        let folder = root.join("rigs");
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))? {
            let path = entry.map_err(|error| format!("{}: {error}", folder.display()))?.path();
            // A driver's rig may have nothing to run; then its file only says so.
            let text = std::fs::read_to_string(path.join("rig.toml")).unwrap_or_default();
            if let Some(name) = path.file_name().filter(|_| text.contains("[run]")) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads one description.
    pub fn load(root: &Path, name: &str) -> Result<Self, String> {
        let path = root.join("rigs").join(name).join("rig.toml");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("there is no rig `{name}` ({}: {error})", path.display()))?;
        Self::parse(name, &text).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn parse(name: &str, text: &str) -> Result<Self, String> {
        let document = Document::parse(text).map_err(|error| error.to_string())?;
        let get = |path: &[&str]| path.iter().try_fold(document.as_item(), |item, key| item.get(key));
        let optional = |path: &[&str]| get(path).and_then(Item::as_str).map(str::to_owned);
        let string = |path: &[&str]| optional(path).ok_or_else(|| format!("{} is missing", path.join(".")));
        let map = |path: &[&str]| -> BTreeMap<String, String> {
            let table = get(path).and_then(Item::as_table_like);
            let pairs = table.into_iter().flat_map(|table| table.iter());
            pairs.filter_map(|(key, item)| Some((key.to_owned(), item.as_str()?.to_owned()))).collect()
        };
        let words = |item: &Item| -> Vec<String> {
            let array = item.as_array().into_iter().flat_map(|array| array.iter());
            array.filter_map(|value| value.as_str().map(str::to_owned)).collect()
        };
        let source = source(&optional)?;
        let prepare = get(&["run", "prepare"]).and_then(Item::as_array);
        let prepare = prepare.into_iter().flat_map(|commands| commands.iter());
        let ready = match (optional(&["run", "ready_path"]), get(&["run", "ready_command"])) {
            (Some(path), None) => Ready::Path(path),
            (None, Some(command)) => Ready::Command(words(command)),
            _ => return Err("run needs one of ready_path and ready_command".to_owned()),
        };
        let args = words(get(&["run", "args"]).ok_or("run.args is missing")?);
        Ok(Self {
            name: name.to_owned(),
            about: string(&["about"])?,
            source,
            binary: string(&["obtain", "binary"])?,
            link: optional(&["obtain", "link"]),
            prepare: prepare.map(|command| words(&Item::Value(command.clone()))).collect(),
            args,
            not_root: get(&["run", "not_root"]).and_then(Item::as_bool).unwrap_or_default(),
            environment: map(&["run", "environment"]),
            ready,
            give: map(&["give"]),
        })
    }

    /// The program as tests and arguments name it.
    pub fn program(&self, cache: &Path) -> std::path::PathBuf {
        cache.join(self.link.as_ref().unwrap_or(&self.binary))
    }
}

fn source(optional: &dyn Fn(&[&str]) -> Option<String>) -> Result<Source, String> {
    let kinds = ["go", "cargo", "npm", "pypi", "debian"];
    let given: Vec<_> = kinds.iter().filter_map(|kind| Some((*kind, optional(&["obtain", kind])?))).collect();
    let [(kind, name)] = &given[..] else {
        return Err(format!("obtain needs one of {}", kinds.join(", ")));
    };
    let name = name.clone();
    Ok(match *kind {
        "go" => Source::Go(name),
        "cargo" => Source::Cargo(name, optional(&["obtain", "cargo_features"]).unwrap_or_default()),
        "npm" => Source::Npm(name),
        "pypi" => Source::PyPi(name),
        _ => Source::Debian(name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rig_in_the_tree_can_be_read() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let names = Rig::names(root).expect("names");
        assert!(names.contains(&"s3".to_owned()), "{names:?}");
        for name in names {
            let rig = Rig::load(root, &name).expect("description");
            assert!(rig.args[0] == "{binary}" && !rig.give.is_empty(), "{rig:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(Rig::parse("x", "about = \"x\"").expect_err("no source").contains("obtain"));
        let no_args = "about = \"x\"\n[obtain]\ngo = \"m\"\nbinary = \"b\"\n[run]\nready_path = \"/\"";
        assert!(Rig::parse("x", no_args).expect_err("no args").contains("run.args"));
    }
}
