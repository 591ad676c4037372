//! We as a master: the target attaches to us, and takes the image and the commands from us.
//!
//! The fastest way back, and the most faithful one: the server loads what a server wrote. While it
//! lasts, the target knows a password that nobody else has, so that it can attach to nobody else and
//! nobody else is taken for it. Facts: `syncWithMaster` and `readSyncBulkPayload` in
//! `src/replication.c` of Redis and Valkey.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::STAMP_KEY;
use super::client::{Access, Connection};
use super::loan::{self, Loan};
use super::wire::{self, Reply};

/// How long the target may take to attach: it tries once a second.
const ATTACH_WITHIN: Duration = Duration::from_secs(30);
/// How long a look at a socket lasts.
const LOOK: Duration = Duration::from_millis(100);
/// How long the target may take nothing and say nothing, unless it is loading.
const SILENT_FOR: Duration = Duration::from_secs(120);
/// How long a target may still load when the restore is over for another reason.
const LOAD_WITHIN: Duration = Duration::from_secs(600);
/// How much is sent at once.
const PIECE_BYTES: usize = 256 << 10;

/// What the target is to load.
pub(super) struct Feed<'a> {
    /// The image.
    pub image: Box<dyn Read + 'a>,
    /// Its length, or `None` if that shows only at its end.
    pub image_bytes: Option<u64>,
    /// The commands behind it.
    pub replay: Box<dyn Read + 'a>,
}

/// Random letters: keys of the hasher come from the system.
pub(super) fn random_hex(letters: usize) -> String {
    let mut text = String::new();
    while text.len() < letters {
        text.push_str(&format!("{:016x}", RandomState::new().hash_one(text.len())));
    }
    text.truncate(letters);
    text
}

/// The server that we lead.
pub(super) struct Led<'a> {
    /// How it is reached.
    pub access: &'a Access,
    /// The address under which it reaches us, if it is not the one that we have on our side.
    pub advertise: Option<&'a str>,
    /// Its settings that are others meanwhile; the same for every try.
    pub loan: RefCell<Loan>,
}

impl Led<'_> {
    /// Makes the target load `feed`, and a master again. Returns the bytes that were sent.
    ///
    /// What the target held before is gone once it has received the image. On every way out it is a
    /// master again, with the settings it had but for the note; where that fails too, the error says both.
    /// `is_begun` is set before the image is announced to it.
    pub fn feed(
        &self,
        control: &mut Connection,
        feed: Feed<'_>,
        context: &Context,
        is_begun: &Cell<bool>,
    ) -> Result<u64> {
        let listener = Listener::open(control, self.advertise)?;
        let feeder = (listener.host.as_str(), listener.port);
        let borrowed = self.loan.borrow_mut().borrow(control, feeder, &listener.token);
        let outcome = borrowed.and_then(|shows_token| {
            let attached = attach(control, &listener, shows_token, context)?;
            serve(control, attached, feed, is_begun)
        });
        let cause = match outcome {
            Ok(sent) => return self.let_go_loaded(control).map(|()| sent),
            Err(cause) => cause,
        };
        // A connection on which something failed may still owe an answer.
        let freed = Connection::open(self.access, control.endpoint()).and_then(|mut fresh| self.let_go(&mut fresh));
        let Err(stuck) = freed else { return Err(cause) };
        let message = format!("{}; and the target could not be made a master again: {stuck}", cause.message());
        let error = Error::new(cause.kind(), message).status(cause.status_value());
        Err(error.source(cause).hint("run the restore again: what it left behind is recognised"))
    }

    /// Makes the target a master again, with the settings it had, but for the note. May be repeated.
    pub fn let_go(&self, control: &mut Connection) -> Result<()> {
        // In this order: the target must not attach elsewhere with the old password.
        free(control)?;
        self.loan.borrow().put_back(control)
    }

    /// The same for one that has loaded what it was fed: it is no copy that bears the stamp of another.
    pub fn let_go_loaded(&self, control: &mut Connection) -> Result<()> {
        free(control)?;
        control.command(&["DEL", STAMP_KEY])?;
        self.loan.borrow().put_back(control)
    }
}

