//! `stillpoint key`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::platform::Secret;
use stillpoint_engine::ops::key::{self, KeyLine, NewKey};
use stillpoint_engine::secrets;

use crate::app::{App, Outcome};
use crate::render;

/// Add, remove, rotate and list the keys that open the repository. Data is never rewritten.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint key list
  stillpoint key add --file /media/usb/second.key --label usb-stick
  stillpoint key add --from env:TEAM_PASSWORD --label team
  stillpoint key rotate --file new.key       then name new.key in platform.yaml
  stillpoint key remove 3f9a")]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the keys.
    List,
    /// Let one more key open the repository.
    Add(New),
    /// Add a key and remove the one in use.
    Rotate(New),
    /// Take a key away.
    Remove {
        /// Its id, or the first characters of it.
        id: String,
    },
}

#[derive(Debug, Args)]
struct New {
    /// Generate a key file here; it must not exist yet.
    #[arg(long, value_name = "FILE", required_unless_present = "from", conflicts_with = "from")]
    file: Option<PathBuf>,
    /// Take a password, or the text of a key file, from env:NAME, file:PATH or command:PROGRAM.
    #[arg(long, value_name = "SECRET")]
    from: Option<String>,
    /// A name for it, for people.
    #[arg(long, default_value = "")]
    label: String,
}

impl New {
    fn source(&self) -> Result<NewKey> {
        match (&self.file, &self.from) {
            (Some(path), _) => Ok(NewKey::File(path.clone())),
            (None, Some(text)) => {
                secrets::check_form(text)?;
                Ok(NewKey::Secret(Secret(text.clone())))
            }
            (None, None) => Err(Error::new(Kind::Config, "say where the new key comes from")
                .hint("--file FILE generates one, --from env:NAME takes a password")),
        }
    }
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let session = app.session()?;
    match &arguments.action {
        Action::List => {
            let keys = key::list(&session)?;
            Outcome::done(screen(&keys), serde_json::json!({ "keys": keys }))
        }
        Action::Add(new) => {
            let added = key::add(&session, &new.source()?, &new.label)?;
            let text = format!("key {} added{}\n", short(&added), written(new));
            Outcome::done(text, serde_json::json!({ "added": added }))
        }
        Action::Rotate(new) => {
            let added = key::rotate(&session, &new.source()?, &new.label)?;
            let text = format!(
                "key {} replaces the one that was in use{}\n  name it now under `bucket.key` in {}\n",
                short(&added),
                written(new),
                session.config().path.display()
            );
            Outcome::done(text, serde_json::json!({ "added": added }))
        }
        Action::Remove { id } => {
            let removed = key::remove(&session, id)?;
            Outcome::done(format!("key {} removed\n", short(&removed)), serde_json::json!({ "removed": removed }))
        }
    }
}

fn short(key: &KeyLine) -> &str {
    key.id.get(..12).unwrap_or(&key.id)
}

fn written(new: &New) -> String {
    new.file
        .as_ref()
        .map(|path| format!(" · written to {}, mode 0600, and to a recovery sheet beside it", path.display()))
        .unwrap_or_default()
}

fn screen(keys: &[KeyLine]) -> String {
    let rows: Vec<Vec<String>> = keys
        .iter()
        .map(|key| {
            let current = if key.current { "in use" } else { "" };
            vec![
                short(key).to_owned(),
                key.created.parse::<Timestamp>().map_or_else(|_| key.created.clone(), render::time_short),
                key.hostname.clone(),
                key.label.clone(),
                current.to_owned(),
            ]
        })
        .collect();
    render::table(&["key", "made", "on", "label", ""], &[], &rows)
}
