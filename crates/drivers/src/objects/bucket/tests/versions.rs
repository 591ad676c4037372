//! Versioned buckets: the view holds whatever happens; and all that belongs to an object comes back.

use std::collections::BTreeSet;

use serde_json::json;
use stillpoint_core::capability::PinKind;
use stillpoint_core::driver::{Context, EdgeQuery, RestoreMode};
use stillpoint_core::error::Kind;
use stillpoint_testkit::skip;

use super::rig::{Bucket, Rig};
use crate::objects::bucket::facts;
use crate::objects::bucket::verbs::Which;
use crate::trial::{back_up, cut_id, differences, drain, edges, restore, run};

fn header(name: &str, value: &str) -> (String, Vec<u8>) {
    (name.to_owned(), value.as_bytes().to_vec())
}

/// Writes with our own client, which can send every key and header.
pub fn put_with(bucket: &Bucket, key: &[u8], headers: Vec<(String, Vec<u8>)>, body: Vec<u8>) {
    let (place, key) = (bucket.place(""), key.to_vec());
    let client = place.client.clone();
    place.wait(async move { client.put(&key, &headers, body.into()).await.map(drop) }).unwrap();
}

pub fn put_in_parts(bucket: &Bucket, key: &str, headers: Vec<(String, Vec<u8>)>, parts: Vec<Vec<u8>>) {
    let (place, key) = (bucket.place(""), key.as_bytes().to_vec());
    let client = place.client.clone();
    let work = async move {
        let upload = client.begin_upload(&key, &headers).await?;
        let (mut done, size) = (Vec::new(), parts.iter().map(|part| part.len() as u64).sum());
        for (index, part) in parts.into_iter().enumerate() {
            done.push(client.put_part(&key, &upload, index + 1, part.into()).await?);
        }
        client.complete_upload(&key, &upload, &done, size, false).await.map(drop)
    };
    place.wait(work).unwrap();
}

