//! References whose edges a program names: `query: command:program arguments`.
//!
//! For stores whose driver speaks no language: the engine runs the program, without a shell, in the
//! folder it runs in itself, and reads `referent<TAB>owner` lines from its standard output; the owner
//! may be left out. Memory does not grow with the output. The program must look at the view that it
//! is told of, in `STILLPOINT_STORE`, `STILLPOINT_ENVIRONMENT` and, while a point is sealed,
//! `STILLPOINT_POSITION`; a program that looks at the live store sees what was written after the cut.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stillpoint_core::driver::{Context, Edge, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use crate::pause::{kill_group, shown};
use crate::secrets;

/// A longer line is a mistake of the program, not a referent.
const LINE_BYTES_MAX: u64 = 2 << 20;
/// Bytes of its standard error that are kept.
const SAID_BYTES_MAX: usize = 800;
/// How often it is seen whether someone asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A program may run for so long. A point that is being sealed holds pins until it ends: snapshots of databases
/// that nobody may clean up behind.
const RUN_TIME_MAX: Duration = Duration::from_secs(3600);

/// What the query begins with.
const PREFIX: &str = "command:";

/// The command line of a query, if the query is one.
pub(crate) fn line_of(query: &str) -> Option<&str> {
    query.trim_start().strip_prefix(PREFIX)
}

/// What the program is told of the view it should look at.
pub(super) struct View<'a> {
    pub(super) store: &'a str,
    pub(super) environment: &'a str,
    pub(super) pin: Option<&'a Pin>,
}

/// Runs the program and visits the edges that it prints.
pub(super) fn edges(
    line: &str,
    view: &View<'_>,
    context: &Context,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let words = secrets::split(line)?;
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::new(Kind::Config, "the query names no program")
            .hint("write `command:program arguments`; it prints `referent<TAB>owner` lines"));
    };
    let mut command = Command::new(program);
    command.args(arguments).env("STILLPOINT_STORE", view.store).env("STILLPOINT_ENVIRONMENT", view.environment);
    match view.pin {
        Some(pin) => command.env("STILLPOINT_POSITION", &pin.position.text),
        None => command.env_remove("STILLPOINT_POSITION"),
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().map_err(|error| {
        Error::io(format!("cannot run `{program}` for a reference"), error)
            .hint("the program is run without a shell; name it with its full path")
    })?;
    read(child, program, RUN_TIME_MAX, context, visit)
}

fn read(
    mut child: Child,
    program: &str,
    time_max: Duration,
    context: &Context,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let pipes = child.stdout.take().zip(child.stderr.take());
    let (stdout, stderr) = pipes.ok_or_else(|| Error::internal("a piped child has no output"))?;
    let (ended, is_late, group) = (AtomicBool::new(false), AtomicBool::new(false), child.id());
    let began = Instant::now();
    let (lines, said, status) = std::thread::scope(|scope| {
        // A program that is silent must not keep a run that someone stopped, nor one that closed its output and
        // lives on: it is watched until it has ended.
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                is_late.store(began.elapsed() >= time_max, Ordering::Relaxed);
                if context.is_cancelled() || is_late.load(Ordering::Relaxed) {
                    return kill_group(group);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        let said = scope.spawn(move || tail(stderr));
        let lines = visit_lines(BufReader::new(stdout), program, visit);
        if lines.is_err() {
            kill_group(group);
        }
        let said = said.join().unwrap_or_default();
        let status = child.wait();
        ended.store(true, Ordering::Relaxed);
        (lines, said, status)
    });
    let status = status.or_io(|| format!("cannot wait for `{program}`"))?;
    if is_late.into_inner() {
        let seconds = time_max.as_secs();
        return Err(Error::new(Kind::TimedOut, format!("`{program}` did not end within {seconds} s and was stopped"))
            .hint("what it printed is not used; run it by hand to see why it takes so long"));
    }
    context.check()?;
    lines?;
    if status.success() {
        return Ok(());
    }
    let error = Error::new(Kind::Io, format!("`{program}` failed: {status}"))
        .hint("what it printed is not used; run it by hand to see why it fails");
    let said = shown(&said);
    Err(if said.is_empty() { error } else { error.context("saying", format!("\"{said}\"")) })
}

fn visit_lines(
    mut output: impl BufRead,
    program: &str,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = output.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        if read.or_io(|| format!("cannot read what `{program}` prints"))? == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() as u64 == LINE_BYTES_MAX {
            let message = format!("`{program}` prints a line of more than {LINE_BYTES_MAX} bytes");
            return Err(Error::new(Kind::Corrupt, message).hint("it must print one `referent<TAB>owner` a line"));
        }
        if line.is_empty() {
            continue;
        }
        let tab = line.iter().position(|byte| *byte == b'\t');
        let owner = tab.map(|at| String::from_utf8_lossy(&line[at + 1..]).into_owned()).unwrap_or_default();
        line.truncate(tab.unwrap_or(line.len()));
        visit(Edge { referent: line.clone(), owner })?;
    }
}

