//! The part of the suite that writes nothing, for a user's own store.

use std::sync::Arc;

use stillpoint_core::driver::Driver;

use super::report::Report;

/// Runs the cases that change nothing against one open store, and reports.
///
/// Takes a cut, drains it to nowhere and releases it. Blocks; must not be called from within an
/// async runtime.
pub fn run_live(driver: &Arc<dyn Driver>) -> Report {
    super::cases::run_live(driver)
}
