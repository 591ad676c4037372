//! Finds out what a depot can do by doing it, through the same trait that everything else uses.
//!
//! Asked once, at `init`: it writes, races, updates and removes a few tiny objects. What comes out
//! is what a run may rely on, layers included, so a fallback that works counts as working.

use std::sync::Barrier;

use stillpoint_core::error::{Error, Kind, Result};

use super::{Depot, DepotCapability, WriteMode};

/// How many writers race for one name.
const RACERS: usize = 2;

/// Tries the depot and leaves nothing behind. Fails if objects cannot be written, listed, read
/// back or deleted; conditional writes that do not work are an answer, not a failure.
pub fn probe(depot: &dyn Depot) -> Result<DepotCapability> {
    let single = random_name()?;
    let raced = random_name()?;
    let tried = try_all(depot, &single, &raced);
    let removed = depot.delete(&single).and_then(|()| depot.delete(&raced));
    let capability = tried.map_err(|error| error.operation("probe"))?;
    removed.map_err(|error| error.operation("probe"))?;
    Ok(capability)
}

fn try_all(depot: &dyn Depot, single: &str, raced: &str) -> Result<DepotCapability> {
    depot.write(single, &[b"1"], &WriteMode::Replace)?;
    let (bytes, version) = depot.read(single)?;
    let mut listed = false;
    depot.list(single, &mut |object| {
        listed |= object.name == single;
        Ok(!listed)
    })?;
    if bytes != "1".as_bytes() || !listed {
        return Err(Error::new(Kind::Unproven, format!("{} does not show what was just written", depot.location()))
            .hint("a bucket must show every finished write to every reader at once"));
    }
    let refused = |result: Result<_>| match result {
        Ok(_) => Ok(false),
        Err(error) if matches!(error.kind(), Kind::AlreadyExists | Kind::Conflict) => Ok(true),
        Err(error) if error.kind() == Kind::Unsupported => Ok(false),
        Err(error) => Err(error),
    };
    let create = refused(depot.write(single, &[b"2"], &WriteMode::Create))? && race(depot, raced)?;
    let update = match version {
        // The refused creation may have been one that overwrote, so the version is read again.
        Some(_) => match depot.read(single)?.1 {
            Some(current) => update(depot, single, &WriteMode::Update(current), refused)?,
            None => false,
        },
        None => false,
    };
    let known = depot.capability();
    Ok(DepotCapability { conditional_create: create, conditional_update: update, ..known })
}

fn update(
    depot: &dyn Depot,
    name: &str,
    mode: &WriteMode,
    refused: impl Fn(Result<Option<super::Version>>) -> Result<bool>,
) -> Result<bool> {
    match depot.write(name, &[b"3"], mode) {
        Ok(_) => refused(depot.write(name, &[b"4"], mode)),
        Err(error) if error.kind() == Kind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

fn race(depot: &dyn Depot, name: &str) -> Result<bool> {
    let line = Barrier::new(RACERS);
    let results: Vec<_> = std::thread::scope(|scope| {
        let racer = |number: usize| {
            let line = &line;
            move || {
                line.wait();
                depot.write(name, &[number.to_string().as_bytes()], &WriteMode::Create)
            }
        };
        let racers: Vec<_> = (0..RACERS).map(|number| scope.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join()).collect()
    });
    let mut winners = 0;
    for result in results {
        match result.map_err(|_| Error::internal("a racing writer panicked"))? {
            Ok(_) => winners += 1,
            // A loser may learn it as a taken name or as someone else's turn.
            Err(error) if matches!(error.kind(), Kind::AlreadyExists | Kind::Conflict | Kind::Locked) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(winners == 1)
}

/// A name that nobody else uses, recognisable if it ever stays.
pub(super) fn random_name() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(Kind::Io, format!("the system gives no random bytes: {error}")))?;
    Ok(format!("stillpoint-probe-{}", hex::encode(bytes)))
}
