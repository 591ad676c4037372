//! What a target is told while it follows us, and how a restore that was killed is taken up again.
//!
//! The target bears the note of what it was itself: in the name by which it shows itself to its master,
//! which it gets back last of all. So whoever tries again, on whichever machine, can tell what a restore
//! of ours left from somebody's replica: by the note, and by whom it follows. The one thing that is written
//! nowhere is a password.

use std::collections::BTreeMap;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
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
    /// Whom it was told to follow, host and port; the one before as well, whom it follows until it is told.
    #[serde(default)]
    feeders: Vec<(String, u16)>,
    /// The digest of the token that it was given for a password.
    #[serde(default)]
    token: String,
}

/// What a note tells of a token: enough to know it again.
fn digest(token: &str) -> String {
    hex::encode(Sha256::digest(token))
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

    /// The note of a server that was told to follow us, and was told nothing else since; `None` for a master,
    /// and for somebody else's replica, whatever it still bears.
    pub fn of_led(control: &mut Connection, info: &str) -> Result<Option<Self>> {
        if wire::info(info, "role") != Some("slave") {
            return Ok(None);
        }
        Ok(Self::read(control)?.filter(|note| note.feeders.contains(&followed(info))))
    }

    /// The note of a server that follows us still, though we are gone; else as `of_led`.
    ///
    /// # Errors
    /// `Conflict` while the restore feeds it.
    pub fn of_follower(control: &mut Connection, info: &str) -> Result<Option<Self>> {
        let Some(note) = Self::of_led(control, info)? else { return Ok(None) };
        let (host, port) = followed(info);
        // The one who feeds it need not listen where we could reach it: the target's own word comes first.
        let is_fed = wire::info(info, "master_link_status") == Some("up")
            || wire::info(info, "master_sync_in_progress") == Some("1");
        if is_fed || answers(&host, port) {
            let message = format!("the restore `{}` feeds {} from {host}:{port}", note.restore, control.endpoint());
            return Err(Error::new(Kind::Conflict, message)
                .temporary()
                .hint("wait until it has ended; if there is none any more, REPLICAOF NO ONE lets the server go"));
        }
        Ok(Some(note))
    }

    /// How to give up the restore that left this note.
    pub fn farewell(&self) -> String {
        let settings = self.settings.iter().map(|(name, old)| format!(", CONFIG SET {name} \"{old}\""));
        let password = if self.had_password { "<as it was>" } else { "" };
        format!("REPLICAOF NO ONE, CONFIG SET {PASSWORD} \"{password}\"{}", settings.collect::<String>())
    }
}

/// Whom a replica follows.
fn followed(info: &str) -> (String, u16) {
    let port = wire::info_number(info, "master_port").and_then(|port| u16::try_from(port).ok());
    (wire::info(info, "master_host").unwrap_or_default().to_owned(), port.unwrap_or_default())
}

/// Whether anybody listens there.
fn answers(host: &str, port: u16) -> bool {
    // A name that cannot be resolved is one at which nobody listens.
    let Ok(mut addresses) = (host, port).to_socket_addrs() else { return false };
    addresses.any(|address| TcpStream::connect_timeout(&address, ANSWERS_WITHIN).is_ok())
}

/// Why a target could not bear a note, if so.
pub(super) fn refuses(control: &mut Connection) -> Result<Option<String>> {
    let Some(now) = control.config(NOTED_IN)? else {
        return Ok(Some(format!("the target does not show `{NOTED_IN}`, where a note of the restore would be")));
    };
    // Nothing changes: it is what it was.
    match control.ask(&[b"CONFIG", b"SET", NOTED_IN.as_bytes(), now.as_bytes()])? {
        Reply::Error(text) => Ok(Some(format!("the target takes no note of the restore in `{NOTED_IN}`: {text}"))),
        _ => Ok(None),
    }
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

    /// What a restore that was killed has borrowed, in the name of the one that goes on. `password` is the one
    /// that the target has now: if it is no token of that restore's, somebody set it since, and it stays.
    fn taken_up(note: &Note, restore: &str, password: Option<String>) -> Self {
        let note = Note { restore: restore.to_owned(), ..note.clone() };
        let is_token = password.as_ref().is_some_and(|password| digest(password) == note.token);
        let known = |name: &&'static str| {
            let old = match *name {
                PASSWORD if is_token => Some(String::new()),
                PASSWORD => password.clone(),
                name => note.settings.get(name).cloned(),
            };
            Some((*name, old?))
        };
        let old = BORROWED.iter().filter_map(known).collect();
        Self { is_password_lost: is_token && note.had_password, old, note }
    }

    /// Takes up what a restore that was killed has borrowed.
    pub fn take_up(control: &mut Connection, note: &Note, restore: &str) -> Result<Self> {
        Ok(Self::taken_up(note, restore, control.config(PASSWORD)?))
    }

    /// Lets the target bear the note that it follows `feeder`, and show `token` to its master; `false` where
    /// it will not show it.
    pub fn borrow(&mut self, control: &mut Connection, feeder: (&str, u16), token: &str) -> Result<bool> {
        if self.old.is_empty() {
            for name in BORROWED {
                self.old.extend(control.config(name)?.map(|value| (name, value)));
            }
            let (passwords, settings): (Vec<_>, Vec<_>) =
                self.old.iter().cloned().partition(|(name, _)| *name == PASSWORD);
            self.note.had_password = passwords.iter().any(|(_, old)| !old.is_empty());
            self.note.settings = settings.into_iter().map(|(name, old)| (name.to_owned(), old)).collect();
        }
        let before = self.note.feeders.pop();
        self.note.feeders = before.into_iter().chain([(feeder.0.to_owned(), feeder.1)]).collect();
        self.note.token = digest(token);
        let note = self.note.text()?;
        if !self.set(control, NOTED_IN, &note)? {
            // Killed without a note, we would leave what nobody could tell from a replica.
            return Err(Error::new(Kind::PermissionDenied, format!("the target takes no note in `{NOTED_IN}`"))
                .hint("ACL SETUSER <user> +config|get +config|set; or restoreBy: keys"));
        }
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

    /// Gives everything back but the note. May be repeated.
    pub fn put_back(&self, control: &mut Connection) -> Result<()> {
        self.restore_settings(control, |name| name != NOTED_IN)
    }

    /// Takes the note away, when the target is what it shall be. May be repeated.
    pub fn end(&self, control: &mut Connection) -> Result<()> {
        self.restore_settings(control, |name| name == NOTED_IN)
    }

    fn restore_settings(&self, control: &mut Connection, is_meant: impl Fn(&str) -> bool) -> Result<()> {
        for (name, old) in self.old.iter().rev().filter(|(name, _)| is_meant(name)) {
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
        note.token = digest("t0ken");
        let loan = Loan::taken_up(&note, "r2", Some("t0ken".to_owned()));
        assert_eq!(loan.old, [(NOTED_IN, "app".to_owned()), (PASSWORD, String::new())]);
        assert!(loan.loss().unwrap().what.contains(PASSWORD));
        let loan = Loan::taken_up(&note, "r2", Some("set since".to_owned()));
        assert_eq!(loan.old, [(NOTED_IN, "app".to_owned()), (PASSWORD, "set since".to_owned())]);
        assert_eq!(loan.loss(), None);
    }
}
