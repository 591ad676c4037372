//! The oracle of the tour: from the log of acknowledged writes alone, what must be there and what
//! must not.
//!
//! It looks at the restored stores with their own readers (SQLite, the file system, git), never
//! through Stillpoint, and recomputes every object's content from the model's number.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use stillpoint_core::error::{Error, IoContext, Result};
use stillpoint_core::statefile::Statefile;

use super::platform::{self, BRANCH, Places, SEEDED};

/// One write as the writer told it; times in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Which model.
    pub model: u64,
    /// Before anything of it was written.
    pub begun: i128,
    /// After all of it was written; `None` if that was never said.
    pub done: Option<i128>,
}

/// What was proven, and what was not.
#[derive(Debug, Default, Serialize)]
pub struct Proof {
    /// Writes acknowledged before the cut.
    pub acknowledged: u64,
    /// Writes begun after the cut.
    pub later: u64,
    /// Writes in flight during the cut.
    pub in_flight: u64,
    /// Rows in the restored registry.
    pub rows: u64,
    /// Objects in the restored folder.
    pub objects: u64,
    /// Commits in the restored repository.
    pub commits: u64,
    /// Everything that does not hold. Empty means proven.
    pub violations: Vec<String>,
}

/// What the restored stores hold.
#[derive(Debug, Default)]
pub struct Found {
    /// Model, object key, hash, commit.
    rows: BTreeMap<u64, (String, String, String)>,
    /// Key to hash.
    objects: BTreeMap<String, String>,
    /// Commit to subject.
    commits: BTreeMap<String, String>,
}

/// Reads the stores with their own readers.
pub fn look(places: &Places) -> Result<Found> {
    let mut found = Found { rows: rows(&places.registry)?, ..Found::default() };
    objects(&places.objects, &places.objects, &mut found.objects)?;
    let log = platform::git(&places.code, &["log", "--format=%H %s", BRANCH, "--"], "")?;
    let commits = log.lines().filter_map(|line| line.split_once(' '));
    found.commits = commits.map(|(commit, subject)| (commit.to_owned(), subject.to_owned())).collect();
    Ok(found)
}

fn rows(registry: &Path) -> Result<BTreeMap<u64, (String, String, String)>> {
    let read = || {
        let connection = rusqlite::Connection::open(registry)?;
        let mut select = connection.prepare("SELECT id, object_key, sha256, commit_id FROM models")?;
        let rows = select
            .query_map([], |row| Ok((row.get::<_, i64>(0)?.unsigned_abs(), (row.get(1)?, row.get(2)?, row.get(3)?))))?;
        rows.collect::<rusqlite::Result<BTreeMap<_, _>>>()
    };
    read().map_err(|error| platform::sqlite_error("cannot read the restored registry", error))
}

fn objects(root: &Path, folder: &Path, found: &mut BTreeMap<String, String>) -> Result<()> {
    let failed = || format!("cannot read `{}`", folder.display());
    for entry in std::fs::read_dir(folder).or_io(failed)? {
        let path = entry.or_io(failed)?.path();
        if path.is_dir() {
            objects(root, &path, found)?;
            continue;
        }
        let key = path.strip_prefix(root).map_err(|_| Error::internal("an object lies outside of its folder"))?;
        let key = key.to_string_lossy().into_owned();
        if key.starts_with("models/") {
            let bytes = std::fs::read(&path).or_io(failed)?;
            found.insert(key, platform::object_hash(&bytes));
        }
    }
    Ok(())
}

/// The interval in which the cut happened: before the first pin to after the last, in nanoseconds
/// since 1970.
pub fn cut_interval(point: &Statefile) -> (i128, i128) {
    let pins = || point.stores.values().map(|store| store.pinned_at);
    let begin = pins().map(|(before, _)| before.as_nanosecond()).min().unwrap_or_default();
    let end = pins().map(|(_, after)| after.as_nanosecond()).max().unwrap_or_default();
    (begin, end)
}

