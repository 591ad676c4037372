//! Buckets of real servers: what the cut shows, what comes back, and what a user reads when a service
//! fails. Every claim is looked at with the `object_store` crate, never with our own client alone.

mod faults;
mod modes;
mod odd;
mod rig;
mod suite;
mod versions;
