//! One platform that runs: five stores, a second set of servers to restore into, the application,
//! and a line for every connection that a fault may break.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::minio::{ACCESS_KEY_ID, Minio, SECRET_ACCESS_KEY};
use crate::proxy::Proxy;
use crate::servers::{POSTGRES_PASSWORD, Postgres, Redis};

use super::{CACHE_QUERY, Programs, TEMPLATE, fill};

/// The servers that lines lead to.
pub const LINES: [&str; 3] = ["postgres", "redis", "s3"];

/// The application's database.
const DATABASE: &str = "model_registry";
/// How long the application may take to answer, and to get on after a fault.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);
/// The application's own lease: far beyond the pause budget, so that it is never what ends a pause.
const LEASE_SECONDS: f64 = 60.0;

/// What a platform is like.
#[derive(Debug, Clone)]
pub struct Options {
    /// Writers of the application.
    pub writers: u32,
    /// Publications per second of all writers; 0 means as fast as they can.
    pub per_second: f64,
    /// Whether the application also overwrites and deletes objects, and uploads some slowly in parts.
    pub overwrites: bool,
    /// The platform's description, with addresses between braces.
    pub template: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { writers: 2, per_second: 0.0, overwrites: false, template: TEMPLATE.to_owned() }
    }
}

/// The platform. Its servers and its folder go with it.
#[derive(Debug)]
pub struct Stage {
    folder: tempfile::TempDir,
    /// The servers.
    pub postgres: Postgres,
    /// The cache keeps what it acknowledged: every command is on disk before it is answered.
    pub redis: Redis,
    /// The object store of the artifacts and of their copy.
    pub minio: Minio,
    /// The lines of the engine to the servers, by their names.
    pub engine_lines: BTreeMap<&'static str, Proxy>,
    /// The lines of the application.
    pub writer_lines: BTreeMap<&'static str, Proxy>,
    programs: Programs,
    options: Options,
    hooks: SocketAddr,
    application: Child,
    copies: u32,
}

/// Fresh servers that a point is restored into.
#[derive(Debug)]
pub struct Copy {
    _postgres: Postgres,
    _redis: Redis,
    settings: PathBuf,
}

fn said<T, E: std::fmt::Display>(result: Result<T, E>, what: &str) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

