//! Copies within the service: a mirror bucket instead of bytes in the point, and the way back from
//! it or from versions that a point only refers to.
//!
//! A copy is recorded by the version that it got. Copies of an earlier point are taken over if the
//! mirror still lists that very version; whoever removes versions there is found out at the next point.

use std::collections::HashSet;
use std::io::Read;
use std::sync::{Arc, Mutex};

use stillpoint_core::driver::{Context, Drained, Restored};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::Tree;

use super::answers::Entry;
use super::crew;
use super::facts;
use super::read::{ContentReader, Reader};
use super::request::{Client, is_in_archive};
use super::s3::S3;
use super::verbs::{self, Which};
use super::write::{Job, left_by_copies};
use crate::objects::client::Fetched;
use crate::objects::drain::{Items, Lines, Losses, unreadable};
use crate::objects::spool::{Entries, Sorted, Sorter};
use crate::objects::wire::{Location, Record, Summary};
use crate::objects::{Objects, keys};

/// The largest object that one request copies.
const COPY_BYTES_MAX: u64 = 5 << 30;
/// Parts of larger ones whose own parts are not known. Objects of 5 TiB have fewer than 10,000 of them.
const PIECE_BYTES: u64 = 1 << 30;

/// An object that lies somewhere on the service.
pub(super) struct Origin<'a> {
    /// Who can read it.
    pub reader: &'a Reader,
    /// In the bucket.
    pub key: &'a [u8],
    pub version: Option<&'a str>,
    pub record: &'a Record,
}

/// Sizes of the parts in which an object is copied that is too large for one request.
fn pieces(size: u64) -> Vec<u64> {
    let whole = usize::try_from(size / PIECE_BYTES).unwrap_or(usize::MAX);
    let mut pieces = vec![PIECE_BYTES; whole];
    pieces.extend(Some(size % PIECE_BYTES).filter(|rest| *rest > 0));
    pieces
}

/// Copies within the service; the copy has the metadata, tags and parts of its origin. Returns its
/// version.
pub(super) async fn copy_object(origin: &Origin<'_>, target: &Client, key: &[u8]) -> Result<Option<String>> {
    let which = Which { key: origin.key, version: origin.version };
    let source = which.as_source(origin.reader.client.bucket());
    let parts = origin.reader.parts(&which, origin.record).await?.filter(|parts| parts.len() > 1);
    let parts = parts.or_else(|| (origin.record.size > COPY_BYTES_MAX).then(|| pieces(origin.record.size)));
    let Some(parts) = parts else {
        let mut headers = Vec::new();
        // A version that is named cannot change; `null` can. A copy's tag may be another than that of what it was
        // made of, as with encrypted buckets, so that a named version is not asked for its tag.
        if let Some(etag) = origin.record.etag.as_ref().filter(|_| origin.version.is_none_or(|of| of == "null")) {
            headers.push(("x-amz-copy-source-if-match".to_owned(), etag.clone().into_bytes()));
        }
        // Unasked, a service gives copies the usual class.
        if let Some(class) = origin.record.class.as_ref().filter(|_| !origin.record.is_archived()) {
            headers.push(("x-amz-storage-class".to_owned(), class.clone().into_bytes()));
        }
        return target.copy(&source, key, &headers).await;
    };
    let answer = origin.reader.client.head(which, None).await?;
    let mut attributes = facts::of_headers(&answer.headers);
    if answer.header("x-amz-tagging-count").is_none_or(|count| count != "0") {
        let tags = origin.reader.tags(which).await?;
        attributes.extend(tags.map(|tags| (crate::objects::wire::attribute_name("tags"), tags.into_bytes())));
    }
    let headers: Vec<_> = facts::to_headers(&attributes, true)
        .into_iter()
        .filter(|(name, _)| !name.starts_with("x-amz-checksum-"))
        .collect();
    let upload = target.begin_upload(key, &headers).await?;
    let completed = async {
        let mut done: Vec<verbs::Part> = Vec::with_capacity(parts.len());
        let mut first = 0;
        for (index, size) in parts.iter().enumerate() {
            done.push(target.copy_part(key, &upload, index + 1, &source, (first, first + size - 1)).await?);
            first += size;
        }
        target.complete_upload(key, &upload, &done, first, false).await
    };
    let completed = completed.await;
    match completed {
        Err(error) => Err(target.give_up(key, &upload, error).await),
        done => done,
    }
}

