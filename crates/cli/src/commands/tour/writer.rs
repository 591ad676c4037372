//! The tour's writer.

use clap::Args;
use stillpoint_core::{Error, Result};

use crate::app::Outcome;

/// Writes.
#[derive(Debug, Args)]
pub struct Arguments {}

/// Runs the verb.
pub fn run(_arguments: &Arguments) -> Result<Outcome> {
    Err(Error::internal("not built yet"))
}
