//! A bucket beside a point: keys, sizes, bytes, metadata and tags.
//!
//! Equal entity tags mean equal bytes where both were made of the same parts; where they differ, as
//! with encrypted buckets, every byte is compared.

use std::io::Read;
use std::sync::Mutex;

use sha2::{Digest, Sha256};
use stillpoint_core::driver::{Context, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Node, NodeKind, Tree, TreePath};

use super::crew;
use super::facts::{self, fact};
use super::mirror;
use super::s3::S3;
use super::verbs::Which;
use crate::objects::client::Place;
use crate::objects::drain::Lines;
use crate::objects::restore::{DIFFERENCES_MAX, compare_one, walk};
use crate::objects::spool::{Entries, Sorted, Sorter};
use crate::objects::wire::{OBJECTS, Record, Summary};
use crate::objects::{Objects, keys};

/// What is known of one key on both sides.
enum Pair {
    Missing(Vec<u8>),
    Additional(Vec<u8>),
    /// The key, what the point has of it, and what the bucket lists.
    Both(Vec<u8>, Box<(Record, Record)>),
}

/// Compares the bucket with the point.
pub(in super::super) fn verify(
    driver: &Objects,
    s3: &S3,
    context: &Context,
    source: &dyn Tree,
    summary: &Summary,
) -> Result<Verification> {
    let mut expected = Sorter::new(&driver.scratch)?;
    if summary.mode.is_copy() {
        walk(source, &TreePath::root().join(OBJECTS)?, &mut |names, node| {
            let key = keys::unescape(names)?;
            expected.push(keys::sort_key(&keys::escape(&key)), of_node(names, &node)?.to_bytes()?)
        })?;
    } else {
        let mut lines = Lines::new(source)?;
        while let Some((key, record)) = lines.next_line()? {
            expected.push(keys::sort_key(&keys::escape(&key)), record.to_bytes()?)?;
        }
    }
    let expected = expected.finish()?;
    let there = driver.listing(context)?.0;
    let found = Mutex::new(Vec::<String>::new());
    let note = |what: String| found.lock().expect("no holder panics").push(what);
    let enough = || found.lock().expect("no holder panics").len() >= DIFFERENCES_MAX;
    let checked = crew::each(
        s3.connections,
        context,
        |give| merge(&expected, &there, &mut |pair| if enough() { Ok(()) } else { give(pair) }),
        |pair| {
            match pair {
                Pair::Missing(key) => note(format!("`{}` is missing", keys::shown(&key))),
                Pair::Additional(key) => note(format!("`{}` is not in the point", keys::shown(&key))),
                Pair::Both(key, both) => {
                    let (stored, listed) = &*both;
                    let difference = match summary.mode.is_copy() {
                        true => compare(driver, s3, source, &key, stored, listed)?,
                        false => compare_copies(s3, summary, &key, stored, listed)?,
                    };
                    difference.into_iter().for_each(note);
                    return Ok(1);
                }
            }
            Ok(0)
        },
    )?;
    let mut differences = found.into_inner().expect("no holder panics");
    differences.sort();
    differences.truncate(DIFFERENCES_MAX);
    Ok(Verification { checked, differences })
}

/// What the comparison needs of a stored object. `other` says that it lies within the folder of its key.
fn of_node(names: &[Vec<u8>], node: &Node) -> Result<Record> {
    let NodeKind::File { size } = node.kind else {
        return Err(Error::internal("only files are walked over"));
    };
    let etag = fact(&node.meta.xattrs, "etag").map(|etag| String::from_utf8_lossy(etag).into_owned());
    let is_folder = names.last().is_some_and(|last| last == keys::SELF);
    Ok(Record { size, etag, other: is_folder.then(String::new), ..Record::default() })
}

fn merge(expected: &Sorted, there: &Sorted, give: &mut dyn FnMut(Pair) -> Result<()>) -> Result<()> {
    let (mut expected, mut there) = (expected.entries()?, there.entries()?);
    let next = |entries: &mut Entries| -> Result<Option<(Vec<u8>, Record)>> {
        entries.next_entry()?.map(|(key, payload)| Ok((key, Record::parse(&payload)?))).transpose()
    };
    let key_of = |sort_key: &[u8]| keys::unescape(&keys::split_sort_key(sort_key));
    let (mut left, mut right) = (next(&mut expected)?, next(&mut there)?);
    loop {
        match (left.take(), right.take()) {
            (None, None) => return Ok(()),
            (Some((key, stored)), Some((other, listed))) if key == other => {
                give(Pair::Both(key_of(&key)?, Box::new((stored, listed))))?;
                (left, right) = (next(&mut expected)?, next(&mut there)?);
            }
            (Some((key, _)), other) if other.as_ref().is_none_or(|(other, _)| key < *other) => {
                give(Pair::Missing(key_of(&key)?))?;
                (left, right) = (next(&mut expected)?, other);
            }
            (stored, Some((other, _))) => {
                give(Pair::Additional(key_of(&other)?))?;
                (left, right) = (stored, next(&mut there)?);
            }
            (Some(_), None) => return Err(Error::internal("two lists were compared wrongly")),
        }
    }
}

