//! `objects`: a directory of objects, or a bucket.
//!
//! | question | answer |
//! |---|---|
//! | what a cut means | the objects that were there at that moment; later ones are left out |
//! | pin | set: versions of S3 hold the view. Others watched: what was overwritten or deleted since the cut is found and named |
//! | position | directory: the watch's count of changes. Bucket: the service's time |
//! | incremental | an object whose inode and times (directory) or tag and version (bucket) are those of the parent is not read again |
//! | way back | directory: beside and exchanged in one step, the old one stays. Bucket: into an empty prefix; S3 with versions set back in place |
//! | versions | S3 and its clones by our own client; GCS and Azure by the `object_store` crate |
//! | privileges | directory: read all files; list and read for buckets, write to restore |
//!
//! Keys become paths by [`keys`]; listings of any length are sorted on disk by [`spool`].

mod bucket;
mod client;
mod config;
mod cut;
mod drain;
mod keys;
mod restore;
mod sieve;
mod spool;
#[cfg(test)]
mod tests;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stillpoint_core::address;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::{Identity, Stamp};

pub use config::Settings;

use crate::phases::{Phased, Phases};
use crate::{OpenRequest, Registration};

/// The registry's line for this driver.
pub static REGISTRATION: Registration = Registration {
    name: "objects",
    about: "a bucket, or a directory whose files are objects",
    readme: include_str!("README.md"),
    open: |request| Ok(Arc::new(Phased::new(Objects::open(request)?, &PHASES))),
    schema: || schemars::schema_for!(Settings),
    into_folder: Some(config::into_folder),
    policy: bucket::policy::policy,
};

/// The phases, by the pages they stand on.
static PHASES: Phases<Objects> = Phases {
    probe: Objects::probe,
    prepare: cut::prepare,
    observe: cut::observe,
    cut: cut::cut,
    drain: drain::drain,
    still_valid: cut::still_valid,
    edges: drain::edges,
    release: |objects, _| {
        cut::release(objects);
        Ok(())
    },
    identity: Objects::identity,
    restore: restore::restore,
    verify: restore::verify,
    stamp: Objects::stamp,
    read_stamp: Objects::read_stamp,
    occupied: |objects| objects.place.as_place().occupied(),
    execute: None,
};

/// One store of objects.
struct Objects {
    settings: Settings,
    scratch: PathBuf,
    place: Where,
    state: Mutex<cut::State>,
}

/// Where the objects lie.
enum Where {
    Directory(client::Directory),
    Bucket(bucket::generic::Bucket),
    S3(bucket::s3::S3),
}

impl Where {
    fn as_place(&self) -> &dyn client::Place {
        match self {
            Self::Directory(directory) => directory,
            Self::Bucket(bucket) => bucket,
            Self::S3(s3) => s3,
        }
    }
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = (&self.settings.path, &self.settings.url);
        f.debug_struct("Objects").field("place", &place).finish_non_exhaustive()
    }
}

impl Objects {
    fn open(request: &OpenRequest<'_>) -> Result<Self> {
        let named = |error: Error| error.store(request.store.as_str());
        let settings: Settings = crate::settings(request)?;
        settings.validate().map_err(named)?;
        let place = match (&settings.path, &settings.url) {
            (Some(path), _) => Where::Directory(client::Directory::new(path.clone(), settings.clone())),
            (None, Some(url)) => open_bucket(request, &settings, url).map_err(named)?,
            (None, None) => return Err(Error::internal("the settings name no objects")),
        };
        Ok(Self { settings, scratch: request.scratch.clone(), place, state: Mutex::default() })
    }
}

fn open_bucket(request: &OpenRequest<'_>, settings: &Settings, url: &str) -> Result<Where> {
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(Kind::Config, format!("`{url}` names no bucket")).hint("url: s3://bucket/prefix").source(error)
    };
    let parsed = url::Url::parse(url).map_err(|error| wrong(error.into()))?;
    if matches!(parsed.scheme(), "file" | "memory") {
        return Err(Error::new(Kind::Config, format!("`{url}` is no bucket")).hint("path: /srv/objects"));
    }
    let mut options: Vec<(String, String)> = settings.options.clone().into_iter().collect();
    for (name, secret) in &settings.credentials {
        options.push((name.clone(), (request.secrets)(secret)?));
    }
    if config::is_s3(url) {
        return bucket::s3::S3::open(&parsed, &options, settings).map(Where::S3);
    }
    // Large objects take longer than any limit for whole requests; steps have limits of their own.
    options.insert(0, ("timeout".to_owned(), "1 day".to_owned()));
    let (store, prefix) = object_store::parse_url_opts(&parsed, options).map_err(|error| wrong(error.into()))?;
    bucket::generic::Bucket::new(Arc::from(store), prefix, settings.connections).map(Where::Bucket)
}

impl Objects {
    fn identity(&self) -> Result<Identity> {
        match (&self.place, &self.settings.url) {
            (Where::Directory(directory), _) => crate::place::identity("objects", &directory.root),
            (Where::Bucket(bucket), Some(url)) => {
                let endpoint = address::of_bucket(url, &self.settings.options, bucket.prefix())?;
                Ok(Identity { driver: "objects".to_owned(), native: None, endpoint })
            }
            (Where::S3(s3), Some(url)) => self.identity_s3(s3, url),
            (Where::Bucket(_) | Where::S3(_), None) => Err(Error::internal("a bucket without a url")),
        }
    }

    fn probe(&self) -> Result<Probe> {
        let mut warnings = Vec::new();
        let mut observes_writes = false;
        match &self.place {
            Where::Directory(directory) => {
                if !directory.root.is_dir() {
                    return Err(Error::new(Kind::NotFound, format!("{} is no directory", directory.root.display())));
                }
                observes_writes = cut::observe(self)?.is_some();
                if !observes_writes {
                    warnings.push("the directory cannot be watched: raise fs.inotify.max_user_watches".to_owned());
                }
            }
            Where::Bucket(bucket) => {
                client::Place::occupied(bucket)?;
                warnings.push(
                    "a bucket is read without its versions: what is overwritten or deleted between cut and drain is \
                     lost to the point, and named if the listing before the cut shows it"
                        .to_owned(),
                );
            }
            Where::S3(s3) => return self.probe_s3(s3),
        }
        let is_directory = matches!(self.place, Where::Directory(_));
        Ok(Probe {
            version: if is_directory { "directory" } else { "bucket" }.to_owned(),
            identity: self.identity()?,
            capability: Capability {
                pin: PinKind::Watched,
                observes_writes,
                incremental: true,
                edges: true,
                swaps_in_place: is_directory,
                partial_restore: true,
            },
            missing_privileges: Vec::new(),
            warnings,
        })
    }

    fn stamp(&self, stamp: &Stamp) -> Result<()> {
        let text = serde_json::to_vec(stamp).map_err(|e| Error::internal("a stamp does not serialize").source(e))?;
        self.place.as_place().write_stamp(&text)
    }

    fn read_stamp(&self) -> Result<Option<Stamp>> {
        let Some(bytes) = self.place.as_place().read_stamp()? else { return Ok(None) };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|error| Error::new(Kind::Corrupt, "the stamp is not readable").source(error))
    }
}
