//! What a restore will do: reviewed by people, then carried out to the letter or refused.
//!
//! Pure data with a hash over its canonical bytes. Who makes it (the engine) has looked at the
//! point and at the targets; who carries it out looks again and compares.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::id::{EnvironmentName, PlatformName, PointId, StoreName};
use crate::position::{Identity, Stamp};

/// The schema name of this version.
pub const SCHEMA: &str = "stillpoint.dev/restore-plan/v1";

/// The reviewed list of restore steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestorePlan {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The platform.
    pub platform: PlatformName,
    /// The point that is restored.
    pub point: PointId,
    /// The environment that the point was taken from.
    pub source_environment: EnvironmentName,
    /// The environment that the copy will belong to.
    pub target_environment: EnvironmentName,
    /// The directory that everything is restored under, if targets are not declared.
    pub to: Option<String>,
    /// Whether the sources themselves are replaced.
    pub in_place: bool,
    /// Whether what an earlier restore into the same environment left may be overwritten.
    pub replaces: bool,
    /// Whether it is accepted that stores of different points stand side by side afterwards.
    pub accepts_mixed: bool,
    /// Whether what was written is read back and compared with the point. Without it the restore can
    /// end `restored`, never `proven`. Left out when true, as in plans of the first version.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub compares: bool,
    /// The repository's snapshot.
    pub snapshot: String,
    /// The moment that the point shows; what came after it is lost.
    pub cut_at: Timestamp,
    /// The steps, in an order in which they may run one after the other.
    pub steps: Vec<RestoreStep>,
    /// What people must know, without stopping the restore.
    pub warnings: Vec<String>,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_true(value: &bool) -> bool {
    *value
}

/// The restore of one store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreStep {
    /// The store.
    pub store: StoreName,
    /// Its driver.
    pub driver: String,
    /// Which part of the store's tree; the whole without it.
    pub part: Option<String>,
    /// Stores of this plan that must be done before.
    pub needs: BTreeSet<StoreName>,
    /// The target as it was found.
    pub target: TargetFound,
    /// Files in the store's tree.
    pub files: u64,
    /// Bytes in the store's tree.
    pub bytes: u64,
    /// The store's own count.
    pub items: u64,
    /// What `items` counts.
    pub unit: String,
    /// What the restore loses, one statement for people: `everything after 10:00:03.412 UTC`.
    pub loses: String,
    /// Losses that the point itself has named.
    pub named_losses: Vec<String>,
}

/// A target as it was found when the plan was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TargetFound {
    /// Who it is; `None` if it does not exist yet and cannot tell.
    pub identity: Option<Identity>,
    /// Its stamp.
    pub stamp: Option<Stamp>,
    /// What the restore replaces; `None` if the target is absent or empty.
    pub overwrites: Option<String>,
}

/// Names a plan: SHA-256 over its canonical bytes, hex.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct PlanHash(pub String);

impl PlanHash {
    /// The part that people see and type.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl std::fmt::Display for PlanHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl RestorePlan {
    /// The bytes that the hash covers: compact JSON with sorted keys.
    pub fn canonical_bytes(&self) -> Result<Vec<u8>> {
        let fault = |e: serde_json::Error| Error::internal("the plan does not serialize").source(e);
        // A `Value` keeps its keys sorted, whatever the order of the fields above.
        let value = serde_json::to_value(self).map_err(fault)?;
        serde_json::to_vec(&value).map_err(fault)
    }

    /// The plan's name.
    pub fn hash(&self) -> Result<PlanHash> {
        Ok(PlanHash(hex::encode(Sha256::digest(self.canonical_bytes()?))))
    }

