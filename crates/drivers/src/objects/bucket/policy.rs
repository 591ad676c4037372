//! What the driver needs to be allowed, as a policy to paste; what it finds missing; and what a
//! bucket's own rules will do to what a point refers to.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use stillpoint_core::address;
use stillpoint_core::capability::{Capability, PinKind, Probe};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::Identity;
use stillpoint_core::tree::FileTime;

use super::answers::{self, Element, Versioning};
use super::s3::S3;
use super::verbs::What;
use crate::objects::Objects;
use crate::objects::config::{Mode, Settings, is_s3};

/// What is kept of a bucket's configuration: the name in a request, and the privilege.
const CONFIGURATION: [(&str, &str); 7] = [
    ("cors", "s3:GetBucketCORS"),
    ("encryption", "s3:GetEncryptionConfiguration"),
    ("lifecycle", "s3:GetLifecycleConfiguration"),
    ("notification", "s3:GetBucketNotification"),
    ("object-lock", "s3:GetBucketObjectLockConfiguration"),
    ("policy", "s3:GetBucketPolicy"),
    ("tagging", "s3:GetBucketTagging"),
];
/// More than a configuration takes; longer ones are left out.
const CONFIGURATION_BYTES_MAX: usize = 100 << 10;

/// The policy for a store of these settings; of an example where they name no bucket.
pub(in super::super) fn policy(settings: &crate::Settings) -> Result<Option<String>> {
    let object = settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let settings: Settings = serde_json::from_value(Value::Object(object))
        .map_err(|error| Error::new(Kind::Config, format!("settings: {error}")))?;
    match settings.url.as_deref() {
        None if settings.path.is_some() => Ok(None),
        Some(url) if !is_s3(url) => Ok(None),
        url => {
            let document = document(&settings, url.unwrap_or("s3://BUCKET"))?;
            Ok(Some(format!("{document:#}\n")))
        }
    }
}

fn document(settings: &Settings, url: &str) -> Result<Value> {
    let (bucket, prefix) = parts(url)?;
    let mut all = "s3:GetBucketVersioning s3:GetLifecycleConfiguration".split(' ').collect::<Vec<_>>();
    all.extend(
        CONFIGURATION.iter().map(|(_, privilege)| *privilege).filter(|name| *name != "s3:GetLifecycleConfiguration"),
    );
    let mut read = vec!["s3:GetObject", "s3:GetObjectVersion"];
    let mut write = vec!["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"];
    if settings.tags {
        read.extend(["s3:GetObjectTagging", "s3:GetObjectVersionTagging"]);
        write.push("s3:PutObjectTagging");
    }
    if settings.acl {
        read.extend(["s3:GetObjectAcl", "s3:GetObjectVersionAcl"]);
        write.push("s3:PutObjectAcl");
    }
    if settings.lock {
        read.extend(["s3:GetObjectRetention", "s3:GetObjectLegalHold"]);
        write.extend(["s3:PutObjectRetention", "s3:PutObjectLegalHold"]);
    }
    let mut statements = vec![list(&bucket, &prefix, "Store"), statement("StoreBucket", &all, &whole(&bucket))];
    if settings.mode == Mode::Reference {
        // Nothing is read but names: the bytes stay where they are until a restore.
        statements.push(statement("RestoreReads", &read, &below(&bucket, &prefix)));
    } else {
        statements.push(statement("StoreObjects", &read, &below(&bucket, &prefix)));
    }
    statements.push(statement("RestoreWrites", &write, &below(&bucket, &prefix)));
    if settings.create {
        statements.push(statement("RestoreCreates", &["s3:CreateBucket", "s3:PutBucketVersioning"], &whole(&bucket)));
    }
    if let Some(mirror) = &settings.mirror {
        let (bucket, prefix) = parts(mirror)?;
        statements.push(list(&bucket, &prefix, "Mirror"));
        statements.push(statement("MirrorBucket", &["s3:GetBucketVersioning"], &whole(&bucket)));
        // A restore asks for the copies' tags, and copies of tagged versions need the right to.
        let copy = [
            "s3:PutObject",
            "s3:PutObjectTagging",
            "s3:AbortMultipartUpload",
            "s3:GetObject",
            "s3:GetObjectVersion",
            "s3:GetObjectTagging",
            "s3:GetObjectVersionTagging",
        ];
        statements.push(statement("MirrorObjects", &copy, &below(&bucket, &prefix)));
    }
    Ok(json!({ "Version": "2012-10-17", "Statement": statements }))
}

