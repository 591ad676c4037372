//! `bench pause`: how long writers are held back, and whether that depends on how much data there is.
//!
//! The example platform with its five stores and two writers that never rest. A run is ended in order
//! as soon as its writers go on, so that a hundred cuts do not drain a hundred times; what counts is
//! what the application itself noted: from the answer of its `pause` hook to the arrival of `resume`,
//! that is, without the time that its own publications take to end. The whole, from the request on,
//! is stated beside it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use stillpoint_testkit::chaos;

use super::BenchArgs;
use super::measure::median;
use super::table::Row;
use stillpoint_testkit::platform::{Options, Programs, Stage};

use crate::programs;

/// Longest 99th percentile of the pause, in milliseconds.
const GOAL_P99_MILLIS: f64 = 100.0;
/// How much longer it may be with fifty times the data.
const GOAL_RATIO: f64 = 1.2;
/// How long one run may take until its pause is over.
const CUT_WITHIN: Duration = Duration::from_secs(300);

/// Sizes of the data in MB, and how many cuts.
struct Shape {
    sizes_mb: [u64; 2],
    cuts: usize,
}

/// Measures at both sizes.
pub fn run(root: &Path, args: &BenchArgs) -> Result<Vec<Row>, String> {
    let programs = programs::get(root, args.programs.as_deref(), !args.dev)?;
    let shape = Shape {
        sizes_mb: [100, if args.small { 1_000 } else { 5_000 }],
        cuts: if args.small { args.cuts.min(20) } else { args.cuts },
    };
    let mut rows = Vec::new();
    let mut p99s = Vec::new();
    for size_mb in shape.sizes_mb {
        let pauses = at_size(&programs, size_mb, shape.cuts)?;
        let case = format!("{size_mb} MB, {} cuts", pauses.len());
        let quiet: Vec<f64> = pauses.iter().map(|pause| pause.quiet_millis).collect();
        let whole: Vec<f64> = pauses.iter().map(|pause| pause.whole_millis).collect();
        rows.push(Row::alone(&case, "p50_ms", median(&quiet), None));
        rows.push(Row::alone(&case, "p99_ms", percentile(&quiet, 0.99), Some(GOAL_P99_MILLIS)));
        rows.push(Row::alone(&case, "max_ms", percentile(&quiet, 1.0), None));
        rows.push(Row::alone(&case, "whole_p99", percentile(&whole, 0.99), None));
        p99s.push(percentile(&quiet, 0.99));
    }
    let peer = format!("{} MB", shape.sizes_mb[0]);
    rows.push(Row::against(
        &format!("{} MB", shape.sizes_mb[1]),
        "p99_ms",
        p99s[1],
        (&peer, p99s[0]),
        Some(GOAL_RATIO),
    ));
    Ok(rows)
}

/// One pause in milliseconds: after the hook's answer, and from the request on.
struct Pause {
    quiet_millis: f64,
    whole_millis: f64,
}

fn at_size(programs: &Programs, size_mb: u64, cuts: usize) -> Result<Vec<Pause>, String> {
    let stage = Stage::start(programs, Options::default())?;
    let begun = Instant::now();
    let filled = stage.registry(&["fill", "app.json", &size_mb.to_string()]).output();
    let filled = filled.map_err(|error| format!("filling: {error}"))?;
    if !filled.status.success() {
        return Err(String::from_utf8_lossy(&filled.stderr).trim().to_owned());
    }
    let bytes: f64 = String::from_utf8_lossy(&filled.stdout).trim().parse().unwrap_or(0.0);
    println!("pause: {:.0} MB of rows in {:.0} s", bytes / 1e6, begun.elapsed().as_secs_f64());
    let mut done = 0;
    let mut tries = 0;
    while done < cuts && tries < cuts * 3 {
        tries += 1;
        done += usize::from(cut_once(&stage)?);
    }
    let pauses = pauses(&stage.path().join("record"))?;
    if pauses.len() < cuts {
        return Err(format!("only {} of {cuts} runs held the writers back", pauses.len()));
    }
    Ok(pauses)
}

/// Starts a backup and stops it in order once its pause is over; whether it had one.
fn cut_once(stage: &Stage) -> Result<bool, String> {
    let failed = |error: std::io::Error| format!("backup: {error}");
    let state = || -> Result<(u64, bool), String> {
        let oracle = stage.oracle()?;
        Ok((oracle["pauses"].as_u64().unwrap_or(0), oracle["paused"] == true))
    };
    let before = state()?.0;
    let mut command = stage.engine(&["backup", "--quiet"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let begun = Instant::now();
    let mut paused = false;
    while child.try_wait().map_err(failed)?.is_none() {
        let (pauses, held) = state()?;
        if pauses > before && !held {
            paused = true;
            chaos::interrupt(&child).map_err(failed)?;
            break;
        }
        if begun.elapsed() > CUT_WITHIN {
            child.kill().map_err(failed)?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !paused && !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(paused)
}

/// Reads the application's record.
fn pauses(path: &Path) -> Result<Vec<Pause>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (mut asked, mut quiet) = (None, None);
    let mut pauses = Vec::new();
    for line in text.lines() {
        let (word, at) = line.split_once(' ').unwrap_or_default();
        let at: Option<f64> = at.rsplit(' ').next().and_then(|at| at.parse().ok());
        match (word, asked, quiet, at) {
            ("asked", _, _, at) => (asked, quiet) = (at, None),
            ("paused", _, None, at) => quiet = at,
            ("resumed", Some(asked_at), Some(quiet_at), Some(at)) => {
                pauses.push(Pause { quiet_millis: (at - quiet_at) / 1e3, whole_millis: (at - asked_at) / 1e3 });
                (asked, quiet) = (None, None);
            }
            _ => {}
        }
    }
    Ok(pauses)
}

/// The value that this share of all values does not exceed.
fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((percentile(&values, 0.99), percentile(&values, 1.0), percentile(&[], 0.5)), (99.0, 100.0, 0.0));
    }

    #[test]
    fn pauses_are_read_from_the_record() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("record");
        let text = "begun 0 1 5\nasked 1000\nacknowledged 0 1 2000\npaused 3000\nresumed hook 13000\nasked 20000\n";
        std::fs::write(&path, text).expect("writes");
        let pauses = pauses(&path).expect("reads");
        assert_eq!(pauses.len(), 1);
        assert_eq!((pauses[0].quiet_millis, pauses[0].whole_millis), (10.0, 12.0));
    }
}
