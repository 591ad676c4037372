//! What the tour shows, step by step. Pure: text from facts.

use std::time::Duration;

use stillpoint_core::Result;
use stillpoint_core::error::IoContext;
use stillpoint_engine::ops::apply::{RestoreReport, StoreStatus};
use stillpoint_engine::ops::backup::BackupOutcome;

use super::TourReport;
use super::platform::SEEDED;
use super::proof::Proof;
use super::restic::ResticResult;
use super::scene::Scene;
use crate::commands::list::level;
use crate::{exit, render};

/// How many violations are shown; the JSON has all.
const VIOLATIONS_SHOWN: usize = 10;

/// The platform, before anything happens.
pub fn scene(scene: &Scene) -> Result<String> {
    let size = std::fs::metadata(&scene.source.registry).or_io(|| "cannot look at the registry".to_owned())?.len();
    let models = render::count(SEEDED);
    Ok(format!(
        "  registry  SQLite, {models} models, {}; each row names an object and a commit\n  \
           objects   a folder of {models} objects\n  \
           code      a git repository of {models} commits\n  \
           writer    a process of its own, writes to all three and never rests\n",
        render::bytes(size)
    ))
}

/// A point in three lines.
pub fn point(name: &str, outcome: &BackupOutcome) -> String {
    let point = &outcome.statefile;
    let pause = match point.pause_micros {
        0 => "no pause was needed".to_owned(),
        micros => format!("writers held back {}", render::duration(Duration::from_micros(micros))),
    };
    let reused = point.totals.bytes.saturating_sub(point.totals.bytes_read);
    format!(
        "{name}   {} · {} · skew {} · {pause} · {}\n            \
         holds {} · read {}, reused {} · new in the bucket {}",
        point.point,
        level(point.level),
        render::duration(Duration::from_micros(point.skew_micros)),
        render::duration(Duration::from_millis(outcome.elapsed_millis)),
        render::bytes(point.totals.bytes),
        render::bytes(point.totals.bytes_read),
        render::bytes(reused),
        render::bytes(point.totals.bytes_stored),
    )
}

/// What the references of a point came to.
pub fn references(outcome: &BackupOutcome) -> String {
    let lines = outcome.statefile.references.iter().map(|reference| {
        let missing = if reference.missing == 0 { "none".to_owned() } else { render::count(reference.missing) };
        let checked = render::count(reference.checked);
        format!("{checked} {} named in `{}`: {missing} missing in `{}`", reference.kind, reference.from, reference.to)
    });
    format!("references  {}", lines.collect::<Vec<_>>().join("\n            "))
}

/// What the writer did in all.
pub fn writer(writes: usize, per_second: f64) -> String {
    format!("writer      {writes} writes acknowledged, {per_second:.0} per second, none refused")
}

/// The restore.
pub fn restored(report: &RestoreReport, millis: u64) -> String {
    let bytes = report.stores.iter().map(|store| store.bytes).sum();
    let compared = report.stores.iter().map(|store| store.checked).sum();
    let elapsed = render::duration(Duration::from_millis(millis));
    let mut text = format!(
        "restore     the 2nd point into environment `{}`: {} in {elapsed}\n            \
         {} items compared with the point, {}",
        report.environment,
        render::bytes(bytes),
        render::count(compared),
        if report.proven { "all equal; references checked again" } else { "NOT PROVEN" },
    );
    for store in report.stores.iter().filter(|store| store.status != StoreStatus::Proven) {
        let why = store.error.clone().or(store.differences.first().cloned()).unwrap_or_default();
        text.push_str(&format!("\n            NOT PROVEN: {}: {why}", store.store));
    }
    for failure in &report.failures {
        text.push_str(&format!("\n            NOT PROVEN: {failure}"));
    }
    text
}

/// The verdict of the oracle.
pub fn proof(proof: &Proof) -> String {
    let mut text = format!(
        "oracle      {} writes acknowledged before the cut, {} begun after it, {} in flight\n            \
         found {} rows, {} objects (every byte), {} commits",
        render::count(proof.acknowledged),
        render::count(proof.later),
        render::count(proof.in_flight),
        render::count(proof.rows),
        render::count(proof.objects),
        render::count(proof.commits),
    );
    if proof.violations.is_empty() {
        text.push_str(
            "\n            nothing acknowledged is missing, nothing later is there,\n            \
             no row lacks its object or its commit",
        );
    }
    for violation in proof.violations.iter().take(VIOLATIONS_SHOWN) {
        text.push_str(&format!("\n            NOT PROVEN: {violation}"));
    }
    text
}

/// What restic said.
pub fn restic(result: &ResticResult) -> String {
    let Some(version) = &result.version else {
        return "restic      is not installed; it would read the same bucket".to_owned();
    };
    if result.violations.is_empty() {
        let files = render::count(result.files);
        return format!("restic      {version} agrees: check --read-data passed, {files} objects restored alike");
    }
    let lines: Vec<_> = result.violations.iter().map(|violation| format!("NOT PROVEN: {violation}")).collect();
    format!("restic      {version}\n            {}", lines.join("\n            "))
}

/// The last lines: the verdict, and how to look further.
pub fn ending(report: &TourReport) -> String {
    let elapsed = render::duration(Duration::from_millis(report.elapsed_millis));
    if !report.proven {
        return format!("\n{}", render::last_line(&format!("NOT proven, after {elapsed}."), exit::UNPROVEN));
    }
    let mut text = format!("\nproven in {elapsed}\n\n");
    let folder = report.folder.display();
    if !report.kept {
        text.push_str("Everything was removed again. `stillpoint tour --keep` leaves it in place; then:\n");
    }
    let point = report.second.statefile.point.as_str();
    text.push_str(&format!("  export STILLPOINT_CONFIG={folder}/platform.yaml STILLPOINT_STATE={folder}/state\n"));
    for (command, about) in [
        ("stillpoint list".to_owned(), "both points"),
        (format!("stillpoint show {}", &point[..6]), "positions, skew, references"),
        ("stillpoint verify".to_owned(), "every byte, from the bucket"),
        ("stillpoint plan --into mistake".to_owned(), "the fence says no"),
        (format!("stillpoint restore --to {folder}/again"), "once more, into folders"),
    ] {
        text.push_str(&format!("  {command:<58} {about}\n"));
    }
    text.push_str("without stillpoint\n");
    for command in &report.restic.commands {
        text.push_str(&format!("  {command}\n"));
    }
    text
}
