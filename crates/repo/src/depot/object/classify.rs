//! What an answer of an object service means: which kind of error, and whether to try again.
//!
//! The status code tells most; the code in the body tells the rest (a wrong key and a missing
//! privilege both are 403). Whatever nothing but a person can change is permanent, so that a
//! mistyped bucket fails at once and not after minutes of retries.
//!
//! `object_store` keeps the answer's type to itself, so status and body are read from its text; a
//! test against a server that answers with each status holds that text in place.

use std::error::Error as StdError;

use object_store::Error as ObjectError;
use object_store::client::{HttpError, HttpErrorKind};
use stillpoint_core::error::{Error, Kind};

/// Classifies; `what` says what was attempted: "cannot read `a/b`".
pub(super) fn classify(what: impl Into<String>, error: ObjectError) -> Error {
    let verdict = judge(&error);
    let mut result = Error::new(verdict.kind, what);
    if verdict.temporary {
        result = result.temporary();
    }
    if let Some(code) = verdict.code {
        result = result.context("code", code);
    }
    if let Some(hint) = verdict.hint {
        result = result.hint(hint);
    }
    result.source(error)
}

/// Whether a range begins at or behind the object's end. Some services say so by a status; for
/// others, which answer with the whole object, `object_store` finds out.
pub(super) fn begins_beyond_the_end(error: &ObjectError) -> bool {
    let text = chain_text(error);
    status_in(&text) == Some(416) || text.contains("Wanted range starting at")
}

/// Finds the status in "Server returned non-2xx status code: 503 Service Unavailable: <body>".
fn status_in(text: &str) -> Option<u16> {
    const MARK: &str = "status code: ";
    let digits = text.get(text.find(MARK)? + MARK.len()..)?.get(..3)?;
    digits.parse().ok()
}

#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    kind: Kind,
    temporary: bool,
    code: Option<String>,
    hint: Option<&'static str>,
}

impl Verdict {
    fn new(kind: Kind, temporary: bool, hint: Option<&'static str>) -> Self {
        Self { kind, temporary, code: None, hint }
    }

    fn permanent(kind: Kind) -> Self {
        Self::new(kind, false, None)
    }

    fn temporary(kind: Kind) -> Self {
        Self::new(kind, true, None)
    }
}

fn judge(error: &ObjectError) -> Verdict {
    let text = chain_text(error);
    let code = service_code(&text);
    let mut verdict = match code.as_deref().and_then(by_code) {
        Some(verdict) => verdict,
        None => by_variant(error, &text),
    };
    verdict.code = code;
    verdict
}

/// What services say in the body, in their own words.
fn by_code(code: &str) -> Option<Verdict> {
    let verdict = match code {
        "NoSuchBucket" | "ContainerNotFound" => Verdict::new(
            Kind::NotFound,
            false,
            Some("the bucket does not exist, or lies in another region; make it first"),
        ),
        "InvalidBucketName" | "InvalidResourceName" => {
            Verdict::new(Kind::Config, false, Some("correct the bucket's name"))
        }
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "AuthenticationFailed"
        | "InvalidToken"
        | "ExpiredToken"
        | "TokenRefreshRequired"
        | "InvalidAuthenticationInfo" => {
            Verdict::new(Kind::Unauthenticated, false, Some("check the bucket's credentials"))
        }
        "RequestTimeTooSkewed" => {
            Verdict::new(Kind::Unauthenticated, false, Some("this machine's clock is wrong; set it"))
        }
        "ConditionalRequestConflict" | "OperationAborted" => Verdict::temporary(Kind::Conflict),
        "RequestTimeout" | "OperationTimedOut" => Verdict::temporary(Kind::TimedOut),
        "SlowDown" | "ServerBusy" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded" => {
            Verdict::temporary(Kind::RateLimited)
        }
        "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" => {
            Verdict::new(Kind::Config, false, Some("the bucket lies in another region; set bucket.options.region"))
        }
        "QuotaExceeded" | "XMinioStorageFull" | "EntityTooLarge" => Verdict::permanent(Kind::Exhausted),
        "NotImplemented" => Verdict::permanent(Kind::Unsupported),
        "ObjectLocked" | "BlobImmutableDueToPolicy" => {
            Verdict::new(Kind::PermissionDenied, false, Some("the object is held against deletion"))
        }
        _ => return None,
    };
    Some(verdict)
}

