//! Objects on their way back: with all that belongs to them, in the parts that they were written in,
//! so that their tags come out alike.
//!
//! Every object is written only if its key is free, which makes a restore that was interrupted
//! repeatable. Locks are set last: until then everything can still be taken back.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Node, Tree, TreePath};

use super::answers::Versioning;
use super::crew::{self, Memory, Owed};
use super::facts::{self, fact};
use super::mirror;
use super::revert;
use super::s3::{RestoreBegun, S3};
use super::verbs::{Part, Which};
use crate::objects::restore::{compare_one, walk};
use crate::objects::wire::{OBJECTS, Summary};
use crate::objects::{Objects, keys};

/// Objects up to this size are written whole, unless their sources were written in parts.
const WHOLE_BYTES_MAX: u64 = 64 << 20;
/// Parts of larger objects whose sources were not written in parts, or in larger ones than memory
/// allows.
const PART_BYTES: u64 = 16 << 20;
/// Parts of one object on their way at a time.
const PARTS_MAX: usize = 4;
/// Memory for all that is being written.
pub(in super::super) const MEMORY_BYTES: u64 = 128 << 20;

/// What a restore into a bucket is made of.
pub(in super::super) struct Job<'a> {
    pub driver: &'a Objects,
    pub s3: &'a S3,
    pub context: &'a Context,
    pub source: &'a dyn Tree,
    pub request: &'a RestoreRequest,
    pub summary: &'a Summary,
    /// The part of the tree, with `objects` as its first name.
    pub top: &'a TreePath,
}

/// Writes the objects to an empty bucket or prefix, or sets the bucket back in time.
pub(in super::super) fn restore(job: &Job<'_>) -> Result<Restored> {
    job.context.check()?;
    let (s3, name) = (job.s3, &job.request.restore);
    let begun = s3.restore_begun()?;
    let is_ours = begun.as_ref().is_some_and(|begun| is_try_of(job.request, &begun.name));
    // Later tries come in place, whatever the first one was: what it began in an empty bucket goes on there.
    if job.request.mode == RestoreMode::InPlace && !is_ours {
        return revert::revert(job);
    }
    let is_new = make_bucket(job)?;
    if !is_ours && let Some(what) = crate::objects::client::Place::occupied(s3)? {
        let hint = match begun {
            Some(RestoreBegun { name: begun, .. }) => {
                format!("the restore `{begun}` was begun there and did not end: repeat it, or empty the prefix")
            }
            None => "restore into an empty bucket or prefix".to_owned(),
        };
        return Err(Error::new(Kind::AlreadyExists, format!("the bucket holds {what}")).hint(hint));
    }
    // A bucket that an earlier try made may lack what is set after its creation.
    let is_made = is_new || begun.is_some_and(|begun| is_ours && begun.is_made);
    s3.begin_restore(&RestoreBegun { name: name.clone(), is_made })?;
    let unversioned = keep_versions(job, is_made)?;
    let mut restored = match job.summary.mode.is_copy() {
        true => from_tree(job, is_ours)?,
        false => mirror::restore(job)?,
    };
    restored.losses.extend(unversioned);
    if !job.summary.configuration.is_empty() {
        let names: Vec<_> = job.summary.configuration.keys().map(String::as_str).collect();
        let what = format!("the bucket's {}", names.join(", "));
        let why = "stands in `bucket.json` of the point and was not set: rules would act on the copy at once";
        restored.losses.push(Loss { what, why: why.to_owned() });
    }
    s3.end_restore()?;
    Ok(restored)
}

/// What a service leaves behind when it copies so many objects, as far as the settings ask for it.
pub(super) fn left_by_copies(job: &Job<'_>, copied: u64) -> Option<Loss> {
    let settings = &job.driver.settings;
    let what = match (settings.lock, settings.acl) {
        _ if copied == 0 => return None,
        (true, true) => "locks and access control lists",
        (true, false) => "locks",
        (false, true) => "access control lists",
        (false, false) => return None,
    };
    let why = "were not set: a service copies objects without them".to_owned();
    Some(Loss { what: format!("{what} of {copied} objects, where they had any"), why })
}

/// Whether a note of a restore that was begun is that of this one, or of an earlier try of it.
pub(in super::super) fn is_try_of(request: &RestoreRequest, begun: &str) -> bool {
    begun == request.restore || request.earlier().iter().any(|earlier| earlier == begun)
}

