//! `stillpoint completion`

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use stillpoint_core::Result;

use super::Cli;
use crate::app::Outcome;

/// Print the completion script of a shell.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint completion bash > /etc/bash_completion.d/stillpoint
  stillpoint completion zsh  > \"${fpath[1]}/_stillpoint\"
  stillpoint completion fish > ~/.config/fish/completions/stillpoint.fish")]
pub struct Arguments {
    /// Which shell.
    shell: Shell,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "stillpoint", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    Outcome::done(script.clone(), serde_json::json!({ "shell": arguments.shell.to_string(), "script": script }))
}
