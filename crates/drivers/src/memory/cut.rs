//! PREPARE, CUT and release.

use std::time::Duration;

use stillpoint_core::Result;
use stillpoint_core::driver::{Context, Hold, Pin, Validity};
use stillpoint_core::id::CutId;

use super::{Memory, client};

/// Nothing has to be waited for, so the hold is as long as anyone may want.
const SAFE_FOR: Duration = Duration::from_secs(3600);

/// Looks that the store is there: its absence is found out now, before anyone is paused.
pub(super) fn prepare(driver: &Memory, context: &Context) -> Result<Hold> {
    context.check()?;
    let view = client::find(&driver.settings.name)?.view();
    let bytes = view.values().map(|value| value.bytes.len() as u64).sum();
    Ok(Hold { safe_for: SAFE_FOR, bytes_estimate: Some(bytes) })
}

/// Shares the current view under the cut's id. The same id again finds the same view; a new id
/// lets go of the view of the earlier try.
pub(super) fn cut(driver: &Memory, context: &Context, cut: &CutId) -> Result<Pin> {
    context.check()?;
    let store = client::find(&driver.settings.name)?;
    let mut held = driver.pin.lock().expect("no holder panics");
    if let Some(old) = held.take_if(|pin| pin.cut != *cut) {
        store.unpin(&name(&old.cut));
    }
    let pinned = store.pin(&name(cut));
    let pin = Pin { cut: cut.clone(), position: pinned.position, remains: vec![name(cut)] };
    *held = Some(pin.clone());
    Ok(pin)
}

/// Asks the store whether it still keeps the view.
pub(super) fn still_valid(driver: &Memory, pin: &Pin) -> Result<Validity> {
    Ok(match client::find(&driver.settings.name)?.pinned(&name(&pin.cut)) {
        Some(_) => Validity::Valid,
        None => Validity::Lost("the store no longer keeps the view of the cut".to_owned()),
    })
}

/// Unpins what this value pinned and what a value before a crash did. A store that is gone holds
/// no pins, so that its absence is no failure here.
pub(super) fn release(driver: &Memory, remains: &[String]) {
    let own = driver.pin.lock().expect("no holder panics").take();
    if let Ok(store) = client::find(&driver.settings.name) {
        for pin in own.iter().flat_map(|pin| &pin.remains).chain(remains) {
            store.unpin(pin);
        }
    }
}

/// What a pin is called in the store.
pub(super) fn name(cut: &CutId) -> String {
    format!("stillpoint-{cut}")
}
