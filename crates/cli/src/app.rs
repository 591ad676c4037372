//! What every command is given: where the configuration is, how to show things, how to be stopped.
//!
//! The only place of the program that writes to standard output, reads the terminal's kind or
//! installs signal handlers.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_engine::cancel::CancelToken;
use stillpoint_engine::config::{self, Config, FILE_NAME};
use stillpoint_engine::open::Session;
use stillpoint_engine::progress::{Progress, Silent};

use crate::commands::Cli;
use crate::exit::{self, Exit};
use crate::hints::Leaves;
use crate::progress;
use crate::render;

/// The variable that names the configuration when `--config` does not.
pub const CONFIG_VARIABLE: &str = "STILLPOINT_CONFIG";

/// The variable that asks for a log.
const LOG_VARIABLE: &str = "STILLPOINT_LOG";

/// What a command leaves on the screen.
#[derive(Debug)]
pub struct Outcome {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: serde_json::Value,
    /// For the shell.
    pub exit: Exit,
    /// Whether this is an error screen, which goes to standard error.
    failed: bool,
}

impl Outcome {
    /// A command that did what was asked.
    pub fn done(text: impl Into<String>, json: impl serde::Serialize) -> Result<Self> {
        Self::with(exit::DONE, text, json)
    }

    /// A command that came to its end with a negative answer, such as a failed check.
    pub fn with(exit: Exit, text: impl Into<String>, json: impl serde::Serialize) -> Result<Self> {
        let json =
            serde_json::to_value(json).map_err(|error| Error::internal("a report does not serialize").source(error))?;
        Ok(Self { text: text.into(), json, exit, failed: false })
    }

    /// A command that failed.
    pub fn failed(error: &Error, leaves: Leaves) -> Self {
        let (text, exit) = render::error(error, leaves);
        Self { text, json: render::error_json(error, leaves), exit, failed: true }
    }
}

/// The surroundings of one command.
pub struct App {
    config: Option<PathBuf>,
    json: bool,
    quiet: bool,
    /// Set by the first signal; shared by everything that works for this command.
    pub cancel: CancelToken,
    /// The same request, for what works on threads without a runtime.
    pub context: Context,
}

impl App {
    /// Reads the global options and begins to listen for signals.
    pub fn new(arguments: &Cli) -> Self {
        let app = Self {
            config: arguments.config.clone(),
            json: arguments.json,
            quiet: arguments.quiet,
            cancel: CancelToken::default(),
            context: Context::default(),
        };
        log_if_asked();
        app.listen();
        app
    }

    /// The first SIGINT or SIGTERM asks for an orderly end; the second ends at once, and leaves
    /// the rest to the journal and the watchdog.
    fn listen(&self) {
        let second = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            let code = i32::from(exit::CANCELLED.code);
            let armed = signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&second));
            let arms = signal_hook::flag::register(signal, Arc::clone(&second));
            if armed.is_err() || arms.is_err() {
                tracing::warn!(signal, "cannot listen for the signal");
            }
        }
        let (cancel, context) = (self.cancel.clone(), self.context.clone());
        let watch = move || {
            while !second.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            cancel.cancel();
            context.cancel();
        };
        if std::thread::Builder::new().name("signals".to_owned()).spawn(watch).is_err() {
            tracing::warn!("cannot start the thread that listens for signals");
        }
    }

    /// Where the configuration is: `--config`, else `STILLPOINT_CONFIG`, else `platform.yaml` here.
    pub fn config_path(&self) -> PathBuf {
        let variable = || std::env::var_os(CONFIG_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        self.config.clone().or_else(variable).unwrap_or_else(|| PathBuf::from(FILE_NAME))
    }

    /// Reads the configuration.
    pub fn config(&self) -> Result<Config> {
        config::load(&self.config_path())
    }

    /// Reads the configuration and opens its bucket.
    pub fn session(&self) -> Result<Session> {
        Session::open(&self.config()?)
    }

    /// Runs a future on a runtime of its own.
    pub fn block_on<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .or_io(|| "cannot start the runtime".to_owned())?;
        let result = runtime.block_on(future);
        // What is still blocked belongs to a run that was stopped; the journal knows of it.
        runtime.shutdown_background();
        result
    }

    /// Shows a run: bars on a terminal, plain lines otherwise, nothing with `--json` or `--quiet`.
    pub fn progress(&self) -> Arc<dyn Progress> {
        if self.json || self.quiet {
            Arc::new(Silent)
        } else if io::stderr().is_terminal() {
            Arc::new(progress::Bars::new())
        } else {
            Arc::new(progress::Lines::new())
        }
    }

    /// Does work that counts in this command's context, under a bar if there is a terminal.
    pub fn watching<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        if self.json || self.quiet || !io::stderr().is_terminal() {
            return work();
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| progress::follow(name, &self.context, &done));
            let result = work();
            done.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Prints a line about what begins, where progress is shown.
    pub fn note(&self, line: &str) {
        if !self.json && !self.quiet && writeln!(io::stderr().lock(), "{line}").is_err() {
            tracing::debug!("standard error is gone");
        }
    }

    /// Whether a person can be asked something.
    pub fn can_ask(&self) -> bool {
        !self.json && io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Asks one line of whoever sits there.
    pub fn ask(&self, question: &str) -> Result<String> {
        if !self.can_ask() {
            return Err(Error::new(Kind::Config, "there is no terminal to ask on"));
        }
        let mut error = io::stderr().lock();
        write!(error, "{question} ").and_then(|()| error.flush()).or_io(|| "cannot ask".to_owned())?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).or_io(|| "cannot read the answer".to_owned())?;
        Ok(answer.trim().to_owned())
    }

    /// Prints what came of a command: JSON or text, errors to standard error.
    pub fn print(&self, outcome: &Outcome) {
        let text = if self.json { format!("{:#}\n", outcome.json) } else { outcome.text.clone() };
        let written = if outcome.failed && !self.json {
            io::stderr().lock().write_all(text.as_bytes())
        } else {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        };
        // A reader that went away (`| head`) is no failure of the command.
        if let Err(error) = written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            tracing::error!(%error, "cannot print");
        }
    }
}

/// Logs to standard error as `STILLPOINT_LOG` asks, e.g. `debug`; not at all without it.
fn log_if_asked() {
    let Ok(filter) = std::env::var(LOG_VARIABLE) else { return };
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let installed = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).try_init();
    if installed.is_err() {
        tracing::warn!("something logs already");
    }
}

/// The watchdog's exit code; what went wrong goes to standard error, which the engine keeps.
pub fn end_watchdog(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let (text, exit) = render::error(&error, Leaves::Nothing);
            // There is nobody left to tell if standard error is gone too; the code still says it.
            let _told = io::stderr().lock().write_all(text.as_bytes());
            ExitCode::from(exit.code)
        }
    }
}
