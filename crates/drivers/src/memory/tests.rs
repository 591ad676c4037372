//! The conformance suite on the reference driver, and the quirks that only it has.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use stillpoint_core::Result;
use stillpoint_core::driver::{Driver, EdgeQuery};
use stillpoint_core::error::Kind;
use stillpoint_core::tree::TreePath;
use stillpoint_testkit::MemoryTree;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};

use super::drain::{decode, encode};
use super::{REGISTRATION, Store};
use crate::trial;

struct Stores;

struct Named(String);

fn unused_name() -> String {
    static MADE: AtomicU64 = AtomicU64::new(0);
    format!("test-{}", MADE.fetch_add(1, Ordering::Relaxed))
}

impl Harness for Stores {
    fn source(&self) -> Result<Box<dyn Subject>> {
        let name = unused_name();
        Store::create(&name);
        Ok(Box::new(Named(name)))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(Named(unused_name())))
    }

    fn part_of(&self, _: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        Ok(Some(TreePath::root().join(b"values")?.join(encode(key).as_bytes())?))
    }
}

impl Subject for Named {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        open(json!({ "name": self.0 }))
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        Store::create(&self.0).put(key, value);
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<()> {
        assert!(Store::create(&self.0).delete(key), "the suite deletes only what is there");
        Ok(())
    }

    fn read(&self) -> Result<Content> {
        Ok(Store::create(&self.0).content())
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::Held("keys".to_owned()), keys)))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        Store::remove(&self.0);
    }
}

fn open(settings: Value) -> Result<Arc<dyn Driver>> {
    trial::open(&REGISTRATION, settings, Path::new("/"))
}

#[test]
fn the_contract_holds() {
    conformance::run(&Stores).assert_clean("memory");
}

#[test]
fn the_live_part_of_the_suite_holds_and_leaves_no_pin() {
    let store = Stores.source().expect("a store");
    store.put("a", b"1").expect("a write");
    conformance::run_live(&store.open().expect("a driver")).assert_clean("memory");
    let named = store.open().expect("a driver");
    assert!(format!("{named:?}").contains("pin: Mutex"), "the value is the one of this driver");
}

#[test]
fn every_key_is_a_file_name_and_every_name_one_key() {
    for key in ["a", "a/b", "a//..%2F", ".", "..", "%", "ü\u{0}", ""] {
        let name = encode(key);
        assert!(!name.contains(['/', '.', '\0']), "{name}");
        assert_eq!(decode(name.as_bytes()).expect("own name"), key);
    }
    for name in ["", "%2", "%zz", "%2f", "a/b", "a.b", "%41", "\u{fc}"] {
        assert_eq!(decode(name.as_bytes()).expect_err(name).kind(), Kind::Corrupt, "{name}");
    }
}

#[test]
fn settings_that_cannot_be_are_named() {
    let unknown = open(json!({ "name": "x", "colour": "red" }));
    assert!(unknown.expect_err("unknown setting").to_string().contains("colour"));
    let empty = open(json!({ "name": "" }));
    assert_eq!(empty.expect_err("empty").kind(), Kind::Config);
}
