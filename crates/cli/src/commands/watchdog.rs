//! `stillpoint __watchdog`: listed here so that the help and the parser know the word.
//!
//! `main` recognises it before anything else happens in the process, because the watchdog must not
//! share signal handlers or a runtime with the rest of the program.

use clap::Args;
use stillpoint_core::Result;
use stillpoint_core::error::Error;

use crate::app::Outcome;

/// Undoes a pause when its parent dies.
#[derive(Debug, Args)]
pub struct Arguments {}

/// Never reached: `main` was faster.
pub fn run() -> Result<Outcome> {
    Err(Error::internal("the watchdog was not started as the first word"))
}
