//! Pure forms: what a listing says of one object, the pages of the manifest, the summary.

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{FileTime, Metadata};

use super::config::Mode;
use super::keys;

/// The schema that `bucket.json` states.
pub(super) const SCHEMA: &str = "stillpoint.dev/objects/v1";
/// Object that holds the environment stamp.
pub(super) const STAMP_KEY: &str = ".stillpoint-stamp.json";
/// Object that marks a bucket as being restored; goes when the restore is done.
pub(super) const RESTORE_KEY: &str = ".stillpoint-restore.json";
/// Names of what a point holds, in the order of the tree.
pub(super) const HOW_TO: &[u8] = b"HOW-TO-RESTORE.txt";
/// See [`HOW_TO`].
pub(super) const SUMMARY: &[u8] = b"bucket.json";
/// See [`HOW_TO`].
pub(super) const MANIFEST: &[u8] = b"manifest";
/// See [`HOW_TO`].
pub(super) const OBJECTS: &[u8] = b"objects";

/// A page of the manifest ends at a key whose hash has this many zero bits, so that pages stay the
/// same when keys come and go elsewhere.
const PAGE_BITS: u32 = 12;
/// Keys on a page at most.
const PAGE_KEYS_MAX: u64 = 16_384;

/// What a listing says of one object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// Bytes.
    #[serde(rename = "s")]
    pub size: u64,
    /// Last change of content: seconds and nanoseconds.
    #[serde(rename = "m")]
    pub modified: (i64, u32),
    /// Last change of content or inode; directories only.
    #[serde(rename = "c", default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<(i64, u32)>,
    /// Inode, mode, owner, group; directories only.
    #[serde(rename = "f", default, skip_serializing_if = "Option::is_none")]
    pub file: Option<(u64, u32, u32, u32)>,
    /// Entity tag; buckets only.
    #[serde(rename = "e", default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// Version id, where the bucket keeps versions.
    #[serde(rename = "v", default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Storage class, where it is not the usual one.
    #[serde(rename = "t", default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// The version that the cut may have shown instead, or `absent` or `deleted`: the times do not tell.
    #[serde(rename = "o", default, skip_serializing_if = "Option::is_none")]
    pub other: Option<String>,
    /// Version of the copy in the mirror.
    #[serde(rename = "r", default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<String>,
}

impl Record {
    /// Bytes for the spool.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::internal("a record does not serialize").source(error))
    }

    /// Parses bytes of the spool.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::new(Kind::Corrupt, "a list in the scratch folder is damaged").source(error))
    }

    /// Whether it surely has the content of `other`, an earlier look at the same key of a bucket: the
    /// tag names the content, the version the writing of it.
    pub fn is_same_object(&self, other: &Self) -> bool {
        self.etag.is_some()
            && (&self.etag, &self.version, self.size, self.modified)
                == (&other.etag, &other.version, other.size, other.modified)
    }

    /// Whether its storage class keeps it where it cannot be read at once.
    pub fn is_archived(&self) -> bool {
        self.class.as_deref().is_some_and(|class| class == "GLACIER" || class == "DEEP_ARCHIVE")
    }

    /// When the content last changed.
    pub fn modified_time(&self) -> FileTime {
        FileTime { seconds: self.modified.0, nanos: self.modified.1 }
    }

    /// The latest moment at which anything of the object changed.
    pub fn changed_time(&self) -> FileTime {
        let (seconds, nanos) = self.changed.unwrap_or(self.modified);
        FileTime { seconds, nanos }
    }

    /// What the object's stream carries. `attributes` hold what the service says beside content.
    pub fn metadata(&self, attributes: Vec<(Vec<u8>, Vec<u8>)>) -> Metadata {
        let mut meta = Metadata::stream(self.modified_time());
        meta.ctime = self.changed_time();
        if let Some((inode, mode, uid, gid)) = self.file {
            (meta.inode, meta.mode, meta.uid, meta.gid) = (inode, mode, uid, gid);
        }
        meta.xattrs = attributes;
        for (name, value) in [("etag", &self.etag), ("version", &self.version)] {
            if let Some(value) = value {
                meta.xattrs.push((attribute_name(name), value.clone().into_bytes()));
            }
        }
        meta.xattrs.sort();
        meta
    }
}

/// The extended attribute that carries a fact of an object.
pub(super) fn attribute_name(fact: &str) -> Vec<u8> {
    format!("user.stillpoint.{fact}").into_bytes()
}

/// The fact that an extended attribute carries.
pub(super) fn attribute_fact(name: &[u8]) -> Option<&str> {
    std::str::from_utf8(name).ok()?.strip_prefix("user.stillpoint.")
}

