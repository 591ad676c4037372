//! A depot in a bucket of S3 and its clones, Google Cloud Storage or Azure Blob Storage.
//!
//! The `object_store` crate speaks the protocols. Here is what it leaves open: synchronous calls,
//! classified errors, deadlines that grow with the size, uploads in parts, and what the service
//! can really do, found by trying. Retries are a layer's business, so the crate's own are off.
//!
//! `WriteMode::Create` and `Update` send the condition; whether the service heeds it, `capability`
//! tells. [`Contended`](super::contended::Contended) builds on that.

mod bridge;
mod classify;
mod connect;
mod learn;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    UpdateVersion,
};
use stillpoint_core::address;
use stillpoint_core::error::{Error, Kind, Result};
use tokio::sync::Semaphore;

use self::classify::{begins_beyond_the_end, classify};
use self::connect::{Address, Client, Service};
use super::{Depot, DepotCapability, ObjectInfo, Version, WriteMode, check_name, check_prefix, total_bytes};

/// How long a request may take besides moving its bytes.
const REQUEST_SECONDS_MAX: u64 = 60;
/// The slowest line that is waited for.
const BYTES_PER_SECOND_MIN: u64 = 64 * 1024;
/// Objects above this size are uploaded in parts.
const SINGLE_PUT_BYTES_MAX: u64 = 64 << 20;
/// Size of each such part; ten thousand of them, the most that S3 takes, make 160 GiB.
const PART_BYTES: usize = 16 << 20;
/// Parts on the line at once.
const PARTS_AT_ONCE: usize = 4;
/// Objects of a listing that wait for their visitor.
const LIST_AHEAD: usize = 4000;

/// A bucket, or a prefix in one.
pub struct ObjectDepot {
    client: Client,
    address: Address,
    capability: OnceLock<DepotCapability>,
}

impl fmt::Debug for ObjectDepot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectDepot").field("location", &self.location()).finish_non_exhaustive()
    }
}

/// Whether `url` has the form of a bucket's address.
pub(super) fn is_address(url: &str) -> bool {
    connect::parse(url).is_some()
}

/// Opens the bucket at `s3://bucket/prefix`, `gs://…` or `az://…`. Nothing is asked of the service.
///
/// `options` and `credentials` have the names of the `object_store` crate without prefix.
pub fn open(
    url: &str,
    options: &BTreeMap<String, String>,
    credentials: &BTreeMap<String, String>,
) -> Result<ObjectDepot> {
    let address = connect::parse(url)
        .unwrap_or_else(|| Err(Error::new(Kind::Config, format!("`{url}` is not the address of a bucket"))))?;
    let client = connect::connect(&address, options, credentials)?;
    Ok(ObjectDepot { client, address, capability: OnceLock::new() })
}

