//! The watchdog process itself.
//!
//! It has one duty and gives up nothing for it: an undo that fails is tried again, with growing
//! pauses, until it succeeds. A platform left paused is the worst thing that can happen here.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use stillpoint_core::driver::Driver;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::{Secret, Store};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{Command, Instructions};
use crate::pause::{Act, Databases, OpenDatabase, Performer, kill_group};

/// How long one undo act may take.
const ACT_WITHIN: Duration = Duration::from_secs(10);
/// How long one undo may keep the next one from beginning.
const NEXT_AFTER: Duration = Duration::from_secs(1);
/// The first pause between rounds of undoing, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// After the engine's sudden death a pause call of its may still be on its way; the undo is repeated
/// after this long, so that such a call does not have the last word.
const REPEAT_AFTER: Duration = Duration::from_millis(700);

/// Runs the watchdog on standard input and output until it is no longer needed. The program calls it
/// when its first argument is [`SUBCOMMAND`](super::SUBCOMMAND), before anything else.
///
/// Fails only if it was given nothing that it could undo.
pub fn main() -> Result<()> {
    // Already a leader of its session when started from one: nothing to leave then.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "the watchdog leads its session already");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .or_io(|| "cannot start the watchdog's runtime".to_owned())?;
    runtime.block_on(serve())
}

async fn serve() -> Result<()> {
    let _handlers = ignore_signals()?;
    let mut lines = listen()?;
    let Some(first) = lines.recv().await else { return Ok(()) };
    let instructions: Instructions =
        serde_json::from_str(&first).map_err(|_| Error::internal("the watchdog cannot read its instructions"))?;
    let mut keeper = Keeper::new(instructions)?;
    say("ready");
    keeper.watch(&mut lines).await;
    Ok(())
}

/// Handlers that do nothing, which is not the same as the default: the default ends the process.
fn ignore_signals() -> Result<Vec<tokio::signal::unix::Signal>> {
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit(), SignalKind::pipe()]
        .into_iter()
        .map(|kind| signal(kind).or_io(|| "cannot ignore the terminal's signals".to_owned()))
        .collect()
}

/// The engine's lines. The channel ends when the pipe is closed or broken, which is the same to us.
fn listen() -> Result<UnboundedReceiver<String>> {
    let (sender, lines) = unbounded_channel();
    std::thread::Builder::new()
        .name("pipe".to_owned())
        .spawn(move || {
            for line in std::io::stdin().lock().lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        })
        .or_io(|| "cannot start the thread that listens to the engine".to_owned())?;
    Ok(lines)
}

/// Tells the engine. That nobody listens any more is the normal case after its death.
fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    if writeln!(output, "{line}").and_then(|()| output.flush()).is_err() {
        tracing::debug!("the engine does not listen");
    }
}

struct Keeper {
    run: String,
    undo: Vec<Act>,
    performer: Arc<Performer>,
    /// Held under a lock as long as this process may still undo something.
    report: File,
    armed_until: Option<Instant>,
    group: Option<u32>,
}

impl Keeper {
    fn new(instructions: Instructions) -> Result<Self> {
        let Instructions { run, undo, databases, secrets, report } = instructions;
        let performer = Arc::new(Performer::new(Databases::new(opener(databases, secrets)))?);
        let report = open_report(&report)?;
        Ok(Self { run, undo, performer, report, armed_until: None, group: None })
    }

    async fn watch(&mut self, lines: &mut UnboundedReceiver<String>) {
        loop {
            let line = match self.armed_until {
                None => lines.recv().await,
                Some(deadline) => {
                    tokio::select! {
                        line = lines.recv() => line,
                        () = tokio::time::sleep_until(deadline.into()) => {
                            self.fire("the pause budget is used up").await;
                            say("fired");
                            // Writers run again. The engine may still add to the pause by mistake, so
                            // its death or silence is answered by one more undo.
                            self.armed_until = None;
                            self.after_fire(lines).await;
                            return;
                        }
                    }
                }
            };
            let Some(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(Command::Arm { deadline_millis }) => {
                    self.armed_until = Some(Instant::now() + Duration::from_millis(deadline_millis));
                    say("armed");
                }
                Ok(Command::Group { id }) => self.group = id,
                Ok(Command::Disarm) => return,
                // An engine that speaks nonsense is as good as dead.
                Err(_) => break,
            }
        }
        if self.armed_until.is_some() {
            self.fire("the engine is gone").await;
            tokio::time::sleep(REPEAT_AFTER).await;
            self.fire("once more, in case a call of the engine was still on its way").await;
        }
    }

    /// Waits for the engine's word or end after the deadline's undo.
    async fn after_fire(&mut self, lines: &mut UnboundedReceiver<String>) {
        while let Some(line) = lines.recv().await {
            match serde_json::from_str(&line) {
                Ok(Command::Disarm) => return,
                Ok(Command::Group { id }) => self.group = id,
                _ => {}
            }
        }
        self.fire("the engine is gone, after its budget was used up").await;
    }

