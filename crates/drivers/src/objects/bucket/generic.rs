//! Buckets of GCS and Azure, through the `object_store` crate: listing, reading, writing, no versions.
//!
//! Everything here is asynchronous inside and blocking outside: requests run on a small runtime of
//! their own, so that any thread may wait for them.

use std::future::Future;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    Attribute, AttributeValue, Attributes, GetOptions, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, PutPayload,
};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{Content, ContentEnd};

use super::crew;
use super::read::{Arrived, ContentReader};
use crate::objects::client::{Fetched, Place, Skipped, Waiting};
use crate::objects::keys;
use crate::objects::wire::{self, RESTORE_KEY, Record, STAMP_KEY};

/// Objects up to this size are read while others are requested; larger ones are streamed.
const SMALL_BYTES_MAX: u64 = 1 << 20;
/// How long one step may take: a page of a listing, the next bytes of an object, one upload of a part.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(120);
/// Size of the parts of larger uploads.
const PART_BYTES: usize = 8 << 20;

/// A bucket, or what lies below a prefix of one.
pub(in super::super) struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    connections: usize,
    slots: Arc<tokio::sync::Semaphore>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Bucket {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping it in place would panic on an asynchronous thread.
            runtime.shutdown_background();
        }
    }
}

impl Bucket {
    /// Sends nothing yet.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: Path, connections: usize) -> Result<Self> {
        // TLS needs one provider per process; the error says that somebody chose it before us.
        drop(rustls::crypto::ring::default_provider().install_default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("bucket")
            .enable_all()
            .build()
            .map_err(|error| Error::io("cannot start the thread of a bucket", error))?;
        let slots = Arc::new(tokio::sync::Semaphore::new(connections));
        Ok(Self { store, prefix, connections, slots, runtime: Some(runtime) })
    }

    /// What all keys of the store begin with in the bucket; may be empty.
    pub fn prefix(&self) -> &str {
        self.prefix.as_ref()
    }

    /// Runs a request on the bucket's own runtime; the caller's thread may be of any kind.
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let runtime = self.runtime.as_ref().ok_or_else(|| Error::internal("the bucket was closed"))?;
        wait_on(runtime.handle(), work)
    }

    fn location(&self, key: &[u8]) -> Result<Path> {
        let odd = || {
            Error::new(Kind::Unsupported, format!("the key `{}` cannot be asked for", keys::shown(key)))
                .hint("keys with empty parts or `.` and `..` can be read from S3 only")
        };
        let key = std::str::from_utf8(key).map_err(|_| odd())?;
        let whole = if self.prefix.as_ref().is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        let path = Path::parse(&whole).map_err(|_| odd())?;
        if path.as_ref() == whole { Ok(path) } else { Err(odd()) }
    }

    fn key_of<'a>(&self, location: &'a Path) -> Option<&'a str> {
        let prefix = self.prefix.as_ref();
        if prefix.is_empty() {
            Some(location.as_ref())
        } else {
            location.as_ref().strip_prefix(prefix)?.strip_prefix('/')
        }
    }

    /// Writes one object; refuses an existing one. Larger content goes in parts.
    pub fn put(&self, key: &[u8], content: &mut dyn Read, attributes: &[(Vec<u8>, Vec<u8>)]) -> Result<u64> {
        let location = self.location(key)?;
        let attributes = attributes_of(attributes);
        let mut part = read_part(content)?;
        if part.len() < PART_BYTES {
            let written = part.len() as u64;
            let options = PutOptions { mode: PutMode::Create, attributes, ..PutOptions::default() };
            let (store, payload) = (self.store.clone(), PutPayload::from(part));
            self.wait(async move { store.put_opts(&location, payload, options).await })?
                .map_err(|error| failed("write", key, error))?;
            return Ok(written);
        }
        let (store, options) = (self.store.clone(), PutMultipartOptions { attributes, ..Default::default() });
        let mut upload = self
            .wait(async move { store.put_multipart_opts(&location, options).await })?
            .map_err(|error| failed("write", key, error))?;
        let mut written = 0;
        while !part.is_empty() {
            written += part.len() as u64;
            let (back, done) = self.wait(async move {
                let done = upload.put_part(PutPayload::from(part)).await;
                (upload, done)
            })?;
            upload = back;
            done.map_err(|error| failed("write", key, error))?;
            part = read_part(content)?;
        }
        self.wait(async move { upload.complete().await })?.map_err(|error| failed("write", key, error))?;
        Ok(written)
    }

    /// The name of the restore that was begun here and not ended.
    pub fn restore_begun(&self) -> Result<Option<String>> {
        Ok(self.get_ours(RESTORE_KEY)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Notes that a restore has begun, so that it may go on after a crash.
    pub fn begin_restore(&self, name: &str) -> Result<()> {
        self.put_ours(RESTORE_KEY, name.as_bytes())
    }

    /// Removes what [`Bucket::begin_restore`] wrote.
    pub fn end_restore(&self) -> Result<()> {
        let (store, location) = (self.store.clone(), self.location(RESTORE_KEY.as_bytes())?);
        self.wait(async move { store.delete(&location).await })?
            .map_err(|error| failed("remove", RESTORE_KEY.as_bytes(), error))
    }

    /// Reads a small object of our own.
    fn get_ours(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let Some(mut content) = self.open(key.as_bytes())? else { return Ok(None) };
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|error| Error::io(format!("cannot read `{key}`"), error))?;
        Ok(Some(bytes))
    }

    fn put_ours(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let location = self.location(key.as_bytes())?;
        let (store, payload) = (self.store.clone(), PutPayload::from(bytes.to_vec()));
        self.wait(async move { store.put(&location, payload).await })?
            .map(drop)
            .map_err(|error| failed("write", key.as_bytes(), error))
    }
}

