//! Points that hold no bytes: mirrors and references.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::json;
use stillpoint_core::driver::{Context, RestoreMode, Validity};
use stillpoint_core::error::Kind;
use stillpoint_testkit::skip;

use super::faults;
use super::rig::Rig;
use super::versions::put_in_parts;
use crate::objects::bucket::answers::Versioning;
use crate::objects::bucket::verbs::Which;
use crate::trial::{back_up, differences, drain, pin, restore, run};

#[test]
fn a_mirror_holds_copies_and_gives_them_back() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_mirror_holds_copies_and_gives_them_back", why),
    };
    let (bucket, mirror) = (rig.bucket(true), rig.bucket(true));
    for number in 0..20 {
        bucket.put(&format!("p/a/{number}"), [number as u8; 2000]);
    }
    bucket.put("p/b", "old");
    let settings = json!({ "mode": "mirror", "mirror": format!("s3://{}/copies", mirror.name) });
    let driver = bucket.open("p", settings);
    let pinned = pin(&driver, 1);
    bucket.put("p/b", "new");
    let (point, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!((drained.items, drained.losses.len(), drained.bytes), (21, 0, 40_003));
    assert!(point.tree.files().keys().all(|path| !path.starts_with("objects/")));
    assert_eq!(mirror.get("copies/b"), b"old");
    // The second point copies what changed, and keeps the earlier copy.
    let (second, drained) = back_up(&driver, Some(&point.tree));
    assert_eq!((drained.items, drained.bytes_read), (21, 3));
    assert_eq!(mirror.get("copies/b"), b"new");
    for (tree, expected) in [(&point.tree, "old"), (&second, "new")] {
        let copy = rig.bucket(false);
        let target = copy.open("q", json!({}));
        assert_eq!(restore(&target, tree, RestoreMode::Fresh, None).unwrap().items, 21);
        assert_eq!((copy.get("q/b"), copy.get("q/a/7")), (expected.as_bytes().to_vec(), vec![7; 2000]));
        assert_eq!(differences(&target, tree), Vec::<String>::new());
        copy.put("q/b", "broken");
        assert_eq!(differences(&target, tree), ["`b` has 6 bytes instead of 3"]);
        copy.delete("q/b");
        let part = rig.bucket(false);
        assert_eq!(restore(&part.open("", json!({})), tree, RestoreMode::Fresh, Some("objects/b")).unwrap().items, 1);
        assert_eq!(part.listed("").keys().collect::<Vec<_>>(), ["b"]);
    }
    // A copy that somebody removed is made again.
    let place = mirror.place("copies");
    let mut versions = Vec::new();
    place
        .versions(&Context::default(), &mut |entry| {
            versions.extend((entry.key == b"a/3").then_some(entry.version.unwrap()));
            Ok(())
        })
        .unwrap();
    let client = place.client.clone();
    place.wait(async move { client.delete(Which { key: b"copies/a/3", version: Some(&versions[0]) }).await }).unwrap();
    let (third, drained) = back_up(&driver, Some(&second));
    assert_eq!(drained.bytes_read, 2000);
    let copy = rig.bucket(false);
    assert_eq!(restore(&copy.open("", json!({})), &third, RestoreMode::Fresh, None).unwrap().items, 21);
    let gone = restore(&rig.bucket(false).open("", json!({})), &second, RestoreMode::Fresh, None).unwrap_err();
    assert!(gone.kind() == Kind::NotFound && gone.to_string().contains("`a/3`"), "{gone:?}");
    // Without versions, copies would replace each other.
    let plain = rig.bucket(false);
    let driver = bucket.open("p", json!({ "mode": "mirror", "mirror": format!("s3://{}", plain.name) }));
    let refused = run(driver.prepare(&Context::default())).unwrap_err();
    assert!(refused.to_string().contains("keeps no versions"), "{refused:?}");
}

#[test]
fn a_mirror_whose_copies_have_other_tags_comes_back() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_mirror_whose_copies_have_other_tags_comes_back", why),
    };
    // A service that does not tell parts: copies are made whole, and get a tag of their own.
    let rig = faults::proxy(
        &rig,
        std::sync::Arc::new(|line: &str| {
            let asks = line.starts_with("HEAD") && line.contains("partNumber=");
            asks.then(|| faults::answer("501 Not Implemented", "", "NotImplemented"))
        }),
    );
    let (bucket, mirror, copy) = (rig.bucket(true), rig.bucket(true), rig.bucket(false));
    put_in_parts(&bucket, "p/large", Vec::new(), vec![vec![1; 5 << 20], vec![2; 100]]);
    let driver = bucket.open("p", json!({ "mode": "mirror", "mirror": format!("s3://{}/copies", mirror.name) }));
    let (tree, drained) = back_up(&driver, None);
    assert_eq!((drained.items, drained.losses.len()), (1, 0));
    assert_ne!(mirror.listed("copies")["large"], bucket.listed("p")["large"]);
    let target = copy.open("q", json!({}));
    assert_eq!(restore(&target, &tree, RestoreMode::Fresh, None).unwrap().items, 1);
    assert_eq!(differences(&target, &tree), Vec::<String>::new());
    copy.put("q/large", vec![3; (5 << 20) + 100]);
    assert_eq!(differences(&target, &tree), ["`large` has other bytes than its source"]);
}

