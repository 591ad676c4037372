//! Signature Version 4 and the encoding of keys in addresses. Pure.
//!
//! Own code, because the signer of the `object_store` crate takes the address apart and puts it
//! together again, which changes keys that hold `//` or percent signs. The rules:
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html>.

use std::fmt::Write;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// Who signs.
pub(super) struct Signer<'a> {
    pub key_id: &'a str,
    pub secret: &'a str,
    pub region: &'a str,
}

/// What is signed. `headers` are in lower case, without `authorization`; they are sorted here.
pub(super) struct Signed<'a> {
    pub method: &'a str,
    /// Encoded by [`encode`], from the first slash on.
    pub path: &'a str,
    /// Names and values, not encoded yet.
    pub query: &'a [(String, String)],
    pub headers: &'a [(String, Vec<u8>)],
    /// SHA-256 of the body, in hex.
    pub payload: &'a str,
    /// `20261121T100000Z`.
    pub time: &'a str,
}

impl Signer<'_> {
    /// The value of the header `authorization`.
    pub fn authorization(&self, signed: &Signed<'_>) -> String {
        let day = &signed.time[..signed.time.len().min(8)];
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let mut headers: Vec<_> = signed.headers.iter().collect();
        headers.sort();
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(";");
        let mut canonical = format!("{}\n{}\n{}\n", signed.method, signed.path, query_text(signed.query)).into_bytes();
        for (name, value) in headers {
            canonical.extend_from_slice(name.as_bytes());
            canonical.push(b':');
            canonical.extend_from_slice(&folded(value));
            canonical.push(b'\n');
        }
        canonical.extend_from_slice(format!("\n{names}\n{}", signed.payload).as_bytes());
        let text = format!("{ALGORITHM}\n{}\n{scope}\n{}", signed.time, hex::encode(Sha256::digest(&canonical)));
        let mut key = hmac(format!("AWS4{}", self.secret).as_bytes(), day.as_bytes());
        for part in [self.region, "s3", "aws4_request"] {
            key = hmac(&key, part.as_bytes());
        }
        let signature = hex::encode(hmac(&key, text.as_bytes()));
        format!("{ALGORITHM} Credential={}/{scope}, SignedHeaders={names}, Signature={signature}", self.key_id)
    }
}

/// A header's value as it is signed: without space around it, and with single spaces inside. It is sent as it is.
fn folded(value: &[u8]) -> Vec<u8> {
    let words: Vec<_> = value.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
    words.join(&b' ')
}

fn hmac(key: &[u8], bytes: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(bytes);
    mac.finalize().into_bytes().into()
}

/// The query as it is signed and sent: sorted and encoded.
pub(super) fn query_text(query: &[(String, String)]) -> String {
    let mut pairs: Vec<_> =
        query.iter().map(|(name, value)| (encode(name.as_bytes(), false), encode(value.as_bytes(), false))).collect();
    pairs.sort();
    let pairs: Vec<_> = pairs.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    pairs.join("&")
}

/// Encodes all but letters, digits and `-_.~`; slashes stay in paths.
pub(super) fn encode(bytes: &[u8], is_path: bool) -> String {
    let mut text = String::with_capacity(bytes.len() + 8);
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (is_path && byte == b'/') {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("a string takes all");
        }
    }
    text
}

/// Undoes [`encode`], and the form's `+` that some clones write for a space.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let mut rest = text.bytes();
    let mut bytes = Vec::with_capacity(text.len());
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => bytes.extend(hex::decode([rest.next()?, rest.next()?]).ok()?),
            b'+' => bytes.push(b' '),
            other => bytes.push(other),
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example "GET Object" of the page named above.
    #[test]
    fn the_signature_is_that_of_the_manual() {
        let signer = Signer {
            key_id: "AKIAIOSFODNN7EXAMPLE",
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            region: "us-east-1",
        };
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let header = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
        let headers = [
            header("host", "examplebucket.s3.amazonaws.com"),
            header("range", "bytes=0-9"),
            header("x-amz-content-sha256", empty),
            header("x-amz-date", "20130524T000000Z"),
        ];
        let signed = Signed {
            method: "GET",
            path: "/test.txt",
            query: &[],
            headers: &headers,
            payload: empty,
            time: "20130524T000000Z",
        };
        let expected = "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41";
        assert!(signer.authorization(&signed).ends_with(expected));
    }

    #[test]
    fn runs_of_space_in_a_header_are_signed_as_one() {
        assert_eq!(folded(b"  attachment; filename=\"a   b\t c\" "), b"attachment; filename=\"a b c\"");
        assert_eq!(folded(b""), b"");
    }

    #[test]
    fn every_byte_is_encoded_and_comes_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all, false)).unwrap(), all);
        assert_eq!(encode("a//b c+é/..".as_bytes(), true), "a//b%20c%2B%C3%A9/..");
        assert_eq!(query_text(&[("b".into(), "1/2".into()), ("a".into(), String::new())]), "a=&b=1%2F2");
        assert_eq!(decode("a+b%2B").unwrap(), b"a b+");
        assert!(decode("%4").is_none());
    }
}
