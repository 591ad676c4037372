//! SHA-256 of many messages, two at a time.
//!
//! The instructions for SHA-256 wait for their own results, so that one message leaves half of the
//! unit idle. Two messages side by side take the time of one. A message that is hashed as it grows
//! (a pack) can fill the second lane whenever there is no second message.

use sha2::Digest;

use crate::format::id::Id;

#[cfg(target_arch = "x86_64")]
use super::sha_ni::{self, State};

/// Bytes that SHA-256 takes at once.
const BLOCK_BYTES: usize = 64;

/// The hash of one message.
pub(crate) fn hash(message: &[u8]) -> Id {
    Id(sha2::Sha256::digest(message).into())
}

/// The hash of each message. `out` is as long as `messages`.
pub(crate) fn hash_many(messages: &[&[u8]], out: &mut [Id]) {
    hash_many_beside(messages, out, &mut Running::new(), &[]);
}

/// The hash of each message; whenever only one is left, `running` is carried on over `other` beside
/// it. Returns how many bytes of `other` went into `running`.
pub(crate) fn hash_many_beside(messages: &[&[u8]], out: &mut [Id], running: &mut Running, other: &[u8]) -> usize {
    assert_eq!(messages.len(), out.len(), "one place for each hash");
    #[cfg(target_arch = "x86_64")]
    if sha_ni::available() {
        return Pairing::new(messages, out, running, other).run();
    }
    let _ = (running, other);
    for (message, out) in messages.iter().zip(out) {
        *out = hash(message);
    }
    0
}

/// A hash of a message that grows.
#[derive(Clone)]
pub(crate) struct Running {
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    #[cfg(target_arch = "x86_64")]
    Fast {
        state: State,
        total: u64,
        tail: [u8; BLOCK_BYTES],
        tail_length: usize,
    },
    Library(sha2::Sha256),
}

impl Running {
    /// The hash of nothing yet.
    pub(crate) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        if sha_ni::available() {
            return Self { inner: Inner::Fast { state: State::INITIAL, total: 0, tail: [0; 64], tail_length: 0 } };
        }
        Self { inner: Inner::Library(sha2::Sha256::new()) }
    }

    /// Appends to the message.
    pub(crate) fn update(&mut self, data: &[u8]) {
        match &mut self.inner {
            #[cfg(target_arch = "x86_64")]
            Inner::Fast { state, total, tail, tail_length } => {
                *total += data.len() as u64;
                let mut data = data;
                if *tail_length > 0 {
                    let taken = data.len().min(BLOCK_BYTES - *tail_length);
                    tail[*tail_length..*tail_length + taken].copy_from_slice(&data[..taken]);
                    *tail_length += taken;
                    data = &data[taken..];
                    if *tail_length < BLOCK_BYTES {
                        return;
                    }
                    sha_ni::compress([state], [tail], 1);
                }
                let blocks = data.len() / BLOCK_BYTES;
                sha_ni::compress([state], [data], blocks);
                let rest = &data[blocks * BLOCK_BYTES..];
                tail[..rest.len()].copy_from_slice(rest);
                *tail_length = rest.len();
            }
            Inner::Library(library) => library.update(data),
        }
    }

    /// Ends the message.
    pub(crate) fn finish(self) -> Id {
        match self.inner {
            #[cfg(target_arch = "x86_64")]
            Inner::Fast { state, total, tail, tail_length } => Id(sha_ni::finish(state, &tail[..tail_length], total)),
            Inner::Library(library) => Id(library.finalize().into()),
        }
    }
}

/// One message in a lane: which, and how far it is hashed.
#[cfg(target_arch = "x86_64")]
struct Lane {
    message: usize,
    at: usize,
    state: State,
}

/// Two lanes that take one message after the other.
#[cfg(target_arch = "x86_64")]
struct Pairing<'p> {
    messages: &'p [&'p [u8]],
    out: &'p mut [Id],
    next: usize,
    running: &'p mut Running,
    other: &'p [u8],
    other_used: usize,
    /// Blocks that one lane shares with `other` before the second lane opens, so that not only
    /// the last message has company.
    alone_blocks: usize,
}

