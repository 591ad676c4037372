//! `cargo xtask test`: every test there is, with what it needs, and a count that hides nothing.
//!
//! Packages are installed when that is possible without asking, rigs are got and started; what
//! cannot be had makes tests skip, and every skip is printed with its reason. Rigs are built
//! gently beside the workspace, because both take minutes on a cold machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::rig::{self, Rig};
use crate::soak::{self, Soak};

/// How much to test.
#[derive(Debug, clap::Args)]
pub struct TestArgs {
    /// Only what needs no installation, no server and no release build.
    #[arg(long)]
    pub quick: bool,
    /// Instead of the tests: chaos on the example platform for so many minutes, judged by an oracle.
    #[arg(long, value_name = "MINUTES", conflicts_with = "quick")]
    pub soak: Option<f64>,
    /// What the soak's random choices begin with.
    #[arg(long, requires = "soak")]
    pub seed: Option<u64>,
    /// The soak runs programs as tests are built, instead of released ones.
    #[arg(long, requires = "soak")]
    pub dev: bool,
    /// The soak takes `stillpoint` and `model-registry` from this folder, and builds nothing.
    #[arg(long, requires = "soak", value_name = "FOLDER")]
    pub programs: Option<PathBuf>,
    /// The soak's platform, described like `examples/model-registry/platform.yaml`.
    #[arg(long, requires = "soak", value_name = "FILE")]
    pub platform: Option<PathBuf>,
    /// Publications per second in the soak; as fast as they can if not given.
    #[arg(long, requires = "soak", default_value_t = 0.0)]
    pub per_second: f64,
}

/// Programs that tests call, and the Debian packages that hold them.
const PACKAGES: &[(&str, &str)] = &[
    ("git", "git"),
    ("restic", "restic"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.xfs", "xfsprogs"),
    ("sqlite3", "sqlite3"),
    ("redis-cli", "redis-tools"),
    (POSTGRES_OF_DEBIAN, "postgresql-15"),
];

const POSTGRES_OF_DEBIAN: &str = "/usr/lib/postgresql/15/bin/postgres";

/// Debian makes a server for the machine when PostgreSQL is installed; tests want the program only.
const NO_SERVER_OF_DEBIAN: &str = "mkdir -p /etc/postgresql-common && cd /etc/postgresql-common \
    && { test -e createcluster.conf || echo create_main_cluster = false > createcluster.conf; }";

#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
}

/// Runs everything; returns whether nothing failed.
pub fn run(root: &Path, args: &TestArgs) -> Result<bool, String> {
    if let Some(minutes) = args.soak {
        let (seed, dev, per_second) = (args.seed, args.dev, args.per_second);
        let (platform, programs) = (args.platform.clone(), args.programs.clone());
        return soak::run(root, &Soak { minutes, seed, dev, programs, platform, per_second });
    }
    let mut tally = Tally::default();
    let (mut given, mut started) = (BTreeMap::new(), Vec::new());
    if args.quick {
        build(root)?;
    } else {
        install_packages(&mut tally);
        let obtained = std::thread::scope(|scope| {
            let rigs = scope.spawn(|| obtain_rigs(root));
            build(root)?;
            rigs.join().map_err(|_| "getting the rigs panicked".to_owned())?
        })?;
        start_rigs(obtained, &mut given, &mut started, &mut tally);
    }
    let tested = cargo_test(root, &given, &mut tally);
    for name in &started {
        rig::down(name)?;
    }
    tested?;
    one("tidy", &mut tally, || crate::tidy::run(root));
    if !args.quick {
        tour(root, &mut tally);
    }
    report(&tally);
    Ok(tally.failed == 0)
}

fn report(tally: &Tally) {
    println!();
    for skipped in &tally.skipped {
        println!("SKIP {skipped}");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped.len());
}

fn one(name: &str, tally: &mut Tally, check: impl FnOnce() -> Result<bool, String>) {
    match check() {
        Ok(true) => tally.passed += 1,
        Ok(false) => {
            println!("FAILED {name}");
            tally.failed += 1;
        }
        Err(error) => {
            println!("FAILED {name}: {error}");
            tally.failed += 1;
        }
    }
}

