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

use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::{Context, Drained, EdgeQuery, Hold, Pin, Validity};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::CutId;
use stillpoint_core::position::Identity;
use stillpoint_core::tree::Sink;

pub use config::{Settings, Snapshot};

use crate::phases::{Parent, Phased, Phases, Visit};
use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "files",
    about: "directory trees: snapshot where the file system has them, changes detected where not",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Files::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(config::into_folder),
    policy: |_| Ok(None),
};

/// The phases. Settings and state are taken apart here, so that the pages of the phases see only
/// what they need.
static PHASES: Phases<Files> = Phases {
    probe: Files::probe,
    prepare: Files::prepare,
    observe: |files| Ok(files.lock().prepared.as_ref().and_then(cut::Prepared::position)),
    cut: Files::cut,
    drain: Files::drain,
    still_valid: Files::still_valid,
    edges: Files::edges,
    release: Files::release,
    identity: Files::identity,
    restore: |files, context, source, request| restore::restore(&files.checked, context, source, request),
    verify: |files, context, source| restore::verify(&files.checked, context, source),
    stamp: |files, stamp| restore::stamp(&files.checked, stamp),
    read_stamp: |files| restore::read_stamp(&files.checked),
    occupied: |files| restore::occupied(&files.checked),
    execute: None,
};

/// One store made of directories.
#[derive(Debug)]
struct Files {
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
        Ok(Self {
            checked: settings.validate(request.store.as_str()).map_err(|error| error.store(request.store.as_str()))?,
            scratch: request.scratch.clone(),
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn views(&self, pin: &Pin) -> Result<Arc<Vec<cut::View>>> {
        let state = self.lock();
        let held = state.held.as_ref().filter(|held| held.pin.cut == pin.cut);
        let held = held.ok_or_else(|| Error::new(Kind::PinLost, format!("the cut {} is not held", pin.cut)))?;
        Ok(Arc::clone(&held.views))
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

    fn prepare(&self, context: &Context) -> Result<Hold> {
        // The old watch ends first: the kernel counts watches, and two may be too many.
        self.lock().prepared = None;
        let (prepared, hold) = cut::prepare(&self.checked, context, &self.scratch)?;
        self.lock().prepared = Some(prepared);
        Ok(hold)
    }

    fn cut(&self, context: &Context, cut: &CutId) -> Result<Pin> {
        context.check()?;
        let mut state = self.lock();
        if let Some(held) = state.held.as_ref().filter(|held| held.pin.cut == *cut) {
            return Ok(held.pin.clone());
        }
        cut::release(&self.checked, state.held.take(), &[])?;
        let prepared = state.prepared.as_mut().ok_or_else(|| Error::internal("a cut before `prepare`"))?;
        let held = prepared.cut(&self.checked, cut)?;
        let pin = held.pin.clone();
        state.held = Some(held);
        Ok(pin)
    }

    fn drain(&self, context: &Context, pin: &Pin, sink: &mut dyn Sink, parent: Parent<'_>) -> Result<Drained> {
        let views = self.views(pin)?;
        let mut drained = drain::drain(&self.checked, context, &views, sink, parent.is_some())?;
        let blind = self.lock().prepared.as_ref().map(cut::Prepared::blind).unwrap_or_default();
        drained.notes.extend(blind.into_iter().map(|why| format!("writes were not observed to the end: {why}")));
        Ok(drained)
    }

    fn still_valid(&self, pin: &Pin) -> Result<Validity> {
        match self.lock().held.as_ref().filter(|held| held.pin.cut == pin.cut) {
            Some(held) => held.still_valid(&self.checked),
            None => Ok(Validity::Lost(format!("the cut {} is not held any more", pin.cut))),
        }
    }

    fn edges(&self, context: &Context, pin: Option<&Pin>, query: &EdgeQuery, visit: Visit<'_>) -> Result<()> {
        let checked = &self.checked;
        if let Some(pin) = pin {
            return drain::edges(checked, context, &self.views(pin)?, query, visit);
        }
        let live = |index: usize| drain::live_view(index, client::Top::open(&checked.places[index].path)?);
        let views = (0..checked.places.len()).map(live).collect::<Result<Vec<_>>>()?;
        drain::edges(checked, context, &views, query, visit)
    }

    fn release(&self, remains: &[String]) -> Result<()> {
        let mut state = self.lock();
        state.prepared = None;
        let held = state.held.take();
        drop(state);
        cut::release(&self.checked, held, remains)
    }
}
