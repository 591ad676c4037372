//! A bucket set back in time, in place. Nothing is destroyed: what was there becomes an older version,
//! and what came since is hidden by a marker.
//!
//! Old versions that are still in the bucket are copied over by the service; the others come from the
//! point. A restore that is interrupted is repeated: keys whose newest version is
//! that of the point are passed over, the others are brought back once more.

use std::cmp::Ordering as Order;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use stillpoint_core::driver::Restored;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Node, NodeKind, TreePath};

use super::answers::Versioning;
use super::crew::{self, Memory};
use super::listing::{Listing, Moment};
use super::mirror::{self, Origin, Present, copy_object, part_of, token};
use super::read::Reader;
use super::request::{has_dots, is_in_archive};
use super::verbs::{What, Which};
use super::write::{Job, MEMORY_BYTES, Writer, left_by_copies};
use crate::objects::drain::{Lines, Losses};
use crate::objects::keys;
use crate::objects::spool::{Sorted, Sorter};
use crate::objects::wire::{self, OBJECTS, Record};

/// What is to be done with one key.
enum Step {
    /// Make the version of the point the newest again.
    Restore(Vec<u8>, Box<Record>, Way),
    /// Hide what came since.
    Hide(Vec<u8>),
    /// It stays as it is now.
    Leave(Vec<u8>, &'static str),
}

/// Where the content of a key comes from.
enum Way {
    /// Its old version, which is still in the bucket.
    Version(String),
    /// Its copy in the mirror.
    Mirrored(String),
    /// The point.
    Tree,
}

const ARCHIVED: &str = "is kept in an archive and cannot be copied; it stays as it is now";
const DOTS: &str = "has a key that addresses on the web cannot hold; it stays as it is now";
const LOST: &str = "is neither in the point nor among the bucket's versions; it stays as it is now";

/// Sets the bucket, or the part that was asked for, back to the point.
pub(super) fn revert(job: &Job<'_>) -> Result<Restored> {
    let bucket = job.s3.client.bucket();
    if job.s3.versioning()? != Versioning::Enabled {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the bucket `{bucket}` keeps no versions: what is in it would be lost"),
        )
        .hint("restore into an empty bucket or prefix, then point the application there"));
    }
    let plan = Plan::new(job)?;
    // Every step is looked at before the first change: what cannot be brought back is known, or changes nothing.
    let mut losses = Losses::new(&job.driver.scratch)?;
    plan.steps(job, &mut |step| match step {
        Step::Leave(key, why) => losses.add(&key, why),
        Step::Restore(..) | Step::Hide(_) => Ok(()),
    })?;
    let losses = Mutex::new(losses);
    let memory = Memory::new(MEMORY_BYTES);
    let (items, hidden) = (AtomicU64::new(0), AtomicU64::new(0));
    let bytes = crew::each(
        job.s3.connections,
        job.context,
        |give| plan.steps(job, give),
        |step| {
            let bytes = match &step {
                Step::Leave(..) => return Ok(0),
                Step::Restore(key, record, way) => match bring_back(job, &plan, &memory, key, record, way) {
                    // It lies in an archive by now: the others come back all the same.
                    Err(error) if is_in_archive(&error) => {
                        losses.lock().expect("no holder panics").add(key, &error.to_string())?;
                        return Ok(0);
                    }
                    other => other?,
                },
                Step::Hide(key) => {
                    let (client, key) = (job.s3.client.clone(), job.s3.whole_key(key));
                    job.s3.wait(async move { client.delete(Which::newest(&key)).await })?;
                    hidden.fetch_add(1, Ordering::Relaxed);
                    0
                }
            };
            items.fetch_add(1, Ordering::Relaxed);
            job.context.advance(bytes, 1);
            Ok(bytes)
        },
    )?;
    let kept_old = vec![format!("the older versions of the keys in the bucket `{bucket}`")];
    let mut losses = losses.into_inner().expect("no holder panics").finish()?.0;
    let items = items.into_inner();
    losses.extend(left_by_copies(job, items - hidden.into_inner()));
    Ok(Restored { items, bytes, losses, kept_old })
}

