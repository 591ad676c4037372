//! What is wrong in a configuration file, said so that the operator can jump to it and mend it.
//!
//! Kept apart from the checks that find mistakes. Never shows a value that may be a secret.

use std::fmt;
use std::path::Path;

use stillpoint_core::error::{Error, Kind};

use super::located::Place;

/// One thing that is wrong, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Where it stands.
    pub place: Place,
    /// One sentence without a full stop.
    pub message: String,
    /// What would be right.
    pub hint: String,
}

impl Mistake {
    /// A mistake at `place`.
    pub fn new(place: Place, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { place, message: message.into(), hint: hint.into() }
    }
}

/// All mistakes of one file; the source of the error that `config::load` returns.
///
/// The CLI finds it by downcasting and prints each. The text of a mistaken line is never shown: it
/// may hold a secret in plain text.
#[derive(Debug, Clone)]
pub struct Mistakes {
    /// The file as the operator named it.
    pub file: String,
    /// In the order of the file; never empty.
    pub list: Vec<Mistake>,
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.list.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            let Place { line, column } = mistake.place;
            write!(f, "{separator}{}:{line}:{column}: {}", self.file, mistake.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Turns mistakes into the one error of the boundary: the first is the message, all are the source.
///
/// Returns `None` when there are none.
pub fn into_error(file: &Path, mut list: Vec<Mistake>) -> Option<Error> {
    list.sort_by_key(|mistake| mistake.place);
    list.dedup();
    let first = list.first()?.clone();
    let file = file.display().to_string();
    let Place { line, column } = first.place;
    let mut error = Error::new(Kind::Config, format!("{file}:{line}:{column}: {}", first.message)).hint(first.hint);
    if list.len() > 1 {
        error = error.context("mistakes in all:", list.len());
    }
    Some(error.source(Mistakes { file, list }))
}

/// The known name that is closest to `word`, if one is close enough to be a slip of the finger.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = 1 + word.chars().count() / 4;
    known
        .into_iter()
        .map(|name| (distance(&word.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `left` into `right`.
fn distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut rows = vec![(0..=right.len()).collect::<Vec<usize>>()];
    for i in 1..=left.len() {
        let mut row = vec![i];
        for j in 1..=right.len() {
            let replace = rows[i - 1][j - 1] + usize::from(left[i - 1] != right[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let known = ["path", "platform", "retention"];
        assert_eq!(nearest("paht", known), Some("path"));
        assert_eq!(nearest("Retension", known), Some("retention"));
        assert_eq!(nearest("bucket", known), None);
    }
}
