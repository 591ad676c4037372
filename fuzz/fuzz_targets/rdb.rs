//! RDB files: the walk ends, whatever the bytes, and memory follows the bytes and not what they announce.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(counts) = stillpoint_drivers::redis::count_keys(data) {
        // A key takes at least a type, a name and a value.
        assert!(counts.values().sum::<u64>() <= data.len() as u64);
    }
});
