//! A network that can be broken: a TCP proxy on loopback that cuts, holds up or delays what passes.
//!
//! It stands between a client and one server and knows nothing of what they say. Cutting it is what a
//! pulled cable or a failed host looks like to both; holding it is what a full queue looks like. On
//! request it makes an S3 service look as if its clock were wrong.

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::skew::Skew;

/// How long a connection to the server may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// After so long without more, what may have been the begin of a time is taken for something else.
const HELD_BACK_MAX: Duration = Duration::from_millis(20);

/// What happens to what passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weather {
    /// It passes.
    #[default]
    Fair,
    /// It passes, each piece so much later.
    Slow(Duration),
    /// It stays where it is; connections stay open, new ones are taken and not served.
    Held,
    /// Connections are closed, new ones closed at once.
    Cut,
}

/// The proxy. It ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    weather: Weather,
    /// How many seconds the server's clock is said to be ahead.
    ahead: i64,
    ended: bool,
    connections: u64,
    open: Vec<(u64, TcpStream)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// Listens on a free port of loopback and passes everything on to `upstream`.
    ///
    /// # Errors
    /// The system's.
    pub fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared { upstream, state: Mutex::default(), changed: Condvar::new() });
        let serving = Arc::clone(&shared);
        std::thread::Builder::new().name("proxy".to_owned()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if locked(&serving.state).ended {
                    return;
                }
                let serving = Arc::clone(&serving);
                std::thread::spawn(move || {
                    // Either side may hang up at any time; that is what the proxy is for.
                    drop(serving.connect(stream));
                });
            }
        })?;
        Ok(Self { port, shared })
    }

    /// The port on 127.0.0.1 that clients use.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the weather, at once and for all connections.
    pub fn set(&self, weather: Weather) {
        let mut state = locked(&self.shared.state);
        state.weather = weather;
        if weather == Weather::Cut {
            close(&mut state);
        }
        self.shared.changed.notify_all();
    }

    /// Says of an S3 service that its clock is so many seconds ahead, behind if negative: of its answers on
    /// connections that are made from now on.
    pub fn skew(&self, seconds: i64) {
        locked(&self.shared.state).ahead = seconds;
    }

    /// Connections that clients made so far.
    pub fn connections(&self) -> u64 {
        locked(&self.shared.state).connections
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = locked(&self.shared.state);
        state.ended = true;
        state.weather = Weather::Cut;
        close(&mut state);
        self.shared.changed.notify_all();
        drop(state);
        // Wakes the thread that waits for connections.
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
    }
}

fn close(state: &mut State) {
    for (_, stream) in state.open.drain(..) {
        // One that is closed already is what is wanted.
        drop(stream.shutdown(Shutdown::Both));
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, client: TcpStream) -> Result<()> {
        let number = {
            let mut state = locked(&self.state);
            state.connections += 1;
            let number = state.connections;
            if state.weather == Weather::Cut {
                return client.shutdown(Shutdown::Both);
            }
            state.open.push((number, client.try_clone()?));
            number
        };
        let result = self.join(number, &client);
        locked(&self.state).open.retain(|(other, _)| *other != number);
        drop(client.shutdown(Shutdown::Both));
        result
    }

    fn join(self: &Arc<Self>, number: u64, client: &TcpStream) -> Result<()> {
        if !self.passes() {
            return Ok(());
        }
        let server = TcpStream::connect_timeout(&self.upstream, CONNECT_WITHIN)?;
        server.set_nodelay(true)?;
        client.set_nodelay(true)?;
        {
            let mut state = locked(&self.state);
            if state.weather == Weather::Cut {
                return Ok(());
            }
            state.open.push((number, server.try_clone()?));
        }
        let (from, to) = (server.try_clone()?, client.try_clone()?);
        let shared = Arc::clone(self);
        let ahead = locked(&self.state).ahead;
        let back = std::thread::spawn(move || match ahead {
            0 => shared.pump(from, to),
            seconds => shared.pump_skewed(from, to, seconds),
        });
        let (from, to) = (client.try_clone()?, server.try_clone()?);
        self.pump(from, to);
        drop(back.join());
        drop(server.shutdown(Shutdown::Both));
        Ok(())
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if !self.passes() || to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        // The other direction may still have something to say.
        drop(to.shutdown(Shutdown::Write));
    }

    /// As `pump`, with shifted times.
    fn pump_skewed(&self, mut from: TcpStream, mut to: TcpStream, seconds: i64) {
        let (mut buffer, mut skew) = (vec![0; 64 << 10], Skew::default());
        if from.set_read_timeout(Some(HELD_BACK_MAX)).is_ok() {
            loop {
                let bytes = match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => skew.push(&buffer[..count], seconds),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => skew.rest(),
                    Err(_) => break,
                };
                if !bytes.is_empty() && (!self.passes() || to.write_all(&bytes).is_err()) {
                    break;
                }
            }
        }
        // A line that breaks takes the rest with it, as any line does.
        drop(to.write_all(&skew.rest()));
        drop(to.shutdown(Shutdown::Write));
    }

    /// Waits until the weather lets something pass; false once the line is cut.
    fn passes(&self) -> bool {
        let mut state = locked(&self.state);
        while state.weather == Weather::Held {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let weather = state.weather;
        drop(state);
        if let Weather::Slow(delay) = weather {
            std::thread::sleep(delay);
        }
        weather != Weather::Cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let (mut from, mut to) = (stream.try_clone().expect("clones"), stream);
                    drop(std::io::copy(&mut from, &mut to));
                });
            }
        });
        address
    }

    fn client(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).expect("listens");
        stream.set_read_timeout(Some(Duration::from_millis(200))).expect("sets");
        stream
    }

    fn says(stream: &mut TcpStream, word: &[u8]) -> Result<usize> {
        stream.write_all(word)?;
        stream.read(&mut [0; 16])
    }

    #[test]
    fn lines_are_cut_held_and_joined_again() {
        let proxy = Proxy::start(echo()).expect("starts");
        let mut stream = client(&proxy);
        assert_eq!(says(&mut stream, b"fair").expect("passes"), 4);
        proxy.set(Weather::Held);
        assert!(says(&mut stream, b"held").is_err(), "nothing comes back in time");
        proxy.set(Weather::Fair);
        assert_eq!(stream.read(&mut [0; 16]).expect("what was held comes"), 4);
        proxy.set(Weather::Cut);
        assert!(!matches!(says(&mut stream, b"cut"), Ok(1..)));
        assert!(!matches!(says(&mut client(&proxy), b"cut"), Ok(1..)), "a new line is cut as well");
        proxy.set(Weather::Slow(Duration::from_millis(20)));
        assert_eq!(says(&mut client(&proxy), b"slow").expect("passes"), 4);
        assert_eq!(proxy.connections(), 3);
    }
}
