//! placeholder
use std::io::Read;
use stillpoint_core::error::{Error, Result};
use super::rdb::{Key, Walker};
use super::wire::Command;
pub(super) struct Collector;
impl Collector {
    pub fn wants(&self, _: &[u8]) -> bool { false }
    pub fn key<R: Read>(&self, key: &Key, walker: &mut Walker<R>) -> Result<()> { walker.skip_value(key.kind) }
    pub fn command(&self, _: u64, _: &Command) -> Result<()> { Ok(()) }
    pub fn fail(&self, _: &Error) {}
}
