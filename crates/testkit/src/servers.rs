//! Real servers that one test has for itself: started on loopback with a port and a folder of their
//! own, killed, stopped for a while and started again as the test likes, gone at its end.
//!
//! The rigs that `cargo xtask rig` starts are shared; what a test would spoil for others it does
//! here. Knows how the servers are started, not what is in them.

use std::ffi::OsString;
use std::fs;
use std::io::{Error, Result};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

const READY_WITHIN: Duration = Duration::from_secs(60);
const ENDED_WITHIN: Duration = Duration::from_secs(20);
/// The user and group that own nothing.
const NOBODY: &str = "65534";
/// What nobody needs to reach programs in a home directory; without `no_setuid_fixup`, access(2) would not
/// count it.
const MAY_PASS: &str = "+dac_override,+dac_read_search";

/// The password of the superuser `postgres` on every [`Postgres`].
pub const POSTGRES_PASSWORD: &str = "stillpoint-rig-secret";

/// A command that runs `program` as nobody if the tests run as root, which PostgreSQL refuses.
pub fn not_as_root(program: &Path) -> Command {
    if !geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--securebits", "+no_setuid_fixup"]);
    command.args(["--inh-caps", MAY_PASS, "--ambient-caps", MAY_PASS]).arg(program);
    command
}

/// Gives a folder with everything in it to nobody, if the tests run as root.
///
/// # Errors
/// What `chown` says.
pub fn give_to_nobody(folder: &Path) -> Result<()> {
    match geteuid().is_root() {
        true => run(Command::new("chown").args(["-R", &format!("{NOBODY}:{NOBODY}")]).arg(folder)),
        false => Ok(()),
    }
}

/// A port on loopback that is free now.
///
/// # Errors
/// The system's, when there is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// One process with the command that starts it again.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) environment: Vec<(&'static str, &'static str)>,
    pub(crate) not_root: bool,
    pub(crate) log: PathBuf,
    pub(crate) child: Option<Child>,
}