/// Whether the server lets itself be led by us: no cluster, no TLS between master and replica, and
/// the privileges for it.
pub(super) fn refuses(control: &mut Connection, info: &str) -> Result<Option<String>> {
    if wire::info(info, "cluster_enabled") == Some("1") {
        return Ok(Some("a node of a cluster follows no master by name".to_owned()));
    }
    if control.config("tls-replication")?.as_deref() == Some("yes") {
        return Ok(Some("the target wants TLS from its master (tls-replication)".to_owned()));
    }
    // A no-op on a master, and refused where the command is.
    match control.ask(&[b"REPLICAOF", b"NO", b"ONE"])? {
        Reply::Error(text) => Ok(Some(format!("the target refuses REPLICAOF: {text}"))),
        _ => loan::refuses(control),
    }
}

/// Makes the target a master again; while it loads, it takes no such command.
fn free(control: &mut Connection) -> Result<()> {
    let until = Instant::now() + LOAD_WITHIN;
    loop {
        match control.command(&["REPLICAOF", "NO", "ONE"]) {
            Err(error) if error.is_temporary() && !control.is_broken() && Instant::now() < until => {
                std::thread::sleep(LOOK);
            }
            other => return other.map(drop),
        }
    }
}

struct Listener {
    socket: TcpListener,
    host: String,
    port: u16,
    token: String,
    /// Where the target must come from.
    target: IpAddr,
}

impl Listener {
    fn open(control: &Connection, advertise: Option<&str>) -> Result<Self> {
        let local = control.local_address()?.ip();
        let any: IpAddr = if local.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let bind = if advertise.is_some() { any } else { local };
        let socket = TcpListener::bind(SocketAddr::new(bind, 0)).or_io(|| format!("cannot listen on {bind}"))?;
        socket.set_nonblocking(true).or_io(|| "cannot listen without waiting".to_owned())?;
        let port = socket.local_addr().or_io(|| "cannot tell our own port".to_owned())?.port();
        let host = advertise.map_or_else(|| local.to_string(), str::to_owned);
        Ok(Self { socket, host, port, token: random_hex(64), target: control.peer_address()?.ip() })
    }

    /// Waits for a connection of the target's.
    fn accept(&self, context: &Context, until: Instant) -> Result<TcpStream> {
        loop {
            context.check()?;
            match self.socket.accept() {
                Ok((socket, _)) => {
                    socket.set_nonblocking(false).or_io(|| "cannot set up a connection".to_owned())?;
                    socket.set_nodelay(true).or_io(|| "cannot set up a connection".to_owned())?;
                    socket.set_read_timeout(Some(LOOK)).or_io(|| "cannot set a time limit".to_owned())?;
                    socket.set_write_timeout(Some(LOOK)).or_io(|| "cannot set a time limit".to_owned())?;
                    return Ok(socket);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(Error::io("cannot take the target's connection", error)),
            }
            if Instant::now() > until {
                return Err(Error::new(
                    Kind::Unreachable,
                    format!("the target did not attach to {}:{} within {ATTACH_WITHIN:?}", self.host, self.port),
                )
                .hint(
                    "set `advertise` to an address under which the target reaches this machine, or restoreBy: keys",
                ));
            }
        }
    }
}

/// Lets the target follow us, and waits until it asks for the image.
fn attach<'a>(
    control: &mut Connection,
    listener: &Listener,
    shows_token: bool,
    context: &'a Context,
) -> Result<Attached<'a>> {
    control.command(&["REPLICAOF", &listener.host, &listener.port.to_string()])?;
    let until = Instant::now() + ATTACH_WITHIN;
    loop {
        let socket = listener.accept(context, until)?;
        let from = socket.peer_addr().or_io(|| "cannot tell who attached".to_owned())?.ip();
        let mut attached =
            Attached { stream: BufReader::new(socket), context, mark: random_hex(40), heard: Instant::now() };
        let token = if shows_token { Some(listener.token.as_str()) } else { None };
        // Without a token, the address is all that tells the target from others.
        let is_target = token.is_some() || from == listener.target;
        match attached.handshake(token) {
            Ok(()) if is_target => return Ok(attached),
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Cancelled => return Err(error),
            // Somebody else, or a try that the target gave up; it comes again.
            Err(_) => {}
        }
    }
}

