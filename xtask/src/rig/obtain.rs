//! Gets a rig's server by the registries' own clients, once, into the cache.

use std::path::Path;
use std::process::{Command, Stdio};

use super::describe::{Rig, Source};

/// The longest that getting one server may take.
const SECONDS_MAX: u32 = 1500;

/// Gets the server unless this version of it is there. A note beside it says which version that is.
pub fn obtain(rig: &Rig, cache: &Path, gently: bool) -> Result<(), String> {
    let binary = cache.join(&rig.binary);
    let note = cache.join(format!("{}.version", rig.name));
    let wanted = format!("{:?}", rig.source);
    if binary.exists() && std::fs::read_to_string(&note).is_ok_and(|found| found == wanted) {
        return link(rig, cache);
    }
    if let Source::Debian(package) = &rig.source {
        return match binary.exists() {
            true => link(rig, cache),
            false => Err(format!("{} is not there; install it: apt-get install {package}", binary.display())),
        };
    }
    let (tool, mut command) = command(&rig.source, cache, gently);
    let log = cache.join(format!("{}.obtain.log", rig.name));
    let output = std::fs::File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let errors = output.try_clone().map_err(|error| format!("{}: {error}", log.display()))?;
    eprintln!("rig {}: getting {} (once; the log is {})", rig.name, describe(&rig.source), log.display());
    let status = command.stdin(Stdio::null()).stdout(output).stderr(errors).status();
    let status = status.map_err(|error| format!("`{tool}` cannot be run: {error}"))?;
    if !status.success() || !binary.exists() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(5).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        return Err(format!("{} could not be got: {}", describe(&rig.source), tail.join(" | ")));
    }
    std::fs::write(&note, wanted).map_err(|error| format!("{}: {error}", note.display()))?;
    link(rig, cache)
}

/// Makes the link by which the program must be called, if there is one.
fn link(rig: &Rig, cache: &Path) -> Result<(), String> {
    let Some(link) = rig.link.as_ref().map(|link| cache.join(link)) else { return Ok(()) };
    let binary = cache.join(&rig.binary);
    if std::fs::read_link(&link).is_ok_and(|target| target == binary) {
        return Ok(());
    }
    let made = std::fs::create_dir_all(link.parent().unwrap_or(cache))
        .and_then(|()| if link.is_symlink() { std::fs::remove_file(&link) } else { Ok(()) })
        .and_then(|()| std::os::unix::fs::symlink(&binary, &link));
    made.map_err(|error| format!("{}: {error}", link.display()))
}

fn describe(source: &Source) -> String {
    match source {
        Source::Go(name) | Source::Npm(name) | Source::Cargo(name, _) | Source::PyPi(name) | Source::Debian(name) => {
            name.clone()
        }
    }
}

fn command(source: &Source, cache: &Path, gently: bool) -> (&'static str, Command) {
    let (tool, args) = match source {
        Source::Go(module) => {
            let mut args = vec!["install", "-trimpath", "-ldflags", "-s -w"];
            if gently {
                args.extend(["-p", "1"]);
            }
            ("go", [args, vec![module]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>())
        }
        Source::Cargo(krate, features) => {
            let mut args =
                ["install", "--locked", "--debug", krate, "--features", features, "--root"].map(str::to_owned).to_vec();
            args.push(cache.display().to_string());
            ("cargo", args)
        }
        Source::Npm(package) => {
            let quiet = ["install", "--no-audit", "--no-fund", "--omit=optional", "--loglevel=error", "--prefix"];
            let mut args = quiet.map(str::to_owned).to_vec();
            args.extend([cache.join("npm").display().to_string(), package.clone()]);
            ("npm", args)
        }
        Source::PyPi(package) => {
            let quiet = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--disable-pip-version-check"];
            let mut args = quiet.map(str::to_owned).to_vec();
            let name = package.split("==").next().unwrap_or(package);
            args.extend(["--target".to_owned(), cache.join("pypi").join(name).display().to_string(), package.clone()]);
            ("python3", args)
        }
        Source::Debian(package) => {
            ("apt-get", ["install", "-y", "--no-install-recommends", package].map(str::to_owned).to_vec())
        }
    };
    // A registry that hangs must not hold the tests up for ever.
    let mut command = Command::new("timeout");
    command.arg(SECONDS_MAX.to_string());
    if gently {
        command.args(["nice", "-n", "15"]);
    }
    command.arg(tool);
    command.args(args).current_dir(cache);
    command.env("CGO_ENABLED", "0").env("GOBIN", cache.join("bin")).env("GOFLAGS", "-mod=mod");
    // Its own target folder, removed by cargo afterwards, so that the workspace's is not waited for.
    command.env_remove("CARGO_TARGET_DIR").env("CARGO_PROFILE_DEV_DEBUG", "false");
    command.env_remove("LIBSQLITE3_FLAGS");
    (tool, command)
}
