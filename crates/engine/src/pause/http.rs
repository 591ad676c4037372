//! Pause steps that call an HTTP endpoint of the platform.
//!
//! Redirects are not followed and proxies are not used: a login page that answers 200 must not look
//! like a pause.

use std::collections::BTreeMap;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::{HttpCall, Secret};

use super::{Act, resolved, shown, without_credentials};

pub(super) fn client() -> Result<reqwest::Client> {
    // Another part of the program may have installed it already, which is as good.
    if rustls::crypto::CryptoProvider::get_default().is_none()
        && rustls::crypto::ring::default_provider().install_default().is_err()
    {
        tracing::debug!("the TLS provider was installed at the same moment by someone else");
    }
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .user_agent(concat!("stillpoint/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| Error::new(Kind::Config, "the HTTP client cannot be set up").source(error))
}

/// Parts of names of headers and query parameters that hold secrets.
const SECRET_PARTS: [&str; 7] = ["token", "secret", "password", "key", "auth", "cookie", "credential"];

/// Whether a header or query parameter of this name holds a secret, which is then never written in
/// plain text.
pub(crate) fn names_a_secret(name: &str) -> bool {
    let lower = name.to_lowercase();
    SECRET_PARTS.iter().any(|part| lower.contains(part))
}

/// The address with the secret references of its query resolved; byte for byte as written without any.
fn with_secrets(mut url: url::Url, written: &str, secrets: &dyn Fn(&Secret) -> Result<String>) -> Result<String> {
    let is_secret = |name: &str, value: &str| names_a_secret(name) && crate::secrets::is_reference(value);
    if !url.query_pairs().any(|(name, value)| is_secret(&name, &value)) {
        return Ok(written.to_owned());
    }
    let mut pairs = Vec::new();
    for (name, value) in url.query_pairs() {
        let value = if is_secret(&name, &value) {
            resolved(&value, secrets).map_err(|error| error.context("parameter", &name))?
        } else {
            value.into_owned()
        };
        pairs.push((name.into_owned(), value));
    }
    url.query_pairs_mut().clear().extend_pairs(pairs);
    Ok(url.into())
}

pub(super) fn resolve(call: &HttpCall, secrets: &dyn Fn(&Secret) -> Result<String>) -> Result<Act> {
    let shown = without_credentials(&call.url);
    let url = url::Url::parse(&call.url)
        .map_err(|error| Error::new(Kind::Config, "the hook's URL cannot be read").source(error))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Error::new(Kind::Config, format!("the hook `{shown}` is neither http nor https")));
    }
    Method::from_bytes(call.method.as_bytes())
        .map_err(|_| Error::new(Kind::Config, format!("`{}` is no HTTP method", call.method)))?;
    let mut headers = BTreeMap::new();
    for (name, value) in &call.headers {
        let value = resolved(value, secrets).map_err(|error| error.context("header", name))?;
        header(name, &value)?;
        headers.insert(name.clone(), value);
    }
    Ok(Act::Http {
        url: with_secrets(url, &call.url, secrets)?,
        method: call.method.clone(),
        headers,
        body: call.body.clone(),
        expect: call.expect.clone(),
    })
}

fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue)> {
    let wrong = || Error::new(Kind::Config, format!("the header `{name}` cannot be sent as it is"));
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
    value.set_sensitive(true);
    Ok((name, value))
}

pub(super) async fn call(
    client: &reqwest::Client,
    url: &str,
    method: &str,
    headers: &BTreeMap<String, String>,
    body: Option<&str>,
    expect: &[u16],
) -> Result<()> {
    let name = format!("{method} {}", without_credentials(url));
    let method = Method::from_bytes(method.as_bytes())
        .map_err(|_| Error::new(Kind::Config, format!("`{method}` is no HTTP method")))?;
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let (name, value) = header(name, value)?;
        map.append(name, value);
    }
    let mut request = client.request(method, url).headers(map);
    if let Some(body) = body {
        request = request.body(body.to_owned());
    }
    let mut response = request.send().await.map_err(|error| failed(&name, error))?;
    let status = response.status();
    let fine = if expect.is_empty() { status.is_success() } else { expect.contains(&status.as_u16()) };
    let mut answer = Vec::new();
    // Read to learn what it says; a hook is done when its answer is, not when its head is.
    while let Some(chunk) = response.chunk().await.map_err(|error| failed(&name, error))? {
        let room = super::SHOWN_BYTES_MAX.saturating_sub(answer.len());
        answer.extend_from_slice(&chunk[..chunk.len().min(room)]);
    }
    if fine { Ok(()) } else { Err(refused(&name, status, &answer)) }
}

fn failed(name: &str, error: reqwest::Error) -> Error {
    let (kind, what) = if error.is_connect() {
        (Kind::Unreachable, "cannot be reached")
    } else if error.is_timeout() {
        (Kind::TimedOut, "does not answer in time")
    } else if error.is_builder() {
        (Kind::Config, "cannot be called as it is written")
    } else {
        (Kind::Unreachable, "broke off")
    };
    let failure = Error::new(kind, format!("the hook {name} {what}")).source(error.without_url());
    if kind == Kind::Config { failure } else { failure.temporary() }
}

fn refused(name: &str, status: StatusCode, answer: &[u8]) -> Error {
    let kind = match status.as_u16() {
        401 => Kind::Unauthenticated,
        403 => Kind::PermissionDenied,
        404 | 410 => Kind::NotFound,
        409 | 423 => Kind::Locked,
        429 => Kind::RateLimited,
        408 | 504 => Kind::TimedOut,
        500..=599 => Kind::Unreachable,
        _ => Kind::Config,
    };
    let mut error = Error::new(kind, format!("the hook {name} answered {status}"));
    let answer = shown(answer);
    if !answer.is_empty() {
        error = error.context("saying", format!("\"{answer}\""));
    }
    let temporary = matches!(kind, Kind::RateLimited | Kind::TimedOut | Kind::Unreachable | Kind::Locked);
    if temporary { error.temporary() } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_in_the_query_is_resolved_and_never_shown() {
        let written = "http://127.0.0.1:1/pause?why=file:/x&token=env:HOOK";
        let call = HttpCall {
            url: written.to_owned(),
            method: "POST".to_owned(),
            headers: BTreeMap::new(),
            body: None,
            expect: Vec::new(),
        };
        let act = resolve(&call, &|secret| Ok(format!("value & of {}", secret.0))).expect("right");
        let Act::Http { url, .. } = &act else { panic!("{act}") };
        assert_eq!(url, "http://127.0.0.1:1/pause?why=file%3A%2Fx&token=value+%26+of+env%3AHOOK");
        assert_eq!(act.to_string(), "POST http://127.0.0.1:1/pause");
        let plain = HttpCall { url: "http://x/a?b=c%20d".to_owned(), ..call };
        let Act::Http { url, .. } = resolve(&plain, &|_| Ok(String::new())).expect("right") else { panic!() };
        assert_eq!(url, "http://x/a?b=c%20d");
    }
}
