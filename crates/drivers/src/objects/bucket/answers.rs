//! What S3 answers in XML, as values. Pure; foreign bytes come in here.

use quick_xml::events::Event;
use stillpoint_core::error::{Error, Kind, Result};

use super::sign;

/// Answers nest only a few levels; deeper ones are hostile.
const DEPTH_MAX: usize = 16;

/// One element: its local name, its own text, and what lies in it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(in super::super) struct Element {
    pub name: String,
    pub text: String,
    pub inside: Vec<Element>,
}

impl Element {
    /// Parses a whole document.
    pub fn parse(text: &str) -> Result<Self> {
        let broken = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(Kind::Corrupt, "the service answered with something that is no XML").source(error)
        };
        let mut reader = quick_xml::Reader::from_str(text);
        let mut open = vec![Self::default()];
        loop {
            let event = reader.read_event().map_err(|error| broken(error.into()))?;
            let depth = open.len();
            let last = open.last_mut().ok_or_else(|| broken("an end without a begin".into()))?;
            match event {
                Event::Start(start) if depth <= DEPTH_MAX => {
                    let name = String::from_utf8_lossy(start.local_name().as_ref()).into_owned();
                    open.push(Self { name, ..Self::default() });
                }
                Event::Start(_) => return Err(broken("too deeply nested".into())),
                Event::Empty(empty) => {
                    let name = String::from_utf8_lossy(empty.local_name().as_ref()).into_owned();
                    last.inside.push(Self { name, ..Self::default() });
                }
                Event::Text(text) => last.text.push_str(&text.decode().map_err(|error| broken(error.into()))?),
                Event::CData(data) => last.text.push_str(&data.decode().map_err(|error| broken(error.into()))?),
                Event::GeneralRef(reference) => {
                    let code = reference.resolve_char_ref().map_err(|error| broken(error.into()))?;
                    let name = reference.decode().map_err(|error| broken(error.into()))?;
                    match (code, quick_xml::escape::resolve_predefined_entity(&name)) {
                        (Some(character), _) => last.text.push(character),
                        (None, Some(text)) => last.text.push_str(text),
                        (None, None) => return Err(broken(format!("unknown entity `{name}`").into())),
                    }
                }
                Event::End(_) => {
                    let done = open.pop().ok_or_else(|| broken("an end without a begin".into()))?;
                    open.last_mut().ok_or_else(|| broken("an end without a begin".into()))?.inside.push(done);
                }
                Event::Eof => break,
                _ => {}
            }
        }
        let mut top = open.pop().filter(|_| open.is_empty()).ok_or_else(|| broken("it ends too early".into()))?;
        top.inside.pop().ok_or_else(|| broken("it is empty".into()))
    }

    /// The first element of this name directly inside.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.inside.iter().find(|element| element.name == name)
    }

    /// The text of the first element of this name; empty if there is none.
    pub fn text_of(&self, name: &str) -> &str {
        self.child(name).map_or("", |element| element.text.as_str())
    }

    /// All elements of this name directly inside.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.inside.iter().filter(move |element| element.name == name)
    }
}

/// What a service says of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in super::super) struct Refusal {
    pub code: String,
    pub message: String,
}

impl Refusal {
    /// Reads the body of a failure; bodies may be absent or of a proxy.
    pub fn parse(body: &str) -> Self {
        let Ok(element) = Element::parse(body) else { return Self::default() };
        Self::of(&element)
    }

    /// What a parsed answer says.
    pub fn of(element: &Element) -> Self {
        Self { code: element.text_of("Code").to_owned(), message: element.text_of("Message").to_owned() }
    }
}

/// One version, or one object of a plain listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Entry {
    pub key: Vec<u8>,
    /// `None` in a plain listing.
    pub version: Option<String>,
    pub is_marker: bool,
    /// Whether the service calls it the newest of its key.
    pub is_latest: bool,
    /// Seconds and nanoseconds.
    pub modified: (i64, u32),
    pub etag: Option<String>,
    pub size: u64,
    pub class: Option<String>,
}

/// A page of a listing, and where the next one begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in super::super) struct Page {
    pub entries: Vec<Entry>,
    /// Prefixes, where a delimiter was given.
    pub prefixes: Vec<Vec<u8>>,
    /// Query parameters that ask for the next page; empty at the end.
    pub next: Vec<(String, String)>,
}

