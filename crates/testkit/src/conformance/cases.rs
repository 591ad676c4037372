//! The cases, each a function named like the duty it proves.

use std::sync::Arc;

use stillpoint_core::driver::Driver;

use super::harness::Harness;
use super::report::Report;

/// One duty and how it is proven.
pub(super) struct Case {
    pub(super) name: &'static str,
}

pub(super) static CASES: &[Case] = &[];

pub(super) fn run(_harness: &dyn Harness) -> Report {
    Report::default()
}

pub(super) fn run_live(_driver: &Arc<dyn Driver>) -> Report {
    Report::default()
}
