//! No dead files: every Rust file is compiled, every sample is tested, every decision is numbered.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Source, relative, visit};

/// Complains about files that nothing uses.
pub fn check(root: &Path, sources: &[Source]) -> Result<Vec<String>, String> {
    let mut complaints = unreachable_modules(sources);
    complaints.extend(unused_samples(root, sources)?);
    complaints.extend(decisions(root)?);
    Ok(complaints)
}

/// A file is alive if it is a crate root, or if the file of the module around it declares it.
fn unreachable_modules(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        let path = Path::new(&source.path);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let folder = path.parent().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let folder_name = folder.rsplit('/').next().unwrap_or_default().to_owned();
        let is_root = matches!(stem.as_str(), "lib" | "main" | "build")
            || matches!(folder_name.as_str(), "bin" | "examples" | "benches" | "fuzz_targets")
            || (folder_name == "tests" && !folder.contains("/tests/"));
        if is_root {
            continue;
        }
        let (module, home) = if stem == "mod" {
            (folder_name.clone(), folder.rsplit_once('/').map(|(up, _)| up.to_owned()).unwrap_or_default())
        } else {
            (stem, folder)
        };
        let parents =
            [format!("{home}/mod.rs"), format!("{home}/lib.rs"), format!("{home}/main.rs"), format!("{home}.rs")];
        let declared = sources.iter().filter(|s| parents.contains(&s.path)).any(|parent| {
            parent.text.lines().any(|line| {
                let line = line.trim_start();
                let visible = ["pub(crate) ", "pub(super) ", "pub "].iter().find_map(|word| line.strip_prefix(word));
                let line = visible.unwrap_or(line);
                line.starts_with(&format!("mod {module};")) || line.starts_with(&format!("mod {module} "))
            })
        });
        let by_path = sources.iter().any(|s| s.text.contains(&format!("#[path = \"{module}.rs\"]")));
        if !declared && !by_path {
            complaints.push(format!("{}: no module declares it", source.path));
        }
    }
    complaints
}

/// Every entry of `testdata/` is named in some test.
fn unused_samples(root: &Path, sources: &[Source]) -> Result<Vec<String>, String> {
    let folder = root.join("testdata");
    let mut complaints = Vec::new();
    if folder.exists() {
        let entries = std::fs::read_dir(&folder).map_err(|error| format!("testdata: {error}"))?;
        for entry in entries {
            let entry = entry.map_err(|error| format!("testdata: {error}"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "README.md" && !sources.iter().any(|source| source.text.contains(&name)) {
                complaints.push(format!("testdata/{name}: no test names it"));
            }
        }
    }
    Ok(complaints)
}

/// Decision records are numbered without gap or double.
fn decisions(root: &Path) -> Result<Vec<String>, String> {
    let mut complaints = Vec::new();
    let mut numbers = BTreeSet::new();
    visit(&root.join("docs/decisions"), &mut |path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.split('-').next().and_then(|number| number.parse::<u32>().ok()) {
            Some(number) if numbers.insert(number) => {}
            Some(number) => complaints.push(format!("docs/decisions: number {number} is taken twice")),
            None if name == "README.md" => {}
            None => complaints.push(format!("{}: begins without a number", relative(root, path))),
        }
        Ok(())
    })?;
    for (expected, number) in (1..).zip(&numbers) {
        if *number != expected {
            complaints.push(format!("docs/decisions: number {expected} is missing"));
            break;
        }
    }
    Ok(complaints)
}
