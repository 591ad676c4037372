//! We as a replica: attach, receive the image and the stream of commands, stay attached.
//!
//! One thread per server receives everything and passes it to two queues, so that the server never
//! waits for us. It walks the image and reads the commands as they pass: for counts, for the checksum,
//! and to tell writes from the master's signs of life. Facts: `src/replication.c` of Redis and Valkey.
//!
//! We acknowledge offset 0 for ever: we keep nothing safe yet, and `WAIT` must not count us.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

use super::Redis;
use super::client::{Access, Connection, refusal};
use super::config::Endpoint;
use super::edges::Collector;
use super::image::{Form, ImageSource, StreamSource, walk};
use super::rdb::{Checksum, damaged};
use super::server::Node;
use super::spool::{Disk, Queue};
use super::wire::{self, Reply};

/// How long one look at the socket lasts before we see whether to stop or to give a sign of life.
const LOOK: Duration = Duration::from_millis(100);
/// How often we give one.
const ACKNOWLEDGE_EVERY: Duration = Duration::from_secs(1);
/// After the image the server waits for a sign of life, but may not notice the first ones: it has
/// yet to see that its child ended.
const IMPATIENT_FOR: Duration = Duration::from_secs(2);
/// How long the server may take to begin: it may wait for another child, or for more replicas.
const BEGIN_WITHIN: Duration = Duration::from_secs(540);
/// How often a broken connection is taken up again.
const RESUME_TRIES: u32 = 5;
/// How many signs of life are remembered, for telling how far an offset moved without writes.
const NOISE_MAX: usize = 4096;
/// How much of an argument is kept when nobody wants more than the command's name.
const NAME_BYTES: u64 = 64;

/// What the image turned out to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ImageFacts {
    /// Bytes of the image.
    pub bytes: u64,
    /// Whether its server wrote a checksum; it was right if so.
    pub has_checksum: bool,
    /// Keys by database, the stamp left out.
    pub keys: BTreeMap<u32, u64>,
    /// Libraries of functions.
    pub functions: u64,
    /// The types of modules that it holds values or data of.
    pub module_types: BTreeSet<String>,
    /// Those that have data which belongs to no key.
    pub module_data: BTreeSet<String>,
    /// The format's version, as the file has it: `9`, `valkey 80`.
    pub format: String,
    /// Why the image could not be walked; it is whole nevertheless.
    pub not_walked: Option<String>,
}

/// How far the thread is.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The replication id that offsets belong to.
    pub replication_id: String,
    /// The offset of the image.
    pub start: u64,
    /// The offset up to which commands were received.
    pub reached: u64,
    /// Offsets after commands that write nothing, with the bytes of all such up to there.
    noise: Vec<(u64, u64)>,
    /// What the image holds, once it is here.
    pub image: Option<ImageFacts>,
    /// Why nothing more comes.
    pub failed: Option<(Kind, String)>,
    /// How often the connection was taken up again.
    pub resumed: u32,
}

impl State {
    /// The offset without signs of life: it moves only when something is written.
    pub fn written(&self, offset: u64) -> u64 {
        let known = self.noise.iter().rev().find(|(end, _)| *end <= offset);
        offset - known.map_or(0, |(_, bytes)| *bytes)
    }

    fn error(&self) -> Option<Error> {
        self.failed.as_ref().map(|(kind, message)| {
            let error = Error::new(*kind, message.clone());
            if matches!(kind, Kind::Unreachable | Kind::TimedOut) { error.temporary() } else { error }
        })
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    image: Queue,
    stream: Queue,
    collector: Option<Arc<Collector>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attached replica. Dropping it detaches.
pub(super) struct Replica {
    shared: Arc<Shared>,
    socket: TcpStream,
    thread: Option<JoinHandle<()>>,
    /// The server.
    pub endpoint: Endpoint,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replica({})", self.endpoint)
    }
}

/// What an attachment is for.
pub(super) struct Purpose<'a> {
    pub access: &'a Access,
    pub endpoint: &'a Endpoint,
    pub disk: Disk,
    /// Only the image is wanted, made at once; no stream follows.
    pub image_only: bool,
    pub collector: Option<Arc<Collector>>,
}

impl<'a> Purpose<'a> {
    /// An image alone, one of so many on the driver's disk.
    pub fn image(driver: &'a Redis, node: &'a Node, servers: usize) -> Self {
        let disk = Disk::new(driver.scratch.clone(), u64::MAX, servers);
        Self { access: &driver.access, endpoint: &node.endpoint, disk, image_only: true, collector: None }
    }
}

