//! `init`: looks around, writes a `platform.yaml` to be reviewed, and creates the bucket.
//!
//! Never overwrites anything. What is interrupted is finished by running it again: a file, key or
//! repository that is there is used as it is.

mod address;
mod look;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use stillpoint_core::Result;
use stillpoint_core::error::{Error, IoContext, Kind};
use stillpoint_core::id::{EnvironmentName, PlatformName};
use stillpoint_core::platform::Secret;
use stillpoint_repo::depot::{self, Depot, DepotCapability, WriteMode};
use stillpoint_repo::{InitOptions, Repository, Unlock};

use super::key;
use super::show::restic_location;
use crate::config::{self, Config};
use crate::open::{self, repository_depot};

pub use look::{Found, Seen, Surroundings};

/// The key file that is made when nothing else is asked for.
pub const KEY_FILE: &str = "stillpoint.key";

/// What `init` is asked to do.
#[derive(Debug, Clone, Default)]
pub struct InitRequest {
    /// The configuration file to write, or to use if it is there.
    pub file: PathBuf,
    /// Where to look for stores, and addresses of servers and buckets; the file's folder if empty.
    pub paths: Vec<PathBuf>,
    /// The bucket's address; a folder beside the file if `None`.
    pub bucket: Option<String>,
    /// The platform's name; that of the file's folder if `None`.
    pub platform: Option<PlatformName>,
    /// The environment's name; `production` if `None`.
    pub environment: Option<EnvironmentName>,
    /// What unlocks the repository; a generated key file if `None`.
    pub key: Option<Secret>,
}

/// What `init` did.
#[derive(Debug, Serialize)]
pub struct InitReport {
    /// The configuration file.
    pub file: PathBuf,
    /// Whether it was written now.
    pub wrote_file: bool,
    /// The platform.
    pub platform: PlatformName,
    /// The environment.
    pub environment: EnvironmentName,
    /// Where the bucket is.
    pub bucket: String,
    /// Whether the repository was created now.
    pub created_repository: bool,
    /// The repository's id, hex.
    pub repository: String,
    /// What the bucket was found to be able to do.
    pub capability: DepotCapability,
    /// The key file, if one was generated now.
    pub key_file: Option<PathBuf>,
    /// Where the key stands once more, to be printed and locked away.
    pub recovery_sheet: Option<PathBuf>,
    /// What was seen, if the file was written now.
    pub surroundings: Option<Surroundings>,
    /// Where restic finds the repository.
    pub restic_repository: String,
}

/// Carries out `init`.
///
/// # Errors
/// `Config` if nothing was found that could be protected or the file that is there is mistaken;
/// `Unauthenticated` if the bucket holds a repository that the key does not open.
pub fn run(request: &InitRequest) -> Result<InitReport> {
    let surroundings = if request.file.exists() { None } else { Some(write_file(request)?) };
    let config = config::load(&request.file)?;
    let bucket = open::bucket(&config)?;
    let key_file = make_key(&config, &bucket)?;
    let unlock = open::unlock(&config)?;
    let created = match Repository::open(repository_depot(&bucket), &unlock) {
        Ok(repository) => Created { repository, capability: bucket.capability(), new: false },
        Err(error) if error.kind() == Kind::NotFound => create_bucket(&bucket, &unlock, &InitOptions::default())?,
        Err(error) if error.kind() == Kind::Unauthenticated => {
            return Err(Error::new(Kind::Unauthenticated, "the bucket holds a repository that this key does not open")
                .context("bucket", bucket.location())
                .hint("name its key under `bucket.key`, or choose another bucket: nothing there is overwritten")
                .source(error));
        }
        Err(error) => return Err(error),
    };
    let recovery_sheet = match (&key_file, &unlock) {
        (Some(file), Unlock::KeyFile(key)) => Some(key::write_sheet(&config, &created.repository, key, file)?),
        _ => None,
    };
    Ok(InitReport {
        wrote_file: surroundings.is_some(),
        platform: config.platform.platform.clone(),
        environment: config.platform.environment.clone(),
        bucket: bucket.location(),
        created_repository: created.new,
        repository: created.repository.id().to_owned(),
        capability: created.capability,
        key_file,
        recovery_sheet,
        surroundings,
        restic_repository: restic_location(&config),
        file: config.path,
    })
}

