//! Chaos for processes: kill a child at a moment that nobody chose.
//!
//! Only ever touches the child it started itself.

use std::io;
use std::ops::Range;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How a child ended.
#[derive(Debug)]
pub enum Ending {
    /// It was killed after this long.
    Killed(Duration),
    /// It ended by itself before its time came.
    Exited(ExitStatus),
}

/// Starts `command` and kills it (SIGKILL) at a random moment within `after`.
pub fn kill_at_random(command: &mut Command, after: Range<Duration>) -> io::Result<Ending> {
    let micros = fastrand::u64(after.start.as_micros() as u64..after.end.as_micros() as u64);
    kill_after(command, Duration::from_micros(micros))
}

/// Starts `command` and kills it (SIGKILL) after `life`.
pub fn kill_after(command: &mut Command, life: Duration) -> io::Result<Ending> {
    let begun = Instant::now();
    let mut child = command.spawn()?;
    kill_when(&mut child, || begun.elapsed() >= life)
}

/// Kills `child` (SIGKILL) as soon as `when` says so, asked about every half millisecond.
pub fn kill_when(child: &mut Child, mut when: impl FnMut() -> bool) -> io::Result<Ending> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ending::Exited(status));
        }
        if when() {
            child.kill()?;
            child.wait()?;
            return Ok(Ending::Killed(begun.elapsed()));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Stops `child` (SIGSTOP): it keeps what it has and does nothing.
pub fn suspend(child: &Child) -> io::Result<()> {
    signal(child, Signal::STOP)
}

/// Lets a stopped `child` go on.
pub fn wake(child: &Child) -> io::Result<()> {
    signal(child, Signal::CONT)
}

/// Asks `child` to stop in order, as Ctrl-C does.
pub fn interrupt(child: &Child) -> io::Result<()> {
    signal(child, Signal::INT)
}

fn signal(child: &Child, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    kill_process(pid.ok_or_else(|| io::Error::other("the child has no process id"))?, signal)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_killed_in_time_or_was_faster() {
        let mut long = Command::new("sleep");
        let ending =
            kill_at_random(long.arg("60"), Duration::from_millis(1)..Duration::from_millis(20)).expect("sleep");
        assert!(matches!(ending, Ending::Killed(_)));
        let ending = kill_after(&mut Command::new("true"), Duration::from_secs(60)).expect("true");
        assert!(matches!(ending, Ending::Exited(status) if status.success()));
    }
}
