//! The files bench: the six jobs on the deterministic input, each tool in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchArgs;
use super::measure::{Run, median, run as measure};
use super::table::Row;
use super::tools::{Kind, Place, Tool, find};

/// Figures by case, tool label and metric, one value a round.
type Figures = BTreeMap<(&'static str, String, &'static str), Vec<f64>>;

/// The cases in the order of the table, with the goals by peer: ratio of seconds.
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

/// Peak memory that no case may exceed, in MB; and with a million small files.
const PEAK_MB: f64 = 120.0;
const PEAK_MILLION_MB: f64 = 400.0;

struct Bench<'a> {
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
    let mut bench = Bench { args, tools, figures: Figures::new() };
    let outcome = bench.all_cases();
    std::fs::remove_dir_all(&args.dir).map_err(|error| format!("{}: {error}", args.dir.display()))?;
    outcome?;
    Ok(bench.rows())
}

fn build(root: &Path) -> Result<PathBuf, String> {
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
        if self.args.cases.is_empty() { case != "million" } else { self.args.cases.iter().any(|wanted| wanted == case) }
    }

    fn all_cases(&mut self) -> Result<(), String> {
        if ["files", "first backup", "no change", "1 % changed", "restore", "verify"].iter().any(|c| self.wants(c)) {
            self.main_rounds()?;
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

    fn note(&mut self, case: &'static str, tool: &Tool, run: Run) {
        self.add(case, tool, "seconds", run.seconds);
        self.add(case, tool, "peak_mb", run.peak_mb);
    }

    fn add(&mut self, case: &'static str, tool: &Tool, metric: &'static str, value: f64) {
        println!("  {case:<16} {:<20} {metric:<10} {value:>10.3}", tool.label);
        self.figures.entry((case, tool.label.clone(), metric)).or_default().push(value);
    }

    fn main_rounds(&mut self) -> Result<(), String> {
        let input = self.args.dir.join("input");
        generate(&input, self.args.scale)?;
        for round in 0..self.args.rounds {
            println!("round {} of {}", round + 1, self.args.rounds);
            for tool in self.tools.clone() {
                self.first_jobs(&tool, &input)?;
            }
            change(&input, round as u64)?;
            for tool in self.tools.clone() {
                let place = self.place(&tool, &input, true);
                let before = size_mb(&place.repository())?;
                let run = measure(&mut tool.backup(&place))?;
                self.note("1 % changed", &tool, run);
                self.add("1 % changed", &tool, "new_mb", size_mb(&place.repository())? - before);
                remove(&place.home)?;
            }
        }
        remove(&input)
    }

    fn first_jobs(&mut self, tool: &Tool, input: &Path) -> Result<(), String> {
        let place = self.place(tool, input, true);
        tool.init(&place)?;
        let run = measure(&mut tool.backup(&place))?;
        self.note("first backup", tool, run);
        self.add("first backup", tool, "stored_mb", size_mb(&place.repository())?);
        let run = measure(&mut tool.backup(&place))?;
        self.note("no change", tool, run);
        let mut verify = tool.verify(&place)?;
        let run = measure(&mut verify)?;
        self.note("verify", tool, run);
        let mut restore = tool.restore(&place)?;
        let run = measure(&mut restore)?;
        self.note("restore", tool, run);
        same_size(input, &place.output())?;
        remove(&place.output())
    }

    fn uncompressed_rounds(&mut self) -> Result<(), String> {
        let input = self.args.dir.join("input");
        generate(&input, self.args.scale)?;
        for _ in 0..self.args.rounds {
            for tool in self.tools.clone() {
                if tool.kind == Kind::Rustic {
                    continue; // rustic 0.9 sets compression per repository, not per run
                }
                let place = self.place(&tool, &input, false);
                tool.init(&place)?;
                let run = measure(&mut tool.backup(&place))?;
                self.note("no compression", &tool, run);
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
        for _ in 0..self.args.rounds {
            for tool in self.tools.clone() {
                let place = self.place(&tool, &stream, true);
                tool.init(&place)?;
                let run = measure(&mut tool.backup(&place))?;
                self.note("one stream", &tool, run);
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
        let run = measure(&mut tool.backup(&place))?;
        self.note("million first", &tool, run);
        let run = measure(&mut tool.backup(&place))?;
        self.note("million no change", &tool, run);
        let run = measure(&mut tool.restore(&place)?)?;
        self.note("million restore", &tool, run);
        let run = measure(&mut tool.verify(&place)?)?;
        self.note("million verify", &tool, run);
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
        "seconds" => GOALS.iter().find(|(c, k, _)| *c == case && *k == peer).map(|(_, _, goal)| *goal),
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

fn size_mb(folder: &Path) -> Result<f64, String> {
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

fn remove(path: &Path) -> Result<(), String> {
    std::fs::remove_dir_all(path).map_err(|error| format!("{}: {error}", path.display()))
}
