//! The Redis bench: a gigabyte of mixed keys, backed up by us and by the server's own client, and
//! brought back by us and through that client.
//!
//! Nothing of what is measured is on a disk that waits: servers, copies and repositories share the
//! directory that the bench is given.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use stillpoint_testkit::servers::Redis;

use super::BenchArgs;
use super::measure::{Runs, run as measure};
use super::table::Row;
use crate::rig::{self, Rig};

/// Bytes of commands at scale 1.
const BYTES: f64 = 1e9;
/// The backup may take so much of the client's time; the restore must be faster than the client.
const BACKUP_MAX: f64 = 1.2;
const RESTORE_MAX: f64 = 1.0;
/// What no job of ours may take, in MB.
const PEAK_MB: f64 = 300.0;
/// Servers wait for more replicas before they send an image; both sides would wait alike.
const AT_ONCE: [&str; 2] = ["--repl-diskless-sync-delay", "0"];

struct Bench {
    ours: PathBuf,
    folder: PathBuf,
    source: Redis,
    target: Redis,
    runs: Runs,
}

/// Fills a server, runs all rounds, and returns the rows.
pub fn run(root: &Path, args: &BenchArgs) -> Result<Vec<Row>, String> {
    let ours = super::files::build(root)?;
    std::fs::create_dir_all(&args.dir).map_err(|error| error.to_string())?;
    let rig = Rig::load(root, "redis")?;
    rig::obtain(&rig, false)?;
    let outcome = rounds(&rig::program(&rig)?, ours, args);
    super::files::remove(&args.dir)?;
    Ok(outcome?.rows())
}

fn rounds(program: &Path, ours: PathBuf, args: &BenchArgs) -> Result<Bench, String> {
    let start = |name: &str| {
        let folder = tempfile::Builder::new().prefix(name).tempdir_in(&args.dir).map_err(|error| error.to_string())?;
        Redis::over(program, folder, &AT_ONCE).map_err(|error| error.to_string())
    };
    let (source, target) = (start("source")?, start("target")?);
    let mut bench = Bench { ours, folder: args.dir.clone(), source, target, runs: Runs::default() };
    write_commands(&bench.commands(), (BYTES * args.scale) as u64).map_err(|error| error.to_string())?;
    measure(&mut bench.load(&bench.source))?;
    for round in 0..args.rounds {
        println!("round {} of {}", round + 1, args.rounds);
        bench.round(round)?;
    }
    Ok(bench)
}

impl Bench {
    fn commands(&self) -> PathBuf {
        self.folder.join("commands.resp")
    }

