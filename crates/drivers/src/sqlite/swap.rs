//! Puts loaded databases in place of what was there: all of them, or none.
//!
//! Apart from the load because only what is here touches the targets. What every database needs is
//! looked at before the first one is moved; when a later one cannot be moved all the same, those
//! before it are put back, each from the second name that its old file has got.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use stillpoint_core::driver::{RestoreMode, RestoreRequest};
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::client::{self, Attempt};

/// What SQLite keeps beside a database.
pub(super) const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// A database that was loaded beside its target.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The file that was loaded.
    pub(super) partial: PathBuf,
    /// The place where it belongs.
    pub(super) target: PathBuf,
}

/// Where the old database is kept.
pub(super) fn kept_path(target: &Path, request: &RestoreRequest) -> PathBuf {
    client::beside(target, &format!(".before-{}", request.restore))
}

/// Puts every loaded file in its target's place, and returns where old content is kept. `refuse` looks
/// at each target once more, since the load may have taken hours.
///
/// # Errors
/// `Locked` if somebody uses one of the databases; what `refuse` says. After any error every target is
/// what it was, unless the error says otherwise.
pub(super) fn swap_all(
    loaded: &[Loaded],
    request: &RestoreRequest,
    busy: Duration,
    refuse: &dyn Fn(&Path) -> Result<()>,
) -> Result<Vec<String>> {
    for Loaded { target, .. } in loaded {
        refuse(target)?;
        if replaces(target, request) {
            // Not held until the end: a lock that is let go after other programs have opened the new
            // file would take their log away. Whoever comes in between is found by the second look.
            drop(lock_old(&client::resolve(target)?, busy)?);
        }
    }
    let mut undo = Undo::default();
    let mut kept_old = Vec::new();
    for one in loaded {
        match swap(one, request, busy, &mut undo) {
            Ok(kept) => kept_old.extend(kept),
            Err(error) => return Err(undo.take_back(error)),
        }
    }
    for aside in undo.asides {
        // What cannot be removed is an empty database under a name of ours, which no drain takes.
        std::fs::remove_file(aside).ok();
    }
    Ok(kept_old)
}

/// Whether the target holds something that must be kept.
fn replaces(target: &Path, request: &RestoreRequest) -> bool {
    request.mode == RestoreMode::InPlace && std::fs::symlink_metadata(target).is_ok_and(|file| file.len() > 0)
}

/// Puts one loaded file in place, in one step that other programs see whole.
fn swap(one: &Loaded, request: &RestoreRequest, busy: Duration, undo: &mut Undo) -> Result<Option<String>> {
    let Loaded { partial, target } = one;
    let what = || format!("cannot put the database in place at {}", target.display());
    if replaces(target, request) {
        let target = client::resolve(target)?;
        let lock = lock_old(&target, busy)?;
        let kept = kept_path(&target, request);
        keep_old(&target, &kept, undo)?;
        // New clients find the old file until this rename and the new one from it on.
        std::fs::rename(partial, &target).or_io(what)?;
        undo.steps.push(Step::Replaced { target: target.clone(), old: kept.clone() });
        drop(lock);
        client::flush_folder(&target)?;
        return Ok(Some(kept.display().to_string()));
    }
    let kept = kept_path(target, request);
    let has_moved = keep_companions(target, &kept, undo)?;
    if std::fs::symlink_metadata(target).is_ok() {
        // An empty file or a database that holds nothing: it needs no keeping once all is done.
        let aside = client::beside(partial, "-aside");
        remove(&aside).or_io(what)?;
        std::fs::hard_link(target, &aside).or_io(what)?;
        undo.asides.push(aside.clone());
        std::fs::rename(partial, target).or_io(what)?;
        undo.steps.push(Step::Replaced { target: target.clone(), old: aside });
    } else {
        renameat_with(CWD, partial, CWD, target, RenameFlags::NOREPLACE)
            .map_err(|error| Error::io(what(), error.into()))?;
        undo.steps.push(Step::Made(target.clone()));
    }
    client::flush_folder(target)?;
    Ok(has_moved.then(|| kept.display().to_string()))
}

