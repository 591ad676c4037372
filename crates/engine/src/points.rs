//! The recovery points of a bucket: found, authenticated, looked up by a few characters.
//!
//! Nothing here believes a statefile before its keyed hash was checked. What cannot be believed is
//! listed as such and never passed over: a damaged point is something the operator must know.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use stillpoint_core::id::{EnvironmentName, PlatformName, PointId, StoreName};
use stillpoint_core::statefile::{Statefile, Verdict};
use stillpoint_repo::Repository;
use stillpoint_repo::depot::Depot;

/// What the keyed hash of statefiles is made for.
pub const PURPOSE: &str = "statefile";

/// Where points lie in the bucket.
const PREFIX: &str = "points/";

/// The commit's name within a point's folder.
const STATEFILE: &str = "/statefile.json";

/// Shortest prefix by which a point may be named.
const PREFIX_CHARS_MIN: usize = 4;

/// Statefiles read at the same time; they are small and object stores are slow to answer.
const READERS: usize = 8;

/// The points of a bucket.
#[derive(Debug, Default)]
pub struct Listing {
    /// Authenticated points, newest first.
    pub points: Vec<Statefile>,
    /// What lies where a point should and cannot be believed or read, by folder name.
    pub damaged: Vec<(String, Error)>,
}

impl Listing {
    /// The points of one platform's environment, newest first.
    pub fn of<'a>(
        &'a self,
        platform: &'a PlatformName,
        environment: &'a EnvironmentName,
    ) -> impl Iterator<Item = &'a Statefile> {
        self.points.iter().filter(move |point| point.platform == *platform && point.environment == *environment)
    }

    /// The newest restorable point of one platform's environment that covers all its stores; if none
    /// is restorable without loss, the newest with named loss.
    pub fn newest<'a>(&'a self, platform: &'a PlatformName, environment: &'a EnvironmentName) -> Option<&'a Statefile> {
        self.newest_of(platform, environment, &BTreeSet::new())
    }

    /// As [`Listing::newest`], of the points that cover these stores; of the whole ones if none is
    /// named.
    fn newest_of<'a>(
        &'a self,
        platform: &'a PlatformName,
        environment: &'a EnvironmentName,
        stores: &BTreeSet<StoreName>,
    ) -> Option<&'a Statefile> {
        let covers = |point: &&Statefile| match stores.is_empty() {
            true => point.is_whole(),
            false => stores.iter().all(|store| point.stores.contains_key(store)),
        };
        let covering = || self.of(platform, environment).filter(covers);
        covering().find(|point| point.verdict == Verdict::Restorable).or_else(|| covering().next())
    }

    /// Finds a point by id, by a unique prefix of at least 4 characters, or as `latest`: see
    /// [`Listing::newest`]. A newer point with named loss, or of some stores only, is only found if
    /// it is named.
    ///
    /// # Errors
    /// `NotFound` with what there is; `Config` if the prefix is too short or not unique.
    pub fn find<'a>(
        &'a self,
        text: &str,
        platform: &'a PlatformName,
        environment: &'a EnvironmentName,
    ) -> Result<&'a Statefile> {
        self.find_for(text, platform, environment, &BTreeSet::new())
    }

    /// As [`Listing::find`], for those who need certain stores only: `latest` is the newest point that
    /// covers them, whatever else it leaves out. If none does, it is the newest whole one, which
    /// tells what there is.
    ///
    /// # Errors
    /// As [`Listing::find`].
    pub fn find_for<'a>(
        &'a self,
        text: &str,
        platform: &'a PlatformName,
        environment: &'a EnvironmentName,
        stores: &BTreeSet<StoreName>,
    ) -> Result<&'a Statefile> {
        if text == "latest" {
            let newest = self.newest_of(platform, environment, stores);
            let found = newest.or_else(|| self.newest(platform, environment));
            return found.ok_or_else(|| self.none(platform, environment));
        }
        let matching: Vec<&Statefile> =
            self.points.iter().filter(|point| point.point.as_str().starts_with(text)).collect();
        match matching.as_slice() {
            [one] if text.len() >= PREFIX_CHARS_MIN => Ok(one),
            [] => match self.damaged.iter().find(|(name, _)| name.starts_with(text) && !text.is_empty()) {
                Some((name, error)) => {
                    Err(Error::new(error.kind(), format!("the point `{name}` is there, but damaged"))
                        .context("reason:", error.message())
                        .hint("`stillpoint list` shows the points that are whole"))
                }
                None if self.points.is_empty() => Err(self.none(platform, environment)),
                None => Err(Error::new(Kind::NotFound, format!("there is no point `{text}`"))
                    .hint("`stillpoint list` shows what there is; `latest` names the newest")),
            },
            _ if text.len() < PREFIX_CHARS_MIN => {
                Err(Error::new(Kind::Config, format!("`{text}` is too short to name a point"))
                    .hint(format!("give at least {PREFIX_CHARS_MIN} characters; {}", candidates(&matching))))
            }
            _ => Err(Error::new(Kind::Config, format!("`{text}` names {} points", matching.len()))
                .hint(candidates(&matching))),
        }
    }

    fn none(&self, platform: &PlatformName, environment: &EnvironmentName) -> Error {
        if let Some(partial) = self.of(platform, environment).next() {
            let covered: Vec<_> = partial.stores.keys().map(StoreName::as_str).collect();
            let message = format!("no point of `{platform}` · `{environment}` covers all its stores");
            return Error::new(Kind::NotFound, message).hint(format!(
                "the newest one, {} ({:.0}), covers {} only: name it, or the stores that are wanted; \
                 `stillpoint backup` makes a whole one",
                partial.point,
                partial.cut_at,
                covered.join(", ")
            ));
        }
        let error =
            Error::new(Kind::NotFound, format!("there is no point of `{platform}` · `{environment}` in the bucket"));
        match self.points.first() {
            Some(other) => error.hint(format!(
                "the bucket holds points of other platforms, such as `{}` · `{}`",
                other.platform, other.environment
            )),
            None => error.hint("`stillpoint backup` makes one"),
        }
    }
}