/// The versions that a bucket has of each key, in the order of the tree.
pub(super) fn present(
    driver: &Objects,
    list: impl FnOnce(&mut dyn FnMut(Entry) -> Result<()>) -> Result<()>,
) -> Result<Sorted> {
    let mut sorter = Sorter::new(&driver.scratch)?;
    list(&mut |entry| match &entry.version {
        Some(version) if !entry.is_marker => {
            let token = token(version, entry.etag.as_deref());
            sorter.push(keys::sort_key(&keys::escape(&entry.key)), token)
        }
        _ => Ok(()),
    })?;
    sorter.finish()
}

/// What names a version for good: the version `null` may be written again.
pub(super) fn token(version: &str, etag: Option<&str>) -> Vec<u8> {
    match version {
        "null" => format!("null {}", etag.unwrap_or_default()).into_bytes(),
        version => version.as_bytes().to_vec(),
    }
}

/// Walks the versions of a bucket beside a sorted list.
pub(super) struct Present {
    entries: Entries,
    ahead: Option<(Vec<u8>, Vec<u8>)>,
}

impl Present {
    /// From the begin of what [`present`] made.
    pub fn new(versions: &Sorted) -> Result<Self> {
        let mut entries = versions.entries()?;
        let ahead = entries.next_entry()?;
        Ok(Self { entries, ahead })
    }

    /// The versions that there are of a key, each as a [`token`]; calls come in ascending order.
    pub fn of(&mut self, sort_key: &[u8]) -> Result<HashSet<Vec<u8>>> {
        let mut found = HashSet::new();
        while let Some((key, version)) = self.ahead.take() {
            if key.as_slice() > sort_key {
                self.ahead = Some((key, version));
                break;
            }
            if key == sort_key {
                found.insert(version);
            }
            self.ahead = self.entries.next_entry()?;
        }
        Ok(found)
    }
}