    fn client(&self, server: &Redis, args: &[&str]) -> Command {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &server.port().to_string()]).args(args);
        command
    }

    /// Sends all commands through the client.
    fn load(&self, server: &Redis) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "exec redis-cli -p \"$0\" --pipe < \"$1\""]).arg(server.port().to_string());
        command.arg(self.commands());
        command
    }

    fn stillpoint(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.ours);
        command.arg("--config").arg(self.folder.join("platform.yaml")).args(args);
        command.env("XDG_STATE_HOME", self.folder.join("state"));
        command
    }

    /// Each step by both; who is first changes from round to round.
    fn round(&mut self, round: usize) -> Result<(), String> {
        for name in ["ours", "state"] {
            let path = self.folder.join(name);
            if path.exists() {
                super::files::remove(&path)?;
            }
        }
        self.write_platform()?;
        measure(&mut self.stillpoint(&["init"]))?;
        for turn in 0..2 {
            if (turn + round).is_multiple_of(2) {
                let run = measure(&mut self.stillpoint(&["backup"]))?;
                self.runs.note("backup", "stillpoint", run);
            } else {
                let image = self.folder.join("client.rdb");
                let run = measure(self.client(&self.source, &["--rdb"]).arg(&image))?;
                self.runs.note("backup", "redis-cli --rdb", run);
                std::fs::remove_file(&image).map_err(|error| error.to_string())?;
            }
        }
        let run = measure(&mut self.stillpoint(&["backup"]))?;
        self.runs.note("no change", "stillpoint", run);
        for turn in 0..2 {
            self.empty_target()?;
            if (turn + round).is_multiple_of(2) {
                let restore = ["restore", "latest", "--into", "copy", "--yes", "--no-compare"];
                let run = measure(&mut self.stillpoint(&restore))?;
                self.runs.note("restore", "stillpoint", run);
            } else {
                let run = measure(&mut self.load(&self.target))?;
                self.runs.note("restore", "redis-cli --pipe", run);
            }
            self.same_digest()?;
        }
        self.empty_target()?;
        let run = measure(&mut self.stillpoint(&["restore", "latest", "--into", "copy", "--yes"]))?;
        self.runs.note("restore, compared", "stillpoint", run);
        Ok(())
    }

    fn empty_target(&self) -> Result<(), String> {
        measure(&mut self.client(&self.target, &["FLUSHALL", "SYNC"])).map(drop)
    }

    /// The target holds what the source does, but for our stamp.
    fn same_digest(&self) -> Result<(), String> {
        let digest = |server: &Redis| {
            let output = self.client(server, &["DEBUG", "DIGEST"]).output().map_err(|error| error.to_string())?;
            Ok::<_, String>(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        measure(&mut self.client(&self.target, &["DEL", "stillpoint:stamp"]))?;
        match digest(&self.source)? == digest(&self.target)? {
            true => Ok(()),
            false => Err("what was restored differs from its source".to_owned()),
        }
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let seconds = |case, tool| self.runs.middle(case, tool, |run| run.seconds);
        let peers = [
            ("backup", "redis-cli --rdb", Some(BACKUP_MAX)),
            ("no change", "redis-cli --rdb", None),
            ("restore", "redis-cli --pipe", Some(RESTORE_MAX)),
            ("restore, compared", "redis-cli --pipe", None),
        ];
        for (case, peer, goal) in peers {
            let theirs = match case {
                "no change" => "backup",
                "restore, compared" => "restore",
                other => other,
            };
            if let (Some(ours), Some(theirs)) = (seconds(case, "stillpoint"), seconds(theirs, peer)) {
                rows.push(Row::against(&format!("redis {case}"), "seconds", ours, (peer, theirs), goal));
            }
            if let Some(peak) = self.runs.middle(case, "stillpoint", |run| run.peak_mb) {
                rows.push(Row::alone(&format!("redis {case}"), "peak_mb", peak, Some(PEAK_MB)));
            }
        }
        rows
    }

    fn write_platform(&self) -> Result<(), String> {
        let text = format!(
            "apiVersion: stillpoint.dev/v1\nplatform: bench\nenvironment: bench\nbucket:\n  url: {}\n  key: file:{}\n\
             stores:\n  cache:\n    driver: redis\n    url: {}\ntargets:\n  copy:\n    stores:\n      cache:\n        url: {}\n",
            self.folder.join("ours").display(),
            self.folder.join("bench.key").display(),
            self.source.url(),
            self.target.url(),
        );
        std::fs::write(self.folder.join("platform.yaml"), text).map_err(|error| error.to_string())
    }
}

/// Writes commands that make strings, hashes, lists, sets, sorted sets and streams, until there are so
/// many bytes; always the same ones.
fn write_commands(path: &Path, bytes_max: u64) -> std::io::Result<()> {
    let mut random = fastrand::Rng::with_seed(11);
    let mut writer = BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
    let (mut written, mut number) = (0, 0_u64);
    while written < bytes_max {
        let command = command(&mut random, number);
        let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
        for word in &command {
            bytes.extend(format!("${}\r\n", word.len()).bytes());
            bytes.extend_from_slice(word);
            bytes.extend(b"\r\n");
        }
        writer.write_all(&bytes)?;
        written += bytes.len() as u64;
        number += 1;
    }
    writer.flush()
}

fn command(random: &mut fastrand::Rng, number: u64) -> Vec<Vec<u8>> {
    let words = |text: String| -> Vec<Vec<u8>> { text.split(' ').map(|word| word.as_bytes().to_vec()).collect() };
    let mut noise = |bytes: usize| -> Vec<u8> { (0..bytes).map(|_| random.u8(..)).collect() };
    match number % 8 {
        0 | 1 => {
            let text = format!("{{\"model\":\"churn-{number}\",\"epoch\":{},\"loss\":0.0{number}}},", number % 90);
            [words(format!("SET feature:{number}")), vec![text.repeat(1 + (number % 12) as usize).into_bytes()]]
                .concat()
        }
        2 => [words(format!("SET embedding:{number}")), vec![noise(512 + (number % 1024) as usize)]].concat(),
        3 => words(format!(
            "HSET run:{number} name run-{number} artifact models/{number}.bin state done score 0.{number}"
        )),
        4 => [words(format!("RPUSH queue:{}", number / 800)), vec![noise(200)]].concat(),
        5 => words(format!("SADD seen:{} member-{number} member-{}", number / 4000, number * 7)),
        6 => words(format!("ZADD ranking:{} {number}.25 member-{number}", number / 8000)),
        _ => words(format!(
            "XADD events:{} {number}-1 kind drift worker {} note nothing-to-see",
            number / 8000,
            number % 17
        )),
    }
}
