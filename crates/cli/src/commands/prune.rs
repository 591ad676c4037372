//! `stillpoint prune`

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::Result;
use stillpoint_engine::ops::prune::{self, PruneSummary, UNUSED_PERCENT_DEFAULT};

use crate::app::{App, Outcome};
use crate::render;

/// Free the space that no point needs any more.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint prune --dry-run      say what would be freed
  stillpoint prune
  stillpoint prune --max-unused 0 rewrite everything that holds anything unused")]
pub struct Arguments {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Unused data that may stay, in percent of the used; less means more rewriting.
    #[arg(long, value_name = "PERCENT", default_value_t = UNUSED_PERCENT_DEFAULT)]
    max_unused: f64,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let session = app.session()?;
    let (dry_run, unused) = (arguments.dry_run, arguments.max_unused);
    let report = app.watching("prune", || prune::run(&session, dry_run, unused, Timestamp::now(), &app.context))?;
    Outcome::done(screen(&report), &report)
}

fn screen(report: &PruneSummary) -> String {
    let (would, nothing) = if report.dry_run { ("would be ", "Nothing was changed.\n") } else { ("", "") };
    let mut text = format!(
        "{}\n  {would}freed {} · {} {would}deleted · {} {would}rewritten\n  needed {} · unused and left {}\n",
        report.bucket,
        render::bytes(report.bytes_freed),
        render::plural(report.packs_deleted, "pack", "packs"),
        render::count(report.packs_rewritten),
        render::bytes(report.bytes_used),
        render::bytes(report.bytes_unused),
    );
    if !report.abandoned.is_empty() {
        let runs = render::plural(report.abandoned.len() as u64, "run", "runs");
        text.push_str(&format!("  {would}removed what {runs} left behind that never made a point\n"));
    }
    if !report.journals.is_empty() {
        let runs = render::plural(report.journals.len() as u64, "run", "runs");
        text.push_str(&format!("  {would}removed the journals of {runs} that ended long ago\n"));
    }
    for unreadable in &report.journals_unreadable {
        text.push_str(&format!("  left alone: {unreadable}\n"));
    }
    for kept in &report.kept_by_object_lock {
        text.push_str(&format!("  kept by an object lock: {kept}\n"));
    }
    text + nothing
}
