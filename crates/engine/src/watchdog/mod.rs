//! The process that lets writers go when the engine cannot.
//!
//! A process of its own, because whatever kills the engine must not kill it: it is its own session,
//! ignores the terminal's signals, and learns of the engine's end from the pipe between them, which
//! the kernel closes even after SIGKILL. What it must undo, secrets included, comes over that pipe;
//! nothing is in its arguments or on disk.
//!
//! It knows nothing of runs, points or buckets. `parent` is the engine's side, `child` the other.
//!
//! The talk, one JSON line each: the engine sends [`Instructions`], the child answers `ready`; then
//! any number of [`Command`]s, where `Arm` is answered by `armed`. A closed pipe while armed means:
//! undo now. So does the deadline. A child that undid says `fired` if anyone still listens.

mod child;
mod parent;

pub use child::main;
pub use parent::{Fired, Start, Watchdog, WatchdogProgram};

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, IoContext, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::Store;

use crate::pause::Act;

/// The hidden sub-command under which the program is its own watchdog.
pub const SUBCOMMAND: &str = "__watchdog";

/// Waits until no watchdog works on `report` any more; `false` if one still does after `within`.
///
/// A new run must not pause anything while an older run's watchdog may still let writers go.
pub fn wait_until_gone(report: &Path, within: Duration) -> Result<bool> {
    let file = match File::open(report) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        other => other.or_io(|| format!("cannot open `{}`", report.display()))?,
    };
    let began = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < within => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(Error::io(format!("cannot lock `{}`", report.display()), error.into())),
        }
    }
}

/// Everything the child needs, sent once over its standard input.
#[derive(Clone, Serialize, Deserialize)]
struct Instructions {
    /// The run, for the report.
    run: String,
    /// What lets writers go, in the order of the pause steps; undone from the last to the first.
    undo: Vec<Act>,
    /// Stores that `undo` speaks to.
    databases: BTreeMap<StoreName, Store>,
    /// Secrets that opening those stores asked for, by reference.
    secrets: BTreeMap<String, String>,
    /// Where to write, for people, what was done. Appended to.
    report: PathBuf,
}

/// What the engine says while it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Command {
    /// Writers are about to be held back: undo after this many milliseconds at the latest.
    Arm {
        /// From now.
        deadline_millis: u64,
    },
    /// A pause command runs in this process group; it must be stopped before an undo.
    Group {
        /// The group, or `None` once it ended.
        id: Option<u32>,
    },
    /// Writers run again. Nothing is to be undone.
    Disarm,
}
