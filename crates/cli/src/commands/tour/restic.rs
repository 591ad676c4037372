//! The escape hatch, tried: restic restores the same point from the same bucket, if it is installed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use stillpoint_core::error::{IoContext, Result};
use stillpoint_core::statefile::Statefile;
use stillpoint_engine::ops::show;

use super::scene::Scene;

/// What restic said.
#[derive(Debug, Default, Serialize)]
pub struct ResticResult {
    /// Its version; `None` if it is not installed.
    pub version: Option<String>,
    /// Files it restored.
    pub files: u64,
    /// What does not hold. Empty means that restic agrees, or is not installed.
    pub violations: Vec<String>,
    /// The commands that were run, or can be.
    pub commands: Vec<String>,
}

/// Lets restic check the repository and restore the point, and compares object by object.
pub fn read_with_restic(scene: &Scene, point: &Statefile) -> Result<ResticResult> {
    let mut result = ResticResult { commands: show::restic_commands(&scene.config, point), ..ResticResult::default() };
    let Ok(version) = Command::new("restic").arg("version").stdin(Stdio::null()).output() else { return Ok(result) };
    result.version = String::from_utf8_lossy(&version.stdout).split_whitespace().nth(1).map(str::to_owned);
    let target = scene.folder.join("by-restic");
    let key = scene.folder.join("stillpoint.key");
    let repository = show::restic_location(&scene.config);
    let run = |arguments: &[&str]| -> Result<Option<String>> {
        let output = Command::new("restic")
            .args(["-r", &repository, "--no-cache", "--quiet", "--password-file"])
            .arg(&key)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .or_io(|| "cannot run restic".to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        Ok((!output.status.success()).then(|| format!("restic {} failed: {said}", arguments[0])))
    };
    let shown = target.display().to_string();
    for arguments in [&["check", "--read-data"][..], &["restore", &point.snapshot, "--target", &shown]] {
        result.violations.extend(run(arguments)?);
    }
    if result.violations.is_empty() {
        let (ours, theirs) = (tree(&scene.restored.objects)?, objects_of(&target)?);
        result.files = theirs.len() as u64;
        if theirs.is_empty()
            || ours.iter().any(|(name, bytes)| name.starts_with("models/") && theirs.get(name) != Some(bytes))
        {
            result.violations.push("restic restored other objects than stillpoint".to_owned());
        }
    }
    Ok(result)
}

/// The objects below what restic wrote, by key, wherever the driver keeps them in its tree.
fn objects_of(target: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let all = tree(&target.join("objects"))?;
    let keyed = all.into_iter().filter_map(|(name, bytes)| {
        let at = name.find("models/")?;
        Some((name[at..].to_owned(), bytes))
    });
    Ok(keyed.collect())
}

fn tree(root: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let failed = || format!("cannot read `{}`", folder.display());
        for entry in std::fs::read_dir(&folder).or_io(failed)? {
            let path = entry.or_io(failed)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(root) {
                files.insert(name.to_string_lossy().into_owned(), std::fs::read(&path).or_io(failed)?);
            }
        }
    }
    Ok(files)
}