#[test]
fn what_is_overwritten_or_deleted_after_the_cut_is_still_read() {
    let name = "what_is_overwritten_or_deleted_after_the_cut_is_still_read";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(true);
    for key in ["p/kept", "p/overwritten", "p/deleted", "p/deleted-before", "p/large", "elsewhere"] {
        bucket.put(key, "old");
    }
    let large: Vec<u8> = (0..20_000_000u32).map(|number| (number >> 8) as u8).collect();
    bucket.put("p/large", &large);
    bucket.delete("p/deleted-before");
    let driver = bucket.open("p", json!({}));
    let context = Context::default();
    let probe = run(driver.probe(&context)).unwrap();
    assert_eq!((probe.capability.pin, probe.missing_privileges.len(), probe.warnings.len()), (PinKind::Set, 0, 0));
    run(driver.prepare(&context)).unwrap();
    bucket.put("p/early", "before the cut, after prepare");
    let pinned = run(driver.cut(&context, &cut_id(1))).unwrap();
    assert_eq!(run(driver.cut(&context, &cut_id(1))).unwrap(), pinned);
    bucket.put("p/late", "new");
    bucket.put("p/overwritten", "newer");
    bucket.put("p/large", "small now");
    bucket.delete("p/deleted");
    bucket.put("p/deleted-before", "here again");
    let (point, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!((drained.losses.as_slice(), point.torn.as_slice()), (&[][..], &[][..]));
    let files = point.tree.files();
    let names: Vec<_> = files.keys().filter_map(|path| path.strip_prefix("objects/")).collect();
    assert_eq!(names, ["deleted", "early", "kept", "large", "overwritten"]);
    assert!(
        files["objects/deleted"] == b"old" && files["objects/overwritten"] == b"old" && files["objects/large"] == large
    );
    let held: BTreeSet<_> =
        edges(&driver, Some(&pinned), &EdgeQuery::Held("keys".to_owned())).unwrap().into_iter().collect();
    assert_eq!(held.len(), 5);
    assert!(drained.notes.iter().any(|note| note.contains("came after the cut")), "{:?}", drained.notes);
    // The next point shows what is there by then, and reads only that.
    let (second, drained) = back_up(&driver, Some(&point.tree));
    assert_eq!(second.files()["objects/overwritten"], b"newer");
    assert_eq!((drained.items, drained.bytes_read), (6, 5 + 3 + 9 + 10));
}

#[test]
fn all_that_belongs_to_an_object_comes_back() {
    let name = "all_that_belongs_to_an_object_comes_back";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    for versions in [true, false] {
        let bucket = rig.bucket(versions);
        let headers = vec![
            header("content-type", "text/x-sample"),
            header("content-encoding", "zstd"),
            header("content-language", "de"),
            header("content-disposition", "attachment; filename=\"a  b\""),
            header("cache-control", "no-cache"),
            header("expires", "Tue, 01 Jan 2030 00:00:00 GMT"),
            header("x-amz-website-redirect-location", "/elsewhere"),
            header("x-amz-meta-team", "ml ops"),
            header("x-amz-tagging", "stage=production&of=b%2Bb%20c"),
            header("x-amz-checksum-sha256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
        ];
        put_with(&bucket, b"p/plain", headers.clone(), b"hello".to_vec());
        let parts = vec![vec![1; 6 << 20], vec![2; 5 << 20], vec![3; 100]];
        let some = headers.iter().filter(|(name, _)| !name.contains("checksum")).cloned().collect();
        put_in_parts(&bucket, "p/uneven", some, parts);
        put_in_parts(&bucket, "p/even", Vec::new(), vec![vec![4; 8 << 20], vec![5; 8 << 20], vec![6; 1 << 20]]);
        put_in_parts(&bucket, "p/one-part", Vec::new(), vec![vec![7; 10]]);
        put_with(&bucket, b"p/empty", Vec::new(), Vec::new());
        let driver = bucket.open("p", json!({}));
        let (tree, drained) = back_up(&driver, None);
        assert_eq!((drained.items, drained.losses.len()), (5, 0), "{drained:?}");
        let copy = rig.absent();
        let refused = restore(&copy.open("q", json!({})), &tree, RestoreMode::Fresh, None).unwrap_err();
        assert_eq!((refused.kind(), refused.hint_text()), (Kind::NotFound, Some("create it, or set `create: true`")));
        let target = copy.open("q", json!({ "create": true }));
        let restored = restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!((restored.items, restored.losses.len()), (5, 0), "{restored:?}");
        // Sizes and tags of both, as another client sees them: those of parts as well.
        assert_eq!(copy.listed("q"), bucket.listed("p"));
        assert_eq!(differences(&target, &tree), Vec::<String>::new());
        let facts_of = |bucket: &Bucket, key: &str| {
            let (place, key) = (bucket.place(""), key.as_bytes().to_vec());
            let client = place.client.clone();
            let attributes = place.wait(async move {
                let answer = client.head(Which::newest(&key), None).await?;
                Ok(facts::of_headers(&answer.headers))
            });
            facts::compared(&attributes.unwrap())
        };
        // MinIO forgets where a website would lead.
        assert_eq!(facts_of(&copy, "q/plain").len(), 7, "{:?}", facts_of(&copy, "q/plain"));
        for key in ["plain", "uneven"] {
            assert_eq!(facts_of(&copy, &format!("q/{key}")), facts_of(&bucket, &format!("p/{key}")));
        }
        assert_eq!(back_up(&target, None).0.files()["objects/even"].len(), 17 << 20);
        // A tag that changed is a difference, as is a byte.
        put_with(&copy, b"q/plain", vec![header("content-type", "text/x-sample")], b"hello".to_vec());
        let found = differences(&target, &tree);
        assert!(found.len() == 1 && found[0].starts_with("`plain` differs in its"), "{found:?}");
        let status = copy.place("").versioning().unwrap();
        assert_eq!(format!("{status:?}"), if versions { "Enabled" } else { "Never" });
    }
}

#[test]
fn locks_are_set_last_and_only_if_asked_for() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("locks_are_set_last_and_only_if_asked_for", why),
    };
    let bucket = rig.absent();
    let place = bucket.place("");
    let client = place.client.clone();
    place.wait(async move { client.create(true).await }).unwrap();
    let until = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let until = jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", until).unwrap();
    let digest = "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=";
    let held = [header("x-amz-object-lock-legal-hold", "ON"), header("x-amz-checksum-sha256", digest)];
    put_with(&bucket, b"p/held", held.to_vec(), b"hello".to_vec());
    let retained = [
        header("x-amz-object-lock-mode", "GOVERNANCE"),
        header("x-amz-object-lock-retain-until-date", &until),
        header("x-amz-checksum-sha256", digest),
    ];
    put_with(&bucket, b"p/retained", retained.to_vec(), b"hello".to_vec());
    put_with(&bucket, b"p/free", Vec::new(), b"hello".to_vec());
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
    let over = jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", soon).unwrap();
    let mut short = retained.to_vec();
    short[1] = header("x-amz-object-lock-retain-until-date", &over);
    put_with(&bucket, b"p/over", short, b"hello".to_vec());
    let (tree, drained) = back_up(&bucket.open("p", json!({})), None);
    assert_eq!((drained.items, drained.losses.len()), (4, 0));
    // The service refuses a retention that has ended.
    while jiff::Timestamp::now() <= soon {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let locks_of = |bucket: &Bucket, key: &'static str| {
        let place = bucket.place("p");
        let client = place.client.clone();
        place
            .wait(async move {
                Ok(facts::of_headers(&client.head(Which::newest(format!("p/{key}").as_bytes()), None).await?.headers))
            })
            .unwrap()
            .into_iter()
            .filter(|(name, _)| name.ends_with(b"legal-hold") || name.windows(5).any(|part| part == b"lock-"))
            .collect::<Vec<_>>()
    };
    let copy = rig.absent();
    let restored =
        restore(&copy.open("p", json!({ "create": true, "lock": true })), &tree, RestoreMode::Fresh, None).unwrap();
    assert_eq!(restored.items, 4);
    assert!(restored.losses.iter().any(|loss| loss.why.contains("ended")), "{restored:?}");
    assert_eq!(locks_of(&copy, "over").len(), 0);
    for key in ["held", "retained", "free"] {
        assert_eq!(locks_of(&copy, key), locks_of(&bucket, key), "{key}");
    }
    assert_eq!((locks_of(&copy, "held").len(), locks_of(&copy, "retained").len()), (1, 2));
    let copy = rig.absent();
    let restored = restore(&copy.open("p", json!({ "create": true })), &tree, RestoreMode::Fresh, None).unwrap();
    assert!(
        restored.losses.iter().any(|loss| loss.what == "3 objects" && loss.why.contains("lock: true")),
        "{restored:?}"
    );
    assert_eq!(locks_of(&copy, "held").len(), 0);
}

