//! PREPARE, CUT, the observation of writes, and release.
//!
//! Prepare attaches to every master as a replica; the fork that costs is over when it returns. The
//! cut then names an offset in each stream, in one round trip. In mode `rdb` the fork is the cut.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;

use super::client::Connection;
use super::config::Mode;
use super::edges::Collector;
use super::replica::{Purpose, Replica};
use super::server::{self, Node, Papers, ServerFacts};
use super::spool::Disk;
use super::{Redis, wire};

/// How long a cut may wait for after `prepare`; the streams are received in the meantime.
const SAFE_FOR: Duration = Duration::from_secs(1800);
/// How long a server may take to answer within the cut.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long an observation waits for the stream to bring what the server has just counted.
const STREAM_WITHIN: Duration = Duration::from_millis(500);
/// How long `prepare` waits for a small image to be over, and the stream behind it to begin.
const FLOW_WITHIN: Duration = Duration::from_secs(1);
/// How often it asks meanwhile, and how many answers in a row show that nobody writes.
const FLOW_LOOK: Duration = Duration::from_millis(20);
const QUIET_LOOKS: u32 = 10;
/// How long another child of the server is waited for.
const CHILD_WITHIN: Duration = Duration::from_secs(300);

/// One master of the store.
pub(super) struct Shard {
    pub node: Node,
    pub facts: ServerFacts,
    pub papers: Papers,
    /// For questions within the cut.
    control: Connection,
    /// Attached in `prepare`, or in mode `rdb` in the cut.
    pub replica: Option<Replica>,
    /// What references need of its image.
    pub collector: Option<Arc<Collector>>,
    /// The offset of the cut.
    pub offset: u64,
}

/// What a driver value holds between calls.
#[derive(Default)]
pub(super) struct State {
    pub shards: Vec<Shard>,
    pub pinned: Option<Pin>,
    /// When the cut was, in milliseconds since 1970.
    pub cut_at_millis: i64,
    /// Whether the images were taken out of their queues, which can be done once.
    pub is_drained: bool,
    /// Whether the drain came to its end.
    pub is_whole: bool,
    /// For people, collected on the way.
    pub notes: Vec<String>,
}

/// Attaches to every master, unless that is so already.
pub(super) fn prepare(driver: &Redis, context: &Context) -> Result<Hold> {
    context.check()?;
    let endpoint = driver.endpoint()?;
    let (mut connection, info) = server::open(&driver.access, &endpoint)?;
    server::check_is_master(&mut connection, &info)?;
    let nodes = server::masters(&mut connection, &info)?;
    server::check_settled(&driver.access, &nodes)?;
    let mut state = driver.state();
    if is_attached(&state, &nodes, driver.settings.mode) {
        return Ok(hold(&state));
    }
    // Whatever an earlier try left is let go of first.
    *state = State::default();
    let attached: Vec<Result<Shard>> = std::thread::scope(|scope| {
        let servers = nodes.len();
        let tasks: Vec<_> =
            nodes.into_iter().map(|node| scope.spawn(move || attach(driver, node, servers, context))).collect();
        let panicked = |_| Err(Error::internal("attaching to a server panicked"));
        tasks.into_iter().map(|task| task.join().unwrap_or_else(panicked)).collect()
    });
    state.shards = attached.into_iter().collect::<Result<_>>()?;
    Ok(hold(&state))
}

fn hold(state: &State) -> Hold {
    let bytes = state.shards.iter().map(|shard| shard.facts.used_memory).sum();
    Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) }
}

/// Whether the attachments of an earlier call still serve.
fn is_attached(state: &State, nodes: &[Node], mode: Mode) -> bool {
    let serves = |shard: &Shard| match &shard.replica {
        Some(replica) => replica.check().is_ok(),
        None => mode == Mode::Rdb,
    };
    !state.is_drained
        && mode == Mode::Replica
        && !nodes.is_empty()
        && state.shards.iter().map(|shard| &shard.node).eq(nodes)
        && state.shards.iter().all(serves)
}

fn attach(driver: &Redis, node: Node, servers: usize, context: &Context) -> Result<Shard> {
    let (mut control, info) = server::open(&driver.access, &node.endpoint)?;
    server::check_is_master(&mut control, &info)?;
    if driver.settings.mode == Mode::Replica {
        server::check_sends_absolute_times(&info)?;
    }
    wait_for_child(&mut control, context)?;
    let (facts, papers) = server::facts(&mut control, &node, &info)?;
    let collector = driver.collector();
    let replica = match driver.settings.mode {
        Mode::Rdb => None,
        Mode::Replica => Some(replicate(driver, &node, servers, collector.clone(), context)?),
    };
    // The server answers one after the other: whatever it answers now, it answers after the fork.
    control.command(&["PING"])?;
    control.set_timeout(ANSWER_WITHIN)?;
    if let Some(replica) = &replica {
        flows(replica, &mut control, context)?;
    }
    Ok(Shard { node, facts, papers, control, replica, collector, offset: 0 })
}

