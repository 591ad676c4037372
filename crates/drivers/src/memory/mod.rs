//! `memory`: keys and values in this process. The reference driver; read it first.
//!
//! It has every feature a driver can have and no difficulty of its own, so that what is left on
//! these pages is the contract. Tests of the engine use it where any store would do.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | an immutable map is shared, at once, whatever its size; later writers copy it first |
//! | pin | snapshot, kept by the store under the cut's id until it is released |
//! | position | `writes`: how many writes the store has acknowledged |
//! | incremental | a value whose version the parent point holds is not read again |
//! | way back | beside the old content, swapped in one assignment; the old store stays under a new name |
//!
//! A driver's pages have the same names everywhere: [`config`] checks settings, [`client`] is the
//! only one that touches the store, [`cut`], [`drain`] and [`restore`] are the phases, and this one
//! only names them in a table, from which `crate::phases` makes what the engine sees. A phase may wait.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use stillpoint_core::Result;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::Pin;

pub use client::Store;
pub use config::Settings;

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "memory",
    about: "keys and values in this process; the reference driver, for tests",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Memory::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(|_, folder| [("name".to_owned(), folder.to_string_lossy().into())].into()),
    policy: |_| Ok(None),
};

/// The phases, by the pages they stand on. The engine sees the store through this table alone.
static PHASES: Phases<Memory> = Phases {
    probe: Memory::probe,
    prepare: cut::prepare,
    observe: |memory| Ok(Some(client::find(&memory.settings.name)?.position())),
    cut: cut::cut,
    drain: drain::drain,
    still_valid: cut::still_valid,
    edges: drain::edges,
    release: |memory, remains| {
        cut::release(memory, remains);
        Ok(())
    },
    identity: |memory| Ok(client::identity(&memory.settings.name)),
    restore: restore::restore,
    verify: restore::verify,
    stamp: |memory, stamp| {
        client::find(&memory.settings.name)?.set_stamp(stamp.clone());
        Ok(())
    },
    read_stamp: |memory| Ok(client::find(&memory.settings.name).ok().and_then(|store| store.stamp())),
    occupied: |memory| {
        let keys = client::find(&memory.settings.name).map_or(0, |store| store.view().len());
        Ok((keys > 0).then(|| format!("{keys} keys")))
    },
    execute: None,
};

/// One in-process store.
#[derive(Debug)]
struct Memory {
    settings: Settings,
    /// The pin that this value took last. The store holds the view itself, so that a value that
    /// comes after a crash can still release it.
    pin: Mutex<Option<Pin>>,
}

impl Memory {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        settings.validate()?;
        Ok(Self { settings, pin: Mutex::new(None) })
    }

    fn probe(&self) -> Result<Probe> {
        Ok(Probe {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            identity: client::find(&self.settings.name)?.identity(),
            capability: Capability {
                pin: PinKind::Snapshot,
                observes_writes: true,
                incremental: true,
                edges: true,
                swaps_in_place: true,
                partial_restore: true,
            },
            missing_privileges: Vec::new(),
            warnings: Vec::new(),
        })
    }
}
