//! Index files: parsing ends, and what it yields can be written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_repo::format::index;

fuzz_target!(|data: &[u8]| {
    let mut packs = Vec::new();
    let parsed = index::parse(data, &mut |id, entries| {
        packs.push((id, entries.to_vec()));
        Ok(())
    });
    if parsed.is_ok() && !packs.is_empty() {
        let mut json = Vec::new();
        for (number, (id, entries)) in packs.iter().enumerate() {
            index::write_pack(id, entries, number == 0, &mut json);
        }
        index::write_end(&mut json);
        let mut again = Vec::new();
        index::parse(&json, &mut |id, entries| {
            again.push((id, entries.to_vec()));
            Ok(())
        })
        .expect("our own writing reads");
        assert_eq!(again, packs);
    }
});
