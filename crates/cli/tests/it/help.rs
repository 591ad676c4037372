//! The help, whole: it is the manual that people have.

use crate::support::World;

fn help(arguments: &[&str]) -> String {
    let world = World::empty();
    let mut command = world.command(arguments);
    command.env("COLUMNS", "100");
    let screen = world.run_command(command);
    assert_eq!((screen.code, screen.err.as_str()), (0, ""), "{screen:?}");
    screen.out
}

#[test]
fn the_first_page() {
    insta::assert_snapshot!(help(&["--help"]), @"");
}

#[test]
fn exit_codes() {
    insta::assert_snapshot!(help(&["help", "exit-codes"]), @"");
}

#[test]
fn backup() {
    insta::assert_snapshot!(help(&["backup", "--help"]), @"");
}

#[test]
fn init() {
    insta::assert_snapshot!(help(&["init", "--help"]), @"");
}

/// Verbs whose pages teach by example, all of them.
#[test]
fn every_page_has_examples() {
    let verbs = [
        "tour", "init", "backup", "list", "show", "verify", "plan", "apply", "restore", "export", "forget", "prune", "check",
        "copy", "key", "driver", "completion",
    ];
    for verb in verbs {
        let page = help(&[verb, "--help"]);
        assert!(page.contains("Examples:\n  stillpoint "), "{verb}: {page}");
        assert!(!page.contains("__"), "{verb}: {page}");
    }
}

#[test]
fn usage_errors_have_code_2() {
    let world = World::empty();
    for arguments in [&["bakcup"][..], &[], &["show", "a", "b"], &["key"]] {
        assert_eq!(world.run(arguments).code, 2, "{arguments:?}");
    }
}

#[test]
fn completions_know_the_verbs() {
    for shell in ["bash", "zsh", "fish"] {
        let script = help(&["completion", shell]);
        assert!(script.contains("backup") && script.contains("restore"), "{shell}");
    }
}
