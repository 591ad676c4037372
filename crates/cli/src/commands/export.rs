//! `stillpoint export`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use stillpoint_core::Result;
use stillpoint_core::id::StoreName;
use stillpoint_engine::ops::export::{self, ExportReport, ExportRequest};

use crate::app::{App, Outcome};
use crate::render;

/// Write what a point holds of one store as plain files, without any server.
///
/// The files are in the formats that the store's own tools read; HOW-TO-RESTORE.txt among them
/// says how.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint export latest meta /tmp/meta
  stillpoint export k3f9 artifacts /tmp/m17 --path objects/models/17")]
pub struct Arguments {
    /// A point's id, the first characters of it, or `latest`.
    point: String,
    /// The store.
    store: String,
    /// The folder to write; absent or empty.
    to: PathBuf,
    /// Only this path of the store's tree.
    #[arg(long)]
    path: Option<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let request = ExportRequest {
        point: arguments.point.clone(),
        store: StoreName::new(arguments.store.as_str())?,
        path: arguments.path.clone(),
        to: arguments.to.clone(),
    };
    let session = app.session()?;
    let report = app.block_on(export::run(&session, &request, &app.cancel))?;
    Outcome::done(screen(&report), &report)
}

fn screen(report: &ExportReport) -> String {
    let mut text = format!(
        "{} of point {} → {}\n  {} · {} · {}\n",
        report.store,
        report.point,
        report.to.display(),
        render::plural(report.files, "file", "files"),
        render::bytes(report.bytes),
        render::duration(Duration::from_millis(report.elapsed_millis)),
    );
    for loss in &report.losses {
        text.push_str(&format!("  loss: {loss}\n"));
    }
    text
}