/// Looks around and writes the configuration file. Says what was seen.
fn write_file(request: &InitRequest) -> Result<Surroundings> {
    let file = std::path::absolute(&request.file).or_io(|| format!("cannot resolve `{}`", request.file.display()))?;
    let folder = file.parent().unwrap_or(Path::new("/")).to_owned();
    let bucket = match &request.bucket {
        Some(url) if url.contains("://") => url.clone(),
        Some(path) => std::path::absolute(path).or_io(|| format!("cannot resolve `{path}`"))?.display().to_string(),
        None => folder.join("stillpoint-bucket").display().to_string(),
    };
    let paths = if request.paths.is_empty() { vec![folder.clone()] } else { request.paths.clone() };
    let leave_out = bucket.strip_prefix("file://").unwrap_or(&bucket);
    let surroundings = look::around(&paths, !request.paths.is_empty(), Path::new(leave_out))?;
    if surroundings.stores.is_empty() {
        let shown: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::new(Kind::Config, format!("nothing to protect was found in {}", shown.join(", "))).hint(
            "name folders, databases or repositories: stillpoint init /srv/app.db postgresql://USER@HOST/DATABASE",
        ));
    }
    let platform = match &request.platform {
        Some(name) => name.clone(),
        None => PlatformName::new(look::label(&folder.file_name().unwrap_or_default().to_string_lossy(), "platform"))?,
    };
    let environment = match &request.environment {
        Some(name) => name.clone(),
        None => EnvironmentName::new("production")?,
    };
    let key = request.key.clone().unwrap_or_else(|| Secret(format!("file:{KEY_FILE}")));
    let beside = request.bucket.is_none();
    let text = write::platform_yaml(&write::Facts {
        platform: &platform,
        environment: &environment,
        bucket: &bucket,
        bucket_is_beside: beside,
        key: &key,
        surroundings: &surroundings,
    });
    // What is written must be readable; a mistake here is ours.
    config::parse(&text, &file)
        .map_err(|error| Error::internal("the configuration that init wrote is mistaken").source(error))?;
    let mut options = std::fs::OpenOptions::new();
    let mut target = options.write(true).create_new(true).open(&file).map_err(|error| {
        Error::io(format!("cannot create `{}`", file.display()), error).hint("choose another place with --config FILE")
    })?;
    std::io::Write::write_all(&mut target, text.as_bytes())
        .and_then(|()| target.sync_all())
        .or_io(|| format!("cannot write `{}`", file.display()))?;
    Ok(surroundings)
}

/// Generates the key file that the configuration names, if it is absent and nothing was ever
/// encrypted with it.
fn make_key(config: &Config, bucket: &Arc<dyn Depot>) -> Result<Option<PathBuf>> {
    let path = config.platform.bucket.key.as_ref().and_then(|secret| config.secrets.file_path(secret));
    let Some(key_file) = path.filter(|path| !path.exists()) else { return Ok(None) };
    if repository_depot(bucket).stat("config")?.is_some() {
        return Err(Error::new(Kind::Unauthenticated, format!("the key file `{}` does not exist", key_file.display()))
            .context("bucket", bucket.location())
            .hint(
                "the bucket holds a repository already: put its key file there, or type it from the recovery sheet",
            ));
    }
    key::generate(&key_file)?;
    Ok(Some(key_file))
}

/// A bucket that is ready for points.
pub struct Created {
    /// Its repository.
    pub repository: Repository,
    /// What the bucket was found to be able to do.
    pub capability: DepotCapability,
    /// Whether the repository is new.
    pub new: bool,
}

/// Probes an empty bucket, explains it to whoever finds it, and creates the repository.
pub fn create_bucket(bucket: &Arc<dyn Depot>, unlock: &Unlock, options: &InitOptions) -> Result<Created> {
    let capability = depot::probe(bucket.as_ref()).map_err(|error| match error.kind() {
        Kind::PermissionDenied => error.hint("this user must be able to list, read, write and delete in the bucket"),
        _ => error,
    })?;
    match bucket.write("README.txt", &[write::readme().as_bytes()], &WriteMode::Create) {
        Ok(_) => {}
        // From an earlier init that did not come to its end, or the user's own: it stays.
        Err(error) if error.kind() == Kind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let repository = Repository::init(repository_depot(bucket), unlock, options)?;
    Ok(Created { repository, capability, new: true })
}