impl Page {
    /// Parses `ListBucketResult` and `ListVersionsResult`.
    pub fn parse(text: &str) -> Result<Self> {
        let top = Element::parse(text)?;
        let encoded = top.text_of("EncodingType") == "url";
        let mut page = Self::default();
        for element in &top.inside {
            match element.name.as_str() {
                "Contents" | "Version" | "DeleteMarker" => page.entries.push(entry(element, encoded)?),
                "CommonPrefixes" => page.prefixes.push(key(element.text_of("Prefix"), encoded)?),
                _ => {}
            }
        }
        if top.text_of("IsTruncated") != "true" {
            return Ok(page);
        }
        let text = |name: &str| -> Result<String> {
            String::from_utf8(key(top.text_of(name), encoded)?).map_err(|error| {
                Error::new(Kind::Unsupported, "a listing goes on at a key that is no text").source(error)
            })
        };
        if let Some(token) = top.child("NextContinuationToken") {
            page.next = vec![("continuation-token".to_owned(), token.text.clone())];
        } else if top.child("NextKeyMarker").is_some() {
            page.next.push(("key-marker".to_owned(), text("NextKeyMarker")?));
            match top.text_of("NextVersionIdMarker") {
                "" => {}
                marker => page.next.push(("version-id-marker".to_owned(), marker.to_owned())),
            }
        } else {
            return Err(Error::new(Kind::Corrupt, "a listing is cut off and does not say where it goes on"));
        }
        Ok(page)
    }
}

fn key(text: &str, encoded: bool) -> Result<Vec<u8>> {
    if !encoded {
        return Ok(text.as_bytes().to_vec());
    }
    sign::decode(text).ok_or_else(|| Error::new(Kind::Corrupt, format!("`{text}` is no encoded key")))
}

fn entry(element: &Element, encoded: bool) -> Result<Entry> {
    let wrong = |what: &str, value: &str| Error::new(Kind::Corrupt, format!("a listing shows the {what} `{value}`"));
    let is_marker = element.name == "DeleteMarker";
    let time = element.text_of("LastModified");
    let modified: jiff::Timestamp = time.parse().map_err(|_| wrong("time", time))?;
    let size = element.text_of("Size");
    let some = |name: &str| Some(element.text_of(name)).filter(|text| !text.is_empty()).map(str::to_owned);
    Ok(Entry {
        key: key(element.text_of("Key"), encoded)?,
        version: some("VersionId"),
        is_marker,
        is_latest: element.text_of("IsLatest") == "true",
        modified: (modified.as_second(), modified.subsec_nanosecond().unsigned_abs()),
        etag: some("ETag"),
        size: if is_marker { 0 } else { size.parse().map_err(|_| wrong("size", size))? },
        class: some("StorageClass").filter(|class| class != "STANDARD"),
    })
}

/// Whether a bucket keeps versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Versioning {
    /// Every write makes a version, and a deletion a marker.
    Enabled,
    /// Old versions stay; new writes replace each other under the version `null`.
    Suspended,
    /// It never kept any.
    Never,
}

impl Versioning {
    /// Parses `VersioningConfiguration`.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match Element::parse(text)?.text_of("Status") {
            "Enabled" => Self::Enabled,
            "Suspended" => Self::Suspended,
            _ => Self::Never,
        })
    }
}

/// Of a page of uploads that are under way: when the oldest was begun, and how the next page is asked for, if there
/// is one.
pub(in super::super) fn uploads(text: &str) -> Result<(Option<jiff::Timestamp>, Vec<(String, String)>)> {
    let top = Element::parse(text)?;
    let wrong = || Error::new(Kind::Corrupt, "a listing of uploads shows no time");
    let begun: Result<Vec<jiff::Timestamp>> =
        top.all("Upload").map(|upload| upload.text_of("Initiated").parse().map_err(|_| wrong())).collect();
    let mut next = Vec::new();
    if top.text_of("IsTruncated") == "true" {
        let encoded = top.text_of("EncodingType") == "url";
        let marker = key(top.text_of("NextKeyMarker"), encoded)?;
        let marker = String::from_utf8(marker).map_err(|_| Error::new(Kind::Corrupt, "a listing's end is no text"))?;
        next.push(("key-marker".to_owned(), marker));
        next.push(("upload-id-marker".to_owned(), top.text_of("NextUploadIdMarker").to_owned()));
    }
    Ok((begun?.into_iter().min(), next))
}

/// The shortest time after which a lifecycle rule removes versions that are no longer the newest, in
/// days, of the rules that are enabled.
pub(in super::super) fn noncurrent_days(lifecycle: &str) -> Result<Option<u64>> {
    let rules = Element::parse(lifecycle)?;
    let enabled = rules.all("Rule").filter(|rule| rule.text_of("Status") == "Enabled");
    let days = enabled.filter_map(|rule| {
        let expiry = rule.child("NoncurrentVersionExpiration")?;
        expiry.text_of("NoncurrentDays").parse().ok()
    });
    Ok(days.min())
}

