//! A writer that can be paused: a tiny HTTP server with the hooks of a platform.
//!
//! `/pause` and `/resume` switch it and answer 204; `/broken` answers 500; `/moved` redirects;
//! `/hang` never answers; `/late` pauses after a second. It remembers when it was switched, and what
//! headers came.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    paused_since: Option<Instant>,
    switches: Vec<(Instant, bool)>,
    headers: Vec<String>,
    resumes_to_fail: u32,
}

/// The server; it lives as long as the process.
#[derive(Debug, Clone)]
pub struct Hooks {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Hooks {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let port = listener.local_addr().expect("bound").port();
        let hooks = Self { port, state: Arc::default() };
        let serving = hooks.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hooks = serving.clone();
                std::thread::spawn(move || hooks.serve(stream));
            }
        });
        hooks
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn is_paused(&self) -> bool {
        self.state.lock().expect("whole").paused_since.is_some()
    }

    /// When the writer was paused or let go, in order.
    pub fn switches(&self) -> Vec<(Instant, bool)> {
        self.state.lock().expect("whole").switches.clone()
    }

    /// How long the longest pause was; one that still lasts counts up to now.
    pub fn longest_pause(&self) -> Duration {
        let mut longest = Duration::ZERO;
        let mut since = None;
        for (at, paused) in self.switches() {
            match (paused, since) {
                (true, None) => since = Some(at),
                (false, Some(began)) => {
                    longest = longest.max(at - began);
                    since = None;
                }
                _ => {}
            }
        }
        longest.max(since.map_or(Duration::ZERO, |began| began.elapsed()))
    }

    pub fn headers(&self) -> Vec<String> {
        self.state.lock().expect("whole").headers.clone()
    }

    /// Lets the next resumes answer 500.
    pub fn fail_resumes(&self, count: u32) {
        self.state.lock().expect("whole").resumes_to_fail = count;
    }

    /// Waits until the writer runs; false after `within`.
    pub fn runs_within(&self, within: Duration) -> bool {
        let began = Instant::now();
        while self.is_paused() {
            if began.elapsed() > within {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    fn switch(&self, paused: bool) {
        let mut state = self.state.lock().expect("whole");
        state.paused_since = paused.then(Instant::now);
        state.switches.push((Instant::now(), paused));
    }

    fn serve(&self, stream: TcpStream) {
        let Ok(reading) = stream.try_clone() else { return };
        let mut lines = BufReader::new(reading).lines();
        let Some(Ok(request)) = lines.next() else { return };
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        for line in lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()) {
            self.state.lock().expect("whole").headers.push(line);
        }
        let answer = match path.as_str() {
            "/pause" => {
                self.switch(true);
                "204 No Content\r\n"
            }
            "/resume" => {
                let mut state = self.state.lock().expect("whole");
                let fails = state.resumes_to_fail > 0;
                state.resumes_to_fail = state.resumes_to_fail.saturating_sub(1);
                drop(state);
                if fails {
                    "500 Internal Server Error\r\nContent-Length: 0\r\n"
                } else {
                    self.switch(false);
                    "204 No Content\r\n"
                }
            }
            "/broken" => {
                let body = "no connection to the queue";
                let head = format!(
                    "HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Length: {}",
                    body.len()
                );
                drop(write!(&stream, "{head}\r\n\r\n{body}"));
                return;
            }
            "/moved" => "302 Found\r\nLocation: /pause\r\nContent-Length: 0\r\n",
            "/late" => {
                std::thread::sleep(Duration::from_millis(400));
                self.switch(true);
                "204 No Content\r\n"
            }
            "/hang" => {
                std::thread::sleep(Duration::from_secs(3600));
                return;
            }
            _ => "404 Not Found\r\nContent-Length: 0\r\n",
        };
        // A peer that hung up is part of the tests.
        drop(write!(&stream, "HTTP/1.1 {answer}Connection: close\r\n\r\n"));
    }
}
