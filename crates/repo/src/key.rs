//! What opens a repository: a generated key file, or a password that a person chose.
//!
//! Both end as the password of a restic key file, so that `restic` opens the repository with the
//! same file (`--password-file`) or the same words. A generated key has 256 random bits and needs
//! no stretching: its key file asks for almost none. A password is stretched as much as restic
//! would stretch it.

use std::fmt;

use sha2::{Digest, Sha256};
use stillpoint_core::error::{Error, Kind, Result};

use crate::crypto::{self, Cipher, MasterKey};
use crate::depot::{Depot, WriteMode};
use crate::format::id::Id;
use crate::format::key::{Base64, KeyFileJson};
use crate::unpacked::{self, FileKind};

/// First word of a key file's one line; tells people what they look at.
const PREFIX: &str = "stillpoint-key-1";
/// Crockford's base32, in which no two digits look alike.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Characters of a group, for whoever must type the key from paper.
const GROUP_CHARS: usize = 4;
/// Bytes of the checksum behind the key, which finds mistyped digits.
const CHECKSUM_BYTES: usize = 3;

/// A generated key: 256 random bits. `Debug` never shows them.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyFile {
    secret: [u8; 32],
}

impl KeyFile {
    /// Draws a new key.
    pub fn generate() -> Result<Self> {
        Ok(Self { secret: crypto::random()? })
    }

    /// Reads a key from the text of a key file, or typed from a recovery sheet: upper or lower case,
    /// with or without dashes and spaces, and with the digits that people confuse.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::new(Kind::Config, format!("this is not a key file: {why}"));
        let text = text.trim();
        let start = text.get(..PREFIX.len()).filter(|start| start.eq_ignore_ascii_case(PREFIX));
        let rest =
            start.map(|start| &text[start.len()..]).ok_or_else(|| bad("it does not begin with `stillpoint-key-1`"))?;
        let mut digits = Vec::with_capacity(64);
        for character in rest.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            let plain = match character.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                other => other,
            };
            let value = DIGITS.iter().position(|digit| char::from(*digit) == plain);
            digits.push(value.ok_or_else(|| bad("it holds a character that no key has"))? as u8);
        }
        let bytes = bytes_of(&digits).ok_or_else(|| bad("it is too long or too short"))?;
        let (secret, checksum) = bytes.split_first_chunk::<32>().ok_or_else(|| bad("it is too short"))?;
        if checksum != checksum_of(secret) {
            return Err(bad("a digit is wrong or missing").hint("compare it with the recovery sheet"));
        }
        Ok(Self { secret: *secret })
    }

    /// The one line of a key file, without the line end. It is the password that restic takes.
    pub fn text(&self) -> String {
        let mut bytes = self.secret.to_vec();
        bytes.extend_from_slice(&checksum_of(&self.secret));
        let mut text = PREFIX.to_owned();
        for (number, digit) in digits_of(&bytes).enumerate() {
            if number % GROUP_CHARS == 0 {
                text.push('-');
            }
            text.push(char::from(DIGITS[usize::from(digit)]));
        }
        text
    }
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyFile(secret)")
    }
}

fn checksum_of(secret: &[u8; 32]) -> [u8; CHECKSUM_BYTES] {
    let hash: [u8; 32] = Sha256::new().chain_update(PREFIX).chain_update(secret).finalize().into();
    [hash[0], hash[1], hash[2]]
}

/// 35 bytes are exactly 56 digits.
fn digits_of(bytes: &[u8]) -> impl Iterator<Item = u8> {
    (0..bytes.len() * 8 / 5).map(move |number| {
        let bit = |at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
        (0..5).fold(0, |digit, offset| digit << 1 | bit(number * 5 + offset))
    })
}

fn bytes_of(digits: &[u8]) -> Option<Vec<u8>> {
    if digits.len() != (32 + CHECKSUM_BYTES) * 8 / 5 {
        return None;
    }
    let bit = |at: usize| digits[at / 5] >> (4 - at % 5) & 1;
    Some(
        (0..digits.len() * 5 / 8)
            .map(|number| (0..8).fold(0, |byte, offset| byte << 1 | bit(number * 8 + offset)))
            .collect(),
    )
}

/// What opens a repository. `Debug` never shows it.
#[derive(Clone)]
pub enum Unlock {
    /// A generated key.
    KeyFile(KeyFile),
    /// A password that a person chose.
    Password(String),
}

impl fmt::Debug for Unlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeyFile(_) => "KeyFile(secret)",
            Self::Password(_) => "Password(secret)",
        })
    }
}

impl Unlock {
    /// The password as restic takes it.
    fn password(&self) -> String {
        match self {
            Self::KeyFile(key) => key.text(),
            Self::Password(password) => password.clone(),
        }
    }

    /// How much the password is stretched.
    fn cost(&self) -> Cost {
        match self {
            Self::KeyFile(_) => Cost { log_n: 4, r: 1, p: 1 },
            Self::Password(_) => Cost { log_n: 15, r: 8, p: 7 },
        }
    }
}

/// scrypt's parameters. restic measures its machine and arrives at N = 2^15, r = 8 and a p of 1 to 7
/// on today's; we take the 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cost {
    log_n: u8,
    r: u32,
    p: u32,
}

/// Length of the salt; restic refuses others.
const SALT_BYTES: usize = 64;

fn stretch(password: &str, salt: &[u8], cost: Cost) -> Result<Cipher> {
    let bad = || Error::new(Kind::Corrupt, "a key file asks for impossible scrypt parameters");
    let params = scrypt::Params::new(cost.log_n, cost.r, cost.p).map_err(|error| bad().source(error))?;
    let mut bytes = [0; 64];
    scrypt::scrypt(password.as_bytes(), salt, &params, &mut bytes).map_err(|error| bad().source(error))?;
    Ok(Cipher::new(&MasterKey::from_bytes(&bytes)))
}

