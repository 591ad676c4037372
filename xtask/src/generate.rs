//! `cargo xtask gen`: writes what is generated from the code; tests check that it is up to date.

use std::path::Path;

/// Writes `generated/`.
pub fn run(root: &Path) -> Result<(), String> {
    let folder = root.join("generated");
    std::fs::create_dir_all(&folder).map_err(|error| format!("generated: {error}"))?;
    let files = [
        ("platform.schema.json", stillpoint_core::schema::platform()),
        ("statefile.schema.json", stillpoint_core::schema::statefile()),
    ];
    for (name, schema) in files {
        let text = serde_json::to_string_pretty(&schema).map_err(|error| format!("{name}: {error}"))? + "\n";
        std::fs::write(folder.join(name), text).map_err(|error| format!("{name}: {error}"))?;
        println!("generated/{name}");
    }
    Ok(())
}
