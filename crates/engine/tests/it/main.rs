//! The engine's integration tests: one binary, a module per subject.
//!
//! Tests need no installation and no network but loopback. `helper` turns this very binary into the
//! watchdog, or into an engine that is killed, for those tests that need a second process.

mod backup;
mod faults;
mod helper;
mod hooks;
mod journal;
mod kill;
mod lease;
mod pause;
mod restore;
mod restore_cancel;
mod watchdog;
mod world;
