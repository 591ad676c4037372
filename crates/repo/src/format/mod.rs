//! The bytes of restic's repository format version 2, and nothing but bytes.
//!
//! Kept apart from everything that reads or writes a depot, so that each file's form can be read,
//! fuzzed and property-tested alone. Nothing here performs I/O, encrypts or compresses.

pub mod config;
pub mod id;
pub mod index;
pub mod key;
pub mod lock;
pub mod name;
pub mod pack;
pub mod polynomial;
pub mod quote;
pub mod snapshot;
pub mod time;
pub mod tree;
pub mod tree_read;
pub mod tree_write;
