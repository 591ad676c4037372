//! Exit codes: one table, from which the codes, `stillpoint help exit-codes` and the tests are made.
//!
//! Scripts depend on them: a code may be added, never changed.

use stillpoint_core::error::{Error, Kind};

/// How a command ended, as the shell sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The process's exit code.
    pub code: u8,
    /// One line on what it means.
    pub means: &'static str,
}

/// Done, and what was asked for is proven.
pub const DONE: Exit = Exit { code: 0, means: "done; a point that was made or checked is restorable" };
/// A bug of ours.
pub const INTERNAL: Exit = Exit { code: 1, means: "a bug in stillpoint" };
/// The command line cannot be understood.
pub const USAGE: Exit = Exit { code: 2, means: "the command line cannot be understood" };
/// The configuration or an argument cannot be used.
pub const CONFIG: Exit = Exit { code: 3, means: "platform.yaml, a secret or an argument cannot be used" };
/// A store failed.
pub const STORE: Exit = Exit { code: 4, means: "a store cannot be reached, or a privilege on it is missing" };
/// The bucket failed.
pub const BUCKET: Exit =
    Exit { code: 5, means: "the bucket or its repository: unreachable, damaged, wrong key, no such point" };
/// The fence, or a plan, said no.
pub const REFUSED: Exit =
    Exit { code: 6, means: "refused: the fence, a plan that no longer holds, or a target that holds data" };
/// A check came out negative.
pub const UNPROVEN: Exit = Exit { code: 7, means: "not proven: a reference, a verification or a pin did not hold" };
/// Someone else is at work.
pub const LOCKED: Exit = Exit { code: 8, means: "another run, or a lock, holds what is needed" };
/// A limit is reached.
pub const EXHAUSTED: Exit = Exit { code: 9, means: "a disk, quota or memory limit is used up" };
/// The operator asked to stop.
pub const CANCELLED: Exit = Exit { code: 130, means: "stopped on request" };

/// Every code, in order.
pub const TABLE: [Exit; 11] =
    [DONE, INTERNAL, USAGE, CONFIG, STORE, BUCKET, REFUSED, UNPROVEN, LOCKED, EXHAUSTED, CANCELLED];

/// The code for an error that ends a command.
pub fn of(error: &Error) -> Exit {
    match error.kind() {
        Kind::Internal => INTERNAL,
        Kind::Config => CONFIG,
        Kind::Fenced | Kind::Conflict | Kind::AlreadyExists => REFUSED,
        Kind::Unproven | Kind::PinLost => UNPROVEN,
        Kind::Locked => LOCKED,
        Kind::Exhausted => EXHAUSTED,
        Kind::Cancelled => CANCELLED,
        _ if error.store_name().is_some() => STORE,
        _ => BUCKET,
    }
}

/// The table as people read it.
pub fn table() -> String {
    TABLE.iter().map(|exit| format!("{:>5}  {}\n", exit.code, exit.means)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_sorted() {
        assert!(TABLE.windows(2).all(|pair| pair[0].code < pair[1].code));
    }

    #[test]
    fn the_same_kind_tells_stores_from_buckets() {
        let error = || Error::new(Kind::PermissionDenied, "x");
        assert_eq!(of(&error()), BUCKET);
        assert_eq!(of(&error().store("meta")), STORE);
    }
}
