//! Compresses and decompresses blobs with zstd, each file with the parameters that suit it.

use std::cell::RefCell;

use stillpoint_core::error::{Error, Kind, Result};
use zstd_safe::DCtx;

thread_local! {
    /// A context is 160 KB and costs more to make than a small blob to decompress.
    static CONTEXT: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Decompresses one frame of exactly `length` plain bytes into `plain`, which is overwritten.
pub(crate) fn decompress(frame: &[u8], length: usize, plain: &mut Vec<u8>) -> Result<()> {
    // A hostile index may claim any length; a frame cannot expand more than this.
    const RATIO_MAX: usize = 1 << 17;
    let bad = || Error::new(Kind::Corrupt, "a compressed blob is damaged");
    if length > frame.len().saturating_mul(RATIO_MAX) {
        return Err(bad().context("claimed length", length));
    }
    plain.clear();
    plain.reserve(length);
    let written = CONTEXT
        .with_borrow_mut(|context| context.decompress(plain, frame))
        .map_err(|code| bad().context("zstd", zstd_safe::get_error_name(code)))?;
    if written != length {
        return Err(bad().context("claimed length", length).context("length", written));
    }
    Ok(())
}
