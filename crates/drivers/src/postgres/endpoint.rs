//! Where a server is, and how a connection to it comes up: address, name look-up, TLS.
//!
//! Apart from the session, because a request to cancel needs a connection and no session.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use stillpoint_core::error::{Error, Kind, Result};

use super::tls::{self, Stream};
use super::wire;

/// Where a server is, and as whom to log in.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) address: Address,
    pub(super) user: String,
    pub(super) password: Option<String>,
    /// `None` without TLS.
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    /// Whether a server without TLS is refused.
    pub(super) tls_required: bool,
    pub(super) connect_time_max: Duration,
}

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Tcp { host: String, port: u16 },
    Unix { folder: PathBuf, port: u16 },
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix { folder, port } => write!(f, "{}/.s.PGSQL.{port}", folder.display()),
        }
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("address", &self.address).field("user", &self.user).finish_non_exhaustive()
    }
}

/// Opens the stream and, where wanted, shakes hands for TLS.
pub(super) fn open(endpoint: &Endpoint, deadline: Instant) -> Result<Stream> {
    let unreachable = |error: std::io::Error| {
        Error::new(Kind::Unreachable, format!("cannot connect to {}", endpoint.address))
            .temporary()
            .hint("is the server running, and does it listen there (listen_addresses, firewall)?")
            .source(error)
    };
    let (host, port) = match &endpoint.address {
        Address::Unix { folder, port } => {
            let path = folder.join(format!(".s.PGSQL.{port}"));
            return Ok(Stream::Unix(UnixStream::connect(path).map_err(unreachable)?));
        }
        Address::Tcp { host, port } => (host, *port),
    };
    let mut last = std::io::Error::other("the name has no address");
    for address in (host.as_str(), port).to_socket_addrs().map_err(unreachable)? {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => {
                socket.set_nodelay(true).map_err(unreachable)?;
                return protect(endpoint, socket, host, deadline);
            }
            Err(error) => last = error,
        }
    }
    Err(unreachable(last))
}

/// Asks for TLS and uses it, as far as it is wanted.
fn protect(endpoint: &Endpoint, mut socket: TcpStream, host: &str, deadline: Instant) -> Result<Stream> {
    let Some(config) = &endpoint.tls else { return Ok(Stream::Plain(socket)) };
    let silent = |error: std::io::Error| {
        Error::new(Kind::Unreachable, format!("{} does not answer", endpoint.address)).temporary().source(error)
    };
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    socket.set_read_timeout(Some(left)).map_err(silent)?;
    socket.set_write_timeout(Some(left)).map_err(silent)?;
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).map_err(silent)?;
    // Exactly one byte: what else came with it would be unencrypted, and someone else's.
    let mut answer = [0];
    socket.read_exact(&mut answer).map_err(silent)?;
    match answer {
        [b'S'] => tls::encrypt(socket, host, config.clone()),
        [b'N'] if !endpoint.tls_required => Ok(Stream::Plain(socket)),
        [b'N'] => Err(Error::new(Kind::Unauthenticated, format!("{} offers no TLS", endpoint.address))
            .hint("set ssl = on at the server; or `tls: disable`, if the network between is your own")),
        _ => Err(wire::garbled()),
    }
}
