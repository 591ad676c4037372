//! `stillpoint plan`

use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::error::{Error, IoContext, Result};
use stillpoint_core::plan::RestorePlan;
use stillpoint_engine::ops::plan::{self, Planned};

use super::destination::Options;
use crate::app::{App, Outcome};
use crate::{exit, render};

/// Say what a restore would do, overwrite and lose. Read-only.
///
/// Looks at the point and at the targets, and lets the fence judge them. The plan has a hash;
/// `apply` carries out that plan or refuses.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint plan --into staging
  stillpoint plan k3f9 --to /tmp/r --save plan.json     then: stillpoint apply plan.json
  stillpoint plan latest --store meta --in-place")]
pub struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Write the plan to a new file, for review and `apply`.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

/// Runs the verb. Exit code 6 if the fence stands against it.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let session = app.session()?;
    let request = arguments.options.request(session.config())?;
    let planned = app.block_on(plan::run(&session, &request, &app.cancel))?;
    if let Some(file) = &arguments.save {
        save(&planned, file)?;
    }
    let clear = planned.fence.is_empty();
    let exit = if clear { exit::DONE } else { exit::REFUSED };
    let mut text = screen(&planned, Timestamp::now());
    match (&arguments.save, clear) {
        (_, false) => {
            let state = format!("plan {} is refused until the fence is clear", planned.hash.short());
            text.push_str(&render::last_line(&state, exit));
        }
        (Some(file), true) => {
            let (file, hash) = (file.display(), planned.hash.short());
            text.push_str(&format!("plan {hash} written to {file}\n  stillpoint apply {file} {hash}\n"));
        }
        (None, true) => {
            text.push_str(&format!(
                "plan {} · nothing was changed; --save FILE keeps it for apply\n",
                planned.hash.short()
            ));
        }
    }
    Outcome::with(exit, text, &planned)
}

/// Plan and hash in one file, so that `apply` finds out if either was changed.
fn save(planned: &Planned, file: &PathBuf) -> Result<()> {
    let document = serde_json::json!({ "hash": planned.hash, "plan": planned.plan });
    let text = format!("{document:#}\n");
    let mut options = std::fs::OpenOptions::new();
    let failed = || format!("cannot write `{}`", file.display());
    let mut target = options.write(true).create_new(true).open(file).map_err(|error| Error::io(failed(), error))?;
    std::io::Write::write_all(&mut target, text.as_bytes()).and_then(|()| target.sync_all()).or_io(failed)
}

/// What a restore would do; `restore` shows it too before it begins.
pub fn screen(planned: &Planned, now: Timestamp) -> String {
    let plan = &planned.plan;
    let to = match &plan.to {
        _ if plan.in_place => format!("over `{}` itself", plan.source_environment),
        Some(folder) => format!("into {folder}"),
        None => format!("into environment `{}`", plan.target_environment),
    };
    let mut text =
        format!("restore of {} (point {}, {}) {to}\n", plan.platform, plan.point, render::time_short(plan.cut_at));
    let losses: Vec<String> = plan.steps.iter().map(|step| format!("{}: {}", step.store, step.loses)).collect();
    text.push_str(&format!("  you lose   {} ({})\n", losses.join("\n             "), render::age(plan.cut_at, now)));
    for step in &plan.steps {
        for loss in &step.named_losses {
            text.push_str(&format!("             {}: {loss}\n", step.store));
        }
    }
    let overwritten: Vec<String> = plan
        .steps
        .iter()
        .filter_map(|step| Some(format!("{}: {}", step.store, step.target.overwrites.as_ref()?)))
        .collect();
    let overwrites = if overwritten.is_empty() { "nothing".to_owned() } else { overwritten.join(", ") };
    text.push_str(&format!("  overwrites {overwrites}\n"));
    text.push_str(&fence(planned));
    text.push_str(&steps(plan));
    for warning in &plan.warnings {
        text.push_str(&format!("  note       {warning}\n"));
    }
    text
}

fn fence(planned: &Planned) -> String {
    let told = planned.plan.steps.iter().filter(|step| step.target.identity.is_some()).count();
    let stamped = planned.plan.steps.iter().filter(|step| step.target.stamp.is_some()).count();
    let stamps = if stamped == 0 { "absent".to_owned() } else { format!("{stamped} found") };
    let clear = if planned.fence.is_empty() { "clear" } else { "NOT clear" };
    let identities = render::plural(told as u64, "identity", "identities");
    let mut text = format!("  fence      {clear} · {identities} compared · stamps {stamps}\n");
    for finding in &planned.fence {
        text.push_str(&format!("             stop: {}: {}\n", finding.store, finding.what));
        text.push_str(&format!("                   {}\n", finding.hint));
    }
    text
}

fn steps(plan: &RestorePlan) -> String {
    let mut text = String::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let needs: Vec<&str> = step.needs.iter().map(|store| store.as_str()).collect();
        let needs = if needs.is_empty() { String::new() } else { format!("   after {}", needs.join(", ")) };
        let part = step.part.as_ref().map(|part| format!(" {part}")).unwrap_or_default();
        let title = if index == 0 { "steps" } else { "" };
        let what = format!("{}{part} ({})", step.store, step.driver);
        let (size, items) = (render::bytes(step.bytes), render::count(step.items));
        text.push_str(&format!("  {title:<10} {} {what:<26} {size:>10}   {items} {}{needs}\n", index + 1, step.unit));
    }
    text
}
