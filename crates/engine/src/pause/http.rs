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
        url: call.url.clone(),
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
