//! Holding the tables, taking the view, and letting go.
//!
//! `prepare` locks every table against TRUNCATE and rewriting DDL (ACCESS SHARE, as any reader does) in a
//! transaction that has not looked at anything yet: a lock fixes no view, the first query does. That
//! first query is the cut: one round trip per database, all databases at once. It exports the view, so
//! that the sessions that copy can show it, too.
//!
//! Nothing here reads rows.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;
use stillpoint_core::tree::FileTime;

use super::Postgres;
use super::catalog::{self, Relation};
use super::client::{Facts, list_databases};
use super::pool::{BEGIN, Pool};
use super::session::Session;
use super::stamp;
use super::tools::Tools;
use super::wire::literal;

/// What the position of a view is called.
const POSITION: &str = "postgres-snapshot";
/// How often tables are listed anew when some vanish before they can be locked.
const LISTINGS_MAX: u32 = 5;
/// How long the locks of `prepare` stay without harm. They hold up DDL, and nothing else.
const SAFE_FOR: Duration = Duration::from_secs(300);
/// Sessions of ours, for whoever must end them after a crash.
const NAME: &str = "stillpoint";

/// What the driver holds of the server.
#[derive(Debug, Default)]
pub(super) struct State {
    observer: Option<(Session, Facts)>,
    pub(super) held: Vec<Held>,
    /// Whether the transactions have looked: the next cut must begin new ones, also after one that failed.
    looked: bool,
    pub(super) view: Option<Arc<View>>,
}

/// One database, its tables locked.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) database: String,
    /// Holds the locks and, from the cut on, the view.
    pub(super) control: Session,
    /// Process and start of the control session, for a release after a crash.
    remains: String,
    lock: String,
    pub(super) pool: Arc<Pool>,
    bytes_estimate: u64,
    /// The tables of the view that are copied by their names.
    pub(super) copied: BTreeSet<u32>,
}

impl Held {
    /// A table that is copied whose name stands for something else by now, or whose rows were moved.
    pub(super) fn moved(&mut self) -> Result<Option<String>> {
        let moved = catalog::moved(&mut self.control)?;
        Ok(moved.into_iter().find(|(oid, _)| self.copied.contains(oid)).map(|(_, label)| label))
    }
}

/// What the cut showed.
#[derive(Debug)]
pub(super) struct View {
    pub(super) pin: Pin,
    pub(super) facts: Facts,
    /// How far a standby was behind its primary, for people.
    pub(super) lag: Option<String>,
    pub(super) databases: Vec<DatabaseView>,
    /// When it was taken, by the clock of this machine.
    pub(super) time: FileTime,
}

/// One database of the view.
#[derive(Debug, Clone)]
pub(super) struct DatabaseView {
    pub(super) name: String,
    /// Under which name the server exported it.
    pub(super) exported: String,
    /// `xmin:xmax:xip` as `pg_current_snapshot()` has it.
    pub(super) snapshot: String,
    /// The write-ahead log's position near the view: later than what the view shows, or equal.
    pub(super) log: String,
    pub(super) pool: Arc<Pool>,
}

impl Postgres {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view that belongs to a pin of this value.
    pub(super) fn view(&self, pin: &Pin) -> Result<Arc<View>> {
        let view = self.state().view.clone().filter(|view| view.pin.cut == pin.cut);
        view.ok_or_else(|| {
            Error::new(Kind::PinLost, "the view of the cut is gone").hint("views end with the process that took them")
        })
    }
}