fn replicate(
    driver: &Redis,
    node: &Node,
    servers: usize,
    collector: Option<Arc<Collector>>,
    context: &Context,
) -> Result<Replica> {
    let bytes_max = match driver.settings.spool_mib_max {
        0 => u64::MAX,
        mib => mib << 20,
    };
    let purpose = Purpose {
        access: &driver.access,
        endpoint: &node.endpoint,
        disk: Disk::new(driver.scratch.clone(), bytes_max, servers),
        image_only: driver.settings.mode == Mode::Rdb,
        collector,
    };
    Replica::attach(purpose, context)
}

/// Waits until the stream flows, if the image is so small that this is soon: a server begins it up to a
/// tenth of a second after the image, and an observation would wait for that with the writers held back.
/// A server that nobody writes to sends nothing either, and no observation waits for it. A replica that
/// fails meanwhile stays failed: the cut or the drain tells.
fn flows(replica: &Replica, control: &mut Connection, context: &Context) -> Result<()> {
    let begun = std::time::Instant::now();
    let left = || FLOW_WITHIN.saturating_sub(begun.elapsed());
    let Ok(Some(start)) = replica.wait(left(), context, |state| state.image.as_ref().map(|_| state.start)) else {
        return context.check();
    };
    for _ in 0..QUIET_LOOKS {
        let info = control.info("replication")?;
        let offset = wire::info_number(&info, "master_repl_offset").unwrap_or(start);
        if offset > start {
            drop(replica.wait(left(), context, |state| (state.reached >= offset).then_some(())));
            return context.check();
        }
        std::thread::sleep(FLOW_LOOK);
    }
    Ok(())
}

