//! `stillpoint driver`

use clap::{Args, Subcommand};
use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::StoreName;
use stillpoint_engine::config::Config;
use stillpoint_engine::ops::driver::{self, StoreProbe};

use crate::app::{App, Outcome};
use crate::{exit, render};

/// See what can be protected, what it needs, and whether it works on your own stores.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stillpoint driver list
  stillpoint driver policy sqlite    privileges, versions, limits: the driver's page
  stillpoint driver policy objects --store models    the policy of a bucket's user, to paste
  stillpoint driver schema sqlite    its settings, as JSON schema
  stillpoint driver check            run what changes nothing of the conformance suite on your stores")]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the drivers.
    List,
    /// Print the JSON schema of a driver's settings.
    Schema {
        /// The driver.
        driver: String,
    },
    /// Print what a driver needs: privileges, versions, limits.
    Policy {
        /// The driver.
        driver: String,
        /// Print only the policy for this store of platform.yaml, ready to paste.
        #[arg(long)]
        store: Option<String>,
    },
    /// Probe stores, take a cut of each and drain it to nowhere. Changes nothing.
    Check {
        /// Only these stores of platform.yaml.
        stores: Vec<String>,
    },
}

/// Runs the verb.
pub fn run(arguments: &Arguments, app: &App) -> Result<Outcome> {
    match &arguments.action {
        Action::List => {
            let drivers = driver::list();
            let rows: Vec<_> = drivers.iter().map(|line| vec![line.name.to_owned(), line.about.to_owned()]).collect();
            Outcome::done(render::table(&[], &[], &rows), serde_json::json!({ "drivers": drivers }))
        }
        Action::Schema { driver } => {
            let schema = driver::schema(driver)?;
            Outcome::done(format!("{:#}\n", schema.as_value()), schema)
        }
        Action::Policy { driver, store: Some(store) } => {
            let policy = driver::policy(&app.config()?, driver, &StoreName::new(store.as_str())?)?;
            Outcome::done(policy.clone(), serde_json::json!({ "driver": driver, "store": store, "policy": policy }))
        }
        Action::Policy { driver, store: None } => {
            let page = driver::page(driver)?;
            let example = driver::example_policy(driver)?;
            let mut text = page.readme.to_owned();
            if let Some(example) = &example {
                let command = format!("stillpoint driver policy {driver} --store NAME");
                text.push_str(&format!("\n## The policy\nFor a store of yours: `{command}`.\n\n{example}"));
            }
            let json = serde_json::json!({ "driver": page.name, "page": page.readme, "policy": example });
            Outcome::done(text, json)
        }
        Action::Check { stores } => check(&app.config()?, stores, app),
    }
}

fn check(config: &Config, wanted: &[String], app: &App) -> Result<Outcome> {
    let stores: Vec<StoreName> = match wanted {
        [] => config.platform.stores.keys().cloned().collect(),
        names => names.iter().map(|name| StoreName::new(name.as_str())).collect::<Result<_>>()?,
    };
    let mut text = String::new();
    let mut rows = Vec::new();
    let mut failed = 0;
    for store in &stores {
        let probe = app.block_on(driver::probe(config, store, &app.context))?;
        let report = conformance(config, store)?;
        text.push_str(&probe_screen(&probe));
        for row in &report {
            text.push_str(&format!("    {:<8} {}\n", row.verdict, row.shown()));
            failed += u64::from(row.verdict == "FAILED");
        }
        failed += probe.probe.missing_privileges.len() as u64;
        rows.push(serde_json::json!({ "probe": probe, "cases": report }));
    }
    let exit = if failed == 0 { exit::DONE } else { exit::UNPROVEN };
    if failed > 0 {
        let state = format!("{} found. Nothing was changed.", render::plural(failed, "problem", "problems"));
        text.push_str(&render::last_line(&state, exit));
    }
    Outcome::with(exit, text, serde_json::json!({ "stores": rows }))
}

/// One case of the suite, as shown.
#[derive(serde::Serialize)]
struct Case {
    case: &'static str,
    duty: &'static str,
    verdict: &'static str,
    reason: String,
}

impl Case {
    fn shown(&self) -> String {
        if self.reason.is_empty() { self.duty.to_owned() } else { format!("{}: {}", self.duty, self.reason) }
    }
}

fn conformance(config: &Config, store: &StoreName) -> Result<Vec<Case>> {
    let scratch = tempfile::tempdir().map_err(|error| Error::io("cannot create a temporary folder", error))?;
    let driver = stillpoint_engine::open::driver(config, store, scratch.path())?;
    let run = std::thread::spawn(move || stillpoint_testkit::conformance::run_live(&driver));
    let report = run.join().map_err(|_| Error::new(Kind::Internal, "the conformance suite panicked"))?;
    Ok(report.rows.into_iter().map(case).collect())
}

fn case(row: stillpoint_testkit::conformance::Row) -> Case {
    use stillpoint_testkit::conformance::Outcome as Verdict;
    let (verdict, reason) = match row.outcome {
        Verdict::Passed => ("passed", String::new()),
        Verdict::Skipped(reason) => ("skipped", reason),
        Verdict::Failed(reason) => ("FAILED", reason),
    };
    Case { case: row.name, duty: row.duty, verdict, reason }
}

fn probe_screen(store: &StoreProbe) -> String {
    let probe = &store.probe;
    let can = &probe.capability;
    let yes = |what: &'static str, can: bool| can.then_some(what);
    let promises: Vec<&str> = [
        yes("observes writes", can.observes_writes),
        yes("incremental", can.incremental),
        yes("references", can.edges),
        yes("swaps in place", can.swaps_in_place),
        yes("partial restore", can.partial_restore),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut text = format!("{} · {} {} · {}\n", store.store, store.driver, probe.version, probe.identity.endpoint);
    text.push_str(&format!("    {}\n", promises.join(", ")));
    for missing in &probe.missing_privileges {
        text.push_str(&format!("    missing: {missing}\n"));
    }
    for warning in &probe.warnings {
        text.push_str(&format!("    warning: {warning}\n"));
    }
    text
}