fn parts(url: &str) -> Result<(String, String)> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(Error::new(Kind::Config, format!("`{url}` names no bucket")).hint("url: s3://bucket/prefix"));
    }
    let prefix = prefix.trim_matches('/');
    Ok((bucket.to_owned(), if prefix.is_empty() { String::new() } else { format!("{prefix}/") }))
}

fn whole(bucket: &str) -> String {
    format!("arn:aws:s3:::{bucket}")
}

fn below(bucket: &str, prefix: &str) -> String {
    format!("arn:aws:s3:::{bucket}/{prefix}*")
}

fn statement(name: &str, actions: &[&str], resource: &str) -> Value {
    json!({ "Sid": name, "Effect": "Allow", "Action": actions, "Resource": resource })
}

fn list(bucket: &str, prefix: &str, name: &str) -> Value {
    let actions = ["s3:ListBucket", "s3:ListBucketVersions", "s3:ListBucketMultipartUploads"];
    let mut list = statement(&format!("{name}List"), &actions, &whole(bucket));
    if !prefix.is_empty() {
        list["Condition"] = json!({ "StringLike": { "s3:prefix": [format!("{prefix}*")] } });
    }
    list
}

impl S3 {
    /// What else is set on the bucket. What may not be seen is left out: nothing depends on it.
    pub fn configuration(&self) -> Result<BTreeMap<String, String>> {
        let client = self.client.clone();
        let found = self.wait(async move {
            let asked = CONFIGURATION.map(|(name, privilege)| client.configuration(name, privilege));
            let mut found = BTreeMap::new();
            for ((name, _), answer) in CONFIGURATION.iter().zip(futures::future::join_all(asked).await) {
                match answer {
                    Ok(Some(text)) => drop(found.insert((*name).to_owned(), text)),
                    Ok(None) => {}
                    Err(error) if error.kind() == Kind::PermissionDenied => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(found)
        })?;
        let says_something = |text: &str| match Element::parse(text) {
            Ok(element) => !element.inside.is_empty(),
            // Policies are JSON.
            Err(_) => !text.trim().is_empty(),
        };
        let keep = |(_, text): &(String, String)| text.len() <= CONFIGURATION_BYTES_MAX && says_something(text);
        Ok(found.into_iter().filter(keep).collect())
    }
}

/// What the bucket's own rules will do to versions that nothing but a point needs.
pub(in super::super) fn what_becomes_of_references(
    configuration: &BTreeMap<String, String>,
    at: FileTime,
) -> Result<Vec<String>> {
    let base = "the point refers to versions in the bucket itself and holds no bytes: it does not survive the bucket";
    let days = configuration.get("lifecycle").map(|text| answers::noncurrent_days(text)).transpose()?.flatten();
    let rule = match days {
        Some(days) => {
            let end = jiff::Timestamp::new(at.seconds, 0).ok();
            let end = end
                .and_then(|at| at.checked_add(jiff::SignedDuration::from_hours(i64::try_from(days).ok()? * 24)).ok());
            let when = end.map_or_else(String::new, |end| format!(", the first of them after {end}"));
            format!("a lifecycle rule removes versions {days} days after they are replaced{when}")
        }
        None => "no lifecycle rule that could be seen removes old versions".to_owned(),
    };
    Ok(vec![base.to_owned(), rule])
}

impl Objects {
    /// Looks at the bucket without changing it.
    pub(in super::super) fn probe_s3(&self, s3: &S3) -> Result<Probe> {
        let mut missing = Vec::new();
        let mut warnings = Vec::new();
        let mut allowed = |result: Result<()>| match result {
            Err(error) if error.kind() == Kind::PermissionDenied => {
                missing.push(error.hint_text().unwrap_or(error.message()).to_owned());
                Ok(false)
            }
            other => other.map(|()| true),
        };
        let try_list = |what: What| {
            let (client, prefix) = (s3.client.clone(), s3.prefix.clone());
            s3.wait(async move { client.first(what, &prefix).await.map(drop) })
        };
        allowed(try_list(What::Objects))?;
        let mut versioning = Versioning::Never;
        allowed(s3.versioning().map(|found| versioning = found))?;
        let mut holds = versioning == Versioning::Enabled;
        if holds {
            holds = allowed(try_list(What::Versions))?;
        }
        allowed(s3.try_needed(holds, self.settings.mode))?;
        match versioning {
            Versioning::Enabled => {}
            Versioning::Suspended => warnings.push(
                "the bucket's versioning is suspended, so that new writes replace each other: it is read as one without \
                 versions"
                    .to_owned(),
            ),
            Versioning::Never => warnings.push(
                "the bucket keeps no versions: what is overwritten or deleted between cut and drain is lost to the point, \
                 and named if the listing before the cut shows it"
                    .to_owned(),
            ),
        }
        if self.settings.mode == Mode::Reference {
            let now = FileTime { seconds: jiff::Timestamp::now().as_second(), nanos: 0 };
            warnings.extend(what_becomes_of_references(&s3.configuration()?, now)?);
        }
        let version = match versioning {
            Versioning::Enabled => "S3 with versions",
            Versioning::Suspended => "S3, versions suspended",
            Versioning::Never => "S3 without versions",
        };
        let pin = if holds { PinKind::Set } else { PinKind::Watched };
        Ok(Probe {
            version: version.to_owned(),
            identity: self.identity()?,
            capability: Capability {
                pin,
                observes_writes: false,
                incremental: true,
                edges: true,
                swaps_in_place: false,
                partial_restore: true,
            },
            missing_privileges: missing,
            warnings,
        })
    }

    /// Who the bucket is.
    pub(in super::super) fn identity_s3(&self, s3: &S3, url: &str) -> Result<Identity> {
        let endpoint = address::of_bucket(url, &self.settings.options, s3.prefix.trim_end_matches('/'))?;
        Ok(Identity { driver: "objects".to_owned(), native: None, endpoint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy_of(settings: Value) -> Option<String> {
        let Value::Object(settings) = settings else { panic!("settings are an object") };
        policy(&settings.into_iter().collect()).unwrap()
    }

    #[test]
    fn the_policy_names_what_the_settings_need_and_no_more() {
        let text = policy_of(json!({ "url": "s3://models/production/" })).unwrap();
        for needed in
            ["s3:ListBucketVersions", "arn:aws:s3:::models/production/*", "\"production/*\"", "s3:GetObjectTagging"]
        {
            assert!(text.contains(needed), "{needed}: {text}");
        }
        for other in ["Acl", "Retention", "CreateBucket", "Mirror"] {
            assert!(!text.contains(other), "{other}: {text}");
        }
        let settings = json!({ "url": "s3://a", "mode": "mirror", "mirror": "s3://b/c", "acl": true, "lock": true, "create": true });
        let text = policy_of(settings).unwrap();
        for needed in
            ["s3:PutObjectAcl", "s3:PutObjectRetention", "s3:CreateBucket", "arn:aws:s3:::b/c/*", "arn:aws:s3:::a/*"]
        {
            assert!(text.contains(needed), "{needed}: {text}");
        }
        let document: Value = serde_json::from_str(&text).unwrap();
        let statements = document["Statement"].as_array().unwrap();
        let mirror = statements.iter().find(|statement| statement["Sid"] == "MirrorObjects").unwrap();
        assert!(mirror["Action"].as_array().unwrap().contains(&json!("s3:GetObjectVersionTagging")), "{mirror}");
        assert!(policy_of(json!({})).unwrap().contains("BUCKET"));
        assert_eq!(policy_of(json!({ "path": "/srv/x" })), None);
        assert_eq!(policy_of(json!({ "url": "gs://x" })), None);
    }

    #[test]
    fn references_are_warned_of_with_the_day() {
        let rule = "<L><Rule><Status>Enabled</Status><NoncurrentVersionExpiration><NoncurrentDays>30</NoncurrentDays>\
                    </NoncurrentVersionExpiration></Rule></L>";
        let configuration = BTreeMap::from([("lifecycle".to_owned(), rule.to_owned())]);
        let notes = what_becomes_of_references(&configuration, FileTime::default()).unwrap();
        assert!(notes[1].contains("30 days") && notes[1].contains("1970-01-31"), "{notes:?}");
        assert!(what_becomes_of_references(&BTreeMap::new(), FileTime::default()).unwrap()[1].contains("no lifecycle"));
    }
}