fn serve(
    control: &mut Connection,
    mut attached: Attached<'_>,
    mut feed: Feed<'_>,
    is_begun: &Cell<bool>,
) -> Result<u64> {
    is_begun.set(true);
    attached.begin(feed.image_bytes)?;
    let mut sent = attached.pour(&mut feed.image, control)?;
    if let Some(expected) = feed.image_bytes
        && expected != sent
    {
        return Err(Error::new(Kind::Corrupt, format!("the image has {sent} bytes instead of {expected}")));
    }
    if feed.image_bytes.is_none() {
        attached.end(control)?;
    }
    let replayed = attached.pour(&mut feed.replay, control)?;
    attached.confirm(replayed, control)?;
    sent += replayed;
    let info = control.info("replication")?;
    if wire::info(&info, "master_link_status") != Some("up") {
        return Err(Error::new(Kind::Unreachable, "the target lost its connection to us").temporary());
    }
    Ok(sent)
}

/// The target's connection.
struct Attached<'a> {
    stream: BufReader<TcpStream>,
    context: &'a Context,
    /// What ends an image of unknown length: letters that no image holds by chance.
    mark: String,
    heard: Instant,
}

/// Whether the target is busy loading, and silent for that reason.
fn loads(control: &mut Connection) -> Result<bool> {
    let info = control.info("")?;
    let is = |name: &str| wire::info(&info, name) == Some("1");
    Ok(is("loading") || is("async_loading") || is("master_sync_in_progress"))
}

