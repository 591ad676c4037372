//! The texts that `init` writes: `platform.yaml` and the bucket's README.
//!
//! Pure. The README is read on the worst day by someone who never saw Stillpoint.

use stillpoint_core::id::{EnvironmentName, PlatformName};
use stillpoint_core::platform::{API_VERSION, Secret};

use super::look::Surroundings;

/// What goes into `platform.yaml`.
pub struct Facts<'a> {
    /// The platform.
    pub platform: &'a PlatformName,
    /// The environment.
    pub environment: &'a EnvironmentName,
    /// The bucket's address.
    pub bucket: &'a str,
    /// Whether the bucket lies beside the configuration because nothing else was said.
    pub bucket_is_beside: bool,
    /// What unlocks the repository.
    pub key: &'a Secret,
    /// What was seen.
    pub surroundings: &'a Surroundings,
}

/// A commented configuration with what was found.
pub fn platform_yaml(facts: &Facts<'_>) -> String {
    let mut text = String::new();
    let mut line = |shown: &str| {
        text.push_str(shown);
        text.push('\n');
    };
    line("# What is protected together, and where its recovery points go.");
    line("# Written by `stillpoint init`; review the stores below, then run `stillpoint backup`.");
    line(&format!("apiVersion: {API_VERSION}"));
    line(&format!("platform: {}", quoted(facts.platform.as_str())));
    line(&format!("environment: {}", quoted(facts.environment.as_str())));
    line("");
    line("bucket:");
    if facts.bucket_is_beside {
        line("  # This folder lies beside what it protects. Name another disk, or s3://bucket/prefix,");
        line("  # before you rely on it.");
    }
    line(&format!("  url: {}", quoted(facts.bucket)));
    line("  # Never the key itself: env:NAME, file:PATH (from this folder) or command:PROGRAM ARGUMENTS.");
    line(&format!("  key: {}", quoted(&facts.key.0)));
    line("");
    line("# The name of a store is also its folder in every point.");
    line("stores:");
    for store in &facts.surroundings.stores {
        line(&format!("  {}:", quoted(&store.name)));
        line(&format!("    driver: {}   # {}", store.driver, store.because));
        for (name, value) in &store.settings {
            line(&format!("    {name}: {}", scalar(value)));
        }
    }
    if !facts.surroundings.unprotected.is_empty() {
        line("# Seen, but NOT in any point:");
        for seen in &facts.surroundings.unprotected {
            let Some(store) = &seen.store else {
                line(&format!("#   {} ({}): there is no driver for it yet", seen.what, seen.at));
                continue;
            };
            line(&format!("#   {} ({}); if it belongs to this platform, add:", seen.what, seen.at));
            line(&format!("#   {}:", quoted(&store.name)));
            line(&format!("#     driver: {}", store.driver));
            store.settings.iter().for_each(|(name, value)| line(&format!("#     {name}: {}", scalar(value))));
        }
    }
    text.push_str(EXAMPLES);
    text
}

/// What most platforms need next, switched off.
const EXAMPLES: &str = "
# How consistent a point must be: strict, ordered or independent.
cut:
  level: strict
  # Accept less by name, where writers never rest and cannot be paused:
  # accept: [ordered, independent]
  # How long writers may be held back by the pause steps below:
  pauseBudget: 5s

# What holds writers back for the cut, and lets them go. Only used if they do not rest by themselves.
# pause:
#   - kind: command
#     pause: [systemctl, kill, --signal=STOP, writer]
#     resume: [systemctl, kill, --signal=CONT, writer]
#   - kind: http
#     pause: { url: \"http://127.0.0.1:8080/pause\" }
#     resume: { url: \"http://127.0.0.1:8080/resume\" }

# Which store's data names what in another; checked in every point and after every restore.
# references:
#   - { from: meta, query: \"SELECT object_key, id FROM models\", to: artifacts, kind: keys }

# Which points `stillpoint forget` keeps. Without it nothing is ever forgotten.
# retention: { last: 3, daily: 7, weekly: 5, monthly: 12, within: 36h }

# Named places to restore into; what is given here replaces the settings above.
# targets:
#   staging:
#     stores:
#       meta: { path: /srv/staging/meta.db }
";

/// A list is written as it is; everything else is one scalar.
fn scalar(value: &str) -> String {
    if value.starts_with('[') { value.to_owned() } else { quoted(value) }
}

/// A YAML scalar that cannot be taken for anything but this text.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    let safe = text.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(plain)
        && !text.ends_with(':')
        && !["y", "n", "yes", "no", "on", "off", "true", "false", "null"].contains(&text.to_lowercase().as_str());
    if safe {
        return text.to_owned();
    }
    serde_json::Value::String(text.to_owned()).to_string()
}

/// The page at the top of every bucket.
pub fn readme() -> &'static str {
    README
}

const README: &str = "\
This bucket holds recovery points of one or more platforms, made by Stillpoint.
It can be restored with nothing but restic (https://restic.net) and this page.

What lies here
  repo/       a restic repository, format version 2: all data, deduplicated and encrypted
  points/     one folder per recovery point. Its statefile.json says what the point holds, when,
              and how consistent it is; a point exists only if this file does
  journal/    how each run went
  leases/     who runs now
  README.txt  this page

You need
  - restic 0.14 or newer
  - the key: the file `stillpoint.key`, or the line on the recovery sheet that was printed when
    the bucket was made, or the password that was chosen instead

To restore
  1. See what is there. Every point is one snapshot; its tags carry the point's id.
       restic -r THIS-BUCKET/repo --password-file stillpoint.key snapshots
     THIS-BUCKET is a folder, or s3:https://SERVER/BUCKET/PREFIX, gs:BUCKET:/PREFIX,
     azure:CONTAINER:/PREFIX with the credentials in the environment, as restic's manual says.
  2. Write one to an empty folder.
       restic -r THIS-BUCKET/repo --password-file stillpoint.key restore SNAPSHOT --target FOLDER
  3. FOLDER now holds one folder per store, and in each a HOW-TO-RESTORE.txt that says how the
     store's own tools take it back. Restore them in the order of the statefile, all from one point.

Before you start anything that was restored, make sure that it cannot reach what it was copied from.
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::ops::init::look::{Found, Seen};
    use std::path::Path;

    #[test]
    fn what_is_written_is_read_back_whatever_names_hold() {
        let found = |name: &str, driver, path: &str| Found {
            name: name.to_owned(),
            driver,
            at: path.into(),
            settings: vec![("path".into(), path.into())],
            because: "a test".to_owned(),
        };
        let surroundings = Surroundings {
            stores: vec![found("meta", "sqlite", "/srv/a: b #c \"d\".db"), found("no", "objects", "/srv/objects")],
            unprotected: vec![Seen { what: "Kafka".into(), at: "127.0.0.1:9092".into(), store: None }],
            stopped_early: false,
        };
        let text = platform_yaml(&Facts {
            platform: &PlatformName::new("123").expect("valid"),
            environment: &EnvironmentName::new("production").expect("valid"),
            bucket: "/srv/backup",
            bucket_is_beside: true,
            key: &Secret("file:stillpoint.key".into()),
            surroundings: &surroundings,
        });
        let platform = config::parse(&text, Path::new("platform.yaml")).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
        assert_eq!(platform.stores.len(), 2);
        assert_eq!(platform.platform.as_str(), "123");
    }
}
