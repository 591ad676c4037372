//! What is looked at before anything is written: whether this server can take the point, and whether
//! there is room under the names.

use stillpoint_core::driver::{Loss, RestoreMode, RestoreRequest};
use stillpoint_core::error::{Error, Kind, Result};

use super::super::client;
use super::super::config::Settings;
use super::super::session::Session;
use super::super::stamp::Note;
use super::super::wire::{identifier, literal};
use super::source::Stored;
use super::{Goal, Old, Way, database};

/// The server that is restored to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) major: u32,
}

/// Refuses a name that is no part of this store, as its settings have it.
pub(super) fn is_ours(settings: &Settings, name: &str) -> Result<()> {
    let is_named = settings.rename.values().any(|renamed| renamed == name);
    match settings.has_database(name) || is_named {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Config,
            format!("database `{name}` of the point is not among the databases of the target"),
        )
        .hint("see its `databases` and `excludeDatabases`; give it another name with `rename`, or restore one database as the part")),
    }
}

/// Checks version, state and extensions of the server.
pub(super) fn target(way: &Way<'_>, admin: &mut Session, stored: &Stored, losses: &mut Vec<Loss>) -> Result<Target> {
    let facts = client::facts(admin)?;
    let (major, source) = (facts.major(), stored.server.version_number / 10_000);
    if facts.standby {
        return Err(Error::new(Kind::Unsupported, "the target is a standby: it takes no writes")
            .hint("restore into its primary"));
    }
    if major < source {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the target is PostgreSQL {major}, the point is of {source}"),
        )
        .hint("definitions may use what the older version lacks: restore into the same version or a newer one"));
    }
    let mut missing = Vec::new();
    for stored in &stored.databases {
        for (name, _, version) in &stored.about.extensions {
            let rows = admin.query(&format!(
                "SELECT pg_catalog.bool_or(version = {}) FROM pg_catalog.pg_available_extension_versions \
                 WHERE name = {} HAVING pg_catalog.count(*) > 0",
                literal(version),
                literal(name)
            ))?;
            if rows.is_empty() {
                missing.push(format!("{name} {version}"));
            }
        }
    }
    missing.sort();
    missing.dedup();
    if !missing.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("the target lacks extensions: {}", missing.join(", ")))
            .hint("install their packages on the target's machine, then restore again"));
    }
    preloaded(admin, stored, losses)?;
    way.context.check()?;
    Ok(Target { major })
}

/// Names libraries that the source's server loads at its start and this one does not.
fn preloaded(admin: &mut Session, stored: &Stored, losses: &mut Vec<Loss>) -> Result<()> {
    const NAME: &str = "shared_preload_libraries";
    let wanted = stored.server.settings.get(NAME).map_or("", String::as_str);
    let here = match admin.query_one(&format!("SELECT pg_catalog.current_setting('{NAME}')")) {
        Ok(row) => row.string(0)?,
        // Who may not know does not hear of it.
        Err(error) if error.kind() == Kind::PermissionDenied => return Ok(()),
        Err(error) => return Err(error),
    };
    let is_here = |library: &&str| here.split(',').any(|there| there.trim() == *library);
    let absent: Vec<&str> =
        wanted.split(',').map(str::trim).filter(|library| !library.is_empty() && !is_here(library)).collect();
    if !absent.is_empty() {
        losses.push(Loss {
            what: NAME.to_owned(),
            why: format!("the source loads {}, the target does not", absent.join(", ")),
        });
    }
    Ok(())
}

/// Finds what has the names now, and refuses what must not be touched.
pub(super) fn databases(
    way: &Way<'_>,
    admin: &mut Session,
    goals: &mut [Goal<'_>],
    request: &RestoreRequest,
) -> Result<()> {
    for goal in goals {
        if !client::has_database(admin, &goal.name)? {
            goal.old = Old::Absent;
            continue;
        }
        let kept = database::kept_name(&goal.name, &request.restore);
        if client::has_database(admin, &kept)? {
            return Err(Error::new(Kind::AlreadyExists, format!("database `{kept}` is there from an earlier restore"))
                .hint("drop it, or rename it, then restore again"));
        }
        let seen = database::content(&mut way.connect(&goal.name)?)?;
        goal.old = match (seen, request.mode) {
            (Some(seen), RestoreMode::Fresh) => {
                return Err(Error::new(Kind::AlreadyExists, format!("database `{}` holds something", goal.name))
                    .context("namely", seen)
                    .hint("restore it under another name with `rename`, or replace it with --in-place"));
            }
            (None, _) => Old::Empty(kept),
            (Some(_), RestoreMode::InPlace) => Old::Kept(kept),
        };
    }
    Ok(())
}

/// Opens what an earlier try of the same restore closed before it was killed: what was built beside it, or
/// the name it was kept under, says so. What was half built goes.
pub(super) fn tidy_up(way: &Way<'_>, admin: &mut Session, goals: &[Goal<'_>], request: &RestoreRequest) -> Result<()> {
    let listed = client::list_databases(admin)?;
    for goal in goals {
        for restore in std::iter::once(request.restore.clone()).chain(request.earlier()) {
            let building = database::building_name(&goal.name, &restore);
            let was_building = listed.iter().any(|one| one.name == building);
            let kept = database::kept_name(&goal.name, &restore);
            let is_ours = |name: &str| name == kept || (was_building && name == goal.name);
            for closed in listed.iter().filter(|one| !one.open && is_ours(&one.name)) {
                admin.execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", identifier(&closed.name)))?;
            }
            if was_building {
                database::remove(way, admin, &building)?;
            }
        }
    }
    Ok(())
}

/// Whether an earlier try of the same restore put all of it in place, and was ended before it could say so:
/// every database bears the note of that, and nobody was let in since. Returns what it could not bring back.
pub(super) fn in_place(
    way: &Way<'_>,
    admin: &mut Session,
    goals: &mut [Goal<'_>],
    request: &RestoreRequest,
) -> Result<Option<Vec<Loss>>> {
    let mut losses = Vec::new();
    for goal in goals.iter_mut() {
        if !client::has_database(admin, &goal.name)? {
            return Ok(None);
        }
        let note = Note::read(&mut way.connect(&goal.name)?)?;
        let Some(note) = note.filter(|note| note.is_of(request, &goal.stored.about)) else { return Ok(None) };
        let kept = database::kept_name(&goal.name, &note.restore);
        // What it holds is looked at before it goes.
        goal.old = if client::has_database(admin, &kept)? { Old::Empty(kept) } else { Old::Absent };
        losses = note.losses;
    }
    Ok(Some(losses))
}

/// Whether the names are still as they were found; asked again right before they are taken.
pub(super) fn still_free(admin: &mut Session, goals: &[Goal<'_>]) -> Result<()> {
    for goal in goals.iter().filter(|goal| goal.old == Old::Absent) {
        if client::has_database(admin, &goal.name)? {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("database `{}` was made by somebody meanwhile", goal.name),
            ));
        }
    }
    Ok(())
}
