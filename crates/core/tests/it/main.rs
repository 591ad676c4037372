//! Tests of core from outside, one module each.

mod frozen_statefiles;
