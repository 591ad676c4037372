//! `stillpoint init`

use std::path::PathBuf;

use clap::Args;
use stillpoint_core::Result;
use stillpoint_core::id::{EnvironmentName, PlatformName};
use stillpoint_core::platform::Secret;
use stillpoint_engine::ops::init::{self, InitReport, InitRequest};
use stillpoint_engine::secrets;

use crate::app::{App, Outcome};

/// Look around, write a commented platform.yaml, and create the bucket with its key.
///
/// Looks into the folders that are named (or this one) for SQLite databases, git repositories and
/// folders of objects, at the environment and at local servers; takes servers and buckets that are
/// named by address. Never overwrites a file. If platform.yaml is there already, only the bucket
/// and its key are made.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint init                             look around here
  stillpoint init /srv/app.db /srv/objects    protect these
  stillpoint init postgresql://backup@db/app redis://cache s3://ml-artifacts/prod
  stillpoint init /srv/app --bucket s3://backups/app --key env:BACKUP_PASSWORD

A whole platform.yaml:
  apiVersion: stillpoint.dev/v1
  platform: churn
  environment: production
  bucket: { url: /mnt/backup, key: \"file:stillpoint.key\" }
  stores:
    meta: { driver: sqlite, path: /srv/meta.db }
    artifacts: { driver: objects, path: /srv/objects }")]
pub struct Arguments {
    /// Databases, repositories and folders to protect, or folders to search; or addresses of
    /// servers and buckets.
    paths: Vec<PathBuf>,
    /// Where recovery points go: a folder, s3://…, gs://… or az://….
    #[arg(long, value_name = "URL")]
    bucket: Option<String>,
    /// The platform's name; that of the folder if not given.
    #[arg(long, value_name = "NAME")]
    platform: Option<String>,
    /// Which copy of the platform this is.
    #[arg(long, value_name = "NAME", default_value = "production")]
    environment: String,
    /// What unlocks the bucket: env:NAME, file:PATH or command:PROGRAM. A key file is generated
    /// if not given.
    #[arg(long, value_name = "SECRET")]
    key: Option<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    if let Some(key) = &arguments.key {
        secrets::check_form(key)?;
    }
    let request = InitRequest {
        file: app.config_path(),
        paths: arguments.paths.clone(),
        bucket: arguments.bucket.clone(),
        platform: arguments.platform.as_deref().map(PlatformName::new).transpose()?,
        environment: Some(EnvironmentName::new(arguments.environment.as_str())?),
        key: arguments.key.clone().map(Secret),
    };
    let report = init::run(&request)?;
    let named = !arguments.paths.is_empty() || arguments.bucket.is_some() || arguments.key.is_some();
    Outcome::done(screen(&report, named || arguments.platform.is_some()), &report)
}

/// `named`: something was asked for that belongs into the file.
fn screen(report: &InitReport, named: bool) -> String {
    let mut text = format!("{} · {} → {}\n", report.platform, report.environment, report.bucket);
    if let Some(seen) = &report.surroundings {
        for store in &seen.stores {
            text.push_str(&format!("  found      {:<14} {:<8} {}\n", store.name, store.driver, store.at));
        }
        for seen in &seen.unprotected {
            let (why, way) = match seen.store {
                Some(_) => ("left out ", "; platform.yaml has the lines to fill in"),
                None => ("no driver", ""),
            };
            text.push_str(&format!("  {why}  {} at {}: not in any point yet{way}\n", seen.what, seen.at));
        }
        if seen.stopped_early {
            text.push_str("  note       there was too much to look at; name the folders that matter\n");
        }
        text.push_str(&format!("  written    {}\n", report.file.display()));
    } else {
        text.push_str(&format!("  used       {}, as it was\n", report.file.display()));
        if named {
            text.push_str(
                "  note       what was named here was not added to it: write it there, or name another --config\n",
            );
        }
    }
    let made = if report.created_repository { "created" } else { "was there already" };
    text.push_str(&format!("  bucket     {made} · {}\n", capability(report)));
    if let (Some(key), Some(sheet)) = (&report.key_file, &report.recovery_sheet) {
        text.push_str(&format!("  key        {}, mode 0600: keep it out of version control\n", key.display()));
        text.push_str(&format!("  sheet      {}\n", sheet.display()));
        text.push_str(
            "             print it, lock it away, delete the file: without the key nothing can be restored\n",
        );
    }
    text.push_str("\n  stillpoint backup     makes the first point\n");
    text
}

fn capability(report: &InitReport) -> String {
    let can = &report.capability;
    let mut words = vec![match can.conditional_create {
        true => "conditional writes",
        false => "no conditional writes: let only one machine back up into it",
    }];
    if can.versioning {
        words.push("versioning");
    }
    if can.object_lock {
        words.push("object lock");
    }
    words.join(", ")
}
