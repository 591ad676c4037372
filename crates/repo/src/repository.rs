//! An open repository: its key, its configuration, its index, its files. Blobs are the business of
//! `backup` and `tree`.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use stillpoint_core::error::{Error, Kind, Result};

use crate::backup::{Backup, BackupOptions};
use crate::crypto::{self, Cipher, MasterKey};
use crate::depot::{Depot, WriteMode};
use crate::format::config::Config;
use crate::format::id::Id;
use crate::format::polynomial;
use crate::format::snapshot::{Snapshot, SnapshotId, SnapshotJson};
use crate::index::Index;
use crate::key::{self, Unlock};
use crate::unpacked::{self, CONFIG, FileKind};

/// How a repository is made.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// Cut as another repository does, so that copies between the two stay deduplicated; from
    /// [`Repository::chunker_polynomial`]. `None` draws a new one.
    pub chunker_polynomial: Option<u64>,
    /// A name for the first key, for people.
    pub key_label: String,
}

/// An open repository. Clones share everything.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    depot: Arc<dyn Depot>,
    config: Config,
    polynomial: u64,
    key_id: Id,
    master: MasterKey,
    cipher: Cipher,
    index: Mutex<Loaded>,
}

/// The index in memory and the index files that are in it.
#[derive(Default)]
struct Loaded {
    files: Vec<Id>,
    index: Option<Arc<Index>>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repository({} at {})", self.inner.config.id, self.inner.depot.location())
    }
}

impl Repository {
    /// Makes a repository in an empty depot. `AlreadyExists` if there is one.
    pub fn init(depot: Arc<dyn Depot>, unlock: &Unlock, options: &InitOptions) -> Result<Self> {
        if depot.stat(CONFIG)?.is_some() {
            let message = format!("there is a repository at {} already", depot.location());
            return Err(Error::new(Kind::AlreadyExists, message));
        }
        let polynomial = match options.chunker_polynomial {
            Some(given) if polynomial::is_irreducible(given) => given,
            Some(_) => return Err(Error::new(Kind::Config, "the chunker polynomial is not irreducible")),
            None => polynomial::generate(|| crypto::random().map(u64::from_le_bytes))?,
        };
        let config = Config::new(crypto::random()?, polynomial);
        let master = MasterKey::generate()?;
        let cipher = Cipher::new(&master);
        let (key_id, _) = key::create(&*depot, &master, unlock, &options.key_label)?;
        // Config last: a repository exists once it can be opened.
        depot.write(CONFIG, &[&cipher.seal(&config.to_json())?], &WriteMode::Create)?;
        Ok(Self::assemble(depot, config, polynomial, key_id, master))
    }

    /// Opens a repository. A key that does not fit is `Unauthenticated`, no repository `NotFound`.
    pub fn open(depot: Arc<dyn Depot>, unlock: &Unlock) -> Result<Self> {
        let sealed = depot.read(CONFIG).map_err(|error| match error.kind() {
            Kind::NotFound => Error::new(Kind::NotFound, format!("there is no repository at {}", depot.location())),
            _ => error,
        })?;
        let (key_id, master) = key::open(&*depot, unlock)?;
        let mut plain = Vec::new();
        Cipher::new(&master).open_into(&sealed.0, &mut plain).map_err(|error| error.context("file", CONFIG))?;
        let config = Config::parse(&plain)?;
        let polynomial = config.polynomial()?;
        Ok(Self::assemble(depot, config, polynomial, key_id, master))
    }

    fn assemble(depot: Arc<dyn Depot>, config: Config, polynomial: u64, key_id: Id, master: MasterKey) -> Self {
        let cipher = Cipher::new(&master);
        let index = Mutex::default();
        Self { inner: Arc::new(Inner { depot, config, polynomial, key_id, master, cipher, index }) }
    }

    /// The repository's id: 64 hex digits from restic's config.
    pub fn id(&self) -> &str {
        &self.inner.config.id
    }

    /// What decides how files are cut. A secret: see [`InitOptions::chunker_polynomial`].
    pub fn chunker_polynomial(&self) -> u64 {
        self.inner.polynomial
    }

    /// HMAC-SHA256 of `bytes` under a key that only holders of a repository key have, and that is
    /// its own for each `purpose`.
    pub fn authenticate(&self, purpose: &str, bytes: &[u8]) -> [u8; 32] {
        self.inner.master.authenticate(purpose, bytes)
    }

    /// Starts a backup: takes restic's non-exclusive lock and keeps it fresh until the end.
    /// `Locked` while someone prunes.
    pub fn begin(&self, options: BackupOptions) -> Result<Backup> {
        Backup::begin(self, options)
    }