/// Connects, finds the databases and locks their tables.
pub(super) fn prepare(driver: &Postgres, context: &Context) -> Result<Hold> {
    release_sessions(driver);
    let (mut observer, facts) = driver.look(context)?;
    if facts.standby && !driver.settings.allow_standby {
        return Err(Error::new(
            Kind::Unsupported,
            "the server is a standby: what its primary acknowledged may be missing",
        )
        .hint("name the primary as `host`, or set `allowStandby: true` and read in each point how far it was behind"));
    }
    let mut databases = driver.databases(&mut observer)?;
    let scratch = super::dump::folder(&driver.scratch)?;
    Tools::find(&driver.settings, &driver.endpoint, scratch.path(), facts.major())?;
    let warm = driver.settings.connections / databases.len();
    let held = at_once(&mut databases, |database| hold(driver, &facts, &database.name, warm, context))?;
    let bytes: u64 = held.iter().map(|held| held.bytes_estimate).sum();
    let mut state = driver.state();
    *state = State { observer: Some((observer, facts)), held, looked: false, view: None };
    Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) })
}

/// Does the same for each of many, all at the same time; the first error wins.
fn at_once<T: Send, R: Send>(many: &mut [T], work: impl Fn(&mut T) -> Result<R> + Sync) -> Result<Vec<R>> {
    if let [one] = many {
        return Ok(vec![work(one)?]);
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = many.iter_mut().map(|one| scope.spawn(|| work(one))).collect();
        let joined = running.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(Error::internal("a thread that talks to a database panicked")))
        });
        // All are joined before the first error is returned.
        joined.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Opens the session that will hold the view of one database, and locks its tables.