impl Server {
    pub(crate) fn start(&mut self, is_ready: &dyn Fn() -> bool) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = if self.not_root { not_as_root(&self.program) } else { Command::new(&self.program) };
        command
            .args(&self.args)
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = self.child.insert(command.spawn()?);
        let begun = Instant::now();
        while !is_ready() {
            if child.try_wait()?.is_some() || begun.elapsed() > READY_WITHIN {
                let said = fs::read_to_string(&self.log).unwrap_or_default();
                return Err(Error::other(format!("{} did not start: {said}", self.program.display())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().ok_or_else(|| Error::other("the server does not run"))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or_else(|| Error::other("the server has no process id"))?, signal)?;
        Ok(())
    }

    /// Sends the signal and waits for the end, at last with SIGKILL.
    pub(crate) fn end(&mut self, signal: Signal) -> Result<()> {
        if self.child.is_none() {
            return Ok(());
        }
        self.signal(signal)?;
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let begun = Instant::now();
        while child.try_wait()?.is_none() {
            if begun.elapsed() > ENDED_WITHIN {
                child.kill()?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// A PostgreSQL server. Its superuser is `postgres`, its password [`POSTGRES_PASSWORD`].
#[derive(Debug)]
pub struct Postgres {
    server: Server,
    bin: PathBuf,
    folder: TempDir,
    port: u16,
}

impl Postgres {
    /// Makes a data directory and starts the server whose programs lie in `bin`, with `settings`
    /// such as `max_connections=20` over the defaults.
    ///
    /// # Errors
    /// The system's, and whatever the server said when it did not start within a minute.
    pub fn start(bin: &Path, settings: &[&str]) -> Result<Self> {
        let folder = TempDir::new()?;
        let password = folder.path().join("password");
        fs::write(&password, POSTGRES_PASSWORD)?;
        give_to_nobody(folder.path())?;
        let data = folder.path().join("data");
        let mut initialize = not_as_root(&bin.join("initdb"));
        initialize.arg("--pgdata").arg(&data).arg("--pwfile").arg(&password);
        initialize.args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"]);
        run(initialize.args(["--no-sync", "--no-instructions"]))?;
        Self::over(bin, folder, settings)
    }

    /// Starts a server over a data directory that is there: `data` in `folder`, which belongs to nobody
    /// if the tests run as root.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn over(bin: &Path, folder: TempDir, settings: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut args: Vec<OsString> = vec!["-D".into(), folder.path().join("data").into()];
        args.extend(["-p".into(), port.to_string().into()]);
        let socket = format!("unix_socket_directories={}", folder.path().display());
        let own =
            ["listen_addresses=127.0.0.1", "fsync=off", "wal_level=logical", "max_prepared_transactions=10", &socket];
        for setting in own.iter().chain(settings) {
            args.extend(["-c".into(), (*setting).into()]);
        }
        let log = folder.path().join("log");
        let program = bin.join("postgres");
        let server = Server { program, args, environment: Vec::new(), not_root: true, log, child: None };
        let mut postgres = Self { server, bin: bin.to_owned(), folder, port };
        postgres.start_again()?;
        Ok(postgres)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of a database, with user and password.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://postgres:{POSTGRES_PASSWORD}@127.0.0.1:{}/{database}", self.port)
    }

    /// The folder that holds everything of the server; its data lies in `data`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs statements through the server's own `psql` and returns what it prints, unaligned.
    ///
    /// # Errors
    /// What `psql` says when a statement fails.
    pub fn sql(&self, database: &str, statements: &str) -> Result<String> {
        sql(&self.bin, &self.url(database), statements)
    }

    /// Starts the server after [`stop`](Self::stop) or [`kill`](Self::kill), on the same port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<()> {
        let (bin, url) = (self.bin.clone(), self.url("postgres"));
        self.server.start(&|| sql(&bin, &url, "SELECT 1").is_ok())
    }

    /// Stops the server in order; sessions are ended.
    ///
    /// # Errors
    /// The system's.
    pub fn stop(&mut self) -> Result<()> {
        self.server.end(Signal::INT)
    }

    /// Ends the server as a crash would, with all its processes.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.server.end(Signal::QUIT)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Nothing can be done about a server that does not end; its folder goes all the same.
        drop(self.server.end(Signal::QUIT));
    }
}

/// Runs statements through `psql` from `bin` and returns what it prints, unaligned.
///
/// # Errors
/// What `psql` says when a statement fails.
pub fn sql(bin: &Path, url: &str, statements: &str) -> Result<String> {
    let mut command = Command::new(bin.join("psql"));
    command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statements, url]).env("PGCONNECT_TIMEOUT", "10");
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

/// A Redis or Valkey server.
#[derive(Debug)]
pub struct Redis {
    server: Server,
    folder: TempDir,
    port: u16,
}

impl Redis {
    /// Starts `program` with `args` over the defaults: nothing is saved, `DEBUG` is allowed.
    ///
    /// # Errors
    /// The system's, and whatever the server said when it did not start within a minute.
    pub fn start(program: &Path, args: &[&str]) -> Result<Self> {
        Self::over(program, TempDir::new()?, args)
    }

    /// Starts `program` over the files that lie in `folder`, such as a `dump.rdb`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn over(program: &Path, folder: TempDir, args: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let own = ["--bind", "127.0.0.1", "--save", "", "--enable-debug-command", "yes", "--port"];
        let mut all: Vec<OsString> = own.map(OsString::from).to_vec();
        all.extend([port.to_string().into(), "--dir".into(), folder.path().into()]);
        all.extend(args.iter().map(OsString::from));
        let log = folder.path().join("log");
        let program = program.to_owned();
        let server = Server { program, args: all, environment: Vec::new(), not_root: false, log, child: None };
        let mut redis = Self { server, folder, port };
        redis.start_again()?;
        Ok(redis)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The folder that holds everything of the server.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts the server after [`kill`](Self::kill), on the same port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<()> {
        let port = self.port;
        self.server.start(&|| answers(port))
    }

    /// Ends the server as a crash would.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.server.end(Signal::KILL)
    }

    /// Stops its process; connections stay open and nothing answers.
    ///
    /// # Errors
    /// The system's.
    pub fn freeze(&self) -> Result<()> {
        self.server.signal(Signal::STOP)
    }

    /// Lets its process go on.
    ///
    /// # Errors
    /// The system's.
    pub fn thaw(&self) -> Result<()> {
        self.server.signal(Signal::CONT)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Nothing can be done about a server that does not end; its folder goes all the same.
        drop(self.server.end(Signal::KILL));
    }
}

/// Whether a Redis server answers commands, also if it asks for a password first.
fn answers(port: u16) -> bool {
    let ask = || -> Result<bool> {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 8];
        let length = stream.read(&mut answer)?;
        Ok(answer[..length].starts_with(b"+PONG") || answer[..length].starts_with(b"-NOAUTH"))
    };
    ask().is_ok_and(|answered| answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_start_stop_and_start_again() {
        let name = "servers_start_stop_and_start_again";
        match std::env::var_os("STILLPOINT_RIG_POSTGRES_BIN") {
            None => crate::skip(name, "no rig: cargo xtask rig up postgres"),
            Some(bin) => {
                let mut postgres = Postgres::start(Path::new(&bin), &["max_connections=20"]).unwrap();
                postgres.sql("postgres", "CREATE TABLE t AS SELECT 7 AS n; CHECKPOINT").unwrap();
                postgres.kill().unwrap();
                assert!(postgres.sql("postgres", "SELECT 1").is_err());
                postgres.start_again().unwrap();
                assert_eq!(postgres.sql("postgres", "SELECT n FROM t; SHOW max_connections").unwrap(), "7\n20");
                postgres.stop().unwrap();
            }
        }
        match std::env::var_os("STILLPOINT_RIG_REDIS_SERVER") {
            None => crate::skip(name, "no rig: cargo xtask rig up redis"),
            Some(program) => {
                let mut redis = Redis::start(Path::new(&program), &[]).unwrap();
                redis.freeze().unwrap();
                redis.thaw().unwrap();
                redis.kill().unwrap();
                redis.start_again().unwrap();
            }
        }
    }
}
