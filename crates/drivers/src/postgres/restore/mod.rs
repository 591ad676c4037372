//! The way back: databases built beside, checked, and put in place at the end.
//!
//! Each database of the point is built under a name of its own: definitions of tables by `pg_restore`,
//! rows by our own COPY over several connections, then indexes and constraints by `pg_restore` again,
//! materialized views, statistics, and event triggers last. Only when all databases of the restore stand
//! do they get their names, in one transaction. A restore that fails removes what it built and leaves
//! what was there as it was.

pub(super) mod archive;
mod binary;
mod check;
pub(super) mod database;
mod finish;
mod grants;
pub(super) mod load;
mod part;
pub(super) mod pool;
mod roles;
pub(super) mod source;
pub(super) mod statements;

use std::path::Path;

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, Result};
use stillpoint_core::tree::{Tree, TreePath, check_name};

use self::archive::{Archive, Manner, Step};
use self::source::{Stored, StoredDatabase};
use super::config::{Roles, Settings};
use super::layout;
use super::session::Session;
use super::stamp::Note;
use super::swap::{self, Swap, Swapped};
use super::tools::{self, Tools};
use super::wire::identifier;
use super::{Postgres, stamp};

/// What every page of the way back works with.
pub(super) struct Way<'a> {
    pub(super) driver: &'a Postgres,
    pub(super) settings: &'a Settings,
    pub(super) context: &'a Context,
    pub(super) source: &'a dyn Tree,
}

impl<'a> Way<'a> {
    pub(super) fn new(driver: &'a Postgres, context: &'a Context, source: &'a dyn Tree) -> Self {
        Self { driver, settings: &driver.settings, context, source }
    }

    /// A session on a database of the target.
    pub(super) fn connect(&self, database: &str) -> Result<Session> {
        self.driver.connect(database, self.context)
    }

    pub(super) fn scratch(&self) -> &Path {
        &self.driver.scratch
    }

    /// The programs that read the point's archives and talk to a server of version `major`.
    pub(super) fn tools(&self, stored: &Stored, major: u32) -> Result<Tools> {
        let made_by = tools::major_in(&stored.server.tool).unwrap_or(stored.server.version_number / 10_000);
        Tools::find(self.settings, &self.driver.endpoint, self.scratch(), major.max(made_by))
    }
}

/// One database of the restore.
struct Goal<'a> {
    stored: &'a StoredDatabase,
    /// The name it is for.
    name: String,
    /// The name it is built under.
    building: String,
    /// What to do with what has the name now.
    old: Old,
}

/// What is at a target.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Old {
    Absent,
    /// A database that holds nothing; it goes when the new one is in place.
    Empty(String),
    /// It keeps its content under this name.
    Kept(String),
}

/// What a restore made at the server that is not a database.
#[derive(Default)]
struct Made {
    globals: roles::Globals,
}

/// Restores all databases of the point, or the part that the request names.
pub(super) fn restore(
    driver: &Postgres,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    check_name(request.restore.as_bytes())?;
    let way = Way::new(driver, context, source);
    let part = part::Part::of(request.part.as_ref())?;
    let stored = Stored::read(source, part.database().as_deref())?;
    if part.is_below_database() {
        return part::restore(&way, &stored, &part, request);
    }
    let mut goals = goals(&way, &stored, request)?;
    let avoided: Vec<&str> = goals.iter().map(|goal| goal.name.as_str()).collect();
    let mut admin = stamp::admin(driver, context, &avoided)?;
    let mut restored = Restored::default();
    check::tidy_up(&way, &mut admin, &goals, request)?;
    if let Some(losses) = check::in_place(&way, &mut admin, &mut goals, request)? {
        restored.losses = losses;
        return conclude(&way, &mut admin, &goals, restored);
    }
    let target = check::target(&way, &mut admin, &stored, &mut restored.losses)?;
    check::databases(&way, &mut admin, &mut goals, request)?;
    let tools = way.tools(&stored, target.major)?;
    context.expect_bytes(goals.iter().map(|goal| goal.stored.size().1).sum());
    let mut made = Made::default();
    let built = build_all(&way, &mut admin, (&tools, target), &goals, &mut made, &mut restored)
        .and_then(|()| leave_notes(&way, &goals, request, &restored.losses));
    match built.and_then(|()| context.check()).and_then(|()| swaps(&mut admin, &goals, request)) {
        Ok(swaps) => {
            let avoided: Vec<&str> = goals.iter().map(|goal| goal.name.as_str()).collect();
            let reconnect = || stamp::admin(driver, &Context::default(), &avoided);
            match swap::swap_all(&mut admin, &reconnect, &swaps) {
                Swapped::Done(closed) => restored.losses.extend(closed.into_iter().map(|what| Loss {
                    what,
                    why: "it was replaced and kept, and could not be opened again".to_owned(),
                })),
                Swapped::Undone(error) => return Err(take_back(&way, admin, &goals, &made, error)),
                Swapped::Unclear(error) => return Err(error),
            }
        }
        Err(error) => return Err(take_back(&way, admin, &goals, &made, error)),
    }
    conclude(&way, &mut admin, &goals, restored)
}