impl Stage {
    /// Starts everything; the application writes when this returns.
    ///
    /// # Errors
    /// What did not start, and what it said.
    pub fn start(programs: &Programs, options: Options) -> Result<Self, String> {
        let folder = said(tempfile::Builder::new().prefix("stillpoint-stage-").tempdir(), "a folder")?;
        let postgres = start_postgres(programs)?;
        let durable = ["--appendonly", "yes", "--appendfsync", "always"];
        let redis = said(Redis::start(&programs.redis_server, &durable), "redis")?;
        let minio = said(Minio::start(&programs.minio), "minio")?;
        let lines = || -> Result<BTreeMap<&'static str, Proxy>, String> {
            let ports = [postgres.port(), redis.port(), minio.port()];
            let start = |(name, port): (&'static str, u16)| {
                Ok((name, said(Proxy::start((Ipv4Addr::LOCALHOST, port).into()), "a proxy")?))
            };
            LINES.into_iter().zip(ports).map(start).collect()
        };
        let (engine_lines, writer_lines) = (lines()?, lines()?);
        let port = said(crate::servers::free_port(), "a port")?;
        let path = folder.path();
        for name in ["app", "secrets", "bucket", "state"] {
            said(std::fs::create_dir_all(path.join(name)), name)?;
        }
        for (name, value) in [
            ("postgres", POSTGRES_PASSWORD),
            ("s3-access-key-id", ACCESS_KEY_ID),
            ("s3-secret-access-key", SECRET_ACCESS_KEY),
        ] {
            said(std::fs::write(path.join("secrets").join(name), value), name)?;
        }
        let hooks = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let settings = path.join("app.json");
        let line = |name: &str| writer_lines[name].port();
        let mut values = place(path, "app", (line("postgres"), DATABASE), line("redis"), (line("s3"), "artifacts"));
        values["listen"] = hooks.to_string().into();
        values["writers"] = options.writers.into();
        values["per_second"] = options.per_second.into();
        values["overwrites"] = options.overwrites.into();
        values["lease_seconds"] = LEASE_SECONDS.into();
        write_json(&settings, &values)?;
        run(Command::new(&programs.registry).arg("create").arg(&settings))?;
        let application = start_application(programs, path)?;
        let stage = Self {
            folder,
            postgres,
            redis,
            minio,
            engine_lines,
            writer_lines,
            programs: programs.clone(),
            options,
            hooks,
            application,
            copies: 0,
        };
        stage.wait_for_progress()?;
        stage.write_platform(0, 0, "none")?;
        run(&mut stage.engine(&["init"]))?;
        Ok(stage)
    }

    /// The path of the platform's folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Our program, ready to be run on this platform, with a state folder of its own.
    pub fn engine(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.programs.stillpoint);
        command
            .args(arguments)
            .current_dir(self.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .env("TMPDIR", tempfile::env::temp_dir())
            .env("STILLPOINT_STATE", self.path().join("state"))
            .stdin(Stdio::null());
        command
    }

    /// The application, ready to be run with arguments.
    pub fn registry(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.programs.registry);
        command.args(arguments).current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// Describes the platform, with the ports of the servers to restore into.
    fn write_platform(&self, staging_postgres: u16, staging_redis: u16, staging_bucket: &str) -> Result<(), String> {
        let line = |name: &str| self.engine_lines[name].port().to_string();
        let values = BTreeMap::from([
            ("folder", self.path().display().to_string()),
            ("bucket", self.path().join("bucket").display().to_string()),
            ("postgres_port", line("postgres")),
            ("postgres_database", DATABASE.to_owned()),
            ("redis_port", line("redis")),
            ("s3_endpoint", format!("http://127.0.0.1:{}", line("s3"))),
            ("s3_bucket", "artifacts".to_owned()),
            ("hooks", format!("http://{}", self.hooks)),
            ("cache_query", CACHE_QUERY.to_owned()),
            ("staging_postgres_port", staging_postgres.to_string()),
            ("staging_redis_port", staging_redis.to_string()),
            ("staging_s3_bucket", staging_bucket.to_owned()),
        ]);
        let text = fill(&self.options.template, &values)?;
        said(std::fs::write(self.path().join("platform.yaml"), text), "platform.yaml")
    }

    /// Starts empty servers to restore into, and names them in `platform.yaml`.
    ///
    /// # Errors
    /// What did not start, and what it said.
    pub fn copy(&mut self) -> Result<Copy, String> {
        self.copies += 1;
        let postgres = start_postgres(&self.programs)?;
        let redis = said(Redis::start(&self.programs.redis_server, &[]), "redis")?;
        let bucket = format!("staging-{}", self.copies);
        let folder = self.path().join("staging");
        if folder.exists() {
            said(std::fs::remove_dir_all(&folder), "the folder of the copy")?;
        }
        let settings = self.path().join("staging.json");
        let s3 = (self.minio.port(), bucket.as_str());
        let mut values = place(self.path(), "staging", (postgres.port(), DATABASE), redis.port(), s3);
        values["overwrites"] = self.options.overwrites.into();
        write_json(&settings, &values)?;
        run(self.registry(&["targets"]).arg(&settings))?;
        self.write_platform(postgres.port(), redis.port(), &bucket)?;
        Ok(Copy { _postgres: postgres, _redis: redis, settings })
    }

    /// Judges a copy by the application's record. The answer is the verdict's JSON, whatever it says.
    ///
    /// # Errors
    /// What kept the judge from judging.
    pub fn judge(&self, copy: &Copy, point: &Path) -> Result<serde_json::Value, String> {
        let output = said(self.registry(&["judge"]).arg(&copy.settings).arg(point).output(), "the judge")?;
        if output.status.code() == Some(2) {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        said(serde_json::from_slice(&output.stdout), "the judge's verdict")
    }

    /// What the application says of itself.
    ///
    /// # Errors
    /// The application does not answer.
    pub fn oracle(&self) -> Result<serde_json::Value, String> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&self.hooks, ANSWER_WITHIN)?;
            stream.set_read_timeout(Some(ANSWER_WITHIN))?;
            write!(stream, "GET /oracle HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.hooks)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = said(ask(), "the application")?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        said(serde_json::from_str(body), "the application's answer")
    }

    /// Waits until a writer gets something acknowledged.
    ///
    /// # Errors
    /// They do not within a minute.
    pub fn wait_for_progress(&self) -> Result<(), String> {
        let begun = Instant::now();
        let acknowledged = || self.oracle().ok().and_then(|oracle| oracle["acknowledged"].as_u64());
        let mut before = None;
        while begun.elapsed() < PROGRESS_WITHIN {
            match (before, acknowledged()) {
                (Some(before), Some(now)) if now > before => return Ok(()),
                (None, now) => before = now,
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("the writers do not get on".to_owned())
    }

    /// Starts the application again, whose writers then ask the database before each publication.
    ///
    /// # Errors
    /// What did not start, and what it said.
    pub fn ask_database(&mut self) -> Result<(), String> {
        said(self.application.kill(), "the application")?;
        said(self.application.wait(), "the application")?;
        let path = self.path().join("app.json");
        let text = said(std::fs::read_to_string(&path), "app.json")?;
        let mut settings: serde_json::Value = said(serde_json::from_str(&text), "app.json")?;
        settings["ask_database"] = true.into();
        write_json(&path, &settings)?;
        self.application = start_application(&self.programs, self.path())?;
        self.wait_for_progress()
    }

    /// Keeps the folder when the platform goes, for whoever wants to look further.
    pub fn keep(&mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        self.path().to_owned()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // It has nothing to lose: its record is written line by line.
        drop(self.application.kill());
        drop(self.application.wait());
    }
}

fn start_postgres(programs: &Programs) -> Result<Postgres, String> {
    said(Postgres::start(&programs.postgres_bin, &["max_connections=60", "shared_buffers=64MB"]), "postgres")
}

/// The settings of one environment. Ports are those of servers or of lines to them.
fn place(
    folder: &Path,
    name: &str,
    (postgres, database): (u16, &str),
    redis: u16,
    (s3, bucket): (u16, &str),
) -> serde_json::Value {
    serde_json::json!({
        "postgres": format!("postgresql://postgres:{POSTGRES_PASSWORD}@127.0.0.1:{postgres}/{database}"),
        "redis": format!("redis://127.0.0.1:{redis}"),
        "s3": {
            "endpoint": format!("http://127.0.0.1:{s3}"), "bucket": bucket,
            "access_key_id": ACCESS_KEY_ID, "secret_access_key": SECRET_ACCESS_KEY,
        },
        "code": folder.join(name).join("code.git"),
        "config": folder.join(name).join("config"),
        "record": folder.join("record"),
    })
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), String> {
    said(std::fs::write(path, format!("{value:#}\n")), &path.display().to_string())
}

/// Starts the application and waits until its hooks answer.
fn start_application(programs: &Programs, folder: &Path) -> Result<Child, String> {
    let log = said(File::create(folder.join("app.log")), "app.log")?;
    let mut command = Command::new(&programs.registry);
    command.arg("serve").arg(folder.join("app.json")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = said(command.spawn(), "the application")?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        said(BufReader::new(output).read_line(&mut line), "the application")?;
    }
    if line.starts_with("http://") { Ok(child) } else { Err("the application did not start".to_owned()) }
}

/// Runs a program to its end; what it said is the error.
fn run(command: &mut Command) -> Result<(), String> {
    let output = said(command.output(), &format!("{command:?}"))?;
    if output.status.success() {
        return Ok(());
    }
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    Err(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
