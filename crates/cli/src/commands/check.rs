//! `stillpoint check`

use clap::Args;
use stillpoint_core::Result;
use stillpoint_engine::ops::check::{self, CheckSummary};
use stillpoint_repo::Data;

use super::part;
use crate::app::{App, Outcome};
use crate::{exit, render};

/// Check that the bucket is sound: its structure, its points, and with --data every byte.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint check                structure and points; quick
  stillpoint check --sample 5%    and a random 5 % of the data, another 5 % each time
  stillpoint check --data         and every byte, read from the bucket, never from a cache")]
pub struct Arguments {
    /// Re-read every byte.
    #[arg(long, conflicts_with = "sample")]
    data: bool,
    /// Re-read a random part.
    #[arg(long, value_name = "PERCENT")]
    sample: Option<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let data = match (&arguments.sample, arguments.data) {
        (Some(text), _) => part::sample(part::percent(text)?),
        (None, true) => Data::All,
        (None, false) => Data::None,
    };
    let session = app.session()?;
    let report = app.watching("check", || check::run(&session, data, &app.context))?;
    let exit = if report.errors.is_empty() { exit::DONE } else { exit::UNPROVEN };
    Outcome::with(exit, screen(&report, data), &report)
}

fn screen(report: &CheckSummary, data: Data) -> String {
    let read = match data {
        Data::None => "structure only; --data re-reads every byte".to_owned(),
        Data::All => format!("every byte re-read: {}", render::bytes(report.bytes_read)),
        Data::Sample { percent, .. } => format!("a random {percent} % re-read: {}", render::bytes(report.bytes_read)),
    };
    let mut text = format!(
        "{} · {} · {} · {}\n  {read}\n",
        report.bucket,
        render::plural(report.points as u64, "point", "points"),
        render::plural(report.packs, "pack", "packs"),
        render::plural(report.blobs, "piece of data", "pieces of data"),
    );
    for leftover in &report.leftovers {
        text.push_str(&format!("  left over, harmless: {leftover}\n"));
    }
    if report.errors.is_empty() {
        text.push_str("sound\n");
        return text;
    }
    for error in &report.errors {
        text.push_str(&format!("  damage: {error}\n"));
    }
    for point in &report.suffering {
        let paths: Vec<&str> = point.paths.iter().take(5).map(String::as_str).collect();
        let more = (point.paths.len() - paths.len()) as u64 + point.paths_more;
        let more = if more > 0 { format!(" and {} more", render::count(more)) } else { String::new() };
        text.push_str(&format!("  concerns point {}: {}{more}\n", point.point, paths.join(", ")));
    }
    let found = render::plural(report.errors.len() as u64, "problem", "problems");
    text.push_str(&render::last_line(&format!("{found} found. Nothing was changed."), exit::UNPROVEN));
    text
}
