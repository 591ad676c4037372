//! The five stores, each through its own client. Every step of a publication may be repeated: it
//! sets what it sets, and finds out what an interrupted try has done already.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, UpdateVersion};
use tokio_postgres::NoTls;

use crate::content::Version;
use crate::settings::{Bucket, Settings};
use crate::{Attempted, Result};

/// Holds writers back by SQL: waits until no publication is on its way, and lets none begin. A lock
/// that readers do not feel: whoever copies the database meanwhile is not in its way.
pub const HOLD: &str = "DO $$ BEGIN LOCK TABLE writing IN EXCLUSIVE MODE; UPDATE writing SET held = true; END $$";
/// Lets writers go on.
pub const LET_GO: &str = "UPDATE writing SET held = false";

/// How often a writer that is held back looks again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// How long one step may take before it counts as failed and is tried again.
pub const STEP_WITHIN: Duration = Duration::from_secs(5);

/// The tables.
pub const SCHEMA: &str = "\
CREATE TABLE IF NOT EXISTS models (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text NOT NULL, version bigint NOT NULL,
  artifact_key text NOT NULL, commit_id text NOT NULL, sha256 text NOT NULL,
  metrics jsonb NOT NULL, published_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (name, version));
CREATE TABLE IF NOT EXISTS events (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  model bigint NOT NULL REFERENCES models (id), kind text NOT NULL,
  payload jsonb NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS counters (name text PRIMARY KEY, published bigint NOT NULL);
CREATE TABLE IF NOT EXISTS writing (held boolean NOT NULL);
INSERT INTO writing SELECT false WHERE NOT EXISTS (SELECT FROM writing);
";

/// Connections to all stores, held by one writer or reader.
pub struct Stores {
    /// The database.
    pub meta: tokio_postgres::Client,
    /// The cache.
    pub cache: redis::Connection,
    /// The bucket of artifacts.
    pub artifacts: AmazonS3,
    /// The repository of code.
    pub code: PathBuf,
    /// The folder of serving configuration.
    pub config: PathBuf,
    /// Whether objects are also overwritten and deleted.
    overwrites: bool,
    /// A second session of the database, where publications ask before they begin.
    keeper: Option<tokio_postgres::Client>,
}

impl Stores {
    /// Connects to all of them.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        Ok(Self {
            meta: database(&settings.postgres).await?,
            cache: cache(&settings.redis)?,
            artifacts: bucket(&settings.s3)?,
            code: settings.code.clone(),
            config: settings.config.clone(),
            overwrites: settings.overwrites,
            keeper: if settings.ask_database { Some(database(&settings.postgres).await?) } else { None },
        })
    }

    /// Waits until the database lets publications begin, and keeps it so until
    /// [`tell_database`](Self::tell_database).
    async fn ask_database(&self) -> Result<()> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        loop {
            keeper.batch_execute("BEGIN; LOCK TABLE writing IN ROW SHARE MODE").await.attempted("ask the database")?;
            let row = keeper.query_one("SELECT held FROM writing", &[]).await.attempted("ask the database")?;
            if !row.get::<_, bool>(0) {
                return Ok(());
            }
            keeper.batch_execute("ROLLBACK").await.attempted("ask the database")?;
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        }
    }

    /// The publication has ended; a pause need not wait for it any more.
    async fn tell_database(&self) -> Result<()> {
        match &self.keeper {
            Some(keeper) => keeper.batch_execute("COMMIT").await.attempted("tell the database"),
            None => Ok(()),
        }
    }

    /// Publishes one version: all five stores, one after the other.
    pub async fn publish(&mut self, version: Version) -> Result<()> {
        self.ask_database().await?;
        self.write_objects(version).await?;
        let commit = commit(&self.code, version)?;
        in_time("write the rows", self.write_rows(version, &commit)).await?;
        self.point_cache(version, &commit)?;
        write_config(&self.config, version, &commit)?;
        self.tell_database().await
    }

    /// The artifact; where objects are overwritten also a checkpoint before it, and after it `latest` and
    /// the end of the oldest checkpoint.
    async fn write_objects(&self, version: Version) -> Result<()> {
        if self.overwrites {
            self.put(version.checkpoint_key(), version.checkpoint()).await?;
        }
        self.put(version.artifact_key(), version.artifact()).await?;
        if self.overwrites {
            in_time("overwrite the latest", self.overwrite_latest(version)).await?;
        }
        match version.outdated().filter(|_| self.overwrites) {
            Some(old) => {
                let path = object_store::path::Path::from(old.checkpoint_key());
                let delete = self.artifacts.delete(&path);
                in_time("delete a checkpoint", async { delete.await.attempted("delete a checkpoint") }).await
            }
            None => Ok(()),
        }
    }

    async fn put(&self, key: String, content: Vec<u8>) -> Result<()> {
        let (path, what) = (object_store::path::Path::from(key.as_str()), format!("put `{key}`"));
        let put = self.artifacts.put(&path, PutPayload::from(content));
        in_time(&what, async { put.await.map(drop).attempted(&what) }).await
    }

    /// Replaces what was read, and nothing else: a request whose answer was lost must not come after
    /// the next publication.
    async fn overwrite_latest(&self, version: Version) -> Result<()> {
        let (path, what) = (object_store::path::Path::from(version.latest_key()), "overwrite the latest");
        let mode = match self.artifacts.get(&path).await {
            Ok(there) => {
                let seen = UpdateVersion { e_tag: there.meta.e_tag.clone(), version: None };
                if there.bytes().await.attempted(what)? == version.latest() {
                    return Ok(());
                }
                PutMode::Update(seen)
            }
            Err(object_store::Error::NotFound { .. }) => PutMode::Create,
            Err(error) => return Err(error).attempted(what),
        };
        let put = self.artifacts.put_opts(&path, PutPayload::from(version.latest()), mode.into());
        put.await.map(drop).attempted(what)
    }

    async fn write_rows(&mut self, version: Version, commit: &str) -> Result<()> {
        let (name, number) = (version.model(), version.number.cast_signed());
        let transaction = self.meta.transaction().await.attempted("begin a transaction")?;
        let insert = "INSERT INTO models (name, version, artifact_key, commit_id, sha256, metrics) \
                      VALUES ($1, $2, $3, $4, $5, $6::text::jsonb) ON CONFLICT (name, version) DO NOTHING RETURNING id";
        let (key, hash, metrics) = (version.artifact_key(), version.sha256(), version.metrics().to_string());
        let inserted = transaction
            .query_opt(insert, &[&name, &number, &key, &commit, &hash, &metrics])
            .await
            .attempted("insert")?;
        // What an earlier try has written is there with everything that belongs to it.
        if let Some(row) = inserted {
            let id: i64 = row.get(0);
            let event = "INSERT INTO events (model, kind, payload) VALUES ($1, 'published', $2::text::jsonb)";
            transaction.execute(event, &[&id, &metrics]).await.attempted("insert the event")?;
            let count = "INSERT INTO counters VALUES ($1, 1) \
                         ON CONFLICT (name) DO UPDATE SET published = counters.published + 1";
            transaction.execute(count, &[&name]).await.attempted("count")?;
        }
        transaction.commit().await.attempted("commit")
    }

    fn point_cache(&mut self, version: Version, commit: &str) -> Result<()> {
        let name = version.model();
        let mut pipe = redis::pipe();
        pipe.atomic()
            .cmd("SET")
            .arg(format!("model:{name}:latest"))
            .arg(version.artifact_key())
            .ignore()
            .cmd("HSET")
            .arg(format!("model:{name}"))
            .arg(&["version", &version.number.to_string(), "commit", commit])
            .ignore()
            .cmd("SET")
            .arg(format!("published:{name}"))
            .arg(version.number)
            .ignore();
        pipe.query::<()>(&mut self.cache).attempted("point the cache at it")
    }
}

