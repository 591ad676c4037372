//! The S3 bench: a bucket of many small objects, backed up by us, and synced away by rclone, whose copy
//! restic backs up.
//!
//! Nothing of what is measured is on a disk that waits: server, copies and repositories share the
//! directory that the bench is given.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchArgs;
use super::measure::{Runs, run as measure};
use super::server::S3Server;
use super::table::Row;
use super::tools::Server;

/// Objects at scale 1, and their sizes.
const OBJECTS: f64 = 100_000.0;
/// The share of them with `--small`.
const SMALL: f64 = 0.02;
const BYTES_MIN: usize = 4 << 10;
const BYTES_MAX: usize = 64 << 10;
/// Objects in a folder.
const PER_FOLDER: u64 = 1_000;
/// One in so many is written anew before the second run.
const CHANGED: u64 = 100;
/// Requests at a time, for all tools.
const CONNECTIONS: &str = "16";
/// 300 MiB, in MB.
const PEAK_MB: f64 = 314.6;

struct Bench {
    ours: PathBuf,
    folder: PathBuf,
    server: Server,
    has_restic: bool,
    runs: Runs,
}

/// Fills a bucket, runs all rounds, and returns the rows.
pub fn run(root: &Path, args: &BenchArgs) -> Result<Vec<Row>, String> {
    let ours = super::files::build(root)?;
    std::fs::create_dir_all(&args.dir).map_err(|error| error.to_string())?;
    let server = S3Server::start(root, &args.dir.join("s3"))?;
    let outcome = rounds(&server, ours, args);
    server.stop()?;
    super::files::remove(&args.dir)?;
    Ok(outcome?.rows())
}

fn rounds(server: &S3Server, ours: PathBuf, args: &BenchArgs) -> Result<Bench, String> {
    let has_restic = Command::new("restic").arg("version").output().is_ok();
    let bucket = server.bucket("source")?;
    let mut bench = Bench { ours, folder: args.dir.clone(), server: bucket, has_restic, runs: Runs::default() };
    if bench.rclone(&["version"]).output().is_err() {
        return Err("the bench fills its bucket with rclone, which is not on PATH".to_owned());
    }
    bench.keep_versions()?;
    let scale = if args.small { SMALL } else { args.scale };
    let count = (OBJECTS * scale) as u64;
    bench.fill(count, 1, 0)?;
    for round in 0..args.rounds as u64 {
        println!("round {} of {}: {count} objects", round + 1, args.rounds);
        bench.round(count, round)?;
    }
    Ok(bench)
}

impl Bench {
    fn rclone(&self, args: &[&str]) -> Command {
        let mut command = Command::new("rclone");
        let server = &self.server;
        command
            .args(args)
            .env_remove("AWS_CA_BUNDLE")
            .env("RCLONE_CONFIG", "/dev/null")
            .env("RCLONE_CONFIG_RIG_TYPE", "s3");
        command.env("RCLONE_CONFIG_RIG_PROVIDER", "Minio").env("RCLONE_CONFIG_RIG_REGION", "us-east-1");
        command.env("RCLONE_CONFIG_RIG_ENDPOINT", format!("http://{}", server.address));
        command.env("RCLONE_CONFIG_RIG_ACCESS_KEY_ID", &server.access_key_id);
        command.env("RCLONE_CONFIG_RIG_SECRET_ACCESS_KEY", &server.secret_access_key);
        command
    }

    fn restic(&self, args: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command.arg("--repo").arg(self.folder.join("restic")).args(["--no-cache"]).args(args);
        command.env("RESTIC_PASSWORD", "bench-only");
        command
    }

