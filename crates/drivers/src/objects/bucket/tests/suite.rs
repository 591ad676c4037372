//! The conformance suite on every kind of bucket.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;
use stillpoint_core::driver::{Driver, EdgeQuery};
use stillpoint_core::error::Result;
use stillpoint_core::tree::TreePath;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};
use stillpoint_testkit::{MemoryTree, skip};

use super::rig::{Bucket, Rig};

struct Buckets {
    rig: Rig,
    plain: bool,
    versions: bool,
}

struct OneBucket(Bucket);

impl Harness for Buckets {
    fn source(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(OneBucket(self.rig.bucket(self.versions))))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(OneBucket(self.rig.absent())))
    }

    fn exempt(&self) -> Vec<(&'static str, &'static str)> {
        let mut exempt = Vec::new();
        if !self.versions {
            exempt.push((
                "cut_with_a_new_id_replaces",
                "two listings cannot tell a deletion before the cut from one after it, so that both are named",
            ));
            exempt.push((
                "cut_separates_writes",
                "of a key that is new since the listing and written again after the cut, nothing tells the first write",
            ));
        }
        if self.plain {
            exempt.push((
                "incremental_reads_what_changed",
                "s3s-fs lists no entity tags, so that nothing is known to be unchanged",
            ));
        }
        exempt
    }

    fn part_of(&self, _: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        TreePath::parse(&format!("objects/{key}")).map(Some)
    }
}

impl Subject for OneBucket {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        Ok(self.0.open("data", json!({ "create": true })))
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        self.0.put(&format!("data/{key}"), value);
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.0.delete(&format!("data/{key}"));
        Ok(())
    }

    fn read(&self) -> Result<Content> {
        let keys = self.0.listed("data").into_keys();
        Ok(keys.map(|key| (key.clone(), self.0.get(&format!("data/{key}")))).collect())
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.0.listed("data").into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::Held("keys".to_owned()), keys)))
    }
}

fn conformance(name: &str, plain: bool, versions: bool) {
    match Rig::find(plain) {
        Ok(rig) => conformance::run(&Buckets { rig, plain, versions }).assert_clean(name),
        Err(why) => skip(name, why),
    }
}

#[test]
fn conformance_with_versions() {
    conformance("conformance_with_versions", false, true);
}

#[test]
fn conformance_without_versions() {
    conformance("conformance_without_versions", false, false);
}

#[test]
fn conformance_on_a_plain_clone() {
    conformance("conformance_on_a_plain_clone", true, false);
}