/// Has one object copied into the mirror; returns the copy's version, or `None` if the object is not
/// there any more.
fn copy_into(s3: &S3, mirror: &S3, key: &[u8], record: &Record) -> Result<Option<String>> {
    let (reader, target) = (s3.reader.clone(), mirror.client.clone());
    let (from, to, of) = (s3.whole_key(key), mirror.whole_key(key), record.clone());
    let made = s3.wait(async move {
        let version = of.version.as_deref();
        copy_object(&Origin { reader: &reader, key: &from, version, record: &of }, &target, &to).await
    });
    match made {
        Ok(Some(version)) => Ok(Some(version)),
        Ok(None) => Err(Error::new(Kind::Unsupported, "the mirror gave a copy no version")),
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Conflict) => {
            // A bucket that is gone is no loss of one object: this fails if it is.
            for place in [s3, mirror] {
                let (client, prefix) = (place.client.clone(), place.prefix.clone());
                s3.wait(async move { client.time(&prefix).await })?;
            }
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Has every object of the list copied into the mirror, and returns the list with the copies' versions.
pub(in super::super) fn copy(
    driver: &Objects,
    s3: &S3,
    mirror: &S3,
    context: &Context,
    records: &Sorted,
    parent: Option<&dyn Tree>,
    drained: &mut Drained,
) -> Result<(Sorted, Losses)> {
    if s3.client.bucket() == mirror.client.bucket() {
        return Err(Error::new(Kind::Config, "the mirror is the bucket itself").hint("mirror: s3://another-bucket"));
    }
    let mut present = Present::new(&present(driver, |visit| mirror.versions(context, visit))?)?;
    let mut lines = parent.map(Lines::new).transpose()?;
    let mut items = Items::new(records)?;
    let copied = Mutex::new((Sorter::new(&driver.scratch)?, Losses::new(&driver.scratch)?));
    let lose = |key: &[u8], why: &str| copied.lock().expect("no holder panics").1.add(key, why);
    let add = |key: &[u8], record: &Record| {
        let (sort_key, bytes) = (keys::sort_key(&keys::escape(key)), record.to_bytes()?);
        copied.lock().expect("no holder panics").0.push(sort_key, bytes)
    };
    let feed = |give: &mut dyn FnMut((Vec<u8>, Record)) -> Result<()>| {
        while let Some(item) = items.next_item()? {
            let sort_key = keys::sort_key(&item.names);
            let there = present.of(&sort_key)?;
            let known = match &mut lines {
                Some(lines) => lines.find(&sort_key)?.filter(|known| item.record.is_same_object(known)),
                None => None,
            };
            let copy = known.and_then(|known| known.copy.clone()).filter(|copy| there.contains(copy.as_bytes()));
            match copy {
                Some(copy) => add(&item.key, &Record { copy: Some(copy), ..item.record })?,
                None => match unreadable(s3, &item) {
                    Some(why) => lose(&item.key, why)?,
                    None => give((item.key, item.record))?,
                },
            }
        }
        Ok(())
    };
    let bytes = crew::each(s3.connections, context, feed, |(key, record): (Vec<u8>, Record)| {
        if let Some(version) = copy_into(s3, mirror, &key, &record)? {
            add(&key, &Record { copy: Some(version), ..record.clone() })?;
            return Ok(record.size);
        }
        lose(&key, "was deleted or replaced before it was copied")?;
        Ok(0)
    })?;
    let (sorter, losses) = copied.into_inner().expect("no holder panics");
    drained.bytes_read = bytes;
    drained.notes.push(format!(
        "the bytes are copies in the bucket `{}`, not in the point: they must stay there as long as the point",
        mirror.client.bucket()
    ));
    Ok((sorter.finish()?, losses))
}

/// Has the service copy what the point refers to into an empty bucket.
pub(super) fn restore(job: &Job<'_>) -> Result<Restored> {
    let origin = origin(job.summary, job.s3)?;
    let reader = Arc::new(job.s3.reader.beside(origin.1, &origin.0.prefix));
    let part = part_of(job)?;
    let mut lines = Lines::new(job.source)?;
    let items = std::sync::atomic::AtomicU64::new(0);
    let failed = Mutex::new((Losses::new(&job.driver.scratch)?, None::<Error>));
    let feed = |give: &mut dyn FnMut((Vec<u8>, Record)) -> Result<()>| {
        while let Some((key, record)) = lines.next_line()? {
            if part.holds(&key) {
                give((key, record))?;
            }
        }
        Ok(())
    };
    let is_mirror = job.summary.mirror.is_some();
    let bytes = crew::each(job.s3.connections, job.context, feed, |(key, record): (Vec<u8>, Record)| {
        let (reader, target) = (reader.clone(), job.s3.client.clone());
        let (from, to) = ([origin.0.prefix.as_bytes(), &key].concat(), job.s3.whole_key(&key));
        let (version, of) = (if is_mirror { record.copy.clone() } else { record.version.clone() }, record.clone());
        let copied = job.s3.wait(async move {
            let version = version.as_deref();
            copy_object(&Origin { reader: &reader, key: &from, version, record: &of }, &target, &to).await
        });
        match copied {
            Ok(_) => {}
            // It lies in an archive by now: the others come back all the same.
            Err(error) if is_in_archive(&error) => {
                let mut failed = failed.lock().expect("no holder panics");
                failed.0.add(&key, &error.to_string())?;
                failed.1 = failed.1.take().or(Some(error));
                return Ok(0);
            }
            Err(error) if error.kind() == Kind::NotFound => {
                let what = format!("the version of `{}` that the point refers to is gone", keys::shown(&key));
                return Err(Error::new(Kind::NotFound, what)
                    .hint("it was removed from the bucket, by hand or by a lifecycle rule")
                    .source(error));
            }
            Err(error) => return Err(error),
        }
        items.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        job.context.advance(record.size, 1);
        Ok(record.size)
    })?;
    let items = items.into_inner();
    let (losses, first) = failed.into_inner().expect("no holder panics");
    if let (0, Some(error)) = (items, first) {
        return Err(error);
    }
    if items == 0 && job.summary.objects > 0 {
        return Err(Error::new(Kind::NotFound, format!("the point holds nothing at `{}`", job.top)));
    }
    let mut losses = losses.finish()?.0;
    losses.extend(left_by_copies(job, items));
    Ok(Restored { items, bytes, losses, ..Restored::default() })
}

/// Where the objects lie that the point refers to.
pub(super) fn origin<'a>(summary: &'a Summary, s3: &S3) -> Result<(&'a Location, Client)> {
    let location = summary.mirror.as_ref().or(summary.source.as_ref());
    let location =
        location.ok_or_else(|| Error::new(Kind::Corrupt, "`bucket.json` does not say where the objects are"))?;
    if location.service != s3.client.service() {
        let what = format!("the objects of this point lie on {}", location.service);
        return Err(Error::new(Kind::Unsupported, what).hint("a service copies only within itself: restore there"));
    }
    Ok((location, s3.client.beside(&location.bucket)?))
}

/// Opens what the point refers to: the copy in its mirror, or the version in its bucket.
pub(super) fn open(summary: &Summary, s3: &S3, key: &[u8], record: &Record) -> Result<Option<Box<dyn Read + Send>>> {
    let (location, client) = origin(summary, s3)?;
    let reader = Arc::new(s3.reader.beside(client, &location.prefix));
    let version = if summary.mirror.is_some() { record.copy.clone() } else { record.version.clone() };
    // The tag is left out: a copy may have another one than the object that it was made of.
    let record = Record { size: record.size, version, ..Record::default() };
    Ok(match reader.begin([location.prefix.as_bytes(), key].concat(), record)()? {
        Fetched::Found(content, _) => Some(Box::new(ContentReader(content))),
        Fetched::Gone => None,
    })
}

/// Which keys are asked for.
pub(super) struct Part {
    key: Vec<u8>,
    /// Only this very key, not what lies below it.
    is_exact: bool,
}

/// The part that a restore is asked for.
pub(super) fn part_of(job: &Job<'_>) -> Result<Part> {
    Part::of(&job.top.names()[1..])
}

impl Part {
    /// The part at a path below `objects`.
    fn of(names: &[Vec<u8>]) -> Result<Self> {
        let key = if names.is_empty() { Vec::new() } else { keys::unescape(names)? };
        Ok(Self { key, is_exact: names.last().is_some_and(|last| last == keys::SELF) })
    }

    /// Whether a key is, or lies below, the part that was asked for.
    pub fn holds(&self, key: &[u8]) -> bool {
        match key.strip_prefix(&*self.key) {
            Some([]) => true,
            Some(_) if self.is_exact => false,
            Some(rest) => self.key.is_empty() || rest[0] == b'/',
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_a_folder_or_the_one_object_that_bears_its_name() {
        let part = |names: &[&str]| {
            let names: Vec<Vec<u8>> = names.iter().map(|name| name.as_bytes().to_vec()).collect();
            let part = Part::of(&names).unwrap();
            ["a", "a/b", "a/b/c", "ab", "b"].map(|key| part.holds(key.as_bytes()))
        };
        assert_eq!(part(&[]), [true; 5]);
        assert_eq!(part(&["a"]), [true, true, true, false, false]);
        assert_eq!(part(&["a", "%="]), [true, false, false, false, false]);
        assert_eq!(part(&["a", "b"]), [false, true, true, false, false]);
    }
}