fn read_part(content: &mut dyn Read) -> Result<Bytes> {
    let mut part = Vec::new();
    content
        .take(PART_BYTES as u64)
        .read_to_end(&mut part)
        .map_err(|error| Error::io("cannot read an object from the point", error))?;
    Ok(part.into())
}

fn wait_on<T: Send + 'static>(
    handle: &tokio::runtime::Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    let (debt, owed) = crew::owed();
    handle.spawn(async move { debt.pay(tokio::time::timeout(REQUEST_TIME_MAX, work).await) });
    owed.wait()?.map_err(|_| too_slow())
}

fn too_slow() -> Error {
    let seconds = REQUEST_TIME_MAX.as_secs();
    Error::new(Kind::TimedOut, format!("the bucket did not answer within {seconds} s")).temporary()
}

/// Turns an error of the service into ours.
fn failed(verb: &str, key: &[u8], error: object_store::Error) -> Error {
    use object_store::Error as E;
    let message = format!("cannot {verb} the object `{}`", keys::shown(key));
    let wrapped = |kind| Error::new(kind, message);
    match &error {
        E::NotFound { .. } => wrapped(Kind::NotFound),
        E::AlreadyExists { .. } => wrapped(Kind::AlreadyExists),
        E::Precondition { .. } | E::NotModified { .. } => wrapped(Kind::Conflict),
        E::PermissionDenied { .. } => wrapped(Kind::PermissionDenied),
        E::Unauthenticated { .. } => wrapped(Kind::Unauthenticated),
        E::NotSupported { .. } | E::NotImplemented { .. } => wrapped(Kind::Unsupported),
        E::InvalidPath { .. } => wrapped(Kind::Unsupported)
            .hint("the bucket holds keys with empty parts or `.` and `..`; those can be read from S3 only"),
        E::UnknownConfigurationKey { .. } => wrapped(Kind::Config),
        _ => wrapped(Kind::Unreachable).temporary(),
    }
    .source(error)
}

fn record(meta: &ObjectMeta) -> Record {
    Record {
        size: meta.size,
        modified: (meta.last_modified.timestamp(), meta.last_modified.timestamp_subsec_nanos().min(999_999_999)),
        etag: meta.e_tag.clone(),
        version: meta.version.clone(),
        ..Record::default()
    }
}

const NAMED: [(&str, Attribute); 6] = [
    ("content-type", Attribute::ContentType),
    ("content-encoding", Attribute::ContentEncoding),
    ("content-language", Attribute::ContentLanguage),
    ("content-disposition", Attribute::ContentDisposition),
    ("cache-control", Attribute::CacheControl),
    ("storage-class", Attribute::StorageClass),
];

fn attributes_to_store(attributes: &Attributes) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found = Vec::new();
    for (attribute, value) in attributes {
        let name = match attribute {
            Attribute::Metadata(name) => Some(format!("meta.{name}")),
            other => NAMED.iter().find(|(_, named)| named == other).map(|(name, _)| (*name).to_owned()),
        };
        if let Some(name) = name {
            found.push((wire::attribute_name(&name), value.as_ref().as_bytes().to_vec()));
        }
    }
    found
}

fn attributes_of(stored: &[(Vec<u8>, Vec<u8>)]) -> Attributes {
    let mut attributes = Attributes::new();
    for (name, value) in stored {
        let Some(fact) = wire::attribute_fact(name) else { continue };
        let value = AttributeValue::from(String::from_utf8_lossy(value).into_owned());
        if let Some(name) = fact.strip_prefix("meta.") {
            attributes.insert(Attribute::Metadata(name.to_owned().into()), value);
        } else if let Some((_, attribute)) = NAMED.iter().find(|(name, _)| *name == fact && *name != "storage-class") {
            attributes.insert(attribute.clone(), value);
        }
    }
    attributes
}

