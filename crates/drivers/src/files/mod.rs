//! `files`: directory trees.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | what the directory held at one instant; where nothing can hold that view, what changes after it is found and named |
//! | pin | btrfs snapshot, LVM snapshot, reflink clones of few files, else watched |
//! | position | what inotify reported so far: equal before and after the cut means that nobody wrote |
//! | incremental | a file of the same inode, size, change time and modification time is not read again |
//! | way back | extracted beside, swapped by rename; the old directory stays as `<path>.before-<restore>` |
//! | privileges | read access to everything; root for snapshots, owners and other people's files |
//! | versions | Linux 4.11 or newer (`statx`); 5.6 or newer saves calls (`openat2`) |
//!
//! See inotify(7), statx(2), btrfs-subvolume(8), lvcreate(8), ioctl_ficlone(2).
//!
//! Beside the usual files: [`walk`] holds the walk and the judgement of what the cut showed,
//! [`spool`] the list from before the cut, [`snapshot`] the views that file systems keep.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
mod snapshot;
mod spool;
#[cfg(test)]
mod tests;
mod walk;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::{
    Context, Drained, Driver, Edge, EdgeQuery, Hold, Pin, RestoreRequest, Restored, Validity, Verification,
};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::{Identity, Position, Stamp};
use stillpoint_core::tree::{Sink, Tree};

pub use config::{Settings, Snapshot};

use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "files",
    about: "directory trees: snapshot where the file system has them, changes detected where not",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Files::open(request)?)),
    schema: || schemars::schema_for!(Settings),
    into_folder: config::into_folder,
};

/// One store made of directories.
#[derive(Debug, Clone)]
pub struct Files {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    checked: config::Checked,
    scratch: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    prepared: Option<cut::Prepared>,
    held: Option<cut::Held>,
}

impl Files {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        let shared = Shared {
            checked: settings.validate(request.store.as_str()).map_err(|error| error.store(request.store.as_str()))?,
            scratch: request.scratch.clone(),
            state: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Runs what blocks on a thread that may block.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Shared) -> Result<T> + Send + 'static) -> Result<T> {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        done.map_err(|error| Error::internal("a blocking task of the `files` driver panicked").source(error))?
    }

    fn views(&self, pin: &Pin) -> Result<Arc<Vec<cut::View>>> {
        let state = self.shared.lock();
        let held = state.held.as_ref().filter(|held| held.pin.cut == pin.cut);
        let held = held.ok_or_else(|| Error::new(Kind::PinLost, format!("the cut {} is not held", pin.cut)))?;
        Ok(Arc::clone(&held.views))
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn probe(&self) -> Result<Probe> {
        let mut warnings = Vec::new();
        let mut pin = PinKind::Snapshot;
        let mut observes_writes = self.checked.settings.watch_directories_max > 0;
        let mut kinds = Vec::new();
        let mut missing_privileges = Vec::new();
        for place in &self.checked.places {
            let top = client::Top::open(&place.path)?;
            let (kind, is_local, _) = client::file_system(top.fd.as_fd())?;
            observes_writes &= is_local;
            if !is_local {
                warnings
                    .push(format!("`{}` is on {kind}: whatever changes during a run is named", place.path.display()));
            }
            // Clones are for few files; how many there are is found out by `prepare`.
            let is_sure = |method| match method {
                snapshot::Method::Watched => false,
                snapshot::Method::Reflink => self.checked.settings.snapshot == Snapshot::Reflink,
                snapshot::Method::Btrfs { .. } | snapshot::Method::Lvm { .. } => true,
            };
            if !is_sure(snapshot::choose(&self.checked, &place.path, &top, false, &mut warnings)?) {
                pin = PinKind::Watched;
            }
            kinds.push(kind);
        }
        if !rustix::process::geteuid().is_root() {
            missing_privileges.extend(self.unreadable());
        }
        kinds.dedup();
        Ok(Probe {
            version: kinds.join(", "),
            identity: self.identity()?,
            capability: Capability {
                pin,
                observes_writes,
                incremental: true,
                edges: true,
                swaps_in_place: true,
                partial_restore: true,
            },
            missing_privileges,
            warnings,
        })
    }

    /// Places that this process may not list: the first sign that it may not read what is below.
    fn unreadable(&self) -> Vec<String> {
        let denied = |path: &Path| {
            std::fs::read_dir(path).is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
        };
        let places = self.checked.places.iter().filter(|place| denied(&place.path));
        places.map(|place| format!("may not list `{}`: run as its owner or as root", place.path.display())).collect()
    }

    fn identity(&self) -> Result<Identity> {
        let places = self.checked.places.iter().map(|place| crate::place::identity("files", &place.path));
        let places = places.collect::<Result<Vec<_>>>()?;
        let natives: Option<Vec<_>> = places.iter().map(|place| place.native.clone()).collect();
        let endpoints: Vec<_> = places.into_iter().map(|place| place.endpoint).collect();
        Ok(Identity {
            driver: "files".to_owned(),
            native: natives.map(|natives| natives.join("+")),
            endpoint: endpoints.join("+"),
        })
    }
}

