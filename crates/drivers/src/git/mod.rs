//! `git`: repositories, bare or with working trees, one or thousands in a folder.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | all refs are read, each repository's at one moment; objects are named by their content and never change |
//! | pin | set: the ids that the refs name. They stay until git collects them, by default two weeks after the last ref let go; nothing is planted in the store. The drain proves that all of them were there |
//! | position | a hash of all (repository, ref, id), and one that also tells an update that was taken back |
//! | consistency | one repository: its refs at one moment. Many: read one after the other within milliseconds; `observe` before and after proves that nothing was pushed meanwhile |
//! | incremental | one pack per point, with what the refs reach and the parent point's refs do not |
//! | way back | `git init`, `index-pack` in order, refs in one transaction, `fsck`, then one rename; the old stays beside |
//! | versions | git 2.31 or newer; sha1 and sha256; refs in files, or in reftables where the installed git reads them |
//! | privileges | reading the directories; whose they are does not matter. For a restore, writing beside them |
//!
//! Manual: <https://git-scm.com/docs/git-pack-objects>, <https://git-scm.com/docs/gitrepository-layout>,
//! <https://git-scm.com/docs/git-gc>.

mod client;
mod config;
mod cut;
mod drain;
mod restore;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, Mutex};

use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::driver::Pin;
use stillpoint_core::error::Result;
use stillpoint_core::id::CutId;

pub use config::Settings;

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration, place};

/// The folder of a point that holds one folder per repository.
const REPOSITORIES: &str = "repositories";
/// The file of a point that says how many there are.
const STORE: &str = "store.json";
/// The stamp's file name.
const STAMP: &str = "stillpoint-stamp.json";

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "git",
    about: "git repositories, one or a folder of thousands; refs are the cut",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Git::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(config::into_folder),
    policy: |_| Ok(None),
};

/// The phases, by the pages they stand on.
static PHASES: Phases<Git> = Phases {
    probe,
    prepare: cut::prepare,
    observe: cut::observe,
    cut: cut::cut,
    drain: drain::drain,
    still_valid: cut::still_valid,
    edges: drain::edges,
    release: |git, _| {
        cut::release(git);
        Ok(())
    },
    identity: |git| place::identity("git", &git.settings.path),
    restore: restore::restore,
    verify: restore::verify,
    stamp: restore::stamp,
    read_stamp: restore::read_stamp,
    occupied: restore::occupied,
    execute: None,
};

/// One store of git repositories.
#[derive(Debug)]
struct Git {
    settings: Settings,
    /// The pin that this value took last, and what it shows.
    pin: Mutex<Option<(Pin, Arc<cut::View>)>>,
    /// What `observe` read last, so that it need not read again what did not change.
    known: client::Known,
    /// The cut that was drained whole.
    drained: Mutex<Option<CutId>>,
}

impl Git {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let settings: Settings = crate::settings(request)?;
        settings.validate().map_err(|error| error.store(request.store.as_str()))?;
        Ok(Self { settings, pin: Mutex::default(), known: client::Known::default(), drained: Mutex::default() })
    }
}

fn probe(git: &Git) -> Result<Probe> {
    let repositories = cut::found(git)?;
    let mut command = client::git(&repositories[0].git_dir);
    let version = client::output(command.arg("version"), "cannot ask git for its version")?;
    let mut warnings = Vec::new();
    for repository in &repositories {
        let config = client::config_text(repository)?;
        if wire::config_value(&config, "gc", "pruneexpire").is_some_and(|value| value == "now") {
            let place = repository.git_dir.display();
            warnings.push(format!("{place}: gc.pruneExpire is `now`: a collection during a backup makes it fail"));
        }
    }
    Ok(Probe {
        version: String::from_utf8_lossy(&version).trim().trim_start_matches("git version ").to_owned(),
        identity: place::identity("git", &git.settings.path)?,
        capability: Capability {
            pin: PinKind::Set,
            observes_writes: cut::observes(repositories.len()),
            incremental: true,
            edges: true,
            swaps_in_place: true,
            partial_restore: repositories.len() > 1,
        },
        missing_privileges: Vec::new(),
        warnings,
    })
}
