//! The tour's writer: a process of its own that writes to all three stores without ever resting.
//!
//! It says on standard output what it begins and what is done, with the time, one line each; the
//! tour keeps that as the log of acknowledged writes. It can be paused over HTTP, as a real
//! application would offer it, and ends when its standard input is closed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use stillpoint_core::error::{Error, IoContext, Result};

use super::platform::{self, Places, SEEDED};
use crate::app::Outcome;
use crate::exit;

/// Between two models. The stores never rest longer than this.
const PAUSE_BETWEEN: Duration = Duration::from_micros(500);

/// Writes to the scratch platform until told to stop.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Where the platform lies.
    folder: PathBuf,
}

/// Holds the writer between two models while someone asked for a pause.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    paused: bool,
    writing: bool,
}

impl Gate {
    fn enter(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.paused {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
    }

    fn leave(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).writing = false;
        self.changed.notify_all();
    }

    /// Returns once nothing is being written any more.
    fn pause(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.paused = true;
        while state.writing {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn resume(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).paused = false;
        self.changed.notify_all();
    }
}

/// Writes until standard input is closed.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let places = Places::below(&arguments.folder);
    let gate = Arc::new(Gate::default());
    let port = serve(Arc::clone(&gate))?;
    let stop = stop_at_end_of_input(Arc::clone(&gate));
    say(&format!("port {port}"))?;
    let registry = platform::open_registry(&places.registry)?;
    let mut parent = platform::head(&places)?;
    let mut model = SEEDED;
    while !stop.load(Ordering::Relaxed) {
        gate.enter();
        model += 1;
        let written = write_model(&places, &registry, model, &parent);
        gate.leave();
        parent = written?;
        std::thread::sleep(PAUSE_BETWEEN);
    }
    Outcome::with(exit::DONE, "", serde_json::Value::Null)
}

/// What is referred to comes first, what refers to it last; then the write is acknowledged.
fn write_model(places: &Places, registry: &rusqlite::Connection, model: u64, parent: &str) -> Result<String> {
    say(&format!("begun {model} {}", now_nanos()?))?;
    platform::write_object(places, model)?;
    let commit = platform::write_commit(places, model, parent)?;
    platform::insert_row(registry, model, &commit)?;
    say(&format!("done {model} {}", now_nanos()?))?;
    Ok(commit)
}

/// Nanoseconds since 1970 by the wall clock.
fn now_nanos() -> Result<u128> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map(|time| time.as_nanos()).map_err(|error| Error::internal("the clock is before 1970").source(error))
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).or_io(|| "the tour does not listen any more".to_owned())
}

fn stop_at_end_of_input(gate: Arc<Gate>) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&stop);
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        // The end of input and a broken pipe mean the same: the tour is gone.
        let _ended = std::io::stdin().read_to_end(&mut rest);
        set.store(true, Ordering::Relaxed);
        gate.resume();
    });
    stop
}

/// Answers `POST /pause` and `POST /resume` on a port of its own.
fn serve(gate: Arc<Gate>) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).or_io(|| "cannot listen on loopback".to_owned())?;
    let port = listener.local_addr().or_io(|| "cannot tell the port".to_owned())?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let gate = Arc::clone(&gate);
            // Whoever asked notices a broken answer; the writer goes on.
            std::thread::spawn(move || answer(&stream, &gate).is_ok());
        }
    });
    Ok(port)
}

fn answer(stream: &TcpStream, gate: &Gate) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let status = match request.split_whitespace().nth(1) {
        Some("/pause") => {
            gate.pause();
            "200 OK"
        }
        Some("/resume") => {
            gate.resume();
            "200 OK"
        }
        _ => "404 Not Found",
    };
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}
