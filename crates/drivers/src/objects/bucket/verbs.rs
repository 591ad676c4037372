//! The calls of S3 that the driver makes, each with the privilege that it takes.
//!
//! What they mean: <https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html>.

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::HeaderMap;
use stillpoint_core::error::{Error, Kind, Result};

use super::answers::{Element, Entry, Page, Versioning};
use super::request::{Answer, Client, Purpose, Request};
use super::sign;
use super::tries::Tries;

/// Keys on a page; no service gives more.
const PAGE_KEYS: &str = "1000";

const LIST: Purpose = Purpose { verb: "list", privilege: "s3:ListBucket" };
const LIST_VERSIONS: Purpose = Purpose { verb: "list the versions of", privilege: "s3:ListBucketVersions" };
const LIST_UPLOADS: Purpose = Purpose { verb: "list the uploads of", privilege: "s3:ListBucketMultipartUploads" };
const READ: Purpose = Purpose { verb: "read", privilege: "s3:GetObject" };
const READ_VERSION: Purpose = Purpose { verb: "read", privilege: "s3:GetObjectVersion" };
const WRITE: Purpose = Purpose { verb: "write", privilege: "s3:PutObject" };
const DELETE: Purpose = Purpose { verb: "delete", privilege: "s3:DeleteObject" };
const CREATE: Purpose = Purpose { verb: "create", privilege: "s3:CreateBucket" };
const CONFIGURE: Purpose = Purpose { verb: "set the versioning of", privilege: "s3:PutBucketVersioning" };
const LOOK: Purpose = Purpose { verb: "look at the versioning of", privilege: "s3:GetBucketVersioning" };

/// What a listing shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum What {
    /// The newest object of each key.
    Objects,
    /// Every version and every delete marker.
    Versions,
}

/// Which object, and which of its versions.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Which<'a> {
    pub key: &'a [u8],
    pub version: Option<&'a str>,
}

impl<'a> Which<'a> {
    /// The newest version.
    pub fn newest(key: &'a [u8]) -> Self {
        Self { key, version: None }
    }

    fn reading(&self) -> Purpose {
        if self.version.is_some() { READ_VERSION } else { READ }
    }

    /// As the header `x-amz-copy-source` has it.
    pub fn as_source(&self, bucket: &str) -> String {
        let version = self
            .version
            .map_or_else(String::new, |version| format!("?versionId={}", sign::encode(version.as_bytes(), false)));
        format!("{bucket}/{}{version}", sign::encode(self.key, true))
    }
}

/// A part of an upload, once written.
#[derive(Debug, Clone)]
pub(in super::super) struct Part {
    pub number: usize,
    pub etag: String,
}

impl Client {
    /// One page below a prefix; `next` is empty for the first, or what the last page said, or where
    /// a range begins.
    pub async fn list(
        &self,
        what: What,
        prefix: &str,
        delimiter: Option<&str>,
        next: &[(String, String)],
    ) -> Result<Page> {
        self.page(what, prefix, delimiter, next, PAGE_KEYS).await
    }

    /// The first entry below a prefix, if there is one; shows that listing is allowed.
    pub async fn first(&self, what: What, prefix: &str) -> Result<Option<Entry>> {
        Ok(self.page(what, prefix, None, &[], "1").await?.entries.into_iter().next())
    }

    async fn page(
        &self,
        what: What,
        prefix: &str,
        delimiter: Option<&str>,
        next: &[(String, String)],
        keys_max: &str,
    ) -> Result<Page> {
        let mut request = match what {
            What::Objects => Request::new(LIST, Method::GET, None).query("list-type", "2"),
            What::Versions => Request::new(LIST_VERSIONS, Method::GET, None).query("versions", ""),
        };
        request = request.query("encoding-type", "url").query("max-keys", keys_max).query("prefix", prefix);
        if let Some(delimiter) = delimiter {
            request = request.query("delimiter", delimiter);
        }
        request.query.extend(next.iter().cloned());
        // A page that breaks off is asked for again, as is one that never came.
        let mut tries = 0;
        loop {
            tries += 1;
            match self.send(&request).await?.text().await {
                Err(error) if error.is_temporary() && tries < 4 => {}
                text => return Page::parse(&text?),
            }
        }
    }

    /// Whether the bucket keeps versions. The answer's headers tell the time.
    pub async fn versioning(&self) -> Result<(Versioning, Option<jiff::Timestamp>)> {
        let request = Request::new(LOOK, Method::GET, None).query("versioning", "");
        let answer = self.send(&request).await?;
        let time = super::request::served_at(&answer.headers);
        Ok((Versioning::parse(&answer.text().await?)?, time))
    }

    /// The service's time, from a small listing. Fails if the bucket is not there.
    pub async fn time(&self, prefix: &str) -> Result<Option<jiff::Timestamp>> {
        let request = Request::new(LIST, Method::GET, None).query("list-type", "2").query("max-keys", "1");
        let request = request.query("prefix", prefix);
        Ok(super::request::served_at(&self.send(&request).await?.headers))
    }

