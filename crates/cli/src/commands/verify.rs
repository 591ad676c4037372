//! `stillpoint verify`

use std::time::{Duration, Instant};

use clap::Args;
use stillpoint_core::Result;
use stillpoint_engine::ops::verify::{self, VerifyReport};
use stillpoint_repo::Data;

use super::{part, show};
use crate::app::{App, Outcome};
use crate::{exit, render};

/// Prove that a point can be read: every byte from the bucket, never from a cache.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint verify               every byte of the newest point
  stillpoint verify k3f9 --sample 5%")]
pub struct Arguments {
    /// A point's id, the first characters of it, or `latest`.
    #[arg(default_value = "latest")]
    point: String,
    /// Re-read only a random part, another one each time.
    #[arg(long, value_name = "PERCENT")]
    sample: Option<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let data = match &arguments.sample {
        Some(text) => part::sample(part::percent(text)?),
        None => Data::All,
    };
    let begin = Instant::now();
    let session = app.session()?;
    let report = app.watching("verify", || verify::run(&session, &arguments.point, data, &app.context))?;
    let exit = if report.errors.is_empty() { exit::DONE } else { exit::UNPROVEN };
    Outcome::with(exit, screen(&report, begin.elapsed()), &report)
}

fn screen(report: &VerifyReport, elapsed: Duration) -> String {
    let mut text = show::headline(&report.statefile);
    text.push_str(&format!(
        "  {} % of its data re-read from the bucket: {} in {}\n",
        report.percent,
        render::bytes(report.bytes_read),
        render::duration(elapsed)
    ));
    if report.errors.is_empty() {
        text.push_str("proven: statefile authentic, every piece as it was written\n");
        return text;
    }
    for error in &report.errors {
        text.push_str(&format!("  damage: {error}\n"));
    }
    for path in &report.suffering {
        text.push_str(&format!("  concerns: {path}\n"));
    }
    text.push_str(&render::last_line("The point cannot be restored whole. Nothing was changed.", exit::UNPROVEN));
    text
}
