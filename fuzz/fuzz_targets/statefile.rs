//! Statefiles: what parses has canonical bytes, and parses to the same value again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_core::statefile::Statefile;

fuzz_target!(|data: &[u8]| {
    if let Ok(statefile) = Statefile::parse(data) {
        let canonical = statefile.canonical_bytes().expect("a parsed statefile serializes");
        let text = serde_json::to_vec(&statefile).expect("a parsed statefile serializes");
        let again = Statefile::parse(&text).expect("our own writing reads");
        assert_eq!(again.canonical_bytes().expect("serializes"), canonical);
    }
});
