//! The S3 server that repositories lie on in a bench: the rig `s3`, with its data beside the input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tools::Server;
use crate::rig::{self, Rig};

/// A running server, apart from the one that tests may be using.
pub struct S3Server {
    folder: PathBuf,
    given: BTreeMap<String, String>,
}

impl S3Server {
    /// Gets, if need be, and starts the server with all its data in `folder`.
    pub fn start(root: &Path, folder: &Path) -> Result<Self, String> {
        let rig = Rig::load(root, "s3")?;
        rig::obtain(&rig, false)?;
        Ok(Self { folder: folder.to_owned(), given: rig::up_in(&rig, folder)? })
    }

    /// Makes an empty bucket.
    pub fn bucket(&self, name: &str) -> Result<Server, String> {
        let given = |part: &str| {
            let name = format!("STILLPOINT_RIG_S3_{part}");
            self.given.get(&name).cloned().ok_or(format!("the rig s3 gives no {name}"))
        };
        let endpoint = given("ENDPOINT")?;
        let server = Server {
            address: endpoint.trim_start_matches("http://").to_owned(),
            access_key_id: given("ACCESS_KEY_ID")?,
            secret_access_key: given("SECRET_ACCESS_KEY")?,
            bucket: name.to_owned(),
        };
        let user = format!("{}:{}", server.access_key_id, server.secret_access_key);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", &user]);
        super::measure::run(curl.args(["--request", "PUT", &format!("{endpoint}/{name}")]))?;
        Ok(server)
    }

    /// Stops the server and removes its data.
    pub fn stop(self) -> Result<(), String> {
        rig::down_in(&self.folder)
    }
}
