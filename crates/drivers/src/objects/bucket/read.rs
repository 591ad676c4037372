//! Objects on their way here: requested ahead of whoever reads them, small ones whole, large ones by
//! ranges of which a few are on their way at a time.
//!
//! Nobody here waits for memory: what finds none free is read when its turn comes. So no content
//! waits for another one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue, SERVER};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::answers;
use super::crew::{self, Owed};
use super::facts;
use super::request::{Answer, Client, is_unknown};
use super::verbs::Which;
use crate::objects::client::{Attributes, Fetched, Waiting, WaitingFacts};
use crate::objects::wire::{self, Record};

/// Objects up to this size are always read whole: what their metadata takes besides is alike.
const SMALL_BYTES_MAX: u64 = 64 << 10;
/// Objects up to this size are read whole while there is memory for them.
const WHOLE_BYTES_MAX: u64 = 8 << 20;
/// Memory for whole objects that wait to be read.
const HELD_BYTES_MAX: u64 = 48 << 20;
/// Larger objects are read in ranges of this size, at offsets that are multiples of it; clients that
/// write in parts use this size or a multiple of it, by habit.
const RANGE_BYTES: u64 = 8 << 20;
/// Ranges of one object on their way at a time.
const RANGES_MAX: usize = 3;
/// An object whose answer breaks off is asked for so many times.
const TRIES_MAX: u32 = 4;

/// What an object is called that is not the listed one any more.
const REPLACED: &str = "was replaced while the point was taken";

/// What all reads of one bucket share.
pub(in super::super) struct Reader {
    pub client: Client,
    /// What all keys begin with.
    pub prefix: String,
    pub handle: Handle,
    pub slots: Arc<Semaphore>,
    pub held_bytes: AtomicU64,
    pub with_acl: bool,
    pub with_tags: bool,
    /// What is known of how the service tells of tags.
    pub tags: Tags,
}

/// Whether an answer that counts no tags means that there are none. Services count them only for those who may
/// read them, and not every service does.
#[derive(Debug, Default)]
pub(in super::super) struct Tags {
    /// Tags were asked for and given, so that it is allowed.
    may_ask: AtomicBool,
    /// An answer counted tags.
    are_counted: AtomicBool,
    /// The service does not know tags.
    are_unknown: AtomicBool,
}

impl Tags {
    /// Whether an answer with these headers, and with bytes, tells all.
    fn are_told(&self, headers: &HeaderMap) -> bool {
        let counts = |server: &HeaderValue| server == "AmazonS3" || server == "MinIO";
        self.are_counted.load(Ordering::Relaxed)
            || (self.may_ask.load(Ordering::Relaxed) && headers.get(SERVER).is_some_and(counts))
    }
}

/// An object that was asked for.
enum Got {
    Gone,
    Found(Box<Found>),
}

struct Found {
    attributes: Attributes,
    /// The bytes of an object that was read whole.
    body: Option<(Bytes, Held)>,
    /// Why it is not the listed object.
    why: Option<String>,
    record: Record,
}

/// Memory of a whole object, given back when its content goes.
struct Held(Arc<Reader>, u64);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held_bytes.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Reader {
    /// Begins to fetch; `key` is the one in the bucket.
    pub fn begin(self: &Arc<Self>, key: Vec<u8>, record: Record) -> Waiting {
        let (debt, owed) = crew::owed();
        let (reader, of) = (self.clone(), key.clone());
        self.handle.spawn(async move { debt.pay(reader.fetch(&of, record).await) });
        let reader = self.clone();
        Box::new(move || {
            let Found { body, attributes, why, record } = match owed.wait()?? {
                Got::Gone => return Ok(Fetched::Gone),
                Got::Found(found) => *found,
            };
            let (rest, held) = body.map_or((Bytes::new(), None), |(bytes, held)| (bytes, Some(held)));
            let ranges = held.is_none().then(|| Ranges { at: 0, on_their_way: VecDeque::new() });
            let arrived = Arrived::new(record.size, rest, why);
            let content = ObjectContent { reader, key, record, arrived, _held: held, ranges };
            Ok(Fetched::Found(Box::new(content), attributes))
        })
    }

    /// The same for another bucket of the service.
    pub fn beside(&self, client: Client, prefix: &str) -> Self {
        let (handle, slots) = (self.handle.clone(), self.slots.clone());
        let (prefix, held_bytes) = (prefix.to_owned(), AtomicU64::new(0));
        let (with_acl, with_tags, tags) = (self.with_acl, self.with_tags, Tags::default());
        Self { client, prefix, handle, slots, held_bytes, with_acl, with_tags, tags }
    }