/// What the point wants, beside what there is.
struct Plan {
    /// The objects of the point.
    wanted: Sorted,
    /// The newest version of every key that is not deleted.
    live: Sorted,
    /// All versions of the bucket.
    versions: Sorted,
    mirror: Option<Mirror>,
}

/// The mirror of the point.
struct Mirror {
    /// All its versions.
    versions: Sorted,
    reader: Arc<Reader>,
}

impl Plan {
    fn new(job: &Job<'_>) -> Result<Self> {
        let part = part_of(job)?;
        let mut wanted = Sorter::new(&job.driver.scratch)?;
        let mut lines = Lines::new(job.source)?;
        let mut found = false;
        while let Some((key, record)) = lines.next_line()? {
            if part.holds(&key) {
                found = true;
                wanted.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?)?;
            }
        }
        if !found && job.summary.objects > 0 {
            return Err(Error::new(Kind::NotFound, format!("the point holds nothing at `{}`", job.top)));
        }
        let mut live = Sorter::new(&job.driver.scratch)?;
        job.s3.at_cut(job.context, Moment::END, &mut |key, record| {
            if !part.holds(&key) {
                return Ok(());
            }
            live.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?)
        })?;
        let versions = mirror::present(job.driver, |visit| job.s3.versions(job.context, visit))?;
        let mirror = match job.summary.mirror {
            Some(_) => Some(Mirror::new(job)?),
            None => None,
        };
        Ok(Self { wanted: wanted.finish()?, live: live.finish()?, versions, mirror })
    }

    /// Hands out every step, in the order of the tree; the same each time.
    fn steps(&self, job: &Job<'_>, give: &mut dyn FnMut(Step) -> Result<()>) -> Result<()> {
        let (mut wanted, mut live) = (self.wanted.entries()?, self.live.entries()?);
        let mut versions = Present::new(&self.versions)?;
        let mut copies = self.mirror.as_ref().map(|mirror| Present::new(&mirror.versions)).transpose()?;
        let (mut expected, mut there) = (wanted.next_entry()?, live.next_entry()?);
        let key_of = |sort_key: &[u8]| keys::unescape(&keys::split_sort_key(sort_key));
        loop {
            let order = match (&expected, &there) {
                (None, None) => return Ok(()),
                (Some(_), None) => Order::Less,
                (None, Some(_)) => Order::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            let current = if order.is_ge() { there.take() } else { None };
            if order.is_ge() {
                there = live.next_entry()?;
            }
            if order.is_le() {
                if let Some((sort_key, payload)) = expected.take() {
                    let record = Record::parse(&payload)?;
                    let now = current.map(|(_, payload)| Record::parse(&payload)).transpose()?;
                    if !now.is_some_and(|now| now.is_same_object(&record)) {
                        let here = versions.of(&sort_key)?;
                        let mirrored = copies.as_mut().map(|copies| copies.of(&sort_key)).transpose()?;
                        give(way(job, key_of(&sort_key)?, record, &here, mirrored.as_ref())?)?;
                    }
                }
                expected = wanted.next_entry()?;
            } else if let Some((sort_key, payload)) = current {
                let key = key_of(&sort_key)?;
                give(match has_dots(&key) {
                    true => Step::Leave(key, DOTS),
                    false if was_left_out(job, &Record::parse(&payload)?)? => Step::Leave(key, ARCHIVED),
                    false => Step::Hide(key),
                })?;
            }
        }
    }
}

impl Mirror {
    fn new(job: &Job<'_>) -> Result<Self> {
        let (location, client) = mirror::origin(job.summary, job.s3)?;
        let (handle, prefix) = (job.s3.handle()?, location.prefix.as_str());
        let listing = Listing { client: &client, handle, prefix, what: What::Versions, splits: Vec::new() };
        let versions = mirror::present(job.driver, |visit| {
            listing.run(job.context, &mut |_, entry| visit(super::listing::below_prefix(entry, prefix)?))
        })?;
        Ok(Self { versions, reader: Arc::new(job.s3.reader.beside(client, prefix)) })
    }
}

