//! The way back.
mod archive;
mod roles;
mod statements;
