//! A bucket of S3 or a clone as a place of objects: with its versions where it keeps them.
//!
//! Asynchronous inside and blocking outside: requests run on a small runtime of their own, so that
//! any thread may wait for them.

use std::collections::HashMap;
use std::future::Future;
use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::FileTime;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;

use super::answers::{Entry, Versioning};
use super::clock::Clock;
use super::crew;
use super::listing::{self, Chooser, Chosen, Listing, Moment};
use super::read::{ContentReader, Reader};
use super::request::Client;
use super::verbs::{What, Which};
use crate::objects::client::{Fetched, Place, Skipped, Waiting, WaitingFacts};
use crate::objects::config::{Mode, Settings};
use crate::objects::wire::{Location, RESTORE_KEY, Record, STAMP_KEY};

/// Clocks of several machines of one service differ by a little.
const UPLOADS_DOUBT_SECONDS: i64 = 2;

/// A prefix of a bucket.
pub(in super::super) struct S3 {
    pub client: Client,
    /// What all keys of the store begin with: empty, or ends with a slash.
    pub prefix: String,
    pub connections: usize,
    /// Where copies within the service go.
    pub mirror: Option<Box<Self>>,
    pub reader: Arc<Reader>,
    /// Whether tags and the like of unchanged objects are asked for again.
    refreshes: bool,
    clock: Mutex<Option<Clock>>,
    /// Keys at which the next listing is split, learned from an earlier one.
    splits: Mutex<Option<Vec<Vec<u8>>>>,
    runtime: Option<Runtime>,
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping it in place would panic on an asynchronous thread.
            runtime.shutdown_background();
        }
    }
}

/// A restore that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct RestoreBegun {
    pub name: String,
    /// Whether it made the bucket.
    pub is_made: bool,
}

/// The second line of the note of a restore that made the bucket.
const MADE: &str = "made the bucket";

/// What a listing of versions found at the cut.
#[derive(Debug, Default)]
pub(in super::super) struct Seen {
    /// Versions that are later than the cut.
    pub later: u64,
}

impl S3 {
    /// The bucket and prefix of a url. Sends nothing yet.
    pub fn open(url: &url::Url, options: &[(String, String)], settings: &Settings) -> Result<Self> {
        let client = Client::new(url, options, settings.requests_per_second)?;
        let prefix = super::sign::decode(&url.path().replace('+', "%2B")).and_then(|path| String::from_utf8(path).ok());
        let prefix = prefix.ok_or_else(|| Error::new(Kind::Config, format!("`{url}` has no readable prefix")))?;
        let mut place = Self::new(client, &prefix, settings)?;
        if let Some(mirror) = &settings.mirror {
            let url = url::Url::parse(mirror)
                .map_err(|error| Error::new(Kind::Config, format!("`{mirror}` names no bucket")).source(error))?;
            let settings = Settings { mirror: None, ..settings.clone() };
            place.mirror = Some(Box::new(Self::open(&url, options, &settings)?));
        }
        Ok(place)
    }

