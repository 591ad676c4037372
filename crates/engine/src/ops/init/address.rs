//! From the address of a server or bucket to the store that `platform.yaml` would have for it.
//!
//! Pure: nothing is connected to. A password in an address is left out of what is written; the
//! store asks for it in a variable instead. What an address says and a store could not be told by it is
//! refused: without it, another server or another way to it would be meant.

use stillpoint_core::Result;
use stillpoint_core::error::{Error, Kind};
use url::Url;

use super::look::{Found, label};

/// What a person may name instead of a path, for errors and help.
const FORMS: &str = "postgresql://USER@HOST/DATABASE, redis://HOST, s3://BUCKET/PREFIX, gs://…, az://…";

/// The store behind `text`; `None` if it is no address but a path.
///
/// # Errors
/// `Config` if it is an address of nothing that has a driver, or not a valid one.
pub fn store(text: &str) -> Result<Option<Found>> {
    let Some((scheme, _)) = text.split_once("://") else { return Ok(None) };
    let wrong = |why: String| Error::new(Kind::Config, why).hint(format!("name a path, or {FORMS}"));
    let url = Url::parse(text).map_err(|error| wrong(format!("`{scheme}://…` is not a valid address: {error}")))?;
    refuse_parameters(&url)?;
    let found = match scheme {
        "postgresql" | "postgres" => postgres(&url),
        "redis" | "rediss" => redis(&url),
        "s3" | "gs" | "az" => bucket(&url),
        _ => return Err(wrong(format!("there is no driver for `{scheme}://` addresses"))),
    };
    Ok(Some(found))
}

/// Refuses what stands behind a `?` or a `#`; only names are told, values may be secret.
fn refuse_parameters(url: &Url) -> Result<()> {
    let names: Vec<_> = url.query_pairs().map(|(name, _)| format!("`{name}`")).collect();
    let what = match (names.is_empty(), url.fragment()) {
        (false, _) => names.join(", "),
        (true, Some(_)) => "`#…`".to_owned(),
        (true, None) => return Ok(()),
    };
    let scheme = url.scheme();
    Err(Error::new(Kind::Config, format!("a `{scheme}://` address cannot say {what} here"))
        .hint("leave it out, and add it to the store's settings in `platform.yaml` afterwards"))
}

fn postgres(url: &Url) -> Found {
    let database = decoded(url.path().trim_start_matches('/'));
    let name = label(&database, "postgres");
    let mut settings = vec![("host".to_owned(), url.host_str().unwrap_or("127.0.0.1").to_owned())];
    settings.extend(url.port().filter(|port| *port != 5432).map(|port| ("port".to_owned(), port.to_string())));
    let user = if url.username().is_empty() { "postgres".to_owned() } else { decoded(url.username()) };
    settings.push(("user".to_owned(), user));
    settings.push(password(&name));
    if !database.is_empty() {
        settings.push(("databases".to_owned(), serde_json::json!([database]).to_string()));
    }
    found("postgres", name, url, settings)
}

fn redis(url: &Url) -> Found {
    let name = label("", "redis");
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let address = format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or("127.0.0.1"));
    let mut settings = vec![("url".to_owned(), address)];
    if !url.username().is_empty() {
        settings.push(("user".to_owned(), decoded(url.username())));
    }
    settings.extend(url.password().map(|_| password(&name)));
    found("redis", name, url, settings)
}

fn bucket(url: &Url) -> Found {
    let last = url.path().rsplit('/').find(|part| !part.is_empty());
    let name = label(last.or(url.host_str()).unwrap_or_default(), "objects");
    // Keys of access that stand before the bucket are left out.
    let address = format!("{}://{}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path());
    found("objects", name, url, vec![("url".to_owned(), address)])
}

fn password(store: &str) -> (String, String) {
    ("password".to_owned(), format!("env:{}_PASSWORD", store.to_uppercase().replace('-', "_")))
}

fn found(driver: &'static str, name: String, url: &Url, settings: Vec<(String, String)>) -> Found {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let at = format!("{}://{}{port}{}", url.scheme(), url.host_str().unwrap_or("127.0.0.1"), url.path());
    Found { name, driver, at, settings, because: "named by you".to_owned() }
}

/// Percent signs stand for bytes; what is no text then stays as it was written.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = (first == b'%').then(|| after.get(..2).and_then(|pair| hex::decode(pair).ok())).flatten();
        bytes.push(hex.as_ref().map_or(first, |byte| byte[0]));
        rest = if hex.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        let found = store(text).expect("valid").expect("an address");
        let settings: Vec<_> = found.settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} {} {} {}", found.name, found.driver, found.at, settings.join(" "))
    }

    #[test]
    fn addresses_become_stores_without_their_passwords() {
        assert_eq!(
            shown("postgresql://app%40x:hunter2@db.internal:6432/Model%20Meta"),
            "model-meta postgres postgresql://db.internal:6432/Model%20Meta host=db.internal port=6432 user=app@x \
             password=env:MODEL_META_PASSWORD databases=[\"Model Meta\"]"
        );
        assert_eq!(
            shown("rediss://:hunter2@cache:6380/0"),
            "redis redis rediss://cache:6380/0 url=rediss://cache:6380 password=env:REDIS_PASSWORD"
        );
        assert_eq!(
            shown("s3://ml-artifacts/prod/"),
            "prod objects s3://ml-artifacts/prod/ url=s3://ml-artifacts/prod/"
        );
        assert_eq!(shown("s3://AKIA1:hunter2@models/prod"), "prod objects s3://models/prod url=s3://models/prod");
        for text in ["postgres://h", "redis://:hunter2@h", "postgresql://u:hunter2@h/d", "gs://AKIA1:hunter2@b/p"] {
            assert!(!shown(text).contains("hunter2") && !shown(text).contains("AKIA1"));
        }
    }

    #[test]
    fn what_a_store_could_not_be_told_is_refused_by_name() {
        for (text, name) in [
            ("postgresql://u@h/d?sslmode=verify-full", "`sslmode`"),
            ("s3://b/p?endpoint=http%3A%2F%2Fh%3A9000", "`endpoint`"),
            ("redis://h?password=hunter2", "`password`"),
            ("rediss://h/0#insecure", "`#…`"),
        ] {
            let error = store(text).expect_err(text);
            assert!(error.message().contains(name) && !error.message().contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn paths_are_no_addresses_and_unknown_ones_say_what_there_is() {
        assert!(store("/srv/app.db").expect("a path").is_none());
        let error = store("mongodb://h").expect_err("no driver");
        assert!(error.message().contains("mongodb") && error.hint_text().unwrap_or_default().contains("redis://"));
    }
}