fn by_variant(error: &ObjectError, text: &str) -> Verdict {
    match error {
        ObjectError::NotFound { .. } => Verdict::permanent(Kind::NotFound),
        ObjectError::AlreadyExists { .. } => Verdict::permanent(Kind::AlreadyExists),
        ObjectError::Precondition { .. } | ObjectError::NotModified { .. } => Verdict::permanent(Kind::Conflict),
        ObjectError::PermissionDenied { .. } => Verdict::new(
            Kind::PermissionDenied,
            false,
            Some("grant the credential list, read, write and delete on the bucket"),
        ),
        ObjectError::Unauthenticated { .. } => {
            Verdict::new(Kind::Unauthenticated, false, Some("check the bucket's credentials"))
        }
        ObjectError::NotSupported { .. } | ObjectError::NotImplemented { .. } => Verdict::permanent(Kind::Unsupported),
        ObjectError::InvalidPath { .. } | ObjectError::UnknownConfigurationKey { .. } => {
            Verdict::permanent(Kind::Config)
        }
        _ => match (status_in(text), find::<HttpError>(error)) {
            (Some(status), _) => by_status(status),
            (None, Some(failure)) => by_transport(failure, text),
            (None, None) if text.contains("redirect without LOCATION") => {
                Verdict::new(Kind::Config, false, Some("the bucket lies in another region; set bucket.options.region"))
            }
            (None, None) => Verdict::permanent(Kind::Io),
        },
    }
}

fn by_status(status: u16) -> Verdict {
    match status {
        401 => Verdict::permanent(Kind::Unauthenticated),
        403 => Verdict::permanent(Kind::PermissionDenied),
        404 | 410 => Verdict::permanent(Kind::NotFound),
        408 => Verdict::temporary(Kind::TimedOut),
        409 | 412 => Verdict::permanent(Kind::Conflict),
        416 => Verdict::permanent(Kind::Corrupt),
        429 | 503 => Verdict::temporary(Kind::RateLimited),
        501 | 505 => Verdict::permanent(Kind::Unsupported),
        507 => Verdict::permanent(Kind::Exhausted),
        500..=599 => Verdict::temporary(Kind::Unreachable),
        _ => Verdict::permanent(Kind::Config),
    }
}

fn by_transport(failure: &HttpError, text: &str) -> Verdict {
    // A certificate that is not trusted today is not trusted in a second either.
    if text.contains("certificate") {
        let hint = "the service's certificate is not trusted by this machine; install its authority";
        return Verdict::new(Kind::Unreachable, false, Some(hint));
    }
    if text.contains("URL scheme is not allowed") {
        return Verdict::new(
            Kind::Config,
            false,
            Some("set bucket.options.allow_http to \"true\" for a service without TLS"),
        );
    }
    match failure.kind() {
        HttpErrorKind::Timeout => Verdict::temporary(Kind::TimedOut),
        _ => Verdict::temporary(Kind::Unreachable),
    }
}

fn chain_text(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Finds the first cause of this type, the error itself included.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        current = error.source();
    }
    None
}

/// The text between `<Code>` and `</Code>` of an XML body.
fn service_code(body: &str) -> Option<String> {
    let begin = body.find("<Code>")? + "<Code>".len();
    let end = begin + body[begin..].find("</Code>")?;
    Some(body[begin..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_bucket_name_is_permanent_and_a_busy_service_is_not() {
        assert_eq!(by_code("InvalidBucketName").map(|v| (v.kind, v.temporary)), Some((Kind::Config, false)));
        assert_eq!(by_code("SlowDown").map(|v| (v.kind, v.temporary)), Some((Kind::RateLimited, true)));
        assert_eq!(by_code("SomethingNew"), None);
        assert_eq!(by_status(403).kind, Kind::PermissionDenied);
        assert!(by_status(503).temporary && by_status(500).temporary && !by_status(501).temporary);
    }

    #[test]
    fn the_code_is_found_in_the_body() {
        let body = "<?xml version=\"1.0\"?><Error><Code>NoSuchBucket</Code><Message>x</Message></Error>";
        assert_eq!(service_code(body).as_deref(), Some("NoSuchBucket"));
        assert_eq!(service_code("<Code>broken"), None);
        assert_eq!(service_code(""), None);
    }
}
