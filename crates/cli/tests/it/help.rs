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
    insta::assert_snapshot!(help(&["--help"]), @"
    One consistent recovery point across every stateful store of a platform.

    Takes a point of databases, objects, repositories and files that belong together, proves that they
    do, and brings them back somewhere else.

    Usage: stillpoint [OPTIONS] <COMMAND>

    Commands:
      tour        See it work: a scratch platform, a writer that never rests, two points, damage, a
                  restore, proof
      init        Look around, write a commented platform.yaml, and create the bucket with its key
      backup      Make one recovery point of the whole platform
      list        List the recovery points, newest first
      show        Show what is in a point, how consistent it is, and how to read it with restic
      verify      Prove that a point can be read: every byte from the bucket, never from a cache
      plan        Say what a restore would do, overwrite and lose. Read-only
      apply       Carry out a reviewed plan, or refuse if anything differs from what was reviewed
      restore     Bring a point back, beside what is running: plan and apply in one
      export      Write what a point holds of one store as plain files, without any server
      forget      Let go of points by the rules under `retention`, or by name. Never of the newest
                  restorable one
      prune       Free the space that no point needs any more
      check       Check that the bucket is sound: its structure, its points, and with --data every byte
      copy        Copy points to a second bucket, another region or account, verifying what is copied
      key         Add, remove, rotate and list the keys that open the repository. Data is never
                  rewritten
      driver      See what can be protected, what it needs, and whether it works on your own stores
      completion  Print the completion script of a shell
      help        Print this message or the help of the given subcommand(s)

    Options:
          --config <FILE>
              The configuration; else STILLPOINT_CONFIG, else platform.yaml in this folder

          --json
              Print one JSON document instead of text

      -q, --quiet
              Print no progress

      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Examples:
      stillpoint tour                       see it work on a scratch platform, in seconds
      stillpoint init /srv/app              look around, write platform.yaml, create the bucket
      stillpoint backup                     make a recovery point
      stillpoint list                       what there is
      stillpoint plan --into staging        what a restore would do, and lose
      stillpoint restore latest --to /tmp/r bring it back, beside what is running

    Exit codes: stillpoint help exit-codes
    ");
}

#[test]
fn exit_codes() {
    insta::assert_snapshot!(help(&["help", "exit-codes"]), @"
    Exit codes

        0  done; a point that was made or checked is restorable
        1  a bug in stillpoint
        2  the command line cannot be understood
        3  platform.yaml, a secret or an argument cannot be used
        4  a store cannot be reached, or a privilege on it is missing
        5  the bucket or its repository: unreachable, damaged, wrong key, no such point
        6  refused: the fence, a plan that no longer holds, or a target that holds data
        7  not proven: a reference, a verification or a pin did not hold
        8  another run, or a lock, holds what is needed
        9  a disk, quota or memory limit is used up
      130  stopped on request
    ");
}

#[test]
fn backup() {
    insta::assert_snapshot!(help(&["backup", "--help"]), @"
    Make one recovery point of the whole platform.

    Fixes every store's view at one moment, copies it while the platform runs, checks the references
    between the stores, and commits the point last of all. Ctrl-C ends it in order; then there is no
    point, and nothing is held back.

    Usage: stillpoint backup [OPTIONS]

    Options:
          --config <FILE>
              The configuration; else STILLPOINT_CONFIG, else platform.yaml in this folder

          --take-over
              Go on although another run seems to hold the platform; that run will fail

          --json
              Print one JSON document instead of text

      -q, --quiet
              Print no progress

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      stillpoint backup                       the platform of ./platform.yaml
      stillpoint backup --config /etc/churn/platform.yaml
      stillpoint backup --json | jq -r .statefile.point
    ");
}

#[test]
fn init() {
    insta::assert_snapshot!(help(&["init", "--help"]), @r#"
    Look around, write a commented platform.yaml, and create the bucket with its key.

    Looks into the folders that are named (or this one) for SQLite databases, git repositories and
    folders of objects, at the environment and at local servers; takes servers and buckets that are
    named by address. Never overwrites a file. If platform.yaml is there already, only the bucket and
    its key are made.

    Usage: stillpoint init [OPTIONS] [PATHS]...

    Arguments:
      [PATHS]...
              Databases, repositories and folders to protect, or folders to search; or addresses of
              servers and buckets

    Options:
          --bucket <URL>
              Where recovery points go: a folder, s3://…, gs://… or az://…

          --config <FILE>
              The configuration; else STILLPOINT_CONFIG, else platform.yaml in this folder

          --json
              Print one JSON document instead of text

          --platform <NAME>
              The platform's name; that of the folder if not given

          --environment <NAME>
              Which copy of the platform this is
              
              [default: production]

      -q, --quiet
              Print no progress

          --key <SECRET>
              What unlocks the bucket: env:NAME, file:PATH or command:PROGRAM. A key file is generated
              if not given

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      stillpoint init                             look around here
      stillpoint init /srv/app.db /srv/objects    protect these
      stillpoint init postgresql://backup@db/app redis://cache s3://ml-artifacts/prod
      stillpoint init /srv/app --bucket s3://backups/app --key env:BACKUP_PASSWORD

    A whole platform.yaml:
      apiVersion: stillpoint.dev/v1
      platform: churn
      environment: production
      bucket: { url: /mnt/backup, key: "file:stillpoint.key" }
      stores:
        meta: { driver: sqlite, path: /srv/meta.db }
        artifacts: { driver: objects, path: /srv/objects }
    "#);
}

/// Verbs whose pages teach by example, all of them.
#[test]
fn every_page_has_examples() {
    let verbs = [
        "tour",
        "init",
        "backup",
        "list",
        "show",
        "verify",
        "plan",
        "apply",
        "restore",
        "export",
        "forget",
        "prune",
        "check",
        "copy",
        "key",
        "driver",
        "completion",
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