/// Runs one step, but not for ever.
pub async fn in_time<T>(what: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(STEP_WITHIN, step).await {
        Ok(done) => done,
        Err(_) => Err(format!("cannot {what} within {} s", STEP_WITHIN.as_secs())),
    }
}

/// Connects to the database.
pub async fn database(url: &str) -> Result<tokio_postgres::Client> {
    in_time("connect to the database", async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.attempted("connect to the database")?;
        // It ends with the client; what goes wrong on it, the client's next call says.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    })
    .await
}

/// Connects to the cache.
pub fn cache(url: &str) -> Result<redis::Connection> {
    let client = redis::Client::open(url).attempted("understand the cache's address")?;
    let connection = client.get_connection_with_timeout(STEP_WITHIN).attempted("connect to the cache")?;
    connection.set_read_timeout(Some(STEP_WITHIN)).attempted("set the cache's time-out")?;
    connection.set_write_timeout(Some(STEP_WITHIN)).attempted("set the cache's time-out")?;
    Ok(connection)
}

/// A client of the bucket; connects at its first request.
pub fn bucket(bucket: &Bucket) -> Result<AmazonS3> {
    // As good if another part of the program was faster.
    drop(rustls::crypto::ring::default_provider().install_default());
    let retry = object_store::RetryConfig { max_retries: 0, ..Default::default() };
    AmazonS3Builder::new()
        .with_bucket_name(&bucket.bucket)
        .with_endpoint(&bucket.endpoint)
        .with_region("us-east-1")
        .with_allow_http(true)
        .with_access_key_id(&bucket.access_key_id)
        .with_secret_access_key(&bucket.secret_access_key)
        .with_retry(retry)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .build()
        .attempted("make a client of the bucket")
}

/// The branch of a model.
pub fn branch(model: &str) -> String {
    format!("refs/heads/{model}")
}

/// Commits a version's training code and returns the commit's id, which follows from the content.
pub fn commit(code: &Path, version: Version) -> Result<String> {
    let branch = branch(&version.model());
    let head = git(code, &["for-each-ref", "--format=%(objectname) %(subject)", &branch], "")?;
    let (head, subject) = head.split_once(' ').unwrap_or_default();
    if subject == version.commit_subject() {
        return Ok(head.to_owned());
    }
    if version.before().map(Version::commit_subject).unwrap_or_default() != subject {
        return Err(format!("the branch {branch} stands at `{subject}`, before {}", version.commit_subject()));
    }
    let from = if head.is_empty() { String::new() } else { format!("from {head}\n") };
    let (subject, training) = (version.commit_subject(), version.training());
    let stream = format!(
        "commit {branch}\nmark :1\ncommitter Example <example@example.invalid> {} +0000\ndata {}\n{subject}\n{from}\
         M 100644 inline train.toml\ndata {}\n{training}\nget-mark :1\ndone\n",
        1_700_000_000 + version.number,
        subject.len(),
        training.len(),
    );
    git(code, &["fast-import", "--quiet", "--done"], &stream)
}

/// Writes a version's serving configuration beside the store and renames it in, as a careful writer
/// does. A file is written once and never changed.
pub fn write_config(config: &Path, version: Version, commit: &str) -> Result<()> {
    let name = version.model();
    let content = serde_json::json!({
        "model": name, "version": version.number, "artifact": version.artifact_key(), "commit": commit,
    });
    let (beside, folder) = (incoming(config).join(&name), config.join(&name));
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&beside, format!("{content:#}\n")))
        .and_then(|()| std::fs::rename(&beside, folder.join(format!("{:08}.json", version.number))))
        .attempted("write the serving configuration")
}

/// Where files are written before they are renamed into `config`.
pub fn incoming(config: &Path) -> PathBuf {
    config.with_extension("incoming")
}

/// Runs git in a bare repository, away from the user's own configuration.
pub fn git(code: &Path, arguments: &[&str], input: &str) -> Result<String> {
    let name = arguments.first().copied().unwrap_or_default();
    let what = format!("run git {name}");
    let mut child = Command::new("git")
        .args(arguments)
        .current_dir(code)
        .env("GIT_DIR", ".")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .attempted(&what)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).attempted(&what)?;
    }
    let output = child.wait_with_output().attempted(&what)?;
    if !output.status.success() {
        return Err(format!("git {name} failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