fn hold(driver: &Postgres, facts: &Facts, database: &str, warm: usize, context: &Context) -> Result<Held> {
    let mut control = driver.connect(database, context)?;
    let seconds = driver.settings.lock_timeout_seconds;
    control.execute(&format!("SET lock_timeout = '{seconds}s'"))?;
    let remains = control.query_one(
        "SELECT pid || ' ' || extract(epoch FROM backend_start) FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    )?;
    let remains = remains.string(0)?;
    stamp::refuse_strangers(&mut control, |schema, table| driver.settings.names_table(schema, table))?;
    let (relations, lock) = lock_tables(driver, &mut control, database)?;
    let pool = Arc::new(Pool::new(&driver.endpoint, database, seconds));
    let locks = relations.iter().filter(|relation| relation.lockable()).count();
    // Where locks are scarce, tables are locked by who reads them, when he does.
    if (locks * (warm + 1)) as u64 <= facts.locks_max / 4 {
        pool.warm(warm, &lock, context)?;
    }
    Ok(Held {
        database: database.to_owned(),
        control,
        remains,
        lock,
        bytes_estimate: relations.iter().map(|relation| relation.blocks * facts.block_bytes).sum(),
        pool,
        copied: BTreeSet::new(),
    })
}

/// Lists the tables and locks them, again if some vanish in between. The session is left in a
/// transaction that has not looked at anything yet.
fn lock_tables(driver: &Postgres, control: &mut Session, database: &str) -> Result<(Vec<Relation>, String)> {
    let mut listing = 1;
    loop {
        if control.in_transaction() {
            control.execute("ROLLBACK")?;
        }
        let relations = match catalog::relations(control, &driver.settings) {
            // It asks for the sizes of tables, and waits for them.
            Err(error) if error.kind() == Kind::Locked => return Err(name_holders(control, error)),
            other => other?,
        };
        refuse_unreadable(driver, database, &relations)?;
        let lock = lock_statement(&relations);
        match control.execute(&format!("{BEGIN}; {lock}")) {
            Ok(()) => return Ok((relations, lock)),
            Err(error) if error.kind() == Kind::NotFound && listing < LISTINGS_MAX => listing += 1,
            Err(error) if error.kind() == Kind::Locked => {
                control.execute("ROLLBACK")?;
                return Err(name_holders(control, error));
            }
            Err(error) => return Err(error),
        }
    }
}

/// `LOCK TABLE` of all that can be locked; empty if there is nothing.
pub(super) fn lock_statement(relations: &[Relation]) -> String {
    let mut statement = String::new();
    for relation in relations.iter().filter(|relation| relation.lockable()) {
        let head = if statement.is_empty() { "LOCK TABLE ONLY " } else { ", ONLY " };
        statement.push_str(head);
        statement.push_str(&relation.quoted());
    }
    if !statement.is_empty() {
        statement.push_str(" IN ACCESS SHARE MODE");
    }
    statement
}

/// What may not be read is found out before the cut, and by name.
fn refuse_unreadable(driver: &Postgres, database: &str, relations: &[Relation]) -> Result<()> {
    for relation in relations {
        if relation.kind == super::layout::TableKind::Foreign {
            continue;
        }
        let (label, user) = (relation.label(), &driver.settings.user);
        if !relation.readable {
            return Err(Error::new(
                Kind::PermissionDenied,
                format!("role `{user}` may not read table `{label}` of database `{database}`"),
            )
            .hint(format!(
                "GRANT pg_read_all_data TO {};  or leave the table out by `excludeTables`",
                super::wire::identifier(user)
            )));
        }
        if relation.row_security && driver.settings.has_rows(&relation.schema, &relation.name) {
            return Err(Error::new(
                Kind::PermissionDenied,
                format!("row security hides rows of table `{label}` of database `{database}` from role `{user}`"),
            )
            .hint(format!(
                "ALTER ROLE {} BYPASSRLS;  or leave the rows out by `excludeRows`",
                super::wire::identifier(user)
            )));
        }
    }
    Ok(())
}

/// Says which table is held, and by whom. The session must not be in a failed transaction.
pub(super) fn name_holders(session: &mut Session, error: Error) -> Error {
    let sql = "SELECT n.nspname || '.' || c.relname, l.pid, coalesce(a.usename, ''), left(coalesce(a.query, ''), 100), \
               l.granted FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid JOIN pg_class c ON c.oid = l.relation \
               JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_database d ON d.oid = l.database \
               WHERE d.datname = current_database() AND l.mode = 'AccessExclusiveLock' AND c.relkind IN ('r', 'p') \
               AND n.nspname !~ '^pg_' ORDER BY l.granted DESC, c.relname LIMIT 1";
    let database = session.database().to_owned();
    let holder = session.query(sql).ok().and_then(|rows| rows.into_iter().next()).and_then(|row| {
        let verb = if row.truth(4) { "is held" } else { "is waited for" };
        Some(format!(
            "table `{}` of database `{database}` {verb} exclusively by process {} of role `{}`: {}",
            row.text(0).ok()?,
            row.text(1).ok()?,
            row.text(2).ok()?,
            row.text(3).ok()?.split_whitespace().collect::<Vec<_>>().join(" ")
        ))
    });
    let message = holder.unwrap_or_else(|| format!("a table of database `{database}` is held exclusively"));
    Error::new(Kind::Locked, message)
        .temporary()
        .hint("wait for the migration or maintenance to end, or raise `lockTimeoutSeconds`")
        .source(error)
}

/// The position now, without touching the view. A standby has none to show: it stands still while the
/// primary acknowledges writes.
pub(super) fn observe(driver: &Postgres) -> Result<Option<Position>> {
    let mut state = driver.state();
    if state.observer.is_none() {
        let context = Context::default();
        state.observer = Some(driver.look(&context)?);
    }
    if let Some((session, _)) = &mut state.observer {
        session.set_limit(Some(driver.settings.connect_time_max()));
    }
    let Some((session, facts)) = state.observer.as_mut().filter(|(_, facts)| !facts.standby) else { return Ok(None) };
    let sql = format!("SELECT pg_current_snapshot()::text, {}", log_position(facts));
    let row = session.query_one(&sql)?;
    Ok(Some(position(facts, row.text(0)?, row.text(1)?)))
}

fn log_position(facts: &Facts) -> &'static str {
    if facts.standby { "pg_last_wal_replay_lsn()::text" } else { "pg_current_wal_insert_lsn()::text" }
}

/// A snapshot changes with every transaction that ends, in whatever database, and with nothing else: a
/// write becomes visible in no other way. The log's position would change with checkpoints, too. On a
/// standby a snapshot does not list what is under way, so that the log has to say it.
fn position(facts: &Facts, snapshot: &str, log: &str) -> Position {
    let mut text = format!("{}/{}/{snapshot}", facts.system_identifier, facts.timeline);
    if facts.standby {
        text.push('/');
        text.push_str(log);
    }
    Position::new(POSITION, text)
}

