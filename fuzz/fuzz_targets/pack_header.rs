//! Pack headers: what parses is written back byte for byte.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_repo::format::pack;

fuzz_target!(|data: &[u8]| {
    // The length of the blobs is foreign too: the first four bytes give it.
    let Some((length, header)) = data.split_first_chunk::<4>() else { return };
    let blobs_bytes = u64::from(u32::from_le_bytes(*length));
    if let Ok(entries) = pack::parse_header(header, blobs_bytes) {
        let mut again = Vec::new();
        pack::write_header(&entries, &mut again);
        assert_eq!(again, header);
        let total: u64 = entries.iter().map(|entry| u64::from(entry.length)).sum();
        assert_eq!(total, blobs_bytes);
    }
});
