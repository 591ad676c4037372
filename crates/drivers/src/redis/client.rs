//! Connections to a server: plain or TLS, authenticated, with a limit on every wait.
//!
//! Sends commands and classifies refusals; knows nothing of replication and of what commands mean.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use stillpoint_core::error::{Error, Kind, Result};

use super::config::{Endpoint, Settings};
use super::wire::{self, Reply};

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Where systems keep the certificates that they trust.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// What every connection to the servers of one store needs. `Debug` shows no secret.
#[derive(Clone)]
pub(super) struct Access {
    user: Option<String>,
    password: Option<String>,
    tls: Option<Arc<ClientConfig>>,
    /// How long a silent server is waited for.
    pub timeout: Duration,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("user", &self.user).field("tls", &self.tls.is_some()).finish_non_exhaustive()
    }
}

impl Access {
    /// Reads certificates and takes the password, which is resolved already.
    pub fn new(settings: &Settings, password: Option<String>) -> Result<Self> {
        let tls = if settings.is_encrypted() { Some(Arc::new(tls(settings)?)) } else { None };
        Ok(Self { user: settings.user.clone(), password, tls, timeout: settings.timeout() })
    }

    /// The ACL user that connections have.
    pub fn user(&self) -> &str {
        self.user.as_deref().unwrap_or("default")
    }
}

fn tls(settings: &Settings) -> Result<ClientConfig> {
    let wrong = |path: &Path, error: rustls::pki_types::pem::Error| {
        Error::new(Kind::Config, format!("cannot read {}", path.display())).source(error)
    };
    let bundle = match &settings.ca {
        Some(path) => path.clone(),
        None => {
            SYSTEM_ROOTS.map(Path::new).into_iter().find(|path| path.exists()).map(Path::to_owned).ok_or_else(|| {
                Error::new(Kind::Config, "this system keeps no list of trusted certificates")
                    .hint("ca: /path/to/ca.pem")
            })?
        }
    };
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(&bundle).map_err(|error| wrong(&bundle, error))?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(|error| wrong(&bundle, error))?;
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(Error::new(Kind::Config, format!("{} holds no certificate", bundle.display())));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal("no TLS version is usable").source(error))?
        .with_root_certificates(roots);
    let (Some(certificate), Some(key)) = (&settings.certificate, &settings.key) else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = CertificateDer::pem_file_iter(certificate).map_err(|error| wrong(certificate, error))?;
    let chain = chain.collect::<Result<_, _>>().map_err(|error| wrong(certificate, error))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error))?;
    builder.with_client_auth_cert(chain, private).map_err(|error| {
        Error::new(Kind::Config, format!("{} and {} do not go together", certificate.display(), key.display()))
            .source(error)
    })
}

/// The bytes of a connection, encrypted or not.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// One connection, authenticated.
pub(super) struct Connection {
    stream: BufReader<Stream>,
    endpoint: Endpoint,
    timeout: Duration,
    /// Whether an answer may still be on its way that nobody waits for.
    broken: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({})", self.endpoint)
    }
}

fn resolve(endpoint: &Endpoint) -> Result<Vec<SocketAddr>> {
    let found = (endpoint.host.as_str(), endpoint.port).to_socket_addrs();
    let found = found.map_err(|error| {
        Error::new(Kind::Unreachable, format!("the name `{}` cannot be resolved", endpoint.host))
            .temporary()
            .source(error)
    })?;
    Ok(found.collect())
}