impl Replica {
    /// Attaches, and returns once the server has begun to make its image: from then on every later
    /// write is in the stream.
    ///
    /// # Errors
    /// `Unsupported` if the server lets nobody attach; `PermissionDenied` with what would allow it.
    pub fn attach(purpose: Purpose<'_>, context: &Context) -> Result<Self> {
        let mut connection = Connection::open(purpose.access, purpose.endpoint)?;
        // With `eof` the server streams its image from memory, else it writes it to its disk first.
        // Streaming may begin late, because the server waits for more replicas: too late for a cut.
        let mut capabilities = vec!["REPLCONF", "capa", "psync2"];
        if !purpose.image_only || connection.config("repl-diskless-sync-delay")?.as_deref() == Some("0") {
            capabilities.extend(["capa", "eof"]);
        }
        connection.command(&capabilities).map_err(explain)?;
        if purpose.image_only {
            connection.command(&["REPLCONF", "rdb-only", "1"]).map_err(explain)?;
        }
        let now = wire::info_number(&connection.info("replication")?, "master_repl_offset").unwrap_or(0);
        connection.send(&wire::encode(&[b"PSYNC", b"?", b"-1"]))?;
        let (replication_id, start) = begin(&mut connection, purpose.access.timeout, context)?;
        if purpose.image_only && start < now {
            // The server joins us to an image that it makes for somebody else already.
            return Err(Error::new(Kind::Conflict, format!("{} hands out an older image", purpose.endpoint))
                .temporary()
                .hint("another replica attaches, or another run asks for an image: try again once it has ended"));
        }
        let state = State { replication_id, start, reached: start, ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            image: Queue::new(purpose.disk.clone()),
            stream: Queue::new(purpose.disk),
            collector: purpose.collector,
        });
        let socket = connection.closer()?;
        let link = Link::new(connection, purpose.access.clone(), purpose.endpoint.clone(), Arc::clone(&shared))?;
        let image_only = purpose.image_only;
        let thread = std::thread::Builder::new()
            .name(format!("replica {}", purpose.endpoint))
            .spawn(move || link.run(image_only))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { shared, socket, thread: Some(thread), endpoint: purpose.endpoint.clone() })
    }

    /// What the thread knows now.
    pub fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.shared.state())
    }

    /// Fails if nothing more can come.
    pub fn check(&self) -> Result<()> {
        self.look(State::error).map_or(Ok(()), Err)
    }

    /// Waits until `done` answers something. `None` when `within` has passed.
    pub fn wait<T>(
        &self,
        within: Duration,
        context: &Context,
        mut done: impl FnMut(&State) -> Option<T>,
    ) -> Result<Option<T>> {
        let until = Instant::now() + within;
        let mut state = self.shared.state();
        loop {
            context.check()?;
            if let Some(answer) = done(&state) {
                return Ok(Some(answer));
            }
            if let Some(error) = state.error() {
                return Err(error);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let wait = self.shared.changed.wait_timeout(state, left.min(LOOK));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The image, from its begin; meant to be read once.
    pub fn image(&self) -> &Queue {
        &self.shared.image
    }

    /// The commands behind the image, as they came; meant to be read once.
    pub fn stream(&self) -> &Queue {
        &self.shared.stream
    }

    /// Ends the attachment. What was received stays readable.
    pub fn detach(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A socket that is closed already needs no shutting.
        self.socket.shutdown(Shutdown::Both).ok();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has failed the queues already.
            drop(thread.join());
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Says what a refusal to attach means.
fn explain(error: Error) -> Error {
    match error.kind() {
        Kind::PermissionDenied => {
            error.hint("ACL SETUSER <user> +psync +replconf +ping +info (and +config|get +acl|list to keep those)")
        }
        Kind::Unsupported | Kind::Io => Error::new(Kind::Unsupported, "the server lets nobody attach as a replica")
            .source(error)
            .hint("managed services hide this: use their own snapshots, or a server that allows PSYNC"),
        _ => error,
    }
}

/// Waits for the answer to PSYNC: the replication id and the offset of the image.
fn begin(connection: &mut Connection, timeout: Duration, context: &Context) -> Result<(String, u64)> {
    connection.set_timeout(LOOK)?;
    let (until, mut heard) = (Instant::now() + BEGIN_WITHIN, Instant::now());
    let line = loop {
        context.check()?;
        match connection.reader().fill_buf() {
            Ok([]) => return Err(wire::closed()),
            Ok([b'\n', ..]) => {
                connection.reader().consume(1);
                heard = Instant::now();
            }
            Ok(_) => {
                connection.set_timeout(timeout)?;
                break connection.receive()?;
            }
            Err(error) if wire::is_late(&error) => {}
            Err(error) => return Err(Error::io("the connection broke before the image began", error)),
        }
        if heard.elapsed() > timeout || Instant::now() > until {
            return Err(Error::new(Kind::TimedOut, "the server did not begin with an image for us")
                .temporary()
                .hint("see INFO persistence: another child may be running"));
        }
    };
    let text = match line {
        Reply::Simple(text) => text,
        Reply::Error(text) => return Err(explain(refusal(&[b"PSYNC"], &text))),
        _ => return Err(damaged("the server answers PSYNC with something else")),
    };
    let mut words = text.split_whitespace();
    let (Some("FULLRESYNC"), Some(id), Some(offset)) = (words.next(), words.next(), words.next()) else {
        return Err(damaged(format!("the server answers PSYNC with `{text}`")));
    };
    let offset = offset.parse().map_err(|_| damaged("the server's offset is no number"))?;
    Ok((id.to_owned(), offset))
}

/// The receiving end.
pub(super) struct Link {
    pub connection: Connection,
    access: Access,
    endpoint: Endpoint,
    shared: Arc<Shared>,
    /// Offset of the next byte of the stream; `None` while the image comes.
    received: Option<u64>,
    heard: Instant,
    acknowledged: Instant,
    impatient_until: Instant,
}

impl Link {
    fn new(mut connection: Connection, access: Access, endpoint: Endpoint, shared: Arc<Shared>) -> Result<Self> {
        connection.set_timeout(LOOK)?;
        let now = Instant::now();
        Ok(Self {
            connection,
            access,
            endpoint,
            shared,
            received: None,
            heard: now,
            acknowledged: now,
            impatient_until: now,
        })
    }

    fn run(mut self, image_only: bool) {
        let outcome = self.image().and_then(|()| if image_only { Ok(()) } else { self.stream() });
        let shared = &self.shared;
        match outcome {
            Ok(()) => shared.stream.end(),
            Err(error) => {
                let (kind, message) = (error.kind(), describe(&error));
                let told = Error::new(kind, message.clone());
                shared.image.fail(&told);
                shared.stream.fail(&told);
                shared.state().failed = Some((kind, message));
            }
        }
        shared.changed.notify_all();
    }

    /// Receives the image.
    fn image(&mut self) -> Result<()> {
        let form = self.image_form()?;
        let shared = Arc::clone(&self.shared);
        let mut source = ImageSource { link: self, form, checksum: Checksum::default() };
        let mut facts = ImageFacts::default();
        match walk(&mut source, &mut facts, shared.collector.as_deref()) {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Unsupported => {
                facts.not_walked = Some(error.message().to_owned());
                if let Some(collector) = &shared.collector {
                    collector.fail(&error);
                }
            }
            Err(error) => return Err(error),
        }
        while !source.piece()?.is_empty() {}
        facts.bytes = source.checksum.bytes();
        facts.has_checksum = source.checksum.finish()?;
        shared.image.end();
        let start = shared.state().start;
        self.received = Some(start);
        self.impatient_until = Instant::now() + IMPATIENT_FOR;
        shared.state().image = Some(facts);
        shared.changed.notify_all();
        Ok(())
    }

    /// How the end of the image will be known.
    fn image_form(&mut self) -> Result<Form> {
        loop {
            let data = self.fill()?;
            if data[0] != b'\n' {
                break;
            }
            self.connection.reader().consume(1);
        }
        self.connection.set_timeout(self.access.timeout)?;
        let line = wire::read_line(self.connection.reader())?;
        self.connection.set_timeout(LOOK)?;
        if let Some(mark) = line.strip_prefix(b"$EOF:") {
            let mark = mark.try_into().map_err(|_| damaged("the mark of the image's end has a wrong length"))?;
            return Ok(Form::Mark { mark: Box::new(mark), held: Vec::new(), is_over: false });
        }
        let count = line.strip_prefix(b"$").and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
        match count {
            Some(left) => Ok(Form::Length { left }),
            None => Err(damaged(format!("the server sends `{}` for an image", String::from_utf8_lossy(&line)))),
        }
    }

    /// Receives commands until it is told to stop.
    fn stream(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let collector = shared.collector.clone();
        let keep_bytes = if collector.is_some() { u64::MAX } else { NAME_BYTES };
        let mut offset = shared.state().start;
        let mut source = BufReader::with_capacity(128 << 10, StreamSource { link: self });
        loop {
            let Some(command) = wire::read_command(&mut source, keep_bytes)? else { return Ok(()) };
            offset += command.wire_bytes;
            if let Some(collector) = &collector {
                collector.command(offset, &command)?;
            }
            let is_pause = source.buffer().is_empty();
            let mut state = shared.state();
            state.reached = offset;
            if command.is_no_write() {
                let before = state.noise.last().map_or(0, |(_, bytes)| *bytes);
                state.noise.push((offset, before + command.wire_bytes));
                if state.noise.len() > 2 * NOISE_MAX {
                    state.noise.drain(..NOISE_MAX);
                }
            }
            drop(state);
            // Who waits, waits for an offset that the server has sent whole.
            if is_pause {
                shared.changed.notify_all();
            }
        }
    }

    /// Passes on bytes of the image.
    pub fn keep_image(&self, piece: &[u8]) -> Result<()> {
        self.shared.image.push(piece)
    }

    /// Passes on bytes of the stream, and counts them: after a break it is taken up behind them.
    pub fn keep_stream(&mut self, piece: &[u8]) -> Result<()> {
        self.shared.stream.push(piece)?;
        if let Some(received) = &mut self.received {
            *received += piece.len() as u64;
        }
        Ok(())
    }

    /// Waits for bytes; never returns none.
    pub fn fill(&mut self) -> Result<&[u8]> {
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Cancelled, "the replica was detached"));
            }
            self.acknowledge();
            match self.connection.reader().fill_buf() {
                Ok([]) => self.resume(wire::closed())?,
                Ok(_) => break,
                Err(error) if wire::is_late(&error) => {
                    if self.heard.elapsed() > self.access.timeout {
                        return Err(Error::new(
                            Kind::TimedOut,
                            format!("{} sent nothing for {} s", self.endpoint, self.access.timeout.as_secs()),
                        ));
                    }
                }
                Err(error) => self.resume(Error::io("the connection to the server broke", error))?,
            }
        }
        self.heard = Instant::now();
        Ok(self.connection.reader().buffer())
    }

    /// Gives a sign of life once the stream is what we wait for.
    fn acknowledge(&mut self) {
        let every = if Instant::now() < self.impatient_until { LOOK } else { ACKNOWLEDGE_EVERY };
        if self.received.is_some() && self.acknowledged.elapsed() >= every {
            // A connection that takes no more will break when it is read, and be taken up again.
            drop(self.connection.send(&wire::encode(&[b"REPLCONF", b"ACK", b"0"])));
            self.acknowledged = Instant::now();
        }
    }

    /// Takes the stream up where it broke. While the image comes, nothing can be taken up.
    fn resume(&mut self, cause: Error) -> Result<()> {
        let Some(received) = self.received else {
            return Err(Error::new(Kind::Unreachable, "the connection was lost while the server sent its image")
                .source(cause)
                .hint("see the server's log; client-output-buffer-limit replica may be too small"));
        };
        let mut last = cause;
        for attempt in 0..RESUME_TRIES {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Cancelled, "the replica was detached"));
            }
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(200 << attempt));
            }
            match self.take_up(received) {
                Ok(()) => {
                    self.shared.state().resumed += 1;
                    return Ok(());
                }
                Err(error) if error.is_temporary() => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(Kind::Unreachable, "the connection to the server was lost and cannot be taken up").source(last))
    }

    fn take_up(&mut self, received: u64) -> Result<()> {
        let mut connection = Connection::open(&self.access, &self.endpoint)?;
        connection.command(&["REPLCONF", "capa", "eof", "capa", "psync2"])?;
        let id = self.shared.state().replication_id.clone();
        let reply = connection.command(&["PSYNC", &id, &(received + 1).to_string()])?;
        if !reply.text().starts_with("CONTINUE") {
            return Err(Error::new(
                Kind::PinLost,
                "the connection to the server was lost, and the server no longer has the commands since then",
            )
            .hint("raise repl-backlog-size and client-output-buffer-limit replica on the server"));
        }
        if let Some(new) = reply.text().split_whitespace().nth(1) {
            self.shared.state().replication_id = new.to_owned();
        }
        connection.set_timeout(LOOK)?;
        self.connection = connection;
        self.heard = Instant::now();
        Ok(())
    }
}

/// An error in one line, with its cause and hint.
fn describe(error: &Error) -> String {
    let mut text = error.message().to_owned();
    if let Some(cause) = std::error::Error::source(error) {
        text = format!("{text}: {cause}");
    }
    match error.hint_text() {
        Some(hint) => format!("{text} ({hint})"),
        None => text,
    }
}