    /// Tags, as they are sent; `None` if there are none.
    pub async fn tags(&self, which: Which<'_>) -> Result<Option<String>> {
        let privilege = if which.version.is_some() { "s3:GetObjectVersionTagging" } else { "s3:GetObjectTagging" };
        let text = match self.client.document(which, "tagging", privilege).await {
            // It knows no tags, so that nobody can have set any.
            Err(error) if is_unknown(&error) => {
                self.tags.are_unknown.store(true, Ordering::Relaxed);
                return Ok(None);
            }
            // Told of this object alone, as of a deletion marker: of others there may be tags.
            Err(error) if error.kind() == Kind::Unsupported => match self.client.head(which, None).await {
                Ok(_) => return Ok(None),
                Err(gone) if matches!(gone.kind(), Kind::NotFound | Kind::Unsupported) => {
                    return Err(Error::new(Kind::NotFound, "the object is gone").source(error));
                }
                Err(error) => return Err(error),
            },
            other => other?,
        };
        self.tags.may_ask.store(true, Ordering::Relaxed);
        let tags = answers::tags(&text)?;
        Ok(Some(tags).filter(|tags| !tags.is_empty()))
    }

    /// What an answer's headers say of the object, and what else is kept of it beside its bytes and parts.
    /// `has_body` says that the answer is that of a whole read: others do not count tags everywhere.
    async fn attributes(&self, which: Which<'_>, headers: &HeaderMap, has_body: bool) -> Result<Attributes> {
        let mut attributes = facts::of_headers(headers);
        let count = headers.get("x-amz-tagging-count").map(HeaderValue::as_bytes);
        self.tags.are_counted.fetch_or(count.is_some(), Ordering::Relaxed);
        let may_have_tags = match count {
            None if self.tags.are_unknown.load(Ordering::Relaxed) => false,
            Some(count) => count != b"0",
            None => !(has_body && self.tags.are_told(headers)),
        };
        if self.with_tags && may_have_tags {
            let tags = self.tags(which).await?;
            attributes.extend(tags.map(|tags| (wire::attribute_name("tags"), tags.into_bytes())));
        }
        if self.with_acl {
            let text = self.client.document(which, "acl", "s3:GetObjectAcl").await?;
            attributes.push((wire::attribute_name("acl"), text.into_bytes()));
        }
        Ok(attributes)
    }

    /// What was asked of an object that was there a moment ago; `None` if it has gone since.
    async fn unless_gone<T>(&self, which: Which<'_>, asked: Result<T>) -> Result<Option<T>> {
        let error = match asked {
            Err(error) if error.kind() == Kind::NotFound => error,
            other => return other.map(Some),
        };
        match self.client.head(which, None).await {
            // It is there, and what was asked for is not.
            Ok(_) => return Err(error),
            Err(gone) if matches!(gone.kind(), Kind::NotFound | Kind::Unsupported) => {}
            Err(error) => return Err(error),
        }
        // A bucket that is gone is no loss of one object: this fails if it is.
        self.client.time(&self.prefix).await?;
        Ok(None)
    }

    /// Begins to ask what is kept of an object beside its bytes and parts; `key` is the one in the bucket.
    pub fn begin_facts(self: &Arc<Self>, key: Vec<u8>, record: Record) -> WaitingFacts {
        let (debt, owed) = crew::owed();
        let reader = self.clone();
        self.handle.spawn(async move {
            let work = async {
                let _slot = reader.slots.acquire().await.map_err(closed)?;
                let which = Which { key: &key, version: record.version.as_deref() };
                match reader.client.head(which, None).await {
                    Ok(answer) => {
                        let asked = reader.attributes(which, &answer.headers, false).await;
                        reader.unless_gone(which, asked).await
                    }
                    Err(error) if error.kind() == Kind::NotFound => {
                        reader.client.time(&reader.prefix).await?;
                        Ok(None)
                    }
                    Err(error) => Err(error),
                }
            };
            debt.pay(work.await);
        });
        Box::new(move || owed.wait()?)
    }