fn connect(endpoint: &Endpoint) -> Result<TcpStream> {
    let mut last = None;
    for address in resolve(endpoint)? {
        match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    let error = last.unwrap_or_else(|| std::io::ErrorKind::NotFound.into());
    let kind = if error.kind() == std::io::ErrorKind::TimedOut { Kind::TimedOut } else { Kind::Unreachable };
    Err(Error::new(kind, format!("cannot connect to {endpoint}"))
        .temporary()
        .source(error)
        .hint("see whether the server runs and listens on this address"))
}

impl Connection {
    /// Connects, encrypts and authenticates.
    pub fn open(access: &Access, endpoint: &Endpoint) -> Result<Self> {
        let socket = connect(endpoint)?;
        let setup = |error| Error::io(format!("cannot set up the connection to {endpoint}"), error);
        socket.set_nodelay(true).map_err(setup)?;
        socket.set_read_timeout(Some(access.timeout)).map_err(setup)?;
        socket.set_write_timeout(Some(access.timeout)).map_err(setup)?;
        let stream = match &access.tls {
            None => Stream::Plain(socket),
            Some(config) => {
                let name = ServerName::try_from(endpoint.host.clone()).map_err(|error| {
                    Error::new(Kind::Config, format!("`{}` is no name for TLS", endpoint.host)).source(error)
                })?;
                let client = ClientConnection::new(Arc::clone(config), name)
                    .map_err(|error| Error::new(Kind::Config, "TLS cannot begin").source(error))?;
                Stream::Tls(Box::new(StreamOwned::new(client, socket)))
            }
        };
        let stream = BufReader::with_capacity(128 << 10, stream);
        let mut connection = Self { stream, endpoint: endpoint.clone(), timeout: access.timeout, broken: false };
        connection.authenticate(access)?;
        Ok(connection)
    }

    fn authenticate(&mut self, access: &Access) -> Result<()> {
        if access.password.is_none() && access.user.is_none() {
            return Ok(());
        }
        let mut arguments = vec!["AUTH".as_bytes()];
        arguments.extend(access.user.as_deref().map(str::as_bytes));
        // A user without password takes any.
        arguments.push(access.password.as_deref().unwrap_or_default().as_bytes());
        match self.ask(&arguments)? {
            Reply::Error(text) if text.starts_with("ERR") => {
                Err(Error::new(Kind::Unauthenticated, format!("{} asks for no password: {text}", self.endpoint)))
            }
            Reply::Error(_) => Err(Error::new(
                Kind::Unauthenticated,
                format!("{} refuses the password of user `{}`", self.endpoint, access.user()),
            )
            .hint("see `user` and `password` of the store")),
            _ => Ok(()),
        }
    }

    /// Where this connection goes.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The address that this connection has on our side.
    pub fn local_address(&self) -> Result<SocketAddr> {
        let address = self.stream.get_ref().socket().local_addr();
        address.map_err(|error| Error::io("cannot tell our own address", error))
    }

    /// The address of the server.
    pub fn peer_address(&self) -> Result<SocketAddr> {
        let address = self.stream.get_ref().socket().peer_addr();
        address.map_err(|error| Error::io("cannot tell the server's address", error))
    }

    /// Limits how long one read may wait.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.timeout = timeout;
        let set = self.stream.get_ref().socket().set_read_timeout(Some(timeout));
        set.map_err(|error| Error::io("cannot set a time limit", error))
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let stream = self.stream.get_mut();
        stream.write_all(bytes).and_then(|()| stream.flush()).map_err(|error| self.explain(error))
    }

    /// Whether the connection can be used no more: something went wrong on the way.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// What went wrong on the way, with the server's name.
    fn explain(&mut self, error: std::io::Error) -> Error {
        use std::io::ErrorKind as E;
        self.broken = true;
        match error.kind() {
            E::WouldBlock | E::TimedOut => {
                Error::new(Kind::TimedOut, format!("{} did not answer within {:.0?}", self.endpoint, self.timeout))
                    .temporary()
                    .hint("see whether the server is stopped, or busy with a long command")
            }
            E::InvalidData => Error::new(Kind::Unreachable, format!("TLS with {} failed", self.endpoint)).source(error),
            _ => Error::new(Kind::Unreachable, format!("the connection to {} broke", self.endpoint))
                .temporary()
                .source(error),
        }
    }

    /// Waits for one reply.
    pub fn receive(&mut self) -> Result<Reply> {
        // Errors of the system get the server's name; the parser would not know it.
        match self.stream.fill_buf() {
            Ok(_) => {}
            Err(error) => return Err(self.explain(error)),
        }
        wire::read_reply(&mut self.stream).inspect_err(|_| self.broken = true)
    }

    /// Sends a command and returns the answer, refusals included.
    pub fn ask(&mut self, arguments: &[&[u8]]) -> Result<Reply> {
        self.send(&wire::encode(arguments))?;
        self.receive()
    }

    /// Sends a command; a refusal is an error.
    pub fn call(&mut self, arguments: &[&[u8]]) -> Result<Reply> {
        match self.ask(arguments)? {
            Reply::Error(text) => Err(refusal(arguments, &text)),
            other => Ok(other),
        }
    }

    /// Sends a command made of words.
    pub fn command(&mut self, words: &[&str]) -> Result<Reply> {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.call(&words)
    }

    /// One section of `INFO`, or all of it for an empty name.
    pub fn info(&mut self, section: &str) -> Result<String> {
        let reply = if section.is_empty() { self.command(&["INFO"])? } else { self.command(&["INFO", section])? };
        Ok(reply.text())
    }

    /// The value of one setting of the server; `None` where it has none or does not say.
    pub fn config(&mut self, name: &str) -> Result<Option<String>> {
        match self.ask(&[b"CONFIG", b"GET", name.as_bytes()])? {
            Reply::Error(_) => Ok(None),
            reply => Ok(reply.items().get(1).map(Reply::text)),
        }
    }

    /// The reader behind the connection, for streams that are no replies.
    pub fn reader(&mut self) -> &mut BufReader<Stream> {
        &mut self.stream
    }

    /// Ends whatever another thread reads from the copy of the connection.
    pub fn closer(&self) -> Result<TcpStream> {
        let copy = self.stream.get_ref().socket().try_clone();
        copy.map_err(|error| Error::io("cannot share the connection", error))
    }
}

