//! What to try next, for errors that came without a hint, and what state a failed command leaves.
//!
//! Whoever meets an error first knows best what helps and says so in the error; this is the net below.

use stillpoint_core::error::{Error, Kind};

/// The hint to print: the error's own, or a general one for its kind.
pub fn of(error: &Error) -> Option<&str> {
    error.hint_text().or(match error.kind() {
        Kind::Unauthenticated => Some("check the key or password that platform.yaml names"),
        Kind::PermissionDenied => {
            Some("check what this user may do there; `stillpoint driver policy` lists what is needed")
        }
        Kind::Locked => {
            Some("wait for the other run to end; if it died on another machine, `stillpoint backup --take-over`")
        }
        Kind::Exhausted => Some("free some space or raise the limit, then run the command again"),
        Kind::TimedOut | Kind::Unreachable | Kind::RateLimited => {
            Some("check that it runs and can be reached from here, then try again")
        }
        Kind::Corrupt => Some("`stillpoint check --data` says what else is damaged"),
        Kind::Unsupported => Some("`stillpoint driver list` and docs/ say what is supported"),
        Kind::Cancelled => Some("run the command again when you are ready"),
        _ => None,
    })
}

/// What a failed command may have left behind; decides the last line of the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaves {
    /// It only reads.
    Nothing,
    /// It makes a point; there is none.
    NoPoint,
    /// It writes to a target that may now be half restored.
    Target,
    /// It changes the bucket step by step; each step is whole.
    Steps,
}

/// The last line: what state things are in.
pub fn state(leaves: Leaves, error: &Error) -> &'static str {
    let before_anything = matches!(error.kind(), Kind::Config | Kind::Fenced | Kind::Locked | Kind::Unauthenticated);
    // Plans and steps are looked at before the first one is carried out.
    let refused = matches!(error.kind(), Kind::Conflict | Kind::NotFound | Kind::AlreadyExists);
    match leaves {
        Leaves::Nothing => "Nothing was changed.",
        Leaves::NoPoint if before_anything => "No point was made. Nothing was changed.",
        // The only failure after which a point may be there; the engine's hint says the same.
        Leaves::NoPoint if error.hint_text().is_some_and(|hint| hint.contains("is not known")) => {
            "Whether a point was made is not known."
        }
        Leaves::NoPoint => "No point was made.",
        Leaves::Target | Leaves::Steps if before_anything || refused => "Nothing was changed.",
        Leaves::Steps if error.kind() == Kind::Unproven => "Nothing was changed.",
        Leaves::Target => "The target is not proven: do not use it.",
        Leaves::Steps => "What was done so far is whole; the command can be run again.",
    }
}