#[test]
fn odd_keys_come_back() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("odd_keys_come_back", why),
    };
    let bucket = rig.bucket(true);
    let long = format!("long/{}/{}", "x".repeat(250), "é".repeat(120));
    let odd = [
        "trail/",
        "tab\there",
        "new\nline",
        "é日 b+c&<>\"'",
        "a",
        "a!",
        "%41",
        "100%",
        "...",
        &long,
        "q?x=1#y",
        "\u{1}\u{7f}",
    ];
    for key in odd {
        put_with(&bucket, format!("p/{key}").as_bytes(), Vec::new(), key.as_bytes().to_vec());
    }
    let driver = bucket.open("p", json!({}));
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, drained.losses.len()), (odd.len() as u64, 0));
    assert_eq!(back_up(&driver, Some(&tree)).1.bytes_read, 0);
    let copy = rig.bucket(false);
    let target = copy.open("", json!({}));
    restore(&target, &tree, RestoreMode::Fresh, None).unwrap();
    assert_eq!(differences(&target, &tree), Vec::<String>::new());
    let held: BTreeSet<_> =
        edges(&target, None, &EdgeQuery::Held("keys".to_owned())).unwrap().into_iter().map(|e| e.referent).collect();
    assert_eq!(held, odd.iter().map(|key| key.as_bytes().to_vec()).collect());
}

