//! `stillpoint apply`

use std::path::{Path, PathBuf};

use clap::Args;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::plan::restore::PlanHash;
use stillpoint_engine::ops::apply::{self, ApplyRequest, RestoreReport, StoreReport, StoreStatus};

use crate::app::{App, Outcome};
use crate::{exit, render};

/// Shortest part of a hash that counts as having read it.
const HASH_CHARS_MIN: usize = 8;

/// Carry out a reviewed plan, or refuse if anything differs from what was reviewed.
///
/// Interrupted, it goes on where it ended when it is run again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint plan --into staging --save plan.json
  stillpoint apply plan.json 7be1c04d9f21")]
pub struct Arguments {
    /// The file that `plan --save` wrote.
    plan: PathBuf,
    /// The hash that was reviewed, or its first characters.
    hash: Option<String>,
    /// For a restore in place: the identity of each store that is replaced, typed to confirm it.
    #[arg(long, value_name = "IDENTITY")]
    confirm: Vec<String>,
}

/// Runs the verb. Exit code 7 if something was not restored, or is not what it must be.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let (plan, hash) = read(&arguments.plan)?;
    if let Some(reviewed) = &arguments.hash
        && (reviewed.len() < HASH_CHARS_MIN || !hash.0.starts_with(reviewed.as_str()))
    {
        return Err(Error::new(
            Kind::Conflict,
            format!("the plan in `{}` is {}, not {reviewed}", arguments.plan.display(), hash.short()),
        )
        .hint("review the plan again: `stillpoint plan … --save FILE`"));
    }
    let request = ApplyRequest { plan, hash, typed: arguments.confirm.clone() };
    let session = app.session()?;
    let report = app.block_on(apply::run(&session, &request, app.progress(), &app.cancel))?;
    outcome(&report)
}

fn read(file: &Path) -> Result<(RestorePlan, PlanHash)> {
    let shown = file.display();
    let bytes = std::fs::read(file).or_io(|| format!("cannot read the plan `{shown}`"))?;
    let corrupt = |error| {
        Error::new(Kind::Config, format!("`{shown}` is not a plan"))
            .hint("`stillpoint plan --save FILE` writes one")
            .source(error)
    };
    let mut document: serde_json::Value = serde_json::from_slice(&bytes).map_err(corrupt)?;
    let plan = RestorePlan::parse(document["plan"].to_string().as_bytes())?;
    let hash = serde_json::from_value(document["hash"].take()).map_err(corrupt)?;
    Ok((plan, hash))
}

/// What came of a restore, for `apply` and `restore`.
pub fn outcome(report: &RestoreReport) -> Result<Outcome> {
    let exit = if report.proven || report.restored { exit::DONE } else { exit::UNPROVEN };
    Outcome::with(exit, screen(report), report)
}

fn screen(report: &RestoreReport) -> String {
    let elapsed = render::duration(std::time::Duration::from_millis(report.elapsed_millis));
    let mut text =
        format!("restore {} · point {} → environment `{}`\n", report.restore, report.point, report.environment);
    let rows: Vec<Vec<String>> = report.stores.iter().map(row).collect();
    text.push_str(&render::table(&["store", "", "written", "items", "compared", "where"], &[2, 3, 4], &rows));
    for store in &report.stores {
        text.push_str(&details(store));
    }
    for reference in &report.references {
        let missing =
            if reference.missing == 0 { "none missing".to_owned() } else { format!("{} MISSING", reference.missing) };
        let checked = render::count(reference.checked);
        text.push_str(&format!(
            "  {} → {} {}: {checked} checked, {missing}\n",
            reference.from, reference.to, reference.kind
        ));
    }
    for note in &report.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    for failure in &report.failures {
        text.push_str(&format!("  failed: {failure}\n"));
    }
    if report.proven {
        text.push_str(&format!("proven in {elapsed}: every store equals the point\n"));
    } else if report.restored {
        text.push_str(&format!("restored in {elapsed}, not compared: each byte was checked as it was read, what was written was not read back\n"));
    } else {
        let all_there = report.stores.iter().all(StoreReport::is_good)
            && report.references.iter().all(|reference| reference.missing == 0);
        let state = match all_there && !report.failures.is_empty() {
            true => "NOT proven: every store is restored, but what failed above was not checked.",
            false => "NOT proven: do not use what was restored.",
        };
        text.push_str(&render::last_line(state, exit::UNPROVEN));
    }
    text
}

fn row(store: &StoreReport) -> Vec<String> {
    let status = match store.status {
        StoreStatus::Proven if store.done_before => "proven before",
        StoreStatus::Proven => "proven",
        StoreStatus::Restored => "restored",
        StoreStatus::Differs => "DIFFERS",
        StoreStatus::Failed => "FAILED",
        StoreStatus::NotStarted => "not begun",
    };
    vec![
        store.store.to_string(),
        status.to_owned(),
        render::bytes(store.bytes),
        render::count(store.items),
        render::count(store.checked),
        store.endpoint.clone().unwrap_or_default(),
    ]
}

fn details(store: &StoreReport) -> String {
    let mut text = String::new();
    let name = &store.store;
    for difference in &store.differences {
        text.push_str(&format!("  differs: {name}: {difference}\n"));
    }
    for kept in &store.kept_old {
        text.push_str(&format!("  kept: {name}: what was there is in {kept}\n"));
    }
    for loss in &store.losses {
        text.push_str(&format!("  loss: {name}: {}: {}\n", loss.what, loss.why));
    }
    if let Some(error) = &store.error {
        text.push_str(&format!("  failed: {name}: {error}\n"));
    }
    text
}
