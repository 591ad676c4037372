//! `stillpoint restore`

use std::collections::BTreeSet;

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_engine::open::Session;
use stillpoint_engine::ops::destination::Destination;
use stillpoint_engine::ops::plan::{self, PlanRequest};
use stillpoint_engine::ops::restore;

use super::{apply, destination::Options, plan as plan_screen};
use crate::app::{App, Outcome};

/// Bring a point back, beside what is running: plan and apply in one.
///
/// Never writes over the stores that the point was taken from, unless --in-place and the identity
/// of each, typed, say so. Everything that is restored gets the stamp of its new environment.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint restore latest --to /tmp/r        each store in /tmp/r/STORE
  stillpoint restore k3f9 --into staging       as `targets` in platform.yaml describes it
  stillpoint restore --store models --part models:churn/7 --to /tmp/r
  stillpoint restore --store meta --in-place --confirm /srv/meta.db")]
pub struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
}

/// Runs the verb. Exit code 7 if what was restored is not proven.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let session = app.session()?;
    let mut request = arguments.options.request(session.config())?;
    if arguments.options.overwrites() && app.can_ask() {
        confirm(arguments, &session, &mut request, app)?;
    }
    let report = app.block_on(restore::run(&session, &request, app.progress(), &app.cancel))?;
    apply::outcome(&report)
}

/// Shows what would happen, and has identities typed that are to be replaced.
fn confirm(arguments: &Arguments, session: &Session, request: &mut PlanRequest, app: &App) -> Result<()> {
    let planned = app.block_on(plan::run(session, request, &app.cancel))?;
    app.note(&plan_screen::screen(&planned, Timestamp::now()));
    let refused = || Error::new(Kind::Cancelled, "not confirmed");
    if let Destination::InPlace { typed } = &mut request.destination {
        let wanted: BTreeSet<String> = planned
            .plan
            .steps
            .iter()
            .filter_map(|step| step.target.identity.as_ref().map(|identity| identity.typed().to_owned()))
            .filter(|identity| !typed.contains(identity))
            .collect();
        for identity in wanted {
            let answer = app.ask(&format!("type `{identity}` to replace it:"))?;
            if answer != identity {
                return Err(refused());
            }
            typed.push(answer);
        }
    } else if !arguments.yes && app.ask("overwrite what is there? [y/N]")?.to_lowercase() != "y" {
        return Err(refused());
    }
    Ok(())
}