    fn new(client: Client, prefix: &str, settings: &Settings) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("bucket")
            .enable_all()
            .build()
            .map_err(|error| Error::io("cannot start the threads of a bucket", error))?;
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let reader = Arc::new(Reader {
            client: client.clone(),
            prefix: prefix.clone(),
            handle: runtime.handle().clone(),
            slots: Arc::new(Semaphore::new(settings.connections)),
            held_bytes: Default::default(),
            with_acl: settings.acl,
            with_tags: settings.tags,
            tags: Default::default(),
        });
        let (clock, splits, connections) = (Mutex::default(), Mutex::default(), settings.connections);
        let (refreshes, runtime) = (settings.refresh, Some(runtime));
        Ok(Self { client, prefix, connections, mirror: None, reader, refreshes, clock, splits, runtime })
    }

    /// Where it is, for the summary of a point.
    pub fn location(&self) -> Location {
        let (service, bucket) = (self.client.service().to_owned(), self.client.bucket().to_owned());
        Location { service, bucket, prefix: self.prefix.clone() }
    }

    /// Where requests run.
    pub fn handle(&self) -> Result<&Handle> {
        Ok(self.runtime.as_ref().ok_or_else(|| Error::internal("the bucket was closed"))?.handle())
    }

    /// Runs a request on the bucket's own runtime; the caller's thread may be of any kind.
    pub fn wait<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let (debt, owed) = crew::owed();
        self.handle()?.spawn(async move { debt.pay(work.await) });
        owed.wait()?
    }

    /// The key in the bucket.
    pub fn whole_key(&self, key: &[u8]) -> Vec<u8> {
        [self.prefix.as_bytes(), key].concat()
    }

    /// Whether the bucket keeps versions; a service that does not know what that means keeps none.
    pub fn versioning(&self) -> Result<Versioning> {
        let client = self.client.clone();
        match self.wait(async move { client.versioning().await }) {
            Ok((versioning, _)) => Ok(versioning),
            Err(error) if error.kind() == Kind::Unsupported => Ok(Versioning::Never),
            Err(error) => Err(error),
        }
    }

    /// Makes sure that the service's clock is known.
    pub fn read_clock(&self) -> Result<()> {
        let known = *self.clock.lock().expect("no holder panics");
        let (client, prefix) = (self.client.clone(), self.prefix.clone());
        let clock = self.wait(async move {
            let asked = Instant::now();
            match (known, client.time(&prefix).await?) {
                (Some(known), Some(time)) if known.agrees(time.as_second(), asked) && known.is_exact() => Ok(known),
                _ => Clock::read(&client, &prefix).await,
            }
        })?;
        *self.clock.lock().expect("no holder panics") = Some(clock);
        Ok(())
    }

    /// The service's time now.
    pub fn now(&self) -> Result<FileTime> {
        self.read_clock()?;
        Ok(self.known_clock()?.reached(Instant::now()))
    }

    /// Whether the bucket keeps versions now, the service's time at the begin of this call, and how long to
    /// wait until later writes bear a later time: what the request takes is part of that wait. One request,
    /// unless the service's clock was set meanwhile.
    pub fn look(&self) -> Result<(Versioning, FileTime, Duration)> {
        let (client, asked) = (self.client.clone(), Instant::now());
        let (versioning, shown) = match self.wait(async move { client.versioning().await }) {
            Err(error) if error.kind() == Kind::Unsupported => (Versioning::Never, None),
            other => other?,
        };
        let known = *self.clock.lock().expect("no holder panics");
        if !known.zip(shown).is_some_and(|(clock, shown)| clock.agrees(shown.as_second(), asked)) {
            self.read_clock()?;
        }
        let clock = self.known_clock()?;
        let at = clock.reached(asked);
        Ok((versioning, at, clock.until_after(at)))
    }

    fn known_clock(&self) -> Result<Clock> {
        self.clock.lock().expect("no holder panics").ok_or_else(|| Error::internal("no clock was read"))
    }

    /// Keys at which the listings to come are split.
    pub fn learn_splits(&self, keys: &[Vec<u8>]) {
        let keys: Vec<_> = listing::spread(keys).iter().map(|key| self.whole_key(key)).collect();
        *self.splits.lock().expect("no holder panics") = Some(keys);
    }

    fn splits(&self) -> Result<Vec<Vec<u8>>> {
        let known = self.splits.lock().expect("no holder panics").clone();
        if let Some(known) = known {
            return Ok(known);
        }
        let (client, prefix) = (self.client.clone(), self.prefix.clone());
        self.wait(async move { listing::probe_splits(&client, &prefix).await })
    }

    fn listing(&self, what: What) -> Result<Listing<'_>> {
        let splits = self.splits()?;
        Ok(Listing { client: &self.client, handle: self.handle()?, prefix: &self.prefix, what, splits })
    }

    /// Calls `visit` for every version and marker, with keys below the prefix.
    pub fn versions(&self, context: &Context, visit: &mut dyn FnMut(Entry) -> Result<()>) -> Result<()> {
        self.listing(What::Versions)?.run(context, &mut |_, entry| {
            let entry = listing::below_prefix(entry, &self.prefix)?;
            if is_ours(&entry.key) { Ok(()) } else { visit(entry) }
        })
    }

    /// From when on the begin of an upload in parts does not tell that it was completed before the cut: uploads that
    /// are under way may end after it. Where they cannot be seen, that is so for every upload.
    pub fn uploads_from(&self, prepared: FileTime) -> Result<FileTime> {
        let (client, prefix) = (self.client.clone(), self.prefix.clone());
        let oldest = match self.wait(async move { client.oldest_upload(&prefix).await }) {
            Ok(oldest) => oldest.map_or(prepared.seconds, |oldest| oldest.as_second().min(prepared.seconds)),
            Err(error) if matches!(error.kind(), Kind::PermissionDenied | Kind::Unsupported | Kind::Config) => {
                return Ok(FileTime { seconds: i64::MIN, nanos: 0 });
            }
            Err(error) => return Err(error),
        };
        Ok(FileTime { seconds: oldest - UPLOADS_DOUBT_SECONDS, nanos: 0 })
    }

    /// Calls `visit` for every object that the cut shows, in any order.
    pub fn at_cut(
        &self,
        context: &Context,
        mut moment: Moment,
        visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>,
    ) -> Result<Seen> {
        let mut seen = Seen::default();
        let mut choosers: HashMap<usize, Chooser> = HashMap::new();
        let mut known: Vec<Chosen> = Vec::new();
        let mut take = |known: &mut Vec<Chosen>| {
            known.drain(..).try_for_each(|Chosen { entry, other }| {
                let entry = listing::below_prefix(entry, &self.prefix)?;
                if entry.is_marker || is_ours(&entry.key) {
                    return Ok(());
                }
                visit(entry.key.clone(), Record { other, ..record(entry) })
            })
        };
        self.listing(What::Versions)?.run(context, &mut |range, entry| {
            moment.tells_fractions |= entry.modified.1 != 0;
            let chooser = choosers.entry(range).or_insert_with(|| Chooser::new(moment));
            if moment.tells_fractions {
                chooser.tells_fractions();
            }
            chooser.push(entry, &mut known);
            take(&mut known)
        })?;
        for chooser in choosers.values_mut() {
            chooser.finish(&mut known);
            seen.later += chooser.later;
        }
        take(&mut known)?;
        Ok(seen)
    }

    /// Tries what a drain will need to be allowed: to list, and on one object to read it and its tags, unless the
    /// point only refers to objects.
    pub fn try_needed(&self, versions: bool, mode: Mode) -> Result<()> {
        let (client, prefix, reader) = (self.client.clone(), self.prefix.clone(), self.reader.clone());
        self.wait(async move {
            let what = if versions { What::Versions } else { What::Objects };
            let first = client.first(what, &prefix).await?.filter(|first| !first.is_marker);
            let first = first.filter(|first| mode != Mode::Reference && !super::request::has_dots(&first.key));
            let Some(first) = first else { return Ok(()) };
            let which = Which { key: &first.key, version: first.version.as_deref() };
            let tried = async {
                client.head(which, None).await?;
                if reader.with_tags { reader.tags(which).await.map(drop) } else { Ok(()) }
            };
            match tried.await {
                // It is the drain's matter if it is gone, or if the service does not know tags.
                Err(error) if error.kind() != Kind::PermissionDenied && !error.is_temporary() => Ok(()),
                other => other,
            }
        })
    }

    /// Writes a small object of our own.
    fn put_ours(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let (client, key, body) = (self.client.clone(), self.whole_key(key.as_bytes()), Bytes::copy_from_slice(bytes));
        self.wait(async move { client.put(&key, &[], body).await.map(drop) })
    }

    fn get_ours(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let (client, key) = (self.client.clone(), self.whole_key(key.as_bytes()));
        let read = self.wait(async move { client.get(Which::newest(&key), None, None).await?.bytes().await });
        match read {
            Ok(bytes) => Ok(Some(bytes.to_vec())),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The restore that was begun here and not ended.
    pub fn restore_begun(&self) -> Result<Option<RestoreBegun>> {
        let Some(bytes) = self.get_ours(RESTORE_KEY)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (name, rest) = text.split_once('\n').unwrap_or((&text, ""));
        Ok(Some(RestoreBegun { name: name.to_owned(), is_made: rest == MADE }))
    }

    /// Notes that a restore has begun, so that it may go on after a crash.
    pub fn begin_restore(&self, begun: &RestoreBegun) -> Result<()> {
        let text = if begun.is_made { format!("{}\n{MADE}", begun.name) } else { begun.name.clone() };
        self.put_ours(RESTORE_KEY, text.as_bytes())
    }

    /// Removes what [`S3::begin_restore`] wrote.
    pub fn end_restore(&self) -> Result<()> {
        let (client, key) = (self.client.clone(), self.whole_key(RESTORE_KEY.as_bytes()));
        self.wait(async move { client.delete(Which::newest(&key)).await })
    }
}

fn is_ours(key: &[u8]) -> bool {
    key == STAMP_KEY.as_bytes() || key == RESTORE_KEY.as_bytes()
}

pub(in super::super) fn record(entry: Entry) -> Record {
    let Entry { version, modified, etag, size, class, .. } = entry;
    Record { size, modified, etag, version, class, ..Record::default() }
}

impl Place for S3 {
    fn list(&self, context: &Context, visit: &mut dyn FnMut(Vec<u8>, Record) -> Result<()>) -> Result<Skipped> {
        self.listing(What::Objects)?.run(context, &mut |_, entry| {
            let entry = listing::below_prefix(entry, &self.prefix)?;
            if is_ours(&entry.key) { Ok(()) } else { visit(entry.key.clone(), record(entry)) }
        })?;
        Ok(Skipped::default())
    }

    fn begin(&self, key: &[u8], record: &Record) -> Result<Waiting> {
        Ok(self.reader.begin(self.whole_key(key), record.clone()))
    }

    fn begin_facts(&self, key: &[u8], record: &Record) -> Option<WaitingFacts> {
        self.refreshes.then(|| self.reader.begin_facts(self.whole_key(key), record.clone()))
    }

    fn can_ask_for(&self, key: &[u8]) -> bool {
        !super::request::has_dots(key)
    }

    fn ahead_max(&self) -> usize {
        self.connections * 4
    }

    fn open(&self, key: &[u8]) -> Result<Option<Box<dyn Read + Send>>> {
        let (client, whole) = (self.client.clone(), self.whole_key(key));
        let answer = match self.wait(async move { client.head(Which::newest(&whole), None).await }) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        let size = answer.header("content-length").and_then(|length| length.parse().ok());
        let size = size.ok_or_else(|| Error::new(Kind::Corrupt, "the service tells no size of an object"))?;
        let record = Record { size, etag: answer.header("etag").map(str::to_owned), ..Record::default() };
        Ok(match self.begin(key, &record)?()? {
            Fetched::Found(content, _) => Some(Box::new(ContentReader(content))),
            Fetched::Gone => None,
        })
    }

    fn occupied(&self) -> Result<Option<String>> {
        let (client, prefix) = (self.client.clone(), self.prefix.clone());
        let page = match self.wait(async move { client.list(What::Objects, &prefix, None, &[]).await }) {
            // A bucket that is yet to be made.
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        for entry in page.entries {
            let entry = listing::below_prefix(entry, &self.prefix)?;
            if !is_ours(&entry.key) {
                return Ok(Some(format!("`{}` and what is beside it", crate::objects::keys::shown(&entry.key))));
            }
        }
        Ok(None)
    }

    fn read_stamp(&self) -> Result<Option<Vec<u8>>> {
        self.get_ours(STAMP_KEY)
    }

    fn write_stamp(&self, bytes: &[u8]) -> Result<()> {
        self.put_ours(STAMP_KEY, bytes)
    }
}