/// Judges what was found by the log.
pub fn judge(found: &Found, writes: &[Write], cut: (i128, i128)) -> Proof {
    let mut proof = Proof {
        rows: found.rows.len() as u64,
        objects: found.objects.len() as u64,
        commits: found.commits.len() as u64,
        ..Proof::default()
    };
    let subjects: BTreeSet<&str> = found.commits.values().map(String::as_str).collect();
    let seeded = (1..=SEEDED).map(|model| Write { model, begun: i128::MIN, done: Some(i128::MIN) });
    let mut known = BTreeSet::new();
    for write in seeded.chain(writes.iter().copied()) {
        let model = write.model;
        known.insert(model);
        let (row, object, commit) = (
            found.rows.contains_key(&model),
            found.objects.contains_key(&platform::object_key(model)),
            subjects.contains(platform::commit_subject(model).as_str()),
        );
        if write.done.is_some_and(|done| done < cut.0) {
            proof.acknowledged += 1;
            if !(row && object && commit) {
                let place = missing(row, object, commit);
                proof
                    .violations
                    .push(format!("model {model} was acknowledged before the cut, and its {place} is missing"));
            }
        } else if write.begun > cut.1 {
            proof.later += 1;
            if row || object || commit {
                proof.violations.push(format!("model {model} was begun after the cut, and is there"));
            }
        } else {
            proof.in_flight += 1;
        }
    }
    whole_rows(found, &known, &mut proof);
    proof
}

fn missing(row: bool, object: bool, commit: bool) -> &'static str {
    match (row, object, commit) {
        (false, _, _) => "row",
        (_, false, _) => "object",
        _ => "commit",
    }
}

/// No row lacks its object or its commit, and every object is what the model's number says.
fn whole_rows(found: &Found, known: &BTreeSet<u64>, proof: &mut Proof) {
    for (model, (key, hash, commit)) in &found.rows {
        let expected = platform::object_hash(&platform::object_bytes(*model));
        if !known.contains(model) {
            proof.violations.push(format!("nobody ever wrote the row of model {model}"));
        }
        if *hash != expected || found.objects.get(key) != Some(&expected) {
            proof
                .violations
                .push(format!("the row of model {model} names the object {key}, which is missing or different"));
        }
        if found.commits.get(commit) != Some(&platform::commit_subject(*model)) {
            proof.violations.push(format!("the row of model {model} names the commit {commit}, which is missing"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(models: &[u64]) -> Found {
        let mut found = Found::default();
        for model in (1..=SEEDED).chain(models.iter().copied()) {
            let hash = platform::object_hash(&platform::object_bytes(model));
            found.rows.insert(model, (platform::object_key(model), hash.clone(), format!("c{model}")));
            found.objects.insert(platform::object_key(model), hash);
            found.commits.insert(format!("c{model}"), platform::commit_subject(model));
        }
        found
    }

    fn write(model: u64, begun: i128, done: i128) -> Write {
        Write { model: SEEDED + model, begun, done: Some(done) }
    }

    #[test]
    fn the_oracle_sees_what_is_missing_what_is_too_much_and_what_is_torn() {
        let writes = [write(1, 10, 20), write(2, 95, 110), write(3, 130, 140)];
        let judge = |found: &Found| judge(found, &writes, (100, 120));
        for in_flight in [&[SEEDED + 1][..], &[SEEDED + 1, SEEDED + 2]] {
            let proof = judge(&found(in_flight));
            assert_eq!(proof.violations, Vec::<String>::new());
            assert_eq!((proof.acknowledged, proof.in_flight, proof.later), (SEEDED + 1, 1, 1));
        }
        assert!(judge(&found(&[])).violations[0].contains("its row is missing"));
        assert!(judge(&found(&[SEEDED + 1, SEEDED + 3])).violations[0].contains("begun after the cut"));
        assert!(judge(&found(&[SEEDED + 1, SEEDED + 9])).violations[0].contains("nobody ever wrote"));
        let mut torn = found(&[SEEDED + 1]);
        torn.objects.insert(platform::object_key(5), "other".to_owned());
        torn.commits.remove("c7");
        assert_eq!(judge(&torn).violations.len(), 3, "{:?}", judge(&torn).violations);
    }
}