/// One object on its way: read whole already, or a stream.
enum Body {
    Gone,
    Small(Bytes, Attributes),
    Stream(BoxStream<'static, object_store::Result<Bytes>>, Attributes),
}

async fn get(store: Arc<dyn ObjectStore>, location: Path, record: Record) -> object_store::Result<(Body, bool)> {
    let options = GetOptions { if_match: record.etag, version: record.version, ..GetOptions::default() };
    let (result, replaced): (GetResult, bool) = match store.get_opts(&location, options).await {
        Ok(result) => (result, false),
        Err(object_store::Error::NotFound { .. }) => return Ok((Body::Gone, false)),
        // Replaced since the listing: what is there now is kept, and named.
        Err(object_store::Error::Precondition { .. }) => match store.get_opts(&location, GetOptions::default()).await {
            Ok(result) => (result, true),
            Err(object_store::Error::NotFound { .. }) => return Ok((Body::Gone, false)),
            Err(error) => return Err(error),
        },
        Err(error) => return Err(error),
    };
    let attributes = result.attributes.clone();
    if result.meta.size <= SMALL_BYTES_MAX {
        return Ok((Body::Small(result.bytes().await?, attributes), replaced));
    }
    Ok((Body::Stream(result.into_stream(), attributes), replaced))
}

impl Place for Bucket {
    fn list(&self, context: &Context, visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>) -> Result<Skipped> {
        let mut stream = self.store.list(Some(&self.prefix)).ready_chunks(1_000);
        loop {
            context.check()?;
            let (back, page) = self.wait(async move {
                let page = stream.next().await;
                (stream, page)
            })?;
            stream = back;
            let Some(page) = page else { return Ok(Skipped::default()) };
            for meta in page {
                let meta = meta.map_err(|error| failed("list", self.prefix.as_ref().as_bytes(), error))?;
                match self.key_of(&meta.location) {
                    Some(key) if key != STAMP_KEY && key != RESTORE_KEY => {
                        visit(key.as_bytes().to_vec(), record(&meta))?
                    }
                    _ => {}
                }
            }
        }
    }

    fn begin(&self, key: &[u8], record: &Record) -> Result<Waiting> {
        let runtime = self.runtime.as_ref().ok_or_else(|| Error::internal("the bucket was closed"))?;
        let (handle, key, left) = (runtime.handle().clone(), key.to_vec(), record.size);
        let (debt, owed) = crew::owed();
        let (slots, request) = (self.slots.clone(), get(self.store.clone(), self.location(&key)?, record.clone()));
        handle.spawn(async move {
            let slot = slots.acquire().await;
            let answer = tokio::time::timeout(REQUEST_TIME_MAX, request).await;
            drop(slot);
            debt.pay(answer);
        });
        Ok(Box::new(move || {
            let answer = owed.wait()?.map_err(|_| too_slow())?;
            let (body, replaced) = answer.map_err(|error| failed("read", &key, error))?;
            let why = replaced.then(|| "was replaced while the point was taken".to_owned());
            let (rest, stream, attributes) = match body {
                Body::Gone => return Ok(Fetched::Gone),
                Body::Small(bytes, attributes) => (bytes, None, attributes),
                Body::Stream(stream, attributes) => (Bytes::new(), Some((handle, stream)), attributes),
            };
            let content = BucketContent { key, arrived: Arrived::new(left, rest, why), stream };
            Ok(Fetched::Found(Box::new(content), attributes_to_store(&attributes)))
        }))
    }

    fn ahead_max(&self) -> usize {
        self.connections * 2
    }

    fn open(&self, key: &[u8]) -> Result<Option<Box<dyn Read + Send>>> {
        Ok(match self.begin(key, &Record::default())?()? {
            Fetched::Found(content, _) => Some(Box::new(ContentReader(content))),
            Fetched::Gone => None,
        })
    }

    fn occupied(&self) -> Result<Option<String>> {
        let mut found = None;
        let stop = || Error::new(Kind::Cancelled, "one object is enough");
        let listed = self.list(&Context::default(), &mut |key, _| {
            found = Some(format!("`{}` and what is beside it", keys::shown(&key)));
            Err(stop())
        });
        match (found, listed) {
            (None, Err(error)) => Err(error),
            (found, _) => Ok(found),
        }
    }

    fn read_stamp(&self) -> Result<Option<Vec<u8>>> {
        self.get_ours(STAMP_KEY)
    }

    fn write_stamp(&self, bytes: &[u8]) -> Result<()> {
        self.put_ours(STAMP_KEY, bytes)
    }
}

type Stream = (tokio::runtime::Handle, BoxStream<'static, object_store::Result<Bytes>>);

/// An object's bytes as they arrive.
struct BucketContent {
    key: Vec<u8>,
    arrived: Arrived,
    stream: Option<Stream>,
}

impl Content for BucketContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        while self.arrived.is_empty() {
            let Some((handle, mut stream)) = self.stream.take() else { return Ok(0) };
            let (stream, next) = wait_on(&handle, async move {
                let next = stream.next().await;
                (stream, next)
            })?;
            let Some(next) = next else { return Ok(0) };
            self.arrived.add(next.map_err(|error| failed("read", &self.key, error))?);
            self.stream = Some((handle, stream));
        }
        Ok(self.arrived.read(buffer))
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        Ok(self.arrived.finish())
    }
}
