//! One request to an S3 service: signed, paced, repeated where that can help, and its failure said
//! in words an operator can act on.
//!
//! Knows no call by name; those stand in [`super::verbs`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use object_store::ClientConfigKey;
use object_store::aws::{AmazonS3ConfigKey, AwsCredentialProvider};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, Kind, Result};

use super::answers::{Element, Refusal};
use super::options;
use super::sign::{self, Signed, Signer};
use super::tries::{Pace, Tries};
use crate::objects::keys;

/// How long a service may take to accept the next bytes, to begin an answer, and to send the next bytes of one.
pub(super) const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// How long it may take where it works on gigabytes before it answers: copies, and parts that become one object.
const WORK_TIME_MAX: Duration = Duration::from_secs(15 * 60);
/// What is handed to the connection at a time: as long as that goes on, a slow line is no dead one.
const SENT_BYTES: usize = 64 << 10;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// What helps with an object that lies in an archive.
const IN_ARCHIVE: &str = "its storage class keeps it in an archive: restore it there first";
/// What is said of a request that the service knows for no object at all.
const UNKNOWN: &str = "the service does not know this kind of request";
/// SHA-256 of nothing.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// One bucket on one service. Cheap to clone.
#[derive(Clone)]
pub(in super::super) struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    /// `https://host:port`, without the bucket.
    service: String,
    host: String,
    /// What paths begin with: `/bucket`, or nothing where the bucket is in the host's name.
    path: String,
    /// Whether the bucket is in the host's name.
    is_virtual: bool,
    bucket: String,
    region: String,
    credentials: Option<AwsCredentialProvider>,
    is_requester_pays: bool,
    pace: Pace,
    sent: AtomicU64,
    repeated: AtomicU64,
    /// What the service's clock showed at last, less what ours did, in seconds.
    ahead_seconds: AtomicI64,
}

/// What is asked: the privilege that it takes is named when it is refused.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Purpose {
    /// For people: `list`.
    pub verb: &'static str,
    /// As policies have it: `s3:ListBucket`.
    pub privilege: &'static str,
}

/// A request before it is signed.
#[derive(Debug, Clone)]
pub(in super::super) struct Request {
    pub purpose: Purpose,
    pub method: Method,
    /// The key in the bucket, prefix included; `None` for the bucket itself.
    pub key: Option<Vec<u8>>,
    pub query: Vec<(String, String)>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Bytes,
    /// How long the service may be silent.
    silence_max: Duration,
}

impl Request {
    /// A request without body for the bucket or one of its keys.
    pub fn new(purpose: Purpose, method: Method, key: Option<&[u8]>) -> Self {
        let key = key.map(<[u8]>::to_vec);
        let (query, headers, silence_max) = (Vec::new(), Vec::new(), ANSWER_TIME_MAX);
        Self { purpose, method, key, query, headers, body: Bytes::new(), silence_max }
    }

    /// Gives the service time: it works on gigabytes before it answers.
    pub fn patient(mut self) -> Self {
        self.silence_max = WORK_TIME_MAX;
        self
    }

    /// Adds a query parameter.
    pub fn query(mut self, name: &str, value: impl Into<String>) -> Self {
        self.query.push((name.to_owned(), value.into()));
        self
    }

    /// Adds a header; names in lower case.
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Asks for a version, if one is named.
    pub fn version(self, version: Option<&str>) -> Self {
        match version {
            Some(version) => self.query("versionId", version),
            None => self,
        }
    }

    /// Sends these bytes.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }
}

/// An answer that means success, its body not read yet.
#[derive(Debug)]
pub(in super::super) struct Answer {
    pub headers: HeaderMap,
    response: reqwest::Response,
}

