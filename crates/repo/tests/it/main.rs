//! Everything about repositories and depots that needs more than one module: one binary, so that
//! it links once.

#![allow(clippy::unwrap_used, clippy::let_underscore_must_use, missing_docs)]

mod copy;
mod crash;
mod damage;
mod depot;
mod frozen;
mod read;
mod restic;
mod rig;
mod support;
mod write;
