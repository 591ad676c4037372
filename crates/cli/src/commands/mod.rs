//! One file per verb: its arguments, its call into the engine, its screen. No verb knows another.

mod apply;
mod backup;
mod check;
mod completion;
mod copy;
mod destination;
mod driver;
mod exit_codes;
mod export;
mod forget;
mod init;
mod key;
mod list;
mod part;
mod plan;
mod prune;
mod restore;
mod show;
mod tour;
mod verify;
mod watchdog;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use stillpoint_core::Result;

use crate::app::{App, Outcome};
use crate::hints::Leaves;

/// One consistent recovery point across every stateful store of a platform.
///
/// Takes a point of databases, objects, repositories and files that belong together, proves that
/// they do, and brings them back somewhere else.
#[derive(Debug, Parser)]
#[command(name = "stillpoint", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// The configuration; else STILLPOINT_CONFIG, else platform.yaml in this folder.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print one JSON document instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no progress.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  stillpoint tour                       see it work on a scratch platform, in seconds
  stillpoint init /srv/app              look around, write platform.yaml, create the bucket
  stillpoint backup                     make a recovery point
  stillpoint list                       what there is
  stillpoint plan --into staging        what a restore would do, and lose
  stillpoint restore latest --to /tmp/r bring it back, beside what is running

Exit codes: stillpoint help exit-codes";

#[derive(Debug, Subcommand)]
enum Verb {
    Tour(tour::Arguments),
    Init(init::Arguments),
    Backup(backup::Arguments),
    List(list::Arguments),
    Show(show::Arguments),
    Verify(verify::Arguments),
    Plan(plan::Arguments),
    Apply(apply::Arguments),
    Restore(restore::Arguments),
    Export(export::Arguments),
    Forget(forget::Arguments),
    Prune(prune::Arguments),
    Check(check::Arguments),
    Copy(copy::Arguments),
    Key(key::Arguments),
    Driver(driver::Arguments),
    Completion(completion::Arguments),
    #[command(hide = true)]
    ExitCodes(exit_codes::Arguments),
    #[command(name = "__watchdog", hide = true)]
    Watchdog(watchdog::Arguments),
    #[command(name = "__tour-writer", hide = true)]
    TourWriter(tour::writer::Arguments),
}

/// Runs the verb that was asked for; never fails, errors become their screen.
pub fn run(arguments: &Cli, app: &App) -> Outcome {
    let (result, leaves) = dispatch(&arguments.verb, app);
    result.unwrap_or_else(|error| Outcome::failed(&error, leaves))
}

fn dispatch(verb: &Verb, app: &App) -> (Result<Outcome>, Leaves) {
    match verb {
        Verb::Tour(arguments) => (tour::run(arguments, app), Leaves::Nothing),
        Verb::Init(arguments) => (init::run(arguments, app), Leaves::Steps),
        Verb::Backup(arguments) => (backup::run(arguments, app), Leaves::NoPoint),
        Verb::List(arguments) => (list::run(arguments, app), Leaves::Nothing),
        Verb::Show(arguments) => (show::run(arguments, app), Leaves::Nothing),
        Verb::Verify(arguments) => (verify::run(arguments, app), Leaves::Nothing),
        Verb::Plan(arguments) => (plan::run(arguments, app), Leaves::Nothing),
        Verb::Apply(arguments) => (apply::run(arguments, app), Leaves::Target),
        Verb::Restore(arguments) => (restore::run(arguments, app), Leaves::Target),
        Verb::Export(arguments) => (export::run(arguments, app), Leaves::Target),
        Verb::Forget(arguments) => (forget::run(arguments, app), Leaves::Steps),
        Verb::Prune(arguments) => (prune::run(arguments, app), Leaves::Steps),
        Verb::Check(arguments) => (check::run(arguments, app), Leaves::Nothing),
        Verb::Copy(arguments) => (copy::run(arguments, app), Leaves::Steps),
        Verb::Key(arguments) => (key::run(arguments, app), Leaves::Steps),
        Verb::Driver(arguments) => (driver::run(arguments, app), Leaves::Nothing),
        Verb::Completion(arguments) => (completion::run(arguments), Leaves::Nothing),
        Verb::ExitCodes(_) => (exit_codes::run(), Leaves::Nothing),
        Verb::Watchdog(_) => (watchdog::run(), Leaves::Nothing),
        Verb::TourWriter(arguments) => (tour::writer::run(arguments), Leaves::Nothing),
    }
}
