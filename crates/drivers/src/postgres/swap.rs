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

/// What became of a swap.
pub(super) enum Swapped {
    /// Every database has its name. Old ones that could not be opened again are named.
    Done(Vec<String>),
    /// No name has changed.
    Undone(Error),
    /// Nobody could find out. What was made must stay: it may be in use.
    Unclear(Error),
}

/// Gives every database its name, or changes nothing. `reconnect` makes another session like `admin`,
/// which takes its place should it be lost.
pub(super) fn swap_all(admin: &mut Session, reconnect: &dyn Fn() -> Result<Session>, swaps: &[Swap]) -> Swapped {
    let built = match swaps.iter().map(|swap| oid(admin, &swap.built)).collect::<Result<Vec<_>>>() {
        Ok(built) => built,
        Err(error) => return Swapped::Undone(error),
    };
    let mut closed: Vec<&Swap> = Vec::new();
    let done = swaps
        .iter()
        .filter(|swap| swap.old_to.is_some())
        .try_for_each(|swap| close(admin, swap, &mut closed))
        .and_then(|()| rename_all(admin, swaps));
    let failed = match done {
        Ok(()) => None,
        // The answer to COMMIT may have been lost, so that only the names can tell.
        Err(error) => match surely(admin, reconnect, |admin| has_names(admin, swaps, &built)) {
            Ok(true) => None,
            Ok(false) => Some(error),
            Err(cause) => return unclear(error, &cause),
        },
    };
    let mut stuck = Vec::new();
    for swap in closed {
        // Under the new names after a success: what is kept must stay usable.
        let now = swap.old_to.as_ref().filter(|_| failed.is_none()).unwrap_or(&swap.name);
        let open = format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", identifier(now));
        if let Err(error) = surely(admin, reconnect, |admin| admin.execute(&open)) {
            stuck.push(format!("{now}: {error}"));
        }
    }
    match failed {
        None => Swapped::Done(stuck),
        Some(error) if stuck.is_empty() => Swapped::Undone(error),
        Some(error) => Swapped::Undone(
            error
                .context("databases that stay closed", stuck.join("; "))
                .hint("ALTER DATABASE … ALLOW_CONNECTIONS true opens them again, and so does the same restore"),
        ),
    }
}

fn unclear(error: Error, cause: &Error) -> Swapped {
    Swapped::Unclear(error.context("and whether the databases have their names cannot be told", cause).hint(
        "look which databases there are; ALTER DATABASE … ALLOW_CONNECTIONS true opens an old one that is closed",
    ))
}

/// Does `work`, and once more should the session be lost over it.
fn surely<T>(
    admin: &mut Session,
    reconnect: &dyn Fn() -> Result<Session>,
    work: impl Fn(&mut Session) -> Result<T>,
) -> Result<T> {
    revive(admin, reconnect)?;
    work(admin).or_else(|_| {
        revive(admin, reconnect)?;
        work(admin)
    })
}

/// Puts another session in place of one that was lost, once the server has ended what that one did.
fn revive(admin: &mut Session, reconnect: &dyn Fn() -> Result<Session>) -> Result<()> {
    if admin.execute("SELECT 1").is_ok() {
        return Ok(());
    }
    let lost = admin.process();
    *admin = reconnect()?;
    let begun = Instant::now();
    let there = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
         WHERE pid = {lost} AND usename = current_user AND application_name = 'stillpoint'"
    );
    while !admin.query(&there)?.is_empty() {
        if begun.elapsed() > GONE_WITHIN {
            return Err(Error::new(Kind::Locked, "a lost session of ours does not end"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn oid(admin: &mut Session, name: &str) -> Result<u32> {
    admin.query_one(&format!("SELECT oid FROM pg_catalog.pg_database WHERE datname = {}", literal(name)))?.number(0)
}

/// Whether what was built has the names it is for.
fn has_names(admin: &mut Session, swaps: &[Swap], built: &[u32]) -> Result<bool> {
    for (swap, built) in swaps.iter().zip(built) {
        let sql = format!("SELECT datname = {} FROM pg_catalog.pg_database WHERE oid = {built}", literal(&swap.name));
        if !admin.query_one(&sql)?.truth(0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets nobody in any more and ends the sessions there are. Notes in `closed` what was open.
fn close<'a>(admin: &mut Session, swap: &'a Swap, closed: &mut Vec<&'a Swap>) -> Result<()> {
    let name = &swap.name;
    let row = admin
        .query_one(&format!("SELECT datallowconn FROM pg_catalog.pg_database WHERE datname = {}", literal(name)))?;
    if row.truth(0) {
        closed.push(swap);
    }
    admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", identifier(name)))?;
    end_all(admin, name)
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
