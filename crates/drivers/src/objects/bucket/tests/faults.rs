//! What a user reads when the service, the way to it, or the bucket fails. A proxy in front of the real
//! server answers some requests itself.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use stillpoint_core::driver::{Context, RestoreMode};
use stillpoint_core::error::{Error, Kind};
use stillpoint_testkit::skip;

use super::rig::{Bucket, Rig};
use crate::objects::bucket::answers::Versioning;
use crate::objects::bucket::verbs::Which;
use crate::trial::{back_up, cut_id, drain, pin, restore, run};

/// Answers instead of the server: given the first line of a request, the answer or none.
type Judge = dyn Fn(&str) -> Option<String> + Send + Sync;

/// Changes the head of what the server answers.
type Edit = dyn Fn(String) -> String + Send + Sync;

/// A proxy before a rig; ends with the test's process.
pub fn proxy(rig: &Rig, judge: Arc<Judge>) -> Rig {
    editing_proxy(rig, judge, Arc::new(|head| head))
}

/// The same, which changes answers of the server on their way.
pub fn editing_proxy(rig: &Rig, judge: Arc<Judge>, edit: Arc<Edit>) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let upstream = rig.endpoint.trim_start_matches("http://").to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (upstream, judge, edit) = (upstream.clone(), judge.clone(), edit.clone());
            // A connection that breaks off is the client's to notice.
            std::thread::spawn(move || pass_on(client?, &upstream, &*judge, &*edit));
        }
    });
    Rig { endpoint: format!("http://127.0.0.1:{port}"), ..rig.clone() }
}

fn pass_on(mut client: TcpStream, upstream: &str, judge: &Judge, edit: &Edit) -> std::io::Result<()> {
    let text = head_of(&mut client)?;
    let length =
        text.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    client.read_exact(&mut body)?;
    if let Some(answer) = judge(text.lines().next().unwrap_or_default()) {
        return client.write_all(answer.as_bytes());
    }
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(text.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())?;
    server.write_all(&body)?;
    client.write_all(edit(head_of(&mut server)?).as_bytes())?;
    std::io::copy(&mut server, &mut client).map(drop)
}

fn head_of(stream: &mut TcpStream) -> std::io::Result<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// The head without a header, or with another value of it.
fn with_header(head: &str, name: &str, change: impl Fn(&str) -> Option<String>) -> String {
    let lines = head.split_inclusive("\r\n").filter_map(|line| match line.split_once(": ") {
        Some((found, value)) if found.eq_ignore_ascii_case(name) => {
            change(value.trim()).map(|value| format!("{found}: {value}\r\n"))
        }
        _ => Some(line.to_owned()),
    });
    lines.collect()
}

/// The bucket behind a proxy that shows a time of its own, as many do.
fn behind_clock(bucket: &Bucket, ahead_seconds: i64) -> Bucket {
    let edit = move |head: String| {
        with_header(&head, "date", |date| {
            let time = jiff::fmt::rfc2822::parse(date).unwrap().timestamp();
            let shown = time + jiff::SignedDuration::from_secs(ahead_seconds);
            Some(jiff::fmt::strtime::format("%a, %d %b %Y %H:%M:%S GMT", shown).unwrap())
        })
    };
    Bucket { rig: editing_proxy(&bucket.rig, Arc::new(|_| None), Arc::new(edit)), ..bucket.clone() }
}

pub fn answer(status: &str, headers: &str, code: &str) -> String {
    let body = format!("<Error><Code>{code}</Code><Message>as the test wants</Message></Error>");
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn filled(rig: &Rig, versions: bool) -> Bucket {
    let bucket = rig.bucket(versions);
    for number in 0..20 {
        bucket.put(&format!("p/{number}"), [number as u8; 500]);
    }
    bucket
}

pub fn through(bucket: &Bucket, judge: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Bucket {
    Bucket { rig: proxy(&bucket.rig, Arc::new(judge)), ..bucket.clone() }
}

fn prepare(bucket: &Bucket) -> Error {
    run(bucket.open("p", json!({})).prepare(&Context::default())).unwrap_err()
}

#[test]
fn throttling_is_waited_out_and_a_pause_that_is_asked_for_is_kept() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("throttling_is_waited_out_and_a_pause_that_is_asked_for_is_kept", why),
    };
    let bucket = filled(&rig, true);
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    let slow = through(&bucket, move |_| match counted.fetch_add(1, Ordering::SeqCst) {
        number if number % 5 == 3 => Some(answer("503 Slow Down", "", "SlowDown")),
        7 => Some(answer("429 Too Many", "Retry-After: 1\r\n", "")),
        number if number % 11 == 9 => Some(answer("500 Internal", "", "InternalError")),
        // The server breaks off.
        number if number % 13 == 12 => Some(String::new()),
        _ => None,
    });
    let begin = std::time::Instant::now();
    let (tree, drained) = back_up(&slow.open("p", json!({})), None);
    assert_eq!((drained.items, drained.losses.len()), (20, 0));
    assert!(begin.elapsed().as_secs_f64() >= 1.0, "the wish for a pause of a second was passed over");
    assert!(drained.notes.iter().any(|note| note.contains("were sent again")), "{:?}", drained.notes);
    let copy = rig.bucket(true);
    let slow = through(&copy, move |line| {
        let is_third = count.fetch_add(1, Ordering::SeqCst).is_multiple_of(3);
        (line.starts_with("PUT") && is_third).then(|| answer("503 Slow Down", "", "SlowDown"))
    });
    assert_eq!(restore(&slow.open("p", json!({})), &tree, RestoreMode::Fresh, None).unwrap().items, 20);
    assert_eq!(copy.listed("p"), bucket.listed("p"));
}