/// Our fork would wait for another child, and in mode `rdb` so would everyone in the cut.
fn wait_for_child(control: &mut Connection, context: &Context) -> Result<()> {
    let begun = std::time::Instant::now();
    loop {
        context.check()?;
        let info = control.info("persistence")?;
        let Some(child) = server::child_in_progress(&info) else { return Ok(()) };
        if begun.elapsed() > CHILD_WITHIN {
            return Err(Error::new(Kind::TimedOut, format!("{child} on {} and does not end", control.endpoint()))
                .temporary()
                .hint("see INFO persistence"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// `INFO` of every master, asked at once.
fn ask_all(driver: &Redis, state: &mut State) -> Result<Vec<String>> {
    for shard in &mut state.shards {
        if shard.control.is_broken() {
            shard.control = Connection::open(&driver.access, &shard.node.endpoint)?;
            shard.control.set_timeout(ANSWER_WITHIN)?;
        }
        shard.control.send(&wire::encode(&[b"INFO", b"replication"]))?;
    }
    let answers = state.shards.iter_mut().map(|shard| match shard.control.receive()? {
        wire::Reply::Error(text) => Err(super::client::refusal(&[b"INFO"], &text)),
        reply => Ok(reply.text()),
    });
    // All answers are taken, or a later question would get the answer to an earlier one.
    let answers: Vec<Result<String>> = answers.collect();
    answers.into_iter().collect()
}

/// The offset that a server states, if it still is the master that we attached to.
fn offset(shard: &Shard, info: &str) -> Result<u64> {
    let lost = |why: &str| {
        Error::new(Kind::PinLost, format!("{} {why}", shard.node.endpoint))
            .hint("the run is repeated with the new master")
    };
    if wire::info(info, "role") != Some("master") {
        return Err(lost("is no master any more"));
    }
    if let Some(replica) = &shard.replica {
        replica.check()?;
        let id = replica.look(|state| state.replication_id.clone());
        if wire::info(info, "master_replid") != Some(id.as_str()) {
            return Err(lost("has another replication id than at the begin"));
        }
    }
    let stated = wire::info_number(info, "master_repl_offset");
    stated.ok_or_else(|| Error::new(Kind::Corrupt, format!("{} states no offset", shard.node.endpoint)))
}

/// The offsets of all masters without the master's own signs of life; `None` before `prepare` and
/// in mode `rdb`, where no stream shows what was written.
pub(super) fn observe(driver: &Redis) -> Result<Option<Position>> {
    let mut state = driver.state();
    if driver.settings.mode == Mode::Rdb || state.shards.is_empty() {
        return Ok(None);
    }
    let infos = ask_all(driver, &mut state)?;
    let mut parts = Vec::new();
    for (shard, info) in state.shards.iter().zip(&infos) {
        let offset = offset(shard, info)?;
        let Some(replica) = &shard.replica else { return Ok(None) };
        // While the image still comes, signs of life cannot be told from writes: such an offset is
        // equal to nothing but itself.
        let known = |state: &super::replica::State| (state.reached >= offset).then(|| state.written(offset));
        let has_image = replica.look(|state| state.image.is_some());
        let within = if has_image { STREAM_WITHIN } else { Duration::ZERO };
        let text = match replica.wait(within, &Context::default(), known)? {
            Some(written) => format!("{written} written"),
            None => format!("{offset} sent"),
        };
        parts.push(format!("{}:{text}", shard.node.endpoint));
    }
    Ok(Some(Position::new("redis-offset", parts.join(","))))
}

/// Names the offset of every master; in mode `rdb` lets every master fork.
pub(super) fn cut(driver: &Redis, context: &Context, cut: &CutId) -> Result<Pin> {
    let mut state = driver.state();
    if let Some(pin) = state.pinned.as_ref().filter(|pin| pin.cut == *cut) {
        return Ok(pin.clone());
    }
    if state.shards.is_empty() || state.is_drained {
        return Err(Error::new(Kind::PinLost, "nothing is attached: the cut comes without a prepare"));
    }
    match driver.settings.mode {
        Mode::Replica => {
            let infos = ask_all(driver, &mut state)?;
            for (shard, info) in state.shards.iter_mut().zip(&infos) {
                shard.offset = offset(shard, info)?;
            }
        }
        Mode::Rdb => fork(driver, &mut state, context)?,
    }
    let parts = state.shards.iter().map(|shard| {
        let id = shard.replica.as_ref().map(|replica| replica.look(|state| state.replication_id.clone()));
        format!("{}:{}@{}", id.unwrap_or_default(), shard.offset, shard.node.endpoint)
    });
    let position = Position::new("redis-offset", parts.collect::<Vec<_>>().join(","));
    // Nothing of ours stays on a server: it drops a replica whose connection ends.
    let pin = Pin { cut: cut.clone(), position, remains: Vec::new() };
    state.cut_at_millis = super::drain::now_millis();
    state.pinned = Some(pin.clone());
    Ok(pin)
}

/// Lets every master make an image now.
fn fork(driver: &Redis, state: &mut State, context: &Context) -> Result<()> {
    for shard in &mut state.shards {
        shard.replica = None;
        shard.collector = driver.collector();
    }
    let forked: Vec<Result<Replica>> = std::thread::scope(|scope| {
        let servers = state.shards.len();
        let attach = |shard: &Shard| {
            let (node, collector) = (shard.node.clone(), shard.collector.clone());
            scope.spawn(move || replicate(driver, &node, servers, collector, context))
        };
        let tasks: Vec<_> = state.shards.iter().map(attach).collect();
        let panicked = |_| Err(Error::internal("attaching to a server panicked"));
        tasks.into_iter().map(|task| task.join().unwrap_or_else(panicked)).collect()
    });
    state.notes.clear();
    for (shard, replica) in state.shards.iter_mut().zip(forked) {
        let replica = replica?;
        shard.offset = replica.look(|state| state.start);
        shard.replica = Some(replica);
        let info = shard.control.info("stats")?;
        if let Some(micros) = wire::info_number(&info, "latest_fork_usec") {
            state.notes.push(format!("{}: the fork in the cut took {micros} µs", shard.node.endpoint));
        }
    }
    Ok(())
}

/// Checks that nothing was lost since the cut, and that the cluster still is the same.
pub(super) fn still_valid(driver: &Redis, pin: &Pin) -> Result<Validity> {
    let state = driver.state();
    if state.pinned.as_ref() != Some(pin) {
        return Ok(Validity::Lost("the attachment was let go of".to_owned()));
    }
    if !state.is_whole {
        for replica in state.shards.iter().filter_map(|shard| shard.replica.as_ref()) {
            if let Err(error) = replica.check() {
                return Ok(Validity::Lost(format!("{}: {error}", replica.endpoint)));
            }
        }
    }
    if state.shards.len() < 2 {
        return Ok(Validity::Valid);
    }
    let (mut connection, info) = server::open(&driver.access, &state.shards[0].node.endpoint)?;
    let settled = server::masters(&mut connection, &info)
        .and_then(|nodes| server::check_settled(&driver.access, &nodes).map(|()| nodes));
    let nodes = match settled {
        Ok(nodes) => nodes,
        Err(error) if error.kind() == Kind::Conflict => return Ok(Validity::Lost(error.message().to_owned())),
        Err(error) => return Err(error),
    };
    if state.shards.iter().map(|shard| &shard.node.slots).ne(nodes.iter().map(|node| &node.slots)) {
        return Ok(Validity::Lost("slots of the cluster moved to other masters".to_owned()));
    }
    Ok(Validity::Valid)
}

/// Detaches from everything.
pub(super) fn release(driver: &Redis) {
    *driver.state() = State::default();
}