fn candidates(points: &[&Statefile]) -> String {
    let shown = points.iter().take(8).map(|point| format!("{} ({:.0})", point.point, point.cut_at));
    let more = if points.len() > 8 { ", …" } else { "" };
    format!("it could be {}{more}", shown.collect::<Vec<_>>().join(", "))
}

/// Reads and authenticates every point of the bucket.
///
/// # Errors
/// Only those of listing the bucket; what is wrong with one point is in [`Listing::damaged`].
pub fn list(bucket: &dyn Depot, repository: &Repository) -> Result<Listing> {
    let mut names = Vec::new();
    bucket.list(PREFIX, &mut |object| {
        if let Some(name) = object.name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(STATEFILE))
            && !name.contains('/')
        {
            names.push(name.to_owned());
        }
        Ok(true)
    })?;
    let next = AtomicUsize::new(0);
    let listing = Mutex::new(Listing::default());
    std::thread::scope(|scope| {
        for _ in 0..READERS.min(names.len()) {
            scope.spawn(|| {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read = read(bucket, repository, name);
                    let mut listing = listing.lock().unwrap_or_else(PoisonError::into_inner);
                    match read {
                        Ok(Some(point)) => listing.points.push(point),
                        Ok(None) => {}
                        Err(error) => listing.damaged.push((name.clone(), error)),
                    }
                }
            });
        }
    });
    let mut listing = listing.into_inner().unwrap_or_else(PoisonError::into_inner);
    listing.points.sort_by(|a, b| b.cut_at.cmp(&a.cut_at).then_with(|| b.point.cmp(&a.point)));
    listing.damaged.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(listing)
}

/// Reads one point by its full id.
///
/// # Errors
/// `NotFound` if there is none, `Corrupt` or `Unauthenticated` if it cannot be believed.
pub fn get(bucket: &dyn Depot, repository: &Repository, point: &PointId) -> Result<Statefile> {
    read(bucket, repository, point.as_str())?
        .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no point `{point}`")))
}

fn read(bucket: &dyn Depot, repository: &Repository, name: &str) -> Result<Option<Statefile>> {
    let (bytes, _) = match bucket.read(&object_name(name)) {
        Ok(read) => read,
        // Forgotten between listing and reading.
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if Statefile::is_void(&bytes) {
        return Ok(None);
    }
    let point = Statefile::parse(&bytes)?;
    if point.point.as_str() != name {
        let message = format!("the folder `{name}` holds the statefile of the point `{}`", point.point);
        return Err(Error::new(Kind::Corrupt, message).hint("someone moved it; move it back"));
    }
    check(repository, &point, &bytes)?;
    Ok(Some(point))
}

/// The name of a point's statefile within the bucket.
pub fn object_name(point: &str) -> String {
    format!("{PREFIX}{point}{STATEFILE}")
}

/// The keyed hash that a statefile must carry in this repository, hex.
pub fn authentication(repository: &Repository, point: &Statefile) -> Result<String> {
    Ok(hex::encode(repository.authenticate(PURPOSE, &point.canonical_bytes()?)))
}

/// Checks that the statefile was written by someone who holds the repository's key, and that
/// nothing in it changed since. `bytes` are those that were read, because an older version's
/// statefile has other fields than the parsed one.
pub fn check(repository: &Repository, point: &Statefile, bytes: &[u8]) -> Result<()> {
    let expected = hex::encode(repository.authenticate(PURPOSE, &Statefile::authenticated_bytes(bytes)?));
    // Both sides are hex of a hash that the reader computes itself; nobody learns by timing it.
    if expected == point.authentication {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, "the statefile was changed after it was written, or belongs to another repository")
        .hint("compare it with a copy of the bucket; its data may still be whole: `restic snapshots` lists it"))
}

#[cfg(test)]
mod tests;
