//! Adds, removes, lists and rotates the keys of a repository.
//!
//! A key file holds the master key, sealed with what a person or a file keeps. So keys come and go
//! without a byte of data being rewritten; and whoever had both an old key and the bucket may have
//! kept the master key: rotation shuts a door, it does not change the lock behind it.

use stillpoint_core::{Error, Kind, Result};

use crate::depot::WriteMode;
use crate::format::key::KeyFileJson;
use crate::unpacked::{self, FileKind};
use crate::{Id, KeyFile, Repository, Unlock, key};

/// One key file of the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its id: the name of the file, hex.
    pub id: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// The label given, kept in restic's `username`.
    pub label: String,
    /// The machine it was made on.
    pub hostname: String,
    /// Whether this session was opened with it.
    pub current: bool,
}

impl Repository {
    /// All keys, oldest first.
    ///
    /// # Errors
    /// `Corrupt` if a key file is damaged.
    pub fn keys(&self) -> Result<Vec<KeyInfo>> {
        let mut keys = Vec::new();
        for id in unpacked::list(self.depot(), FileKind::Key)? {
            keys.push(self.info(&id, key::load(self.depot(), &id)?));
        }
        keys.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        Ok(keys)
    }

    /// Lets `new` open the repository too, and proves that it does.
    pub fn key_add(&self, new: &Unlock, label: &str) -> Result<KeyInfo> {
        if matches!(new, Unlock::Password(password) if password.is_empty()) {
            return Err(Error::new(Kind::Config, "an empty password protects nothing"));
        }
        let (id, key) = key::create(self.depot(), self.master_key(), new, label)?;
        let (_, master) = key::open(self.depot(), new)?;
        if master.to_json() != self.master_key().to_json() {
            return Err(Error::internal("a new key opens to another master key"));
        }
        Ok(self.info(&id, key))
    }

    /// Removes the key whose id is `id` or the only one that begins with it.
    ///
    /// # Errors
    /// `Config` for the key in use and for the last one; `NotFound` if there is none such.
    pub fn key_remove(&self, id: &str) -> Result<()> {
        let ids = unpacked::list(self.depot(), FileKind::Key)?;
        let mut matching = ids.iter().filter(|key| key.hex().starts_with(&id.to_ascii_lowercase()));
        let found = match (matching.next(), matching.next()) {
            (Some(found), None) if !id.is_empty() => *found,
            (Some(_), _) => return Err(Error::new(Kind::Config, format!("`{id}` is the begin of several key ids"))),
            (None, _) => return Err(Error::new(Kind::NotFound, format!("there is no key `{id}`"))),
        };
        if ids.len() == 1 {
            return Err(Error::new(Kind::Config, "the last key cannot be removed")
                .hint("without a key nobody can ever read the repository; add another one first"));
        }
        if found == self.key_id() {
            return Err(Error::new(Kind::Config, "the key in use cannot be removed")
                .hint("open the repository with another key, or use `key rotate`"));
        }
        self.remove(&found)
    }

    /// Adds `new`, proves that it opens the repository, and removes the key in use.
    ///
    /// Data stays as it is. This value goes on working; whoever opens anew needs `new`.
    pub fn key_rotate(&self, new: &Unlock, label: &str) -> Result<KeyInfo> {
        let added = self.key_add(new, label)?;
        if added.id != self.key_id().hex() {
            self.remove(&self.key_id())?;
        }
        Ok(KeyInfo { current: true, ..added })
    }

