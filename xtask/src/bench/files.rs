//! The files bench: the six jobs on the deterministic input, each tool in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchArgs;
use super::measure::{Run, median, run as measure};
use super::server::S3Server;
use super::table::Row;
use super::tools::{Kind, Place, Tool, find};

/// Figures by case, tool label and metric, one value a round.
type Figures = BTreeMap<(&'static str, String, &'static str), Vec<f64>>;

/// The goals by case and peer: ratio of seconds. Over S3 the same hold.
const GOALS: &[(&str, Kind, f64)] = &[
    ("first backup", Kind::Restic, 0.30),
    ("first backup", Kind::Kopia, 0.50),
    ("no compression", Kind::Kopia, 0.45),
    ("one stream", Kind::Restic, 0.30),
    ("no change", Kind::Kopia, 0.55),
    ("1 % changed", Kind::Restic, 0.50),
    ("1 % changed", Kind::Kopia, 0.50),
    ("restore", Kind::Restic, 0.45),
    ("verify", Kind::Restic, 0.45),
];

/// The names of the six jobs where the repository is a folder, and where it is on an S3 server.
const FOLDER: Names = Names {
    first: "first backup",
    unchanged: "no change",
    verify: "verify",
    restore: "restore",
    compared: "restore, compared",
    changed: "1 % changed",
};
const S3: Names = Names {
    first: "s3 first backup",
    unchanged: "s3 no change",
    verify: "s3 verify",
    restore: "s3 restore",
    compared: "s3 restore, compared",
    changed: "s3 1 % changed",
};

/// What a job may touch at most: a copy of the input, and its own memory.
const MEMORY_BYTES: u64 = 3 << 30;

/// Peak memory that no case may exceed, in MB; and with a million small files.
const PEAK_MB: f64 = 120.0;
const PEAK_MILLION_MB: f64 = 400.0;

/// What the jobs of a round are called in the table.
#[derive(Clone, Copy)]
struct Names {
    first: &'static str,
    unchanged: &'static str,
    verify: &'static str,
    /// Every blob is checked as it is read.
    restore: &'static str,
    /// And what was written is read back and compared.
    compared: &'static str,
    changed: &'static str,
}

struct Bench<'a> {
    root: &'a Path,
    args: &'a BenchArgs,
    tools: Vec<Tool>,
    figures: Figures,
}

/// Generates the input, runs all rounds, and returns the rows.
pub fn run(root: &Path, args: &BenchArgs) -> Result<Vec<Row>, String> {
    let ours = build(root)?;
    let tools = find(&ours, &args.peers);
    let names: Vec<&str> = tools.iter().map(|tool| tool.label.as_str()).collect();
    println!("tools: {}", names.join(", "));
    std::fs::create_dir_all(&args.dir).map_err(|error| error.to_string())?;
    let mut bench = Bench { root, args, tools, figures: Figures::new() };
    let outcome = bench.all_cases();
    remove(&args.dir)?;
    outcome?;
    Ok(bench.rows())
}

/// Builds the program; returns its path.
pub fn build(root: &Path) -> Result<PathBuf, String> {
    let status = Command::new("cargo").args(["build", "--release", "-p", "stillpoint"]).current_dir(root).status();
    match status {
        Ok(status) if status.success() => {}
        other => return Err(format!("cargo build --release: {other:?}")),
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("release/stillpoint"))
}

