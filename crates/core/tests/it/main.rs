//! Tests of core from outside, one module each.

#![expect(clippy::disallowed_methods, reason = "core is pure, its tests read samples")]

mod frozen_statefiles;
