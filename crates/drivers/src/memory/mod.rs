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
//! only connects them to the contract.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use stillpoint_core::Result;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};

pub use client::Store;
pub use config::Settings;

use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "memory",
    about: "keys and values in this process; the reference driver, for tests",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Memory::open(request)?)),
    schema: || schemars::schema_for!(Settings),
    into_folder: |_, folder| [("name".to_owned(), folder.to_string_lossy().into())].into(),
};

/// One in-process store, as the engine sees it.
#[derive(Debug)]
pub struct Memory {
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
}

#[async_trait]
impl Driver for Memory {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        context.check()?;
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

    async fn prepare(&self, context: &Context) -> Result<Hold> {
        cut::prepare(self, context)
    }

    async fn observe(&self, _: &Context) -> Result<Option<Position>> {
        Ok(Some(client::find(&self.settings.name)?.position()))
    }

    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        cut::cut(self, context, cut)
    }

    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained> {
        drain::drain(self, context, pin, sink, parent)
    }

    async fn still_valid(&self, _: &Context, pin: &Pin) -> Result<Validity> {
        cut::still_valid(self, pin)
    }

    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()> {
        drain::edges(self, context, pin, query, visit)
    }

    async fn release(&self, _: &Context, remains: &[String]) -> Result<()> {
        cut::release(self, remains);
        Ok(())
    }

    async fn identity(&self, _: &Context) -> Result<Identity> {
        Ok(client::identity(&self.settings.name))
    }

    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored> {
        restore::restore(self, context, source, request)
    }

    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification> {
        restore::verify(self, context, source)
    }

    async fn stamp(&self, _: &Context, stamp: &Stamp) -> Result<()> {
        client::find(&self.settings.name)?.set_stamp(stamp.clone());
        Ok(())
    }

    async fn read_stamp(&self, _: &Context) -> Result<Option<Stamp>> {
        Ok(client::find(&self.settings.name).ok().and_then(|store| store.stamp()))
    }

    async fn occupied(&self, _: &Context) -> Result<Option<String>> {
        let keys = client::find(&self.settings.name).map_or(0, |store| store.view().len());
        Ok((keys > 0).then(|| format!("{keys} keys")))
    }
}
