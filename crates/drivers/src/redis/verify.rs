//! placeholder
use stillpoint_core::driver::{Context, Verification};
use stillpoint_core::error::Result;
use stillpoint_core::tree::Tree;
use super::Redis;
pub(super) fn verify(_: &Redis, _: &Context, _: &dyn Tree) -> Result<Verification> { Ok(Verification::default()) }
