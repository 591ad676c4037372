//! The depot suite on real servers, and what only real servers show. `cargo xtask test` starts
//! them; `cargo xtask rig up s3` and its exports do for one test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use hmac::{Hmac, KeyInit, Mac};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use reqwest::Method;
use sha2::Sha256;
use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;
use stillpoint_repo::depot::contended::Contended;
use stillpoint_repo::depot::layers::{Retry, RetryPolicy};
use stillpoint_repo::depot::{self, Depot, WriteMode, object};

use super::depot::conforms;

type Settings = BTreeMap<String, String>;

/// A server that runs, and how it is reached.
struct Server {
    endpoint: String,
    options: Settings,
    credentials: Settings,
}

/// The rig's server, or a printed skip.
fn server(test: &str, rig: &str, keys: [&str; 2]) -> Option<Server> {
    let get = |what: &str| std::env::var(format!("STILLPOINT_RIG_{rig}_{}", what.to_uppercase())).ok();
    let Some(endpoint) = get("endpoint") else {
        let rig = rig.to_lowercase().replace('_', "-");
        stillpoint_testkit::skip(test, &format!("rig {rig} does not run"));
        return None;
    };
    let options = [("endpoint", endpoint.as_str()), ("allow_http", "true")];
    let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let credentials = keys.iter().map(|key| ((*key).to_owned(), get(key).expect("given with the endpoint"))).collect();
    Some(Server { endpoint, options, credentials })
}

fn s3(test: &str, rig: &str) -> Option<Server> {
    server(test, rig, ["access_key_id", "secret_access_key"])
}

fn bucket_name() -> String {
    format!("rig-{:016x}", fastrand::u64(..))
}

impl Server {
    fn client(&self, bucket: &str) -> AmazonS3 {
        // Opening a depot chooses the cryptography, which clients of one's own need as well.
        drop(self.open(bucket));
        let builder =
            AmazonS3Builder::new().with_bucket_name(bucket).with_endpoint(&self.endpoint).with_allow_http(true);
        let builder = builder.with_access_key_id(&self.credentials["access_key_id"]);
        builder.with_secret_access_key(&self.credentials["secret_access_key"]).build().expect("client")
    }

    /// Sends a request about the bucket itself.
    fn ask(
        &self,
        bucket: &str,
        method: Method,
        query: &[(&str, &str)],
        headers: &[(&'static str, &str)],
        body: &str,
    ) -> String {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let (client, body) = (self.client(bucket), body.to_owned());
        runtime.block_on(async {
            let mut options = SignedUrlOptions::new().with_query(query.iter().copied());
            let mut request_headers = reqwest::header::HeaderMap::new();
            for (name, value) in headers {
                let value: reqwest::header::HeaderValue = value.parse().expect("header");
                options.signed_headers.insert(*name, value.clone());
                request_headers.insert(*name, value);
            }
            let url = client.signed_url_opts(method.clone(), &Path::default(), Duration::from_secs(60), &options).await;
            let request = reqwest::Client::new().request(method, url.expect("url")).headers(request_headers).body(body);
            let response = request.send().await.expect("answer");
            let status = response.status();
            let text = response.text().await.expect("body");
            assert!(status.is_success(), "{status}: {text}");
            text
        })
    }

    fn bucket(&self) -> String {
        let bucket = bucket_name();
        self.ask(&bucket, Method::PUT, &[], &[], "");
        bucket
    }

    fn versioned_bucket(&self) -> String {
        let bucket = bucket_name();
        self.ask(&bucket, Method::PUT, &[], &[("x-amz-bucket-object-lock-enabled", "true")], "");
        bucket
    }

    fn open(&self, bucket: &str) -> object::ObjectDepot {
        object::open(&format!("s3://{bucket}/some/prefix"), &self.options, &self.credentials).expect("open")
    }
}

#[test]
fn s3_conforms() {
    let Some(server) = s3("s3_conforms", "S3") else { return };
    conforms(&server.open(&server.bucket()));
}

#[test]
fn s3_is_probed_as_what_it_is_and_keeps_the_record_alone() {
    let Some(server) = s3("s3_is_probed_as_what_it_is_and_keeps_the_record_alone", "S3") else { return };
    let plain = server.open(&server.bucket());
    let found = depot::probe(&plain).expect("probe");
    assert!(found.conditional_create && found.conditional_update, "{found:?}");
    assert!(!found.versioning && !found.object_lock, "{found:?}");
    let bucket = server.versioned_bucket();
    let found = server.open(&bucket).capability();
    assert!(found.conditional_create && found.versioning && found.object_lock, "{found:?}");
    let versions = server.ask(&bucket, Method::GET, &[("versions", "")], &[], "");
    let keys: Vec<&str> = versions.split("<Key>").skip(1).filter_map(|rest| rest.split('<').next()).collect();
    assert_eq!(keys, ["some/prefix/capability.json"], "{versions}");
}

#[test]
fn what_was_found_of_a_service_is_believed_for_that_service_alone() {
    let Some(server) = s3("what_was_found_of_a_service_is_believed_for_that_service_alone", "S3") else { return };
    let bucket = server.bucket();
    let first = server.open(&bucket);
    assert!(first.capability().conditional_create);
    let record = || {
        let bytes = first.read("capability.json").expect("a record").0;
        String::from_utf8(bytes.to_vec()).expect("text")
    };
    let whole = record();
    assert!(whole.contains(&first.location()), "{whole}");
    for changed in [whole.replace(&first.location(), "s3://elsewhere"), "not JSON".to_owned()] {
        first.write("capability.json", &[changed.as_bytes()], &WriteMode::Replace).expect("write");
        assert!(server.open(&bucket).capability().conditional_create, "{changed}");
        assert!(record().contains(&first.location()), "it was tried and written down again");
    }
}

#[test]
fn s3_takes_large_objects_in_parts_and_lists_thousands() {
    let Some(server) = s3("s3_takes_large_objects_in_parts_and_lists_thousands", "S3") else { return };
    let depot = server.open(&server.bucket());
    let block: Vec<u8> = (0..5_000_011u32).map(|n| (n % 253) as u8).collect();
    let parts: Vec<&[u8]> = (0..14).map(|_| block.as_slice()).collect();
    depot.write("large", &parts, &WriteMode::Replace).expect("write");
    assert_eq!(depot.stat("large").expect("stat").expect("there").size, 14 * 5_000_011);
    assert_eq!(depot.read_range("large", 5_000_011 * 13, 100).expect("range"), block[..100]);
    let mut threads = Vec::new();
    let depot = Arc::new(depot);
    for thread in 0..8 {
        let depot = Arc::clone(&depot);
        threads.push(std::thread::spawn(move || {
            for number in 0..150 {
                depot.write(&format!("many/{thread}-{number}"), &[], &WriteMode::Replace).expect("write");
            }
        }));
    }
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    let mut count = 0;
    depot
        .list("many/", &mut |_| {
            Ok({
                count += 1;
                true
            })
        })
        .expect("list");
    assert_eq!(count, 1200);
}

#[test]
fn mistakes_on_s3_are_permanent_and_say_what_to_do() {
    let Some(mut server) = s3("mistakes_on_s3_are_permanent_and_say_what_to_do", "S3") else { return };
    let absent = bucket_name();
    let open = |server: &Server, bucket: &str| {
        depot::open(&format!("s3://{bucket}"), &server.options, &server.credentials).expect("open")
    };
    let begun = std::time::Instant::now();
    let error = open(&server, &absent).write("a", &[b"x"], &WriteMode::Replace).expect_err("no bucket");
    assert_eq!((error.kind(), error.is_temporary()), (Kind::NotFound, false), "{error:?}");
    let bucket = server.bucket();
    server.credentials.insert("secret_access_key".to_owned(), "wrong".to_owned());
    let error = open(&server, &bucket).read("a").expect_err("wrong key");
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error:?}");
    assert!(!format!("{error:?}").contains("wrong\""));
    server.credentials.insert("access_key_id".to_owned(), "nobody".to_owned());
    let error = open(&server, &bucket).list("", &mut |_| Ok(true)).expect_err("unknown user");
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error:?}");
    assert!(error.hint_text().is_some());
    assert!(begun.elapsed() < Duration::from_secs(10), "nothing of this is worth a retry");
}