/// Tells every database what it is, for a later try should this one be ended between the swap and its report.
fn leave_notes(way: &Way<'_>, goals: &[Goal<'_>], request: &RestoreRequest, losses: &[Loss]) -> Result<()> {
    goals
        .iter()
        .try_for_each(|goal| Note::new(request, &goal.stored.about, losses).leave(&mut way.connect(&goal.building)?))
}

/// Counts what was restored, and lets go of old databases that hold nothing.
fn conclude(way: &Way<'_>, admin: &mut Session, goals: &[Goal<'_>], mut restored: Restored) -> Result<Restored> {
    for goal in goals {
        let (rows, bytes) = goal.stored.size();
        restored.items += rows;
        restored.bytes += bytes;
        match &goal.old {
            Old::Kept(name) => restored.kept_old.push(format!("database {name}")),
            // Somebody may have put something into it after it was looked at.
            Old::Empty(name) => match database::content(&mut way.connect(name)?)? {
                Some(_) => restored.kept_old.push(format!("database {name}")),
                None => database::remove(way, admin, name)?,
            },
            Old::Absent => {}
        }
    }
    Ok(restored)
}

/// Which databases are to be made under which names.
fn goals<'a>(way: &Way<'_>, stored: &'a Stored, request: &RestoreRequest) -> Result<Vec<Goal<'a>>> {
    let count = stored.databases.len();
    let goal = |one: &'a StoredDatabase| {
        let name = way.settings.target_name(&one.about.name, count).to_owned();
        check::is_ours(way.settings, &name)?;
        let building = database::building_name(&name, &request.restore);
        Ok(Goal { stored: one, name, building, old: Old::Absent })
    };
    stored.databases.iter().map(goal).collect()
}

/// Builds every database beside its target.
fn build_all(
    way: &Way<'_>,
    admin: &mut Session,
    (tools, target): (&Tools, check::Target),
    goals: &[Goal<'_>],
    made: &mut Made,
    restored: &mut Restored,
) -> Result<()> {
    let globals = source::script(way.source, &TreePath::root().join(layout::GLOBALS.as_bytes())?)?;
    let without_owners = way.settings.roles == Some(Roles::None);
    match globals {
        Some(script) if !without_owners => roles::restore(admin, &script, &mut made.globals)?,
        _ if without_owners => restored.losses.push(Loss {
            what: "owners and privileges".to_owned(),
            why: "left out, as `roles: none` asks: everything belongs to the restoring role".to_owned(),
        }),
        _ => {}
    }
    let missing = &made.globals.tablespaces_missing;
    if !missing.is_empty() {
        restored.losses.push(Loss {
            what: format!("tablespaces {}", missing.iter().cloned().collect::<Vec<_>>().join(", ")),
            why: "not there at this server: what lay in them lies in the default one".to_owned(),
        });
    }
    let manner =
        Manner { without_owners, without_tablespaces: !missing.is_empty(), connections: way.settings.connections };
    for goal in goals {
        let name = &goal.stored.about.name;
        build(way, admin, (tools, target), goal, manner, restored).map_err(|error| error.context("database", name))?;
    }
    restored.losses.append(&mut made.globals.losses);
    Ok(())
}

/// Builds one database: it lacks nothing but its name and its users.
fn build(
    way: &Way<'_>,
    admin: &mut Session,
    (tools, target): (&Tools, check::Target),
    goal: &Goal<'_>,
    manner: Manner,
    restored: &mut Restored,
) -> Result<()> {
    let (stored, building, context) = (goal.stored, goal.building.as_str(), way.context);
    database::create(admin, building, &stored.about, target.major, &mut restored.losses)?;
    let path = source::to_scratch(way.source, &stored.file(layout::DUMP)?, way.scratch(), context)?;
    let archive = Archive::open(tools, &path, context)?;
    let step = |step, restored: &mut Restored| -> Result<()> {
        let mut again = |statement: &str| way.connect(building)?.execute(statement);
        restored.losses.append(&mut archive.restore(tools, building, (step, manner), &mut again, context)?);
        context.check()
    };
    step(Step::Tables, restored)?;
    let loads = loads(stored)?;
    load::tables(way, building, stored, &loads)?;
    load::large_objects(way, building, stored, !manner.without_owners)?;
    load::sequences(way, building, stored)?;
    step(Step::Indexes, restored)?;
    fill_views(way, building, stored)?;
    finish::statistics(way, building, stored, target.major)?;
    let opening = database::opening(admin, &goal.name, stored, !manner.without_owners)?;
    stamp::plan_opening(&mut way.connect(building)?, &opening)?;
    step(Step::EventTriggers, restored)?;
    restored.losses.append(&mut finish::inspect(way, building, stored)?);
    complete(admin, goal, manner, restored)
}

/// Fills materialized views on a session of their own.
fn fill_views(way: &Way<'_>, building: &str, stored: &StoredDatabase) -> Result<()> {
    let mut session = way.connect(building)?;
    session.execute(load::BEGIN)?;
    let all: Vec<&layout::Table> = stored.tables.iter().collect();
    finish::materialized_views(way, &mut session, &all)?;
    session.close();
    Ok(())
}

/// Every table with rows, into the table of the same name.
fn loads(stored: &StoredDatabase) -> Result<Vec<load::Load<'_>>> {
    let load = |table| {
        let table: &layout::Table = table;
        let into = (table.schema.clone(), table.name.clone());
        Ok(load::Load { table, total: stored.total(table)?, into, is_ours: true })
    };
    stored.tables_with_rows().map(load).collect()
}

