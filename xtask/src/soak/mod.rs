//! `cargo xtask test --soak MINUTES`: chaos on the example platform, judged by an oracle.
//!
//! Writers publish without rest while backups are made and the engine, its servers or the network
//! between them are killed, stopped, cut or held up at a random moment. After each round the newest
//! point is restored into fresh targets and judged: what was acknowledged before the cut is there,
//! what was begun after it is not, and no store is ahead of another. The seed decides everything that
//! we decide; the machine's own timing is what it is.

mod fault;
mod report;
mod round;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stillpoint_testkit::platform::{Options, Stage, TEMPLATE};

use crate::programs;
use report::Report;

/// A platform is made anew after so many versions, because a restore takes as long as there is data.
const VERSIONS_MAX: u64 = 6_000;

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
    let options = Options { per_second: soak.per_second, template, ..Options::default() };
    println!("soak: {} min, seed {seed}", soak.minutes);
    let begun = Instant::now();
    let length = Duration::from_secs_f64(soak.minutes * 60.0);
    let mut report = Report::new(seed);
    while begun.elapsed() < length {
        let mut stage = Stage::start(&programs, options.clone())?;
        report.platforms += 1;
        let violations_before = report.violations.len();
        let ended = generation(&mut stage, &mut random, &mut report, begun, length);
        if let Err(error) = ended {
            report.violation(format!("the soak itself could not go on: {error}"));
        }
        if report.violations.len() > violations_before {
            println!("soak: the platform with the violation is left in {}", stage.keep().display());
        }
    }
    println!("{}", report.summary(begun.elapsed()));
    Ok(report.violations.is_empty())
}

/// Rounds on one platform, until it has grown too large or the time is over.
fn generation(
    stage: &mut Stage,
    random: &mut fastrand::Rng,
    report: &mut Report,
    begun: Instant,
    length: Duration,
) -> Result<(), String> {
    let mut memory = round::Memory::default();
    while begun.elapsed() < length {
        report.rounds += 1;
        let line = round::run(stage, random, report, &mut memory)?;
        println!("{:>4} {:>7.1} s  {line}", report.rounds, begun.elapsed().as_secs_f64());
        let acknowledged = stage.oracle()?["acknowledged"].as_u64().unwrap_or(0);
        if acknowledged > VERSIONS_MAX || report.violations.len() > report::VIOLATIONS_MAX {
            return Ok(());
        }
    }
    Ok(())
}
