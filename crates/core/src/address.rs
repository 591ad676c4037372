//! Where a bucket is, as text whose parts tell what lies in what: service, bucket, prefix.
//!
//! A restore is refused when its target is a source, or lies in or around one; that is decided by
//! comparing addresses part by part. One place must therefore have one address, however its settings
//! are written and whoever writes it: the driver for objects, or the depot that holds the points.
//! Nothing is asked of a service or a resolver here.

use std::collections::BTreeMap;

use url::Url;

use crate::error::{Error, Kind, Result};

/// Names of the option that says where the service is, the stronger ones first.
const ENDPOINT_OPTIONS: [&str; 8] = [
    "aws_endpoint_url_s3",
    "aws_endpoint_url",
    "aws_endpoint",
    "endpoint_url",
    "endpoint",
    "azure_storage_endpoint",
    "azure_endpoint",
    "google_base_url",
];

/// The address of a bucket as its settings have it: `s3://minio:9000/bucket/prefix`, or without an
/// endpoint `s3://bucket/prefix`: Amazon's names of buckets are unique. `prefix` is the prefix below the
/// bucket. Fails with `Config` if `url` is none.
pub fn of_bucket(url: &str, options: &BTreeMap<String, String>, prefix: &str) -> Result<String> {
    let parsed =
        Url::parse(url).map_err(|error| Error::new(Kind::Config, format!("`{url}` names no bucket")).source(error))?;
    let host = parsed.host_str().unwrap_or_default().to_lowercase();
    let first = || parsed.path_segments().and_then(|mut parts| parts.next()).unwrap_or_default().to_lowercase();
    let endpoint = |name: &&str| options.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
    let mut service = ENDPOINT_OPTIONS.iter().chain(&["base_url"]).find_map(endpoint).and_then(|url| service(url));
    let (scheme, bucket) = match parsed.scheme() {
        "s3" | "s3a" => ("s3", host),
        "az" | "adl" | "azure" | "abfs" | "abfss" => {
            let container = parsed.username().to_lowercase();
            ("az", if container.is_empty() { host } else { container })
        }
        "https" if host.ends_with(".amazonaws.com") && host.starts_with("s3") => ("s3", first()),
        "https" if host.ends_with(".amazonaws.com") => {
            ("s3", host.split_once(".s3").map_or(host.as_str(), |(bucket, _)| bucket).to_owned())
        }
        "https" if host.ends_with(".r2.cloudflarestorage.com") => {
            service = service.or(Some(host));
            ("s3", first())
        }
        "https" if [".core.windows.net", ".fabric.microsoft.com"].iter().any(|end| host.ends_with(end)) => {
            ("az", first())
        }
        other => (other, host),
    };
    Ok(compose(scheme, service.as_deref(), &bucket, prefix))
}

/// Puts an address together; `service` is what [`service`] made of the endpoint.
pub fn compose(scheme: &str, service: Option<&str>, bucket: &str, prefix: &str) -> String {
    let parts = service.into_iter().chain([bucket]).chain(prefix.split('/'));
    let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
    format!("{scheme}://{}", parts.join("/"))
}

/// Host, port if it is not the usual one, and path of an endpoint; `None` for Amazon's own.
pub fn service(endpoint: &str) -> Option<String> {
    let whole = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let Ok(url) = Url::parse(&whole) else { return Some(endpoint.trim_matches('/').to_lowercase()) };
    let host = match url.host_str().unwrap_or_default().trim_end_matches('.') {
        "localhost" | "[::1]" => "127.0.0.1",
        host if host.ends_with(".amazonaws.com") => return None,
        host => host,
    };
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    Some(format!("{host}{port}{}", url.path().trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(url: &str, option: &str, endpoint: &str, prefix: &str) -> String {
        of_bucket(url, &BTreeMap::from([(option.to_owned(), endpoint.to_owned())]), prefix).unwrap()
    }

    #[test]
    fn what_lies_below_begins_with_the_parts_of_what_is_above() {
        let source = at("s3://prod", "endpoint", "http://minio:9000/", "");
        assert_eq!(source, "s3://minio:9000/prod");
        let target = at("s3://prod/data/new", "endpoint", "http://minio:9000", "data/new");
        assert_eq!(target, "s3://minio:9000/prod/data/new");
        assert!(target.split('/').zip(source.split('/')).all(|(target, source)| target == source));
        let plain = of_bucket("s3://Prod/data/", &BTreeMap::new(), "data").unwrap();
        assert_eq!(plain, "s3://prod/data");
    }

    #[test]
    fn one_place_has_one_address() {
        let expected = "s3://127.0.0.1:9000/prod/data";
        for option in ["endpoint", "endpoint_url", "aws_endpoint", "AWS_ENDPOINT_URL", "aws_endpoint_url_s3"] {
            for endpoint in ["http://localhost:9000", "https://LOCALHOST:9000/", "http://127.0.0.1:9000", "[::1]:9000"]
            {
                assert_eq!(at("s3://prod/data", option, endpoint, "data"), expected, "{option} {endpoint}");
            }
        }
        for endpoint in ["http://minio:80", "https://minio:443/", "https://minio", "minio."] {
            assert_eq!(at("s3a://prod", "endpoint", endpoint, ""), "s3://minio/prod", "{endpoint}");
        }
        for url in ["https://s3.eu-west-1.amazonaws.com/prod/data", "https://prod.s3.eu-west-1.amazonaws.com/data"] {
            assert_eq!(of_bucket(url, &BTreeMap::new(), "data").unwrap(), "s3://prod/data");
        }
        assert_eq!(at("s3://prod", "endpoint", "https://s3.eu-west-1.amazonaws.com", ""), "s3://prod");
        assert_eq!(
            of_bucket("abfss://prod@account.dfs.core.windows.net/a", &BTreeMap::new(), "a").unwrap(),
            "az://prod/a"
        );
    }

    #[test]
    fn a_service_is_found_in_every_way_to_write_an_endpoint() {
        for endpoint in ["http://localhost:9000", "localhost:9000", "http://127.0.0.1:9000/"] {
            assert_eq!(service(endpoint).as_deref(), Some("127.0.0.1:9000"), "{endpoint}");
        }
        assert_eq!(service("https://s3.eu-west-1.amazonaws.com"), None);
        assert_eq!(compose("gs", None, "prod", ""), "gs://prod");
        assert_eq!(compose("s3", Some("minio:9000"), "prod", "data/new"), "s3://minio:9000/prod/data/new");
    }
}