impl Bench<'_> {
    fn wants(&self, case: &str) -> bool {
        if self.args.cases.is_empty() {
            case != "million" && case != "s3"
        } else {
            self.args.cases.iter().any(|wanted| wanted == case)
        }
    }

    fn all_cases(&mut self) -> Result<(), String> {
        let main = ["files", "first backup", "no change", "1 % changed", "restore", "verify"];
        if main.iter().any(|case| self.wants(case)) {
            self.main_rounds(FOLDER)?;
        }
        if self.wants("s3") {
            self.main_rounds(S3)?;
        }
        if self.wants("no compression") {
            self.uncompressed_rounds()?;
        }
        if self.wants("one stream") {
            self.stream_rounds()?;
        }
        if self.wants("million") {
            self.million()?;
        }
        Ok(())
    }

    fn place(&self, tool: &Tool, input: &Path, compress: bool) -> Place {
        let home = self.args.dir.join(tool.label.replace([' ', '.'], "-"));
        Place { home, input: input.to_owned(), compress, server: None }
    }

    /// The tools in the order of this round: each is first, last and between in its turn.
    fn in_turn(&self, round: usize) -> Vec<Tool> {
        let mut tools = self.tools.clone();
        let count = tools.len();
        tools.rotate_left(round % count);
        tools
    }

    /// Runs and times one job, with the memory that it will touch warm.
    fn job(&mut self, case: &'static str, tool: &Tool, command: &mut Command) -> Result<(), String> {
        warm_memory(&self.args.dir, (MEMORY_BYTES as f64 * self.args.scale.min(1.0)) as u64)?;
        let run = measure(command)?;
        self.note(case, tool, run);
        Ok(())
    }

    fn note(&mut self, case: &'static str, tool: &Tool, run: Run) {
        self.add(case, tool, "seconds", run.seconds);
        self.add(case, tool, "peak_mb", run.peak_mb);
    }

    fn add(&mut self, case: &'static str, tool: &Tool, metric: &'static str, value: f64) {
        println!("  {case:<16} {:<20} {metric:<10} {value:>10.3}", tool.label);
        self.figures.entry((case, tool.label.clone(), metric)).or_default().push(value);
    }

    fn main_rounds(&mut self, names: Names) -> Result<(), String> {
        let input = self.args.dir.join("input");
        generate(&input, self.args.scale)?;
        for round in 0..self.args.rounds {
            println!("{}: round {} of {}", names.first, round + 1, self.args.rounds);
            let server = match names.first == S3.first {
                true => Some(S3Server::start(self.root, &self.args.dir.join("s3"))?),
                false => None,
            };
            let outcome = self.round(names, round, &input, server.as_ref());
            if let Some(server) = server {
                server.stop()?;
            }
            outcome?;
        }
        remove(&input)
    }

    /// All jobs once: every tool does one before any does the next.
    fn round(&mut self, names: Names, round: usize, input: &Path, server: Option<&S3Server>) -> Result<(), String> {
        let mut contestants = Vec::new();
        for (number, tool) in self.in_turn(round).into_iter().enumerate() {
            let can = server.is_none() || matches!(tool.kind, Kind::Stillpoint | Kind::Restic | Kind::Kopia);
            if !can {
                continue;
            }
            let mut place = self.place(&tool, input, true);
            place.server = server.map(|server| server.bucket(&format!("bench-{number}"))).transpose()?;
            tool.init(&place)?;
            contestants.push((tool, place));
        }
        for (tool, place) in &contestants {
            self.job(names.first, tool, &mut tool.backup(place))?;
            if server.is_none() {
                self.add(names.first, tool, "stored_mb", size_mb(&place.repository())?);
            }
        }
        for (tool, place) in &contestants {
            self.job(names.unchanged, tool, &mut tool.backup(place))?;
        }
        for (tool, place) in &contestants {
            self.job(names.verify, tool, &mut tool.verify(place)?)?;
        }
        for (case, compare) in [(names.restore, false), (names.compared, true)] {
            for (tool, place) in contestants.iter().filter(|(tool, _)| !compare || tool.compares()) {
                self.job(case, tool, &mut tool.restore(place, compare)?)?;
                same_size(input, &place.output())?;
                remove(&place.output())?;
            }
        }
        change(input, round as u64)?;
        for (tool, place) in &contestants {
            let before = if server.is_none() { size_mb(&place.repository())? } else { 0.0 };
            self.job(names.changed, tool, &mut tool.backup(place))?;
            if server.is_none() {
                self.add(names.changed, tool, "new_mb", size_mb(&place.repository())? - before);
            }
        }
        contestants.iter().try_for_each(|(_, place)| remove(&place.home))
    }

    fn uncompressed_rounds(&mut self) -> Result<(), String> {
        let input = self.args.dir.join("input");
        generate(&input, self.args.scale)?;
        for round in 0..self.args.rounds {
            for tool in self.in_turn(round) {
                if tool.kind == Kind::Rustic {
                    continue; // rustic 0.9 sets compression per repository, not per run
                }
                let place = self.place(&tool, &input, false);
                tool.init(&place)?;
                self.job("no compression", &tool, &mut tool.backup(&place))?;
                remove(&place.home)?;
            }
        }
        remove(&input)
    }

    fn stream_rounds(&mut self) -> Result<(), String> {
        let input = self.args.dir.join("input");
        generate(&input, self.args.scale)?;
        let stream = self.args.dir.join("stream");
        std::fs::create_dir_all(&stream).map_err(|error| error.to_string())?;
        concatenate(&input, &stream.join("stream.bin"))?;
        remove(&input)?;
        for round in 0..self.args.rounds {
            for tool in self.in_turn(round) {
                let place = self.place(&tool, &stream, true);
                tool.init(&place)?;
                self.job("one stream", &tool, &mut tool.backup(&place))?;
                remove(&place.home)?;
            }
        }
        remove(&stream)
    }

    /// Ours alone: the peers take minutes each, and the goal is absolute.
    fn million(&mut self) -> Result<(), String> {
        let input = self.args.dir.join("million");
        stillpoint_testkit::corpus::small_files(&input, (1_000_000.0 * self.args.scale) as u64)
            .map_err(|error| error.to_string())?;
        let tool = self.tools[0].clone();
        let place = self.place(&tool, &input, true);
        tool.init(&place)?;
        self.job("million first", &tool, &mut tool.backup(&place))?;
        self.job("million no change", &tool, &mut tool.backup(&place))?;
        self.job("million restore", &tool, &mut tool.restore(&place, true)?)?;
        self.job("million verify", &tool, &mut tool.verify(&place)?)?;
        remove(&place.home)?;
        remove(&input)
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let ours_label = &self.tools[0].label;
        for ((case, label, metric), values) in &self.figures {
            if label != ours_label {
                continue;
            }
            let ours = median(values);
            if *metric == "peak_mb" {
                let goal = if case.starts_with("million") { PEAK_MILLION_MB } else { PEAK_MB };
                rows.push(Row::alone(case, metric, ours, Some(goal)));
            }
            let mut compared = false;
            for tool in &self.tools[1..] {
                let Some(theirs) = self.figures.get(&(*case, tool.label.clone(), *metric)) else { continue };
                compared = true;
                rows.push(Row::against(
                    case,
                    metric,
                    ours,
                    (&tool.label, median(theirs)),
                    goal(case, metric, tool.kind),
                ));
            }
            if !compared && *metric != "peak_mb" {
                rows.push(Row::alone(case, metric, ours, None));
            }
        }
        rows
    }
}

