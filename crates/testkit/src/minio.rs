//! A MinIO server that one test or soak has for itself, with its own port and folder.
//!
//! Beside `servers`, because it is no database: it is had by `go install`, and knows buckets as
//! folders of its data.

use std::ffi::OsString;
use std::io::{Read, Result, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::servers::{Server, free_port};

/// The access key of every [`Minio`].
pub const ACCESS_KEY_ID: &str = "stillpoint-rig";
/// Its secret.
pub const SECRET_ACCESS_KEY: &str = "stillpoint-rig-secret";

/// The server.
#[derive(Debug)]
pub struct Minio {
    server: Server,
    _folder: TempDir,
    port: u16,
}

impl Minio {
    /// Starts `program` with an empty folder.
    ///
    /// # Errors
    /// The system's, and whatever the server said when it did not start within a minute.
    pub fn start(program: &Path) -> Result<Self> {
        let (folder, port) = (TempDir::new()?, free_port()?);
        let address = format!("127.0.0.1:{port}");
        let mut args: Vec<OsString> = ["server", "--quiet", "--address", &address].map(OsString::from).to_vec();
        args.push(folder.path().join("data").into());
        let environment = vec![
            ("MINIO_UPDATE", "off"),
            ("MINIO_BROWSER", "off"),
            ("MINIO_ROOT_USER", ACCESS_KEY_ID),
            ("MINIO_ROOT_PASSWORD", SECRET_ACCESS_KEY),
        ];
        let (program, log) = (program.to_owned(), folder.path().join("log"));
        let server = Server { program, args, environment, not_root: false, log, child: None };
        let mut minio = Self { server, _folder: folder, port };
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
