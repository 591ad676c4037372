//! Tree blobs: no entry that is handed out has a name that could leave the tree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_core::tree::check_name;
use stillpoint_core::{Error, Kind};
use stillpoint_repo::format::tree_read::DirectoryReader;

fuzz_target!(|data: &[u8]| {
    let Ok(mut reader) = DirectoryReader::new(data.to_vec()) else { return };
    let mut load = |_: &stillpoint_repo::Id| Err(Error::new(Kind::NotFound, "no parts here"));
    while let Ok(Some(entry)) = reader.next(&mut load) {
        check_name(&entry.node.name).expect("names are checked");
    }
});
