//! `cargo xtask tidy`: the rules of the house that no compiler checks.
//!
//! Each rule is a module with one function that returns complaints; all rules run, so that one
//! call shows everything. Exceptions are named, with a reason, in `xtask/tidy-exceptions.txt`:
//! one that is no longer needed is itself a complaint, so the list only shrinks.

mod arrows;
mod drivers;
mod exceptions;
mod files;
mod paths;
mod purity;
mod shape;

use std::path::{Path, PathBuf};

use exceptions::Exceptions;

/// Runs every rule on the workspace at `root`; prints complaints, returns whether there were none.
pub fn run(root: &Path) -> Result<bool, String> {
    let mut exceptions = Exceptions::load(root)?;
    let sources = rust_sources(root)?;
    let mut complaints = Vec::new();
    complaints.extend(arrows::check(root)?);
    complaints.extend(purity::check(root, &sources)?);
    complaints.extend(shape::check(&sources, &mut exceptions));
    complaints.extend(files::check(root, &sources)?);
    complaints.extend(drivers::check(root)?);
    complaints.extend(paths::check(root)?);
    complaints.extend(exceptions.unused());
    for complaint in &complaints {
        println!("tidy: {complaint}");
    }
    println!("tidy: {} files, {} complaints", sources.len(), complaints.len());
    Ok(complaints.is_empty())
}

/// One Rust file: where it is, relative to the workspace, and its text.
pub struct Source {
    /// Relative path with `/`.
    pub path: String,
    /// Content.
    pub text: String,
}

impl Source {
    /// Whether the file is test code as a whole.
    pub fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs") || self.path.contains("/benches/")
    }
}

fn rust_sources(root: &Path) -> Result<Vec<Source>, String> {
    let mut sources = Vec::new();
    for top in ["crates", "examples", "xtask", "fuzz"] {
        visit(&root.join(top), &mut |path: &Path| {
            if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
                sources.push(Source { path: relative(root, path), text });
            }
            Ok(())
        })?;
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

/// Calls `file` for every file below `folder`, build output left out.
fn visit(folder: &Path, file: &mut dyn FnMut(&Path) -> Result<(), String>) -> Result<(), String> {
    if !folder.exists() {
        return Ok(());
    }
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|error| format!("{}: {error}", folder.display()))?.path());
    }
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !matches!(name.as_str(), "target" | "corpus" | "artifacts" | ".git") {
                visit(&path, file)?;
            }
        } else {
            file(&path)?;
        }
    }
    Ok(())
}
