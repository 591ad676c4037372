//! The engine's side of the watchdog.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{RunId, StoreName};
use stillpoint_core::platform::Store;
use tokio::sync::watch;

use super::{Command, Instructions, SUBCOMMAND};
use crate::pause::Act;

/// How long the child may take to say that it is ready, or armed.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// The program that serves as the watchdog.
#[derive(Debug, Clone)]
pub struct WatchdogProgram {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Added to its environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl WatchdogProgram {
    /// This very program, under its hidden sub-command.
    pub fn own() -> Result<Self> {
        // Through the kernel's link, so that an upgrade that replaces the file does not matter.
        let link = PathBuf::from("/proc/self/exe");
        let program = if link.exists() {
            link
        } else {
            std::env::current_exe().or_io(|| "cannot find this program's own file".to_owned())?
        };
        Ok(Self { program, arguments: vec![SUBCOMMAND.into()], environment: Vec::new() })
    }
}

/// Set once the watchdog has let writers go on its own.
pub type Fired = watch::Receiver<bool>;

/// A watchdog that was started. Dropping it closes the pipe, which makes an armed one undo.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    pipe: Arc<Mutex<Option<ChildStdin>>>,
    answers: Mutex<Receiver<String>>,
    fired: Fired,
}

/// What a watchdog is started with.
pub struct Start<'a> {
    /// The run.
    pub run: &'a RunId,
    /// The undo of each pause step, in the order of the steps.
    pub undo: Vec<Act>,
    /// Stores that the undo speaks to.
    pub databases: BTreeMap<StoreName, Store>,
    /// Secrets for opening them, by reference.
    pub secrets: BTreeMap<String, String>,
    /// Where the child writes what it did.
    pub report: PathBuf,
}

impl Watchdog {
    /// Starts the process and hands over what to undo. Returns when it has understood. Blocks.
    pub fn start(program: &WatchdogProgram, start: Start<'_>) -> Result<Self> {
        let mut child = std::process::Command::new(&program.program)
            .args(&program.arguments)
            .envs(program.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| Error::io("cannot start the watchdog process", error).hint("writers were not paused"))?;
        let missing = || Error::internal("a piped child has no pipe");
        let pipe = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let (answers, fired) = listen(output)?;
        let watchdog = Self { child, pipe: Arc::new(Mutex::new(Some(pipe))), answers: Mutex::new(answers), fired };
        let Start { run, undo, databases, secrets, report } = start;
        let instructions = Instructions { run: run.to_string(), undo, databases, secrets, report };
        watchdog.send(&instructions)?;
        watchdog.expect("ready")?;
        Ok(watchdog)
    }

    /// Tells the child that writers are about to be held back. Blocks until it has understood.
    pub fn arm(&self, deadline: Duration) -> Result<()> {
        self.send(&Command::Arm { deadline_millis: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX) })?;
        self.expect("armed")
    }

    /// A function that tells the child of the process group of a running pause command.
    pub fn group_watcher(&self) -> impl Fn(Option<u32>) + Send + Sync + 'static {
        let pipe = Arc::clone(&self.pipe);
        move |id| {
            // A dead watchdog is noticed by whoever arms or disarms it.
            if let Err(error) = send_to(&pipe, &Command::Group { id }) {
                tracing::debug!(%error, "the watchdog does not listen");
            }
        }
    }

    /// The child's process id.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Whether the child has let writers go on its own.
    pub fn fired(&self) -> Fired {
        self.fired.clone()
    }

    /// Ends the child without an undo. Call it only when writers run again. Blocks.
    pub fn disarm(mut self) -> Result<()> {
        let told = self.send(&Command::Disarm);
        // An error here leaves the pipe closed, and the child undoes once more: harmless.
        drop(self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take());
        let status = self.child.wait().or_io(|| "cannot wait for the watchdog process".to_owned())?;
        if told.is_err() || !status.success() {
            return Err(Error::new(Kind::Io, format!("the watchdog process had died before its time: {status}"))
                .hint("writers run again; see what kills processes on this machine"));
        }
        Ok(())
    }

    fn send(&self, message: &impl serde::Serialize) -> Result<()> {
        send_to(&self.pipe, message)
    }

    fn expect(&self, answer: &str) -> Result<()> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match answers.recv_timeout(ANSWER_WITHIN) {
                Ok(line) if line == answer => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::new(Kind::TimedOut, format!("the watchdog process is not {answer} in time")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(Kind::Io, format!("the watchdog process ended before it was {answer}")));
                }
            }
        }
    }
}

impl Drop for Watchdog {
    /// Closes the pipe, whoever else still knows it: an armed child undoes now.
    fn drop(&mut self) {
        drop(self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn send_to(pipe: &Mutex<Option<ChildStdin>>, message: &impl serde::Serialize) -> Result<()> {
    let mut line =
        serde_json::to_vec(message).map_err(|e| Error::internal("a watchdog message has no JSON").source(e))?;
    line.push(b'\n');
    let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
    let pipe = pipe.as_mut().ok_or_else(|| Error::internal("the watchdog was told something after its end"))?;
    pipe.write_all(&line).or_io(|| "cannot talk to the watchdog process".to_owned())
}

/// Reads the child's lines on a thread of its own, so that waiting for one can be bounded.
fn listen(output: std::process::ChildStdout) -> Result<(Receiver<String>, Fired)> {
    let (sender, answers) = channel();
    let (report, fired) = watch::channel(false);
    std::thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                if line == "fired" {
                    report.send_replace(true);
                }
                if sender.send(line).is_err() {
                    return;
                }
            }
        })
        .map_err(|error| Error::io("cannot start the thread that listens to the watchdog", error))?;
    Ok((answers, fired))
}
