//! The `stillpoint` program: parses the command line, runs one verb, prints what came of it.

mod app;
mod commands;
mod exit;
mod hints;
mod progress;
mod render;

use std::process::ExitCode;

use clap::Parser;
use stillpoint_engine::watchdog;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == watchdog::SUBCOMMAND) {
        return app::end_watchdog(watchdog::main());
    }
    // A usage error prints and exits here, with code 2.
    let arguments = commands::Cli::parse();
    let app = app::App::new(&arguments);
    let outcome = commands::run(&arguments, &app);
    app.print(&outcome);
    ExitCode::from(outcome.exit.code)
}