    /// All snapshots, oldest first.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let mut snapshots = Vec::new();
        for id in unpacked::list(self.depot(), FileKind::Snapshot)? {
            let json = self.load(FileKind::Snapshot, &id)?;
            snapshots.push(SnapshotJson::parse(&json)?.named(SnapshotId::from(id))?);
        }
        snapshots.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
        Ok(snapshots)
    }

    /// The ids of all snapshots, whether they can be read or not.
    pub fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        Ok(unpacked::list(self.depot(), FileKind::Snapshot)?.into_iter().map(SnapshotId::from).collect())
    }

    /// When the snapshot's file was written, as the depot says. For a copy that is not the snapshot's
    /// own time. `None` if it is gone.
    pub fn snapshot_written(&self, id: &SnapshotId) -> Result<Option<SystemTime>> {
        let name = FileKind::Snapshot.name(&Id::parse(&id.0)?);
        Ok(self.depot().stat(&name)?.map(|object| object.modified))
    }

    /// Where the repository lies.
    pub(crate) fn depot(&self) -> &dyn Depot {
        &*self.inner.depot
    }

    /// What its bytes are sealed with.
    pub(crate) fn cipher(&self) -> &Cipher {
        &self.inner.cipher
    }

    /// The key behind all keys.
    pub(crate) fn master_key(&self) -> &MasterKey {
        &self.inner.master
    }

    /// The key file that this session was opened with.
    pub(crate) fn key_id(&self) -> Id {
        self.inner.key_id
    }

    /// Reads an index file, snapshot or lock.
    pub(crate) fn load(&self, kind: FileKind, id: &Id) -> Result<Vec<u8>> {
        unpacked::load(self.depot(), self.cipher(), kind, id)
    }

    /// Writes an index file, snapshot or lock.
    pub(crate) fn save(&self, kind: FileKind, json: &[u8]) -> Result<Id> {
        unpacked::save(self.depot(), self.cipher(), kind, json)
    }

    /// The index as it is in the depot now. Index files that were loaded before are not read again.
    pub(crate) fn fresh_index(&self) -> Result<Arc<Index>> {
        self.reload(self.lock_index())
    }

    /// The index as it is in the depot now, without the blobs of packs that are absent or cut short;
    /// and whether there are none of those. Lists the packs once.
    ///
    /// Whoever stores only what is missing asks this one: what the index alone names may be gone.
    pub(crate) fn index_of_present(&self) -> Result<(Arc<Index>, bool)> {
        let index = self.fresh_index()?;
        // Packs come before the index that names them, so a list that is made later has them all.
        let mut lost = index.ends();
        if !lost.is_empty() {
            self.depot().list(FileKind::Pack.folder(), &mut |object| {
                let id = FileKind::Pack.id_of(&object.name);
                // A header follows the last blob.
                if let Some(id) = id.filter(|id| lost.get(id).is_some_and(|end| object.size > *end)) {
                    lost.remove(&id);
                }
                Ok(true)
            })?;
        }
        if lost.is_empty() {
            return Ok((index, true));
        }
        tracing::warn!(packs = lost.len(), "packs are absent or cut short; what they held is stored anew");
        Ok((Arc::new(index.without(|pack| lost.contains_key(pack))?), false))
    }

    fn lock_index(&self) -> std::sync::MutexGuard<'_, Loaded> {
        // What is in the mutex is replaced whole, so a panic elsewhere leaves nothing half done.
        self.inner.index.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Brings the index up to date. Someone may merge index files meanwhile (prune, another tool), so
    /// that a listed one is gone; then the list is read again.
    fn reload(&self, mut loaded: std::sync::MutexGuard<'_, Loaded>) -> Result<Arc<Index>> {
        const ATTEMPTS: usize = 5;
        for attempt in 1.. {
            match self.load_listed(std::mem::take(&mut *loaded)) {
                Ok(now) => {
                    let index = now.index.clone().unwrap_or_default();
                    *loaded = now;
                    return Ok(index);
                }
                Err(error) if error.kind() == Kind::NotFound && attempt < ATTEMPTS => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::internal("the last attempt returns"))
    }

    fn load_listed(&self, known: Loaded) -> Result<Loaded> {
        let files = unpacked::list(self.depot(), FileKind::Index)?;
        let superset = known.files.iter().all(|file| files.binary_search(file).is_ok());
        let (mut index, old) = match known.index.filter(|_| superset) {
            Some(index) if files.len() == known.files.len() => return Ok(Loaded { files, index: Some(index) }),
            // Taken over when nobody else holds it; a second copy of a large index is not afforded.
            Some(index) => match Arc::try_unwrap(index) {
                Ok(index) => (index, known.files),
                Err(_) => (Index::default(), Vec::new()),
            },
            None => (Index::default(), Vec::new()),
        };
        for id in files.iter().filter(|id| old.binary_search(id).is_err()) {
            let json = self.load(FileKind::Index, id)?;
            index.add_file(&json).map_err(|error| error.context("file", FileKind::Index.name(id)))?;
        }
        Ok(Loaded { files, index: Some(Arc::new(index)) })
    }
}
