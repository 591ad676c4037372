//! Options of a bucket, by the names of the `object_store` crate: which of them this client heeds.
//!
//! Pure. An option that would be passed over in silence is refused, because it may have been meant to
//! protect something.

use object_store::ClientConfigKey;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use stillpoint_core::error::{Error, Kind, Result};

/// What is wrong with settings that lead to no bucket.
pub(super) fn wrong(error: object_store::Error) -> Error {
    Error::new(Kind::Config, "the settings name no bucket that can be reached")
        .hint("options have the names of the object_store crate, e.g. endpoint, region, allow_http")
        .source(error)
}

/// The options as that crate takes them, for its chain of credentials.
///
/// # Errors
/// `Config` for an option that nobody knows, or that would have no effect here.
pub(super) fn builder(bucket: &str, options: &[(String, String)]) -> Result<AmazonS3Builder> {
    let mut builder = AmazonS3Builder::new().with_bucket_name(bucket);
    let mut unknown = None;
    for (name, value) in options {
        match name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            Ok(key) if !has_effect(&key) => {
                return Err(Error::new(Kind::Config, format!("the option `{name}` has no effect on buckets of S3"))
                    .hint("leave it out; encryption and the like are set on the bucket itself"));
            }
            Ok(key) => builder = builder.with_config(key, value),
            Err(error) => unknown = unknown.or(Some(error)),
        }
    }
    unknown.map_or(Ok(builder), |error| Err(wrong(error)))
}

/// Whether an option is heeded: those of the credentials go to the chain of the `object_store` crate, and this client
/// reads a few others. What else that crate knows would have no effect here.
fn has_effect(key: &AmazonS3ConfigKey) -> bool {
    use AmazonS3ConfigKey as Key;
    use ClientConfigKey::{AllowHttp, AllowInvalidCertificates, ProxyUrl};
    matches!(
        key,
        Key::AccessKeyId
            | Key::SecretAccessKey
            | Key::Token
            | Key::Region
            | Key::DefaultRegion
            | Key::Endpoint
            | Key::S3Endpoint
            | Key::ImdsV1Fallback
            | Key::MetadataEndpoint
            | Key::ContainerCredentialsRelativeUri
            | Key::ContainerCredentialsFullUri
            | Key::ContainerAuthorizationTokenFile
            | Key::WebIdentityTokenFile
            | Key::RoleArn
            | Key::RoleSessionName
            | Key::StsEndpoint
            | Key::VirtualHostedStyleRequest
            | Key::SkipSignature
            | Key::RequestPayer
            | Key::Client(AllowHttp | AllowInvalidCertificates | ProxyUrl)
    )
}
