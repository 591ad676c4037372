//! `cargo xtask test --soak MINUTES`: chaos on the example platform, judged by an oracle.
//!
//! Writers publish without rest while backups are made and the engine, its servers or the network
//! between them are killed, stopped, cut or held up at a random moment. After each round the newest
//! point is restored into fresh targets and judged: what was acknowledged before the cut is there,
//! what was begun after it is not, and no store is ahead of another. The seed decides everything that
//! we decide; the machine's own timing is what it is.
//!
//! Platforms lie in memory if there is room: each leaves tens of thousands of small files, and removing
//! those from a disk can take as long as the rounds that made them. SIGHUP, SIGINT and SIGTERM end the soak in
//! order: servers stopped, folders removed, the report so far on the screen.

mod fault;
mod report;
mod round;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use stillpoint_testkit::platform::{self, Options, Stage, TEMPLATE};

use crate::programs;
use report::Report;

/// A platform is made anew after so many versions, because a restore takes as long as there is data.
const VERSIONS_MAX: u64 = 6_000;
/// Without so much free memory, as a file system, platforms lie on disk.
const MEMORY_BYTES_MIN: u64 = 6 << 30;

/// What a soak is.
#[derive(Debug, Clone)]
pub struct Soak {
    /// How long.
    pub minutes: f64,
    /// What to begin with; a random one if none is given. It is printed.
    pub seed: Option<u64>,
    /// Programs as tests are built, instead of released ones.
    pub dev: bool,
    /// The folder that holds the programs, instead of building them.
    pub programs: Option<PathBuf>,
    /// Another description of the platform, with the same names between braces.
    pub platform: Option<PathBuf>,
    /// Publications per second of all writers; 0 means as fast as they can.
    pub per_second: f64,
}

/// Runs rounds until the time is over; returns whether no obligation was broken.
pub fn run(root: &Path, soak: &Soak) -> Result<bool, String> {
    let seed = soak.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut random = fastrand::Rng::with_seed(seed);
    let programs = programs::get(root, soak.programs.as_deref(), !soak.dev)?;
    let template = match &soak.platform {
        Some(path) => std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?,
        None => TEMPLATE.to_owned(),
    };
    let options = Options { per_second: soak.per_second, template, overwrites: true, ..Options::default() };
    let stop = listen()?;
    println!("soak: {} min, seed {seed}, in {}", soak.minutes, place()?.display());
    let until = Instant::now() + Duration::from_secs_f64(soak.minutes * 60.0);
    let mut report = Report::new(seed);
    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
        let mut stage = match Stage::start(&programs, options.clone()) {
            Ok(stage) => stage,
            Err(_) if stop.load(Ordering::Relaxed) => break,
            Err(error) => return Err(error),
        };
        report.platforms += 1;
        let violations_before = report.violations.len();
        let mut memory = round::Memory::new(Arc::clone(&stop));
        let ended = generation(&mut stage, &mut random, &mut report, &mut memory, until);
        // Whoever stops the soak from a terminal stops its servers as well.
        if let Err(error) = ended
            && !stop.load(Ordering::Relaxed)
        {
            report.violation(format!("the soak itself could not go on: {error}"));
        }
        if report.violations.len() > violations_before {
            println!("soak: the platform with the violation is left in {}", stage.keep().display());
        }
    }
    let is_stopped = stop.load(Ordering::Relaxed);
    if report.restores == 0 && !is_stopped {
        report.violation("no point was restored: nothing was judged".to_owned());
    }
    // The first bundle takes about as long as two rounds.
    if report.restores > 3 && (report.deleted == 0 || report.bundles == 0) {
        report.violation("no object was deleted or replaced in parts before a cut: too little was judged".to_owned());
    }
    println!("{}", report.summary());
    if is_stopped {
        return Err("stopped on request".to_owned());
    }
    Ok(report.violations.is_empty())
}

/// What SIGHUP, SIGINT and SIGTERM set.
fn listen() -> Result<Arc<AtomicBool>, String> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        let listens = signal_hook::flag::register(signal, Arc::clone(&stop));
        listens.map_err(|error| format!("cannot listen for signal {signal}: {error}"))?;
    }
    Ok(stop)
}

/// Where platforms lie: where `TMPDIR` says, or in memory, or where temporary files lie.
fn place() -> Result<PathBuf, String> {
    if std::env::var_os("TMPDIR").is_none()
        && let Some(folder) = platform::memory_folder(MEMORY_BYTES_MIN)
    {
        let taken = |other: PathBuf| format!("temporary files lie in {} already", other.display());
        tempfile::env::override_temp_dir(&folder).map_err(taken)?;
    }
    Ok(tempfile::env::temp_dir())
}

/// Rounds on one platform, until it has grown too large or the time is over.
fn generation(
    stage: &mut Stage,
    random: &mut fastrand::Rng,
    report: &mut Report,
    memory: &mut round::Memory,
    until: Instant,
) -> Result<(), String> {
    while Instant::now() < until {
        report.rounds += 1;
        let line = round::run(stage, random, report, memory)?;
        println!("{:>4} {:>7.1} s  {line}", report.rounds, report.begun.elapsed().as_secs_f64());
        let acknowledged = stage.oracle()?["acknowledged"].as_u64();
        let acknowledged = acknowledged.ok_or("the application does not say what it acknowledged")?;
        if acknowledged > VERSIONS_MAX || report.violations.len() > report::VIOLATIONS_MAX {
            return Ok(());
        }
    }
    Ok(())
}