#[test]
fn a_bucket_is_set_back_in_time_and_keeps_its_history() {
    let name = "a_bucket_is_set_back_in_time_and_keeps_its_history";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(true);
    for key in ["p/a/1", "p/a/2", "p/b", "p/c", "outside"] {
        bucket.put(key, format!("{key} first"));
    }
    let driver = bucket.open("p", json!({}));
    let (tree, _) = back_up(&driver, None);
    bucket.put("p/a/1", "second");
    bucket.put("p/b", "second");
    bucket.delete("p/c");
    bucket.put("p/new", "second");
    bucket.put("outside", "second");
    let restored = restore(&driver, &tree, RestoreMode::InPlace, Some("a")).unwrap();
    assert_eq!((restored.items, bucket.get("p/b")), (1, b"second".to_vec()));
    // One of the old versions is gone for good: its bytes come from the point.
    let place = bucket.place("p");
    let mut old = None;
    place
        .versions(&Context::default(), &mut |entry| {
            if entry.key == b"b" {
                old = entry.version;
            }
            Ok(())
        })
        .unwrap();
    let client = place.client.clone();
    place.wait(async move { client.delete(Which { key: b"p/b", version: old.as_deref() }).await }).unwrap();
    let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    assert_eq!((restored.items, restored.kept_old.len()), (4, 1), "{restored:?}");
    for key in ["p/a/1", "p/a/2", "p/b", "p/c"] {
        assert_eq!(bucket.get(key), format!("{key} first").into_bytes());
    }
    assert_eq!(bucket.get("outside"), b"second");
    assert_eq!(differences(&driver, &tree), Vec::<String>::new());
    // What came since is hidden, not destroyed.
    let mut versions = Vec::new();
    let take = &mut |entry: crate::objects::bucket::answers::Entry| {
        versions.extend((entry.key == b"new").then_some(entry.is_marker));
        Ok(())
    };
    place.versions(&Context::default(), take).unwrap();
    assert_eq!(versions, [true, false]);
    // A bucket without versions is not touched.
    let plain = rig.bucket(false);
    plain.put("p/b", "only");
    let refused = restore(&plain.open("p", json!({})), &tree, RestoreMode::InPlace, None).unwrap_err();
    assert_eq!((refused.kind(), plain.get("p/b")), (Kind::Unsupported, b"only".to_vec()));
}

#[test]
fn an_unchanged_bucket_costs_a_listing_and_no_read() {
    let name = "an_unchanged_bucket_costs_a_listing_and_no_read";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(true);
    for number in 0..200 {
        bucket.put(&format!("p/{}/{number}", number % 7), [number as u8; 100]);
    }
    let (driver, objects) = bucket.open_counted("p");
    let requests = || match &objects.place {
        crate::objects::Where::S3(s3) => s3.client.counts(),
        _ => unreachable!("it is a bucket"),
    };
    let (tree, _) = back_up(&driver, None);
    let before = requests().0;
    let (again, drained) = back_up(&driver, Some(&tree));
    assert_eq!((drained.items, drained.bytes_read), (200, 0));
    assert!(requests().0 - before < 40, "{} requests", requests().0 - before);
    assert_eq!(again.files().len(), tree.files().len());
}

#[test]
fn an_interrupted_restore_is_repeated() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("an_interrupted_restore_is_repeated", why),
    };
    let bucket = rig.bucket(true);
    for number in 0..30 {
        bucket.put(&format!("p/{number}"), [number as u8; 1000]);
    }
    let (tree, _) = back_up(&bucket.open("p", json!({})), None);
    let copy = rig.bucket(true);
    let target = copy.open("p", json!({}));
    let failing = stillpoint_testkit::fault::FailingTree::new(&tree, 12);
    restore(&target, &failing, RestoreMode::Fresh, None).unwrap_err();
    let there = copy.listed("p").len();
    assert!(there > 0 && there < 30, "{there}");
    assert_eq!(restore(&target, &tree, RestoreMode::Fresh, None).unwrap().items, 30);
    assert_eq!(copy.listed("p"), bucket.listed("p"));
    assert_eq!(differences(&target, &tree), Vec::<String>::new());
    // Once done, the bucket is like any other that holds something.
    assert_eq!(restore(&target, &tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::AlreadyExists);
}

