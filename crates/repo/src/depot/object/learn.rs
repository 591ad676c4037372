//! What a service can really do, found by trying it on small objects that are taken away again.
//!
//! Clones of S3 differ: some refuse conditions, some ignore them silently, which is worse. Only
//! for the makers' own services their documentation is believed.

use std::time::Duration;

use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload, PutResult, UpdateVersion};
use reqwest::{Client as HttpClient, Method};
use stillpoint_core::error::{Error, Kind, Result};

use super::connect::Service;
use super::{Client, DepotCapability, ObjectDepot, bridge};

/// How many writers race for one name, and how often: a service that looks first and writes then
/// may be lucky once.
const RACERS: usize = 8;
const ROUNDS: usize = 3;
/// How long all trials together may take.
const TRIAL_DEADLINE: Duration = Duration::from_secs(60);

/// Tries the service. What could not be tried counts as absent, which is the safe side.
pub(super) fn capability(depot: &ObjectDepot) -> DepotCapability {
    let client = depot.client.clone();
    let google = depot.address.service == Service::Google;
    let path = |_| super::super::probe::random_name().and_then(|name| depot.path(&name));
    // One name for writers one after the other, and one for each race.
    let paths: Result<Vec<Path>> = (0..=ROUNDS).map(path).collect();
    let paths = match paths {
        Ok(paths) => paths,
        Err(error) => {
            tracing::warn!(%error, "the bucket's abilities could not be tried");
            return DepotCapability::default();
        }
    };
    let tried = bridge::run(TRIAL_DEADLINE, async move {
        let mut capability = settings(&client).await;
        if client.well_known {
            capability.conditional_create = true;
            capability.conditional_update = true;
            return Ok(capability);
        }
        let mut versions = Vec::new();
        let tried = try_and_race(&client, &paths[0], &paths[1..], google, &mut versions).await;
        take_away(&client, &versions, &paths).await;
        (capability.conditional_create, capability.conditional_update) = tried?;
        Ok(capability)
    });
    tried.unwrap_or_else(|error: Error| {
        tracing::warn!(%error, "the bucket's abilities could not be tried; it is used without conditional writes");
        DepotCapability::default()
    })
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
    DepotCapability {
        versioning: asks("versioning", "<Status>Enabled</Status>").await,
        object_lock: asks("object-lock", "<ObjectLockEnabled>Enabled</ObjectLockEnabled>").await,
        ..DepotCapability::default()
    }
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
