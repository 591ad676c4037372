//! One round: a backup with a fault, what it left, a backup without one where it left no point, and
//! the newest point restored and judged.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fault::{self, Fault, Moment};
use super::report::Report;
use stillpoint_testkit::platform::Stage;

/// The pause budget of the platform, and the second that the watchdog may take on top.
const PAUSE_MAX: Duration = Duration::from_secs(6);
/// How long a run or a restore may take, faults included, before it counts as hung.
const RUN_WITHIN: Duration = Duration::from_secs(240);

/// What a round knows of those before it on the same platform.
#[derive(Debug)]
pub struct Memory {
    /// Someone asked the soak to end.
    stop: Arc<AtomicBool>,
    /// How long the last whole run took.
    usual: Option<Duration>,
    points: BTreeSet<String>,
    pauses_seen: usize,
}

impl Memory {
    /// Of a new platform.
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Self { stop, usual: None, points: BTreeSet::new(), pauses_seen: 0 }
    }
}

/// Runs one round and returns its line.
pub fn run(
    stage: &mut Stage,
    random: &mut fastrand::Rng,
    report: &mut Report,
    memory: &mut Memory,
) -> Result<String, String> {
    // The first run of a platform tells how long runs take.
    let (fault, moment) = match memory.usual {
        None => (Fault::None, Moment::After(Duration::ZERO)),
        Some(usual) => (Fault::any(random), Moment::any(random, usual)),
    };
    let mut line = match fault {
        Fault::None => "no fault".to_owned(),
        _ => format!("{fault} {moment}"),
    };
    let run = backup(stage, (fault, moment), report, memory)?;
    if !run.struck && fault != Fault::None {
        line.push_str(" (too late)");
    }
    let kind = if run.struck || fault == Fault::None { fault.kind() } else { "too late".to_owned() };
    *report.faults.entry(kind).or_default() += 1;
    line.push_str(&format!(" → {}", run.ended(report)));
    writers_go_on(stage, report)?;
    let made = compare_points(stage, &run, report, memory)?;
    // A fault that came too late struck nothing: such a run has no more reason to fail than one without a fault.
    if !run.struck && run.status.is_some_and(|status| !status.success()) {
        report.violation(format!("a run that no fault struck failed: {}", run.said));
    }
    if !made {
        stage.wait_for_progress()?;
        let run = backup(stage, (Fault::None, Moment::After(Duration::ZERO)), report, memory)?;
        line.push_str(&format!(", again → {}", run.ended(report)));
        if !run.status.is_some_and(|status| status.success()) {
            report.violation(format!("the run after a failed one failed: {}", run.said));
        }
        compare_points(stage, &run, report, memory)?;
        memory.usual = Some(run.elapsed);
    } else if fault == Fault::None {
        memory.usual = Some(run.elapsed);
    }
    if memory.points.is_empty() {
        return Ok(line);
    }
    line.push_str(&restore_and_judge(stage, report, memory)?);
    check_pauses(stage, report, memory)?;
    Ok(line)
}

/// How a run went.
struct Run {
    /// `None` if it was killed.
    status: Option<ExitStatus>,
    struck: bool,
    elapsed: Duration,
    answer: Value,
    said: String,
}

impl Run {
    fn ended(&self, report: &mut Report) -> String {
        let (kind, text) = match self.status {
            None => ("killed", "killed".to_owned()),
            Some(status) if status.success() => ("made a point", format!("{:.1} s", self.elapsed.as_secs_f64())),
            Some(status) => ("failed", format!("exit {}", status.code().unwrap_or(-1))),
        };
        *report.runs.entry(kind).or_default() += 1;
        text
    }
}

fn backup(
    stage: &mut Stage,
    (fault, moment): (Fault, Moment),
    report: &mut Report,
    memory: &Memory,
) -> Result<Run, String> {
    let mut struck = false;
    let mut strike = |stage: &mut Stage, child: &mut Child| {
        struck = fault != Fault::None && moment.wait(stage, child, &memory.stop)?;
        if struck { fault::strike(fault, stage, child) } else { Ok(()) }
    };
    let run = watched(stage, &["backup", "--json"], report, memory, &mut strike);
    let run = run.map_err(|error| format!("{error}, with {fault}"))?;
    fault::heal(stage);
    Ok(Run { struck, ..run })
}

