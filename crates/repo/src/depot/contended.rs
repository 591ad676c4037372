//! Conditional writes for services that have none: writers take turns through the bucket.
//!
//! `docs/decisions/0002-conditional-writes-fallback.md` argues why this is safe, and under which
//! assumption. In short: whoever wants to write `name` lists the contenders for it, leaves if
//! there are any, writes its own entry, waits until every rival that saw nobody must have written
//! its entry too, lists again, and goes on only if its entry is the lowest. What must be true for
//! the write is checked during the turn. An entry whose writer died is removed after a while.
//!
//! A turn costs three seconds, so it is taken only where the service lacks the condition, and only
//! for `Create` and `Update`. Objects named by their content are written with `Replace`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, Kind, Result};

use super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, probe};

/// Where the entries lie; nothing else does.
const FOLDER: &str = "contenders";

/// How long a turn waits for rivals. A rival that needs more than half of it to list and to write
/// its entry withdraws.
const SETTLE: Duration = Duration::from_secs(3);

/// An entry of this age, by the service's clock, belongs to a writer that died. A living writer
/// gives up long before: it begins no write after half of this time.
const STALE: Duration = Duration::from_secs(600);

/// A depot whose `Create` and `Update` hold even if the service's do not.
#[derive(Debug)]
pub struct Contended {
    inner: Arc<dyn Depot>,
    settle: Duration,
    stale: Duration,
}

impl Contended {
    /// Wraps a depot; what it can do by itself is left to it.
    pub fn new(inner: Arc<dyn Depot>) -> Self {
        Self::with_times(inner, SETTLE, STALE)
    }

    /// As `new`, with other times, for tests: `stale` must be many times `settle`.
    pub fn with_times(inner: Arc<dyn Depot>, settle: Duration, stale: Duration) -> Self {
        Self { inner, settle, stale }
    }

    /// Does `action` while no other writer that asks has the turn for `name`.
    fn in_turn<T>(&self, name: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
        let folder = format!("{FOLDER}/{}/", hex::encode(&Sha256::digest(name.as_bytes())[..16]));
        let begun = Instant::now();
        if !self.entries(&folder)?.is_empty() {
            self.remove_stale(&folder)?;
            return Err(busy(name));
        }
        let entry = format!("{folder}{}", probe::random_name()?);
        let outcome = self.enter(name, &folder, &entry, begun).and_then(|()| action());
        // If the entry stays, others wait until it is stale; that is slow, not wrong. An error of
        // the action matters more than one of the clean-up.
        let removed = self.inner.delete(&entry);
        let outcome = outcome?;
        if let Err(error) = removed {
            tracing::warn!(%error, entry, "an entry stays until it is stale");
        }
        Ok(outcome)
    }

    /// Writes the entry and returns once the turn is ours.
    fn enter(&self, name: &str, folder: &str, entry: &str, begun: Instant) -> Result<()> {
        self.inner.write(entry, &[name.as_bytes()], &WriteMode::Replace)?;
        if begun.elapsed() > self.settle / 2 {
            return Err(Error::new(Kind::TimedOut, format!("the bucket is too slow to take turns for `{name}`"))
                .temporary()
                .hint("use a service with conditional writes, or one that is nearer"));
        }
        std::thread::sleep(self.settle);
        let lowest = self.entries(folder)?.into_iter().map(|found| found.name).min();
        if lowest.as_deref() != Some(entry) {
            return Err(busy(name));
        }
        if begun.elapsed() > self.stale / 2 {
            return Err(Error::new(Kind::TimedOut, format!("the turn for `{name}` came too late")).temporary());
        }
        Ok(())
    }

    fn entries(&self, folder: &str) -> Result<Vec<ObjectInfo>> {
        let mut found = Vec::new();
        self.inner.list(folder, &mut |entry| {
            found.push(entry);
            Ok(true)
        })?;
        Ok(found)
    }

    /// Removes entries of dead writers, judging age by the service's clock alone.
    fn remove_stale(&self, folder: &str) -> Result<()> {
        let clock = format!("{FOLDER}/clock-{}", probe::random_name()?);
        self.inner.write(&clock, &[], &WriteMode::Replace)?;
        let now = self.inner.stat(&clock);
        self.inner.delete(&clock)?;
        let Some(now) = now?.map(|found| found.modified) else { return Ok(()) };
        for entry in self.entries(folder)? {
            if now.duration_since(entry.modified).is_ok_and(|age| age > self.stale) {
                self.inner.delete(&entry.name)?;
            }
        }
        Ok(())
    }
}

