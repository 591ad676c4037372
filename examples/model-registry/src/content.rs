//! What a version of a model consists of. Everything follows from the writer's number and the
//! version, so that whoever judges a restored copy can compute it without asking anyone.

use sha2::{Digest, Sha256};

/// Bytes that every artifact has at least.
const ARTIFACT_BYTES_MIN: u64 = 1 << 10;
/// How much larger an artifact may be.
const ARTIFACT_BYTES_MORE: u64 = 23 << 10;

/// A checkpoint is deleted by the publication that comes so many versions later.
pub const CHECKPOINTS_KEPT: u64 = 3;
/// What each part of a bundle but the last has at least, as S3 demands.
pub const BUNDLE_PART_BYTES: usize = 5 << 20;
/// What the last part of a bundle has.
const BUNDLE_END_BYTES: usize = 300 << 10;
/// The one key that all bundles are written to.
pub const BUNDLE_KEY: &str = "bundles/all";

/// One version of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The writer, from 0; each writes one model.
    pub writer: u32,
    /// From 1, without gaps.
    pub number: u64,
}

/// The name of the model that a writer publishes.
pub fn model(writer: u32) -> String {
    format!("model-{writer}")
}

/// The writer of a model, from its name.
pub fn writer_of(model: &str) -> Option<u32> {
    model.strip_prefix("model-")?.parse().ok()
}

impl Version {
    /// The version before, if there is one.
    pub fn before(self) -> Option<Self> {
        (self.number > 1).then(|| Self { number: self.number - 1, ..self })
    }

    /// The model's name.
    pub fn model(self) -> String {
        model(self.writer)
    }

    /// The artifact: half text, half noise, the same every time.
    pub fn artifact(self) -> Vec<u8> {
        let mut state = (u64::from(self.writer) << 40) ^ self.number;
        let length = (ARTIFACT_BYTES_MIN + next(&mut state) % ARTIFACT_BYTES_MORE) as usize;
        let line = format!("{} version {}\n", self.model(), self.number);
        let mut bytes = line.repeat(length / 2 / line.len()).into_bytes();
        while bytes.len() < length {
            bytes.extend_from_slice(&next(&mut state).to_le_bytes());
        }
        bytes
    }

    /// The artifact's SHA-256, hex.
    pub fn sha256(self) -> String {
        hex::encode(Sha256::digest(self.artifact()))
    }

    /// The object key: `models/<name>/<version>-<hash>`.
    pub fn artifact_key(self) -> String {
        format!("models/{}/{:08}-{}", self.model(), self.number, &self.sha256()[..12])
    }

    /// The object that every publication overwrites: `latest/<name>`.
    pub fn latest_key(self) -> String {
        format!("latest/{}", self.model())
    }

    /// What it says then: which version is the newest, over and over, so that its length changes too.
    pub fn latest(self) -> Vec<u8> {
        format!("{} {}\n", self.number, self.artifact_key()).repeat((1 + self.number % 40) as usize).into_bytes()
    }

    /// An object that is there for a few publications: `checkpoints/<name>/<version>`.
    pub fn checkpoint_key(self) -> String {
        format!("checkpoints/{}/{:08}", self.model(), self.number)
    }

    /// What it holds.
    pub fn checkpoint(self) -> Vec<u8> {
        format!("{}\n", self.commit_subject()).repeat((1 + self.number % 9) as usize).into_bytes()
    }

    /// The version whose checkpoint goes when this one is published.
    pub fn outdated(self) -> Option<Self> {
        (self.number > CHECKPOINTS_KEPT).then(|| Self { number: self.number - CHECKPOINTS_KEPT, ..self })
    }

    /// The first line of the commit's message.
    pub fn commit_subject(self) -> String {
        format!("train {} version {}", self.model(), self.number)
    }

    /// The training configuration that is committed.
    pub fn training(self) -> String {
        format!("model = \"{}\"\nseed = {}\nepochs = {}\n", self.model(), self.number, 10 + self.number % 90)
    }

    /// The metrics of the row, as JSON.
    pub fn metrics(self) -> serde_json::Value {
        let loss = 1.0 / (1.0 + self.number as f64);
        serde_json::json!({ "loss": loss, "epochs": 10 + self.number % 90, "tags": ["example", self.model()] })
    }
}

/// The bundle of this number, in the parts in which it is uploaded: a line that names it, then noise.
pub fn bundle(number: u64) -> [Vec<u8>; 2] {
    let mut state = !number;
    let mut noise = |mut bytes: Vec<u8>, length: usize| {
        while bytes.len() < length {
            bytes.extend_from_slice(&next(&mut state).to_le_bytes());
        }
        bytes
    };
    [noise(format!("bundle {number}\n").into_bytes(), BUNDLE_PART_BYTES), noise(Vec::new(), BUNDLE_END_BYTES)]
}

/// A generator that needs no state but its own (splitmix64): the content must never change with a
/// library's version.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_follows_from_the_numbers_alone() {
        let version = Version { writer: 1, number: 7 };
        assert_eq!(version.artifact(), version.artifact());
        assert_ne!(version.artifact(), Version { writer: 2, ..version }.artifact());
        assert_eq!(&version.artifact_key()[..24], "models/model-1/00000007-");
        assert_eq!(writer_of(&version.model()), Some(1));
        assert_eq!(Version { writer: 0, number: 1 }.before(), None);
        assert_ne!(version.latest(), Version { number: 8, ..version }.latest());
        assert_eq!(version.outdated().map(|old| old.number), Some(4));
        assert_eq!(Version { number: 3, ..version }.outdated(), None);
        assert!(bundle(2)[0].starts_with(b"bundle 2\n") && bundle(2)[0].len() >= BUNDLE_PART_BYTES);
        assert_eq!(bundle(2), bundle(2));
    }
}
