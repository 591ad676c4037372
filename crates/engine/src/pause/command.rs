//! Pause steps that run a program, without a shell.
//!
//! The program gets no input; the tail of what it prints is kept for the error. It runs in a process
//! group of its own, so that Ctrl-C at the terminal does not reach it and a watchdog can stop all
//! of it.

use std::process::Stdio;

use stillpoint_core::error::{Error, Kind, Result};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::{Act, GroupWatcher, shown};

pub(super) fn checked(words: &[String]) -> Result<Act> {
    match words.first() {
        Some(program) if !program.is_empty() => Ok(Act::Command { words: words.to_vec() }),
        _ => Err(Error::new(Kind::Config, "the command names no program")
            .hint("write program and arguments as a list: [\"systemctl\", \"stop\", \"app\"]")),
    }
}

/// Kills the group when dropped, unless the program ended before: a command that ran out of time
/// must not act later.
struct Group<'a> {
    id: Option<u32>,
    watcher: GroupWatcher<'a>,
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            kill_group(id);
        }
        (self.watcher)(None);
    }
}

/// Kills a process group. One that is gone is fine.
pub(crate) fn kill_group(id: u32) {
    let Some(pid) = i32::try_from(id).ok().and_then(rustix::process::Pid::from_raw) else { return };
    if let Err(error) = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(group = id, %error, "a pause command cannot be stopped");
    }
}

pub(super) async fn run(words: &[String], watcher: GroupWatcher<'_>) -> Result<()> {
    let (program, arguments) = words.split_first().ok_or_else(|| Error::internal("an empty command got through"))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            Error::io(format!("cannot run `{program}`"), error)
                .hint("the program is run without a shell; name it with its full path")
        })?;
    let mut group = Group { id: child.id(), watcher };
    watcher(group.id);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // A grandchild may keep the pipes open for ever; the program's own end is what counts.
    let reading = tokio::spawn(async move { tokio::join!(tail(stdout), tail(stderr)) });
    let status = child.wait().await.map_err(|error| Error::io(format!("cannot wait for `{program}`"), error))?;
    group.id = None;
    if status.success() {
        reading.abort();
        return Ok(());
    }
    let printed = tokio::time::timeout(std::time::Duration::from_millis(100), reading).await;
    let (stdout, stderr) = match printed {
        Ok(Ok(tails)) => tails,
        _ => (Vec::new(), Vec::new()),
    };
    let said = shown(if stderr.is_empty() { &stdout } else { &stderr });
    let error = Error::new(Kind::Io, format!("`{}` failed: {status}", words.join(" ")));
    Err(if said.is_empty() { error } else { error.context("saying", format!("\"{said}\"")) })
}

/// The last bytes of a stream, so that memory stays bounded whatever is printed.
async fn tail(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else { return kept };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        if kept.len() > 2 * super::SHOWN_BYTES_MAX {
            kept.drain(..kept.len() - super::SHOWN_BYTES_MAX);
        }
    }
    kept
}
