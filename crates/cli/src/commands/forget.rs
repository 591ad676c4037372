//! `stillpoint forget`

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::Result;
use stillpoint_engine::ops::forget::{self, ForgetReport, ForgetRequest};

use crate::app::{App, Outcome};
use crate::render;

/// Let go of points by the rules under `retention`, or by name. Never of the newest restorable one.
///
/// Frees no space by itself: `stillpoint prune` does.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint forget --dry-run     what the rules would keep, and why
  stillpoint forget
  stillpoint forget k3f9 2m7q     these two, whatever the rules say")]
pub struct Arguments {
    /// Points by id or first characters; the rules decide if none is named.
    points: Vec<String>,
    /// Say what would be forgotten, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let request = ForgetRequest { points: arguments.points.clone(), dry_run: arguments.dry_run };
    let report = forget::run(&app.session()?, &request, Timestamp::now())?;
    Outcome::done(screen(&report), &report)
}

fn screen(report: &ForgetReport) -> String {
    let mut text = format!("{}\n", report.bucket);
    let rows: Vec<Vec<String>> = report
        .decisions
        .iter()
        .map(|decision| {
            let fate = match (decision.keeps(), report.dry_run) {
                (true, _) => "keep",
                (false, true) => "would forget",
                (false, false) => "forgotten",
            };
            vec![
                decision.point.to_string(),
                render::time_short(decision.at),
                fate.to_owned(),
                decision.reasons.join(", "),
            ]
        })
        .collect();
    text.push_str(&render::table(&["point", "taken", "", "why"], &[], &rows));
    let forgotten = render::plural(report.forgotten.len() as u64, "point", "points");
    text.push_str(&match (report.dry_run, report.forgotten.is_empty()) {
        (true, _) => format!("{forgotten} would be forgotten. Nothing was changed.\n"),
        (false, true) => "nothing to forget\n".to_owned(),
        (false, false) => format!("{forgotten} forgotten\n  stillpoint prune      frees their space\n"),
    });
    text
}