    async fn fetch(self: &Arc<Self>, key: &[u8], mut record: Record) -> Result<Got> {
        let slot = self.slots.acquire().await.map_err(closed)?;
        let whole = self.hold(record.size);
        let version = record.version.clone();
        let mut which = Which { key, version: version.as_deref() };
        let mut why = None;
        let asked = match self.ask(&which, &record, whole.is_some(), must_match(&record)).await {
            Err(error) if error.kind() == Kind::Conflict => {
                // Replaced since the listing: what is there now is kept, and named.
                why = Some(REPLACED.to_owned());
                which.version = None;
                self.ask(&which, &record, whole.is_some(), None).await
            }
            other => other,
        };
        let (answer, body) = match asked {
            Ok(asked) => asked,
            Err(error) if error.kind() == Kind::NotFound => {
                // A bucket that is gone is no loss of one object: this fails if it is.
                self.client.time(&self.prefix).await?;
                return Ok(Got::Gone);
            }
            Err(error) => return Err(error),
        };
        let etag = answer.get("etag").and_then(|etag| etag.to_str().ok());
        if why.is_some() || (body.is_none() && must_match(&record).is_some_and(|listed| Some(listed) != etag)) {
            why = Some(REPLACED.to_owned());
            let length = answer.get("content-length").and_then(|length| length.to_str().ok());
            record.size = length.and_then(|length| length.parse().ok()).unwrap_or(record.size);
            (record.etag, record.version) = (etag.map(str::to_owned), None);
        }
        let asked = self.attributes(which, &answer, body.is_some()).await;
        let Some(mut attributes) = self.unless_gone(which, asked).await? else { return Ok(Got::Gone) };
        if let Some(sizes) = self.parts(&which, &record).await? {
            attributes.push((wire::attribute_name("parts"), facts::write_parts(&sizes).into_bytes()));
        }
        drop(slot);
        Ok(Got::Found(Box::new(Found { attributes, body: body.zip(whole), why, record })))
    }

    /// Memory for a whole object, if there is any.
    fn hold(self: &Arc<Self>, size: u64) -> Option<Held> {
        let held = Held(self.clone(), size);
        let before = self.held_bytes.fetch_add(size, Ordering::Relaxed);
        (size <= SMALL_BYTES_MAX || (size <= WHOLE_BYTES_MAX && before + size <= HELD_BYTES_MAX)).then_some(held)
    }

    /// Headers, and the bytes where the object is read whole.
    async fn ask(
        &self,
        which: &Which<'_>,
        record: &Record,
        whole: bool,
        if_match: Option<&str>,
    ) -> Result<(HeaderMap, Option<Bytes>)> {
        if !whole {
            // A range that breaks off later is asked for by itself.
            let answer = self.client.head(*which, None).await?;
            return Ok((answer.headers, None));
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.client.get(*which, if_match, None).await?;
            let headers = answer.headers.clone();
            match exactly(answer, if_match.map(|_| record.size)).await {
                Err(error) if error.is_temporary() && tries < TRIES_MAX => {}
                bytes => return Ok((headers, Some(bytes?))),
            }
        }
    }

    /// Sizes of the parts that the object was written in: they decide what its tag is.
    pub async fn parts(&self, which: &Which<'_>, record: &Record) -> Result<Option<Vec<u64>>> {
        let count = record.etag.as_deref().and_then(|etag| etag.trim_matches('"').rsplit_once('-'));
        let Some(count) = count.and_then(|(_, count)| count.parse::<u64>().ok()) else { return Ok(None) };
        let length = |answer: &Answer| answer.header("content-length").and_then(|length| length.parse::<u64>().ok());
        let size_of = async |part: u64| match self.client.head(*which, Some(part)).await {
            Ok(answer) if answer.header("x-amz-mp-parts-count").is_some() => Ok(length(&answer)),
            Ok(_) => Ok(None),
            // Not every clone knows parts.
            Err(error) if matches!(error.kind(), Kind::Unsupported | Kind::Config | Kind::NotFound) => Ok(None),
            Err(error) => Err(error),
        };
        let Some(first) = size_of(1).await? else { return Ok(None) };
        let mut sizes = vec![first];
        if count > 1 {
            let Some(last) = size_of(count).await? else { return Ok(None) };
            if (count - 1).checked_mul(first).and_then(|sum| sum.checked_add(last)) == Some(record.size) {
                sizes.extend(std::iter::repeat_n(first, count as usize - 2));
            } else {
                for part in 2..count {
                    let Some(size) = size_of(part).await? else { return Ok(None) };
                    sizes.push(size);
                }
            }
            sizes.push(last);
        }
        Ok((sizes.iter().sum::<u64>() == record.size).then_some(sizes))
    }

