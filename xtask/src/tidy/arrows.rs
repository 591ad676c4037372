//! Arrows between crates point down only; the table below is the whole truth.

use std::path::Path;

/// Crate, and the workspace crates that it may use. Test-only arrows are in [`TEST_ALLOWED`].
const ALLOWED: &[(&str, &[&str])] = &[
    ("stillpoint-core", &[]),
    ("stillpoint-repo", &["stillpoint-core"]),
    ("stillpoint-drivers", &["stillpoint-core"]),
    ("stillpoint-testkit", &["stillpoint-core"]),
    ("stillpoint-engine", &["stillpoint-core", "stillpoint-repo", "stillpoint-drivers", "stillpoint-testkit"]),
    (
        "stillpoint",
        &["stillpoint-core", "stillpoint-repo", "stillpoint-drivers", "stillpoint-engine", "stillpoint-testkit"],
    ),
    // The example uses the stores through their own clients, and knows nothing of us.
    ("model-registry", &[]),
    ("xtask", &["stillpoint-core", "stillpoint-testkit"]),
];

/// What every crate may use in its tests, besides the table.
const TEST_ALLOWED: &[&str] = &["stillpoint-testkit", "stillpoint-core"];

/// Complains about every arrow that is not in the table.
pub fn check(root: &Path) -> Result<Vec<String>, String> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let members: Vec<String> = metadata.packages.iter().map(|package| package.name.to_string()).collect();
    let mut complaints = Vec::new();
    for package in &metadata.packages {
        let name = package.name.to_string();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            complaints.push(format!("crate `{name}` is missing in the table of arrows (xtask/src/tidy/arrows.rs)"));
            continue;
        };
        for dependency in &package.dependencies {
            let target = dependency.name.as_str();
            let in_tests = dependency.kind == cargo_metadata::DependencyKind::Development;
            let fine = allowed.contains(&target) || (in_tests && TEST_ALLOWED.contains(&target));
            if members.iter().any(|member| member == target) && !fine {
                complaints.push(format!("crate `{name}` may not use `{target}`"));
            }
        }
    }
    Ok(complaints)
}