/// Runs our program to its end, `meanwhile` something else, but not for ever.
fn watched(
    stage: &mut Stage,
    arguments: &[&str],
    report: &mut Report,
    memory: &Memory,
    meanwhile: &mut dyn FnMut(&mut Stage, &mut Child) -> Result<(), String>,
) -> Result<Run, String> {
    let name = arguments[0];
    let failed = |error: std::io::Error| format!("{name}: {error}");
    let outputs = ["out", "err"].map(|end| stage.path().join(format!("{name}.{end}")));
    let [out, err] = [0, 1].map(|index| std::fs::File::create(&outputs[index]));
    let mut command = stage.engine(arguments);
    let mut child = command.stdout(out.map_err(failed)?).stderr(err.map_err(failed)?).spawn().map_err(failed)?;
    let begun = Instant::now();
    let done = meanwhile(stage, &mut child);
    let status = loop {
        let is_stopped = memory.stop.load(Ordering::Relaxed);
        match child.try_wait().map_err(failed)? {
            Some(status) if !is_stopped && done.is_ok() => break status,
            None if !is_stopped && done.is_ok() && begun.elapsed() < RUN_WITHIN => {
                std::thread::sleep(Duration::from_millis(3));
            }
            _ => {
                child.kill().map_err(failed)?;
                child.wait().map_err(failed)?;
                done?;
                if !is_stopped {
                    report.violation(format!("`{name}` hung for {} s", RUN_WITHIN.as_secs()));
                }
                return Err(format!("`{name}` was stopped"));
            }
        }
    };
    let read = |path: &Path| std::fs::read_to_string(path).map_err(failed);
    let (answer, said) = (read(&outputs[0])?, read(&outputs[1])?);
    Ok(Run {
        status: status.code().map(|_| status),
        struck: false,
        elapsed: begun.elapsed(),
        // A run that was killed or refused answers nothing.
        answer: serde_json::from_str(&answer).unwrap_or_default(),
        said: said.trim().replace('\n', " | "),
    })
}

