//! `stillpoint copy`

use std::collections::BTreeMap;

use clap::Args;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::platform::Secret;
use stillpoint_engine::ops::copy::{self, CopyRequest, CopySummary};
use stillpoint_engine::secrets;

use crate::app::{App, Outcome};
use crate::render;

/// Copy points to a second bucket, another region or account, verifying what is copied.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint copy --to /mnt/usb/backup                 every point that is not there yet
  stillpoint copy latest --to s3://dr/prod --option region=eu-west-1 \\
      --credential access_key_id=env:DR_KEY --credential secret_access_key=env:DR_SECRET
  stillpoint copy --to /mnt/usb/backup --key env:USB_PASSWORD")]
pub struct Arguments {
    /// Points by id, first characters, or `latest`; all of the platform's if none is named.
    points: Vec<String>,
    /// The other bucket; created if it is empty.
    #[arg(long, value_name = "URL")]
    to: String,
    /// What unlocks the other bucket; the same key if not given.
    #[arg(long, value_name = "SECRET")]
    key: Option<String>,
    /// An option of the other bucket, as under `bucket.options`.
    #[arg(long, value_name = "NAME=VALUE")]
    option: Vec<String>,
    /// A credential of the other bucket, as under `bucket.credentials`.
    #[arg(long, value_name = "NAME=SECRET")]
    credential: Vec<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let secret = |text: &str| {
        secrets::check_form(text)?;
        Ok(Secret(text.to_owned()))
    };
    let credentials = arguments
        .credential
        .iter()
        .map(|text| pair(text).and_then(|(name, value)| Ok((name, secret(&value)?))))
        .collect::<Result<BTreeMap<_, _>>>()?;
    let request = CopyRequest {
        url: arguments.to.clone(),
        options: arguments.option.iter().map(|text| pair(text)).collect::<Result<_>>()?,
        credentials,
        key: arguments.key.as_deref().map(secret).transpose()?,
        points: arguments.points.clone(),
    };
    let session = app.session()?;
    let report = app.watching("copy", || copy::run(&session, &request, &app.context))?;
    Outcome::done(screen(&report), &report)
}

fn pair(text: &str) -> Result<(String, String)> {
    // The value may be a secret in the wrong place; the message does not repeat it.
    let error = || Error::new(Kind::Config, "an option must be written as NAME=VALUE");
    let (name, value) = text.split_once('=').ok_or_else(error)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn screen(report: &CopySummary) -> String {
    let created = if report.created { " (created)" } else { "" };
    let mut text = format!("{} → {}{created}\n", report.from, report.to);
    for point in &report.copied {
        text.push_str(&format!("  copied {point}\n"));
    }
    if report.blobs_healed > 0 {
        let blobs = render::plural(report.blobs_healed, "blob", "blobs");
        text.push_str(&format!("  {blobs} that the other bucket had lost, of points that it has, copied again;\n  `stillpoint prune` there takes what is lost out of its index\n"));
    }
    text.push_str(&format!(
        "{} copied, {} there already · new in the other bucket {}\n",
        render::plural(report.copied.len() as u64, "point", "points"),
        report.present.len(),
        render::bytes(report.bytes_stored),
    ));
    text
}
