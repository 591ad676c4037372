//! A bucket set back in time, in place. Nothing is destroyed: what was there becomes an older version,
//! and what came since is hidden by a marker.
//!
//! Old versions that are still in the bucket are copied over by the service; the others come from the
//! point. A restore that is interrupted is repeated: keys whose newest version is
//! that of the point are passed over, the others are brought back once more.

use stillpoint_core::driver::Restored;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::TreePath;

use super::answers::Versioning;
use super::crew::{self, Memory};
use super::listing::Moment;
use super::mirror::part_of;
use super::verbs::Which;
use super::write::{Job, MEMORY_BYTES, Writer};
use crate::objects::drain::Lines;
use crate::objects::keys;
use crate::objects::spool::{Entries, Sorter};
use crate::objects::wire::{self, OBJECTS, Record};

/// What is to be done with one key.
enum Step {
    /// Make the version of the point the newest again.
    Restore(Vec<u8>, Record),
    /// Hide what came since.
    Hide(Vec<u8>),
}

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
    let part = part_of(job)?;
    // Both lists are whole before anything is changed: a point that cannot be read changes nothing.
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
        if part.holds(&key) { live.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?) } else { Ok(()) }
    })?;
    let (wanted, live) = (wanted.finish()?, live.finish()?);
    let memory = Memory::new(MEMORY_BYTES);
    let items = std::sync::atomic::AtomicU64::new(0);
    let bytes = crew::each(
        job.s3.connections,
        job.context,
        |give| merge(wanted.entries()?, live.entries()?, give),
        |step| {
            let bytes = match &step {
                Step::Restore(key, record) => bring_back(job, &memory, key, record)?,
                Step::Hide(key) => {
                    let (client, key) = (job.s3.client.clone(), job.s3.whole_key(key));
                    job.s3.wait(async move { client.delete(Which::newest(&key)).await })?;
                    0
                }
            };
            items.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            job.context.advance(bytes, 1);
            Ok(bytes)
        },
    )?;
    let kept_old = vec![format!("the older versions of the keys in the bucket `{bucket}`")];
    Ok(Restored { items: items.into_inner(), bytes, kept_old, ..Restored::default() })
}

fn merge(mut wanted: Entries, mut live: Entries, give: &mut dyn FnMut(Step) -> Result<()>) -> Result<()> {
    let (mut expected, mut there) = (wanted.next_entry()?, live.next_entry()?);
    let key_of = |sort_key: &[u8]| keys::unescape(&keys::split_sort_key(sort_key));
    loop {
        let order = match (&expected, &there) {
            (None, None) => return Ok(()),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
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
                    give(Step::Restore(key_of(&sort_key)?, record))?;
                }
            }
            expected = wanted.next_entry()?;
        } else if let Some((sort_key, _)) = current {
            give(Step::Hide(key_of(&sort_key)?))?;
        }
    }
}

/// Copies the old version over, or writes the bytes of the point if it is gone.
fn bring_back(job: &Job<'_>, memory: &Memory, key: &[u8], record: &Record) -> Result<u64> {
    if let (Some(version), Some(etag)) = (&record.version, &record.etag) {
        let (client, key) = (job.s3.client.clone(), job.s3.whole_key(key));
        let (version, etag) = (version.clone(), etag.clone().into_bytes());
        let copied = job.s3.wait(async move {
            let source = Which { key: &key, version: Some(&version) }.as_source(client.bucket());
            let headers = [("x-amz-copy-source-if-match".to_owned(), etag)];
            client.copy(&source, &key, &headers).await
        });
        match copied {
            Ok(_) => return Ok(record.size),
            // Another bucket than the source, or the version was removed, or it is too large.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Conflict | Kind::Config) => {
                if !job.summary.mode.is_copy() {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    let names = keys::escape(key);
    for is_folder in [false, true] {
        let names = wire::object_path(&names, is_folder);
        let mut path = TreePath::root().join(OBJECTS)?;
        names.iter().try_for_each(|name| path.push(name))?;
        match job.source.get(&path)? {
            Some(node) if matches!(node.kind, stillpoint_core::tree::NodeKind::File { .. }) => {
                return Writer { job, memory, if_absent: false }.put(&names, &node);
            }
            _ => {}
        }
    }
    Err(Error::new(Kind::Corrupt, format!("the point lacks the object `{}`", keys::shown(key))))
}
