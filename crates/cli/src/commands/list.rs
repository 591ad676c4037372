//! `stillpoint list`

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::Result;
use stillpoint_core::statefile::{Level, Verdict};
use stillpoint_engine::ops::list::{self, ListReport};

use crate::app::{App, Outcome};
use crate::{exit, render};

/// List the recovery points, newest first.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint list
  stillpoint list --all           every platform and environment in the bucket
  stillpoint list --json | jq -r '.points[0].point'")]
pub struct Arguments {
    /// The points of every platform and environment in the bucket.
    #[arg(long)]
    all: bool,
}

/// Runs the verb. Damaged points make the exit code 5: a list that hides them would be believed.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let report = list::run(&app.session()?, arguments.all)?;
    let exit = if report.damaged.is_empty() { exit::DONE } else { exit::BUCKET };
    Outcome::with(exit, screen(&report, Timestamp::now()), &report)
}

fn screen(report: &ListReport, now: Timestamp) -> String {
    let title = match (&report.platform, &report.environment) {
        (Some(platform), Some(environment)) => format!("{platform} · {environment}"),
        _ => "all platforms".to_owned(),
    };
    let mut text = format!("{title} · {}\n", report.bucket);
    if report.points.is_empty() && !report.damaged.is_empty() {
        text.push_str("  no point that can be believed\n");
    } else if report.points.is_empty() {
        text.push_str("  no point yet; `stillpoint backup` makes one\n");
    } else {
        let all = report.platform.is_none();
        let mut header = vec!["point", "taken", "age", "level", "stores", "holds", "new", "verdict"];
        if all {
            header.insert(1, "platform");
        }
        let rows: Vec<Vec<String>> = report
            .points
            .iter()
            .map(|point| {
                let mut row = vec![
                    point.point.to_string(),
                    render::time_short(point.cut_at),
                    render::age(point.cut_at, now),
                    level(point.level).to_owned(),
                    point.stores.to_string(),
                    render::bytes(point.bytes),
                    render::bytes(point.bytes_stored),
                    verdict(point.verdict).to_owned(),
                ];
                if all {
                    row.insert(1, format!("{} · {}", point.platform, point.environment));
                }
                row
            })
            .collect();
        let right = if all { [5, 6, 7] } else { [4, 5, 6] };
        text.push_str(&render::table(&header, &right, &rows));
    }
    for damaged in &report.damaged {
        text.push_str(&format!("damaged: point {}: {}\n", damaged.point, damaged.reason));
    }
    if report.others > 0 {
        text.push_str(&format!("{} of other platforms or environments: --all\n", report.others));
    }
    text
}

/// The word for a level.
pub fn level(level: Level) -> &'static str {
    match level {
        Level::Strict => "strict",
        Level::Ordered => "ordered",
        Level::Independent => "independent",
    }
}

/// The words for a verdict.
pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Restorable => "restorable",
        Verdict::RestorableWithNamedLoss => "restorable with named loss",
    }
}
