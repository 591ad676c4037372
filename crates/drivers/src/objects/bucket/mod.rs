//! Buckets: what a service keeps of objects, read and written over the network.
//!
//! S3 and its clones are spoken to by our own client, because versions, parts, tags and odd keys
//! are out of reach for the `object_store` crate; GCS and Azure go through that crate.
//!
//! | page | what it does |
//! |---|---|
//! | [`sign`] | signatures and the encoding of keys; pure |
//! | [`request`] | one request: time-outs, what errors mean |
//! | [`tries`] | when a request is sent, and sent again |
//! | [`answers`] | what comes back as XML; pure |
//! | [`verbs`] | the calls of S3 that are needed, each with the privilege it takes |
//! | [`clock`] | the service's time, which alone dates a cut |
//! | [`listing`] | what is listed, in several ranges at a time, and which version the cut shows |
//! | [`facts`] | what a bucket keeps of an object beside its bytes |
//! | [`read`] | objects on their way here, several ahead of whoever reads them |
//! | [`write`] | objects on their way back |
//! | [`compare`] | a bucket beside a point |
//! | [`crew`] | threads that wait for requests, and the memory they share |
//! | [`s3`] | all of these as one place |
//! | [`mirror`] | copies within the service, instead of bytes in the point |
//! | [`revert`] | a bucket set back in time, its history kept |
//! | [`policy`] | the privileges, as a policy to paste |
//! | [`generic`] | GCS and Azure |

pub(super) mod answers;
pub(super) mod clock;
pub(super) mod compare;
pub(super) mod crew;
pub(super) mod facts;
pub(super) mod generic;
pub(super) mod listing;
pub(super) mod mirror;
mod options;
pub(super) mod policy;
pub(super) mod read;
pub(super) mod request;
pub(super) mod revert;
pub(super) mod s3;
mod sign;
#[cfg(test)]
mod tests;
mod tries;
pub(super) mod verbs;
pub(super) mod write;