/// Takes the database for ourselves, so that nobody writes into what is about to be replaced.
/// `None` when it is too damaged to be locked.
fn lock_old(target: &Path, busy: Duration) -> Result<Option<Connection>> {
    let connection = client::open_writer(target, busy)?;
    // Asked for before the first access, this mode makes WAL databases refuse us for as long as any
    // other connection is open, and leaves no shared memory behind.
    let locked = connection
        .query_row("PRAGMA locking_mode = EXCLUSIVE", [], |_| Ok(()))
        .and_then(|()| connection.execute_batch("BEGIN EXCLUSIVE; COMMIT;"))
        .and_then(|()| connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)))
        .attempt(|| format!("cannot take {} for the restore alone", target.display()));
    match locked {
        Ok(0) => Ok(Some(connection)),
        Ok(_) => Err(Error::new(Kind::Locked, format!("{} is in use", target.display()))
            .hint("stop every program that uses the database")),
        Err(error) if error.kind() == Kind::Corrupt => Ok(None),
        Err(error) => Err(error.hint("stop every program that uses the database")),
    }
}

/// Gives the old files a second name, and takes away what would be replayed into the new file.
fn keep_old(target: &Path, kept: &Path, undo: &mut Undo) -> Result<()> {
    let what = || format!("cannot keep the old database as {}", kept.display());
    std::fs::hard_link(target, kept).or_io(what)?;
    undo.steps.push(Step::Named(kept.to_owned()));
    keep_companions(target, kept, undo)?;
    client::flush_folder(target)
}

/// Moves what holds data beside the target to the name that is kept; whether there was anything.
fn keep_companions(target: &Path, kept: &Path, undo: &mut Undo) -> Result<bool> {
    let what = || format!("cannot keep the old log as {}", kept.display());
    let mut has_moved = false;
    for ending in COMPANIONS {
        let old = client::beside(target, ending);
        match std::fs::metadata(&old) {
            // Left by a database that could not be opened; it belongs to what is kept.
            Ok(file) if file.len() > 0 && ending != "-shm" => {
                let to = client::beside(kept, ending);
                std::fs::rename(&old, &to).or_io(what)?;
                undo.steps.push(Step::Moved { from: old, to });
                has_moved = true;
            }
            Ok(_) => remove(&old).or_io(what)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).or_io(what),
        }
    }
    Ok(has_moved)
}

/// Removes a file; absent is fine.
fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One change to a target's surroundings.
#[derive(Debug)]
enum Step {
    /// The old file got this name besides its own.
    Named(PathBuf),
    /// A file was moved.
    Moved { from: PathBuf, to: PathBuf },
    /// The target is the loaded file now; the old one is at `old`.
    Replaced { target: PathBuf, old: PathBuf },
    /// The target, which was not there, is the loaded file now.
    Made(PathBuf),
}

/// What was changed, in order.
#[derive(Debug, Default)]
struct Undo {
    steps: Vec<Step>,
    /// Second names that nobody needs once everything is in place.
    asides: Vec<PathBuf>,
}

impl Undo {
    /// Takes everything back, the last first, and returns why that was necessary. Where a database
    /// cannot be put back, its old file keeps its second name with everything beside it: that is then
    /// the only one.
    fn take_back(self, error: Error) -> Error {
        let mut failed = Vec::new();
        let mut stuck: Vec<&Path> = Vec::new();
        for step in self.steps.iter().rev() {
            if step.kept().is_some_and(|kept| {
                stuck.iter().any(|old| kept.as_os_str().as_bytes().starts_with(old.as_os_str().as_bytes()))
            }) {
                continue;
            }
            if let Err(cause) = step.take_back() {
                failed.push(format!("{step:?}: {cause}"));
                if let Step::Replaced { old, .. } = step {
                    stuck.push(old);
                }
            }
        }
        for aside in self.asides.iter().filter(|aside| !stuck.contains(&aside.as_path())) {
            std::fs::remove_file(aside).ok();
        }
        for step in &self.steps {
            if let Step::Replaced { target, .. } | Step::Made(target) = step
                && let Err(cause) = client::flush_folder(target)
            {
                failed.push(cause.to_string());
            }
        }
        match failed.is_empty() {
            true => error,
            false => error
                .context("putting databases back failed too", failed.join("; "))
                .hint("the old content is beside the databases, in the files that end in `.before-` and the restore"),
        }
    }
}