#[async_trait]
impl Driver for Files {
    async fn probe(&self, context: &Context) -> Result<Probe> {
        context.check()?;
        self.blocking(Shared::probe).await
    }

    async fn prepare(&self, context: &Context) -> Result<Hold> {
        let context = context.clone();
        self.blocking(move |shared| {
            // The old watch ends first: the kernel counts watches, and two may be too many.
            shared.lock().prepared = None;
            let (prepared, hold) = cut::prepare(&shared.checked, &context, &shared.scratch)?;
            shared.lock().prepared = Some(prepared);
            Ok(hold)
        })
        .await
    }

    async fn observe(&self, _: &Context) -> Result<Option<Position>> {
        self.blocking(|shared| Ok(shared.lock().prepared.as_ref().and_then(cut::Prepared::position))).await
    }

    async fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        context.check()?;
        let cut = cut.clone();
        self.blocking(move |shared| {
            let mut state = shared.lock();
            if let Some(held) = state.held.as_ref().filter(|held| held.pin.cut == cut) {
                return Ok(held.pin.clone());
            }
            cut::release(&shared.checked, state.held.take(), &[])?;
            let prepared = state.prepared.as_mut().ok_or_else(|| Error::internal("a cut before `prepare`"))?;
            let held = prepared.cut(&shared.checked, &cut)?;
            let pin = held.pin.clone();
            state.held = Some(held);
            Ok(pin)
        })
        .await
    }

    async fn drain(
        &self,
        context: &Context,
        pin: &Pin,
        sink: &mut dyn Sink,
        parent: Option<&dyn Tree>,
    ) -> Result<Drained> {
        let views = self.views(pin)?;
        let mut drained = drain::drain(&self.shared.checked, context, &views, sink, parent.is_some())?;
        let blind = self.shared.lock().prepared.as_ref().map(cut::Prepared::blind).unwrap_or_default();
        drained.notes.extend(blind.into_iter().map(|why| format!("writes were not observed to the end: {why}")));
        Ok(drained)
    }

    async fn still_valid(&self, _: &Context, pin: &Pin) -> Result<Validity> {
        let cut = pin.cut.clone();
        self.blocking(move |shared| match shared.lock().held.as_ref().filter(|held| held.pin.cut == cut) {
            Some(held) => held.still_valid(&shared.checked),
            None => Ok(Validity::Lost(format!("the cut {cut} is not held any more"))),
        })
        .await
    }

    async fn edges(
        &self,
        context: &Context,
        pin: Option<&Pin>,
        query: &EdgeQuery,
        visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
    ) -> Result<()> {
        let checked = &self.shared.checked;
        if let Some(pin) = pin {
            return drain::edges(checked, context, &self.views(pin)?, query, visit);
        }
        let live = |index: usize| drain::live_view(index, client::Top::open(&checked.places[index].path)?);
        let views = (0..checked.places.len()).map(live).collect::<Result<Vec<_>>>()?;
        drain::edges(checked, context, &views, query, visit)
    }

    async fn release(&self, _: &Context, remains: &[String]) -> Result<()> {
        let remains = remains.to_vec();
        self.blocking(move |shared| {
            let mut state = shared.lock();
            state.prepared = None;
            let held = state.held.take();
            drop(state);
            cut::release(&shared.checked, held, &remains)
        })
        .await
    }

    async fn identity(&self, _: &Context) -> Result<Identity> {
        self.blocking(Shared::identity).await
    }

    async fn occupied(&self, _: &Context) -> Result<Option<String>> {
        self.blocking(|shared| restore::occupied(&shared.checked)).await
    }

    async fn restore(&self, context: &Context, source: &dyn Tree, request: &RestoreRequest) -> Result<Restored> {
        restore::restore(&self.shared.checked, context, source, request)
    }

    async fn verify(&self, context: &Context, source: &dyn Tree) -> Result<Verification> {
        restore::verify(&self.shared.checked, context, source)
    }

    async fn stamp(&self, _: &Context, stamp: &Stamp) -> Result<()> {
        let stamp = stamp.clone();
        self.blocking(move |shared| restore::stamp(&shared.checked, &stamp)).await
    }

    async fn read_stamp(&self, _: &Context) -> Result<Option<Stamp>> {
        self.blocking(|shared| restore::read_stamp(&shared.checked)).await
    }
}