/// Settings, comment and owner.
fn complete(admin: &mut Session, goal: &Goal<'_>, manner: Manner, restored: &mut Restored) -> Result<()> {
    let (stored, building) = (goal.stored, goal.building.as_str());
    if let Some(comment) = &stored.about.comment {
        admin.execute(&format!("COMMENT ON DATABASE {} IS {}", identifier(building), super::wire::literal(comment)))?;
    }
    let mut last = finish::settings(stored, building);
    if !manner.without_owners {
        let owner = format!("ALTER DATABASE {} OWNER TO {}", identifier(building), identifier(&stored.about.owner));
        last.push((owner, format!("owner {} of {}", stored.about.owner, goal.name)));
    }
    for (statement, what) in last {
        match admin.execute(&statement) {
            Ok(()) => {}
            Err(error) if error.kind() == stillpoint_core::error::Kind::PermissionDenied => {
                restored.losses.push(Loss { what, why: "not restored: this role may not set it".to_owned() });
            }
            Err(error) => return Err(error.context("of", what)),
        }
    }
    Ok(())
}

/// Which names change. Looks once more: somebody may have made something meanwhile.
fn swaps(admin: &mut Session, goals: &[Goal<'_>], request: &RestoreRequest) -> Result<Vec<Swap>> {
    let mut swaps = Vec::new();
    for goal in goals {
        let old_to = match &goal.old {
            Old::Absent => None,
            Old::Empty(name) | Old::Kept(name) => Some(name.clone()),
        };
        swaps.push(Swap { built: goal.building.clone(), name: goal.name.clone(), old_to });
    }
    if request.mode == RestoreMode::Fresh {
        check::still_free(admin, goals)?;
    }
    Ok(swaps)
}

/// Removes what a failed restore made, and returns why it failed. What cannot be removed is named.
fn take_back(way: &Way<'_>, admin: Session, goals: &[Goal<'_>], made: &Made, error: Error) -> Error {
    // The restore may have been cancelled, or its connection lost: cleaning up takes a fresh one.
    drop(admin);
    let calm = Context::default();
    let way = Way { context: &calm, ..Way::new(way.driver, way.context, way.source) };
    let mut left = Vec::new();
    match stamp::admin(way.driver, &calm, &[]) {
        Ok(mut admin) => {
            for goal in goals {
                if let Err(cause) = database::remove(&way, &mut admin, &goal.building) {
                    left.push(format!("database {} ({cause})", goal.building));
                }
            }
            left.extend(roles::take_back(&mut admin, &made.globals.made));
        }
        Err(cause) => left.extend(goals.iter().map(|goal| format!("database {} ({cause})", goal.building))),
    }
    match left.is_empty() {
        true => error,
        false => error
            .context("left behind", left.join("; "))
            .hint("what was there before is untouched; what is left behind can be dropped, or goes when the same restore is tried again"),
    }
}