#[test]
fn later_tries_go_on_with_what_the_first_one_began_though_they_come_in_place() {
    let name = "later_tries_go_on_with_what_the_first_one_began_though_they_come_in_place";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(true);
    for number in 0..30 {
        bucket.put(&format!("p/{number}"), [number as u8; 1000]);
    }
    let (tree, _) = back_up(&bucket.open("p", json!({})), None);
    for versions in [true, false] {
        let copy = rig.bucket(versions);
        let target = copy.open("p", json!({}));
        let try_again = |tree: &dyn stillpoint_core::tree::Tree, restore: &str| {
            let mode = RestoreMode::InPlace;
            let request = stillpoint_core::driver::RestoreRequest { mode, part: None, restore: restore.to_owned() };
            run(target.restore(&Context::default(), tree, &request))
        };
        let failing = stillpoint_testkit::fault::FailingTree::new(&tree, 12);
        restore(&target, &failing, RestoreMode::Fresh, None).unwrap_err();
        let failing = stillpoint_testkit::fault::FailingTree::new(&tree, 20);
        let died = try_again(&failing, "r1-try2").unwrap_err();
        assert_ne!(died.kind(), Kind::Unsupported, "{died:?}");
        assert_eq!(try_again(&tree, "r1-try3").unwrap().items, 30);
        assert_eq!(copy.listed("p"), bucket.listed("p"));
        // Once it has ended, in place means what it says.
        copy.put("p/0", "second");
        let again = try_again(&tree, "r1-try4");
        match versions {
            true => assert_eq!((again.unwrap().items, copy.get("p/0")), (30, vec![0; 1000])),
            false => assert_eq!(again.unwrap_err().kind(), Kind::Unsupported),
        }
    }
}

#[test]
fn uploads_that_are_under_way_are_seen_before_the_cut() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("uploads_that_are_under_way_are_seen_before_the_cut", why),
    };
    let bucket = rig.bucket(true);
    // MinIO lists only uploads of the very key that is asked for.
    let mut place = bucket.place("");
    place.prefix = "p/slow".to_owned();
    let client = place.client.clone();
    place.wait(async move { client.begin_upload(b"p/slow", &[]).await.map(drop) }).unwrap();
    let later = stillpoint_core::tree::FileTime { seconds: jiff::Timestamp::now().as_second() + 1000, nanos: 0 };
    let from = place.uploads_from(later).unwrap();
    assert!(from.seconds < later.seconds - 900, "{from:?}");
    place.prefix = "q".to_owned();
    assert_eq!(place.uploads_from(later).unwrap().seconds, later.seconds - 2);
    let denied = super::faults::through(&bucket, |line| {
        line.contains("uploads=").then(|| super::faults::answer("403 Forbidden", "", "AccessDenied"))
    });
    assert_eq!(denied.place("p").uploads_from(later).unwrap().seconds, i64::MIN);
}

#[test]
fn options_that_would_have_no_effect_are_refused() {
    let client = |name: &str| {
        let options = [("region".to_owned(), "us-east-1".to_owned()), (name.to_owned(), "x".to_owned())];
        let url = url::Url::parse("s3://bucket").unwrap();
        crate::objects::bucket::request::Client::new(&url, &options, None)
    };
    for name in ["aws_server_side_encryption", "aws_sse_kms_key_id", "unsigned_payload", "timeout", "aws_s3_express"] {
        let error = client(name).err().unwrap();
        assert!(error.kind() == Kind::Config && error.message().contains(name), "{error:?}");
    }
    assert!(client("session_token").is_ok());
}

