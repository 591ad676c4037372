//! What S3 keeps of an object beside its bytes, as the extended attributes of a point, and back. Pure.

use reqwest::header::HeaderMap;
use stillpoint_core::error::{Error, Kind, Result};

use super::request::below;
use crate::objects::client::Attributes;
use crate::objects::wire;

/// Facts and the headers that carry them, both ways.
const HEADERS: [(&str, &str); 7] = [
    ("content-type", "content-type"),
    ("content-encoding", "content-encoding"),
    ("content-language", "content-language"),
    ("content-disposition", "content-disposition"),
    ("cache-control", "cache-control"),
    ("expires", "expires"),
    ("website-redirect", "x-amz-website-redirect-location"),
];
/// Facts that are known and not sent with the object: set last, or by the bucket, or the result of it.
const OTHER: [(&str, &str); 5] = [
    ("storage-class", "x-amz-storage-class"),
    ("lock-mode", "x-amz-object-lock-mode"),
    ("lock-until", "x-amz-object-lock-retain-until-date"),
    ("legal-hold", "x-amz-object-lock-legal-hold"),
    ("encryption", "x-amz-server-side-encryption"),
];
const META: &str = "x-amz-meta-";
const CHECKSUM: &str = "x-amz-checksum-";

/// What an answer's headers say of the object.
pub(super) fn of_headers(headers: &HeaderMap) -> Attributes {
    let mut found = Vec::new();
    for (fact, header) in HEADERS.iter().chain(&OTHER) {
        if let Some(value) = headers.get(*header).map(|value| value.as_bytes()) {
            // How the bytes were once sent is no property of the object.
            let value =
                value.strip_prefix(b"aws-chunked").map_or(value, |rest| rest.strip_prefix(b",").unwrap_or(rest));
            if !value.is_empty() {
                found.push((wire::attribute_name(fact), value.trim_ascii().to_vec()));
            }
        }
    }
    for (name, value) in below(headers, META) {
        found.push((wire::attribute_name(&format!("meta.{name}")), value));
    }
    for (name, value) in below(headers, CHECKSUM) {
        found.push((wire::attribute_name(&format!("checksum.{name}")), value));
    }
    found
}

/// The value of a fact among attributes.
pub(in super::super) fn fact<'a>(attributes: &'a [(Vec<u8>, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
    let wanted = wire::attribute_name(name);
    attributes.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.as_slice())
}

/// The headers that give a new object what the attributes say.
pub(super) fn to_headers(attributes: &[(Vec<u8>, Vec<u8>)], with_class: bool) -> Vec<(String, Vec<u8>)> {
    let mut headers = Vec::new();
    for (name, value) in attributes {
        let Some(fact) = wire::attribute_fact(name) else { continue };
        if let Some(name) = fact.strip_prefix("meta.") {
            headers.push((format!("{META}{name}"), value.clone()));
        } else if let Some((_, header)) = HEADERS.iter().find(|(known, _)| *known == fact) {
            headers.push(((*header).to_owned(), value.clone()));
        } else if fact == "tags" {
            headers.push(("x-amz-tagging".to_owned(), value.clone()));
        } else if fact == "storage-class" && with_class {
            headers.push(("x-amz-storage-class".to_owned(), value.clone()));
        } else if let Some(algorithm) = fact.strip_prefix("checksum.").filter(|name| is_algorithm(name)) {
            // The service computes it again and refuses bytes that do not fit.
            let whole = fact_is(attributes, "checksum.type", b"FULL_OBJECT") || !value.contains(&b'-');
            if whole && super::facts::fact(attributes, "parts").is_none() {
                headers.push((format!("{CHECKSUM}{algorithm}"), value.clone()));
            }
        }
    }
    headers
}

fn is_algorithm(name: &str) -> bool {
    ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"].contains(&name)
}

fn fact_is(attributes: &[(Vec<u8>, Vec<u8>)], name: &str, wanted: &[u8]) -> bool {
    fact(attributes, name) == Some(wanted)
}

/// Facts by which two objects are compared: what users set, and nothing that services add.
pub(super) fn compared(attributes: &[(Vec<u8>, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    let mut facts: Vec<_> = attributes
        .iter()
        .filter_map(|(name, value)| Some((wire::attribute_fact(name)?.to_owned(), value.clone())))
        .filter(|(fact, _)| {
            fact.starts_with("meta.") || fact == "tags" || HEADERS.iter().any(|(known, _)| known == fact)
        })
        .collect();
    facts.sort();
    facts
}

/// Sizes of parts as a point has them: `8388608x3,123`.
pub(super) fn write_parts(sizes: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &size in sizes {
        match runs.last_mut() {
            Some((last, count)) if *last == size => *count += 1,
            _ => runs.push((size, 1)),
        }
    }
    let runs = runs.iter().map(|(size, count)| if *count == 1 { size.to_string() } else { format!("{size}x{count}") });
    runs.collect::<Vec<_>>().join(",")
}

/// Undoes [`write_parts`]; the sizes must add up to the object's.
pub(super) fn read_parts(text: &[u8], size: u64) -> Result<Vec<u64>> {
    let wrong = || Error::new(Kind::Corrupt, "the sizes of an object's parts are not readable");
    let text = std::str::from_utf8(text).map_err(|_| wrong())?;
    let mut sizes = Vec::new();
    for run in text.split(',') {
        let (size, count) = run.split_once('x').unwrap_or((run, "1"));
        let (size, count): (u64, usize) = (size.parse().map_err(|_| wrong())?, count.parse().map_err(|_| wrong())?);
        if sizes.len() + count > 10_000 {
            return Err(wrong());
        }
        sizes.extend(std::iter::repeat_n(size, count));
    }
    let sum = sizes.iter().try_fold(0u64, |sum, part| sum.checked_add(*part));
    if sum == Some(size) { Ok(sizes) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_headers_say_is_said_again() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("content-type", "text/plain"),
            ("content-encoding", "aws-chunked,gzip"),
            ("x-amz-meta-team", "ml"),
            ("x-amz-storage-class", "STANDARD_IA"),
            ("x-amz-checksum-sha256", "abc="),
            ("x-amz-request-id", "no fact"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let mut attributes = of_headers(&headers);
        attributes.push((wire::attribute_name("tags"), b"a=b".to_vec()));
        let mut sent = to_headers(&attributes, false);
        sent.sort();
        let header = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
        assert_eq!(
            sent,
            [
                header("content-encoding", "gzip"),
                header("content-type", "text/plain"),
                header("x-amz-checksum-sha256", "abc="),
                header("x-amz-meta-team", "ml"),
                header("x-amz-tagging", "a=b"),
            ]
        );
        assert_eq!(compared(&attributes).len(), 4);
    }

    #[test]
    fn sizes_of_parts_come_back_and_damage_is_refused() {
        for sizes in [&[5][..], &[8, 8, 8, 3], &[8, 3, 8], &[0]] {
            let text = write_parts(sizes);
            assert_eq!(read_parts(text.as_bytes(), sizes.iter().sum()).unwrap(), sizes, "{text}");
        }
        assert_eq!(write_parts(&[8, 8, 8, 3]), "8x3,3");
        for bad in ["", "x", "8x", "8x99999999", "8x3,4", "18446744073709551615x2"] {
            assert!(read_parts(bad.as_bytes(), 24).is_err(), "{bad}");
        }
    }
}
