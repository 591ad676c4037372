//! `stillpoint tour`: the main job on a scratch platform, in seconds, with proof.
//!
//! Everything runs through the same functions as the real verbs; nothing is faked. The proof looks
//! at the restored stores with their own readers only. What is not proven fails the tour.

mod platform;
mod proof;
mod restic;
mod scene;
mod screen;
mod way_back;
pub mod writer;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, IoContext, Kind};
use stillpoint_engine::ops::apply::RestoreReport;
use stillpoint_engine::ops::backup::BackupOutcome;

use crate::app::{App, Outcome};
use crate::exit;
use proof::Proof;
use restic::ResticResult;
use scene::Scene;

/// How long the writer works before the first point and between the two.
const WRITING: Duration = Duration::from_millis(900);

/// See it work: a scratch platform, a writer that never rests, two points, damage, a restore, proof.
///
/// Makes a SQLite registry whose rows name objects in a folder and commits in a git repository,
/// and writes to all three without resting. Takes two points meanwhile, damages the original,
/// restores the second point into another environment, and proves from the log of acknowledged
/// writes that nothing is missing and nothing is too much. Needs git, and nothing else.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint tour
  stillpoint tour --keep              leave everything in place to look further
  stillpoint tour --dir /var/tmp/t --keep")]
pub struct Arguments {
    /// Leave the platform, the bucket and the restored copy in place.
    #[arg(long)]
    keep: bool,
    /// Where to make them; a new temporary folder if not given. Must be empty or absent.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

/// What the tour came to.
#[derive(Debug, Serialize)]
struct TourReport {
    folder: PathBuf,
    kept: bool,
    writes_per_second: f64,
    first: BackupOutcome,
    second: BackupOutcome,
    damage: String,
    fence: String,
    restore: RestoreReport,
    restore_millis: u64,
    proof: Proof,
    restic: ResticResult,
    elapsed_millis: u64,
    proven: bool,
}

/// Runs the tour. Exit code 7 if anything is not proven.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let begin = Instant::now();
    let (folder, temporary) = folder(arguments)?;
    let result = tour(app, &folder, arguments.keep, begin);
    if let Some(temporary) = temporary {
        match (&result, arguments.keep) {
            // A tour that failed leaves its scene for whoever wants to know why.
            (_, true) | (Err(_), _) => drop(temporary.keep()),
            (Ok(_), false) => temporary.close().or_io(|| "cannot remove the tour's folder".to_owned())?,
        }
    }
    let report = result.map_err(|error| error.context("the scene is left in", folder.display()))?;
    let exit = if report.proven { exit::DONE } else { exit::UNPROVEN };
    Outcome::with(exit, screen::ending(&report), &report)
}

fn folder(arguments: &Arguments) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let Some(folder) = &arguments.dir else {
        let temporary = tempfile::Builder::new()
            .prefix("stillpoint-tour-")
            .tempdir()
            .or_io(|| "cannot create a temporary folder".to_owned())?;
        return Ok((temporary.path().to_owned(), Some(temporary)));
    };
    std::fs::create_dir_all(folder).or_io(|| format!("cannot create `{}`", folder.display()))?;
    let mut inside = std::fs::read_dir(folder).or_io(|| format!("cannot look into `{}`", folder.display()))?;
    if inside.next().is_some() {
        return Err(Error::new(Kind::AlreadyExists, format!("`{}` is not empty", folder.display()))
            .hint("name an empty folder, or leave --dir out"));
    }
    let folder = std::path::absolute(folder).or_io(|| "cannot resolve the tour's folder".to_owned())?;
    Ok((folder, None))
}

fn tour(app: &App, folder: &std::path::Path, keep: bool, begin: Instant) -> Result<TourReport> {
    app.note(&format!("a scratch platform in {}", folder.display()));
    let mut scene = Scene::create(folder)?;
    app.note(&screen::scene(&scene)?);
    let writing = Instant::now();
    scene.write_for(WRITING)?;
    let first = scene.backup(app)?;
    app.note(&screen::point("1st point", &first));
    scene.write_for(WRITING)?;
    let second = scene.backup(app)?;
    app.note(&screen::point("2nd point", &second));
    app.note(&screen::references(&second));
    // A little longer, so that there are writes that must not come back.
    scene.write_for(WRITING / 3)?;
    let writes = scene.stop_writer()?;
    let writes_per_second = writes.len() as f64 / writing.elapsed().as_secs_f64();
    app.note(&screen::writer(writes.len(), writes_per_second));
    let damage = scene.damage()?;
    app.note(&format!("damage      {damage}"));
    let fence = scene.restore_over_source(app, &second)?;
    app.note(&format!("fence       restoring over the source was refused:\n            {fence}"));
    let restoring = Instant::now();
    let restored = scene.restore_elsewhere(app, &second)?;
    let restore_millis = u64::try_from(restoring.elapsed().as_millis()).unwrap_or(u64::MAX);
    app.note(&screen::restored(&restored, restore_millis));
    let proof = proof::judge(&proof::look(&scene.restored)?, &writes, proof::cut_interval(&second.statefile));
    app.note(&screen::proof(&proof));
    let restic = restic::read_with_restic(&scene, &second.statefile)?;
    app.note(&screen::restic(&restic));
    let proven = restored.proven && proof.violations.is_empty() && restic.violations.is_empty();
    let elapsed_millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(TourReport {
        folder: folder.to_owned(),
        kept: keep,
        writes_per_second,
        first,
        second,
        damage,
        fence,
        restore: restored,
        restore_millis,
        proof,
        restic,
        elapsed_millis,
        proven,
    })
}
