//! Snapshots, repository configurations, key files and locks: small JSON documents from the bucket.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_repo::format::config::Config;
use stillpoint_repo::format::key::KeyFileJson;
use stillpoint_repo::format::lock::LockJson;
use stillpoint_repo::format::snapshot::SnapshotJson;

fuzz_target!(|data: &[u8]| {
    if let Ok(snapshot) = SnapshotJson::parse(data) {
        SnapshotJson::parse(&snapshot.to_json()).expect("our own writing reads");
    }
    if let Ok(config) = Config::parse(data) {
        Config::parse(&config.to_json()).expect("our own writing reads");
    }
    if let Ok(key) = KeyFileJson::parse(data) {
        KeyFileJson::parse(&key.to_json()).expect("our own writing reads");
    }
    if let Ok(lock) = LockJson::parse(data) {
        LockJson::parse(&lock.to_json()).expect("our own writing reads");
    }
});
