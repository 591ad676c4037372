//! What a service can really do, found by trying it on small objects that are taken away again.
//!
//! Clones of S3 differ: some refuse conditions, some ignore them silently, which is worse. Only
//! for the makers' own services their documentation is believed. What was found is written down in
//! the bucket, because the races cost some fifty requests: once for a service, not once a run.

use std::collections::BTreeSet;
use std::time::Duration;

use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload, PutResult, UpdateVersion};
use reqwest::{Client as HttpClient, Method};
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

use super::connect::Service;
use super::{Client, Depot, DepotCapability, ObjectDepot, WriteMode, bridge};

/// How many writers race for one name, and how often: a service that looks first and writes then
/// may be lucky once.
const RACERS: usize = 8;
const ROUNDS: usize = 3;
/// How long all trials together may take.
const TRIAL_DEADLINE: Duration = Duration::from_secs(60);

/// Where it is written down in the bucket; not listed.
pub(super) const RECORD: &str = "capability.json";

/// The addresses at which the bucket stood every trial of conditional writes. What failed one is not
/// written down: it may have been bad luck, and the next run tries again.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    conditional_writes: BTreeSet<String>,
}

impl Record {
    /// What earlier runs wrote down. What cannot be read counts as nothing.
    fn load(depot: &ObjectDepot) -> Self {
        match depot.read(RECORD) {
            Ok((bytes, _)) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == Kind::NotFound => Self::default(),
            Err(error) => {
                tracing::warn!(%error, "what is known of the bucket cannot be read; it is tried again");
                Self::default()
            }
        }
    }

    /// Writes it down. If that fails, the next run tries the service again.
    fn keep(&self, depot: &ObjectDepot) {
        let kept = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal("a record is no JSON").source(error))
            .and_then(|json| depot.write(RECORD, &[&json], &WriteMode::Replace));
        if let Err(error) = kept {
            tracing::warn!(%error, "what is known of the bucket cannot be written down");
        }
    }
}

/// What the service can do, from the bucket's record or by trying it. What could not be tried
/// counts as absent, which is the safe side.
pub(super) fn capability(depot: &ObjectDepot) -> DepotCapability {
    let client = depot.client.clone();
    let settings = bridge::run(TRIAL_DEADLINE, async move { Ok(settings(&client).await) });
    let settings = settings.unwrap_or_else(|error: Error| {
        tracing::warn!(%error, "the bucket's settings could not be asked for");
        DepotCapability::default()
    });
    if depot.client.well_known {
        return DepotCapability { conditional_create: true, conditional_update: true, ..settings };
    }
    let mut record = Record::load(depot);
    let is_known = record.conditional_writes.contains(&depot.location());
    // The name of a service says little: behind the same one may be another by now, above all after
    // a disaster. So even a known one shows once a process that it refuses, without the races.
    let Some((conditional_create, conditional_update)) = tried(depot, if is_known { 0 } else { ROUNDS }) else {
        return settings;
    };
    if conditional_create && conditional_update && !is_known {
        record.conditional_writes.insert(depot.location());
        record.keep(depot);
    }
    DepotCapability { conditional_create, conditional_update, ..settings }
}

/// Whether creations and updates are conditional, found by trying with so many rounds of races;
/// `None` if that failed.
fn tried(depot: &ObjectDepot, rounds: usize) -> Option<(bool, bool)> {
    let client = depot.client.clone();
    let google = depot.address.service == Service::Google;
    let path = |_| super::super::probe::random_name().and_then(|name| depot.path(&name));
    // One name for writers one after the other, and one for each race.
    let paths: Result<Vec<Path>> = (0..=rounds).map(path).collect();
    let paths = match paths {
        Ok(paths) => paths,
        Err(error) => {
            tracing::warn!(%error, "the bucket's abilities could not be tried");
            return None;
        }
    };
    let tried = bridge::run(TRIAL_DEADLINE, async move {
        let mut versions = Vec::new();
        let tried = try_and_race(&client, &paths[0], &paths[1..], google, &mut versions).await;
        take_away(&client, &versions, &paths).await;
        tried
    });
    match tried {
        Ok(abilities) => Some(abilities),
        Err(error) => {
            tracing::warn!(%error, "the bucket's abilities could not be tried; it is used without conditional writes");
            None
        }
    }
}

type Written = Vec<(Path, Option<String>)>;

async fn put(
    client: &Client,
    path: &Path,
    text: &str,
    mode: PutMode,
    versions: &mut Written,
) -> Result<Option<PutResult>> {
    let options = PutOptions { mode, ..PutOptions::default() };
    match client.store.put_opts(path, PutPayload::from(text.to_owned()), options).await {
        Ok(result) => {
            versions.push((path.clone(), result.version.clone()));
            Ok(Some(result))
        }
        Err(error) => {
            let error = super::classify("cannot write a trial object", error);
            match error.kind() {
                Kind::AlreadyExists | Kind::Conflict | Kind::Unsupported => Ok(None),
                _ => Err(error),
            }
        }
    }
}