/// Creates the bucket, if it is absent and that is allowed; tells whether it did.
fn make_bucket(job: &Job<'_>) -> Result<bool> {
    let (client, prefix) = (job.s3.client.clone(), job.s3.prefix.clone());
    match job.s3.wait(async move { client.time(&prefix).await }) {
        Err(error) if error.kind() == Kind::NotFound && job.driver.settings.create => {}
        Err(error) if error.kind() == Kind::NotFound => return Err(error.hint("create it, or set `create: true`")),
        other => return other.map(|_| false),
    }
    let with_locks = job.driver.settings.lock && job.summary.configuration.contains_key("object-lock");
    let client = job.s3.client.clone();
    job.s3.wait(async move { client.create(with_locks).await })?;
    Ok(true)
}

/// Has a bucket that a restore made keep versions if its source did; what another one does not do is a loss.
fn keep_versions(job: &Job<'_>, is_made: bool) -> Result<Option<Loss>> {
    if job.summary.versioning.as_deref() != Some("enabled") || job.s3.versioning()? == Versioning::Enabled {
        return Ok(None);
    }
    if is_made {
        let client = job.s3.client.clone();
        job.s3.wait(async move { client.set_versioning(Versioning::Enabled).await })?;
        return Ok(None);
    }
    let what = "the versions of objects to come".to_owned();
    let why = "are not kept by this bucket, and were by its source: switch its versioning on".to_owned();
    Ok(Some(Loss { what, why }))
}

/// Writes the objects of the point; those of an earlier try are looked for first.
fn from_tree(job: &Job<'_>, looks_first: bool) -> Result<Restored> {
    let memory = Memory::new(MEMORY_BYTES);
    // Only those that are to be locked are kept: they may be all objects.
    let (locked, locked_count, items) = (Mutex::new(Vec::new()), AtomicU64::new(0), AtomicU64::new(0));
    let mut restored = Restored::default();
    let bytes = crew::each(
        job.s3.connections,
        job.context,
        |give| walk(job.source, job.top, &mut |names, node| give((names.to_vec(), node))),
        |(path, node): (Vec<Vec<u8>>, Node)| {
            let bytes = Writer { job, memory: &memory, if_absent: true, looks_first }.put(&path, &node)?;
            if fact(&node.meta.xattrs, "lock-mode").or(fact(&node.meta.xattrs, "legal-hold")).is_some() {
                locked_count.fetch_add(1, Ordering::Relaxed);
                if job.driver.settings.lock {
                    locked.lock().expect("no holder panics").push((path, node));
                }
            }
            items.fetch_add(1, Ordering::Relaxed);
            job.context.advance(bytes, 1);
            Ok(bytes)
        },
    )?;
    let locked = locked.into_inner().expect("no holder panics");
    restored.bytes = bytes;
    restored.items = items.into_inner();
    let locked_count = locked_count.into_inner();
    if locked_count > 0 && !job.driver.settings.lock {
        let what = format!("{locked_count} objects");
        restored
            .losses
            .push(Loss { what, why: "were locked at the source and are not here: `lock: true` sets it".to_owned() });
    }
    let mut ended = 0u64;
    for (path, node) in &locked {
        ended += u64::from(!lock(job, path, node)?);
    }
    if ended > 0 {
        let why = "had a retention that has ended since and cannot be set any more".to_owned();
        restored.losses.push(Loss { what: format!("{ended} objects"), why });
    }
    Ok(restored)
}

/// Writes objects of a tree.
pub(super) struct Writer<'a> {
    pub job: &'a Job<'a>,
    pub memory: &'a Memory,
    /// Whether a key must be free, or hold the same already.
    pub if_absent: bool,
    /// Whether what the key holds is looked at before anything is sent.
    pub looks_first: bool,
}

