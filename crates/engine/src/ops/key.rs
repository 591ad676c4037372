//! `key`: who can unlock the repository. Adds, removes and rotates without rewriting data.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, IoContext, Kind};
use stillpoint_core::platform::Secret;
use stillpoint_repo::{KeyFile, KeyInfo, Repository, Unlock, recovery_sheet};

use super::show::restic_location;
use crate::config::Config;
use crate::open::{Session, unlock_from};

/// One key, as shown.
#[derive(Debug, Serialize)]
pub struct KeyLine {
    /// Its id, hex.
    pub id: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// The label given.
    pub label: String,
    /// The machine it was made on.
    pub hostname: String,
    /// Whether it opened this session.
    pub current: bool,
}

impl From<KeyInfo> for KeyLine {
    fn from(key: KeyInfo) -> Self {
        let KeyInfo { id, created, label, hostname, current, .. } = key;
        Self { id, created, label, hostname, current }
    }
}

/// Where a new key comes from.
#[derive(Debug, Clone)]
pub enum NewKey {
    /// A key file that is generated and written here, mode 0600. Never overwrites.
    File(PathBuf),
    /// What a reference yields: a password, or the text of a key file.
    Secret(Secret),
}

/// All keys of the repository.
pub fn list(session: &Session) -> Result<Vec<KeyLine>> {
    Ok(session.repository().keys()?.into_iter().map(KeyLine::from).collect())
}

/// Lets one more key open the repository.
pub fn add(session: &Session, new: &NewKey, label: &str) -> Result<KeyLine> {
    let unlock = make(session, new)?;
    Ok(session.repository().key_add(&unlock, label)?.into())
}

/// Takes a key away; `id` may be a unique prefix. Refuses the key in use, so that no one locks
/// himself out.
pub fn remove(session: &Session, id: &str) -> Result<KeyLine> {
    let keys = session.repository().keys()?;
    let mut matching = keys.into_iter().filter(|key| !id.is_empty() && key.id.starts_with(id));
    let hint = "`stillpoint key list` shows the keys";
    let Some(key) = matching.next() else {
        return Err(Error::new(Kind::Config, format!("there is no key `{id}`")).hint(hint));
    };
    if matching.next().is_some() {
        return Err(Error::new(Kind::Config, format!("`{id}` names several keys")).hint(hint));
    }
    session.repository().key_remove(&key.id)?;
    Ok(key.into())
}

/// Adds a key and removes the one in use. Configurations that name the old key must be changed.
pub fn rotate(session: &Session, new: &NewKey, label: &str) -> Result<KeyLine> {
    let unlock = make(session, new)?;
    Ok(session.repository().key_rotate(&unlock, label)?.into())
}

fn make(session: &Session, new: &NewKey) -> Result<Unlock> {
    match new {
        NewKey::Secret(secret) => unlock_from(&session.config().secrets, secret),
        NewKey::File(path) => {
            let key = generate(path)?;
            write_sheet(session.config(), session.repository(), &key, path)?;
            Ok(Unlock::KeyFile(key))
        }
    }
}

/// Writes the key once more, to be printed and locked away, beside its file: `NAME-recovery-sheet.txt`.
pub fn write_sheet(config: &Config, repository: &Repository, key: &KeyFile, key_file: &Path) -> Result<PathBuf> {
    let name = key_file.file_stem().unwrap_or_default().to_string_lossy();
    let path = key_file.with_file_name(format!("{name}-recovery-sheet.txt"));
    let sheet = recovery_sheet(key, repository.id(), &config.platform.bucket.url, &restic_location(config));
    write_private(&path, sheet.as_bytes())?;
    Ok(path)
}

/// Generates a key and writes it to a new file that only this user may read.
///
/// # Errors
/// `AlreadyExists` if the file is there: a key that is overwritten is a bucket that is lost.
pub fn generate(path: &Path) -> Result<KeyFile> {
    let key = KeyFile::generate()?;
    write_private(path, format!("{}\n", key.text()).as_bytes())?;
    Ok(key)
}

/// Writes a new file with mode 0600 and syncs it and its folder.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let shown = path.display();
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
            let exists = error.kind() == std::io::ErrorKind::AlreadyExists;
            let error = Error::io(format!("cannot create `{shown}`"), error);
            if exists { error.hint("it is never overwritten; move it away first") } else { error }
        })?;
    file.write_all(bytes).and_then(|()| file.sync_all()).or_io(|| format!("cannot write `{shown}`"))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .or_io(|| format!("cannot sync `{}`", folder.display()))
}
