//! What the CPU does best when asked directly; the one module with `unsafe`.
//!
//! Each function here has a twin made of well-kept libraries, is chosen at run time by what the CPU
//! says it can, and is tested against its twin on random input. Nothing here knows of repositories.

#![allow(unsafe_code)]

pub(crate) mod sha256;
#[cfg(target_arch = "x86_64")]
mod sha_ni;