impl Writer<'_> {
    /// Writes one object; returns its bytes.
    pub fn put(&self, names: &[Vec<u8>], node: &Node) -> Result<u64> {
        let mut path = TreePath::root().join(OBJECTS)?;
        names.iter().try_for_each(|name| path.push(name))?;
        let mut content = self.job.source.open(&path)?;
        let key = self.job.s3.whole_key(&keys::unescape(names)?);
        let attributes = &node.meta.xattrs;
        let stillpoint_core::tree::NodeKind::File { size } = node.kind else {
            return Err(Error::new(Kind::Corrupt, format!("`{path}` is no object")));
        };
        if self.looks_first && self.holds(&key, names, node, size)? == Some(true) {
            self.put_acl(&key, attributes)?;
            return Ok(size);
        }
        let parts = fact(attributes, "parts").map(|text| facts::read_parts(text, size)).transpose()?;
        let written = match parts.filter(|parts| parts.iter().all(|part| *part <= WHOLE_BYTES_MAX)) {
            Some(parts) => self.put_parts(&key, attributes, &mut content, &parts),
            None if size <= WHOLE_BYTES_MAX => self.put_whole(&key, attributes, &mut content, size),
            None => {
                let mut parts = vec![PART_BYTES; usize::try_from(size / PART_BYTES).unwrap_or(usize::MAX)];
                parts.extend((size % PART_BYTES != 0).then_some(size % PART_BYTES));
                self.put_parts(&key, attributes, &mut content, &parts)
            }
        };
        match written {
            // An earlier try of the same restore may have come this far.
            Err(conflict) if conflict.kind() == Kind::Conflict && self.if_absent => {
                if self.holds(&key, names, node, size)? != Some(true) {
                    let what = format!("the key `{}` holds another object already", keys::shown(&key));
                    let hint = "restore into an empty bucket or prefix";
                    return Err(Error::new(Kind::AlreadyExists, what).hint(hint).source(conflict));
                }
            }
            other => other?,
        }
        self.put_acl(&key, attributes)?;
        Ok(size)
    }

    fn put_acl(&self, key: &[u8], attributes: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        let Some(acl) = fact(attributes, "acl").filter(|_| self.job.driver.settings.acl) else { return Ok(()) };
        let (client, key, acl) = (self.job.s3.client.clone(), key.to_vec(), acl.to_vec());
        self.job.s3.wait(async move { client.put_document(&key, "acl", "s3:PutObjectAcl", acl).await })
    }

    fn headers(&self, attributes: &[(Vec<u8>, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
        let is_archived = fact(attributes, "storage-class")
            .is_some_and(|class| class.ends_with(b"GLACIER") || class == b"DEEP_ARCHIVE");
        let mut headers = facts::to_headers(attributes, !is_archived);
        headers.retain(|(name, _)| self.job.driver.settings.tags || name != "x-amz-tagging");
        headers
    }

    fn put_whole(
        &self,
        key: &[u8],
        attributes: &[(Vec<u8>, Vec<u8>)],
        content: &mut dyn Read,
        size: u64,
    ) -> Result<()> {
        let _taken = self.memory.take(size);
        let body = read_part(content, size)?;
        read_end(content)?;
        let mut headers = self.headers(attributes);
        if self.if_absent {
            headers.push(("if-none-match".to_owned(), b"*".to_vec()));
        }
        let (client, key) = (self.job.s3.client.clone(), key.to_vec());
        self.job.s3.wait(async move { client.put(&key, &headers, body).await.map(drop) })
    }

    fn put_parts(
        &self,
        key: &[u8],
        attributes: &[(Vec<u8>, Vec<u8>)],
        content: &mut dyn Read,
        sizes: &[u64],
    ) -> Result<()> {
        let headers: Vec<_> =
            self.headers(attributes).into_iter().filter(|(name, _)| !name.starts_with("x-amz-checksum-")).collect();
        let (s3, client) = (self.job.s3, self.job.s3.client.clone());
        let upload = {
            let (client, key) = (client.clone(), key.to_vec());
            s3.wait(async move { client.begin_upload(&key, &headers).await })?
        };
        let written = self.send_parts(key, &upload, content, sizes);
        let completed = written.and_then(|parts| {
            let (client, key, upload, if_absent) = (client.clone(), key.to_vec(), upload.clone(), self.if_absent);
            let size = sizes.iter().sum();
            s3.wait(async move { client.complete_upload(&key, &upload, &parts, size, if_absent).await.map(drop) })
        });
        completed.or_else(|error| {
            let key = key.to_vec();
            s3.wait(async move { Err(client.give_up(&key, &upload, error).await) })
        })
    }

    fn send_parts(&self, key: &[u8], upload: &str, content: &mut dyn Read, sizes: &[u64]) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(sizes.len());
        let mut on_their_way: VecDeque<Owed<Result<Part>>> = VecDeque::new();
        let mut end = |owed: Owed<Result<Part>>| -> Result<()> {
            parts.push(owed.wait()??);
            Ok(())
        };
        for (index, &size) in sizes.iter().enumerate() {
            self.job.context.check()?;
            let taken = self.memory.take(size);
            let body = read_part(content, size)?;
            let (debt, owed) = crew::owed();
            let (client, key, upload) = (self.job.s3.client.clone(), key.to_vec(), upload.to_owned());
            self.job.s3.handle()?.spawn(async move {
                let part = client.put_part(&key, &upload, index + 1, body).await;
                // The part's bytes are memory until it has been sent.
                drop(taken);
                debt.pay(part);
            });
            on_their_way.push_back(owed);
            if on_their_way.len() >= PARTS_MAX
                && let Some(first) = on_their_way.pop_front()
            {
                end(first)?;
            }
        }
        on_their_way.into_iter().try_for_each(&mut end)?;
        read_end(content)?;
        Ok(parts)
    }

    /// Whether the key holds what is to be written; `None` if it is free. Where entity tags do not tell,
    /// as with encrypted buckets, the bytes do.
    fn holds(&self, key: &[u8], names: &[Vec<u8>], node: &Node, size: u64) -> Result<Option<bool>> {
        let (client, whole) = (self.job.s3.client.clone(), key.to_vec());
        let answer = match self.job.s3.wait(async move { client.head(Which::newest(&whole), None).await }) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        if answer.header("content-length").and_then(|length| length.parse().ok()) != Some(size) {
            return Ok(Some(false));
        }
        let etag = answer.header("etag").map(str::as_bytes);
        if fact(&node.meta.xattrs, "etag").is_some_and(|stored| etag == Some(stored)) {
            return Ok(Some(true));
        }
        let mut path = TreePath::root().join(OBJECTS)?;
        names.iter().try_for_each(|name| path.push(name))?;
        let difference = compare_one(self.job.driver, self.job.source, &path, &keys::unescape(names)?)?;
        Ok(Some(difference.is_none()))
    }
}

