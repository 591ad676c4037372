//! Loaded databases get their names, all or none.
//!
//! Renaming is transactional in PostgreSQL, so one transaction gives every old database its second name
//! and every new one the name it is for. What is not transactional is to keep others out: a database that
//! is in use cannot be renamed, so the old ones are closed and their sessions ended first, and opened
//! again whatever comes of it.

use std::time::{Duration, Instant};

use stillpoint_core::error::{Error, Kind, Result};

use super::restore::database::end_sessions;
use super::session::Session;
use super::wire::{identifier, literal};

/// How long sessions that were ended may take to go.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// One database that was built, and what it replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Swap {
    /// The name it was built under.
    pub(super) built: String,
    /// The name it is for.
    pub(super) name: String,
    /// Where what has that name now goes; `None` if nothing has it.
    pub(super) old_to: Option<String>,
}

/// Gives every database its name, or changes nothing.
pub(super) fn swap_all(admin: &mut Session, swaps: &[Swap]) -> Result<()> {
    let olds: Vec<&str> = swaps.iter().filter(|swap| swap.old_to.is_some()).map(|swap| swap.name.as_str()).collect();
    let mut closed: Vec<(&str, bool)> = Vec::new();
    let done = olds
        .iter()
        .try_for_each(|name| {
            let was_open = close(admin, name)?;
            closed.push((name, was_open));
            Ok(())
        })
        .and_then(|()| rename_all(admin, swaps));
    // Under the new names after a success: what is kept must stay usable.
    let mut stuck = Vec::new();
    for (name, was_open) in closed.iter().filter(|(_, was_open)| *was_open) {
        let now = match &done {
            Ok(()) => {
                swaps.iter().find(|swap| swap.name == **name).and_then(|swap| swap.old_to.as_deref()).unwrap_or(name)
            }
            Err(_) => name,
        };
        if let Err(error) = admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS {was_open}", identifier(now))) {
            stuck.push(format!("{now}: {error}"));
        }
    }
    match (done, stuck.is_empty()) {
        (done, true) => done,
        (Err(error), false) => Err(error
            .context("databases that stay closed", stuck.join("; "))
            .hint("ALTER DATABASE … ALLOW_CONNECTIONS true opens them again")),
        (Ok(()), false) => {
            Err(Error::new(Kind::Io, "the databases are restored, but the old ones could not be opened again")
                .context("closed", stuck.join("; ")))
        }
    }
}

/// Lets nobody in any more and ends the sessions there are. Returns whether it was open.
fn close(admin: &mut Session, name: &str) -> Result<bool> {
    let row = admin
        .query_one(&format!("SELECT datallowconn FROM pg_catalog.pg_database WHERE datname = {}", literal(name)))?;
    let was_open = row.truth(0);
    admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", identifier(name)))?;
    let ended = end_all(admin, name);
    if ended.is_err() && was_open {
        admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", identifier(name)))?;
    }
    ended.map(|()| was_open)
}

fn end_all(admin: &mut Session, name: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        end_sessions(admin, name).map_err(|error| {
            error
                .context("database", name)
                .hint("GRANT pg_signal_backend TO the restoring role, or stop its users first")
        })?;
        let left =
            admin.query(&format!("SELECT 1 FROM pg_catalog.pg_stat_activity WHERE datname = {}", literal(name)))?;
        if left.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > GONE_WITHIN {
            return Err(Error::new(Kind::Locked, format!("sessions in database `{name}` do not end"))
                .context("sessions", left.len())
                .hint("stop the programs that use it, and restore again"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn rename_all(admin: &mut Session, swaps: &[Swap]) -> Result<()> {
    let mut steps = Vec::new();
    for swap in swaps {
        if let Some(old_to) = &swap.old_to {
            steps.push((swap.name.as_str(), old_to.as_str()));
        }
        steps.push((swap.built.as_str(), swap.name.as_str()));
    }
    admin.execute("BEGIN")?;
    let done = steps.iter().try_for_each(|(from, to)| {
        // Somebody may still look at what was built: our own programs take a moment to go.
        end_sessions(admin, from)?;
        admin
            .execute(&format!("ALTER DATABASE {} RENAME TO {}", identifier(from), identifier(to)))
            .map_err(|error| error.context("database", from))
    });
    match done {
        Ok(()) => admin.execute("COMMIT"),
        Err(error) => {
            // A lost connection takes the transaction back by itself.
            drop(admin.execute("ROLLBACK"));
            Err(error)
        }
    }
}
