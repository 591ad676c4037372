//! The verbs, as plain functions: a request in, a report out. CLI, daemon and operator call these.
//!
//! Each verb has a file of its own. Nothing here prints, asks questions or parses arguments.

pub mod backup;
pub mod check;
pub mod copy;
pub mod driver;
pub mod forget;
pub mod init;
pub mod key;
pub mod list;
pub mod prune;
pub mod show;
pub mod verify;
pub mod apply;
pub mod destination;
pub mod export;
pub mod plan;
pub mod restore;