/// Writes a key file that lets `unlock` open `master`, and returns its id.
pub(crate) fn create(depot: &dyn Depot, master: &MasterKey, unlock: &Unlock, label: &str) -> Result<(Id, KeyFileJson)> {
    let salt: [u8; SALT_BYTES] = crypto::random()?;
    let cost = unlock.cost();
    let data = stretch(&unlock.password(), &salt, cost)?.seal(&master.to_json())?;
    let key = KeyFileJson {
        created: jiff::Timestamp::now().to_string(),
        username: label.to_owned(),
        hostname: hostname(),
        kdf: "scrypt".to_owned(),
        n: 1 << cost.log_n,
        r: cost.r,
        p: cost.p,
        salt: Base64(salt.to_vec()),
        data: Base64(data),
    };
    let json = key.to_json();
    let id = Id(Sha256::digest(&json).into());
    depot.write(&FileKind::Key.name(&id), &[&json], &WriteMode::Replace)?;
    Ok((id, key))
}

/// Tries every key file; the cheap ones first, so that a generated key never waits for a password.
pub(crate) fn open(depot: &dyn Depot, unlock: &Unlock) -> Result<(Id, MasterKey)> {
    let mut keys = Vec::new();
    let mut damaged = None;
    for id in unpacked::list(depot, FileKind::Key)? {
        match load(depot, &id) {
            Ok(key) => keys.push((id, key)),
            Err(error) if error.kind() == Kind::Corrupt => damaged = Some(error),
            Err(error) => return Err(error),
        }
    }
    keys.sort_by_key(|(_, key)| u128::from(key.n) * u128::from(key.r) * u128::from(key.p));
    // What we made for the other kind of secret cannot open, and a password's key costs half a second.
    let (likely, rest): (Vec<_>, Vec<_>) = keys.iter().partition(|(_, key)| cost_of(key) == unlock.cost());
    for (id, key) in likely.into_iter().chain(rest) {
        let Ok(plain) = try_key(key, unlock) else { continue };
        return Ok((*id, MasterKey::parse(&plain)?));
    }
    let wrong = Error::new(Kind::Unauthenticated, "the key or password does not open the repository")
        .context("key files tried", keys.len());
    Err(match damaged {
        Some(error) => wrong.source(error),
        None => wrong,
    })
}

fn cost_of(key: &KeyFileJson) -> Cost {
    Cost { log_n: key.n.ilog2() as u8, r: key.r, p: key.p }
}

fn try_key(key: &KeyFileJson, unlock: &Unlock) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    stretch(&unlock.password(), &key.salt.0, cost_of(key))?.open_into(&key.data.0, &mut plain)?;
    Ok(plain)
}

/// Reads the key file `id` and checks that it is what its name says.
pub(crate) fn load(depot: &dyn Depot, id: &Id) -> Result<KeyFileJson> {
    let name = FileKind::Key.name(id);
    let (json, _) = depot.read(&name)?;
    if Sha256::digest(&json)[..] != id.0 {
        return Err(Error::new(Kind::Corrupt, format!("the file {name} is damaged")));
    }
    KeyFileJson::parse(&json).map_err(|error| error.context("file", name))
}

/// This machine's name, as restic would write it.
pub(crate) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::depot::memory::MemoryDepot;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_survives_and_every_wrong_digit_is_found(secret: [u8; 32], at in 0..56_usize, digit in 0..32_usize) {
            let key = KeyFile { secret };
            let text = key.text();
            prop_assert_eq!(KeyFile::parse(&text).unwrap(), key.clone());
            let sloppy = text.to_lowercase().replace('-', " ").replacen("stillpoint key 1", "stillpoint-key-1", 1);
            prop_assert_eq!(KeyFile::parse(&sloppy.replace('0', "o")).unwrap(), key);
            let place = PREFIX.len() + 1 + at + at / GROUP_CHARS;
            let mut wrong = text.clone().into_bytes();
            wrong[place] = DIGITS[digit];
            let wrong = String::from_utf8(wrong).unwrap();
            // Three bytes of checksum let one wrong key in 16 million pass.
            prop_assert!(wrong == text || KeyFile::parse(&wrong).is_err());
        }

        #[test]
        fn other_text_never_panics(text: String) {
            prop_assert!(KeyFile::parse(&text).is_err());
            drop(KeyFile::parse(&format!("{PREFIX}{text}")));
        }
    }

    #[test]
    fn secrets_are_never_shown() {
        let key = KeyFile { secret: [65; 32] };
        assert_eq!(format!("{key:?} {:?}", Unlock::Password("hunter2".into())), "KeyFile(secret) Password(secret)");
    }

    #[test]
    fn keys_open_and_others_do_not() {
        let depot = MemoryDepot::new();
        let master = MasterKey::generate().unwrap();
        let key = Unlock::KeyFile(KeyFile::generate().unwrap());
        let (id, _) = create(&depot, &master, &key, "first").unwrap();
        let (opened, found) = open(&depot, &key).unwrap();
        assert_eq!((opened, found.to_json()), (id, master.to_json()));
        let other = Unlock::KeyFile(KeyFile::generate().unwrap());
        assert_eq!(open(&depot, &other).unwrap_err().kind(), Kind::Unauthenticated);
        let password = Unlock::Password("correct horse".into());
        assert_eq!(open(&depot, &password).unwrap_err().kind(), Kind::Unauthenticated);
        create(&depot, &master, &password, "second").unwrap();
        assert_eq!(open(&depot, &password).unwrap().1.to_json(), master.to_json());
    }
}