impl ObjectDepot {
    fn path(&self, name: &str) -> Result<Path> {
        check_name(name)?;
        let full =
            if self.address.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.address.prefix) };
        Path::parse(full)
            .map_err(|error| Error::new(Kind::Config, format!("object name {name:?} is not allowed")).source(error))
    }

    fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.client.store)
    }

    /// The version as it is compared: Google's generation, everyone else's entity tag. S3's
    /// version id is missing in listings, so it cannot serve.
    fn version(&self, tag: Option<String>, version: Option<String>) -> Option<Version> {
        if self.address.service == Service::Google { version.map(Version) } else { tag.map(Version) }
    }

    fn update_version(&self, version: &Version) -> UpdateVersion {
        if self.address.service == Service::Google {
            UpdateVersion { e_tag: None, version: Some(version.0.clone()) }
        } else {
            UpdateVersion { e_tag: Some(version.0.clone()), version: None }
        }
    }

    fn info(&self, meta: ObjectMeta) -> Option<ObjectInfo> {
        let full = String::from(meta.location);
        let name = match self.address.prefix.as_str() {
            "" => full,
            prefix => full.strip_prefix(prefix)?.strip_prefix('/')?.to_owned(),
        };
        let since = Duration::from_millis(u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0));
        let version = self.version(meta.e_tag, meta.version);
        Some(ObjectInfo { name, size: meta.size, modified: UNIX_EPOCH + since, version })
    }

    fn write_whole(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        let (path, store) = (self.path(name)?, self.store());
        let payload: PutPayload = parts.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        let put = match mode {
            WriteMode::Create => PutMode::Create,
            WriteMode::Replace => PutMode::Overwrite,
            WriteMode::Update(version) => PutMode::Update(self.update_version(version)),
        };
        let what = format!("cannot write `{name}`");
        let result = bridge::run(deadline(total_bytes(parts)), async move {
            let options = PutOptions { mode: put, ..PutOptions::default() };
            store.put_opts(&path, payload, options).await.map_err(|error| classify(what, error))
        });
        match result {
            Ok(put) => Ok(self.version(put.e_tag, put.version)),
            // Google's words for a taken name and a lost update are the same; the mode tells.
            Err(error) if error.kind() == Kind::Conflict && !error.is_temporary() && *mode == WriteMode::Create => {
                Err(Error::new(Kind::AlreadyExists, format!("`{name}` exists already")).source(error))
            }
            Err(error) if error.kind() == Kind::AlreadyExists && matches!(mode, WriteMode::Update(_)) => {
                Err(Error::new(Kind::Conflict, format!("`{name}` was changed by someone else")).source(error))
            }
            Err(error) => Err(error),
        }
    }

    fn write_in_parts(&self, name: &str, parts: &[&[u8]]) -> Result<Option<Version>> {
        let (path, store) = (self.path(name)?, self.store());
        let what = format!("cannot write `{name}`");
        let pieces = cut(parts, PART_BYTES);
        let put = bridge::run(deadline(total_bytes(parts)), async move {
            let mut upload = store.put_multipart(&path).await.map_err(|error| classify(&what, error))?;
            match send_parts(upload.as_mut(), pieces).await {
                Ok(put) => Ok(put),
                Err(error) => {
                    // The service bills forgotten parts, so they are taken back as far as it lets.
                    if let Err(left) = upload.abort().await {
                        tracing::warn!(error = %left, object = %path, "parts of a failed upload stay in the bucket");
                    }
                    Err(classify(&what, error))
                }
            }
        })?;
        Ok(self.version(put.e_tag, put.version))
    }
}

impl Depot for ObjectDepot {
    fn read(&self, name: &str) -> Result<(Bytes, Option<Version>)> {
        let (path, store) = (self.path(name)?, self.store());
        let what = format!("cannot read `{name}`");
        let (bytes, tag, version) = bridge::run(deadline(1 << 30), async move {
            let found = store.get(&path).await.map_err(|error| classify(&what, error))?;
            let (tag, version) = (found.meta.e_tag.clone(), found.meta.version.clone());
            let bytes = found.bytes().await.map_err(|error| classify(&what, error))?;
            Ok((bytes, tag, version))
        })?;
        Ok((bytes, self.version(tag, version)))
    }

    fn read_range(&self, name: &str, offset: u64, length: u64) -> Result<Bytes> {
        let (path, store) = (self.path(name)?, self.store());
        if length == 0 {
            return Ok(Bytes::new());
        }
        let what = format!("cannot read `{name}`");
        bridge::run(deadline(length), async move {
            let range = GetRange::Bounded(offset..offset.saturating_add(length));
            let options = GetOptions { range: Some(range), ..GetOptions::default() };
            match store.get_opts(&path, options).await {
                Ok(found) => found.bytes().await.map_err(|error| classify(&what, error)),
                // Beyond the end there is nothing, which the contract allows.
                Err(error) if begins_beyond_the_end(&error) => Ok(Bytes::new()),
                Err(error) => Err(classify(&what, error)),
            }
        })
    }