#[test]
fn what_cannot_get_better_is_said_at_once() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("what_cannot_get_better_is_said_at_once", why),
    };
    let bucket = filled(&rig, true);
    let denied =
        through(&bucket, |line| line.contains("versions=").then(|| answer("403 Forbidden", "", "AccessDenied")));
    let error = prepare(&denied);
    assert_eq!(error.kind(), Kind::PermissionDenied);
    assert!(error.hint_text().unwrap().contains("grant s3:ListBucketVersions"), "{error:?}");
    let probe = run(denied.open("p", json!({})).probe(&Context::default())).unwrap();
    assert!(probe.missing_privileges.iter().any(|text| text.contains("s3:ListBucketVersions")), "{probe:?}");
    let denied =
        through(&bucket, |line| line.contains("versionId").then(|| answer("403 Forbidden", "", "AccessDenied")));
    let error = prepare(&denied);
    assert!(
        error.to_string().contains("cannot read the object `p/")
            && error.hint_text().unwrap().contains("s3:GetObjectVersion")
    );

    let date = "Date: Sat, 21 Nov 2020 10:00:00 GMT\r\n";
    let skewed = through(&bucket, move |_| Some(answer("403 Forbidden", date, "RequestTimeTooSkewed")));
    let error = prepare(&skewed);
    assert_eq!(error.kind(), Kind::Unauthenticated);
    assert!(error.message().contains("clock is") && error.message().contains("ahead of"), "{error:?}");

    let full = through(&bucket, |line| line.starts_with("PUT").then(|| answer("507 Full", "", "XMinioStorageFull")));
    let (tree, _) = back_up(&bucket.open("p", json!({})), None);
    let error = restore(&full.open("q", json!({})), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert!(error.kind() == Kind::Exhausted && error.hint_text().unwrap().contains("no room left"), "{error:?}");

    let elsewhere = "x-amz-bucket-region: eu-west-1\r\n";
    let moved = through(&bucket, move |_| Some(answer("301 Moved", elsewhere, "PermanentRedirect")));
    assert_eq!(prepare(&moved).hint_text(), Some("options: { region: eu-west-1 }"));

    let absent = prepare(&rig.absent());
    assert!(absent.kind() == Kind::NotFound && absent.message().starts_with("there is no bucket"), "{absent:?}");
    let driver = bucket.open("p", json!({ "credentials": { "access_key_id": "nobody", "secret_access_key": "x" } }));
    let error = run(driver.prepare(&Context::default())).unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated);
    assert!(!format!("{error:?}").contains("secret_access_key=x"));
}

#[test]
fn a_server_that_is_down_is_named() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_server_that_is_down_is_named", why),
    };
    let mut bucket = rig.absent();
    // A port that nobody listens on.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    bucket.rig.endpoint = format!("http://127.0.0.1:{port}");
    let error = prepare(&bucket);
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")) && error.to_string().contains("tried"), "{error}");
}

#[test]
fn a_bucket_that_goes_while_it_is_read_is_no_loss_of_single_objects() {
    let name = "a_bucket_that_goes_while_it_is_read_is_no_loss_of_single_objects";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = filled(&rig, true);
    let gone = Arc::new(AtomicU32::new(0));
    let is_gone = gone.clone();
    let shaky = through(&bucket, move |_| {
        (is_gone.load(Ordering::SeqCst) > 0).then(|| answer("404 Not Found", "", "NoSuchBucket"))
    });
    let driver = shaky.open("p", json!({}));
    let pinned = pin(&driver, 1);
    crate::trial::edges(&driver, Some(&pinned), &stillpoint_core::driver::EdgeQuery::Held("keys".to_owned())).unwrap();
    gone.store(1, Ordering::SeqCst);
    let error = drain(&driver, &pinned, None).unwrap_err();
    assert!(error.kind() == Kind::NotFound && error.message().starts_with("there is no bucket"), "{error:?}");
}