    fn stillpoint(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.ours);
        command.arg("--config").arg(self.folder.join("platform.yaml")).args(args);
        command.env("XDG_STATE_HOME", self.folder.join("state"));
        command.env("AWS_ACCESS_KEY_ID", &self.server.access_key_id);
        command.env("AWS_SECRET_ACCESS_KEY", &self.server.secret_access_key);
        command
    }

    fn keep_versions(&self) -> Result<(), String> {
        let server = &self.server;
        let user = format!("{}:{}", server.access_key_id, server.secret_access_key);
        let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", &user]);
        // Without it some versions of curl sign another body than the one they send.
        curl.args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        curl.args(["--request", "PUT", "--data", body, &format!("http://{}/source?versioning=", server.address)]);
        measure(&mut curl).map(drop)
    }

    /// Writes every so many of the objects, with content of this round.
    fn fill(&self, count: u64, every: u64, round: u64) -> Result<(), String> {
        let folder = self.folder.join("input");
        let describe = |error: std::io::Error| format!("{}: {error}", folder.display());
        for number in (0..count).step_by(every as usize) {
            let place = folder.join(format!("{:04}", number / PER_FOLDER));
            std::fs::create_dir_all(&place).map_err(describe)?;
            std::fs::write(place.join(format!("{number:08}.bin")), content(number, round)).map_err(describe)?;
        }
        let mut copy = self.rclone(&["copy", "--transfers", CONNECTIONS, "--no-traverse", "--quiet"]);
        measure(copy.arg(&folder).arg("rig:source"))?;
        std::fs::remove_dir_all(&folder).map_err(describe)
    }

    fn round(&mut self, count: u64, round: u64) -> Result<(), String> {
        for name in ["synced", "restic", "ours", "state"] {
            let path = self.folder.join(name);
            if path.exists() {
                super::files::remove(&path)?;
            }
        }
        self.write_platform()?;
        measure(&mut self.stillpoint(&["init"]))?;
        if self.has_restic {
            measure(&mut self.restic(&["init"]))?;
        }
        self.step("first", round)?;
        self.fill(count, CHANGED, round + 1)?;
        // Times of S3 may have a resolution of a second.
        std::thread::sleep(std::time::Duration::from_millis(1_100));
        self.step("1 % changed", round)
    }

    /// Every tool once; who is first changes from round to round.
    fn step(&mut self, case: &'static str, round: u64) -> Result<(), String> {
        for turn in 0..2 {
            if (turn + round).is_multiple_of(2) {
                let run = measure(&mut self.stillpoint(&["backup"]))?;
                self.runs.note(case, "stillpoint", run);
            } else {
                let synced = self.folder.join("synced");
                let mut sync =
                    self.rclone(&["sync", "--transfers", CONNECTIONS, "--checkers", CONNECTIONS, "--fast-list"]);
                // rclone's own advice for S3: otherwise it asks for the time of every object in a request of its own.
                sync.args(["--update", "--use-server-modtime"]);
                let run = measure(sync.arg("--quiet").arg("rig:source").arg(&synced))?;
                self.runs.note(case, "rclone sync", run);
                if self.has_restic {
                    let run = measure(self.restic(&["backup", "--quiet"]).arg(&synced))?;
                    self.runs.note(case, "restic of the copy", run);
                }
            }
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let seconds = |case, tool| self.runs.middle(case, tool, |run| run.seconds);
        for case in ["first", "1 % changed"] {
            let name = format!("s3 {case}");
            let Some(ours) = seconds(case, "stillpoint") else { continue };
            if let Some(sync) = seconds(case, "rclone sync") {
                rows.push(Row::against(&name, "seconds", ours, ("rclone sync", sync), Some(1.0)));
                if let Some(restic) = seconds(case, "restic of the copy") {
                    rows.push(Row::against(&name, "seconds", ours, ("rclone sync + restic", sync + restic), Some(1.0)));
                }
            }
            if let Some(peak) = self.runs.middle(case, "stillpoint", |run| run.peak_mb) {
                rows.push(Row::alone(&name, "peak_mb", peak, Some(PEAK_MB)));
            }
        }
        if let (Some(second), Some(first)) = (seconds("1 % changed", "stillpoint"), seconds("first", "stillpoint")) {
            rows.push(Row::against("s3 1 % changed", "seconds", second, ("our first run", first), Some(0.1)));
        }
        rows
    }

    fn write_platform(&self) -> Result<(), String> {
        let text = format!(
            "apiVersion: stillpoint.dev/v1\nplatform: bench\nenvironment: bench\nbucket:\n  url: {}\n  key: file:{}\nstores:\n  \
             data:\n    driver: objects\n    url: s3://{}\n    options: {{ endpoint: \"http://{}\", region: us-east-1, \
             allow_http: \"true\" }}\n    credentials: {{ access_key_id: env:AWS_ACCESS_KEY_ID, secret_access_key: \
             env:AWS_SECRET_ACCESS_KEY }}\n",
            self.folder.join("ours").display(),
            self.folder.join("bench.key").display(),
            self.server.bucket,
            self.server.address,
        );
        std::fs::write(self.folder.join("platform.yaml"), text).map_err(|error| error.to_string())
    }
}

/// What the text in an object repeats.
const TEXT: &[u8] = b"{\"epoch\": 12, \"loss\": 0.03125, \"worker\": \"a\"}\n";

/// Half text, half noise, as small artifacts are; the same for the same number and round.
fn content(number: u64, round: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number.wrapping_mul(1_000_003) ^ round);
    let mut bytes = vec![0; random.usize(BYTES_MIN..=BYTES_MAX)];
    let half = bytes.len() / 2;
    random.fill(&mut bytes[..half]);
    for (index, byte) in bytes[half..].iter_mut().enumerate() {
        *byte = TEXT[(index + number as usize) % TEXT.len()];
    }
    bytes
}