impl Step {
    /// The name under which something old is kept, for the steps that give one.
    fn kept(&self) -> Option<&Path> {
        match self {
            Self::Named(path) | Self::Moved { to: path, .. } => Some(path),
            Self::Replaced { .. } | Self::Made(_) => None,
        }
    }

    fn take_back(&self) -> std::io::Result<()> {
        match self {
            Self::Named(path) => remove(path),
            Self::Moved { from, to } => std::fs::rename(to, from),
            Self::Replaced { target, old } => {
                remove_companions(target)?;
                std::fs::rename(old, target)
            }
            Self::Made(target) => {
                remove_companions(target)?;
                remove(target)
            }
        }
    }
}

/// What somebody who opened the new file left beside it would be replayed into the old one.
fn remove_companions(target: &Path) -> std::io::Result<()> {
    COMPANIONS.iter().try_for_each(|ending| remove(&client::beside(target, ending)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Duration = Duration::from_millis(500);

    fn database(path: &Path, value: i64) {
        let connection = Connection::open(path).expect("opens");
        connection.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (a);").expect("runs");
        connection.execute("INSERT INTO t VALUES (?1)", [value]).expect("inserts");
    }

    fn value(path: &Path) -> i64 {
        let connection = Connection::open(path).expect("opens");
        connection.query_row("SELECT a FROM t", [], |row| row.get(0)).expect("one row")
    }

    fn request(mode: RestoreMode) -> RestoreRequest {
        RestoreRequest { mode, part: None, restore: "r1".to_owned() }
    }

    /// `count` databases of value 1 at their targets, loaded with value 2.
    fn scene(home: &Path, count: usize) -> Vec<Loaded> {
        let loaded = |number| Loaded {
            partial: home.join(format!(".partial-{number}")),
            target: home.join(format!("{number}.db")),
        };
        let all: Vec<Loaded> = (0..count).map(loaded).collect();
        for one in &all {
            database(&one.target, 1);
            database(&one.partial, 2);
        }
        all
    }

    fn names(home: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(home).expect("readable");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.starts_with(".partial"));
        names.sort();
        names
    }

    #[test]
    fn when_a_later_database_cannot_be_put_in_place_the_earlier_ones_are_put_back() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 3);
        let before = names(home.path());
        // The last loaded file is gone when its turn comes.
        std::fs::remove_file(&all[2].partial).expect("removed");
        swap_all(&all, &request(RestoreMode::InPlace), BUSY, &|_| Ok(())).expect_err("one is missing");
        assert_eq!(names(home.path()), before, "nothing is left beside them");
        assert!(all.iter().all(|one| value(&one.target) == 1), "all are what they were");

        database(&all[0].partial, 2);
        database(&all[1].partial, 2);
        database(&all[2].partial, 2);
        let kept = swap_all(&all, &request(RestoreMode::InPlace), BUSY, &|_| Ok(())).expect("all are there");
        assert_eq!(kept.len(), 3);
        assert!(all.iter().all(|one| value(&one.target) == 2));
        assert!(kept.iter().all(|kept| value(Path::new(kept)) == 1));
    }

    #[test]
    fn an_old_database_that_cannot_be_put_back_is_not_thrown_away() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 2);
        let mut undo = Undo::default();
        for one in &all {
            swap(one, &request(RestoreMode::InPlace), BUSY, &mut undo).expect("swapped");
        }
        // Nobody can remove this, so nothing is put back over it.
        std::fs::create_dir_all(client::beside(&all[0].target, "-wal").join("x")).expect("made");
        let error = undo.take_back(Error::internal("a later one failed"));
        assert!(format!("{error:?}").contains(".before-"), "{error:?}");
        assert_eq!(value(&kept_path(&all[0].target, &request(RestoreMode::InPlace))), 1, "the only old one");
        assert_eq!(value(&all[1].target), 1, "the other one is back");
        assert_eq!(names(home.path()), ["0.db", "0.db-wal", "0.db.before-r1", "1.db"]);
    }

    #[test]
    fn a_target_that_came_to_hold_something_meanwhile_is_left_alone() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 2);
        let refuse = |target: &Path| match target.ends_with("1.db") {
            true => Err(Error::new(Kind::AlreadyExists, "it holds something")),
            false => Ok(()),
        };
        let error = swap_all(&all, &request(RestoreMode::Fresh), BUSY, &refuse).expect_err("refused");
        assert_eq!(error.kind(), Kind::AlreadyExists);
        assert!(all.iter().all(|one| value(&one.target) == 1 && one.partial.exists()));
    }

    #[test]
    fn a_log_without_its_database_is_kept() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 1);
        std::fs::remove_file(&all[0].target).expect("removed");
        std::fs::write(client::beside(&all[0].target, "-wal"), "a log").expect("written");
        let kept = swap_all(&all, &request(RestoreMode::InPlace), BUSY, &|_| Ok(())).expect("swapped");
        assert_eq!(std::fs::read(format!("{}-wal", kept[0])).expect("kept"), b"a log");
        assert_eq!(value(&all[0].target), 2);
    }

    #[test]
    fn a_log_that_belongs_to_a_damaged_database_comes_back_with_it() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 2);
        std::fs::write(&all[0].target, "no database, but the only one there is; ".repeat(1_000)).expect("written");
        std::fs::write(client::beside(&all[0].target, "-wal"), "its log").expect("written");
        let content = |ending| std::fs::read(client::beside(&all[0].target, ending)).expect("there");
        let before = (names(home.path()), content(""), content("-wal"));
        let (mut undo, kept) = (Undo::default(), home.path().join("kept"));
        keep_old(&all[0].target, &kept, &mut undo).expect("kept");
        assert!(client::beside(&kept, "-wal").exists() && !client::beside(&all[0].target, "-wal").exists());
        undo.take_back(Error::internal("a later one failed"));
        assert_eq!((names(home.path()), content(""), content("-wal")), before);
    }

    #[test]
    fn one_database_in_use_keeps_all_from_being_moved() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 2);
        let user = Connection::open(&all[1].target).expect("opens");
        user.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (9);").expect("runs");
        let error = swap_all(&all, &request(RestoreMode::InPlace), BUSY, &|_| Ok(())).expect_err("in use");
        assert_eq!(error.kind(), Kind::Locked, "{error:?}");
        user.execute_batch("ROLLBACK").expect("runs");
        drop(user);
        assert!(all.iter().all(|one| value(&one.target) == 1 && one.partial.exists()));
        assert_eq!(names(home.path()), ["0.db", "1.db"]);
    }

    #[test]
    fn empty_and_absent_targets_are_empty_and_absent_again() {
        let home = tempfile::tempdir().expect("a folder");
        let all = scene(home.path(), 3);
        std::fs::write(&all[0].target, "").expect("written");
        std::fs::remove_file(&all[1].target).expect("removed");
        std::fs::remove_file(&all[2].target).expect("removed");
        std::fs::remove_file(&all[2].partial).expect("removed");
        swap_all(&all, &request(RestoreMode::Fresh), BUSY, &|_| Ok(())).expect_err("one is missing");
        assert_eq!(names(home.path()), ["0.db"]);
        assert_eq!(std::fs::metadata(&all[0].target).expect("there").len(), 0);
    }
}