fn goal(case: &str, metric: &str, peer: Kind) -> Option<f64> {
    match metric {
        "seconds" => {
            GOALS.iter().find(|(c, k, _)| *c == case.trim_start_matches("s3 ") && *k == peer).map(|(_, _, goal)| *goal)
        }
        "stored_mb" | "new_mb" if peer == Kind::Restic => Some(1.0),
        _ => None,
    }
}

fn generate(input: &Path, scale: f64) -> Result<(), String> {
    if input.exists() {
        remove(input)?;
    }
    stillpoint_testkit::corpus::generate(input, scale).map_err(|error| format!("{}: {error}", input.display()))
}

/// Has the host give this much memory to the machine before a job is timed, by writing a file and
/// removing it. A virtual machine gives back memory that is free for seconds, and whoever touches it
/// next pays several times the price of writing; that would be a lottery between the tools.
fn warm_memory(folder: &Path, bytes: u64) -> Result<(), String> {
    let path = folder.join("warm");
    let describe = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = std::fs::File::create(&path).map_err(describe)?;
    let zeros = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        std::io::Write::write_all(&mut file, &zeros).map_err(describe)?;
    }
    std::fs::remove_file(&path).map_err(describe)
}

/// Rewrites about 1 % of the bytes of the big files, in place, in a few spots; differs by round.
fn change(input: &Path, round: u64) -> Result<(), String> {
    stillpoint_testkit::corpus::change(input, round).map_err(|error| format!("{}: {error}", input.display()))
}

fn walk(folder: &Path, file: &mut dyn FnMut(&Path, u64) -> std::io::Result<()>) -> std::io::Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let meta = entry.metadata()?;
        if meta.is_dir() {
            walk(&entry.path(), file)?;
        } else {
            file(&entry.path(), meta.len())?;
        }
    }
    Ok(())
}

pub(super) fn size_mb(folder: &Path) -> Result<f64, String> {
    let mut bytes = 0;
    walk(folder, &mut |_, size| {
        bytes += size;
        Ok(())
    })
    .map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(bytes as f64 / 1e6)
}

/// A restore that is much smaller than its input was no restore; small differences are stamps.
fn same_size(input: &Path, output: &Path) -> Result<(), String> {
    let (wanted, found) = (size_mb(input)?, size_mb(output)?);
    if (wanted - found).abs() > 0.1 {
        return Err(format!("{}: restored {found:.1} MB of {wanted:.1} MB", output.display()));
    }
    Ok(())
}

fn concatenate(input: &Path, output: &Path) -> Result<(), String> {
    let describe = |error: std::io::Error| format!("{}: {error}", output.display());
    let mut writer = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(output).map_err(describe)?);
    walk(input, &mut |path, _| std::io::copy(&mut std::fs::File::open(path)?, &mut writer).map(|_| ()))
        .map_err(describe)?;
    std::io::Write::flush(&mut writer).map_err(describe)
}

pub(super) fn remove(path: &Path) -> Result<(), String> {
    std::fs::remove_dir_all(path).map_err(|error| format!("{}: {error}", path.display()))
}
