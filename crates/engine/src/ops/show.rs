//! `show`: everything that a point says of itself, and how to read it without Stillpoint.

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::statefile::Statefile;

use crate::config::Config;
use crate::open::{REPOSITORY_PREFIX, Session};
use crate::points;

/// What `show` found.
#[derive(Debug, Serialize)]
pub struct ShowReport {
    /// Where the bucket is.
    pub bucket: String,
    /// The authenticated statefile.
    pub statefile: Statefile,
    /// Commands that restore the point with nothing but restic.
    pub restic: Vec<String>,
}

/// Shows the point that `name` means: an id, a prefix or `latest`.
pub fn run(session: &Session, name: &str) -> Result<ShowReport> {
    let listing = points::list(session.bucket().as_ref(), session.repository())?;
    let platform = session.platform();
    let statefile = listing.find(name, &platform.platform, &platform.environment)?.clone();
    let restic = restic_commands(session.config(), &statefile);
    Ok(ShowReport { bucket: session.bucket().location(), statefile, restic })
}

/// The commands that list and restore `point` with restic.
pub fn restic_commands(config: &Config, point: &Statefile) -> Vec<String> {
    let prefix = format!("restic -r {} {}", quoted(&restic_location(config)), restic_key(config));
    vec![
        format!("{prefix} snapshots --tag point:{}", point.point),
        format!("{prefix} ls {}", short(&point.snapshot)),
        format!("{prefix} restore {} --target FOLDER", short(&point.snapshot)),
    ]
}

/// The repository's address as restic writes it.
pub fn restic_location(config: &Config) -> String {
    let bucket = &config.platform.bucket;
    let url = bucket.url.trim_end_matches('/');
    let folder = REPOSITORY_PREFIX.trim_end_matches('/');
    match url.split_once("://") {
        Some(("file", path)) => format!("{path}/{folder}"),
        Some(("s3", path)) => {
            let endpoint = bucket.options.get("endpoint").map_or("https://s3.amazonaws.com", String::as_str);
            format!("s3:{}/{path}/{folder}", endpoint.trim_end_matches('/'))
        }
        Some((scheme @ ("gs" | "az"), path)) => {
            let scheme = if scheme == "az" { "azure" } else { scheme };
            let (container, rest) = path.split_once('/').unwrap_or((path, ""));
            let separator = if rest.is_empty() { "" } else { "/" };
            format!("{scheme}:{container}:/{rest}{separator}{folder}")
        }
        _ => format!("{url}/{folder}"),
    }
}

/// restic's option for the key that `platform.yaml` names. Never the key itself.
fn restic_key(config: &Config) -> String {
    let Some(secret) = &config.platform.bucket.key else { return "--password-file KEYFILE".to_owned() };
    match (config.secrets.file_path(secret), secret.0.split_once(':')) {
        (Some(path), _) => format!("--password-file {}", quoted(&path.display().to_string())),
        (None, Some(("env", name))) => format!("--password-command {}", quoted(&format!("printenv {name}"))),
        (None, Some(("command", line))) => format!("--password-command {}", quoted(line)),
        _ => "--password-file KEYFILE".to_owned(),
    }
}

fn short(snapshot: &str) -> &str {
    snapshot.get(..12).unwrap_or(snapshot)
}

/// The text as one word of a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=@%+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::secrets::Secrets;
    use std::path::Path;

    fn config(url: &str, key: &str, options: &str) -> Config {
        let text = format!(
            "apiVersion: stillpoint.dev/v1\nplatform: a\nenvironment: b\nbucket: {{ url: '{url}', key: '{key}', options: {options} }}\n\
             stores: {{ x: {{ driver: sqlite, path: /x.db }} }}\n"
        );
        let platform = parse(&text, Path::new("platform.yaml")).expect("valid");
        Config { platform, path: "/etc/platform.yaml".into(), secrets: Secrets::new("/etc") }
    }

    #[test]
    fn addresses_and_keys_are_written_as_restic_reads_them() {
        let cases = [
            ("/srv/b/", "file:k.key", "{}", "/srv/b/repo", "--password-file /etc/k.key"),
            ("file:///srv/b", "env:P", "{}", "/srv/b/repo", "--password-command 'printenv P'"),
            (
                "s3://b/p",
                "command:pass show x",
                "{}",
                "s3:https://s3.amazonaws.com/b/p/repo",
                "--password-command 'pass show x'",
            ),
            (
                "s3://b",
                "env:P",
                "{ endpoint: 'http://127.0.0.1:9000/' }",
                "s3:http://127.0.0.1:9000/b/repo",
                "--password-command 'printenv P'",
            ),
            ("gs://b/p", "env:P", "{}", "gs:b:/p/repo", "--password-command 'printenv P'"),
            ("az://c", "env:P", "{}", "azure:c:/repo", "--password-command 'printenv P'"),
        ];
        for (url, key, options, location, option) in cases {
            let config = config(url, key, options);
            assert_eq!((restic_location(&config).as_str(), restic_key(&config).as_str()), (location, option));
        }
    }
}
