//! `stillpoint apply`

use clap::Args;
use stillpoint_core::{Error, Result};

use crate::app::{App, Outcome};

/// Comes with the way back.
#[derive(Debug, Args)]
pub struct Arguments {}

/// Runs the verb.
pub fn run(_arguments: &Arguments, _app: &App) -> Result<Outcome> {
    Err(Error::internal("not built yet"))
}
