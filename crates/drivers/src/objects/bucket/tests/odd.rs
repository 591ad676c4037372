//! Keys that servers on file systems refuse and S3 allows: against `moto`, which keeps them in memory.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use stillpoint_core::driver::{EdgeQuery, RestoreMode};
use stillpoint_core::tree::{Tree, TreePath};
use stillpoint_testkit::skip;

use super::rig::Rig;
use super::versions::put_with;
use crate::objects::bucket::facts;
use crate::trial::{back_up, differences, edges, restore};

struct Moto {
    server: Child,
    address: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

impl Moto {
    fn start() -> Option<Self> {
        let has = Command::new("python3").args(["-c", "import moto.server"]).stderr(Stdio::null()).status();
        if !has.is_ok_and(|status| status.success()) {
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let mut command = Command::new("python3");
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
        let server = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
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
        let (tree, drained) = back_up(&bucket.open("p", settings), None);
        let lost: Vec<_> = drained.losses.iter().map(|loss| loss.what.as_str()).collect();
        assert_eq!((drained.items, lost), (1, vec!["cold", "x/../y"]));
        let copy = rig.bucket(false);
        assert_eq!(restore(&copy.open("", json!({})), &tree, RestoreMode::Fresh, None).unwrap().items, 1);
        assert_eq!(copy.listed("").keys().collect::<Vec<_>>(), ["readable"]);
    }
}