/// First one after the other, then at once. A service that fails one race is not believed in
/// anything: it looks first and writes then.
async fn try_and_race(
    client: &Client,
    single: &Path,
    raced: &[Path],
    google: bool,
    versions: &mut Written,
) -> Result<(bool, bool)> {
    let (create, update) = trial(client, single, google, versions).await?;
    for raced in raced {
        if create && !race(client, raced, PutMode::Create, versions).await? {
            return Ok((false, false));
        }
        if update {
            let base = put(client, raced, "base", PutMode::Overwrite, versions).await?;
            let Some(base) = base else { return Ok((create, false)) };
            if !race(client, raced, PutMode::Update(known(&base, google)), versions).await? {
                return Ok((false, false));
            }
        }
    }
    Ok((create, update))
}

fn known(written: &PutResult, google: bool) -> UpdateVersion {
    UpdateVersion {
        e_tag: written.e_tag.clone().filter(|_| !google),
        version: written.version.clone().filter(|_| google),
    }
}

/// One writer after the other: is a taken name refused, is an outdated update refused?
async fn trial(client: &Client, path: &Path, google: bool, versions: &mut Written) -> Result<(bool, bool)> {
    let first = put(client, path, "1", PutMode::Create, versions).await?;
    let again = put(client, path, "2", PutMode::Create, versions).await?;
    let create = first.is_some() && again.is_none();
    let Some(base) = put(client, path, "3", PutMode::Overwrite, versions).await? else { return Ok((create, false)) };
    let right = put(client, path, "4", PutMode::Update(known(&base, google)), versions).await?;
    let outdated = put(client, path, "5", PutMode::Update(known(&base, google)), versions).await?;
    Ok((create, right.is_some() && outdated.is_none()))
}

/// Many writers at once: does exactly one win?
async fn race(client: &Client, path: &Path, mode: PutMode, versions: &mut Written) -> Result<bool> {
    let racers = (0..RACERS).map(|racer| {
        let mode = mode.clone();
        async move {
            let mut written = Written::new();
            let result = put(client, path, &racer.to_string(), mode, &mut written).await;
            (result, written)
        }
    });
    let mut winners = 0;
    for (result, written) in futures::future::join_all(racers).await {
        versions.extend(written);
        winners += usize::from(result?.is_some());
    }
    Ok(winners == 1)
}

/// Removes the trial objects. Where versions are kept, each one is removed by its id, because a
/// plain deletion would only add a marker.
async fn take_away(client: &Client, versions: &Written, paths: &[Path]) {
    let mut plain: Vec<&Path> = Vec::new();
    for (path, version) in versions {
        match (&client.s3, version) {
            (Some(_), Some(id)) => {
                if let Err(error) = signed(client, Method::DELETE, path, &[("versionId", id)]).await {
                    tracing::warn!(%error, object = %path, "a trial object stays in the bucket");
                }
            }
            _ => plain.push(path),
        }
    }
    for path in paths.iter().filter(|path| plain.contains(path)) {
        match client.store.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, object = %path, "a trial object stays in the bucket"),
        }
    }
}

/// What S3 says of the bucket itself. Without the privilege to ask, the answer is no.
async fn settings(client: &Client) -> DepotCapability {
    let asks = |question: &'static str, yes: &'static str| async move {
        match signed(client, Method::GET, &Path::default(), &[(question, "")]).await {
            Ok(answer) => answer.contains(yes),
            Err(error) => {
                tracing::debug!(%error, question, "the bucket does not tell");
                false
            }
        }
    };
    let (versioning, object_lock) = futures::join!(
        asks("versioning", "<Status>Enabled</Status>"),
        asks("object-lock", "<ObjectLockEnabled>Enabled</ObjectLockEnabled>")
    );
    DepotCapability { versioning, object_lock, ..DepotCapability::default() }
}

/// Sends a signed request that the common trait has no word for, and returns the body.
async fn signed(client: &Client, method: Method, path: &Path, query: &[(&str, &str)]) -> Result<String> {
    let s3 = client.s3.as_ref().ok_or_else(|| Error::new(Kind::Unsupported, "this is not S3"))?;
    let options = SignedUrlOptions::new().with_query(query.iter().map(|(key, value)| (*key, *value)));
    let url = s3.signed_url_opts(method.clone(), path, Duration::from_secs(300), &options).await;
    let url = url.map_err(|error| super::classify("cannot sign a request", error))?;
    // The address holds the signature, so it must not get into an error.
    let unreachable = |error: reqwest::Error| {
        Error::new(Kind::Unreachable, "the service cannot be asked").temporary().source(error.without_url())
    };
    let response = HttpClient::new().request(method, url).send().await.map_err(unreachable)?;
    if !response.status().is_success() {
        return Err(Error::new(Kind::Unsupported, format!("the service answers with status {}", response.status())));
    }
    response.text().await.map_err(unreachable)
}