#[test]
fn an_interrupted_restore_is_repeated_where_entity_tags_do_not_come_out_alike() {
    let name = "an_interrupted_restore_is_repeated_where_entity_tags_do_not_come_out_alike";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(false);
    put_in_parts(&bucket, "p/a-large", Vec::new(), vec![vec![1; 5 << 20], vec![2; 100]]);
    for number in 0..30 {
        bucket.put(&format!("p/{number}"), [number as u8; 1000]);
    }
    // A service that does not tell parts: what was written in parts comes back whole, with another tag.
    let silent = super::faults::through(&bucket, |line| {
        let asks = line.starts_with("HEAD") && line.contains("partNumber=");
        asks.then(|| super::faults::answer("501 Not Implemented", "", "NotImplemented"))
    });
    let (tree, _) = back_up(&silent.open("p", json!({})), None);
    let copy = rig.bucket(false);
    let target = copy.open("q", json!({ "connections": 1 }));
    let failing = stillpoint_testkit::fault::FailingTree::new(&tree, 28);
    restore(&target, &failing, RestoreMode::Fresh, None).unwrap_err();
    let begun = copy.listed("q");
    assert!(begun.contains_key("a-large") || begun.len() > 10, "{begun:?}");
    assert_eq!(restore(&target, &tree, RestoreMode::Fresh, None).unwrap().items, 31);
    assert_ne!(copy.listed("q")["a-large"], bucket.listed("p")["a-large"]);
    assert_eq!(differences(&target, &tree), Vec::<String>::new());
    // Another object of the same size is no earlier try.
    let other = rig.bucket(false);
    other.put("q/.stillpoint-restore.json", "r1");
    other.put("q/a-large", vec![9; (5 << 20) + 100]);
    let refused = restore(&other.open("q", json!({})), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(refused.kind(), Kind::AlreadyExists);
}

#[test]
fn a_bucket_that_a_restore_made_keeps_versions_however_often_it_is_tried() {
    let name = "a_bucket_that_a_restore_made_keeps_versions_however_often_it_is_tried";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    let bucket = rig.bucket(true);
    bucket.put("p/a", "a");
    let (tree, _) = back_up(&bucket.open("p", json!({})), None);
    let copy = rig.absent();
    // It dies before versions are kept.
    let dying = super::faults::through(&copy, |line| {
        let sets = line.starts_with("PUT") && line.contains("versioning=");
        sets.then(|| super::faults::answer("403 Forbidden", "", "AccessDenied"))
    });
    let create = json!({ "create": true });
    restore(&dying.open("q", create.clone()), &tree, RestoreMode::Fresh, None).unwrap_err();
    assert_eq!(restore(&copy.open("q", create), &tree, RestoreMode::Fresh, None).unwrap().losses.len(), 0);
    assert_eq!(copy.place("").versioning().unwrap(), crate::objects::bucket::answers::Versioning::Enabled);
    // A bucket of somebody else's is not changed, and what it does not keep is named.
    let plain = rig.bucket(false);
    let restored = restore(&plain.open("q", json!({ "create": true })), &tree, RestoreMode::Fresh, None).unwrap();
    assert!(restored.losses.iter().any(|loss| loss.what.contains("versions")), "{restored:?}");
    assert_eq!(plain.place("").versioning().unwrap(), crate::objects::bucket::answers::Versioning::Never);
}

#[test]
fn tags_that_change_under_the_same_bytes_are_followed_or_named() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("tags_that_change_under_the_same_bytes_are_followed_or_named", why),
    };
    let bucket = rig.bucket(true);
    put_with(&bucket, b"p/a", vec![header("x-amz-tagging", "stage=trial")], b"bytes".to_vec());
    put_in_parts(&bucket, "p/b", Vec::new(), vec![vec![1; 5 << 20], vec![2; 100]]);
    let tags_of = |tree: &stillpoint_testkit::MemoryTree| {
        use stillpoint_core::tree::Tree;
        let path = stillpoint_core::tree::TreePath::parse("objects/a").unwrap();
        let node = tree.get(&path).unwrap().unwrap();
        String::from_utf8(facts::fact(&node.meta.xattrs, "tags").unwrap().to_vec()).unwrap()
    };
    let (first, _) = back_up(&bucket.open("p", json!({})), None);
    let place = bucket.place("");
    let client = place.client.clone();
    let text = "<Tagging><TagSet><Tag><Key>stage</Key><Value>production</Value></Tag></TagSet></Tagging>";
    place
        .wait(async move { client.put_document(b"p/a", "tagging", "s3:PutObjectTagging", text.into()).await })
        .unwrap();
    let (second, drained) = back_up(&bucket.open("p", json!({})), Some(&first));
    assert_eq!((tags_of(&second).as_str(), drained.bytes_read), ("stage=trial", 0));
    assert!(drained.notes.iter().any(|note| note.contains("refresh: true")), "{:?}", drained.notes);
    let (third, drained) = back_up(&bucket.open("p", json!({ "refresh": true })), Some(&second));
    assert_eq!((tags_of(&third).as_str(), drained.bytes_read), ("stage=production", 0));
    assert!(!drained.notes.iter().any(|note| note.contains("refresh: true")), "{:?}", drained.notes);
    let copy = rig.bucket(false);
    let target = copy.open("p", json!({}));
    restore(&target, &third, RestoreMode::Fresh, None).unwrap();
    assert_eq!((copy.listed("p"), differences(&target, &third)), (bucket.listed("p"), Vec::new()));
}