/// Whether an object that the point does not list may be there since before its cut: points without bytes leave
/// out what lies in an archive.
fn was_left_out(job: &Job<'_>, live: &Record) -> Result<bool> {
    let nanos = i128::from(live.modified.0) * 1_000_000_000 + i128::from(live.modified.1);
    let difference = job.driver.settings.clock_difference()?.as_nanos() as i128;
    let is_old = nanos <= i128::from(job.summary.cut_nanos) + difference;
    Ok(!job.summary.mode.is_copy() && live.is_archived() && is_old)
}

/// The versions that there are of a key, as tokens.
type Tokens = HashSet<Vec<u8>>;

/// How an object of the point comes back.
fn way(job: &Job<'_>, key: Vec<u8>, record: Record, here: &Tokens, mirrored: Option<&Tokens>) -> Result<Step> {
    if has_dots(&key) {
        return Ok(Step::Leave(key, DOTS));
    }
    let version = record.version.clone().filter(|of| here.contains(&token(of, record.etag.as_deref())));
    let copy = record.copy.clone().filter(|of| mirrored.is_some_and(|there| there.contains(&token(of, None))));
    Ok(match (version.filter(|_| !record.is_archived()), copy) {
        (Some(version), _) => Step::Restore(key, Box::new(record), Way::Version(version)),
        (None, Some(copy)) => Step::Restore(key, Box::new(record), Way::Mirrored(copy)),
        (None, None) if !job.summary.mode.is_copy() => {
            let what = format!("the version of `{}` that the point refers to is gone", keys::shown(&key));
            return Err(Error::new(Kind::NotFound, what)
                .hint("it was removed, by hand or by a lifecycle rule; nothing was changed"));
        }
        (None, None) if in_tree(job, &key)?.is_some() => Step::Restore(key, Box::new(record), Way::Tree),
        (None, None) => Step::Leave(key, if record.is_archived() { ARCHIVED } else { LOST }),
    })
}

/// The names and the node of an object in the point.
fn in_tree(job: &Job<'_>, key: &[u8]) -> Result<Option<(Vec<Vec<u8>>, Node)>> {
    let names = keys::escape(key);
    for is_folder in [false, true] {
        let names = wire::object_path(&names, is_folder);
        let mut path = TreePath::root().join(OBJECTS)?;
        names.iter().try_for_each(|name| path.push(name))?;
        match job.source.get(&path)? {
            Some(node) if matches!(node.kind, NodeKind::File { .. }) => return Ok(Some((names, node))),
            _ => {}
        }
    }
    Ok(None)
}

/// Copies the old version or its mirrored copy over, or writes the bytes of the point.
fn bring_back(job: &Job<'_>, plan: &Plan, memory: &Memory, key: &[u8], record: &Record, way: &Way) -> Result<u64> {
    let copied = match (way, &plan.mirror) {
        (Way::Version(version), _) => copy_over(job, &job.s3.reader, version, key, record),
        (Way::Mirrored(copy), Some(mirror)) => copy_over(job, &mirror.reader, copy, key, record),
        (Way::Mirrored(_), None) => Err(Error::internal("a copy without a mirror")),
        (Way::Tree, _) => Err(Error::new(Kind::NotFound, "there is no version to copy")),
    };
    let error = match copied {
        Ok(()) => return Ok(record.size),
        Err(error) => error,
    };
    // The version was removed meanwhile, or the service cannot copy it: the point has the bytes.
    if matches!(error.kind(), Kind::NotFound | Kind::Conflict | Kind::Config | Kind::Unsupported)
        && job.summary.mode.is_copy()
        && let Some((names, node)) = in_tree(job, key)?
    {
        return Writer { job, memory, if_absent: false, looks_first: false }.put(&names, &node);
    }
    Err(error)
}

/// Has the service copy a version that `reader` can read.
fn copy_over(job: &Job<'_>, reader: &Arc<Reader>, version: &str, key: &[u8], record: &Record) -> Result<()> {
    let (reader, target) = (reader.clone(), job.s3.client.clone());
    let (from, to) = ([reader.prefix.as_bytes(), key].concat(), job.s3.whole_key(key));
    let (version, record) = (version.to_owned(), record.clone());
    job.s3.wait(async move {
        let origin = Origin { reader: &reader, key: &from, version: Some(&version), record: &record };
        copy_object(&origin, &target, &to).await.map(drop)
    })
}