impl Answer {
    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The next bytes; `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        match tokio::time::timeout(ANSWER_TIME_MAX, self.response.chunk()).await {
            Ok(chunk) => chunk.map_err(|error| unreachable("the service broke off its answer", error)),
            Err(_) => Err(slow(ANSWER_TIME_MAX)),
        }
    }

    /// All bytes that are left.
    pub async fn bytes(mut self) -> Result<Bytes> {
        let Some(first) = self.chunk().await? else { return Ok(Bytes::new()) };
        let Some(second) = self.chunk().await? else { return Ok(first) };
        let mut all = Vec::with_capacity(first.len() + second.len());
        all.extend_from_slice(&first);
        all.extend_from_slice(&second);
        while let Some(chunk) = self.chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.into())
    }

    /// All bytes that are left, as text.
    pub async fn text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes().await?).into_owned())
    }
}

fn unreachable(what: &str, error: reqwest::Error) -> Error {
    Error::new(Kind::Unreachable, what).source(error.without_url()).temporary()
}

fn slow(silence: Duration) -> Error {
    let seconds = silence.as_secs();
    Error::new(Kind::TimedOut, format!("the service took and sent nothing for {seconds} s")).temporary()
}

/// How far the sending of one request has come.
#[derive(Debug, Default, Clone)]
struct Progress(Arc<AtomicU64>);

impl Progress {
    /// The bytes in pieces, each of which counts when the connection takes it.
    fn body(&self, bytes: Bytes) -> reqwest::Body {
        let progress = self.clone();
        let pieces = (0..bytes.len()).step_by(SENT_BYTES).map(move |begin| {
            progress.0.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::convert::Infallible>(bytes.slice(begin..(begin + SENT_BYTES).min(bytes.len())))
        });
        reqwest::Body::wrap_stream(futures::stream::iter(pieces))
    }

    /// Waits for an answer for as long as bytes go out, and for one span of silence; `None` if it does not come.
    async fn watch<T>(&self, silence_max: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let before = self.0.load(Ordering::Relaxed);
            match tokio::time::timeout(silence_max, &mut work).await {
                Ok(done) => return Some(done),
                Err(_) if self.0.load(Ordering::Relaxed) != before => {}
                Err(_) => return None,
            }
        }
    }
}

/// What became of a request that was sent once; a failure comes with how long the service wishes to be left alone.
type Outcome<T> = std::result::Result<T, (Error, Option<Duration>)>;

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({}{})", self.inner.service, self.inner.path)
    }
}

impl Inner {
    fn copied(&self) -> Self {
        Self {
            http: self.http.clone(),
            service: self.service.clone(),
            host: self.host.clone(),
            path: self.path.clone(),
            is_virtual: self.is_virtual,
            bucket: self.bucket.clone(),
            region: self.region.clone(),
            credentials: self.credentials.clone(),
            is_requester_pays: self.is_requester_pays,
            pace: self.pace.again(),
            sent: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            ahead_seconds: AtomicI64::new(0),
        }
    }
}

impl Client {
    /// A client for the bucket of `url`; options have the names of the `object_store` crate, whose
    /// chain of credentials is used. Sends nothing.
    pub fn new(url: &url::Url, given: &[(String, String)], requests_per_second_max: Option<u32>) -> Result<Self> {
        // TLS needs one provider per process; the error says that somebody chose it before us.
        drop(rustls::crypto::ring::default_provider().install_default());
        let bucket = url.host_str().unwrap_or_default().to_owned();
        let builder = options::builder(&bucket, given)?;
        let asked = |key| builder.get_config_value(&key);
        let is =
            |key| asked(key).is_some_and(|value| ["true", "1", "on"].contains(&value.to_ascii_lowercase().as_str()));
        let region = asked(AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
        let endpoint = asked(AmazonS3ConfigKey::S3Endpoint).or_else(|| asked(AmazonS3ConfigKey::Endpoint));
        let is_virtual = is(AmazonS3ConfigKey::VirtualHostedStyleRequest);
        let (service, path) = match endpoint {
            Some(endpoint) if is_virtual => (endpoint, String::new()),
            Some(endpoint) => (endpoint, format!("/{bucket}")),
            None if is_virtual => (format!("https://{bucket}.s3.{region}.amazonaws.com"), String::new()),
            None => (format!("https://s3.{region}.amazonaws.com"), format!("/{bucket}")),
        };
        let service = service.trim_end_matches('/').to_owned();
        let parsed = url::Url::parse(&service).map_err(|error| {
            Error::new(Kind::Config, format!("`{service}` is no endpoint"))
                .hint("endpoint: https://host:port")
                .source(error)
        })?;
        let host = parsed[url::Position::BeforeHost..url::Position::AfterPort].to_owned();
        // An endpoint may lie below a path.
        let path = format!("{}{path}", parsed.path().trim_end_matches('/'));
        let service = format!("{}://{host}", parsed.scheme());
        let is_anonymous = is(AmazonS3ConfigKey::SkipSignature);
        let is_requester_pays = is(AmazonS3ConfigKey::RequestPayer);
        if parsed.scheme() == "http" && !is(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)) {
            return Err(Error::new(Kind::Config, format!("`{service}` is not encrypted on the way"))
                .hint("use https://, or allow it by name: options: { allow_http: \"true\" }"));
        }
        let trusts_all = is(AmazonS3ConfigKey::Client(ClientConfigKey::AllowInvalidCertificates));
        let http = http_client(trusts_all, asked(AmazonS3ConfigKey::Client(ClientConfigKey::ProxyUrl)))?;
        let store = builder.build().map_err(options::wrong)?;
        let credentials = (!is_anonymous).then(|| store.credentials().clone());
        let pace = Pace::new(requests_per_second_max);
        let inner = Inner {
            http,
            service,
            host,
            path,
            is_virtual,
            bucket,
            region,
            credentials,
            is_requester_pays,
            pace,
            sent: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            ahead_seconds: AtomicI64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A client for another bucket of the same service.
    pub fn beside(&self, bucket: &str) -> Result<Self> {
        let inner = &self.inner;
        let mut other = Inner { bucket: bucket.to_owned(), pace: inner.pace.again(), ..inner.copied() };
        if let Some(rest) = inner.host.strip_prefix(&format!("{}.", inner.bucket)).filter(|_| inner.is_virtual) {
            other.host = format!("{bucket}.{rest}");
            other.service = inner.service.replace(&inner.host, &other.host);
        } else if let Some(above) = inner.path.strip_suffix(&inner.bucket) {
            other.path = format!("{above}{bucket}");
        } else {
            return Err(Error::new(Kind::Config, "the endpoint leads to one bucket only"));
        }
        Ok(Self { inner: Arc::new(other) })
    }

    /// The bucket's name.
    pub fn bucket(&self) -> &str {
        &self.inner.bucket
    }

    /// The region that requests are signed for.
    pub fn region(&self) -> &str {
        &self.inner.region
    }

    /// Where the service is, without the bucket.
    pub fn service(&self) -> &str {
        &self.inner.service
    }

    /// Requests that were sent, and how many of them were repetitions.
    pub fn counts(&self) -> (u64, u64) {
        (self.inner.sent.load(Ordering::Relaxed), self.inner.repeated.load(Ordering::Relaxed))
    }

    /// Sends a request until it is answered, or until trying again cannot help or has taken too long.
    pub async fn send(&self, request: &Request) -> Result<Answer> {
        let mut tries = Tries::new();
        loop {
            self.inner.pace.wait().await;
            match self.send_once(request).await {
                Ok(answer) => return Ok(answer),
                Err((error, wished)) => tries.wait(&self.inner.repeated, error, wished).await?,
            }
        }
    }

    /// The same for work that takes long: services answer "success" first, and tell of a failure in the body.
    /// Counts in `tries` how often it was sent.
    pub async fn send_long(&self, request: &Request, tries: &mut Tries) -> Result<(HeaderMap, Element)> {
        loop {
            self.inner.pace.wait().await;
            match self.send_long_once(request).await {
                Ok(done) => return Ok(done),
                Err((error, wished)) => tries.wait(&self.inner.repeated, error, wished).await?,
            }
        }
    }

    async fn send_long_once(&self, request: &Request) -> Outcome<(HeaderMap, Element)> {
        let answer = self.send_once(request).await?;
        let headers = answer.headers.clone();
        let element = answer.text().await.and_then(|text| Element::parse(&text)).map_err(|error| (error, None))?;
        if element.name != "Error" {
            return Ok((headers, element));
        }
        let refusal = Refusal::of(&element);
        Err((self.refused(request, StatusCode::OK, &headers, &refusal), wished_pause(&headers)))
    }

    /// A failure comes with how long the service wishes to be left alone.
    async fn send_once(&self, request: &Request) -> Outcome<Answer> {
        let progress = Progress::default();
        let built = self.build(request, &progress).await.map_err(|error| (error, None))?;
        self.inner.sent.fetch_add(1, Ordering::Relaxed);
        let named = |error: Error| error.context("service", &self.inner.service);
        let response = match progress.watch(request.silence_max, self.inner.http.execute(built)).await {
            Some(Ok(response)) => response,
            Some(Err(error)) => {
                let what =
                    format!("cannot {} {}: the service cannot be reached", request.purpose.verb, self.shown(request));
                return Err((named(unreachable(&what, error)), None));
            }
            None => return Err((named(slow(request.silence_max)), None)),
        };
        self.note_time(response.headers());
        if response.status().is_success() {
            return Ok(Answer { headers: response.headers().clone(), response });
        }
        let (status, headers) = (response.status(), response.headers().clone());
        let body = tokio::time::timeout(ANSWER_TIME_MAX, response.text()).await;
        let refusal = Refusal::parse(&body.ok().and_then(|body| body.ok()).unwrap_or_default());
        Err((self.refused(request, status, &headers, &refusal), wished_pause(&headers)))
    }

    async fn build(&self, request: &Request, progress: &Progress) -> Result<reqwest::Request> {
        let inner = &self.inner;
        let key = request.key.as_deref();
        if let Some(key) = key.filter(|key| has_dots(key)) {
            return Err(Error::new(Kind::Unsupported, format!("the key `{}` cannot be asked for", keys::shown(key)))
                .hint("a part of it is `.` or `..`, which addresses on the web cannot hold: rename the object"));
        }
        let path = match key {
            Some(key) => format!("{}/{}", inner.path, sign::encode(key, true)),
            None if inner.path.is_empty() => "/".to_owned(),
            None => inner.path.clone(),
        };
        let now = jiff::Timestamp::now();
        let time = jiff::fmt::strtime::format("%Y%m%dT%H%M%SZ", now)
            .map_err(|error| Error::internal("a time cannot be written").source(error))?;
        let payload =
            if request.body.is_empty() { EMPTY.to_owned() } else { hex::encode(Sha256::digest(&request.body)) };
        let mut headers = request.headers.clone();
        headers.push(("host".to_owned(), inner.host.clone().into_bytes()));
        headers.push(("x-amz-content-sha256".to_owned(), payload.clone().into_bytes()));
        headers.push(("x-amz-date".to_owned(), time.clone().into_bytes()));
        if inner.is_requester_pays {
            headers.push(("x-amz-request-payer".to_owned(), b"requester".to_vec()));
        }
        if let Some(credentials) = &inner.credentials {
            let credential = credentials.get_credential().await.map_err(|error| {
                Error::new(Kind::Unauthenticated, "no credentials for the bucket could be had")
                    .hint("credentials: access_key_id and secret_access_key, or a role of the machine")
                    .source(error)
            })?;
            if let Some(token) = &credential.token {
                headers.push(("x-amz-security-token".to_owned(), token.clone().into_bytes()));
            }
            let signer = Signer { key_id: &credential.key_id, secret: &credential.secret_key, region: &inner.region };
            let (query, method) = (request.query.as_slice(), request.method.as_str());
            let signed = Signed { method, path: &path, query, headers: &headers, payload: &payload, time: &time };
            headers.push(("authorization".to_owned(), signer.authorization(&signed).into_bytes()));
        }
        let mut url = format!("{}{path}", inner.service);
        if !request.query.is_empty() {
            url.push('?');
            url.push_str(&sign::query_text(&request.query));
        }
        let url =
            url::Url::parse(&url).map_err(|error| Error::internal("an address cannot be read back").source(error))?;
        let mut built = reqwest::Request::new(request.method.clone(), url);
        for (name, value) in headers.into_iter().filter(|(name, _)| name != "host") {
            let wrong = |_| Error::new(Kind::Unsupported, format!("the header `{name}` cannot be sent"));
            let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong(()))?;
            built.headers_mut().append(header, HeaderValue::from_bytes(&value).map_err(|_| wrong(()))?);
        }
        if request.body.len() > SENT_BYTES {
            let length = HeaderValue::from(request.body.len());
            built.headers_mut().insert(reqwest::header::CONTENT_LENGTH, length);
            *built.body_mut() = Some(progress.body(request.body.clone()));
        } else if !request.body.is_empty() || matches!(request.method, Method::PUT | Method::POST) {
            *built.body_mut() = Some(request.body.clone().into());
        }
        Ok(built)
    }

    fn note_time(&self, headers: &HeaderMap) {
        if let Some(there) = served_at(headers) {
            let ahead = there.as_second() - jiff::Timestamp::now().as_second();
            self.inner.ahead_seconds.store(ahead, Ordering::Relaxed);
        }
    }

    fn shown(&self, request: &Request) -> String {
        match &request.key {
            Some(key) => format!("the object `{}` of the bucket `{}`", keys::shown(key), self.inner.bucket),
            None => format!("the bucket `{}`", self.inner.bucket),
        }
    }

    /// Classifies a failure by code first, then by status: what cannot get better is never tried again.
    fn refused(&self, request: &Request, status: StatusCode, headers: &HeaderMap, refusal: &Refusal) -> Error {
        let Purpose { verb, privilege } = request.purpose;
        let bucket = &self.inner.bucket;
        let shown = self.shown(request);
        let plain = |kind| Error::new(kind, format!("cannot {verb} {shown}"));
        let error = match (refusal.code.as_str(), status.as_u16()) {
            ("NoSuchBucket", _) => Error::new(Kind::NotFound, format!("there is no bucket `{bucket}`")),
            ("InvalidBucketName", _) => Error::new(Kind::Config, format!("`{bucket}` cannot be the name of a bucket")),
            ("RequestTimeTooSkewed", _) => {
                let ahead = self.inner.ahead_seconds.load(Ordering::Relaxed);
                let way = if ahead > 0 { "behind" } else { "ahead of" };
                let seconds = ahead.unsigned_abs();
                Error::new(Kind::Unauthenticated, format!("this machine's clock is {seconds} s {way} the service's"))
                    .hint("set the clock (NTP): services accept no request that is dated 15 minutes off")
            }
            (
                "InvalidAccessKeyId"
                | "SignatureDoesNotMatch"
                | "InvalidToken"
                | "ExpiredToken"
                | "AuthorizationHeaderMalformed",
                _,
            )
            | (_, 401) => {
                Error::new(Kind::Unauthenticated, format!("the service does not accept the credentials for `{bucket}`"))
                    .hint("check access_key_id, secret_access_key, and the region")
            }
            ("InvalidObjectState", _) => plain(Kind::Unsupported).hint(IN_ARCHIVE),
            ("KMS.DisabledException" | "KMS.NotFoundException", _) => {
                plain(Kind::PermissionDenied).hint("its encryption key cannot be used")
            }
            ("NotImplemented", _) | (_, 501) => plain(Kind::Unsupported).hint(UNKNOWN),
            ("MethodNotAllowed", _) | (_, 405) => plain(Kind::Unsupported),
            ("BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch", _) => plain(Kind::Corrupt).temporary(),
            ("SlowDown" | "RequestLimitExceeded" | "Throttling" | "TooManyRequests", _) | (_, 429 | 503) => {
                plain(Kind::RateLimited)
                    .hint("the service asks for less: lower `requestsPerSecond` or `connections`")
                    .temporary()
            }
            ("XMinioStorageFull" | "QuotaExceeded" | "TooManyBuckets", _) | (_, 507) => {
                plain(Kind::Exhausted).hint("the service has no room left: make some, or raise the quota")
            }
            ("RequestTimeout" | "InternalError" | "OperationAborted", _) | (_, 500 | 502 | 504 | 408) => {
                plain(Kind::Unreachable).temporary()
            }
            (_, 301 | 307 | 400) if headers.contains_key("x-amz-bucket-region") => {
                let region =
                    headers.get("x-amz-bucket-region").and_then(|value| value.to_str().ok()).unwrap_or_default();
                Error::new(Kind::Config, format!("the bucket `{bucket}` is in the region {region}"))
                    .hint(format!("options: {{ region: {region} }}"))
            }
            (_, 403) => plain(Kind::PermissionDenied)
                .hint(format!("grant {privilege} on it; `stillpoint driver policy objects` prints all that is needed")),
            (_, 404) => plain(Kind::NotFound),
            (_, 304 | 409 | 412) => plain(Kind::Conflict),
            (_, 400) => plain(Kind::Config),
            _ => plain(Kind::Io),
        };
        let text = match (refusal.code.as_str(), refusal.message.as_str()) {
            ("", _) => format!("the service answered {status}"),
            (code, message) => format!("{code}: {message} ({status})"),
        };
        error.context("service", &self.inner.service).source(text)
    }
}

/// Whether an object could not be read because it lies in an archive.
pub(super) fn is_in_archive(error: &Error) -> bool {
    error.kind() == Kind::Unsupported && error.hint_text() == Some(IN_ARCHIVE)
}

/// Whether the service does not know such a request at all, which other objects will not change.
pub(super) fn is_unknown(error: &Error) -> bool {
    error.kind() == Kind::Unsupported && error.hint_text() == Some(UNKNOWN)
}

/// Whether a part of the key is `.` or `..`: addresses drop such parts, even when they are encoded.
pub(super) fn has_dots(key: &[u8]) -> bool {
    key.split(|&byte| byte == b'/').any(|part| part == b"." || part == b"..")
}

fn http_client(trusts_all: bool, proxy: Option<String>) -> Result<reqwest::Client> {
    let wrong = |error: reqwest::Error| Error::new(Kind::Config, "the HTTP client cannot be set up").source(error);
    let mut builder = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIME_MAX)
        .redirect(reqwest::redirect::Policy::none())
        .pool_idle_timeout(Duration::from_secs(60))
        .tls_danger_accept_invalid_certs(trusts_all);
    if let Some(proxy) = proxy {
        builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(wrong)?);
    }
    builder.build().map_err(wrong)
}

/// The time in the header `Date`, which has a resolution of a second.
pub(super) fn served_at(headers: &HeaderMap) -> Option<jiff::Timestamp> {
    let text = headers.get(reqwest::header::DATE)?.to_str().ok()?;
    jiff::fmt::rfc2822::parse(text).ok().map(|time| time.timestamp())
}

fn wished_pause(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    text.parse().ok().map(Duration::from_secs)
}

/// Headers whose names begin with `prefix`, without it.
pub(in super::super) fn below(headers: &HeaderMap, prefix: &str) -> BTreeMap<String, Vec<u8>> {
    let pairs = headers.iter().filter_map(|(name, value)| Some((name.as_str().strip_prefix(prefix)?, value)));
    pairs.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// A service that takes a body of so many bytes in eight pieces, with pauses, and then answers or does not.
    fn slow_service(size: usize, answers: bool) -> Client {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut client, _) = listener.accept()?;
            let mut byte = [0];
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                client.read_exact(&mut byte)?;
                head.push(byte[0]);
            }
            let mut piece = vec![0; size / 8];
            for _ in 0..8 {
                std::thread::sleep(Duration::from_millis(200));
                client.read_exact(&mut piece)?;
            }
            if answers {
                client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
            }
            client.read_exact(&mut byte)
        });
        let options = [("endpoint", endpoint.as_str()), ("allow_http", "true"), ("skip_signature", "true")];
        let options = options.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Client::new(&url::Url::parse("s3://bucket").unwrap(), &options, None).unwrap()
    }

    #[test]
    fn a_slow_line_is_given_time_and_a_dead_one_is_not() {
        let size = 64 << 20;
        for answers in [true, false] {
            let client = slow_service(size, answers);
            let purpose = Purpose { verb: "write", privilege: "s3:PutObject" };
            let mut request = Request::new(purpose, Method::PUT, Some(b"key")).body(vec![0; size]);
            // All of the body takes longer.
            request.silence_max = Duration::from_millis(700);
            let sent = crate::trial::run(client.send_once(&request));
            match answers {
                true => drop(sent.map_err(|(error, _)| error).unwrap()),
                false => assert_eq!(sent.unwrap_err().0.kind(), Kind::TimedOut),
            }
        }
    }
}
