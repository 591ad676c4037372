//! What servers answer and send as their stream of commands: reading ends, and never takes more than there is.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    stillpoint_drivers::redis::is_reply(data);
    if let Ok(count) = stillpoint_drivers::redis::count_commands(data) {
        assert!(count <= data.len() as u64);
    }
});