    fn write(&self, name: &str, parts: &[&[u8]], mode: &WriteMode) -> Result<Option<Version>> {
        if total_bytes(parts) > SINGLE_PUT_BYTES_MAX && *mode == WriteMode::Replace {
            self.write_in_parts(name, parts)
        } else {
            self.write_whole(name, parts, mode)
        }
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        let folder = prefix.rfind('/').map_or("", |slash| &prefix[..slash]);
        let below =
            [self.address.prefix.as_str(), folder].iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>();
        let below = Path::parse(below.join("/"))
            .map_err(|error| Error::new(Kind::Config, "prefix is not allowed").source(error))?;
        let store = self.store();
        let what = format!("cannot list `{prefix}` in {}", self.location());
        // The stream runs ahead of the visitor by a bounded number of objects.
        let (sender, receiver) = mpsc::channel();
        let room = Arc::new(Semaphore::new(LIST_AHEAD));
        let left = Arc::clone(&room);
        bridge::spawn(async move {
            let mut objects = store.list(Some(&below));
            let patience = deadline(0);
            loop {
                let next = tokio::time::timeout(patience, objects.next()).await;
                let message = match next {
                    Ok(Some(found)) => found.map_err(|error| classify(&what, error)),
                    Ok(None) => break,
                    Err(_) => Err(bridge::too_slow(patience)),
                };
                let failed = message.is_err();
                match left.acquire().await {
                    Ok(permit) => permit.forget(),
                    Err(_) => break,
                }
                if sender.send(message).is_err() || failed {
                    break;
                }
            }
        })?;
        for message in receiver {
            room.add_permits(1);
            let Some(object) = self.info(message?) else { continue };
            // The record is about the depot, not in it.
            let is_content = object.name.starts_with(prefix) && object.name != learn::RECORD;
            if is_content && !visit(object)? {
                break;
            }
        }
        room.close();
        Ok(())
    }

