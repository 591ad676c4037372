//! Throw-away buckets on the rigs, and a second client that looks at them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use serde_json::{Value, json};
use stillpoint_core::driver::Driver;

use crate::objects::bucket::answers::Versioning;
use crate::objects::bucket::s3::S3;
use crate::objects::config::Settings;
use crate::objects::{Objects, PHASES, REGISTRATION, Where};
use crate::phases::Phased;
use crate::trial;

/// An S3 server that runs.
#[derive(Clone)]
pub struct Rig {
    pub endpoint: String,
    pub key: String,
    pub secret: String,
}

impl Rig {
    /// The server with versions, or the one without. Says why there is none.
    pub fn find(plain: bool) -> Result<Self, &'static str> {
        let (name, rig) = if plain { ("S3_PLAIN", "s3-plain") } else { ("S3", "s3") };
        let variable = |part: &str| std::env::var(format!("STILLPOINT_RIG_{name}_{part}")).ok();
        match (variable("ENDPOINT"), variable("ACCESS_KEY_ID"), variable("SECRET_ACCESS_KEY")) {
            (Some(endpoint), Some(key), Some(secret)) => Ok(Self { endpoint, key, secret }),
            _ if rig == "s3" => Err("no rig: cargo xtask rig up s3"),
            _ => Err("no rig: cargo xtask rig up s3-plain"),
        }
    }

    /// A new bucket.
    pub fn bucket(&self, versions: bool) -> Bucket {
        let bucket = self.absent();
        let client = bucket.place("").client.clone();
        let place = bucket.place("");
        place
            .wait(async move {
                client.create(false).await?;
                if versions { client.set_versioning(Versioning::Enabled).await } else { Ok(()) }
            })
            .unwrap();
        bucket
    }

    /// A bucket that is not there yet.
    pub fn absent(&self) -> Bucket {
        Bucket {
            rig: self.clone(),
            name: format!("objects-{:016x}", fastrand::u64(..)),
            folder: Arc::new(tempfile::tempdir().unwrap()),
        }
    }
}

/// A bucket of its own for one test.
#[derive(Clone)]
pub struct Bucket {
    pub rig: Rig,
    pub name: String,
    pub folder: Arc<tempfile::TempDir>,
}

impl Bucket {
    /// Settings of a store at a prefix of the bucket.
    pub fn settings(&self, prefix: &str, more: Value) -> Value {
        let mut settings = json!({
            "url": format!("s3://{}/{prefix}", self.name),
            "options": { "endpoint": self.rig.endpoint, "region": "us-east-1", "allow_http": "true" },
            "credentials": { "access_key_id": self.rig.key, "secret_access_key": self.rig.secret },
            // The server and its clock are one.
            "clockDifference": "0s",
        });
        let more = more.as_object().cloned().unwrap_or_default();
        more.into_iter().for_each(|(name, value)| settings[name] = value);
        settings
    }

    pub fn scratch(&self) -> PathBuf {
        self.folder.path().join("scratch")
    }

    /// A driver on a prefix of the bucket.
    pub fn open(&self, prefix: &str, more: Value) -> Arc<dyn Driver> {
        trial::open(&REGISTRATION, self.settings(prefix, more), &self.scratch()).unwrap()
    }

    /// A driver whose place the test keeps in its hands.
    pub fn open_counted(&self, prefix: &str) -> (Arc<dyn Driver>, Arc<Objects>) {
        let settings: Settings = serde_json::from_value(self.settings(prefix, json!({}))).unwrap();
        let place = Where::S3(self.place(prefix));
        let objects = Objects { settings, scratch: self.scratch(), place, state: std::sync::Mutex::default() };
        let phased = Phased::new(objects, &PHASES);
        let store = phased.store.clone();
        (Arc::new(phased), store)
    }

    /// Our own client, to set up what the other one cannot.
    pub fn place(&self, prefix: &str) -> S3 {
        let settings: Settings = serde_json::from_value(self.settings(prefix, json!({}))).unwrap();
        let options: Vec<_> = settings.options.clone().into_iter().collect();
        let secrets = settings.credentials.iter().map(|(name, secret)| (name.clone(), secret.0.clone()));
        let options: Vec<_> = options.into_iter().chain(secrets).collect();
        S3::open(&url::Url::parse(settings.url.as_deref().unwrap()).unwrap(), &options, &settings).unwrap()
    }

    /// The other client.
    pub fn other(&self) -> AmazonS3 {
        drop(rustls::crypto::ring::default_provider().install_default());
        AmazonS3Builder::new()
            .with_bucket_name(&self.name)
            .with_endpoint(&self.rig.endpoint)
            .with_allow_http(true)
            .with_access_key_id(&self.rig.key)
            .with_secret_access_key(&self.rig.secret)
            .build()
            .unwrap()
    }

    pub fn put(&self, key: &str, value: impl AsRef<[u8]>) {
        let value = value.as_ref().to_vec();
        trial::run(self.other().put(&ObjectPath::parse(key).unwrap(), value.into())).unwrap();
    }

    pub fn delete(&self, key: &str) {
        trial::run(self.other().delete(&ObjectPath::parse(key).unwrap())).unwrap();
    }

    pub fn get(&self, key: &str) -> Vec<u8> {
        trial::run(async {
            self.other().get(&ObjectPath::parse(key).unwrap()).await.unwrap().bytes().await.unwrap().to_vec()
        })
    }

    /// Key below the prefix, size and tag of all objects, as the other client lists them.
    pub fn listed(&self, prefix: &str) -> BTreeMap<String, (u64, String)> {
        let listed = trial::run(self.other().list(Some(&ObjectPath::from(prefix))).try_collect::<Vec<_>>()).unwrap();
        let below = |key: &str| key.strip_prefix(prefix).unwrap_or(key).trim_start_matches('/').to_owned();
        let ours = |key: &String| !key.starts_with(".stillpoint-");
        let entries =
            listed.into_iter().map(|meta| (below(meta.location.as_ref()), (meta.size, meta.e_tag.unwrap_or_default())));
        entries.filter(|(key, _)| ours(key)).collect()
    }
}