/// The name of a command for people, without its arguments, which may be secrets.
fn shown(arguments: &[&[u8]]) -> String {
    const WITH_SUBCOMMAND: [&[u8]; 8] =
        [b"CONFIG", b"ACL", b"CLUSTER", b"FUNCTION", b"SENTINEL", b"CLIENT", b"REPLCONF", b"COMMAND"];
    let has_two = arguments.first().is_some_and(|name| WITH_SUBCOMMAND.contains(name));
    let words = arguments.iter().take(if has_two { 2 } else { 1 });
    let words: Vec<_> = words.map(|word| String::from_utf8_lossy(word)).collect();
    words.join(" ")
}

/// Classifies a refusal of the server's.
pub(super) fn refusal(arguments: &[&[u8]], text: &str) -> Error {
    let command = shown(arguments);
    let code = text.split_whitespace().next().unwrap_or_default();
    let unknown = text.starts_with("ERR unknown command") || text.starts_with("ERR unknown subcommand");
    let kind = match code {
        "NOAUTH" | "WRONGPASS" => Kind::Unauthenticated,
        "NOPERM" => Kind::PermissionDenied,
        "LOADING" | "BUSY" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" | "NOMASTERLINK" => Kind::Unreachable,
        "OOM" | "MISCONF" => Kind::Exhausted,
        "BUSYKEY" => Kind::AlreadyExists,
        "READONLY" => Kind::Conflict,
        _ if unknown => Kind::Unsupported,
        _ => Kind::Io,
    };
    let error = Error::new(kind, format!("the server refused `{command}`: {text}"));
    let error = if kind == Kind::Unreachable { error.temporary() } else { error };
    match code {
        "NOAUTH" => error.hint("the server asks for a password: password: env:REDIS_PASSWORD"),
        "NOPERM" => {
            let grant = command.to_lowercase().replacen(' ', "|", 1);
            error.hint(format!("ACL SETUSER <user> +{grant}"))
        }
        "READONLY" => error.hint("the server is a replica: name its master"),
        _ => error,
    }
}