/// Tags as the header `x-amz-tagging` takes them: `a=b&c=d`.
pub(in super::super) fn tags(tagging: &str) -> Result<String> {
    let top = Element::parse(tagging)?;
    let tags = top.child("TagSet").map(|set| set.all("Tag").collect::<Vec<_>>()).unwrap_or_default();
    let mut pairs: Vec<_> = tags
        .into_iter()
        .map(|tag| (tag.text_of("Key"), tag.text_of("Value")))
        .map(|(key, value)| {
            format!("{}={}", sign::encode(key.as_bytes(), false), sign::encode(value.as_bytes(), false))
        })
        .collect();
    pairs.sort();
    Ok(pairs.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_versions_is_read_in_its_order() {
        let text = "<?xml version=\"1.0\"?><ListVersionsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
            <EncodingType>url</EncodingType><IsTruncated>true</IsTruncated><NextKeyMarker>a%2Fb+c</NextKeyMarker>\
            <NextVersionIdMarker>v1</NextVersionIdMarker>\
            <DeleteMarker><Key>a%0A</Key><VersionId>v3</VersionId><LastModified>2026-01-02T03:04:05.678Z</LastModified></DeleteMarker>\
            <Version><Key>a%0A</Key><VersionId>v2</VersionId><LastModified>2026-01-02T03:04:05.000Z</LastModified>\
            <ETag>&quot;e&#34;</ETag><Size>7</Size><StorageClass>GLACIER</StorageClass><Owner/></Version></ListVersionsResult>";
        let page = Page::parse(text).unwrap();
        assert_eq!(page.entries.len(), 2);
        assert!(page.entries[0].is_marker && !page.entries[1].is_marker);
        assert_eq!(page.entries[0].modified.1, 678_000_000);
        assert_eq!((page.entries[1].key.as_slice(), page.entries[1].etag.as_deref()), (&b"a\n"[..], Some("\"e\"")));
        assert_eq!(page.entries[1].class.as_deref(), Some("GLACIER"));
        let next = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(page.next, [next("key-marker", "a/b c"), next("version-id-marker", "v1")]);
    }

    #[test]
    fn what_is_no_answer_is_an_error_and_never_an_empty_page() {
        for bad in
            ["", "hello", "<a>", "<a><b></a>", "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"]
        {
            assert!(Page::parse(bad).is_err(), "{bad}");
        }
        let entry = "<L><Contents><Key>a</Key><LastModified>yesterday</LastModified><Size>1</Size></Contents></L>";
        assert!(Page::parse(entry).is_err());
        assert!(Page::parse(&"<a>".repeat(100)).is_err());
        assert_eq!(Refusal::parse("<html>"), Refusal::default());
    }

    proptest::proptest! {
        #[test]
        fn no_answer_makes_a_panic(
            pieces in proptest::collection::vec(
                proptest::sample::select(vec![
                    "<", ">", "</", "/>", "&", ";", "&#x0;", "&amp;", "<![CDATA[", "]]>", "<!--", "<?", "Key", "Contents", "<Size>", "-1",
                    "<LastModified>", "9999-99-99T00:00:00Z", "<ListBucketResult>", "</ListBucketResult>", "%", "%zz", "\u{0}", "é",
                ]),
                0..30,
            )
        ) {
            let text = pieces.concat();
            drop((Page::parse(&text), Refusal::parse(&text), tags(&text), noncurrent_days(&text), Versioning::parse(&text)));
        }
    }

    #[test]
    fn the_oldest_upload_of_a_page_is_told_and_the_next_page() {
        let upload = |time: &str| format!("<Upload><Key>a</Key><Initiated>{time}</Initiated></Upload>");
        let text = format!(
            "<R><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated><NextKeyMarker>a+b</NextKeyMarker>\
             <NextUploadIdMarker>u</NextUploadIdMarker>{}{}</R>",
            upload("2026-01-02T03:04:05.000Z"),
            upload("2026-01-02T03:03:05.000Z")
        );
        let (oldest, next) = uploads(&text).unwrap();
        assert_eq!(oldest, Some("2026-01-02T03:03:05Z".parse().unwrap()));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(next, [pair("key-marker", "a b"), pair("upload-id-marker", "u")]);
        assert_eq!(uploads("<R><IsTruncated>false</IsTruncated></R>").unwrap(), (None, Vec::new()));
        assert!(uploads(&format!("<R>{}</R>", upload("yesterday"))).is_err());
    }

    #[test]
    fn tags_versioning_and_lifecycle_are_read() {
        let text = "<Tagging><TagSet><Tag><Key>b c</Key><Value/></Tag><Tag><Key>a</Key><Value>1&amp;2</Value></Tag></TagSet></Tagging>";
        assert_eq!(tags(text).unwrap(), "a=1%262&b%20c=");
        let status = |text: &str| Versioning::parse(text).unwrap();
        assert_eq!(status("<V><Status>Enabled</Status></V>"), Versioning::Enabled);
        assert_eq!(status("<V/>"), Versioning::Never);
        let rule = |days: u32, status: &str| {
            format!(
                "<Rule><Status>{status}</Status><NoncurrentVersionExpiration><NoncurrentDays>{days}</NoncurrentDays>\
                 </NoncurrentVersionExpiration></Rule>"
            )
        };
        let text = format!("<L>{}{}{}</L>", rule(30, "Enabled"), rule(7, "Enabled"), rule(1, "Disabled"));
        assert_eq!(noncurrent_days(&text).unwrap(), Some(7));
    }
}
