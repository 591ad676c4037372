//! What a target is told while it follows us, and how a restore that was killed is taken up again.
//!
//! The target bears the note of what it was itself: in the name by which it shows itself to its master,
//! which it gets back last of all. So whoever tries again, on whichever machine, can tell what a restore
//! of ours left from somebody's replica. The one thing that is written nowhere is a password.

use std::collections::BTreeMap;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};

use super::client::Connection;
use super::wire::{self, Reply};

/// The setting that bears the note: the user as which the target shows itself to its master.
const NOTED_IN: &str = "masteruser";
const PASSWORD: &str = "masterauth";
/// An empty target need not write the image to its disk before it loads it.
const LOAD: &str = "repl-diskless-load";
/// The settings that are borrowed, in this order; they go back the other way round.
const BORROWED: [&str; 3] = [NOTED_IN, PASSWORD, LOAD];
/// How a note begins.
const MARK: &str = "stillpoint-restore:";
/// How long whoever feeds the target may take to accept a connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// What a target was before it followed us.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The restore.
    pub restore: String,
    /// Where its old content is kept, on the machine that made the restore; `None` if it held nothing.
    pub kept: Option<PathBuf>,
    /// The stamp that it bore, in hex.
    stamp: Option<String>,
    /// The settings that are others meanwhile, but for the password.
    settings: BTreeMap<String, String>,
    /// Whether it had a password for its master.
    had_password: bool,
}

impl Note {
    /// What is known before anything is borrowed.
    pub fn new(restore: &str, kept: Option<PathBuf>, stamp: Option<&[u8]>) -> Self {
        Self { restore: restore.to_owned(), kept, stamp: stamp.map(hex::encode), ..Self::default() }
    }

    /// The stamp that the target bore.
    pub fn stamp(&self) -> Result<Option<Vec<u8>>> {
        let damaged = |error| Error::new(Kind::Corrupt, "the note of an interrupted restore is damaged").source(error);
        self.stamp.as_ref().map(hex::decode).transpose().map_err(damaged)
    }

    /// What it held, for people.
    pub fn occupied(&self) -> Option<String> {
        let kept = self.kept.as_ref()?.display();
        Some(format!("what the interrupted restore `{}` left; the old content is kept: {kept}", self.restore))
    }

    fn text(&self) -> Result<String> {
        let json = serde_json::to_vec(self).map_err(|e| Error::internal("a note does not serialize").source(e))?;
        Ok(format!("{MARK}{}", hex::encode(json)))
    }

    fn parse(text: &str) -> Option<Self> {
        serde_json::from_slice(&hex::decode(text.strip_prefix(MARK)?).ok()?).ok()
    }

    /// The note that a server bears, if a restore of ours was killed while it followed us.
    pub fn read(control: &mut Connection) -> Result<Option<Self>> {
        Ok(control.config(NOTED_IN)?.and_then(|text| Self::parse(&text)))
    }

    /// The note of a server that follows us still, though we are gone; `None` for a master.
    ///
    /// # Errors
    /// `Conflict` while another restore feeds it, or if it follows somebody else by now.
    pub fn of_follower(control: &mut Connection, info: &str) -> Result<Option<Self>> {
        if wire::info(info, "role") != Some("slave") {
            return Ok(None);
        }
        let Some(note) = Self::read(control)? else { return Ok(None) };
        let host = wire::info(info, "master_host").unwrap_or_default();
        let port = wire::info_number(info, "master_port").and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
        let is_up = wire::info(info, "master_link_status") == Some("up");
        if is_up || answers(host, port) {
            let message = format!("the restore `{}` feeds {} from {host}:{port}", note.restore, control.endpoint());
            return Err(Error::new(Kind::Conflict, message)
                .temporary()
                .hint("wait until it has ended; if there is none any more, REPLICAOF NO ONE lets the server go"));
        }
        Ok(Some(note))
    }
}

/// Whether anybody listens there.
fn answers(host: &str, port: u16) -> bool {
    // A name that cannot be resolved is one at which nobody listens.
    let Ok(mut addresses) = (host, port).to_socket_addrs() else { return false };
    addresses.any(|address| TcpStream::connect_timeout(&address, ANSWERS_WITHIN).is_ok())
}

