//! Seeded secrets never come out: not on a screen, not in the bucket, not in the state folder.

use crate::support::{Screen, World, files_below};

/// Five secrets, each on its own way into the program.
const SECRETS: [&str; 5] =
    ["hunter2-environment", "hunter3-from-file", "hunter4-from-command", "hunter5-plain", "hunter6-header"];

fn clean(screens: &[Screen], world: &World) {
    for screen in screens {
        for secret in SECRETS {
            assert!(!screen.all().contains(secret), "{secret} came out: {screen:?}");
        }
    }
    for folder in ["bucket", "state"] {
        let folder = world.path(folder);
        for file in if folder.exists() { files_below(&folder) } else { Vec::new() } {
            let bytes = std::fs::read(&file).expect("read");
            for secret in SECRETS {
                let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
                assert!(!found, "{secret} lies in {}", file.display());
            }
        }
    }
}

#[test]
fn secrets_never_come_out() {
    let world = World::configured();
    world.write("password", SECRETS[1]);
    world.write("printed", SECRETS[2]);
    let mut screens = Vec::new();
    for key in ["env:SECRET_KEY", "file:password", "command:cat printed"] {
        let world_key = world.platform_yaml().replace("file:stillpoint.key", key);
        world.write("platform.yaml", &world_key);
        let bucket = world.path("bucket");
        if bucket.exists() {
            std::fs::remove_dir_all(&bucket).expect("remove");
        }
        let verbs: [&[&str]; 11] = [
            &["init"],
            &["backup"],
            &["backup", "--json"],
            &["list", "--json"],
            &["show"],
            &["show", "--json"],
            &["verify"],
            &["check", "--data", "--json"],
            &["key", "list", "--json"],
            &["key", "add", "--from", "env:SECRET_KEY", "--label", "second"],
            &["driver", "check", "--json"],
        ];
        for arguments in verbs {
            let mut command = world.command(arguments);
            command
                .env("SECRET_KEY", SECRETS[0])
                .env("DATABASE_URL", format!("postgres://u:{}@127.0.0.1:1/x", SECRETS[0]));
            command.env("STILLPOINT_LOG", "trace");
            let screen = world.run_command(command);
            assert!([0, 5, 7].contains(&screen.code), "{arguments:?}: {screen:?}");
            screens.push(screen);
        }
    }
    clean(&screens, &world);
}

#[test]
fn secrets_in_the_wrong_place_are_refused_and_not_repeated() {
    let world = World::configured();
    let right = world.platform_yaml();
    let wrong = [
        right.replace("file:stillpoint.key", SECRETS[3]),
        right.replace("retention:", &format!("pause:\n  - kind: http\n    pause: {{ url: 'http://x', headers: {{ Authorization: '{}' }} }}\n    resume: {{ url: 'http://x' }}\nretention:", SECRETS[4])),
        right.replace("stores:", &format!("  options: {{ secret_access_key: {} }}\nstores:", SECRETS[3])),
        right.replace("stores:", &format!("  pasword: {}\nstores:", SECRETS[3])),
        right.replace("file:stillpoint.key", &format!("'command:sh -c \"echo {} >&2; exit 1\"'", SECRETS[3])),
        right.replace("file:stillpoint.key", &format!("'env:{}'", SECRETS[3])),
    ];
    let mut screens = Vec::new();
    for text in wrong {
        world.write("platform.yaml", &text);
        for arguments in [&["backup"][..], &["init"], &["list", "--json"]] {
            let screen = world.run(arguments);
            assert_ne!(screen.code, 0, "{screen:?}");
            screens.push(screen);
        }
    }
    screens.push(world.run(&["key", "add", "--from", SECRETS[3]]));
    screens.push(world.run(&["init", "--key", SECRETS[3]]));
    screens.push(world.run(&[
        "copy",
        "--to",
        "s3://x/y",
        "--credential",
        &format!("secret_access_key={}", SECRETS[3]),
    ]));
    screens.push(world.run(&["copy", "--to", "s3://x/y", "--credential", SECRETS[3]]));
    clean(&screens, &world);
}
