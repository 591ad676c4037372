//! Looks into each store of a copy and reports what it holds, and what in it is not whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt};
use redis::Commands;

use super::changing::Changing;
use super::{Newest, Verdict, contiguous, version};
use crate::content::{Version, writer_of};
use crate::settings::Settings;
use crate::stores::{self, git};
use crate::{Attempted, Result};

/// Artifacts that are read at the same time.
const READS: usize = 8;

/// What refers, and what can be referred to.
#[derive(Debug, Default)]
pub struct Held {
    keys: BTreeSet<String>,
    commits: BTreeSet<String>,
    named_keys: Vec<(&'static str, String, String)>,
    named_commits: Vec<(&'static str, String, String)>,
}

impl Held {
    /// Follows every reference whose both ends are in the point.
    pub fn follow(&self, stores: &[&str], verdict: &mut Verdict) {
        let targets = [("artifacts", &self.named_keys, &self.keys), ("code", &self.named_commits, &self.commits)];
        for (store, named, held) in targets {
            if !stores.contains(&store) {
                continue;
            }
            for (from, owner, referent) in named {
                verdict.references += 1;
                if !held.contains(referent) {
                    verdict.violation(format!("{from}: {owner} names `{referent}`, which {store} does not hold"));
                }
            }
        }
    }
}

/// Every object is the artifact of a version, byte for byte, or one of those that change.
pub async fn artifacts(
    copy: &Settings,
    held: &mut Held,
    mut changing: Option<&mut Changing>,
    verdict: &mut Verdict,
) -> Result<Newest> {
    let client = stores::bucket(&copy.s3)?;
    let listed: Vec<_> = client.list(None).try_collect().await.attempted("list the objects")?;
    // Stamps and the like begin with a dot, and are not ours.
    let listed = listed.into_iter().filter(|object| !object.location.as_ref().starts_with('.'));
    let reads = listed.map(|object| {
        let client = &client;
        async move {
            let bytes = client.get(&object.location).await.attempted("read an object")?.bytes().await;
            Ok::<_, String>((object.location.to_string(), bytes.attempted("read an object")?))
        }
    });
    let read: Vec<_> = futures::stream::iter(reads).buffer_unordered(READS).try_collect().await?;
    let mut versions = Vec::new();
    for (key, bytes) in read {
        if changing.as_mut().is_some_and(|changing| changing.take(&key, &bytes, verdict)) {
            continue;
        }
        let found = version_of_key(&key).filter(|version| version.artifact_key() == key);
        match found {
            Some(version) if version.artifact() == bytes => versions.push(version),
            Some(version) => {
                verdict.violation(format!("artifacts: `{key}` holds {} bytes that are not its own", bytes.len()));
                versions.push(version);
            }
            None => verdict.violation(format!("artifacts: `{key}` is no artifact of ours")),
        }
        held.keys.insert(key);
    }
    Ok(contiguous("artifacts", versions, verdict))
}

fn version_of_key(key: &str) -> Option<Version> {
    let mut parts = key.strip_prefix("models/")?.split('/');
    let (model, file) = (parts.next()?, parts.next()?);
    version(model, file.split('-').next()?.parse().ok()?)
}

/// Every branch holds one commit a version, with its training code.
pub fn code(copy: &Settings, held: &mut Held, verdict: &mut Verdict) -> Result<Newest> {
    git(&copy.code, &["fsck", "--connectivity-only", "--no-dangling"], "")?;
    let branches = git(&copy.code, &["for-each-ref", "--format=%(refname:short)", "refs/heads"], "")?;
    let mut versions = Vec::new();
    for model in branches.lines() {
        let Some(writer) = writer_of(model) else {
            verdict.violation(format!("code: the branch `{model}` is none of ours"));
            continue;
        };
        let log = git(&copy.code, &["log", "--reverse", "--format=%H %s", &stores::branch(model)], "")?;
        for (number, line) in (1_u64..).zip(log.lines()) {
            let version = Version { writer, number };
            let (commit, subject) = line.split_once(' ').unwrap_or_default();
            if subject != version.commit_subject() {
                verdict.violation(format!("code: commit {number} of {model} says `{subject}`"));
            }
            held.commits.insert(commit.to_owned());
            versions.push(version);
        }
        if let Some(newest) = versions.last().filter(|version| version.writer == writer) {
            let training = git(&copy.code, &["show", &format!("{}:train.toml", stores::branch(model))], "")?;
            if training != newest.training().trim() {
                verdict.violation(format!("code: {model} version {} has other training code", newest.number));
            }
        }
    }
    Ok(contiguous("code", versions, verdict))
}

/// Every row is right in itself, has its event, and is counted.
pub async fn meta(copy: &Settings, held: &mut Held, verdict: &mut Verdict) -> Result<Newest> {
    let client = stores::database(&copy.postgres).await?;
    let rows = "SELECT m.name, m.version, m.artifact_key, m.commit_id, m.sha256, m.metrics::text, count(e.id) \
                FROM models m LEFT JOIN events e ON e.model = m.id GROUP BY m.id";
    let mut versions = Vec::new();
    for row in client.query(rows, &[]).await.attempted("read the rows")? {
        let (name, number): (String, i64) = (row.get(0), row.get(1));
        let (key, commit, hash, metrics): (String, String, String, String) =
            (row.get(2), row.get(3), row.get(4), row.get(5));
        let owner = format!("the row {name} version {number}");
        let Some(version) = version(&name, number.unsigned_abs()) else {
            verdict.violation(format!("meta: {owner} is none of ours"));
            continue;
        };
        let metrics: serde_json::Value = serde_json::from_str(&metrics).attempted("read the metrics")?;
        if key != version.artifact_key() || hash != version.sha256() || metrics != version.metrics() {
            verdict.violation(format!("meta: {owner} is not what was written"));
        }
        if row.get::<_, i64>(6) != 1 {
            verdict.violation(format!("meta: {owner} has {} events", row.get::<_, i64>(6)));
        }
        held.named_keys.push(("meta", owner.clone(), key));
        held.named_commits.push(("meta", owner, commit));
        versions.push(version);
    }
    let newest = contiguous("meta", versions, verdict);
    let counters = client.query("SELECT name, published FROM counters", &[]).await.attempted("read the counters")?;
    let counted: BTreeMap<String, i64> = counters.iter().map(|row| (row.get(0), row.get(1))).collect();
    for (writer, number) in &newest {
        let name = crate::content::model(*writer);
        let counter = counted.get(&name).copied().unwrap_or(0);
        if counter != number.cast_signed() {
            verdict.violation(format!("meta: the counter of {name} says {counter}, the rows {number}"));
        }
    }
    Ok(newest)
}

/// The three keys of a model agree with each other.
pub fn cache(copy: &Settings, held: &mut Held, verdict: &mut Verdict) -> Result<Newest> {
    let mut connection = stores::cache(&copy.redis)?;
    let what = "read the cache";
    let published: Vec<String> = connection.keys("published:*").attempted(what)?;
    let mut newest = Newest::new();
    for counter in published {
        let name = counter.trim_start_matches("published:");
        let number: u64 = connection.get(&counter).attempted(what)?;
        let Some(version) = version(name, number) else {
            verdict.violation(format!("cache: `{counter}` is none of ours"));
            continue;
        };
        let latest: Option<String> = connection.get(format!("model:{name}:latest")).attempted(what)?;
        let fields: BTreeMap<String, String> = connection.hgetall(format!("model:{name}")).attempted(what)?;
        let says = fields.get("version").and_then(|text| text.parse::<u64>().ok());
        if latest.as_deref() != Some(&version.artifact_key()) || says != Some(number) {
            verdict.violation(format!("cache: {name} is torn: counter {number}, hash {says:?}, latest {latest:?}"));
        }
        let owner = |key: &str| format!("the key {key}");
        held.named_keys.extend(latest.map(|key| ("cache", owner(&format!("model:{name}:latest")), key)));
        let commit = fields.get("commit").cloned();
        held.named_commits.extend(commit.map(|commit| ("cache", owner(&format!("model:{name}")), commit)));
        newest.insert(version.writer, number);
    }
    Ok(newest)
}

/// Every file names its own version, whole.
pub fn config(copy: &Settings, held: &mut Held, verdict: &mut Verdict) -> Result<Newest> {
    let mut versions = Vec::new();
    for (model, folder) in entries(&copy.config)? {
        // Stamps and the like begin with a dot, and are not ours.
        let Some(writer) = writer_of(&model) else { continue };
        for (file, path) in entries(&folder)? {
            let number = file.strip_suffix(".json").and_then(|number| number.parse().ok());
            let Some(number) = number else {
                verdict.violation(format!("config: `{model}/{file}` is none of ours"));
                continue;
            };
            let text = std::fs::read_to_string(&path).attempted("read the serving configuration")?;
            let content: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let version = Version { writer, number };
            let key = content["artifact"].as_str().unwrap_or_default().to_owned();
            if content["version"] != number || key != version.artifact_key() {
                verdict.violation(format!("config: `{model}/{file}` is not what was written"));
            }
            let owner = format!("the file {model}/{file}");
            let commit = content["commit"].as_str().unwrap_or_default().to_owned();
            held.named_keys.push(("config", owner.clone(), key));
            held.named_commits.push(("config", owner, commit));
            versions.push(version);
        }
    }
    Ok(contiguous("config", versions, verdict))
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let what = format!("read the folder {}", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).attempted(&what)? {
        let entry = entry.attempted(&what)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(found)
}