/// Takes the view of every database.
pub(super) fn cut(driver: &Postgres, context: &Context, cut: &CutId) -> Result<Pin> {
    context.check()?;
    let mut state = driver.state();
    if let Some(view) = state.view.as_ref().filter(|view| view.pin.cut == *cut) {
        return Ok(view.pin.clone());
    }
    let State { observer: Some((session, facts)), held, looked, view } = &mut *state else {
        return Err(Error::internal("the cut came before `prepare`"));
    };
    if held.is_empty() {
        return Err(Error::internal("the cut came before `prepare`"));
    }
    *view = None;
    session.set_limit(Some(driver.settings.connect_time_max()));
    let again = std::mem::replace(looked, true);
    let facts = facts.clone();
    let databases: Vec<DatabaseView> = at_once(held, |held| take(driver, held, &facts, again))?;
    refuse_new_databases(driver, held)?;
    let lag = if facts.standby { Some(lag(session)?) } else { None };
    let first = &databases[0];
    let mut position = position(&facts, &first.snapshot, &first.log);
    if databases.iter().any(|other| other.snapshot != first.snapshot) {
        // One server, yet not one instant: the position says so, and equals no other.
        for other in &databases[1..] {
            position.text.push(' ');
            position.text.push_str(&other.snapshot);
        }
    }
    let remains = held.iter().map(|held| held.remains.clone()).collect();
    let pin = Pin { cut: cut.clone(), position, remains };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = FileTime { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() };
    *view = Some(Arc::new(View { pin: pin.clone(), facts, lag, databases, time }));
    Ok(pin)
}

/// How far a standby is behind, as far as it knows: what it has not received it cannot tell of.
fn lag(session: &mut Session) -> Result<String> {
    let row = session.query_one(
        "SELECT coalesce(pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text, 'an unknown number of'), \
         coalesce(round(extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()))::text \
         || ' seconds before', 'at a time unknown to'), pg_is_wal_replay_paused()",
    )?;
    let paused = if row.truth(2) { "; its replay was paused" } else { "" };
    Ok(format!(
        "taken from a standby: {} bytes of log were received and not applied, the last transaction it shows was \
         committed {} the cut{paused}; later writes of the primary are not in the point",
        row.text(0)?,
        row.text(1)?
    ))
}

/// A database that was made since `prepare` is held by nobody: what was written into it would be missing.
fn refuse_new_databases(driver: &Postgres, held: &mut [Held]) -> Result<()> {
    let shown = list_databases(&mut held[0].control)?;
    let is_held = |name: &str| held.iter().any(|held| held.database == name);
    match shown.iter().find(|one| driver.settings.has_database(&one.name) && !is_held(&one.name)) {
        None => Ok(()),
        Some(new) => Err(Error::new(Kind::Conflict, format!("database `{}` was made during the cut", new.name))
            .temporary()
            .hint("the next try takes it in; or leave it out by `excludeDatabases`")),
    }
}

/// Takes the view of one database: the first query of the transaction. It ends in time, whatever becomes of the
/// network: who waits for it holds writers back.
fn take(driver: &Postgres, held: &mut Held, facts: &Facts, again: bool) -> Result<DatabaseView> {
    let settings = &driver.settings;
    let locks_within = Duration::from_secs(settings.lock_timeout_seconds.into());
    held.control.set_limit(Some(settings.connect_time_max() + locks_within));
    let look = format!("SELECT pg_export_snapshot(), pg_current_snapshot()::text, {}", log_position(facts));
    let row = if again {
        let lock = if held.lock.is_empty() { String::new() } else { format!("{}; ", held.lock) };
        match held.control.query_one(&format!("ROLLBACK; {BEGIN}; {lock}{look}")) {
            // A table was dropped since.
            Err(error) if error.kind() == Kind::NotFound => {
                let (_, lock) = lock_tables(driver, &mut held.control, &held.database)?;
                held.lock = lock;
                held.control.query_one(&look)?
            }
            other => other?,
        }
    } else {
        held.control.query_one(&look)?
    };
    let exported = row.string(0)?;
    held.pool.show(&exported);
    Ok(DatabaseView {
        name: held.database.clone(),
        exported,
        snapshot: row.string(1)?,
        log: row.string(2)?,
        pool: Arc::clone(&held.pool),
    })
}

