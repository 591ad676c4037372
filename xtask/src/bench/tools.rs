//! The tools that are compared, each as the command lines of its four jobs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The password that peers protect their scratch repositories with.
const PASSWORD: &str = "bench-only";

/// One tool.
#[derive(Debug, Clone)]
pub struct Tool {
    /// Which tool.
    pub kind: Kind,
    /// Name and version for the table.
    pub label: String,
    /// Path of the program.
    pub program: PathBuf,
}

/// Which tool a command line is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// This project.
    Stillpoint,
    /// restic.
    Restic,
    /// kopia.
    Kopia,
    /// borg.
    Borg,
    /// rustic.
    Rustic,
}

/// Where one tool's repository and side files lie in one round.
#[derive(Debug, Clone)]
pub struct Place {
    /// Folder of the tool's own, made fresh.
    pub home: PathBuf,
    /// What is backed up.
    pub input: PathBuf,
    /// Whether to compress.
    pub compress: bool,
    /// Where the repository lies if not in the home: a bucket of its own on an S3 server.
    pub server: Option<Server>,
}

/// A bucket on an S3 server.
#[derive(Debug, Clone)]
pub struct Server {
    /// Host and port, reached over plain HTTP.
    pub address: String,
    /// Who may write.
    pub access_key_id: String,
    /// And by which secret; given to tools in their environment.
    pub secret_access_key: String,
    /// The bucket, which exists and is empty.
    pub bucket: String,
}

impl Place {
    /// The repository (or bucket) folder.
    pub fn repository(&self) -> PathBuf {
        self.home.join("repo")
    }

    /// Where restores go.
    pub fn output(&self) -> PathBuf {
        self.home.join("out")
    }
}

/// Finds what is on PATH, newest first; ours is `ours`.
pub fn find(ours: &Path, only: &[String]) -> Vec<Tool> {
    let mut tools = vec![Tool { kind: Kind::Stillpoint, label: "stillpoint".to_owned(), program: ours.to_owned() }];
    let peers = [(Kind::Restic, "restic"), (Kind::Kopia, "kopia"), (Kind::Borg, "borg"), (Kind::Rustic, "rustic")];
    for (kind, name) in peers {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        for program in on_path(name) {
            let label = version(kind, name, &program);
            if tools.iter().all(|tool| tool.label != label) {
                tools.push(Tool { kind, label, program });
            }
        }
    }
    tools
}

fn on_path(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).filter(|program| program.is_file()).collect()
}

fn version(kind: Kind, name: &str, program: &Path) -> String {
    let flag = if matches!(kind, Kind::Restic) { "version" } else { "--version" };
    let output = Command::new(program).arg(flag).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut words = text.split_whitespace().map(|word| word.trim_start_matches('v'));
    let number = words.find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    format!("{name} {}", number.unwrap_or("?"))
}

impl Tool {
    /// Makes an empty repository in a fresh home. Not timed.
    pub fn init(&self, place: &Place) -> Result<(), String> {
        if place.home.exists() {
            std::fs::remove_dir_all(&place.home).map_err(|error| error.to_string())?;
        }
        std::fs::create_dir_all(&place.home).map_err(|error| error.to_string())?;
        let mut command = match self.kind {
            Kind::Stillpoint => {
                write_platform(place)?;
                self.stillpoint(place, &["init"])
            }
            Kind::Restic => self.restic(place, &["init"]),
            Kind::Borg => self.borg(place, &["init", "--encryption", "repokey-blake2"], &[]),
            Kind::Rustic => self.rustic(place, &["init"]),
            Kind::Kopia => match &place.server {
                None => self.kopia(place, &["repository", "create", "filesystem", "--path"], &[&place.repository()]),
                Some(server) => {
                    let mut command = self.kopia(place, &["repository", "create", "s3", "--disable-tls"], &[]);
                    command.args(["--bucket", &server.bucket, "--endpoint", &server.address]);
                    command
                }
            },
        };
        super::measure::run(&mut command)?;
        if self.kind == Kind::Kopia {
            let compression = if place.compress { "zstd-fastest" } else { "none" };
            super::measure::run(&mut self.kopia(
                place,
                &["policy", "set", "--global", "--compression", compression],
                &[],
            ))?;
        }
        Ok(())
    }

    /// The command that backs the input up.
    pub fn backup(&self, place: &Place) -> Command {
        match self.kind {
            Kind::Stillpoint => self.stillpoint(place, &["backup"]),
            Kind::Restic => {
                let compression = if place.compress { "auto" } else { "off" };
                let mut command = self.restic(place, &["backup", "--compression", compression, "--quiet"]);
                command.arg(&place.input);
                command
            }
            Kind::Borg => {
                let compression = if place.compress { "zstd,1" } else { "none" };
                let mut command = self.borg(place, &["create", "--compression", compression], &[]);
                command.arg("::{now:%Y-%m-%dT%H:%M:%S.%f}").arg(&place.input);
                command
            }
            Kind::Rustic => {
                let mut command = self.rustic(place, &["backup"]);
                command.arg(&place.input);
                command
            }
            Kind::Kopia => self.kopia(place, &["snapshot", "create", "--no-progress"], &[&place.input]),
        }
    }

