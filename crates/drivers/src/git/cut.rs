//! PREPARE, CUT, observe, release: refs are the cut, objects never change.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Position;

use super::Git;
use super::client::{self, Repository, Seen};

/// Nothing is held, so the hold lasts as long as anyone may want.
const SAFE_FOR: Duration = Duration::from_secs(3600);
/// Above this number of repositories, looking at all refs twice around a cut takes too long for a
/// pause; then the store does not observe its writes.
const OBSERVED_REPOSITORIES_MAX: usize = 2000;
/// Refs are read by so many threads: it is waiting for the file system, not work.
const READERS: usize = 8;

/// All repositories and their refs at one cut.
#[derive(Debug)]
pub(super) struct View {
    /// When reading began. What changed later is not part of the cut.
    pub(super) at: SystemTime,
    pub(super) repositories: Vec<(Repository, Seen)>,
}

/// Looks that there is something to protect.
pub(super) fn prepare(driver: &Git, context: &Context) -> Result<Hold> {
    let repositories = found(driver)?;
    let mut bytes = 0;
    for repository in &repositories {
        context.check()?;
        bytes += pack_bytes(repository);
    }
    Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) })
}

/// The repositories there are; none at all is an error.
pub(super) fn found(driver: &Git) -> Result<Vec<Repository>> {
    let repositories = client::discover(&driver.settings.path)?;
    if repositories.is_empty() {
        let message = format!("there is no git repository at or below {}", driver.settings.path.display());
        return Err(Error::new(Kind::NotFound, message).hint("point `path` at a repository or at a folder of them"));
    }
    Ok(repositories)
}

/// Size of the repository's packs: what a first drain will read, roughly.
pub(super) fn pack_bytes(repository: &Repository) -> u64 {
    let entries = std::fs::read_dir(repository.git_dir.join("objects/pack")).into_iter().flatten().flatten();
    let packs = entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "pack"));
    packs.filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).sum()
}

/// Reads all refs. The same id again finds the same view; a new id takes a new one.
pub(super) fn cut(driver: &Git, context: &Context, cut: &CutId) -> Result<Pin> {
    context.check()?;
    let mut held = driver.pin.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((pin, _)) = held.as_ref().filter(|(pin, _)| pin.cut == *cut) {
        return Ok(pin.clone());
    }
    let view = view(driver)?;
    // Objects are named by their content and stay until they are collected, weeks after the last
    // ref let go of them. So nothing is planted in the store, and nothing remains.
    let pin = Pin { cut: cut.clone(), position: position(&view.repositories), remains: Vec::new() };
    *held = Some((pin.clone(), Arc::new(view)));
    Ok(pin)
}

/// The live refs of all repositories, each at one moment.
pub(super) fn view(driver: &Git) -> Result<View> {
    let at = SystemTime::now();
    Ok(View { at, repositories: read_all(found(driver)?, &client::read_refs)? })
}

/// The view of this pin.
pub(super) fn pinned(driver: &Git, pin: &Pin) -> Result<Arc<View>> {
    let held = driver.pin.lock().unwrap_or_else(PoisonError::into_inner);
    match held.as_ref() {
        Some((own, view)) if own == pin => Ok(Arc::clone(view)),
        _ => Err(Error::new(Kind::PinLost, "the refs of this cut are no longer known")),
    }
}

fn read_all(
    repositories: Vec<Repository>,
    read: &(dyn Fn(&Repository) -> Result<Seen> + Sync),
) -> Result<Vec<(Repository, Seen)>> {
    let share = repositories.len().div_ceil(READERS).max(1);
    let parts: Vec<Result<Vec<Seen>>> = std::thread::scope(|scope| {
        let readers: Vec<_> = repositories
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(read).collect::<Result<Vec<Seen>>>()))
            .collect();
        let joined = readers.into_iter().map(|reader| reader.join());
        joined.map(|part| part.unwrap_or_else(|_| Err(Error::internal("reading refs panicked")))).collect()
    });
    let mut seen = Vec::with_capacity(repositories.len());
    for part in parts {
        seen.extend(part?);
    }
    Ok(repositories.into_iter().zip(seen).collect())
}

/// The store's position now; `None` where asking would take too long.
pub(super) fn observe(driver: &Git) -> Result<Option<Position>> {
    let repositories = found(driver)?;
    if repositories.len() > OBSERVED_REPOSITORIES_MAX {
        return Ok(None);
    }
    Ok(Some(position(&read_all(repositories, &|repository| client::glance(repository, &driver.known))?)))
}

/// Whether this many repositories are observed.
pub(super) fn observes(repositories: usize) -> bool {
    repositories <= OBSERVED_REPOSITORIES_MAX
}

/// Two hashes: what all refs are, and how fresh they are. The second tells an update that was
/// taken back from none at all.
fn position(repositories: &[(Repository, Seen)]) -> Position {
    let (refs, mut fresh) =
        (refs_hash(repositories.iter().map(|(r, s)| (r.path.as_slice(), s.refs.hash()))), Sha256::new());
    repositories.iter().for_each(|(_, seen)| fresh.update(seen.freshness));
    Position::new("git-refs", format!("{refs}.{}", &hex::encode(fresh.finalize())[..16]))
}

/// Hash over all repositories' refs, in the order given.
pub(super) fn refs_hash<'a>(repositories: impl Iterator<Item = (&'a [u8], String)>) -> String {
    let mut hash = Sha256::new();
    for (path, refs) in repositories {
        hash.update((path.len() as u64).to_le_bytes());
        hash.update(path);
        hash.update(refs);
    }
    hex::encode(hash.finalize())
}

/// Asks whether every object that the cut's refs name is still there. That everything behind them
/// is there too, the drain proved by packing it.
pub(super) fn still_valid(driver: &Git, pin: &Pin) -> Result<Validity> {
    let view = match pinned(driver, pin) {
        Ok(view) => view,
        Err(error) => return Ok(Validity::Lost(error.to_string())),
    };
    if driver.drained.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(&pin.cut) {
        return Ok(Validity::Valid);
    }
    for (repository, seen) in &view.repositories {
        let tips = seen.refs.tips();
        if client::present(repository, &tips)?.len() < tips.len() {
            let place = repository.git_dir.display();
            return Ok(Validity::Lost(format!(
                "{place} lacks objects that its refs named at the cut: they were pruned"
            )));
        }
    }
    Ok(Validity::Valid)
}

/// Forgets the view. There is nothing in the store to clean up.
pub(super) fn release(driver: &Git) {
    driver.pin.lock().unwrap_or_else(PoisonError::into_inner).take();
    driver.drained.lock().unwrap_or_else(PoisonError::into_inner).take();
}
