//! `stillpoint show`

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use stillpoint_core::Result;
use stillpoint_core::statefile::{Statefile, StoreState};
use stillpoint_engine::ops::show::{self, ShowReport};

use super::list::{level, verdict};
use crate::app::{App, Outcome};
use crate::render;

/// Longest position shown whole; the JSON has all of it.
const POSITION_CHARS_MAX: usize = 60;

/// Show what is in a point, how consistent it is, and how to read it with restic.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint show                 the newest point
  stillpoint show k3f9            the point whose id begins so
  stillpoint show k3f9 --json | jq '.statefile.stores'")]
pub struct Arguments {
    /// A point's id, the first characters of it, or `latest`.
    #[arg(default_value = "latest")]
    point: String,
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    let report = show::run(&app.session()?, &arguments.point)?;
    Outcome::done(screen(&report, Timestamp::now()), &report)
}

fn screen(report: &ShowReport, now: Timestamp) -> String {
    let point = &report.statefile;
    let mut text = headline(point);
    text.push_str(&format!("  {} · {} · {}\n", point.platform, point.environment, report.bucket));
    text.push_str(&format!("  taken {} · {}\n", render::age(point.cut_at, now), consistency(point)));
    text.push_str(&format!(
        "  holds {} in {} · read {} · new in the bucket {}\n",
        render::bytes(point.totals.bytes),
        render::plural(point.totals.files, "file", "files"),
        render::bytes(point.totals.bytes_read),
        render::bytes(point.totals.bytes_stored),
    ));
    text.push_str("stores\n");
    let rows: Vec<Vec<String>> = point.stores.iter().map(|(name, store)| store_row(name.as_str(), store)).collect();
    text.push_str(&render::table(&["store", "driver", "holds", "items", "", "pinned", "position"], &[2, 3, 5], &rows));
    for (name, store) in &point.stores {
        for loss in &store.losses {
            text.push_str(&format!("loss: {name}: {}: {}\n", loss.what, loss.why));
        }
        for note in &store.notes {
            text.push_str(&format!("note: {name}: {note}\n"));
        }
    }
    text.push_str(&references(point));
    text.push_str("without stillpoint\n");
    for command in &report.restic {
        text.push_str(&format!("  {command}\n"));
    }
    text
}

/// `point k3f9 · time · verdict · level · skew`; also the first line of `backup`'s result.
pub fn headline(point: &Statefile) -> String {
    format!(
        "point {} · {} · {} · {} · skew {}\n",
        point.point,
        render::time(point.cut_at),
        verdict(point.verdict),
        level(point.level),
        render::duration(Duration::from_micros(point.skew_micros)),
    )
}

fn consistency(point: &Statefile) -> String {
    let tries = match point.cut_tries {
        0 | 1 => "at the first try".to_owned(),
        more => format!("after {more} tries"),
    };
    let asked = match point.level == point.level_asked {
        true => String::new(),
        false => format!(" (asked for {})", level(point.level_asked)),
    };
    let pause = render::duration(Duration::from_micros(point.pause_micros));
    format!("{}{asked} {tries} · writers held back {pause}", level(point.level))
}

fn store_row(name: &str, store: &StoreState) -> Vec<String> {
    let mut position = format!("{} {}", store.position.kind, store.position.text);
    if position.chars().count() > POSITION_CHARS_MAX {
        position = position.chars().take(POSITION_CHARS_MAX - 1).chain(['…']).collect();
    }
    vec![
        name.to_owned(),
        format!("{} {}", store.driver, store.version),
        render::bytes(store.bytes),
        render::count(store.items),
        store.unit.clone(),
        format!("+{}", render::duration(Duration::from_micros(store.pinned_micros.1))),
        position,
    ]
}

/// What the references came to, one line each.
pub fn references(point: &Statefile) -> String {
    let mut text = String::new();
    if !point.references.is_empty() {
        text.push_str("references\n");
    }
    for reference in &point.references {
        let missing = match reference.missing {
            0 => "none missing".to_owned(),
            missing => format!("{} missing", render::count(missing)),
        };
        let checked = render::count(reference.checked);
        let unreferenced = match reference.unreferenced {
            Some(count @ 1..) => format!(", {} that it does not name", render::count(count)),
            _ => String::new(),
        };
        text.push_str(&format!(
            "  {} → {} {}: {checked} checked, {missing}{unreferenced}\n",
            reference.from, reference.to, reference.kind
        ));
        for (referent, owner) in &reference.examples {
            let owner = if owner.is_empty() { String::new() } else { format!(", named by {owner}") };
            text.push_str(&format!("    missing: {referent}{owner}\n"));
        }
    }
    text
}
