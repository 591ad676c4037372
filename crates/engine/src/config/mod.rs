//! Reads `platform.yaml` into [`Platform`], with every mistake at its line and column.
//!
//! Three passes, each in a file of its own: form (against the schemas that the types yield),
//! meaning (names, cycles, durations), and the types themselves. Opens no store and no bucket.

mod located;
mod meaning;
mod mistake;
mod shape;

use std::path::{Path, PathBuf};

use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::platform::Platform;

use crate::secrets::Secrets;
pub use located::Place;
pub use mistake::{Mistake, Mistakes, nearest};

/// The file's usual name.
pub const FILE_NAME: &str = "platform.yaml";

/// A largest configuration, in bytes; more is a wrong file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A configuration as it was read, and where from.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it says.
    pub platform: Platform,
    /// The file, absolute.
    pub path: PathBuf,
    /// Resolves its secrets.
    pub secrets: Secrets,
}

/// Reads and checks the file at `path`.
///
/// # Errors
/// `NotFound` if there is none; `Config` with [`Mistakes`] as its source if it cannot be used.
pub fn load(path: &Path) -> Result<Config> {
    let shown = path.display();
    let size = std::fs::metadata(path).map_err(|error| not_readable(path, error))?.len();
    if size > FILE_BYTES_MAX {
        return Err(Error::new(Kind::Config, format!("`{shown}` is larger than {FILE_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| not_readable(path, error))?;
    let platform = parse(&text, path)?;
    let absolute = std::path::absolute(path).map_err(|error| Error::io(format!("cannot resolve `{shown}`"), error))?;
    let folder = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    Ok(Config { platform, path: absolute, secrets: Secrets::new(folder) })
}

fn not_readable(path: &Path, error: std::io::Error) -> Error {
    let shown = path.display();
    match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(Kind::Config, format!("there is no `{shown}`"))
            .hint("`stillpoint init` writes one; or name yours with --config FILE or STILLPOINT_CONFIG"),
        std::io::ErrorKind::InvalidData => Error::new(Kind::Config, format!("`{shown}` is not valid UTF-8")),
        _ => Error::new(Kind::Config, format!("cannot read `{shown}`")).source(error),
    }
}

/// Checks `text` and turns it into a platform; `file` is only named in mistakes.
///
/// # Errors
/// `Config`, its source is [`Mistakes`].
pub fn parse(text: &str, file: &Path) -> Result<Platform> {
    let fail = |mistakes| mistake::into_error(file, mistakes);
    let document: located::Node = match serde_saphyr::from_str(text) {
        Ok(document) => document,
        Err(error) => {
            let error = fail(vec![syntax(&error)]);
            return Err(error.unwrap_or_else(|| Error::internal("a syntax mistake was lost")));
        }
    };
    let schema = schemars::schema_for!(Platform).to_value();
    let mut mistakes = shape::check(&document, &schema, "");
    mistakes.extend(meaning::check(&document));
    if let Some(error) = fail(mistakes) {
        return Err(error);
    }
    serde_json::from_value(document.to_value()).map_err(|error| {
        let mistake = Mistake::new(document.place, error.to_string(), "see the schema of platform.yaml");
        fail(vec![mistake]).unwrap_or_else(|| Error::internal("a mistake was lost"))
    })
}

fn syntax(error: &serde_saphyr::Error) -> Mistake {
    let place = error.location().map_or(Place { line: 1, column: 1 }, Place::from);
    let text = error.without_snippet().to_string();
    // The library appends the place in its own form, and advice to programmers; ours stand elsewhere.
    let first_line = text.lines().next().unwrap_or("not valid YAML");
    let message = first_line.split(" at line ").next().unwrap_or(first_line);
    let message = message.split(", set ").next().unwrap_or(message).trim_end_matches('.');
    let hint = match message.starts_with("duplicate") {
        true => "keep one of the two",
        false => "indent with spaces, and put odd texts in quotes",
    };
    Mistake::new(place, format!("not valid YAML: {message}"), hint)
}

#[cfg(test)]
mod tests;