    /// A part of the bucket's configuration as it is; `None` where there is none, or none is told.
    pub async fn configuration(&self, name: &str, privilege: &'static str) -> Result<Option<String>> {
        let purpose = Purpose { verb: "look at the configuration of", privilege };
        let answer = self.send(&Request::new(purpose, Method::GET, None).query(name, "")).await;
        match answer {
            Ok(answer) => Ok(Some(answer.text().await?)),
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Unsupported | Kind::Config) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins to read; `range` has the first byte and the last.
    pub async fn get(&self, which: Which<'_>, if_match: Option<&str>, range: Option<(u64, u64)>) -> Result<Answer> {
        let mut request = Request::new(which.reading(), Method::GET, Some(which.key)).version(which.version);
        if let Some(etag) = if_match {
            request = request.header("if-match", etag);
        }
        if let Some((first, last)) = range {
            request = request.header("range", format!("bytes={first}-{last}"));
        } else {
            request = request.header("x-amz-checksum-mode", "ENABLED");
        }
        self.send(&request).await
    }

    /// What is known of an object or of one of its parts.
    pub async fn head(&self, which: Which<'_>, part: Option<u64>) -> Result<Answer> {
        let mut request = Request::new(which.reading(), Method::HEAD, Some(which.key)).version(which.version);
        request = match part {
            Some(part) => request.query("partNumber", part.to_string()),
            None => request.header("x-amz-checksum-mode", "ENABLED"),
        };
        self.send(&request).await
    }

    /// A document that belongs to an object: `tagging`, `acl`.
    pub async fn document(&self, which: Which<'_>, name: &'static str, privilege: &'static str) -> Result<String> {
        let purpose = Purpose { verb: "read what belongs to", privilege };
        let request = Request::new(purpose, Method::GET, Some(which.key)).query(name, "").version(which.version);
        self.send(&request).await?.text().await
    }

    /// Replaces a document that belongs to an object.
    pub async fn put_document(
        &self,
        key: &[u8],
        name: &'static str,
        privilege: &'static str,
        body: Vec<u8>,
    ) -> Result<()> {
        use base64::Engine;
        use sha2::Digest;
        let purpose = Purpose { verb: "set what belongs to", privilege };
        let digest = base64::engine::general_purpose::STANDARD.encode(sha2::Sha256::digest(&body));
        let request = Request::new(purpose, Method::PUT, Some(key)).query(name, "");
        let request = request.header("x-amz-checksum-sha256", digest).body(body);
        self.send(&request).await.map(drop)
    }

    /// Writes an object whole.
    pub async fn put(&self, key: &[u8], headers: &[(String, Vec<u8>)], body: Bytes) -> Result<Answer> {
        let mut request = Request::new(WRITE, Method::PUT, Some(key)).body(body);
        request.headers.extend_from_slice(headers);
        self.send(&request).await
    }

    /// When the oldest of the uploads in parts that are under way below a prefix was begun.
    pub async fn oldest_upload(&self, prefix: &str) -> Result<Option<jiff::Timestamp>> {
        let mut oldest = None;
        let mut next = Vec::new();
        loop {
            let request = Request::new(LIST_UPLOADS, Method::GET, None).query("uploads", "").query("prefix", prefix);
            let mut request = request.query("encoding-type", "url").query("max-uploads", PAGE_KEYS);
            request.query.extend(next.iter().cloned());
            let (begun, following) = super::answers::uploads(&self.send(&request).await?.text().await?)?;
            oldest = begun.into_iter().chain(oldest).min();
            if following.is_empty() {
                return Ok(oldest);
            }
            if following == next {
                return Err(Error::new(Kind::Corrupt, "the service lists the same uploads again and again"));
            }
            next = following;
        }
    }

    /// Begins an upload in parts, and returns its id.
    pub async fn begin_upload(&self, key: &[u8], headers: &[(String, Vec<u8>)]) -> Result<String> {
        let mut request = Request::new(WRITE, Method::POST, Some(key)).query("uploads", "");
        request.headers.extend_from_slice(headers);
        let text = self.send(&request).await?.text().await?;
        match Element::parse(&text)?.text_of("UploadId") {
            "" => Err(Error::new(Kind::Corrupt, "the service began an upload and gave it no id")),
            id => Ok(id.to_owned()),
        }
    }

    /// Writes a part.
    pub async fn put_part(&self, key: &[u8], upload: &str, number: usize, body: Bytes) -> Result<Part> {
        let request = Request::new(WRITE, Method::PUT, Some(key)).query("partNumber", number.to_string());
        let answer = self.send(&request.query("uploadId", upload).body(body)).await?;
        let etag =
            answer.header("etag").ok_or_else(|| Error::new(Kind::Corrupt, "a part was written and has no tag"))?;
        Ok(Part { number, etag: etag.to_owned() })
    }

    /// Fills a part from an object of the same service.
    pub async fn copy_part(
        &self,
        key: &[u8],
        upload: &str,
        number: usize,
        source: &str,
        range: (u64, u64),
    ) -> Result<Part> {
        let request = Request::new(WRITE, Method::PUT, Some(key)).query("partNumber", number.to_string());
        let request = request.query("uploadId", upload).header("x-amz-copy-source", source);
        let request = request.header("x-amz-copy-source-range", format!("bytes={}-{}", range.0, range.1));
        let (_, copied) = self.send_long(&request.patient(), &mut Tries::new()).await?;
        Ok(Part { number, etag: copied.text_of("ETag").to_owned() })
    }

    /// Makes an object of the parts, which have `size` bytes; returns its version.
    pub async fn complete_upload(
        &self,
        key: &[u8],
        upload: &str,
        parts: &[Part],
        size: u64,
        if_absent: bool,
    ) -> Result<Option<String>> {
        let lines = parts.iter().map(|part| {
            let etag = quick_xml::escape::escape(part.etag.as_str());
            format!("<Part><PartNumber>{}</PartNumber><ETag>{etag}</ETag></Part>", part.number)
        });
        let body = format!("<CompleteMultipartUpload>{}</CompleteMultipartUpload>", lines.collect::<String>());
        let mut request = Request::new(WRITE, Method::POST, Some(key)).query("uploadId", upload).body(body);
        if if_absent {
            request = request.header("if-none-match", "*");
        }
        let mut tries = Tries::new();
        match self.send_long(&request.patient(), &mut tries).await {
            Ok((headers, _)) => Ok(version_of(&headers)),
            // An upload that was put together is no upload any more: the answer to that may have been lost.
            Err(error) if error.kind() == Kind::NotFound && tries.were_several() => {
                self.completed(key, parts, size).await?.ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The version of a key, if it holds an object of so many bytes and parts.
    async fn completed(&self, key: &[u8], parts: &[Part], size: u64) -> Result<Option<Option<String>>> {
        let answer = match self.head(Which::newest(key), None).await {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        let length = answer.header("content-length").and_then(|length| length.parse::<u64>().ok());
        let count = answer.header("etag").and_then(|etag| etag.trim_matches('"').rsplit_once('-')?.1.parse().ok());
        let is_it = (length, count) == (Some(size), Some(parts.len()));
        Ok(is_it.then(|| version_of(&answer.headers)))
    }

    /// Forgets an upload and its parts.
    pub async fn abort_upload(&self, key: &[u8], upload: &str) -> Result<()> {
        let purpose = Purpose { verb: "give up an upload of", privilege: "s3:AbortMultipartUpload" };
        self.send(&Request::new(purpose, Method::DELETE, Some(key)).query("uploadId", upload)).await.map(drop)
    }

    /// Gives an upload up because of a failure, which is returned. Where that fails too, it says so: parts that
    /// stay cost room until a rule of the bucket removes them.
    pub async fn give_up(&self, key: &[u8], upload: &str, failure: Error) -> Error {
        match self.abort_upload(key, upload).await {
            Ok(()) => failure,
            Err(error) => failure.context("parts of the upload stay behind", error),
        }
    }

    /// Copies within the service, with all that belongs to the object; returns the copy's version.
    pub async fn copy(&self, source: &str, key: &[u8], headers: &[(String, Vec<u8>)]) -> Result<Option<String>> {
        let mut request = Request::new(WRITE, Method::PUT, Some(key)).header("x-amz-copy-source", source);
        request.headers.extend_from_slice(headers);
        let (headers, _) = self.send_long(&request.patient(), &mut Tries::new()).await?;
        Ok(version_of(&headers))
    }

    /// Deletes; in a bucket with versions, without naming one, this writes a marker.
    pub async fn delete(&self, which: Which<'_>) -> Result<()> {
        let request = Request::new(DELETE, Method::DELETE, Some(which.key)).version(which.version);
        self.send(&request).await.map(drop)
    }

    /// Creates the bucket; only at its creation can it be made one whose objects can be locked.
    pub async fn create(&self, with_locks: bool) -> Result<()> {
        let mut request = Request::new(CREATE, Method::PUT, None);
        if with_locks {
            request = request.header("x-amz-bucket-object-lock-enabled", "true");
        }
        if self.region() != "us-east-1" {
            let region = quick_xml::escape::escape(self.region());
            request = request.body(format!(
                "<CreateBucketConfiguration><LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
            ));
        }
        self.send(&request).await.map(drop)
    }

    /// Has the bucket keep versions from now on, or no new ones.
    pub async fn set_versioning(&self, versioning: Versioning) -> Result<()> {
        let status = if versioning == Versioning::Enabled { "Enabled" } else { "Suspended" };
        let body = format!("<VersioningConfiguration><Status>{status}</Status></VersioningConfiguration>");
        let request = Request::new(CONFIGURE, Method::PUT, None).query("versioning", "").body(body);
        self.send(&request).await.map(drop)
    }
}

/// The version that was written.
fn version_of(headers: &HeaderMap) -> Option<String> {
    headers.get("x-amz-version-id").and_then(|version| version.to_str().ok()).map(str::to_owned)
}