#[test]
fn a_reference_needs_versions_and_says_what_becomes_of_them() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_reference_needs_versions_and_says_what_becomes_of_them", why),
    };
    let bucket = rig.bucket(false);
    bucket.put("p/a", "written before versions were kept");
    let driver = bucket.open("p", json!({ "mode": "reference" }));
    let refused = run(driver.prepare(&Context::default())).unwrap_err();
    assert_eq!((refused.kind(), refused.hint_text()), (Kind::Config, Some("switch versioning on, or use mode: copy")));
    let place = bucket.place("");
    let client = place.client.clone();
    place.wait(async move { client.set_versioning(Versioning::Enabled).await }).unwrap();
    bucket.put("p/b", "old");
    let pinned = pin(&driver, 1);
    bucket.put("p/a", "new");
    bucket.delete("p/b");
    let (point, drained) = drain(&driver, &pinned, None).unwrap();
    assert_eq!((drained.items, drained.bytes_read, drained.losses.len()), (2, 0, 0));
    assert!(drained.notes.iter().any(|note| note.contains("holds no bytes")), "{:?}", drained.notes);
    assert_eq!(run(driver.still_valid(&Context::default(), &pinned)).unwrap(), Validity::Valid);
    let copy = rig.bucket(false);
    let target = copy.open("", json!({}));
    assert_eq!(restore(&target, &point.tree, RestoreMode::Fresh, None).unwrap().items, 2);
    assert_eq!((copy.get("a"), copy.get("b")), (b"written before versions were kept".to_vec(), b"old".to_vec()));
    assert_eq!(differences(&target, &point.tree), Vec::<String>::new());
    // In place, the service copies its own versions over.
    assert_eq!(restore(&driver, &point.tree, RestoreMode::InPlace, None).unwrap().items, 2);
    assert_eq!(bucket.listed("p").keys().collect::<Vec<_>>(), ["a", "b"]);
    // Once versions are not kept any more, nothing protects what is referred to.
    let client = place.client.clone();
    let pinned = pin(&driver, 2);
    place.wait(async move { client.set_versioning(Versioning::Suspended).await }).unwrap();
    let lost = run(driver.still_valid(&Context::default(), &pinned)).unwrap();
    assert!(matches!(lost, Validity::Lost(_)), "{lost:?}");
    // Bytes cannot be made of a reference elsewhere.
    let folder = tempfile::tempdir().unwrap();
    let settings = json!({ "path": folder.path().join("x") });
    let directory = crate::trial::open(&crate::objects::REGISTRATION, settings, folder.path()).unwrap();
    assert_eq!(restore(&directory, &point.tree, RestoreMode::Fresh, None).unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn a_bucket_is_set_back_from_its_mirror_or_not_touched() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("a_bucket_is_set_back_from_its_mirror_or_not_touched", why),
    };
    let (bucket, mirror) = (rig.bucket(true), rig.bucket(true));
    for key in ["p/a", "p/b", "p/c"] {
        bucket.put(key, format!("{key} first"));
    }
    put_in_parts(&bucket, "p/large", Vec::new(), vec![vec![1; 5 << 20], vec![2; 100]]);
    let listed = bucket.listed("p");
    let settings = json!({ "mode": "mirror", "mirror": format!("s3://{}/copies", mirror.name) });
    let driver = bucket.open("p", settings);
    let (tree, _) = back_up(&driver, None);
    let remove = |bucket: &super::rig::Bucket, prefix: &str| {
        let place = bucket.place(prefix);
        let mut versions = Vec::new();
        let take = &mut |entry: crate::objects::bucket::answers::Entry| {
            versions.push((place.whole_key(&entry.key), entry.version));
            Ok(())
        };
        place.versions(&Context::default(), take).unwrap();
        for (key, version) in versions {
            let client = place.client.clone();
            place.wait(async move { client.delete(Which { key: &key, version: version.as_deref() }).await }).unwrap();
        }
    };
    // The versions of the source are gone: what mirrors are for.
    remove(&bucket, "p");
    bucket.put("p/b", "second");
    bucket.put("p/new", "second");
    let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    assert_eq!((restored.items, restored.losses.len()), (5, 0), "{restored:?}");
    assert_eq!((bucket.listed("p"), bucket.get("p/b")), (listed, b"p/b first".to_vec()));
    assert_eq!(differences(&driver, &tree), Vec::<String>::new());
    // What a copy does not take along is named where it was asked for.
    let asking =
        json!({ "mode": "mirror", "mirror": format!("s3://{}/copies", mirror.name), "acl": true, "lock": true });
    let copy = rig.bucket(true);
    let restored = restore(&copy.open("p", asking.clone()), &tree, RestoreMode::Fresh, None).unwrap();
    assert!(restored.losses.iter().any(|loss| loss.what.starts_with("locks and access control lists of 4")));
    bucket.put("p/b", "second");
    let restored = restore(&bucket.open("p", asking), &tree, RestoreMode::InPlace, None).unwrap();
    assert!(restored.losses.iter().any(|loss| loss.what.starts_with("locks and access control lists of 4")));
    // One copy is gone too: nothing is changed.
    remove(&bucket, "p");
    let place = mirror.place("copies");
    let mut gone = None;
    place
        .versions(&Context::default(), &mut |entry| {
            gone = gone.take().or((entry.key == b"c").then_some(entry.version.unwrap()));
            Ok(())
        })
        .unwrap();
    let client = place.client.clone();
    place.wait(async move { client.delete(Which { key: b"copies/c", version: gone.as_deref() }).await }).unwrap();
    bucket.put("p/b", "third");
    let refused = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap_err();
    assert!(refused.kind() == Kind::NotFound && refused.to_string().contains("`c`"), "{refused:?}");
    assert_eq!((bucket.listed("p").len(), bucket.get("p/b")), (1, b"third".to_vec()));
}

