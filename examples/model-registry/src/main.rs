//! `model-registry`: the application, and what a test needs around it.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use model_registry::judge::Point;
use model_registry::record::Record;
use model_registry::settings::Settings;
use model_registry::writer::Writers;
use model_registry::{Result, create, fill, hooks, judge};

/// A small registry of models over PostgreSQL, Redis, S3, git and files.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Publishes models and serves the hooks until it is stopped. Prints the hooks' address.
    Serve {
        /// The environment's settings.
        settings: PathBuf,
    },
    /// Makes the empty stores of an environment.
    Create {
        /// The environment's settings.
        settings: PathBuf,
    },
    /// Makes the empty targets of a restore: the bucket, and with --database the database.
    Targets {
        /// The copy's settings.
        settings: PathBuf,
        /// Also an empty database.
        #[arg(long)]
        database: bool,
    },
    /// Adds rows that never change.
    Fill {
        /// The environment's settings.
        settings: PathBuf,
        /// How many MB (10⁶ bytes).
        megabytes: u64,
    },
    /// Judges a restored copy by the record of what was acknowledged. Exit code 1 if an obligation is
    /// not met.
    Judge {
        /// The copy's settings; its `record` is that of the original.
        settings: PathBuf,
        /// The point: a statefile, or what `stillpoint show --json` prints.
        point: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("model-registry: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(task: Task) -> Result<bool> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    match task {
        Task::Serve { settings } => {
            let settings = Settings::load(&settings)?;
            let writers = Arc::new(Writers::start(&settings)?);
            let address = hooks::serve(&settings.listen, writers)?;
            println!("http://{address}");
            loop {
                std::thread::park();
            }
        }
        Task::Create { settings } => {
            runtime.block_on(create::create(&Settings::load(&settings)?))?;
            Ok(true)
        }
        Task::Targets { settings, database } => {
            runtime.block_on(create::create_targets(&Settings::load(&settings)?, database))?;
            Ok(true)
        }
        Task::Fill { settings, megabytes } => {
            let bytes = runtime.block_on(fill::fill(&Settings::load(&settings)?, megabytes))?;
            println!("{bytes}");
            Ok(true)
        }
        Task::Judge { settings, point } => {
            let copy = Settings::load(&settings)?;
            let text = std::fs::read_to_string(&point).map_err(|error| format!("{}: {error}", point.display()))?;
            let document = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", point.display()))?;
            let record = Record::load(&copy.record)?;
            let verdict = runtime.block_on(judge::judge(&copy, &record, &Point::of(&document)?))?;
            println!("{}", serde_json::to_string_pretty(&verdict).map_err(|error| error.to_string())?);
            Ok(verdict.violations == 0)
        }
    }
}