    /// Parses a plan. A newer schema is refused by name.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let corrupt = |e: serde_json::Error| Error::new(Kind::Corrupt, "the restore plan is not readable").source(e);
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(corrupt)?;
        let schema = value.get("schema").and_then(serde_json::Value::as_str).unwrap_or("none");
        if schema != SCHEMA {
            return Err(Error::new(Kind::Unsupported, format!("the restore plan uses the schema `{schema}`"))
                .hint(format!("this version reads `{SCHEMA}`; make the plan again")));
        }
        serde_json::from_value(value).map_err(corrupt)
    }

    /// The step of one store.
    pub fn step(&self, store: &StoreName) -> Option<&RestoreStep> {
        self.steps.iter().find(|step| step.store == *store)
    }

    /// Bytes of all steps.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|step| step.bytes).sum()
    }

    /// Checks that the steps can be carried out in their order: no store twice, needs met before.
    pub fn check(&self) -> Result<()> {
        let mut done: BTreeSet<&StoreName> = BTreeSet::new();
        for step in &self.steps {
            if let Some(need) = step.needs.iter().find(|need| !done.contains(need)) {
                let message = format!("store `{}` comes before `{need}`, which it needs", step.store);
                return Err(Error::new(Kind::Corrupt, message).hint("make the plan again"));
            }
            if !done.insert(&step.store) {
                let message = format!("store `{}` stands in the plan twice", step.store);
                return Err(Error::new(Kind::Corrupt, message).hint("make the plan again"));
            }
        }
        Ok(())
    }

    /// What is different in `now`, one sentence each; empty if the plans are the same.
    ///
    /// Stores in `ours` were begun by this very restore; that their targets changed is no surprise.
    pub fn differences(&self, now: &Self, ours: &BTreeSet<StoreName>) -> Vec<String> {
        let mut found = Vec::new();
        let whole: [(&str, String, String); 6] = [
            ("point", self.point.to_string(), now.point.to_string()),
            ("snapshot", self.snapshot.clone(), now.snapshot.clone()),
            ("target environment", self.target_environment.to_string(), now.target_environment.to_string()),
            ("directory", format!("{:?}", self.to), format!("{:?}", now.to)),
            ("in place", self.in_place.to_string(), now.in_place.to_string()),
            ("cut", self.cut_at.to_string(), now.cut_at.to_string()),
        ];
        for (what, planned, current) in whole {
            if planned != current {
                found.push(format!("{what}: planned {planned}, now {current}"));
            }
        }
        let (before, after) = (by_store(self), by_store(now));
        for store in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            match (before.get(store), after.get(store)) {
                (Some(planned), Some(current)) => {
                    step_differences(planned, current, ours.contains(*store), &mut found);
                }
                (Some(_), None) => found.push(format!("store `{store}` was planned and is not there any more")),
                _ => found.push(format!("store `{store}` was not planned")),
            }
        }
        if found.is_empty() && ours.is_empty() && self != now {
            found.push("order or warnings of the plan".to_owned());
        }
        found
    }
}

fn by_store(plan: &RestorePlan) -> BTreeMap<&StoreName, &RestoreStep> {
    plan.steps.iter().map(|step| (&step.store, step)).collect()
}