/// The settings of a target that are others while it follows us.
#[derive(Debug)]
pub(super) struct Loan {
    note: Note,
    /// What they were; known from the first borrowing on.
    old: Vec<(&'static str, String)>,
    /// Whether the password was known only to a restore that was killed.
    pub is_password_lost: bool,
}

impl Loan {
    /// Nothing is borrowed yet.
    pub fn new(note: Note) -> Self {
        Self { note, old: Vec::new(), is_password_lost: false }
    }

    /// What a restore that was killed has borrowed, in the name of the one that goes on.
    pub fn taken_up(note: &Note, restore: &str) -> Self {
        let note = Note { restore: restore.to_owned(), ..note.clone() };
        let known = |name: &&'static str| {
            let old = if *name == PASSWORD { Some(String::new()) } else { note.settings.get(*name).cloned() };
            Some((*name, old?))
        };
        let old = BORROWED.iter().filter_map(known).collect();
        Self { is_password_lost: note.had_password, old, note }
    }

    /// Lets the target bear the note, and show `token` to its master; `false` where it will not show it.
    pub fn borrow(&mut self, control: &mut Connection, token: &str) -> Result<bool> {
        if self.old.is_empty() {
            for name in BORROWED {
                self.old.extend(control.config(name)?.map(|value| (name, value)));
            }
            let (passwords, settings): (Vec<_>, Vec<_>) =
                self.old.iter().cloned().partition(|(name, _)| *name == PASSWORD);
            self.note.had_password = passwords.iter().any(|(_, old)| !old.is_empty());
            self.note.settings = settings.into_iter().map(|(name, old)| (name.to_owned(), old)).collect();
        }
        let note = self.note.text()?;
        self.set(control, NOTED_IN, &note)?;
        let shows_token = self.set(control, PASSWORD, token)?;
        self.set(control, LOAD, "on-empty-db")?;
        Ok(shows_token)
    }

    /// Changes a setting; `false` where that is not allowed or there is none.
    fn set(&self, control: &mut Connection, name: &'static str, value: &str) -> Result<bool> {
        if !self.old.iter().any(|(known, _)| *known == name) {
            return Ok(false);
        }
        let answer = control.ask(&[b"CONFIG", b"SET", name.as_bytes(), value.as_bytes()])?;
        Ok(!matches!(answer, Reply::Error(_)))
    }

    /// Gives everything back, the note last. May be repeated.
    pub fn put_back(&self, control: &mut Connection) -> Result<()> {
        for (name, old) in self.old.iter().rev() {
            // What could not be changed then cannot be changed now.
            if control.config(name)?.as_ref() != Some(old) {
                control.command(&["CONFIG", "SET", name, old])?;
            }
        }
        Ok(())
    }

    /// Where the old content is kept.
    pub fn kept(&self) -> Option<PathBuf> {
        self.note.kept.clone()
    }

    /// What the target does not get back.
    pub fn loss(&self) -> Option<Loss> {
        self.is_password_lost.then(|| Loss {
            what: format!("the setting `{PASSWORD}` of the target"),
            why: "an earlier try of the restore was killed, and a password is written nowhere: set it again".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written_and_nothing_else_is_one() {
        let mut note = Note::new("r1", Some(PathBuf::from("/kept/a b")), Some(b"{\"x\":\"\xc3\xa9\"}"));
        note.settings.insert(LOAD.to_owned(), "disabled".to_owned());
        note.had_password = true;
        let text = note.text().unwrap();
        assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{text}");
        assert_eq!(Note::parse(&text), Some(note.clone()));
        assert_eq!(note.stamp().unwrap().unwrap(), b"{\"x\":\"\xc3\xa9\"}");
        for other in ["", "app", MARK, &text[..text.len() - 3], "stillpoint-restore:zz"] {
            assert_eq!(Note::parse(other), None, "{other}");
        }
    }

    #[test]
    fn what_was_killed_gives_back_all_but_the_password() {
        let mut note = Note::new("r1", None, None);
        note.settings.insert(NOTED_IN.to_owned(), "app".to_owned());
        note.had_password = true;
        let loan = Loan::taken_up(&note, "r2");
        assert_eq!(loan.old, [(NOTED_IN, "app".to_owned()), (PASSWORD, String::new())]);
        assert!(loan.loss().unwrap().what.contains(PASSWORD));
    }
}