/// `bucket.json`: what the point holds, on one page.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Summary {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// `directory` or `bucket`.
    pub kind: String,
    /// Objects.
    pub objects: u64,
    /// Bytes in all objects.
    pub bytes: u64,
    /// Objects whose path differs from their key.
    pub escaped: u64,
    /// Objects that no directory can hold under their key.
    pub bucket_only: u64,
    /// The moment of the cut by the clock that stamps the files, in nanoseconds since 1970.
    pub cut_nanos: i64,
    /// Where the bytes are: in `objects`, or in a bucket.
    #[serde(default, skip_serializing_if = "Mode::is_copy")]
    pub mode: Mode,
    /// Where a bucket lay, for people and for copies within the service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Location>,
    /// Where the copies of a mirror lie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Location>,
    /// Whether the bucket kept versions: `enabled`, `suspended`, `never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub versioning: Option<String>,
    /// What else was set on the bucket, as the service tells it. Kept for people, never applied.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub configuration: std::collections::BTreeMap<String, String>,
}

/// A prefix of a bucket on a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Location {
    /// `https://host:port`.
    pub service: String,
    /// The bucket.
    pub bucket: String,
    /// What its keys begin with; empty, or ends with a slash.
    pub prefix: String,
}

impl Summary {
    /// Parses what stands in a point.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let summary: Self = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(Kind::Corrupt, "`bucket.json` is not readable").source(error))?;
        if summary.schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the objects are stored as `{}`", summary.schema))
                .hint(format!("this version reads `{SCHEMA}`; use a newer stillpoint")));
        }
        Ok(summary)
    }

    /// The text as it is stored.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal("a summary does not serialize").source(error))?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// A line of the manifest.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    /// Instead of `key`, where the key is no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_hex: Option<String>,
    path: String,
    size: u64,
    modified: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: &'a Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: &'a Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: &'a Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    other: &'a Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: &'a Option<String>,
}

/// A line as it is read back. Unknown fields are of newer versions and mean more, never other things.
#[derive(Deserialize)]
struct ReadLine {
    key: Option<String>,
    key_hex: Option<String>,
    size: u64,
    modified: String,
    etag: Option<String>,
    version: Option<String>,
    class: Option<String>,
    other: Option<String>,
    copy: Option<String>,
}

/// The key and the record of a line of the manifest.
pub(super) fn parse_line(line: &[u8]) -> Result<(Vec<u8>, Record)> {
    let wrong = || Error::new(Kind::Corrupt, "a line of the manifest is not readable");
    let line: ReadLine = serde_json::from_slice(line).map_err(|error| wrong().source(error))?;
    let key = match (line.key, line.key_hex) {
        (Some(key), None) => key.into_bytes(),
        (None, Some(digits)) => hex::decode(digits).map_err(|error| wrong().source(error))?,
        _ => return Err(wrong()),
    };
    let modified = match line.modified.parse::<jiff::Timestamp>() {
        // Before 1970, seconds and nanoseconds of a time stamp both count backwards.
        Ok(time) if time.subsec_nanosecond() < 0 => {
            (time.as_second() - 1, (1_000_000_000 + time.subsec_nanosecond()).unsigned_abs())
        }
        Ok(time) => (time.as_second(), time.subsec_nanosecond().unsigned_abs()),
        Err(_) => (line.modified.parse().map_err(|_| wrong())?, 0),
    };
    let (etag, version, class) = (line.etag, line.version, line.class);
    let (other, copy) = (line.other, line.copy);
    Ok((key, Record { size: line.size, modified, etag, version, class, other, copy, ..Record::default() }))
}

/// Appends an object's line to a page; `true` if the page ends with it.
pub(super) fn add_line(
    page: &mut Vec<u8>,
    on_page: u64,
    key: &[u8],
    path: &[Vec<u8>],
    record: &Record,
) -> Result<bool> {
    let text = std::str::from_utf8(key).ok();
    let modified = jiff::Timestamp::new(record.modified.0, record.modified.1 as i32)
        .map_or_else(|_| record.modified.0.to_string(), |time| time.to_string());
    let path: Vec<_> = path.iter().map(|name| String::from_utf8_lossy(name)).collect();
    let line = Line {
        key: text,
        key_hex: text.is_none().then(|| hex::encode(key)),
        path: path.join("/"),
        size: record.size,
        modified,
        etag: &record.etag,
        version: &record.version,
        class: &record.class,
        other: &record.other,
        copy: &record.copy,
    };
    serde_json::to_writer(&mut *page, &line)
        .map_err(|error| Error::internal("a line of the manifest does not serialize").source(error))?;
    page.push(b'\n');
    // FNV-1a; its high bits are the better mixed ones.
    let hash = key
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    Ok(hash >> (64 - PAGE_BITS) == 0 || on_page + 1 >= PAGE_KEYS_MAX)
}

/// The path of an object: its key's, or within the folder that its key also is.
pub(super) fn object_path(names: &[Vec<u8>], is_folder: bool) -> Vec<Vec<u8>> {
    let mut path = names.to_vec();
    if is_folder {
        path.push(keys::SELF.to_vec());
    }
    path
}
