//! `stillpoint backup`

use std::time::Duration;

use clap::Args;
use stillpoint_core::Result;
use stillpoint_engine::ops::backup::{self, BackupOutcome, BackupRequest};

use super::show;
use crate::app::{App, Outcome};
use crate::render;

/// Make one recovery point of the whole platform.
///
/// Fixes every store's view at one moment, copies it while the platform runs, checks the
/// references between the stores, and commits the point last of all. Ctrl-C ends it in order;
/// then there is no point, and nothing is held back.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint backup                       the platform of ./platform.yaml
  stillpoint backup --config /etc/churn/platform.yaml
  stillpoint backup --json | jq -r .statefile.point")]
pub struct Arguments {
    /// Go on although another run seems to hold the platform; that run will fail.
    #[arg(long)]
    take_over: bool,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let mut request = BackupRequest::new(app.session()?)?;
    request.surroundings.progress = app.progress();
    request.cancel = app.cancel.clone();
    request.take_over = arguments.take_over;
    let platform = request.session.platform();
    app.note(&format!("{} · {} → {}", platform.platform, platform.environment, request.session.bucket().location()));
    let outcome = app.block_on(backup::backup(request))?;
    Outcome::done(screen(&outcome), &outcome)
}

/// What came of it: the point, what it cost, what to do with it.
fn screen(outcome: &BackupOutcome) -> String {
    let point = &outcome.statefile;
    let mut text = show::headline(point);
    text.push_str(&format!(
        "  read {} of {} · new in the bucket {} · {} · writers held back {}\n",
        render::bytes(point.totals.bytes_read),
        render::bytes(point.totals.bytes),
        render::bytes(point.totals.bytes_stored),
        render::duration(Duration::from_millis(outcome.elapsed_millis)),
        render::duration(Duration::from_micros(point.pause_micros)),
    ));
    let checked: u64 = point.references.iter().map(|reference| reference.checked).sum();
    if !point.references.is_empty() && point.references.iter().all(|reference| reference.missing == 0) {
        text.push_str(&format!("  {} checked, none missing\n", render::plural(checked, "reference", "references")));
    }
    for (name, store) in &point.stores {
        for loss in &store.losses {
            text.push_str(&format!("  loss: {name}: {}: {}\n", loss.what, loss.why));
        }
    }
    for reference in point.references.iter().filter(|reference| reference.missing > 0) {
        let missing = render::count(reference.missing);
        text.push_str(&format!(
            "  missing: {missing} {} that `{}` names in `{}`\n",
            reference.kind, reference.from, reference.to
        ));
    }
    for warning in &outcome.warnings {
        text.push_str(&format!("  note: {warning}\n"));
    }
    let id = point.point.as_str().get(..6).unwrap_or_default();
    text.push_str(&format!("  stillpoint show {id}      what is in it\n"));
    text.push_str(&format!("  stillpoint plan {id}      what a restore would do, and lose\n"));
    text
}