#[test]
fn objects_that_go_between_list_and_read_are_named_where_no_version_holds_them() {
    let name = "objects_that_go_between_list_and_read_are_named_where_no_version_holds_them";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let keys = stillpoint_core::driver::EdgeQuery::Held("keys".to_owned());
    for versions in [true, false] {
        let bucket = filled(&rig, versions);
        bucket.put("p/large", vec![1; 9 << 20]);
        let driver = bucket.open("p", json!({}));
        let pinned = pin(&driver, 1);
        // This lists.
        crate::trial::edges(&driver, Some(&pinned), &keys).unwrap();
        bucket.delete("p/3");
        bucket.put("p/4", "replaced");
        bucket.put("p/large", vec![2; 9 << 20]);
        let (point, drained) = drain(&driver, &pinned, None).unwrap();
        let lost: Vec<_> = drained.losses.iter().map(|loss| loss.what.as_str()).collect();
        let torn: Vec<_> = point.torn.iter().map(|loss| loss.what.as_str()).collect();
        if versions {
            assert_eq!((lost.len(), torn.len(), point.tree.files()["objects/4"].len()), (0, 0, 500));
            assert_eq!(point.tree.files()["objects/large"], vec![1; 9 << 20]);
        } else {
            assert_eq!((lost, torn), (vec!["3"], vec!["objects/4", "objects/large"]));
            // What was lost holds no reference any more.
            let held = crate::trial::edges(&driver, Some(&pinned), &keys).unwrap();
            assert!(held.len() == 20 && held.iter().all(|edge| edge.referent != b"3"), "{held:?}");
            assert_eq!(point.tree.files()["objects/large"], vec![2; 9 << 20]);
        }
    }
}

#[test]
fn a_version_that_is_removed_is_named() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_version_that_is_removed_is_named", why),
    };
    let bucket = filled(&rig, true);
    let driver = bucket.open("p", json!({}));
    let pinned = pin(&driver, 1);
    let keys = stillpoint_core::driver::EdgeQuery::Held("keys".to_owned());
    crate::trial::edges(&driver, Some(&pinned), &keys).unwrap();
    let place = bucket.place("p");
    let mut version = None;
    place
        .versions(&Context::default(), &mut |entry| {
            version = version.take().or((entry.key == b"7").then_some(entry.version.unwrap()));
            Ok(())
        })
        .unwrap();
    let client = place.client.clone();
    place.wait(async move { client.delete(Which { key: b"p/7", version: version.as_deref() }).await }).unwrap();
    let (_, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!(drained.losses.iter().map(|loss| loss.what.as_str()).collect::<Vec<_>>(), ["7"]);
}

#[test]
fn versioning_that_is_suspended_before_the_cut_asks_for_a_new_start() {
    let name = "versioning_that_is_suspended_before_the_cut_asks_for_a_new_start";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = filled(&rig, true);
    let driver = bucket.open("p", json!({}));
    let context = Context::default();
    run(driver.prepare(&context)).unwrap();
    let place = bucket.place("");
    let client = place.client.clone();
    place.wait(async move { client.set_versioning(Versioning::Suspended).await }).unwrap();
    let error = run(driver.cut(&context, &cut_id(1))).unwrap_err();
    assert!(error.is_temporary() && error.message().contains("versioning"), "{error:?}");
    // Prepared again, the bucket is one without versions, whose objects have a `null` version.
    bucket.put("p/null", "x");
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, drained.losses.len(), tree.files()["objects/null"].as_slice()), (21, 0, &b"x"[..]));
}

#[test]
fn a_proxy_whose_clock_differs_loses_no_object() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_proxy_whose_clock_differs_loses_no_object", why),
    };
    for (versions, difference) in [(true, "2s"), (false, "2s"), (true, "0s"), (false, "0s")] {
        let bucket = filled(&rig, versions);
        // What is written now is dated a second later than the cut.
        let shifted = behind_clock(&bucket, -1);
        std::thread::sleep(std::time::Duration::from_millis(3_100));
        let driver = shifted.open("p", json!({ "clockDifference": difference }));
        let context = Context::default();
        run(driver.prepare(&context)).unwrap();
        bucket.put("p/new", "acknowledged before the cut");
        bucket.put("p/3", "overwritten before the cut");
        let pinned = run(driver.cut(&context, &cut_id(1))).unwrap();
        let (point, drained) = drain(&driver, &pinned, None).unwrap();
        let has_new = point.tree.files().contains_key("objects/new");
        assert_eq!(has_new, difference == "2s", "versions: {versions}");
        if difference == "2s" && versions {
            assert_eq!(point.tree.files()["objects/3"], [3; 500]);
            let doubts = drained.notes.iter().find(|note| note.starts_with("of 2 objects")).unwrap();
            assert!(doubts.contains("`3`") && doubts.contains("`new`"), "{doubts}");
        }
    }
}