    /// Undoes everything, last step first, until all of it has succeeded. Each is tried again by
    /// itself: one that fails or hangs must not keep the others from being undone.
    async fn fire(&mut self, why: &str) {
        let began = Instant::now();
        if let Some(group) = self.group.take() {
            kill_group(group);
        }
        let (sender, mut tries) = unbounded_channel();
        let mut log = Log { why, began, rounds: 0, last_error: None };
        for act in self.undo.iter().rev() {
            let (first, first_tried) = tokio::sync::oneshot::channel();
            tokio::spawn(undo(Arc::clone(&self.performer), act.clone(), sender.clone(), first));
            // The order counts as long as it costs little.
            if tokio::time::timeout(NEXT_AFTER, first_tried).await.is_err() {
                tracing::debug!(%act, "the next undo begins before this one has ended");
            }
        }
        drop(sender);
        while let Some(tried) = tries.recv().await {
            self.note(&mut log, tried);
        }
        self.write_report(&log, "writers were let go");
    }

    fn note(&self, log: &mut Log<'_>, tried: Tried) {
        log.rounds = log.rounds.max(tried.rounds);
        if let Some(error) = tried.error {
            log.last_error = Some(error);
            if tried.rounds == 1 || tried.rounds.is_multiple_of(20) {
                self.write_report(log, "still trying");
            }
        }
    }

    /// Writes one line for people. A full disk must not keep us from the next undo.
    fn write_report(&self, log: &Log<'_>, what: &str) {
        let line = serde_json::json!({
            "at": Timestamp::now(), "run": self.run, "why": log.why, "what": what, "rounds": log.rounds,
            "millis": u64::try_from(log.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "last_error": log.last_error,
        });
        if (&self.report).write_all(format!("{line}\n").as_bytes()).is_err() {
            tracing::debug!("the watchdog's report cannot be written");
        }
    }
}

/// One firing, for the report.
struct Log<'a> {
    why: &'a str,
    began: Instant,
    rounds: u32,
    last_error: Option<String>,
}

/// One try of one act.
struct Tried {
    rounds: u32,
    error: Option<String>,
}

/// Tries one act until it succeeds. `first` is told after the first try.
async fn undo(
    performer: Arc<Performer>,
    act: Act,
    tries: UnboundedSender<Tried>,
    first: tokio::sync::oneshot::Sender<()>,
) {
    let mut first = Some(first);
    let mut back_off = BACK_OFF.0;
    for rounds in 1.. {
        let (working, wanted) = (Arc::clone(&performer), act.clone());
        // On its own, so that even a broken try is followed by another one.
        let work = tokio::spawn(async move { working.perform(&wanted, ACT_WITHIN, &|_| {}).await });
        let error = match work.await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(format!("{act}: {error}")),
            Err(panic) => Some(format!("{act}: {panic}")),
        };
        let done = error.is_none();
        if tries.send(Tried { rounds, error }).is_err() {
            tracing::debug!("nobody keeps the report of this undo");
        }
        if let Some(first) = first.take()
            && first.send(()).is_err()
        {
            tracing::debug!("the first try took longer than the next undo waits");
        }
        if done {
            return;
        }
        tokio::time::sleep(back_off).await;
        back_off = (back_off * 2).min(BACK_OFF.1);
    }
}

fn open_report(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .or_io(|| format!("cannot write the watchdog's report `{}`", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| Error::io("another watchdog of this run is alive", error.into()))?;
    Ok(file)
}

/// Opens stores with the settings and secrets that came over the pipe.
fn opener(databases: BTreeMap<StoreName, Store>, secrets: BTreeMap<String, String>) -> OpenDatabase {
    let scratch: Arc<Mutex<Vec<tempfile::TempDir>>> = Arc::default();
    Arc::new(move |name| -> Result<Arc<dyn Driver>> {
        let store = databases.get(name).ok_or_else(|| {
            Error::new(Kind::Config, "the store of a pause step is not described").store(name.as_str())
        })?;
        let known = |secret: &Secret| {
            let value = secrets.get(&secret.0).cloned();
            value.ok_or_else(|| Error::new(Kind::Config, "a secret of the store did not reach the watchdog"))
        };
        let folder = tempfile::tempdir().or_io(|| "cannot make a temporary folder".to_owned())?;
        let request = stillpoint_drivers::OpenRequest {
            store: name,
            settings: &store.settings,
            scratch: folder.path().to_owned(),
            kept: folder.path().to_owned(),
            secrets: &known,
        };
        let driver = (stillpoint_drivers::find(&store.driver)?.open)(&request)?;
        scratch.lock().unwrap_or_else(PoisonError::into_inner).push(folder);
        Ok(driver)
    })
}
