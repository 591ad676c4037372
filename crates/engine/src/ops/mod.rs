//! The verbs, as plain functions: a request in, a report out. CLI, daemon and operator call these.
//!
//! Each verb has a file of its own. Nothing here prints, asks questions or parses arguments.

pub mod apply;
pub mod backup;
pub mod check;
pub mod copy;
pub mod destination;
pub mod driver;
pub mod export;
pub mod forget;
pub mod init;
pub mod key;
pub mod list;
pub mod plan;
pub mod prune;
pub mod restore;
pub mod show;
pub mod verify;
