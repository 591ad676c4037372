//! Keys that servers on file systems refuse and S3 allows: against `moto`, which keeps them in memory.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use stillpoint_core::driver::{Context, EdgeQuery, RestoreMode};
use stillpoint_core::tree::{Tree, TreePath};
use stillpoint_testkit::skip;

use super::rig::Rig;
use super::versions::put_with;
use crate::objects::bucket::facts;
use crate::objects::client::Place;
use crate::trial::{back_up, differences, edges, restore};

struct Moto {
    server: Child,
    address: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop((self.server.kill(), self.server.wait()));
    }
}

impl Moto {
    fn start() -> Option<Self> {
        let has = Command::new("python3").args(["-c", "import moto.server"]).stderr(Stdio::null()).status();
        if !has.is_ok_and(|status| status.success()) {
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("python3");
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
        let server = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let moto = Self { server, address: format!("127.0.0.1:{port}") };
        let begin = Instant::now();
        while TcpStream::connect(&moto.address).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(120), "moto does not start");
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(moto)
    }

    /// Writes a key that no address can hold, as a client may that sends what it likes.
    fn put_raw(&self, path: &str, body: &str) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (host, length) = (&self.address, body.len());
        let head = format!("PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n");
        let sign = "Authorization: AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
        stream.write_all(format!("{head}{sign}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[test]
fn empty_parts_come_back_and_dots_are_named() {
    let Some(moto) = Moto::start() else {
        return skip("empty_parts_come_back_and_dots_are_named", "no moto: pip install 'moto[server]'");
    };
    let rig = Rig { endpoint: format!("http://{}", moto.address), key: "x".to_owned(), secret: "x".to_owned() };
    for versions in [true, false] {
        let bucket = rig.bucket(versions);
        let odd = ["/", "//", "/lead", "a//b", "a/", "a", "a/b", "é//\u{7f}\t ", &"k".repeat(1022)];
        for key in odd {
            put_with(&bucket, format!("p/{key}").as_bytes(), Vec::new(), key.as_bytes().to_vec());
        }
        moto.put_raw(&format!("/{}/p/x/../y", bucket.name), "dots");
        let grant = ("x-amz-acl".to_owned(), b"public-read".to_vec());
        put_with(&bucket, b"p/open", vec![grant], b"for all".to_vec());
        let driver = bucket.open("p", json!({ "acl": true }));
        let (tree, drained) = back_up(&driver, None);
        let lost: Vec<_> = drained.losses.iter().map(|loss| loss.what.as_str()).collect();
        assert_eq!((drained.items, lost), (odd.len() as u64 + 1, vec!["x/../y"]));
        let copy = rig.bucket(false);
        let target = copy.open("q", json!({ "acl": true }));
        restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(differences(&target, &tree), Vec::<String>::new());
        // What is granted is in the point; moto does not take the list back in this form.
        let acl_of = |name: &str| {
            let path = TreePath::parse(&format!("objects/{name}")).unwrap();
            let node = tree.get(&path).unwrap().unwrap();
            String::from_utf8_lossy(facts::fact(&node.meta.xattrs, "acl").unwrap()).into_owned()
        };
        assert!(acl_of("open").contains("AllUsers") && !acl_of("a/b").contains("AllUsers"), "{}", acl_of("open"));
        let held = edges(&target, None, &EdgeQuery::Held("keys".to_owned())).unwrap();
        let held: BTreeSet<_> = held.into_iter().map(|edge| edge.referent).collect();
        assert_eq!(held, odd.iter().chain(&["open"]).map(|key| key.as_bytes().to_vec()).collect());
    }
}

#[test]
fn what_a_reference_could_not_give_back_is_named_before() {
    let Some(moto) = Moto::start() else {
        return skip("what_a_reference_could_not_give_back_is_named_before", "no moto: pip install 'moto[server]'");
    };
    let rig = Rig { endpoint: format!("http://{}", moto.address), key: "x".to_owned(), secret: "x".to_owned() };
    let (bucket, mirror) = (rig.bucket(true), rig.bucket(true));
    put_with(&bucket, b"p/readable", Vec::new(), b"bytes".to_vec());
    put_with(&bucket, b"p/cold", vec![("x-amz-storage-class".to_owned(), b"GLACIER".to_vec())], b"ice".to_vec());
    moto.put_raw(&format!("/{}/p/x/../y", bucket.name), "dots");
    let to = format!("s3://{}/copies", mirror.name);
    for settings in [json!({ "mode": "reference" }), json!({ "mode": "mirror", "mirror": to })] {
        let driver = bucket.open("p", settings);
        let (tree, drained) = back_up(&driver, None);
        let lost: Vec<_> = drained.losses.iter().map(|loss| loss.what.as_str()).collect();
        assert_eq!((drained.items, lost), (1, vec!["cold", "x/../y"]));
        // Set back in place, what was left out stays. Times of this service are cut off to the second.
        std::thread::sleep(Duration::from_millis(1_100));
        put_with(&bucket, b"p/late", vec![("x-amz-storage-class".to_owned(), b"GLACIER".to_vec())], b"ice".to_vec());
        let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
        let left: Vec<_> = restored.losses.iter().map(|loss| loss.what.as_str()).collect();
        assert_eq!((restored.items, left), (1, vec!["cold", "x/../y"]));
        let mut there = Vec::new();
        let visit = &mut |key: Vec<u8>, _| {
            there.push(String::from_utf8(key).unwrap());
            Ok(())
        };
        Place::list(&bucket.place("p"), &Context::default(), visit).unwrap();
        assert_eq!(there, ["cold", "readable", "x/../y"]);
        std::thread::sleep(Duration::from_millis(1_100));
        let copy = rig.bucket(false);
        assert_eq!(restore(&copy.open("", json!({})), &tree, RestoreMode::Fresh, None).unwrap().items, 1);
        assert_eq!(copy.listed("").keys().collect::<Vec<_>>(), ["readable"]);
    }
}

#[test]
fn markers_that_a_service_lists_apart_hide_what_they_should() {
    let Some(moto) = Moto::start() else {
        return skip("markers_that_a_service_lists_apart_hide_what_they_should", "no moto: pip install 'moto[server]'");
    };
    let rig = Rig { endpoint: format!("http://{}", moto.address), key: "x".to_owned(), secret: "x".to_owned() };
    let bucket = rig.bucket(true);
    for key in ["a", "b", "c", "d"] {
        bucket.put(&format!("p/{key}"), "first");
    }
    bucket.delete("p/a");
    bucket.delete("p/c");
    bucket.put("p/c", "second");
    // Times of this service are cut off to the second.
    std::thread::sleep(Duration::from_millis(1_100));
    let driver = bucket.open("p", json!({}));
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, tree.files()["objects/c"].as_slice()), (3, &b"second"[..]));
    assert!(!tree.files().contains_key("objects/a"));
    bucket.delete("p/d");
    bucket.put("p/e", "new");
    restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    assert_eq!(bucket.listed("p").keys().collect::<Vec<_>>(), ["b", "c", "d"]);
}

#[test]
fn what_cannot_be_set_back_stays_and_is_named_and_the_rest_comes_back() {
    let name = "what_cannot_be_set_back_stays_and_is_named_and_the_rest_comes_back";
    let Some(moto) = Moto::start() else { return skip(name, "no moto: pip install 'moto[server]'") };
    let rig = Rig { endpoint: format!("http://{}", moto.address), key: "x".to_owned(), secret: "x".to_owned() };
    let bucket = rig.bucket(true);
    let archived = vec![("x-amz-storage-class".to_owned(), b"GLACIER".to_vec())];
    put_with(&bucket, b"p/cold", archived, b"ice".to_vec());
    bucket.put("p/a", "first");
    bucket.put("p/z", "first");
    let driver = bucket.open("p", json!({}));
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, drained.losses.len()), (2, 1));
    for key in ["p/a", "p/cold", "p/z"] {
        bucket.put(key, "second");
    }
    moto.put_raw(&format!("/{}/p/x/../y", bucket.name), "dots");
    let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    let left: BTreeSet<_> = restored.losses.iter().map(|loss| loss.what.as_str()).collect();
    assert_eq!((restored.items, left), (2, BTreeSet::from(["cold", "x/../y"])));
    assert_eq!(
        [bucket.get("p/a"), bucket.get("p/cold"), bucket.get("p/z")],
        [b"first".to_vec(), b"second".to_vec(), b"first".to_vec()]
    );
}