/// The last bytes of a stream, which is read to its end, so that the program never waits for us.
fn tail(mut stream: impl Read) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..count]);
        if kept.len() > 2 * SAID_BYTES_MAX {
            kept.drain(..kept.len() - SAID_BYTES_MAX);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str, context: &Context) -> Result<Vec<(Vec<u8>, String)>> {
        let mut found = Vec::new();
        let view = View { store: "meta", environment: "staging", pin: None };
        edges(line, &view, context, &mut |edge| {
            found.push((edge.referent, edge.owner));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn lines_become_edges() {
        let edges = run("printf 'models/1\\trow 1\\n\\nmodels/2\\nmodels/3\\ta\\tb'", &Context::default());
        let expected = [("models/1", "row 1"), ("models/2", ""), ("models/3", "a\tb")];
        let expected = expected.map(|(referent, owner)| (referent.as_bytes().to_vec(), owner.to_owned()));
        assert_eq!(edges.expect("runs"), expected);
        let told =
            run("sh -c 'echo $STILLPOINT_STORE $STILLPOINT_ENVIRONMENT$STILLPOINT_POSITION'", &Context::default());
        assert_eq!(told.expect("runs")[0].0, b"meta staging");
        assert_eq!((line_of("command:a b"), line_of("SELECT 1")), (Some("a b"), None));
    }

    #[test]
    fn a_program_that_fails_fails_the_reference_whatever_it_printed() {
        let error =
            run("sh -c 'echo models/1; echo no such host >&2; exit 3'", &Context::default()).expect_err("exit 3");
        assert_eq!(error.to_string(), "`sh` failed: exit status: 3, saying \"no such host\"");
        let error = run("/nowhere/edges", &Context::default()).expect_err("no such program");
        assert_eq!(error.kind(), Kind::NotFound);
        assert_eq!(run("", &Context::default()).expect_err("no program").kind(), Kind::Config);
        let error = run("head -c 3000000 /dev/zero", &Context::default()).expect_err("one endless line");
        assert_eq!(error.kind(), Kind::Corrupt);
    }

    #[test]
    fn a_silent_program_ends_when_someone_asks_to_stop() {
        let context = Context::default();
        let stopping = context.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            stopping.cancel();
        });
        let began = std::time::Instant::now();
        assert_eq!(run("sh -c 'sleep 60; echo a'", &context).expect_err("stopped").kind(), Kind::Cancelled);
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_closed_its_output_and_lives_on_is_stopped() {
        let child = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.process_group(0).spawn().expect("runs")
        };
        let began = Instant::now();
        let hanging = child("exec >&- 2>&-; sleep 60");
        let error = read(hanging, "sh", Duration::from_millis(300), &Context::default(), &mut |_| Ok(()));
        assert!(error.expect_err("late").message().contains("did not end within"));
        let context = Context::default();
        let stopping = context.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            stopping.cancel();
        });
        let hanging = child("exec >&- 2>&-; sleep 60");
        let error = read(hanging, "sh", RUN_TIME_MAX, &context, &mut |_| Ok(())).expect_err("stopped");
        assert_eq!(error.kind(), Kind::Cancelled);
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