#[test]
fn copies_that_fail_late_are_tried_again_and_a_service_that_cannot_copy_is_no_loss_of_objects() {
    let name = "copies_that_fail_late_are_tried_again_and_a_service_that_cannot_copy_is_no_loss_of_objects";
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip(name, why),
    };
    // What copies are answered with, so many times, and what becomes of the restore.
    let cases = [
        ("200 OK", "InternalError", 2, Ok((1, 0))),
        ("200 OK", "SlowDown", 1, Ok((1, 0))),
        ("200 OK", "InvalidObjectState", u32::MAX, Ok((0, 1))),
        ("403 Forbidden", "InvalidObjectState", u32::MAX, Ok((0, 1))),
        ("200 OK", "InvalidRequest", u32::MAX, Err(Kind::Io)),
        ("405 Method Not Allowed", "MethodNotAllowed", u32::MAX, Err(Kind::Unsupported)),
        ("501 Not Implemented", "NotImplemented", u32::MAX, Err(Kind::Unsupported)),
    ];
    for (status, code, times, expected) in cases {
        let bucket = rig.bucket(true);
        let count = AtomicU32::new(0);
        let proxied = faults::through(&bucket, move |line| {
            let copies = line.starts_with("PUT") && line.contains("/p/a");
            (copies && count.fetch_add(1, Ordering::SeqCst) < times).then(|| faults::answer(status, "", code))
        });
        bucket.put("p/a", "first");
        let driver = proxied.open("p", json!({ "mode": "reference" }));
        let (tree, _) = back_up(&driver, None);
        bucket.put("p/a", "second");
        let restored = restore(&driver, &tree, RestoreMode::InPlace, None);
        let came_back = restored.as_ref().is_ok_and(|restored| restored.items == 1);
        let found = restored.map(|restored| (restored.items, restored.losses.len())).map_err(|error| error.kind());
        assert_eq!(found, expected, "{status} {code}");
        assert_eq!(bucket.get("p/a"), if came_back { &b"first"[..] } else { b"second" }, "{status} {code}");
    }
}

#[test]
fn an_upload_whose_end_was_not_heard_of_has_ended() {
    let rig = match Rig::find(false) {
        Ok(rig) => rig,
        Err(why) => return skip("an_upload_whose_end_was_not_heard_of_has_ended", why),
    };
    let bucket = rig.bucket(true);
    put_in_parts(&bucket, "p/large", Vec::new(), vec![vec![1; 5 << 20], vec![2; 100]]);
    let listed = bucket.listed("p");
    let (ends, is_lost) = (AtomicU32::new(0), Arc::new(AtomicBool::new(false)));
    let loses = is_lost.clone();
    let judge = move |line: &str| {
        let ends_now = line.starts_with("POST") && line.contains("uploadId=");
        if ends_now && ends.fetch_add(1, Ordering::SeqCst) == 0 {
            is_lost.store(true, Ordering::SeqCst);
        }
        None
    };
    // Without its head, nobody can read the answer.
    let edit = move |head: String| if loses.swap(false, Ordering::SeqCst) { String::new() } else { head };
    let proxied =
        super::rig::Bucket { rig: faults::editing_proxy(&rig, Arc::new(judge), Arc::new(edit)), ..bucket.clone() };
    let driver = proxied.open("p", json!({ "mode": "reference" }));
    let (tree, _) = back_up(&driver, None);
    bucket.put("p/large", "second");
    let restored = restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
    assert_eq!((restored.items, restored.losses.len()), (1, 0));
    assert_eq!(bucket.listed("p"), listed);
}