impl Attached<'_> {
    /// Answers what a replica asks until it wants our data.
    fn handshake(&mut self, token: Option<&str>) -> Result<()> {
        let mut is_known = token.is_none();
        let until = Instant::now() + ATTACH_WITHIN;
        loop {
            let Some(command) = self.command(until)? else {
                return Err(Error::new(Kind::TimedOut, "the target asks for nothing").temporary());
            };
            let argument = |at: usize| command.arguments.get(at).map_or(&b""[..], Vec::as_slice);
            let answer: &[u8] = match command.name().as_slice() {
                b"PING" => b"+PONG\r\n",
                b"AUTH" => {
                    is_known =
                        token.is_none_or(|token| command.arguments.last().is_some_and(|last| last == token.as_bytes()));
                    if is_known { b"+OK\r\n" } else { b"-WRONGPASS\r\n" }
                }
                b"PSYNC" | b"SYNC" if is_known => return Ok(()),
                b"PSYNC" | b"SYNC" => return Err(Error::new(Kind::Unauthenticated, "somebody else wants our data")),
                b"REPLCONF" if argument(1).eq_ignore_ascii_case(b"ack") => continue,
                b"REPLCONF" => b"+OK\r\n",
                _ => b"-ERR unknown command\r\n",
            };
            self.write(answer, None)?;
        }
    }

    /// The next command of the target's; `None` if none came until then.
    fn command(&mut self, until: Instant) -> Result<Option<wire::Command>> {
        loop {
            self.context.check()?;
            match self.stream.fill_buf() {
                Ok([]) => {
                    return Err(Error::new(Kind::Unreachable, "the target closed its connection to us").temporary());
                }
                // Signs of life while the target loads.
                Ok([b'\n' | b'\r', ..]) => {
                    self.stream.consume(1);
                    self.heard = Instant::now();
                }
                Ok(_) => {
                    self.heard = Instant::now();
                    return wire::read_command(&mut self.stream, 4096);
                }
                Err(error) if wire::is_late(&error) => {}
                Err(error) => return Err(Error::io("the connection of the target broke", error)),
            }
            if Instant::now() > until {
                return Ok(None);
            }
        }
    }

    /// Writes all of `data`, however long the target takes, as long as it lives.
    fn write(&mut self, mut data: &[u8], mut control: Option<&mut Connection>) -> Result<()> {
        let mut moved = Instant::now();
        while !data.is_empty() {
            self.context.check()?;
            match self.stream.get_mut().write(data) {
                Ok(count) => {
                    data = &data[count..];
                    moved = Instant::now();
                }
                Err(error) if wire::is_late(&error) => {
                    if moved.elapsed() > SILENT_FOR {
                        let is_loading = match control.as_deref_mut() {
                            Some(control) => loads(control)?,
                            None => false,
                        };
                        if !is_loading {
                            return Err(Error::new(Kind::TimedOut, "the target takes no more data").temporary());
                        }
                        moved = Instant::now();
                    }
                }
                Err(error) => {
                    return Err(Error::new(Kind::Unreachable, "the target broke off: see its log")
                        .source(error)
                        .hint("it may be out of memory or disk, or refuse the format"));
                }
            }
        }
        Ok(())
    }

    /// Announces the image.
    fn begin(&mut self, image_bytes: Option<u64>) -> Result<()> {
        let id = random_hex(40);
        self.write(format!("+FULLRESYNC {id} 0\r\n").as_bytes(), None)?;
        match image_bytes {
            Some(bytes) => self.write(format!("${bytes}\r\n").as_bytes(), None),
            None => self.write(format!("$EOF:{}\r\n", self.mark).as_bytes(), None),
        }
    }

    /// Sends everything from `source`; returns how many bytes that was.
    fn pour(&mut self, source: &mut dyn Read, control: &mut Connection) -> Result<u64> {
        let mut piece = vec![0; PIECE_BYTES];
        let mut sent = 0;
        loop {
            let count = match source.read(&mut piece) {
                Ok(0) => return Ok(sent),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(wire::unwrapped(error, "cannot read the point")),
            };
            self.write(&piece[..count], Some(control))?;
            sent += count as u64;
            self.context.advance(count as u64, 0);
        }
    }

    /// Ends an image of unknown length. The target looks for the mark at the end of what it has
    /// received: nothing may follow until it has seen it.
    fn end(&mut self, control: &mut Connection) -> Result<()> {
        let mark = self.mark.clone();
        self.write(mark.as_bytes(), Some(control))?;
        self.acknowledged(0, control)
    }

    /// Waits until the target has carried out `bytes` of commands.
    fn confirm(&mut self, bytes: u64, control: &mut Connection) -> Result<()> {
        self.write(&wire::encode(&[b"REPLCONF", b"GETACK", b"*"]), Some(control))?;
        self.acknowledged(bytes, control)
    }

    fn acknowledged(&mut self, bytes: u64, control: &mut Connection) -> Result<()> {
        self.heard = Instant::now();
        loop {
            let command = self.command(Instant::now() + LOOK)?;
            let is_acknowledgement = |command: &wire::Command| {
                command.arguments.get(1).is_some_and(|word| word.eq_ignore_ascii_case(b"ack"))
            };
            if let Some(command) = command.filter(is_acknowledgement) {
                let text = command.arguments.get(2).map(|text| String::from_utf8_lossy(text).into_owned());
                if text.and_then(|text| text.parse::<u64>().ok()).is_some_and(|offset| offset >= bytes) {
                    return Ok(());
                }
            }
            if self.heard.elapsed() > SILENT_FOR {
                if !loads(control)? {
                    return Err(Error::new(Kind::TimedOut, "the target does not say that it is through").temporary());
                }
                self.heard = Instant::now();
            }
        }
    }
}