    /// Whether it can read back what a restore wrote and compare it with the backup.
    pub fn compares(&self) -> bool {
        matches!(self.kind, Kind::Stillpoint | Kind::Restic)
    }

    /// The command that restores the newest backup to [`Place::output`]; with `compare` it reads back
    /// what it wrote. Every blob is checked against its hash as it is read in either case.
    pub fn restore(&self, place: &Place, compare: bool) -> Result<Command, String> {
        let output = place.output();
        Ok(match self.kind {
            Kind::Stillpoint => {
                let mut command = self.stillpoint(place, &["restore", "latest", "--yes", "--to"]);
                command.arg(&output).args((!compare).then_some("--no-compare"));
                command
            }
            Kind::Restic => {
                let mut command = self.restic(place, &["restore", "latest", "--quiet", "--target"]);
                command.arg(&output).args(compare.then_some("--verify"));
                command
            }
            Kind::Rustic => {
                let mut command = self.rustic(place, &["restore", "latest"]);
                command.arg(&output);
                command
            }
            Kind::Borg => {
                std::fs::create_dir_all(&output).map_err(|error| error.to_string())?;
                let list = self.borg(place, &["list", "--short", "--last", "1"], &[]).output();
                let name = list.map_err(|error| error.to_string())?.stdout;
                let name = String::from_utf8_lossy(&name).trim().to_owned();
                let mut command = self.borg(place, &["extract"], &[]);
                command.arg(format!("::{name}")).current_dir(&output);
                command
            }
            Kind::Kopia => {
                let mut command =
                    self.kopia(place, &["snapshot", "restore", "--no-progress"], &[&place.input, &output]);
                command.arg("--snapshot-time=latest");
                command
            }
        })
    }

    /// The command that re-reads and checks all data, from the repository and never from a cache.
    pub fn verify(&self, place: &Place) -> Result<Command, String> {
        Ok(match self.kind {
            Kind::Stillpoint => self.stillpoint(place, &["check", "--data"]),
            Kind::Restic => self.restic(place, &["check", "--read-data", "--quiet"]),
            Kind::Rustic => self.rustic(place, &["check", "--read-data"]),
            Kind::Borg => self.borg(place, &["check", "--verify-data"], &[]),
            Kind::Kopia => {
                super::measure::run(&mut self.kopia(place, &["cache", "clear"], &[]))?;
                self.kopia(place, &["snapshot", "verify", "--verify-files-percent=100", "--no-progress"], &[])
            }
        })
    }

    fn stillpoint(&self, place: &Place, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(place.home.join("platform.yaml")).args(args);
        command.env("XDG_STATE_HOME", place.home.join("state"));
        credentials(&mut command, place);
        command
    }

    fn restic(&self, place: &Place, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let repository = match &place.server {
            Some(server) => format!("s3:http://{}/{}", server.address, server.bucket),
            None => place.repository().display().to_string(),
        };
        command.args(["--repo", &repository, "--no-cache"]).args(args).env("RESTIC_PASSWORD", PASSWORD);
        credentials(&mut command, place);
        command
    }

    fn rustic(&self, place: &Place, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--repository").arg(place.repository()).arg("--no-cache").args(args);
        command.env("RUSTIC_PASSWORD", PASSWORD).env("HOME", &place.home);
        command
    }

    fn borg(&self, place: &Place, args: &[&str], paths: &[&Path]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).args(paths).env("BORG_REPO", place.repository()).env("BORG_PASSPHRASE", PASSWORD);
        command.env("BORG_BASE_DIR", place.home.join("borg"));
        command
    }

    fn kopia(&self, place: &Place, args: &[&str], paths: &[&Path]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).args(paths).env("KOPIA_PASSWORD", PASSWORD).env("HOME", &place.home);
        command.env("KOPIA_CONFIG_PATH", place.home.join("kopia.config")).env("KOPIA_CHECK_FOR_UPDATES", "false");
        command.env("KOPIA_CACHE_DIRECTORY", place.home.join("cache")).arg("--disable-file-logging");
        credentials(&mut command, place);
        command
    }
}

fn credentials(command: &mut Command, place: &Place) {
    if let Some(server) = &place.server {
        command.env("AWS_ACCESS_KEY_ID", &server.access_key_id).env("AWS_SECRET_ACCESS_KEY", &server.secret_access_key);
    }
}

fn write_platform(place: &Place) -> Result<(), String> {
    let compression = if place.compress { "auto" } else { "none" };
    let bucket = match &place.server {
        None => place.repository().display().to_string(),
        Some(server) => format!(
            "s3://{}\n  options: {{ endpoint: \"http://{}\", region: us-east-1, allow_http: \"true\" }}\n  credentials: \
             {{ access_key_id: env:AWS_ACCESS_KEY_ID, secret_access_key: env:AWS_SECRET_ACCESS_KEY }}",
            server.bucket, server.address
        ),
    };
    let text = format!(
        "apiVersion: stillpoint.dev/v1\nplatform: bench\nenvironment: bench\nbucket:\n  url: {bucket}\n  key: file:{}\n  \
         compression: {compression}\nstores:\n  data:\n    driver: files\n    path: {}\n",
        place.home.join("bench.key").display(),
        place.input.display(),
    );
    std::fs::write(place.home.join("platform.yaml"), text).map_err(|error| error.to_string())
}