/// Where tags differ, bytes decide: a service may give a copy another tag.
fn compare_copies(s3: &S3, summary: &Summary, key: &[u8], stored: &Record, listed: &Record) -> Result<Option<String>> {
    let shown = keys::shown(key);
    if stored.size != listed.size {
        return Ok(Some(format!("`{shown}` has {} bytes instead of {}", listed.size, stored.size)));
    }
    if stored.etag.is_some() && stored.etag == listed.etag {
        return Ok(None);
    }
    let Some(expected) = mirror::open(summary, s3, key, stored)? else {
        return Ok(Some(format!("`{shown}` has another tag than its source, which is gone")));
    };
    let Some(there) = s3.open(key)? else { return Ok(Some(format!("`{shown}` is missing"))) };
    Ok((digest(expected, stored.size)? != digest(there, stored.size)?)
        .then(|| format!("`{shown}` has other bytes than its source")))
}

/// The SHA-256 of a content; fails if it is shorter or longer than it should be.
fn digest(mut content: Box<dyn Read + Send>, size: u64) -> Result<Vec<u8>> {
    let (mut hasher, mut buffer, mut read) = (Sha256::new(), vec![0; 64 << 10], 0);
    loop {
        match content.read(&mut buffer).or_io(|| "cannot read an object to compare it".to_owned())? {
            0 if read == size => return Ok(hasher.finalize().to_vec()),
            0 => return Err(Error::new(Kind::Conflict, "an object was replaced while it was compared").temporary()),
            count => {
                hasher.update(&buffer[..count]);
                read += count as u64;
            }
        }
    }
}

fn compare(
    driver: &Objects,
    s3: &S3,
    source: &dyn Tree,
    key: &[u8],
    stored: &Record,
    listed: &Record,
) -> Result<Option<String>> {
    let mut path = TreePath::root().join(OBJECTS)?;
    crate::objects::wire::object_path(&keys::escape(key), stored.other.is_some())
        .iter()
        .try_for_each(|name| path.push(name))?;
    let shown = keys::shown(key);
    if stored.size != listed.size {
        return Ok(Some(match stored.size.min(listed.size) {
            0 => format!("`{shown}` has {} bytes instead of {}", listed.size, stored.size),
            _ => match compare_one(driver, source, &path, key)? {
                Some(difference) => difference,
                None => return Ok(None),
            },
        }));
    }
    if (stored.etag.is_none() || stored.etag != listed.etag)
        && let Some(difference) = compare_one(driver, source, &path, key)?
    {
        return Ok(Some(difference));
    }
    // A point of a directory, or of another kind of bucket, knows less of its objects.
    let Some(node) = source.get(&path)?.filter(|_| stored.etag.is_some()) else { return Ok(None) };
    let (reader, whole, with_tags) = (s3.reader.clone(), s3.whole_key(key), driver.settings.tags);
    let has_tags = fact(&node.meta.xattrs, "tags").is_some();
    let here = s3.wait(async move {
        let answer = reader.client.head(Which::newest(&whole), None).await?;
        let mut attributes = facts::of_headers(&answer.headers);
        if with_tags && (has_tags || answer.header("x-amz-tagging-count").is_some_and(|count| count != "0")) {
            let tags = reader.tags(Which::newest(&whole)).await?;
            attributes.extend(tags.map(|tags| (crate::objects::wire::attribute_name("tags"), tags.into_bytes())));
        }
        Ok(attributes)
    })?;
    let (mut stored, here) = (facts::compared(&node.meta.xattrs), facts::compared(&here));
    stored.retain(|(fact, _)| with_tags || fact != "tags");
    let differs =
        stored.iter().find(|fact| !here.contains(fact)).or_else(|| here.iter().find(|fact| !stored.contains(fact)));
    // Services give a type to what was stored without one.
    let differs =
        differs.filter(|(fact, _)| fact != "content-type" || stored.iter().any(|(fact, _)| fact == "content-type"));
    Ok(differs.map(|(fact, _)| format!("`{shown}` differs in its {fact}")))
}
