//! The faults: what goes wrong, when, and how it is put right again.

use std::fmt;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stillpoint_testkit::chaos;
use stillpoint_testkit::proxy::Weather;

use stillpoint_testkit::platform::{LINES, Stage};

/// How long a fault waits for a pause that may never come.
const PAUSE_WITHIN: Duration = Duration::from_secs(60);

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The engine is killed.
    KillEngine,
    /// The engine stands still for a while.
    StopEngine(Duration),
    /// A server is killed, and started again after a while.
    KillServer(&'static str, Duration),
    /// The engine's line to a server is cut for a while.
    CutEngine(&'static str, Duration),
    /// The engine's line to a server holds everything for a while.
    HoldEngine(&'static str, Duration),
    /// Both the engine's and the application's lines to a server are cut.
    CutServer(&'static str, Duration),
    /// The engine's line to a server is slow until the run ends.
    SlowEngine(&'static str, Duration),
}

impl Fault {
    /// One of them; every fourth is none, so that rounds without fault prove the common case.
    pub fn any(random: &mut fastrand::Rng) -> Self {
        let line = LINES[random.usize(..LINES.len())];
        let time = Duration::from_millis(random.u64(50..6_000));
        match random.u32(..16) {
            0..4 => Self::None,
            4..8 => Self::KillEngine,
            8..10 => Self::StopEngine(time),
            10..12 => Self::KillServer(line, time),
            12 => Self::CutEngine(line, time),
            13 => Self::HoldEngine(line, time),
            14 => Self::CutServer(line, time),
            _ => Self::SlowEngine(line, Duration::from_millis(random.u64(1..30))),
        }
    }

    /// Its name without its particulars.
    pub fn kind(self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::KillEngine => "engine killed".to_owned(),
            Self::StopEngine(_) => "engine stopped".to_owned(),
            Self::KillServer(name, _) => format!("{name} killed"),
            Self::CutEngine(name, _) => format!("engine cut from {name}"),
            Self::HoldEngine(name, _) => format!("engine held from {name}"),
            Self::CutServer(name, _) => format!("{name} cut"),
            Self::SlowEngine(name, _) => format!("{name} slow"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        match self {
            Self::StopEngine(time)
            | Self::KillServer(_, time)
            | Self::CutEngine(_, time)
            | Self::HoldEngine(_, time)
            | Self::CutServer(_, time) => write!(f, " for {:.1} s", time.as_secs_f64()),
            Self::SlowEngine(_, delay) => write!(f, " by {} ms", delay.as_millis()),
            _ => Ok(()),
        }
    }
}

/// When it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long after the run began.
    After(Duration),
    /// So long after the writers were seen to be held back.
    InPause(Duration),
}

impl Moment {
    /// A moment of a run that takes about `usual`.
    pub fn any(random: &mut fastrand::Rng, usual: Duration) -> Self {
        if random.u32(..5) < 2 {
            return Self::InPause(Duration::from_micros(random.u64(..20_000)));
        }
        Self::After(usual.mul_f64(random.f64() * 1.2))
    }

    /// Waits for it; false if the run ended before, or someone stops the soak.
    pub fn wait(self, stage: &Stage, child: &mut Child, stop: &AtomicBool) -> Result<bool, String> {
        let begun = Instant::now();
        let ended = |child: &mut Child| {
            let status = child.try_wait().map_err(|error| error.to_string())?;
            Ok::<_, String>(status.is_some() || stop.load(Ordering::Relaxed))
        };
        let offset = match self {
            Self::After(time) => time,
            Self::InPause(offset) => {
                while stage.oracle()?["paused"] != true {
                    if ended(child)? || begun.elapsed() > PAUSE_WITHIN {
                        return Ok(false);
                    }
                    std::thread::sleep(Duration::from_micros(300));
                }
                begun.elapsed() + offset
            }
        };
        while begun.elapsed() < offset {
            if ended(child)? {
                return Ok(false);
            }
            std::thread::sleep((offset - begun.elapsed()).min(Duration::from_millis(5)));
        }
        Ok(!ended(child)?)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::After(time) => write!(f, "at {:.2} s", time.as_secs_f64()),
            Self::InPause(offset) => write!(f, "{:.1} ms into the pause", offset.as_secs_f64() * 1e3),
        }
    }
}

/// Lets it go wrong, and puts it right again after its time. The engine that was killed stays dead.
pub fn strike(fault: Fault, stage: &mut Stage, child: &mut Child) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{fault}: {error}");
    match fault {
        Fault::None => Ok(()),
        Fault::KillEngine => child.kill().map_err(failed),
        Fault::StopEngine(time) => {
            chaos::suspend(child).map_err(failed)?;
            std::thread::sleep(time);
            chaos::wake(child).map_err(failed)
        }
        Fault::KillServer(name, time) => {
            kill(stage, name).map_err(failed)?;
            std::thread::sleep(time);
            start(stage, name).map_err(failed)
        }
        Fault::CutEngine(name, time) => for_a_while(stage, name, Weather::Cut, time, false),
        Fault::HoldEngine(name, time) => for_a_while(stage, name, Weather::Held, time, false),
        Fault::CutServer(name, time) => for_a_while(stage, name, Weather::Cut, time, true),
        Fault::SlowEngine(name, delay) => {
            stage.engine_lines[name].set(Weather::Slow(delay));
            Ok(())
        }
    }
}

/// Puts right what lasts until the run ends.
pub fn heal(stage: &Stage) {
    for line in stage.engine_lines.values().chain(stage.writer_lines.values()) {
        line.set(Weather::Fair);
    }
}

fn for_a_while(stage: &Stage, name: &str, weather: Weather, time: Duration, both: bool) -> Result<(), String> {
    let lines = [Some(&stage.engine_lines[name]), both.then(|| &stage.writer_lines[name])];
    lines.iter().flatten().for_each(|line| line.set(weather));
    std::thread::sleep(time);
    lines.iter().flatten().for_each(|line| line.set(Weather::Fair));
    Ok(())
}

fn kill(stage: &mut Stage, name: &str) -> std::io::Result<()> {
    match name {
        "postgres" => stage.postgres.kill(),
        "redis" => stage.redis.kill(),
        _ => stage.minio.kill(),
    }
}

fn start(stage: &mut Stage, name: &str) -> std::io::Result<()> {
    match name {
        "postgres" => stage.postgres.start_again(),
        "redis" => stage.redis.start_again(),
        _ => stage.minio.start_again(),
    }
}
