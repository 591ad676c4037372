//! A MinIO server that one test or soak has for itself, with its own port and folder.
//!
//! Beside `servers`, because it is no database: it is had by `go install`, and knows buckets as
//! folders of its data.

use std::fs;
use std::io::{Error, Read, Result, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const READY_WITHIN: Duration = Duration::from_secs(60);

/// The access key of every [`Minio`].
pub const ACCESS_KEY_ID: &str = "stillpoint-rig";
/// Its secret.
pub const SECRET_ACCESS_KEY: &str = "stillpoint-rig-secret";

/// The server.
#[derive(Debug)]
pub struct Minio {
    program: PathBuf,
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Minio {
    /// Starts `program` with an empty folder.
    ///
    /// # Errors
    /// The system's, and whatever the server said when it did not start within a minute.
    pub fn start(program: &Path) -> Result<Self> {
        let (folder, port) = (TempDir::new()?, crate::servers::free_port()?);
        let mut minio = Self { program: program.to_owned(), folder, port, child: None };
        minio.start_again()?;
        Ok(minio)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Starts the server after [`kill`](Self::kill), on the same port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"))?;
        let mut command = Command::new(&self.program);
        command.args(["server", "--quiet", "--address", &format!("127.0.0.1:{}", self.port)]);
        command.arg(self.folder.path().join("data")).env("MINIO_UPDATE", "off").env("MINIO_BROWSER", "off");
        command.env("MINIO_ROOT_USER", ACCESS_KEY_ID).env("MINIO_ROOT_PASSWORD", SECRET_ACCESS_KEY);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = self.child.insert(command.spawn()?);
        let begun = Instant::now();
        while !answers(self.port) {
            if child.try_wait()?.is_some() || begun.elapsed() > READY_WITHIN {
                let said = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                return Err(Error::other(format!("{} did not start: {said}", self.program.display())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends the server as a crash would.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        // Nothing can be done about a server that does not end; its folder goes all the same.
        drop(self.kill());
    }
}

/// Whether the server takes requests.
fn answers(port: u16) -> bool {
    let ask = || -> Result<bool> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /minio/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
        let mut answer = [0; 15];
        stream.read_exact(&mut answer)?;
        Ok(answer.ends_with(b"200 OK"))
    };
    ask().is_ok_and(|ready| ready)
}