    fn stat(&self, name: &str) -> Result<Option<ObjectInfo>> {
        let (path, store) = (self.path(name)?, self.store());
        let what = format!("cannot look at `{name}`");
        let found =
            bridge::run(deadline(0), async move { store.head(&path).await.map_err(|error| classify(what, error)) });
        match found {
            Ok(meta) => Ok(self.info(meta)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn delete(&self, name: &str) -> Result<()> {
        let (path, store) = (self.path(name)?, self.store());
        let what = format!("cannot delete `{name}`");
        let deleted =
            bridge::run(deadline(0), async move { store.delete(&path).await.map_err(|error| classify(what, error)) });
        match deleted {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            other => other,
        }
    }

    fn capability(&self) -> DepotCapability {
        *self.capability.get_or_init(|| learn::capability(self))
    }

    fn location(&self) -> String {
        let scheme = match self.address.service {
            Service::S3 => "s3",
            Service::Google => "gs",
            Service::Azure => "az",
        };
        address::compose(scheme, self.client.service.as_deref(), &self.address.bucket, &self.address.prefix)
    }
}

fn deadline(bytes: u64) -> Duration {
    Duration::from_secs(REQUEST_SECONDS_MAX + bytes / BYTES_PER_SECOND_MIN)
}

async fn send_parts(
    upload: &mut dyn MultipartUpload,
    pieces: Vec<PutPayload>,
) -> object_store::Result<object_store::PutResult> {
    let mut running = FuturesUnordered::new();
    for piece in pieces {
        if running.len() == PARTS_AT_ONCE
            && let Some(done) = running.next().await
        {
            done?;
        }
        running.push(upload.put_part(piece));
    }
    while let Some(done) = running.next().await {
        done?;
    }
    drop(running);
    upload.complete().await
}

/// Copies the bytes into pieces of equal size, the last one shorter.
fn cut(parts: &[&[u8]], piece_bytes: usize) -> Vec<PutPayload> {
    let mut pieces = Vec::new();
    let mut piece: Vec<Bytes> = Vec::new();
    let mut room = piece_bytes;
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(room));
            piece.push(Bytes::copy_from_slice(now));
            room -= now.len();
            rest = later;
            if room == 0 {
                pieces.push(std::mem::take(&mut piece).into_iter().collect());
                room = piece_bytes;
            }
        }
    }
    if !piece.is_empty() || pieces.is_empty() {
        pieces.push(piece.into_iter().collect());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_equal_but_the_last() {
        let sizes = |parts: &[&[u8]], size| cut(parts, size).iter().map(PutPayload::content_length).collect::<Vec<_>>();
        assert_eq!(sizes(&[b"abcd", b"efghij"], 4), [4, 4, 2]);
        assert_eq!(sizes(&[b"abcd"], 4), [4]);
        assert_eq!(sizes(&[], 4), [0]);
    }

    /// A service that gives every request the same answer.
    fn service(answer: &'static str) -> String {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
        let address = listener.local_addr().expect("address");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("connection");
                let mut seen = Vec::new();
                let mut buffer = [0; 1024];
                while !seen.ends_with(b"\r\n\r\n") {
                    let read = stream.read(&mut buffer).expect("request");
                    seen.extend_from_slice(&buffer[..read]);
                }
                stream.write_all(answer.as_bytes()).expect("answer");
            }
        });
        format!("http://{address}")
    }

    fn asked(endpoint: &str) -> Error {
        let map = |pairs: [(&str, &str); 2]| pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let options = map([("endpoint", endpoint), ("allow_http", "true")]);
        let credentials = map([("access_key_id", "a"), ("secret_access_key", "the-secret-key")]);
        let depot = open("s3://bucket", &options, &credentials).expect("open");
        depot.read("some/object").expect_err(endpoint)
    }

    macro_rules! answer {
        ($status:literal, $body:literal) => {
            concat!("HTTP/1.1 ", $status, "\r\nConnection: close\r\nTransfer-Encoding: identity\r\n\r\n", $body)
        };
    }

    #[test]
    fn answers_of_a_service_are_understood() {
        for (answer, kind, temporary) in [
            (answer!("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"), Kind::PermissionDenied, false),
            (
                answer!("403 Forbidden", "<Error><Code>SignatureDoesNotMatch</Code></Error>"),
                Kind::Unauthenticated,
                false,
            ),
            (answer!("403 Forbidden", ""), Kind::PermissionDenied, false),
            (answer!("401 Unauthorized", ""), Kind::Unauthenticated, false),
            (answer!("404 Not Found", "<Error><Code>NoSuchBucket</Code></Error>"), Kind::NotFound, false),
            (answer!("404 Not Found", ""), Kind::NotFound, false),
            (answer!("400 Bad Request", "<Error><Code>InvalidBucketName</Code></Error>"), Kind::Config, false),
            (answer!("400 Bad Request", "<Error><Code>ExpiredToken</Code></Error>"), Kind::Unauthenticated, false),
            (answer!("400 Bad Request", "<Error><Code>RequestTimeout</Code></Error>"), Kind::TimedOut, true),
            (answer!("301 Moved Permanently", ""), Kind::Config, false),
            (answer!("408 Request Timeout", ""), Kind::TimedOut, true),
            (answer!("429 Too Many Requests", ""), Kind::RateLimited, true),
            (answer!("500 Internal Server Error", ""), Kind::Unreachable, true),
            (answer!("501 Not Implemented", ""), Kind::Unsupported, false),
            (answer!("503 Service Unavailable", "<Error><Code>SlowDown</Code></Error>"), Kind::RateLimited, true),
            (answer!("507 Insufficient Storage", ""), Kind::Exhausted, false),
        ] {
            let error = asked(&service(answer));
            assert_eq!((error.kind(), error.is_temporary()), (kind, temporary), "{answer:?}: {error:?}");
            assert!(!format!("{error:?}").contains("the-secret-key"), "{error:?}");
        }
    }

    #[test]
    fn a_service_that_is_not_there_is_unreachable_for_now() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
        let address = listener.local_addr().expect("address");
        drop(listener);
        let error = asked(&format!("http://{address}"));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{error:?}");
    }
}
