//! The hooks by which others hold the writers back and look at them: HTTP/1.1, one request a
//! connection, on loopback.
//!
//! `POST /pause` answers when nothing is in flight; `POST /resume` lets writers go; `GET /health`
//! and `GET /oracle` say how things stand.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::writer::Writers;
use crate::{Attempted, Result};

/// How long a client may take to send its request.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// Lines of a request's head at most.
const HEAD_LINES_MAX: usize = 100;

/// Serves the hooks on threads of their own, and returns where.
pub fn serve(listen: &str, writers: Arc<Writers>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(listen).attempted(&format!("listen on {listen}"))?;
    let address = listener.local_addr().attempted("tell the port")?;
    let accept = move || {
        for stream in listener.incoming().flatten() {
            let writers = Arc::clone(&writers);
            std::thread::spawn(move || {
                // A client that hangs up has no use for the error.
                drop(answer(&stream, &writers));
            });
        }
    };
    std::thread::Builder::new().name("hooks".to_owned()).spawn(accept).attempted("start the hooks")?;
    Ok(address)
}

fn answer(stream: &TcpStream, writers: &Writers) -> std::io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_WITHIN))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    for _ in 0..HEAD_LINES_MAX {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
    }
    let mut words = request.split_whitespace();
    let (status, body) = match (words.next(), words.next().map(|path| path.split('?').next().unwrap_or(path))) {
        (Some("POST"), Some("/pause")) => match writers.gate.close() {
            Ok(()) => ("200 OK", oracle(writers)),
            Err(error) => ("503 Service Unavailable", serde_json::json!({ "error": error })),
        },
        (Some("POST"), Some("/resume")) => {
            writers.gate.resume();
            ("200 OK", oracle(writers))
        }
        (Some("GET"), Some("/health")) => ("200 OK", serde_json::json!({ "status": "ok" })),
        (Some("GET"), Some("/oracle")) => ("200 OK", oracle(writers)),
        _ => ("404 Not Found", serde_json::json!({ "error": "pause, resume, health, oracle" })),
    };
    let body = format!("{body}\n");
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = stream;
    stream.write_all(format!("{head}{body}").as_bytes())
}

fn oracle(writers: &Writers) -> serde_json::Value {
    let view = writers.gate.view();
    serde_json::json!({
        "acknowledged": writers.acknowledged.load(Ordering::Relaxed),
        "failures": writers.failures.load(Ordering::Relaxed),
        "paused": view.closed,
        "in_flight": view.in_flight,
        "pauses": view.pauses,
        "leases_run_out": view.leases_run_out,
    })
}