fn step_differences(planned: &RestoreStep, current: &RestoreStep, ours: bool, found: &mut Vec<String>) {
    let store = &planned.store;
    let endpoint = |step: &RestoreStep| step.target.identity.as_ref().map_or("nothing", |i| &i.endpoint).to_owned();
    if endpoint(planned) != endpoint(current) && !(ours && planned.target.identity.is_none()) {
        found.push(format!("store `{store}`: the target was {}, now {}", endpoint(planned), endpoint(current)));
    } else if !ours && planned.target.identity != current.target.identity {
        found.push(format!("store `{store}`: another store answers at {}", endpoint(current)));
    }
    if !ours && planned.target.overwrites != current.target.overwrites {
        let text = |overwrites: &Option<String>| overwrites.clone().unwrap_or_else(|| "nothing".to_owned());
        let (was, is) = (text(&planned.target.overwrites), text(&current.target.overwrites));
        found.push(format!("store `{store}`: overwrites {was} as planned, {is} now"));
    }
    if !ours && planned.target.stamp != current.target.stamp {
        found.push(format!("store `{store}`: the stamp at the target has changed"));
    }
    let neutral = |step: &RestoreStep| RestoreStep {
        target: TargetFound { identity: None, stamp: None, overwrites: None },
        ..step.clone()
    };
    if neutral(planned) != neutral(current) {
        found.push(format!("store `{store}`: size, order, part or losses have changed"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> StoreName {
        StoreName::new(text).expect("valid")
    }

    fn step(store: &str, needs: &[&str]) -> RestoreStep {
        let identity = Identity { driver: "memory".to_owned(), native: None, endpoint: format!("/t/{store}") };
        RestoreStep {
            store: name(store),
            driver: "memory".to_owned(),
            part: None,
            needs: needs.iter().map(|need| name(need)).collect(),
            target: TargetFound { identity: Some(identity), stamp: None, overwrites: None },
            files: 1,
            bytes: 10,
            items: 1,
            unit: "rows".to_owned(),
            loses: "everything after 10:00:03.412 UTC".to_owned(),
            named_losses: Vec::new(),
        }
    }

    fn plan(steps: Vec<RestoreStep>) -> RestorePlan {
        RestorePlan {
            schema: SCHEMA.to_owned(),
            platform: PlatformName::new("p").expect("valid"),
            point: PointId::from_random([1; 8]),
            source_environment: EnvironmentName::new("production").expect("valid"),
            target_environment: EnvironmentName::new("staging").expect("valid"),
            to: None,
            in_place: false,
            replaces: false,
            accepts_mixed: false,
            compares: true,
            snapshot: "abc".to_owned(),
            cut_at: Timestamp::UNIX_EPOCH,
            steps,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn the_hash_covers_every_field_and_survives_json() {
        let first = plan(vec![step("a", &[]), step("b", &["a"])]);
        let parsed = RestorePlan::parse(&serde_json::to_vec_pretty(&first).expect("json")).expect("parses");
        assert_eq!(parsed.hash().expect("hash"), first.hash().expect("hash"));
        let mut other = first.clone();
        other.steps[1].target.overwrites = Some("3 files".to_owned());
        assert_ne!(other.hash().expect("hash"), first.hash().expect("hash"));
        assert_eq!(first.hash().expect("hash").short().len(), 12);
    }

    #[test]
    fn a_plan_of_another_schema_is_refused_by_name() {
        let mut newer = plan(Vec::new());
        newer.schema = "stillpoint.dev/restore-plan/v9".to_owned();
        let error = RestorePlan::parse(&serde_json::to_vec(&newer).expect("json")).expect_err("refused");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("v9"), "{error}");
    }

    #[test]
    fn steps_come_after_what_they_need() {
        assert!(plan(vec![step("a", &[]), step("b", &["a"])]).check().is_ok());
        assert!(plan(vec![step("b", &["a"]), step("a", &[])]).check().is_err());
        assert!(plan(vec![step("a", &[]), step("a", &[])]).check().is_err());
    }

    #[test]
    fn differences_say_what_changed_and_forgive_our_own_doing() {
        let before = plan(vec![step("a", &[]), step("b", &[])]);
        assert!(before.differences(&before, &BTreeSet::new()).is_empty());
        let mut now = before.clone();
        now.steps[0].target.overwrites = Some("3 files".to_owned());
        now.steps[0].target.stamp = Some(Stamp {
            platform: "p".to_owned(),
            environment: "staging".to_owned(),
            point: "x".to_owned(),
            restore: "y".to_owned(),
            at: Timestamp::UNIX_EPOCH,
        });
        let found = before.differences(&now, &BTreeSet::new());
        assert_eq!(found[0], "store `a`: overwrites nothing as planned, 3 files now");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(before.differences(&now, &BTreeSet::from([name("a")])).is_empty());
        now.steps.remove(1);
        let found = before.differences(&now, &BTreeSet::from([name("a")]));
        assert_eq!(found, ["store `b` was planned and is not there any more"]);
    }
}