    async fn range(&self, key: &[u8], record: &Record, first: u64, last: u64) -> Result<Bytes> {
        let _slot = self.slots.acquire().await.map_err(closed)?;
        let which = Which { key, version: record.version.as_deref() };
        let if_match = record.etag.as_deref();
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.client.get(which, if_match, Some((first, last))).await?;
            match exactly(answer, Some(last - first + 1)).await {
                Err(error) if error.is_temporary() && tries < TRIES_MAX => {}
                bytes => return bytes,
            }
        }
    }
}

fn closed(error: tokio::sync::AcquireError) -> Error {
    Error::internal("the bucket was closed").source(error)
}

/// What tells a replaced object: a version that is named cannot be replaced, but for `null`.
fn must_match(record: &Record) -> Option<&str> {
    let can_change = record.version.as_deref().is_none_or(|version| version == "null");
    record.etag.as_deref().filter(|_| can_change)
}

/// All bytes of an answer; fewer than are due is a failure that is worth a try.
async fn exactly(answer: Answer, due: Option<u64>) -> Result<Bytes> {
    let due = due.or_else(|| answer.header("content-length").and_then(|length| length.parse().ok()));
    let bytes = answer.bytes().await?;
    match due {
        Some(due) if due != bytes.len() as u64 => {
            let what = format!("the service sent {} bytes instead of {due}", bytes.len());
            Err(Error::new(Kind::Unreachable, what).temporary())
        }
        _ => Ok(bytes),
    }
}

/// A large object, range by range.
struct Ranges {
    /// Where the next range that is not asked for yet begins.
    at: u64,
    on_their_way: VecDeque<Owed<Result<Bytes>>>,
}

struct ObjectContent {
    reader: Arc<Reader>,
    key: Vec<u8>,
    record: Record,
    arrived: Arrived,
    /// Held while the bytes are.
    _held: Option<Held>,
    ranges: Option<Ranges>,
}

impl ObjectContent {
    fn next_range(&mut self) -> Result<Option<Bytes>> {
        let Some(ranges) = &mut self.ranges else { return Ok(None) };
        while ranges.on_their_way.len() < RANGES_MAX && ranges.at < self.record.size {
            let (debt, owed) = crew::owed();
            let (reader, key, record) = (self.reader.clone(), self.key.clone(), self.record.clone());
            let first = ranges.at;
            let last = (first + RANGE_BYTES).min(record.size) - 1;
            self.reader.handle.spawn(async move { debt.pay(reader.range(&key, &record, first, last).await) });
            ranges.on_their_way.push_back(owed);
            ranges.at = last + 1;
        }
        let Some(owed) = ranges.on_their_way.pop_front() else { return Ok(None) };
        match owed.wait()? {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => {
                self.arrived.why = Some(match error.kind() {
                    Kind::Conflict => "was replaced while it was read".to_owned(),
                    Kind::NotFound => "was deleted while it was read".to_owned(),
                    _ => return Err(error),
                });
                self.ranges = None;
                Ok(None)
            }
        }
    }
}

impl Content for ObjectContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.arrived.is_empty()
            && let Some(bytes) = self.next_range()?
        {
            self.arrived.add(bytes);
        }
        Ok(self.arrived.read(buffer))
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        Ok(self.arrived.finish())
    }
}

/// Bytes of one object that are here and not yet read, and how many are due.
pub(super) struct Arrived {
    rest: Bytes,
    left: u64,
    /// Why it is not the listed object.
    pub why: Option<String>,
}

impl Arrived {
    /// Of so many bytes the first.
    pub fn new(size: u64, rest: Bytes, why: Option<String>) -> Self {
        Self { rest, left: size, why }
    }

    /// Whether more must come before more can be read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Takes the next bytes, once the earlier ones were read.
    pub fn add(&mut self, bytes: Bytes) {
        self.rest = bytes;
    }

    /// Gives out what is here.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.rest.len());
        buffer[..count].copy_from_slice(&self.rest.split_to(count));
        self.left = self.left.saturating_sub(count as u64);
        count
    }

    /// Whether all that was due was read, of the object that was listed.
    pub fn finish(&mut self) -> ContentEnd {
        match self.why.take() {
            Some(why) => ContentEnd::Torn(why),
            None if self.left == 0 => ContentEnd::Whole,
            None => ContentEnd::Torn("ended too early".to_owned()),
        }
    }
}

/// A content for those who read with `std::io::Read`.
pub(in super::super) struct ContentReader(pub Box<dyn Content>);

impl std::io::Read for ContentReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer).map_err(std::io::Error::other)
    }
}
