//! The restic format 2 repository: written and read by our own hot path, kept in a [`depot`].

pub mod depot;
