//! `cargo xtask new-driver NAME`: a folder that compiles, a line in the registry, a place for its rig.
//!
//! The new driver begins as a copy of the reference driver under its own names, so that it passes
//! the conformance suite from the first minute and every later change is judged by it.

use std::path::Path;

/// Copies the reference driver to `name` and registers it.
pub fn run(root: &Path, name: &str) -> Result<(), String> {
    let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !valid {
        return Err(format!("`{name}` is no name for a driver: lower-case letters, digits and `_`, a letter first"));
    }
    let home = root.join("crates/drivers/src");
    let folder = home.join(name);
    if folder.exists() {
        return Err(format!("{} is there already", folder.display()));
    }
    let describe = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::create_dir(&folder).map_err(describe)?;
    for entry in std::fs::read_dir(home.join("memory")).map_err(describe)? {
        let entry = entry.map_err(describe)?;
        let text = std::fs::read_to_string(entry.path()).map_err(describe)?;
        std::fs::write(folder.join(entry.file_name()), renamed(&text, name)).map_err(describe)?;
    }
    let rig = root.join("rigs").join(name);
    std::fs::create_dir_all(&rig).map_err(describe)?;
    let about = "# What `cargo xtask rig up` starts for this driver, and what it cannot test here, with reasons.\n";
    std::fs::write(rig.join("rig.toml"), about).map_err(describe)?;
    register(&home.join("lib.rs"), name)?;
    println!("crates/drivers/src/{name}/  a copy of the reference driver: change client.rs first");
    println!("rigs/{name}/rig.toml        say how its real server is had");
    println!("cargo test -p stillpoint-drivers {name}");
    Ok(())
}

fn renamed(text: &str, name: &str) -> String {
    let camel: String = name.split('_').map(capitalised).collect();
    let own =
        |text: &str| text.replace("memory", name).replace("Memory", &camel).replace("MEMORY", &name.to_uppercase());
    // The testkit's tree belongs to no driver.
    text.split("MemoryTree").map(own).collect::<Vec<_>>().join("MemoryTree")
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
}

/// Adds the module line and the registry line behind the reference driver's.
fn register(registry: &Path, name: &str) -> Result<(), String> {
    let describe = |error: std::io::Error| format!("{}: {error}", registry.display());
    let text = std::fs::read_to_string(registry).map_err(describe)?;
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        lines.push(line.to_owned());
        if line.trim() == "pub mod memory;" || line.trim() == "mod memory;" || line.contains("memory::REGISTRATION") {
            lines.push(line.replace("memory", name));
        }
    }
    if lines.len() < text.lines().count() + 2 {
        return Err(format!("{}: the reference driver's two lines were not found", registry.display()));
    }
    std::fs::write(registry, lines.join("\n") + "\n").map_err(describe)
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn all_three_spellings_are_renamed() {
        assert_eq!(renamed("memory MemoryDriver MEMORY", "dynamo_db"), "dynamo_db DynamoDbDriver DYNAMO_DB");
        assert_eq!(renamed("(&MemoryTree, Memory)", "redis"), "(&MemoryTree, Redis)");
    }
}