/// Writers run again within the budget and a second, whatever became of the engine.
fn writers_go_on(stage: &Stage, report: &mut Report) -> Result<(), String> {
    let begun = Instant::now();
    while stage.oracle()?["paused"] == true {
        if begun.elapsed() > PAUSE_MAX {
            report.violation(format!("writers are held back {} s after the run ended", begun.elapsed().as_secs()));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A point is there exactly if the run said so; of a killed run, at most one. Returns whether there
/// is a new one.
fn compare_points(stage: &Stage, run: &Run, report: &mut Report, memory: &mut Memory) -> Result<bool, String> {
    let listed = json(stage, &["list", "--json"])?;
    let points: BTreeSet<String> = listed["points"]
        .as_array()
        .ok_or("`list` names no points")?
        .iter()
        .filter_map(|point| Some(point["point"].as_str()?.to_owned()))
        .collect();
    for point in &points {
        if !stage.path().join("bucket/points").join(point).join("statefile.json").is_file() {
            report.violation(format!("point {point} is listed and has no statefile"));
        }
    }
    if listed["damaged"].as_array().is_some_and(|damaged| !damaged.is_empty()) {
        report.violation(format!("damaged points: {}", listed["damaged"]));
    }
    let lost: Vec<_> = memory.points.difference(&points).collect();
    if !lost.is_empty() {
        report.violation(format!("points are gone: {lost:?}"));
    }
    let new: Vec<_> = points.difference(&memory.points).cloned().collect();
    match run.status {
        Some(status) if status.success() => {
            let named = run.answer["statefile"]["point"].as_str();
            if new.len() != 1 || named != new.first().map(String::as_str) {
                report.violation(format!("the run says it made {named:?}, new points are {new:?}"));
            }
        }
        Some(_) if !new.is_empty() => {
            report.violation(format!("a run that says it failed made {new:?}: {}", run.said));
        }
        None if new.len() > 1 => report.violation(format!("a killed run made {new:?}")),
        _ => {}
    }
    memory.points = points;
    Ok(!new.is_empty())
}

fn restore_and_judge(stage: &mut Stage, report: &mut Report, memory: &Memory) -> Result<String, String> {
    let copy = stage.copy()?;
    let shown = stage.path().join("point.json");
    let point = json(stage, &["show", "latest", "--json"])?;
    std::fs::write(&shown, point.to_string()).map_err(|error| error.to_string())?;
    let statefile = &point["statefile"];
    let level = statefile["level"].as_str().unwrap_or("none").to_owned();
    let id = statefile["point"].as_str().unwrap_or_default().get(..6).unwrap_or_default();
    *report.points.entry(level.clone()).or_default() += 1;
    let arguments = ["restore", "latest", "--into", "staging", "--yes", "--json"];
    let restored = watched(stage, &arguments, report, memory, &mut |_, _| Ok(()))?;
    if !restored.status.is_some_and(|status| status.success()) {
        let told = unproven(&restored.answer);
        report.violation(format!("point {id} does not come back: {} {told}", restored.said));
        return Ok(String::new());
    }
    let took = restored.elapsed.as_secs_f64();
    let verdict = stage.judge(&copy, &shown)?;
    let number = |name: &str| verdict[name].as_u64().ok_or_else(|| format!("the judge says nothing of `{name}`"));
    let (expected, references) = (number("expected")?, number("references")?);
    if expected == 0 || references == 0 {
        report.violation(format!("point {id}: {expected} versions and {references} references proves nothing"));
    }
    report.restores += 1;
    report.expected += expected;
    report.references += references;
    report.later += number("later")?;
    report.deleted += number("deleted")?;
    report.bundles += number("bundles")?;
    for named in verdict["named"].as_array().into_iter().flatten() {
        report.violation(format!("point {id}, {level}: {}", named.as_str().unwrap_or_default()));
    }
    let millis = |name: &str| statefile[name].as_f64().unwrap_or(0.0) / 1e3;
    Ok(format!(
        "; point {id} {level}, pause {:.0} ms, skew {:.0} ms; restored in {took:.1} s: {} expected, {} later, {} violations",
        millis("pause_micros"),
        millis("skew_micros"),
        expected,
        number("later")?,
        number("violations")?,
    ))
}

/// What a restore's report says of stores and references that are not proven.
fn unproven(report: &Value) -> String {
    let stores = report["stores"].as_array().into_iter().flatten().filter(|store| store["status"] != "proven");
    let references = report["references"].as_array().into_iter().flatten().filter(|one| one["missing"] != 0);
    let lines: Vec<String> = stores.chain(references).map(Value::to_string).collect();
    format!("{} {} {}", lines.join(" "), report["failures"], report["notes"]).chars().take(3_000).collect()
}

/// Every pause that the application saw ended in time, and not by its own lease.
fn check_pauses(stage: &Stage, report: &mut Report, memory: &mut Memory) -> Result<(), String> {
    let path = stage.path().join("record");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut asked: Option<u64> = None;
    let mut pauses = 0;
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let at = words.last().and_then(|at| at.parse::<u64>().ok());
        match (words[0], asked, at) {
            ("asked", _, at) => asked = at,
            ("resumed", Some(began), Some(at)) => {
                asked = None;
                pauses += 1;
                if pauses <= memory.pauses_seen {
                    continue;
                }
                let held = Duration::from_micros(at.saturating_sub(began));
                report.pauses += 1;
                report.longest_pause_millis = report.longest_pause_millis.max(held.as_secs_f64() * 1e3);
                if held > PAUSE_MAX || words[1] == "lease" {
                    let by = words[1];
                    report.violation(format!("writers were held back {:.1} s, until {by}", held.as_secs_f64()));
                }
            }
            _ => {}
        }
    }
    memory.pauses_seen = pauses;
    Ok(())
}

/// Runs a verb that reads, and returns its answer.
fn json(stage: &Stage, arguments: &[&str]) -> Result<Value, String> {
    let output = stage.engine(arguments).stderr(Stdio::piped()).output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " | ");
        return Err(format!("stillpoint {}: {said}", arguments.join(" ")));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("stillpoint {}: {error}", arguments.join(" ")))
}
