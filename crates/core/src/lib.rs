//! Stillpoint's pure heart: the words, the contracts and the decisions.
//!
//! Kept apart from everything that touches the world, so that what decides whether a recovery
//! point exists can be read, simulated and property-tested on its own. Nothing in this crate
//! performs I/O, reads a clock, draws random numbers, looks at the environment or knows an async
//! runtime; `cargo xtask tidy` checks that.

pub mod address;
pub mod capability;
pub mod coordinator;
pub mod driver;
pub mod duration;
pub mod error;
pub mod id;
pub mod plan;
pub mod platform;
pub mod position;
pub mod reference;
pub mod retention;
pub mod schema;
pub mod statefile;
pub mod tree;

pub use error::{Error, Kind, Result, Status};