fn busy(name: &str) -> Error {
    Error::new(Kind::Locked, format!("another writer has the turn for `{name}`")).temporary()
}

impl Depot for Contended {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        self.inner.read(name)
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        self.inner.read_range(name, offset, length)
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        let replace = || self.inner.write(name, parts, &WriteMode::Replace);
        match mode {
            WriteMode::Create if !self.inner.capability().conditional_create => {
                let taken = || Error::new(Kind::AlreadyExists, format!("`{name}` exists already"));
                if self.inner.stat(name)?.is_some() {
                    return Err(taken());
                }
                self.in_turn(name, || match self.inner.stat(name)? {
                    Some(_) => Err(taken()),
                    None => replace(),
                })
            }
            WriteMode::Update(expected) if !self.inner.capability().conditional_update => self.in_turn(name, || {
                let found = self.inner.stat(name)?.and_then(|found| found.version);
                if found.as_ref() != Some(expected) {
                    return Err(Error::new(Kind::Conflict, format!("`{name}` was changed by someone else")));
                }
                replace()
            }),
            _ => self.inner.write(name, parts, mode),
        }
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        self.inner.stat(name)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }

    /// Both conditions hold here, by the service or by turns.
    fn capability(&self) -> DepotCapability {
        DepotCapability { conditional_create: true, conditional_update: true, ..self.inner.capability() }
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryDepot;
    use super::*;

    fn plain() -> Arc<MemoryDepot> {
        Arc::new(MemoryDepot::with_capability(DepotCapability::default()))
    }

    fn wrap(inner: &Arc<MemoryDepot>, stale: Duration) -> Contended {
        Contended::with_times(Arc::clone(inner) as Arc<dyn Depot>, Duration::from_millis(150), stale)
    }

    #[test]
    fn of_many_writers_without_conditional_writes_at_most_one_wins() {
        for _ in 0..3 {
            let memory = plain();
            let depot = wrap(&memory, STALE);
            let winners: Vec<usize> = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..8usize)
                    .map(|racer| {
                        let depot = &depot;
                        scope.spawn(move || {
                            let text = racer.to_string();
                            depot
                                .write("leases/a.json", &[text.as_bytes()], &WriteMode::Create)
                                .is_ok()
                                .then_some(racer)
                        })
                    })
                    .collect();
                racers.into_iter().filter_map(|racer| racer.join().expect("no panic")).collect()
            });
            assert!(winners.len() <= 1, "{winners:?}");
            if let Some(winner) = winners.first() {
                assert_eq!(depot.read("leases/a.json").expect("read").0, winner.to_string().as_bytes());
            }
            assert!(memory.names().iter().all(|name| !name.starts_with(FOLDER)), "{:?}", memory.names());
        }
    }

    #[test]
    fn a_taken_name_is_refused_and_an_outdated_update_conflicts() {
        let memory = plain();
        let depot = wrap(&memory, STALE);
        let first = depot.write("a", &[b"1"], &WriteMode::Create).expect("free").expect("version");
        assert_eq!(depot.write("a", &[b"2"], &WriteMode::Create).expect_err("taken").kind(), Kind::AlreadyExists);
        depot.write("a", &[b"3"], &WriteMode::Update(first.clone())).expect("current");
        let outdated = depot.write("a", &[b"4"], &WriteMode::Update(first)).expect_err("outdated");
        assert_eq!(outdated.kind(), Kind::Conflict);
        assert_eq!(memory.names(), ["a"]);
    }

    #[test]
    fn an_entry_of_a_dead_writer_holds_others_up_only_until_it_is_stale() {
        let memory = plain();
        let depot = wrap(&memory, Duration::from_millis(600));
        let entry = format!("{FOLDER}/{}/dead", hex::encode(&Sha256::digest(b"a")[..16]));
        memory.write(&entry, &[], &WriteMode::Replace).expect("entry");
        let error = depot.write("a", &[b"1"], &WriteMode::Create).expect_err("held up");
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Locked, true));
        std::thread::sleep(Duration::from_millis(700));
        assert!(depot.write("a", &[b"1"], &WriteMode::Create).is_err(), "the call that removes it asks to come again");
        depot.write("a", &[b"1"], &WriteMode::Create).expect("free again");
        assert_eq!(memory.names(), ["a"]);
    }
}
