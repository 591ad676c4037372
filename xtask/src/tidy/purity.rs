//! core is pure, and `unsafe` stands in one module.

use std::path::Path;

use super::Source;
use super::shape::without_tests;

/// Dependencies that core may have: data, errors, derive macros and parsers of text, no I/O and no runtime.
const CORE_DEPENDENCIES: &[&str] =
    &["async-trait", "hex", "jiff", "schemars", "serde", "serde_json", "sha2", "thiserror", "url"];

/// Text that has no place in core, with the reason.
const CORE_FORBIDDEN: &[(&str, &str)] = &[
    ("std::fs", "I/O"),
    ("std::net", "I/O"),
    ("std::process", "I/O"),
    ("std::env", "environment"),
    ("std::thread", "threads"),
    ("Instant::now", "clock"),
    ("SystemTime", "clock"),
    ("Timestamp::now", "clock"),
    ("Zoned::now", "clock"),
    ("getrandom", "randomness"),
    ("tokio", "async runtime"),
    ("println!", "output"),
    ("eprintln!", "output"),
];

/// The one folder whose files may hold `unsafe`.
const UNSAFE_HOME: &str = "crates/repo/src/simd/";

/// Complains about impurity in core and about `unsafe` elsewhere than in its home.
pub fn check(root: &Path, sources: &[Source]) -> Result<Vec<String>, String> {
    let mut complaints = core_dependencies(root)?;
    for source in sources {
        if source.path.starts_with("crates/core/src/") && !source.is_test() {
            complaints.extend(forbidden_in_core(source));
        }
        // The bare word before a block, a function or an impl; not in text and not in a lint's name.
        let has_unsafe = code_lines(&source.text).any(|(_, line)| {
            ["{", "fn ", "impl "].iter().any(|what| line.contains(&["unsafe ", what].concat())) && !line.contains('"')
        });
        if has_unsafe && !source.path.starts_with(UNSAFE_HOME) {
            complaints.push(format!("{}: `unsafe` belongs into {UNSAFE_HOME}", source.path));
        }
    }
    Ok(complaints)
}

fn core_dependencies(root: &Path) -> Result<Vec<String>, String> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(root.join("crates/core/Cargo.toml"))
        .no_deps()
        .exec()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let core = metadata.packages.iter().find(|package| package.name.as_str() == "stillpoint-core");
    let core = core.ok_or("crate `stillpoint-core` is gone")?;
    let normal = core.dependencies.iter().filter(|d| d.kind == cargo_metadata::DependencyKind::Normal);
    Ok(normal
        .filter(|dependency| !CORE_DEPENDENCIES.contains(&dependency.name.as_str()))
        .map(|dependency| format!("core may not depend on `{}`", dependency.name))
        .collect())
}

fn forbidden_in_core(source: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in code_lines(without_tests(&source.text)) {
        for (text, reason) in CORE_FORBIDDEN {
            if line.contains(text) {
                complaints.push(format!("{}:{number}: `{text}` ({reason}) has no place in core", source.path));
            }
        }
    }
    complaints
}

/// Lines that are neither blank nor comment, with their numbers from 1.
pub fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    numbered.filter(|(_, line)| {
        let line = line.trim_start();
        !line.is_empty() && !line.starts_with("//")
    })
}