    /// Deletes a key file; puts it back if that left none, because someone else removed the others
    /// at the same time.
    fn remove(&self, id: &Id) -> Result<()> {
        let name = FileKind::Key.name(id);
        let kept = match self.depot().read(&name) {
            Ok((bytes, _)) => bytes,
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        self.depot().delete(&name)?;
        if unpacked::list(self.depot(), FileKind::Key)?.is_empty() {
            self.depot().write(&name, &[&kept], &WriteMode::Replace)?;
            return Err(Error::new(Kind::Conflict, "other keys were removed at the same time; this one stays"));
        }
        Ok(())
    }

    fn info(&self, id: &Id, key: KeyFileJson) -> KeyInfo {
        let KeyFileJson { created, username, hostname, .. } = key;
        KeyInfo { id: id.hex(), created, label: username, hostname, current: *id == self.key_id() }
    }
}

/// The sheet to print and keep where the platform is not: what opens the repository, and how to
/// restore with nothing but restic.
///
/// `location` is the bucket as `platform.yaml` names it, `restic_location` the repository in it as
/// restic does: `s3:https://server/bucket/repo`.
pub fn recovery_sheet(key: &KeyFile, repository_id: &str, location: &str, restic_location: &str) -> String {
    let text = key.text();
    let (first, second) = text.split_at(text.len() / 2);
    let cut = second.find('-').unwrap_or(0);
    let halves = [format!("{first}{}", &second[..cut]), second[cut..].to_owned()];
    format!(
        "RECOVERY SHEET

Whoever has this sheet and the bucket can read every recovery point.
Without this key, or another key of the repository, nobody can.
Keep it where the platform is not.

bucket      {location}
repository  {repository_id}
key         {}
            {}

Write the key into a file, in one line without a space, for example key.txt.
Case does not matter, and O reads as 0, I and L as 1, if the file is used with stillpoint.
For restic write it exactly as above.

To restore with stillpoint:
  name the file in platform.yaml:   bucket: {{ url: {location}, key: file:key.txt }}
  stillpoint list
  stillpoint restore latest --to DIRECTORY

To restore with nothing but restic (0.14 or newer):
  restic -r {restic_location} --password-file key.txt snapshots
  restic -r {restic_location} --password-file key.txt restore latest --target DIRECTORY

Each store's folder in DIRECTORY holds a HOW-TO-RESTORE.txt.
",
        halves[0], halves[1]
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::InitOptions;
    use crate::depot::memory::MemoryDepot;

    fn file_key() -> Unlock {
        Unlock::KeyFile(KeyFile::generate().expect("random"))
    }

    #[test]
    fn keys_come_and_go_and_the_last_one_stays() {
        let depot = Arc::new(MemoryDepot::new());
        let (first, second) = (file_key(), file_key());
        let options = InitOptions { key_label: "first".into(), ..InitOptions::default() };
        let repository = Repository::init(depot.clone(), &first, &options).expect("init");
        let only = repository.keys().expect("keys").remove(0);
        assert_eq!((only.label.as_str(), only.current), ("first", true));
        assert_eq!(repository.key_remove(&only.id).expect_err("last").kind(), Kind::Config);

        let added = repository.key_add(&second, "second").expect("adds");
        assert_eq!(repository.keys().expect("keys").len(), 2);
        assert_eq!(repository.key_remove(&only.id).expect_err("in use").kind(), Kind::Config);
        assert_eq!(repository.key_remove("").expect_err("several").kind(), Kind::Config);
        assert_eq!(repository.key_remove("zz").expect_err("none").kind(), Kind::NotFound);
        let other = Repository::open(depot.clone(), &second).expect("second opens");
        other.key_remove(&only.id[..12]).expect("a prefix is enough");
        assert_eq!(other.key_remove(&added.id).expect_err("last").kind(), Kind::Config);
        assert_eq!(Repository::open(depot, &first).expect_err("gone").kind(), Kind::Unauthenticated);
    }

    #[test]
    fn rotation_replaces_the_key_and_nothing_else() {
        let depot = Arc::new(MemoryDepot::new());
        let (old, new) = (file_key(), file_key());
        let repository = Repository::init(depot.clone(), &old, &InitOptions::default()).expect("init");
        repository.key_rotate(&new, "new").expect("rotates");
        let opened = Repository::open(depot.clone(), &new).expect("new opens");
        assert_eq!(opened.id(), repository.id());
        assert_eq!(opened.authenticate("x", b"y"), repository.authenticate("x", b"y"));
        assert_eq!(opened.keys().expect("keys").len(), 1);
        assert_eq!(Repository::open(depot, &old).expect_err("old").kind(), Kind::Unauthenticated);
    }

    #[test]
    fn the_recovery_sheet_holds_the_whole_key() {
        let key = KeyFile::generate().expect("random");
        let sheet = recovery_sheet(&key, "abcd", "s3://bucket/prefix", "s3:https://server/bucket/prefix/repo");
        let mut lines = sheet.lines().skip_while(|line| !line.starts_with("key "));
        let first = lines.next().expect("first half").trim_start_matches("key").trim();
        let second = lines.next().expect("second half").trim();
        assert_eq!(KeyFile::parse(&format!("{first}{second}")).expect("parses"), key);
        assert_eq!(format!("{first}{second}"), key.text());
        let command = "restic -r s3:https://server/bucket/prefix/repo --password-file key.txt restore latest";
        assert!(sheet.contains(command), "{sheet}");
    }
}
