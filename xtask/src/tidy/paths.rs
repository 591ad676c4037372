//! Paths that the guides name exist: guides rot where nothing checks them.

use std::path::Path;

const GUIDES: &[&str] = &["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "docs/testing.md", "docs/driver-spec.md"];

/// Complains about each path in backticks that is not there. Patterns with `<`, `*` and `…` are passed over.
pub fn check(root: &Path) -> Result<Vec<String>, String> {
    let mut complaints = Vec::new();
    for guide in GUIDES {
        let Ok(text) = std::fs::read_to_string(root.join(guide)) else {
            complaints.push(format!("{guide} is missing"));
            continue;
        };
        for (index, line) in text.lines().enumerate() {
            for quoted in line.split('`').skip(1).step_by(2) {
                if looks_like_path(quoted) && !root.join(quoted.trim_end_matches('/')).exists() {
                    complaints.push(format!("{guide}:{}: `{quoted}` does not exist", index + 1));
                }
            }
        }
    }
    Ok(complaints)
}

fn looks_like_path(text: &str) -> bool {
    const ROOTS: &[&str] =
        &["crates/", "xtask/", "docs/", "rigs/", "testdata/", "generated/", "fuzz/", "bench/", ".ci/", "examples/"];
    ROOTS.iter().any(|root| text.starts_with(root)) && !text.contains(['<', '*', '…', ' ', '{'])
}
