//! Makes the empty stores of an environment: database and tables, bucket with versions, repository,
//! folders. What is there already stays.

use std::time::Duration;

use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use reqwest::Method;

use crate::settings::Settings;
use crate::stores::{self, git};
use crate::{Attempted, Result};

/// How long a request about a bucket may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(20);

/// Makes the application's own stores.
pub async fn create(settings: &Settings) -> Result<()> {
    create_database(&settings.postgres).await?;
    let client = stores::database(&settings.postgres).await?;
    client.batch_execute(stores::SCHEMA).await.attempted("make the tables")?;
    create_bucket(settings).await?;
    let folders = [settings.code.clone(), settings.config.clone(), stores::incoming(&settings.config)];
    for folder in folders {
        std::fs::create_dir_all(&folder).attempted(&format!("make {}", folder.display()))?;
    }
    git(&settings.code, &["init", "--quiet", "--bare", "."], "")?;
    Ok(())
}

/// Makes the empty targets of a restore: a bucket, and with `database` an empty database as well.
/// Everything else is made by the restore.
pub async fn create_targets(settings: &Settings, database: bool) -> Result<()> {
    if database {
        create_database(&settings.postgres).await?;
    }
    create_bucket(settings).await
}

async fn create_database(url: &str) -> Result<()> {
    let mut maintenance = url::Url::parse(url).attempted("understand the database's address")?;
    let name = maintenance.path().trim_start_matches('/').to_owned();
    maintenance.set_path("/postgres");
    let client = stores::database(maintenance.as_str()).await?;
    let there = client.query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&name]).await;
    if there.attempted("look for the database")?.is_some() {
        return Ok(());
    }
    let quoted = name.replace('"', "\"\"");
    client.batch_execute(&format!("CREATE DATABASE \"{quoted}\"")).await.attempted("create the database")
}

/// A bucket with versions: of the original they are what a cut reads, of a copy what lets it be replaced.
async fn create_bucket(settings: &Settings) -> Result<()> {
    let client = stores::bucket(&settings.s3)?;
    let status = ask(&client, &[], "").await?;
    // 409: it is there, and ours.
    if !(status.is_success() || status.as_u16() == 409) {
        return Err(format!("the bucket {} cannot be made: {status}", settings.s3.bucket));
    }
    let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    let status = ask(&client, &[("versioning", "")], body).await?;
    if !status.is_success() {
        return Err(format!("the bucket {} keeps no versions: {status}", settings.s3.bucket));
    }
    Ok(())
}

/// Sends a PUT about the bucket itself, which object clients do not offer.
async fn ask(client: &AmazonS3, query: &[(&str, &str)], body: &str) -> Result<reqwest::StatusCode> {
    let options = SignedUrlOptions::new().with_query(query.iter().copied());
    let url = client.signed_url_opts(Method::PUT, &Path::default(), Duration::from_secs(60), &options).await;
    let request = reqwest::Client::new().put(url.attempted("sign a request")?).body(body.to_owned());
    let answer = request.timeout(REQUEST_WITHIN).send().await.attempted("ask the object store")?;
    Ok(answer.status())
}
