//! This binary as another process. Each helper is a test that does nothing unless it is asked to.

use std::ffi::OsString;

use stillpoint_engine::watchdog::WatchdogProgram;

/// Says which helper is wanted.
pub const ROLE: &str = "STILLPOINT_TEST_ROLE";

fn is_wanted(role: &str) -> bool {
    std::env::var_os(ROLE).is_some_and(|wanted| wanted == role)
}

/// The arguments under which this binary runs one helper and nothing else.
pub fn arguments(test: &str) -> Vec<OsString> {
    [test, "--exact", "--nocapture"].map(OsString::from).to_vec()
}

/// The environment that goes with them. Two threads, because libtest prints the name of a test
/// before its output when it has only one.
pub fn environment(role: &str) -> Vec<(OsString, OsString)> {
    [(ROLE, role), ("RUST_TEST_THREADS", "2")].map(|(name, value)| (name.into(), value.into())).to_vec()
}

/// This binary as the watchdog.
pub fn watchdog_program() -> WatchdogProgram {
    WatchdogProgram {
        program: std::env::current_exe().expect("a running test has a file"),
        arguments: arguments("helper::watchdog_process"),
        environment: environment("watchdog"),
    }
}

#[test]
fn watchdog_process() {
    if is_wanted("watchdog") {
        stillpoint_engine::watchdog::main().expect("the watchdog has instructions");
        // Whatever libtest would print after it could reach nobody.
        std::process::exit(0);
    }
}

#[test]
fn watchdog_parent_process() {
    if is_wanted("watchdog-parent") {
        crate::watchdog::parent_that_waits_to_be_killed();
    }
}

#[test]
fn engine_process() {
    if is_wanted("engine") {
        crate::kill::engine_that_is_killed();
    }
}