fn read_part(content: &mut dyn Read, size: u64) -> Result<Bytes> {
    let mut part = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    let what = || "cannot read an object from the point".to_owned();
    content.take(size).read_to_end(&mut part).map_err(|error| Error::io(what(), error))?;
    if part.len() as u64 != size {
        return Err(Error::new(Kind::Corrupt, "an object of the point is shorter than it should be"));
    }
    Ok(part.into())
}

fn read_end(content: &mut dyn Read) -> Result<()> {
    match content.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Error::new(Kind::Corrupt, "an object of the point is longer than it should be")),
        Err(error) => Err(Error::io("cannot read an object from the point", error)),
    }
}

/// Sets retention and legal hold as they were; tells whether all could be set. A retention that has ended cannot:
/// services refuse dates that have passed.
fn lock(job: &Job<'_>, names: &[Vec<u8>], node: &Node) -> Result<bool> {
    job.context.check()?;
    let key = job.s3.whole_key(&keys::unescape(names)?);
    let text = |name: &str| fact(&node.meta.xattrs, name).map(|value| String::from_utf8_lossy(value).into_owned());
    let client = job.s3.client.clone();
    let (mode, until, hold) = (text("lock-mode"), text("lock-until"), text("legal-hold"));
    let now = jiff::Timestamp::now();
    let has_ended =
        until.as_ref().is_some_and(|until| until.parse::<jiff::Timestamp>().is_ok_and(|until| until <= now));
    job.s3.wait(async move {
        if let (Some(mode), Some(until), false) = (mode, until, has_ended) {
            let (mode, until) = (quick_xml::escape::escape(&mode), quick_xml::escape::escape(&until));
            let body = format!("<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>");
            client.put_document(&key, "retention", "s3:PutObjectRetention", body.into_bytes()).await?;
        }
        if let Some(hold) = hold {
            let hold = quick_xml::escape::escape(&hold);
            let body = format!("<LegalHold><Status>{hold}</Status></LegalHold>");
            client.put_document(&key, "legal-hold", "s3:PutObjectLegalHold", body.into_bytes()).await?;
        }
        Ok(!has_ended)
    })
}