#[cfg(target_arch = "x86_64")]
impl<'p> Pairing<'p> {
    fn new(messages: &'p [&'p [u8]], out: &'p mut [Id], running: &'p mut Running, other: &'p [u8]) -> Self {
        let aligned = matches!(&running.inner, Inner::Fast { tail_length: 0, .. });
        let other = if aligned { other } else { &[] };
        let total: usize = messages.iter().map(|message| message.len()).sum();
        let longest = messages.iter().map(|message| message.len()).max().unwrap_or(0);
        // The last message, which has no partner, keeps about its own length of `other`.
        let alone_blocks = other.len().saturating_sub(longest).min(total) / BLOCK_BYTES;
        Self { messages, out, next: 0, running, other, other_used: 0, alone_blocks }
    }

    fn run(mut self) -> usize {
        let mut first: Option<Lane> = None;
        let mut second: Option<Lane> = None;
        loop {
            if first.is_none() {
                first = second.take().or_else(|| self.open());
            }
            if second.is_none() && self.alone_blocks == 0 {
                second = self.open();
            }
            match (&mut first, &mut second) {
                (None, _) => return self.other_used,
                (Some(lane), None) => self.advance_alone(lane),
                (Some(a), Some(b)) => {
                    let (left, right) = (self.rest(a), self.rest(b));
                    let blocks = left.len().min(right.len()) / BLOCK_BYTES;
                    sha_ni::compress([&mut a.state, &mut b.state], [left, right], blocks);
                    a.at += blocks * BLOCK_BYTES;
                    b.at += blocks * BLOCK_BYTES;
                }
            }
            first = first.and_then(|lane| self.close_if_done(lane));
            second = second.and_then(|lane| self.close_if_done(lane));
        }
    }

    /// Takes the next message that is at least a block long; shorter ones are done at once.
    fn open(&mut self) -> Option<Lane> {
        while let Some(message) = self.messages.get(self.next) {
            let lane = Lane { message: self.next, at: 0, state: State::INITIAL };
            self.next += 1;
            if message.len() >= BLOCK_BYTES {
                return Some(lane);
            }
            self.close_if_done(lane);
        }
        None
    }

    fn rest(&self, lane: &Lane) -> &'p [u8] {
        &self.messages[lane.message][lane.at..]
    }

    fn advance_alone(&mut self, lane: &mut Lane) {
        let mine = self.rest(lane);
        let blocks = mine.len() / BLOCK_BYTES;
        let company = &self.other[self.other_used..];
        let shared = (company.len() / BLOCK_BYTES).min(blocks);
        let shared = if self.alone_blocks > 0 { shared.min(self.alone_blocks) } else { shared };
        self.alone_blocks = self.alone_blocks.saturating_sub(shared.max(1));
        match &mut self.running.inner {
            Inner::Fast { state, total, .. } if shared > 0 => {
                sha_ni::compress([&mut lane.state, state], [mine, company], shared);
                *total += (shared * BLOCK_BYTES) as u64;
                self.other_used += shared * BLOCK_BYTES;
                lane.at += shared * BLOCK_BYTES;
            }
            _ => {
                sha_ni::compress([&mut lane.state], [mine], blocks);
                lane.at += blocks * BLOCK_BYTES;
            }
        }
    }

    fn close_if_done(&mut self, lane: Lane) -> Option<Lane> {
        let rest = self.rest(&lane);
        if rest.len() >= BLOCK_BYTES {
            return Some(lane);
        }
        let length = self.messages[lane.message].len() as u64;
        self.out[lane.message] = Id(sha_ni::finish(lane.state, rest, length));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that differ from place to place.
    fn bytes(length: usize, salt: u8) -> Vec<u8> {
        (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8 ^ salt).collect()
    }

    fn lengths() -> impl Strategy<Value = usize> {
        prop_oneof![0..200_usize, 0..20_000_usize, (0..40_usize).prop_map(|blocks| blocks * 64)]
    }

    proptest! {
        #[test]
        fn every_lane_agrees_with_the_library(
            messages in proptest::collection::vec(lengths(), 0..9), head in 0..200_usize, other in lengths()
        ) {
            let messages: Vec<_> = messages.iter().enumerate().map(|(number, length)| bytes(*length, number as u8)).collect();
            let jobs: Vec<_> = messages.iter().map(Vec::as_slice).collect();
            let (head, other) = (bytes(head / 3 * 64, 1), bytes(other, 99));
            let mut ids = vec![Id([0; 32]); jobs.len()];
            let mut running = Running::new();
            running.update(&head);
            let used = hash_many_beside(&jobs, &mut ids, &mut running, &other);
            prop_assert!(used <= other.len());
            running.update(&other[used..]);
            for (id, job) in ids.iter().zip(&jobs) {
                prop_assert_eq!(*id, hash(job));
            }
            prop_assert_eq!(running.finish(), hash(&[head, other].concat()));
        }

        #[test]
        fn a_growing_message_agrees_with_the_library(pieces in proptest::collection::vec(lengths(), 0..9)) {
            let mut running = Running::new();
            let mut whole = Vec::new();
            for (number, length) in pieces.iter().enumerate() {
                let piece = bytes(*length, number as u8);
                // Beside an unaligned message the second lane must stay empty.
                let mut ids = [Id([0; 32])];
                let used = hash_many_beside(&[&piece[..]], &mut ids, &mut running, &piece);
                running.update(&piece[used..]);
                whole.extend_from_slice(&piece);
                prop_assert_eq!(ids[0], hash(&piece));
            }
            prop_assert_eq!(running.finish(), hash(&whole));
        }
    }
}
