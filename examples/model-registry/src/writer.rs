//! Writers: each publishes one model, version after version, and notes what it began and what all
//! stores acknowledged. What fails is tried again until it succeeds, as a queue's worker would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::content::Version;
use crate::gate::Gate;
use crate::record::{Happening, Record, Recorder};
use crate::settings::Settings;
use crate::stores::Stores;
use crate::uploader::Uploader;
use crate::{Attempted, Result};

/// How long a writer waits before it tries again.
pub(crate) const TRY_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// All writers, and what the hooks ask them about.
#[derive(Debug)]
pub struct Writers {
    /// The gate that every publication passes.
    pub gate: Gate,
    /// Publications that all stores have acknowledged, by this process.
    pub acknowledged: Arc<AtomicU64>,
    /// Tries that failed and were made again.
    pub failures: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Writers {
    /// Starts them where the record says that they were.
    pub fn start(settings: &Settings) -> Result<Self> {
        let record = Record::load(&settings.record)?;
        let recorder = Arc::new(Recorder::open(&settings.record)?);
        let gate = Gate::new(Duration::from_secs_f64(settings.lease_seconds), Arc::clone(&recorder));
        let (acknowledged, failures) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for number in 0..settings.writers {
            let next = match record.last_of(number) {
                Some((last, true)) => Version { number: last.number + 1, ..last },
                Some((last, false)) => last,
                None => Version { writer: number, number: 1 },
            };
            let writer = Writer {
                settings: settings.clone(),
                recorder: Arc::clone(&recorder),
                gate: gate.clone(),
                acknowledged: Arc::clone(&acknowledged),
                failures: Arc::clone(&failures),
                stop: Arc::clone(&stop),
            };
            let thread = std::thread::Builder::new().name(format!("writer {number}"));
            threads.push(thread.spawn(move || writer.run(next)).attempted("start a writer")?);
        }
        if settings.overwrites {
            let next = record.bundles.last_key_value().map_or(1, |(last, _)| last + 1);
            let uploader = Uploader {
                bucket: settings.s3.clone(),
                recorder: Arc::clone(&recorder),
                gate: gate.clone(),
                failures: Arc::clone(&failures),
                stop: Arc::clone(&stop),
            };
            let thread = std::thread::Builder::new().name("uploader".to_owned());
            threads.push(thread.spawn(move || uploader.run(next)).attempted("start the uploader")?);
        }
        Ok(Self { gate, acknowledged, failures, stop, threads })
    }

    /// Lets every writer end its publication, and waits for them.
    pub fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.gate.resume();
        for thread in self.threads {
            thread.join().map_err(|_| "a writer panicked".to_owned())??;
        }
        Ok(())
    }
}

struct Writer {
    settings: Settings,
    recorder: Arc<Recorder>,
    gate: Gate,
    acknowledged: Arc<AtomicU64>,
    failures: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Writer {
    fn run(&self, mut version: Version) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.attempted("start a writer")?;
        let mut stores = None;
        let every = match self.settings.per_second {
            rate if rate > 0.0 => Duration::from_secs_f64(f64::from(self.settings.writers) / rate),
            _ => Duration::ZERO,
        };
        while !self.stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            self.publish(&runtime, &mut stores, version)?;
            version.number += 1;
            wait(&self.stop, every.saturating_sub(began.elapsed()));
        }
        Ok(())
    }

    /// Publishes one version, however many tries it takes. Gives up only when asked to stop.
    fn publish(&self, runtime: &tokio::runtime::Runtime, stores: &mut Option<Stores>, version: Version) -> Result<()> {
        let _passage = self.gate.pass();
        self.recorder.note(&Happening::Begun(version))?;
        while !self.stop.load(Ordering::Relaxed) {
            let done = runtime.block_on(async {
                let open = match stores {
                    Some(open) => open,
                    None => stores.insert(Stores::connect(&self.settings).await?),
                };
                open.publish(version).await
            });
            match done {
                Ok(()) => {
                    self.recorder.note(&Happening::Acknowledged(version))?;
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(error) => {
                    *stores = None;
                    if self.failures.fetch_add(1, Ordering::Relaxed).is_multiple_of(50) {
                        complain(&version.commit_subject(), &error);
                    }
                    wait(&self.stop, TRY_AGAIN_AFTER);
                }
            }
        }
        Ok(())
    }
}

/// Sleeps in small parts, so that a stop is heard.
pub(crate) fn wait(stop: &AtomicBool, time: Duration) {
    let until = Instant::now() + time;
    while !stop.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

#[allow(clippy::print_stderr)]
pub(crate) fn complain(what: &str, error: &str) {
    eprintln!("{what} is tried again: {error}");
}
