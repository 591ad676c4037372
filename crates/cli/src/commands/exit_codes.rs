//! `stillpoint help exit-codes`: the table that scripts may rely on.

use clap::Args;
use stillpoint_core::Result;

use crate::app::Outcome;
use crate::exit;

/// What each exit code means.
#[derive(Debug, Args)]
#[command(long_about = exit::table(), help_template = "Exit codes\n\n{about-with-newline}")]
pub struct Arguments {}

/// Prints the table.
pub fn run() -> Result<Outcome> {
    let rows: Vec<_> =
        exit::TABLE.iter().map(|exit| serde_json::json!({ "code": exit.code, "means": exit.means })).collect();
    Outcome::done(exit::table(), rows)
}