#[test]
fn tags_are_never_lost_for_want_of_a_privilege_or_of_a_count() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("tags_are_never_lost_for_want_of_a_privilege_or_of_a_count", why),
    };
    for versions in [true, false] {
        let bucket = filled(&rig, versions);
        let tags = vec![("x-amz-tagging".to_owned(), b"stage=production".to_vec())];
        super::versions::put_with(&bucket, b"p/tagged", tags, b"small".to_vec());
        let tags_of = |tree: &stillpoint_testkit::MemoryTree| {
            use stillpoint_core::tree::Tree;
            let path = stillpoint_core::tree::TreePath::parse("objects/tagged").unwrap();
            let node = tree.get(&path).unwrap().unwrap();
            crate::objects::bucket::facts::fact(&node.meta.xattrs, "tags").map(<[u8]>::to_vec)
        };
        let refuse = |line: &str| {
            let asks = line.starts_with("GET") && line.contains("tagging=");
            asks.then(|| answer("403 Forbidden", "", "AccessDenied"))
        };
        let strip =
            |head: String| with_header(&with_header(&head, "x-amz-tagging-count", |_| None), "server", |_| None);
        let denied = Bucket { rig: editing_proxy(&rig, Arc::new(refuse), Arc::new(strip)), ..bucket.clone() };
        let error = prepare(&denied);
        assert_eq!(error.kind(), Kind::PermissionDenied);
        assert!(error.hint_text().unwrap().contains("Tagging on it"), "{error:?}");
        let probe = run(denied.open("p", json!({})).probe(&Context::default())).unwrap();
        assert!(probe.missing_privileges.iter().any(|text| text.contains("Tagging")), "{probe:?}");
        assert_eq!(tags_of(&back_up(&denied.open("p", json!({ "tags": false })), None).0), None);
        // Neither a count nor a name that tells that there would be one.
        let silent = Bucket { rig: editing_proxy(&rig, Arc::new(|_| None), Arc::new(strip)), ..bucket.clone() };
        assert_eq!(tags_of(&back_up(&silent.open("p", json!({})), None).0), Some(b"stage=production".to_vec()));
        assert_eq!(tags_of(&back_up(&bucket.open("p", json!({})), None).0), Some(b"stage=production".to_vec()));
    }
}

#[test]
fn an_object_that_goes_before_its_tags_are_read_is_named_and_fails_no_point() {
    let name = "an_object_that_goes_before_its_tags_are_read_is_named_and_fails_no_point";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let absent = || Some(answer("404 Not Found", "", "NoSuchKey"));
    for versions in [true, false] {
        let bucket = filled(&rig, versions);
        for key in [&b"p/3"[..], b"p/4"] {
            let tags = vec![("x-amz-tagging".to_owned(), b"stage=production".to_vec())];
            super::versions::put_with(&bucket, key, tags, b"small".to_vec());
        }
        let gone = through(&bucket, move |line| {
            let asks = line.contains("/p/3") && (line.contains("tagging=") || line.starts_with("HEAD"));
            if asks { absent() } else { None }
        });
        let (_, drained) = back_up(&gone.open("p", json!({})), None);
        let lost: Vec<_> = drained.losses.iter().map(|loss| loss.what.as_str()).collect();
        assert_eq!((drained.items, lost), (19, vec!["3"]));
        // An object that is there is never called gone.
        let odd = through(
            &bucket,
            move |line| {
                if line.contains("/p/3") && line.contains("tagging=") { absent() } else { None }
            },
        );
        let driver = odd.open("p", json!({}));
        assert_eq!(drain(&driver, &pin(&driver, 1), None).unwrap_err().kind(), Kind::NotFound);
        // What is refused for one object alone says nothing of the others.
        let refuse = |line: &str| {
            let asks = line.contains("/p/3") && line.contains("tagging=");
            asks.then(|| answer("405 Method Not Allowed", "", "MethodNotAllowed"))
        };
        let strip =
            |head: String| with_header(&with_header(&head, "x-amz-tagging-count", |_| None), "server", |_| None);
        let alone = Bucket { rig: editing_proxy(&rig, Arc::new(refuse), Arc::new(strip)), ..bucket.clone() };
        let (tree, drained) = back_up(&alone.open("p", json!({ "connections": 1 })), None);
        assert_eq!((drained.items, drained.losses.len()), (20, 0));
        use stillpoint_core::tree::Tree;
        let path = stillpoint_core::tree::TreePath::parse("objects/4").unwrap();
        let node = tree.get(&path).unwrap().unwrap();
        let tags = crate::objects::bucket::facts::fact(&node.meta.xattrs, "tags");
        assert_eq!(tags, Some(&b"stage=production"[..]));
    }
}