#[test]
fn a_depot_works_from_inside_another_runtime() {
    let Some(server) = s3("a_depot_works_from_inside_another_runtime", "S3") else { return };
    let depot = server.open(&server.bucket());
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async { depot.write("a", &[b"x"], &WriteMode::Replace) }).expect("no panic, no deadlock");
}

#[test]
fn s3_without_conditional_writes_conforms_by_turns() {
    let Some(server) = s3("s3_without_conditional_writes_conforms_by_turns", "S3_PLAIN") else { return };
    let depot: Arc<dyn Depot> = Arc::new(server.open(&server.bucket()));
    let found = depot.capability();
    assert!(!found.conditional_update || !found.conditional_create, "then this rig shows nothing: {found:?}");
    let turns = Contended::with_times(depot, Duration::from_millis(1000), Duration::from_secs(600));
    let pause = RetryPolicy { pause_first: Duration::from_millis(50), ..RetryPolicy::default() };
    conforms(&Retry::new(Arc::new(turns), pause, Context::default()));
}

#[test]
fn azure_conforms() {
    let Some(server) = server("azure_conforms", "AZURE", ["account_name", "account_key"]) else { return };
    let container = bucket_name();
    make_container(&server, &container);
    let depot = object::open(&format!("az://{container}/some/prefix"), &server.options, &server.credentials);
    conforms(&depot.expect("open"));
}

/// Makes a container; the common crate has no word for it, so the request is signed here.
fn make_container(server: &Server, container: &str) {
    let (account, key) = (&server.credentials["account_name"], &server.credentials["account_key"]);
    let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    let version = "2021-08-06";
    let resource = format!("/{account}/{account}/{container}\nrestype:container");
    let text = format!("PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n{resource}");
    let key = base64::engine::general_purpose::STANDARD.decode(key).expect("key");
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any length");
    mac.update(text.as_bytes());
    let signature = base64::engine::general_purpose::STANDARD.encode(mac.finalize().into_bytes());
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    // Any depot that was opened has chosen the cryptography for reqwest.
    drop(object::open(
        "s3://any",
        &server.options,
        &[("access_key_id", "x")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
    ));
    runtime.block_on(async {
        let url = format!("{}/{container}?restype=container", server.endpoint);
        let request = reqwest::Client::new().put(url).header("x-ms-date", date).header("x-ms-version", version);
        let request = request.header("authorization", format!("SharedKey {account}:{signature}"));
        let response = request.header("content-length", "0").send().await.expect("answer");
        let status = response.status();
        assert!(status.is_success(), "{status}: {}", response.text().await.unwrap_or_default());
    });
}
