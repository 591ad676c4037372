//! The workspace's own tasks: `cargo xtask tidy | gen | rig | test | bench | example | new-driver`.

#![allow(clippy::print_stdout, clippy::print_stderr, missing_docs)]

mod bench;
mod example;
mod generate;
mod new_driver;
mod programs;
mod rig;
mod soak;
mod test;
mod tidy;

use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The workspace's own tasks")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Checks the rules of the house that no compiler checks.
    Tidy,
    /// Writes what is generated from the code.
    Gen,
    /// Starts and stops throw-away real servers.
    #[command(subcommand)]
    Rig(rig::RigCommand),
    /// Runs every test, with what it needs, and says what it skipped and why.
    Test(test::TestArgs),
    /// Measures beside real peers.
    Bench(bench::BenchArgs),
    /// Brings the example platform up on the rigs, with its application writing, or takes it down.
    Example(example::ExampleArgs),
    /// Makes the folder, the registry line and the rig of a new driver.
    NewDriver {
        /// The driver's name: lower-case letters, digits and `_`.
        name: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(root) = Path::new(env!("CARGO_MANIFEST_DIR")).parent() else {
        eprintln!("xtask: it does not lie in a workspace");
        return ExitCode::FAILURE;
    };
    let done = match &arguments.task {
        Task::Tidy => tidy::run(root),
        Task::Gen => generate::run(root).map(|()| true),
        Task::Rig(command) => rig::run(root, command).map(|()| true),
        Task::Test(args) => test::run(root, args),
        Task::Bench(args) => bench::run(root, args).map(|()| true),
        Task::Example(args) => example::run(root, args).map(|()| true),
        Task::NewDriver { name } => new_driver::run(root, name).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
