//! `platform.yaml`: any text ends in a platform or in an error that can be printed.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stillpoint_engine::config;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = config::parse(text, Path::new("platform.yaml")) {
        assert!(!format!("{error:?}").is_empty());
    }
});