/// Whether the sessions that hold the view are the same as at the cut.
pub(super) fn still_valid(driver: &Postgres, pin: &Pin) -> Result<Validity> {
    let view = match driver.view(pin) {
        Ok(view) => view,
        Err(error) => return Ok(Validity::Lost(error.to_string())),
    };
    let mut state = driver.state();
    for (held, database) in state.held.iter_mut().zip(&view.databases) {
        held.control.set_limit(Some(driver.settings.connect_time_max()));
        let sql = "SELECT pg_current_snapshot()::text, pg_postmaster_start_time()::text";
        let row = match held.control.query_one(sql) {
            Ok(row) => row,
            Err(error) => {
                let why = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
                return Ok(Validity::Lost(format!("the view of database `{}` is gone: {error}{why}", database.name)));
            }
        };
        if row.text(0)? != database.snapshot || row.text(1)? != view.facts.started {
            return Ok(Validity::Lost(format!("database `{}` shows another view", database.name)));
        }
        held.control.set_limit(None);
        match held.moved() {
            Ok(None) => {}
            Ok(Some(label)) => {
                let why = "was renamed, replaced or emptied while it was copied";
                return Ok(Validity::Lost(format!("table `{label}` of database `{}` {why}", database.name)));
            }
            Err(error) => return Ok(Validity::Lost(format!("database `{}`: {error}", database.name))),
        }
    }
    Ok(Validity::Valid)
}

/// Ends all sessions; after a crash also those of the process that died.
pub(super) fn release(driver: &Postgres, remains: &[String]) -> Result<()> {
    release_sessions(driver);
    let Some(processes) = parse_remains(remains)? else { return Ok(()) };
    let context = Context::default();
    let (mut session, _) = driver.look(&context)?;
    // Remains come from a bucket: only sessions of ours, of the same role and start, are ended.
    session.execute(&format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = {} AND usename = current_user \
         AND (pid || ' ' || extract(epoch FROM backend_start)) IN ({processes}) AND pid <> pg_backend_pid()",
        literal(NAME)
    ))
}

/// The sessions named, as SQL has them; `None` if there are none.
fn parse_remains(remains: &[String]) -> Result<Option<String>> {
    let mut list = String::new();
    for one in remains {
        let sensible = one.split(' ').count() == 2 && one.chars().all(|c| c.is_ascii_digit() || matches!(c, ' ' | '.'));
        if !sensible {
            return Err(Error::new(Kind::Corrupt, format!("`{one}` names no session")));
        }
        let comma = if list.is_empty() { "" } else { ", " };
        write!(list, "{comma}{}", literal(one)).map_err(|_| Error::internal("a text cannot be written"))?;
    }
    Ok(Some(list).filter(|list| !list.is_empty()))
}

fn release_sessions(driver: &Postgres) {
    let State { observer, held, .. } = std::mem::take(&mut *driver.state());
    for held in held {
        held.pool.close();
        held.control.close();
    }
    if let Some((session, _)) = observer {
        session.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remains_are_taken_for_nothing_but_sessions() {
        assert_eq!(parse_remains(&[]).unwrap(), None);
        let good = ["12 1763.5".to_owned(), "13 2.000001".to_owned()];
        assert_eq!(parse_remains(&good).unwrap().unwrap(), "'12 1763.5', '13 2.000001'");
        for bad in ["1", "1 2 3", "1') OR true --", "x y"] {
            assert_eq!(parse_remains(&[bad.to_owned()]).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
    }
}
