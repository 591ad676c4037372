//! From an address and options to a client of the right service. Nothing is asked of the service.
//!
//! What can be told to be wrong without asking is refused here: a bucket name that no service
//! takes, an unknown option, a plain-text endpoint that was not allowed, absent credentials.

use std::collections::BTreeMap;
use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};
use stillpoint_core::address;
use stillpoint_core::error::{Error, Kind, Result};

use super::bridge;
use super::classify::classify;

/// Which protocol a bucket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    /// Amazon S3 and its clones.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
}

/// A bucket's address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) service: Service,
    pub(super) bucket: String,
    /// Without slashes at its ends; may be empty.
    pub(super) prefix: String,
}

/// A connected client; `s3` besides, where requests are needed that the common trait lacks.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) s3: Option<Arc<AmazonS3>>,
    /// Whether the service is one whose conditional writes are documented by its maker.
    pub(super) well_known: bool,
    /// Where the service is, if that was said, as addresses have it.
    pub(super) service: Option<String>,
}

/// Takes `s3://bucket/prefix` apart; `None` if the scheme is not one of ours.
pub(super) fn parse(url: &str) -> Option<Result<Address>> {
    let (scheme, rest) = url.split_once("://")?;
    let service = match scheme {
        "s3" => Service::S3,
        "gs" => Service::Google,
        "az" | "azure" => Service::Azure,
        _ => return None,
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/').to_owned();
    let address = Address { service, bucket: bucket.to_owned(), prefix };
    Some(check(&address).map(|()| address))
}

fn check(address: &Address) -> Result<()> {
    let refuse = |rule: &str| {
        Err(Error::new(Kind::Config, format!("`{}` is not a valid bucket name: {rule}", address.bucket))
            .hint("the address is written s3://bucket/prefix"))
    };
    let longest = if address.service == Service::Google { 222 } else { 63 };
    if !(3..=longest).contains(&address.bucket.len()) {
        return refuse(&format!("3 to {longest} characters"));
    }
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_');
    if !address.bucket.bytes().all(allowed) {
        return refuse("lower-case letters, digits, `-` and `.`");
    }
    if !address.prefix.is_empty() {
        super::super::check_name(&address.prefix)?;
    }
    Ok(())
}

/// Makes the client. Environment variables of the service count only when no credential is given,
/// so that a stray one is never mixed with a configured one.
pub(super) fn connect(
    address: &Address,
    options: &BTreeMap<String, String>,
    credentials: &BTreeMap<String, String>,
) -> Result<Client> {
    check_endpoint(address, options, credentials)?;
    bridge::choose_cryptography();
    let from_environment = credentials.is_empty();
    let all = || options.iter().chain(credentials);
    let failed = |error| classify(format!("cannot use the options of bucket `{}`", address.bucket), error);
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    // The deadline of each request depends on its size and is ours.
    let timeout = (ClientConfigKey::Timeout, "1 day");
    match address.service {
        Service::S3 => {
            let mut builder = if from_environment { AmazonS3Builder::from_env() } else { AmazonS3Builder::new() };
            builder = builder.with_bucket_name(&address.bucket).with_retry(retry);
            builder = builder.with_config(AmazonS3ConfigKey::Client(timeout.0), timeout.1);
            builder = builder.with_config(AmazonS3ConfigKey::DisableBulkDelete, "true");
            if options.get("endpoint").is_none_or(|endpoint| endpoint.starts_with("https://")) {
                // TLS protects what is sent; hashing it once more would only cost time.
                builder = builder.with_unsigned_payload(true);
            }
            for (key, value) in all() {
                builder = builder.with_config(key.parse().map_err(|_| unknown(key))?, value);
            }
            let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
            let (well_known, service) = (endpoint.is_none(), endpoint.and_then(|endpoint| address::service(&endpoint)));
            let s3 = Arc::new(builder.build().map_err(failed)?);
            Ok(Client { store: s3.clone(), s3: Some(s3), well_known, service })
        }
        Service::Google => {
            let fresh = GoogleCloudStorageBuilder::new;
            let mut builder = if from_environment { GoogleCloudStorageBuilder::from_env() } else { fresh() };
            builder = builder.with_bucket_name(&address.bucket).with_retry(retry);
            builder = builder.with_config(GoogleConfigKey::Client(timeout.0), timeout.1);
            for (key, value) in all() {
                builder = builder.with_config(key.parse().map_err(|_| unknown(key))?, value);
            }
            let service = builder.get_config_value(&GoogleConfigKey::BaseUrl).and_then(|url| address::service(&url));
            Ok(Client { store: Arc::new(builder.build().map_err(failed)?), s3: None, well_known: true, service })
        }
        Service::Azure => {
            let fresh = MicrosoftAzureBuilder::new;
            let mut builder = if from_environment { MicrosoftAzureBuilder::from_env() } else { fresh() };
            builder = builder.with_container_name(&address.bucket).with_retry(retry);
            builder = builder.with_config(AzureConfigKey::Client(timeout.0), timeout.1);
            for (key, value) in all() {
                builder = builder.with_config(key.parse().map_err(|_| unknown(key))?, value);
            }
            let service = builder.get_config_value(&AzureConfigKey::Endpoint).and_then(|url| address::service(&url));
            Ok(Client { store: Arc::new(builder.build().map_err(failed)?), s3: None, well_known: true, service })
        }
    }
}

fn unknown(key: &str) -> Error {
    Error::new(Kind::Config, format!("bucket option `{key}` is not known"))
        .hint("options have the names of the object_store crate, e.g. endpoint, region, allow_http")
}

fn check_endpoint(
    address: &Address,
    options: &BTreeMap<String, String>,
    credentials: &BTreeMap<String, String>,
) -> Result<()> {
    let Some(endpoint) = options.get("endpoint") else { return Ok(()) };
    let plain_allowed = options.get("allow_http").is_some_and(|value| value == "true");
    if endpoint.starts_with("http://") && !plain_allowed {
        return Err(Error::new(Kind::Config, format!("endpoint {endpoint} has no TLS"))
            .hint("set bucket.options.allow_http to \"true\" if that is meant"));
    }
    // Without this, a clone of S3 would be asked with credentials sought from a cloud's own
    // machine service, which takes long to fail and says something else.
    let named = |name: &str| credentials.contains_key(name) || options.contains_key(name);
    let ambient = ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
    let from_environment = credentials.is_empty() && ambient.iter().any(|name| std::env::var_os(name).is_some());
    if address.service == Service::S3 && !named("access_key_id") && !named("skip_signature") && !from_environment {
        return Err(Error::new(Kind::Unauthenticated, format!("there are no credentials for {endpoint}"))
            .hint("set bucket.credentials.access_key_id and secret_access_key, e.g. to env:NAME"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let address = parse("s3://dr-churn/prod/").and_then(Result::ok).expect("valid");
        assert_eq!(
            (address.service, address.bucket.as_str(), address.prefix.as_str()),
            (Service::S3, "dr-churn", "prod")
        );
        assert_eq!(parse("gs://abc").and_then(Result::ok).map(|a| a.prefix), Some(String::new()));
        assert!(parse("ftp://abc").is_none() && parse("/srv").is_none());
    }

    #[test]
    fn bucket_names_that_no_service_takes_fail_at_once() {
        for bad in ["s3://ab", "s3://Upper/x", "s3://", "s3://a b c", "az://x/../y", "s3://abc/x//y"] {
            let error = parse(bad).expect("known scheme").expect_err(bad);
            assert_eq!((error.kind(), error.is_temporary()), (Kind::Config, false), "{bad}");
        }
    }

    #[test]
    fn mistakes_in_options_are_named_without_asking_the_service() {
        let address = parse("s3://abc").and_then(Result::ok).expect("valid");
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let keys = map(&[("access_key_id", "a"), ("secret_access_key", "b")]);
        let error = connect(&address, &map(&[("endpoind", "x")]), &keys).expect_err("unknown");
        assert!(error.to_string().contains("endpoind"), "{error}");
        let error = connect(&address, &map(&[("endpoint", "http://127.0.0.1:1")]), &keys).expect_err("plain");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("allow_http")), "{error}");
    }
}
