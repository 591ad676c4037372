//! `postgres`: a PostgreSQL server, or some of its databases, by what any role with read access may do.

#![allow(dead_code)]

mod catalog;
mod client;
mod config;
mod cut;
mod layout;
mod pool;
mod restore;
mod session;
mod stamp;
mod swap;
#[cfg(test)]
mod tests;
mod tls;
mod tools;
mod wire;

pub use config::{Roles, Settings, Tls};

/// The schema that holds the environment stamp; part of no point.
pub(super) const STAMP_SCHEMA: &str = "stillpoint";

/// One store.
struct Postgres {
    settings: Settings,
    endpoint: session::Endpoint,
    scratch: std::path::PathBuf,
    state: std::sync::Mutex<cut::State>,
}
