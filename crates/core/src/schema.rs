//! JSON schemas of the formats that people and other programs write and read, made from the types.
//!
//! `cargo xtask gen` writes them under `generated/`; a test compares.

use schemars::{Schema, schema_for};

use crate::platform::Platform;
use crate::statefile::Statefile;

/// The schema of `platform.yaml`.
pub fn platform() -> Schema {
    schema_for!(Platform)
}

/// The schema of `statefile.json`.
pub fn statefile() -> Schema {
    schema_for!(Statefile)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[track_caller]
    fn assert_checked_in(name: &str, schema: &Schema) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../generated").join(name);
        let found = std::fs::read_to_string(&path).expect("run `cargo xtask gen` and commit generated/");
        let made = serde_json::to_string_pretty(schema).expect("schemas serialize") + "\n";
        assert!(found == made, "{name} is out of date: run `cargo xtask gen` and commit generated/");
    }

    #[test]
    fn the_checked_in_platform_schema_is_up_to_date() {
        assert_checked_in("platform.schema.json", &platform());
    }

    #[test]
    fn the_checked_in_statefile_schema_is_up_to_date() {
        assert_checked_in("statefile.schema.json", &statefile());
    }
}
