//! The conformance suite: what every driver must do, run against a real store of its kind.
//!
//! One suite for all drivers, so that the engine may rely on the contract and never on a kind of
//! store. [`run`] needs a [`Harness`], which makes throw-away stores, and proves everything;
//! [`run_live`] needs only an open driver, writes nothing, and proves what can be proven that way
//! on a user's own store. `docs/driver-spec.md` lists each duty with the name of its case.
//!
//! The suite never looks into a driver's tree but for what the contract says of it: content is
//! judged by restoring it and reading the target back with the harness's own hands.

mod cases;
mod harness;
mod live;
mod report;

pub use harness::{Content, Harness, Subject};
pub use live::run_live;
pub use report::{Outcome, Report, Row};

/// Runs every case and reports. Never panics for a failing driver.
///
/// Blocks; must not be called from within an async runtime.
pub fn run(harness: &dyn Harness) -> Report {
    cases::run(harness)
}

/// The names of all cases of [`run`], in order.
pub fn case_names() -> Vec<&'static str> {
    cases::CASES.iter().map(|case| case.name).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_case_stands_in_the_drivers_specification() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/driver-spec.md");
        let text = std::fs::read_to_string(path).expect("docs/driver-spec.md");
        let names = super::case_names();
        for name in &names {
            assert!(text.contains(&format!("`{name}`")), "docs/driver-spec.md lacks {name}");
        }
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "two cases share a name");
    }
}