/// Installs what is missing as root or with a password-less sudo; says what to install otherwise.
fn install_packages(tally: &mut Tally) {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return;
    }
    let mut prefix: Vec<&str> = Vec::new();
    if !is_root() {
        let may_sudo = Command::new("sudo").args(["-n", "true"]).stderr(Stdio::null()).status();
        if !may_sudo.is_ok_and(|status| status.success()) {
            println!("to test more, install: apt-get install {}", missing.join(" "));
            return;
        }
        prefix.extend(["sudo", "-n"]);
    }
    let apt = |args: &[&str]| {
        let words = [&prefix[..], &["apt-get", "-q", "-y"], args].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    println!("installing {}", missing.join(" "));
    let words = [&prefix[..], &["sh", "-c", NO_SERVER_OF_DEBIAN]].concat();
    if !Command::new(words[0]).args(&words[1..]).status().is_ok_and(|status| status.success()) {
        println!("a server of Debian's PostgreSQL may have been made for this machine");
    }
    let install =
        [&["install", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"], &missing[..]].concat();
    let is_installed = apt(&install) || (apt(&["update"]) && apt(&install));
    if !is_installed {
        tally.skipped.push(format!("packages: {} could not be installed", missing.join(" ")));
    }
}

fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn obtain_rigs(root: &Path) -> Result<Vec<(Rig, Result<(), String>)>, String> {
    let rigs: Result<Vec<Rig>, String> = Rig::names(root)?.iter().map(|name| Rig::load(root, name)).collect();
    Ok(rigs?.into_iter().map(|rig| (rig.clone(), rig::obtain(&rig, true))).collect())
}

fn start_rigs(
    obtained: Vec<(Rig, Result<(), String>)>,
    given: &mut BTreeMap<String, String>,
    started: &mut Vec<String>,
    tally: &mut Tally,
) {
    for (rig, outcome) in obtained {
        match outcome.and_then(|()| rig::up(&rig)) {
            Ok((environment, ran_before)) => {
                given.extend(environment);
                if !ran_before {
                    started.push(rig.name.clone());
                }
            }
            Err(error) => tally.skipped.push(format!("rig {}: {error}", rig.name)),
        }
    }
}

/// Cargo in the workspace, as a person would call it. What `cargo run` set for us would make build
/// scripts that look at it run again, and everything above them be built anew.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name.to_string_lossy().starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

fn build(root: &Path) -> Result<(), String> {
    let status = cargo(root).args(["test", "--workspace", "--no-run", "--quiet"]).status();
    let built = status.map_err(|error| format!("cargo cannot be run: {error}"))?.success();
    if built { Ok(()) } else { Err("the workspace does not build".to_owned()) }
}

/// Runs all tests and reads cargo's output as it comes.
fn cargo_test(root: &Path, given: &BTreeMap<String, String>, tally: &mut Tally) -> Result<(), String> {
    let mut command = cargo(root);
    command.args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"]).envs(given);
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("cargo cannot be run: {error}"))?;
    let output = child.stdout.take().ok_or("cargo has no output")?;
    let mut reader = Reader::default();
    for line in BufReader::new(output).lines() {
        let line = line.map_err(|error| format!("cargo's output broke off: {error}"))?;
        if reader.read(&line, tally) {
            println!("{line}");
        }
    }
    let status = child.wait().map_err(|error| format!("cargo cannot be waited for: {error}"))?;
    // A test binary that crashes has no result line, so the exit code counts too.
    if !status.success() && tally.failed == 0 {
        println!("FAILED a test binary ended without a result");
        tally.failed += 1;
    }
    Ok(())
}

/// Understands the output of the standard test harness.
#[derive(Debug, Default)]
struct Reader {
    within_successes: bool,
    /// Skips of the binary that is running; the harness will count them as passed.
    skips: u64,
}

impl Reader {
    /// Counts what the line says; returns whether people should see it.
    fn read(&mut self, line: &str, tally: &mut Tally) -> bool {
        match line {
            "successes:" => self.within_successes = true,
            "failures:" => self.within_successes = false,
            _ => {}
        }
        if let Some(skipped) = line.strip_prefix("SKIP ") {
            tally.skipped.push(skipped.to_owned());
            self.skips += 1;
            return false;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.within_successes = false;
            tally.passed += number_before(result, " passed").saturating_sub(std::mem::take(&mut self.skips));
            tally.failed += number_before(result, " failed");
            return tally.failed > 0;
        }
        if let Some(test) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored")) {
            tally.skipped.push(format!("{}: {}", test.0, test.1.trim_start_matches(", ").trim()));
        }
        let noise = line.is_empty() || line.ends_with(" ... ok") || line.starts_with("running ");
        !self.within_successes && !noise
    }
}

/// The number in front of `word`, as in "12 passed; 0 failed".
fn number_before(text: &str, word: &str) -> u64 {
    let Some(end) = text.find(word) else { return 0 };
    let digits = text[..end].rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
    text[digits..end].parse().unwrap_or(0)
}

/// The main job, as a user runs it. It fails if anything it shows is not proven.
fn tour(root: &Path, tally: &mut Tally) {
    let release = |args: &[&str]| cargo(root).args(["run", "--release", "--quiet", "--"]).args(args).status();
    let known = cargo(root).args(["run", "--release", "--quiet", "--", "tour", "--help"]).output();
    if !known.is_ok_and(|output| output.status.success() && !output.stdout.is_empty()) {
        tally.skipped.push("tour: this build has no tour".to_owned());
        return;
    }
    one("tour", tally, || release(&["tour"]).map(|status| status.success()).map_err(|error| error.to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_counted_with_their_reason_and_not_as_passed() {
        let output = "running 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... ignored, slow\n\nsuccesses:\n\n\
            ---- b stdout ----\nSKIP b: no restic\n\n\nsuccesses:\n    a\n    b\n\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let (mut reader, mut tally) = (Reader::default(), Tally::default());
        let shown: Vec<&str> = output.lines().filter(|line| reader.read(line, &mut tally)).collect();
        assert_eq!((tally.passed, tally.failed), (1, 0));
        assert_eq!(tally.skipped, ["c: slow", "b: no restic"]);
        assert_eq!(shown, ["test c ... ignored, slow"]);
    }

    #[test]
    fn failures_are_shown_with_their_output() {
        let output = "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\nboom\n\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored";
        let (mut reader, mut tally) = (Reader::default(), Tally::default());
        let shown: Vec<&str> = output.lines().filter(|line| reader.read(line, &mut tally)).collect();
        assert_eq!((tally.passed, tally.failed), (1, 2));
        assert!(shown.contains(&"boom") && shown.contains(&"test a ... FAILED"), "{shown:?}");
    }
}
