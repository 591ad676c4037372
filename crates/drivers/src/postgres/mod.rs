//! `postgres`: a PostgreSQL server, or some of its databases, by what any role with read access may do.

#![allow(dead_code)]

mod config;
mod layout;
mod restore;
mod session;
#[cfg(test)]
mod tests;
mod tls;
mod tools;
mod wire;

pub use config::{Roles, Settings, Tls};

/// The schema that holds the environment stamp; part of no point.
pub(super) const STAMP_SCHEMA: &str = "stillpoint";
