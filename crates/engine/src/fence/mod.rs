//! The fence: nothing is restored over its source, over its bucket, or over what nobody knows.
//!
//! Looks at every target before the first write and says everything that it holds against it, store
//! by store. Native identifiers and addresses tell most copies apart; where a physical copy shares
//! them, the stamp does. Looking changes nothing; whoever carries out a plan looks again right
//! before each store.

mod place;
#[cfg(test)]
mod tests;

use serde::Serialize;
use stillpoint_core::driver::{Context, Driver};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::{EnvironmentName, PlatformName, StoreName};
use stillpoint_core::position::{Identity, Stamp};

use place::{Relation, relation};

/// A target as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The store that would be restored there.
    pub store: StoreName,
    /// Who it is; `None` if it does not exist yet and cannot tell.
    pub identity: Option<Identity>,
    /// Its stamp.
    pub stamp: Option<Stamp>,
    /// Why its stamp does not speak for all of it, and what can be done.
    pub unclear: Option<(String, String)>,
    /// What it holds, for people; `None` if it is absent or empty.
    pub occupied: Option<String>,
}

/// Something that no restore may touch unless it is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is, for people: `store meta of the point`.
    pub what: String,
    /// Who it is.
    pub identity: Identity,
}

/// One reason not to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The store whose target it is.
    pub store: StoreName,
    /// What is wrong, one sentence.
    pub what: String,
    /// What the operator can do.
    pub hint: String,
}

/// What the restore is meant to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent<'a> {
    /// Make a copy somewhere else.
    Copy {
        /// Overwrite what an earlier restore into the same environment left.
        replace: bool,
    },
    /// Replace the sources themselves; each identity was typed by the operator.
    InPlace {
        /// What was typed.
        typed: &'a [String],
    },
}

/// The fence around one restore.
#[derive(Debug, Clone)]
pub struct Fence<'a> {
    /// The platform.
    pub platform: &'a PlatformName,
    /// The environment that the point was taken from.
    pub source_environment: &'a EnvironmentName,
    /// The environment that the copy will belong to.
    pub target_environment: &'a EnvironmentName,
    /// The stores of the point and of platform.yaml, and the bucket.
    pub sources: &'a [Source],
    /// What is meant.
    pub intent: Intent<'a>,
}

/// Asks a target who and what it is. Changes nothing.
///
/// # Errors
/// Those of the driver, but for `NotFound`: what does not exist yet has no identity. And for `Fenced` of its
/// stamp: that speaks against making a copy there, not against replacing the original, which is typed.
pub async fn look(store: &StoreName, driver: &dyn Driver, context: &Context) -> Result<Target> {
    let named = |error: Error| error.store(store.as_str()).operation("fence");
    let identity = match driver.identity(context).await {
        Ok(identity) => Some(identity),
        Err(error) if error.kind() == Kind::NotFound => None,
        Err(error) => return Err(named(error)),
    };
    let (stamp, unclear) = match driver.read_stamp(context).await {
        Ok(stamp) => (stamp, None),
        Err(error) if error.kind() == Kind::Fenced => {
            (None, Some((error.message().to_owned(), error.hint_text().unwrap_or_default().to_owned())))
        }
        Err(error) => return Err(named(error)),
    };
    let occupied = driver.occupied(context).await.map_err(named)?;
    Ok(Target { store: store.clone(), identity, stamp, unclear, occupied })
}

/// Turns findings into a refusal; `Ok` if there are none.
pub fn refuse(findings: &[Finding]) -> Result<()> {
    let Some(first) = findings.first() else { return Ok(()) };
    let more = match findings.len() - 1 {
        0 => String::new(),
        1 => " (and one more finding)".to_owned(),
        count => format!(" (and {count} more findings)"),
    };
    Err(Error::new(Kind::Fenced, format!("{}{more}", first.what))
        .store(first.store.as_str())
        .operation("fence")
        .hint(first.hint.clone()))
}

impl Fence<'_> {
    /// Everything that speaks against writing to these targets. Empty means clear.
    pub fn check(&self, targets: &[Target]) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (index, target) in targets.iter().enumerate() {
            let found = match self.intent {
                Intent::Copy { replace } => self.check_copy(target, replace),
                Intent::InPlace { typed } => self.check_in_place(target, typed),
            };
            findings.extend(found.into_iter().map(|(what, hint)| Finding { store: target.store.clone(), what, hint }));
            if let Some(twin) = targets[..index].iter().find(|other| same_target(other, target)) {
                findings.push(Finding {
                    store: target.store.clone(),
                    what: format!(
                        "the stores `{}` and `{}` would be restored into one place",
                        twin.store, target.store
                    ),
                    hint: "give each store a target of its own".to_owned(),
                });
            }
        }
        findings
    }

    fn check_copy(&self, target: &Target, replace: bool) -> Vec<(String, String)> {
        let mut found = Vec::new();
        if self.target_environment == self.source_environment {
            found.push((
                format!("the target environment is `{}`, which the point was taken from", self.source_environment),
                "name another environment, or restore with --in-place".to_owned(),
            ));
        }
        // A copy of ours may share the native identifier of its source; its stamp tells it apart.
        let own_copy = target.stamp.as_ref().is_some_and(|stamp| self.is_own(stamp));
        if let Some(identity) = &target.identity {
            found.extend(self.sources.iter().filter_map(|source| meets(source, identity, own_copy)));
        }
        if let Some(unclear) = &target.unclear {
            found.push(unclear.clone());
            return found;
        }
        match (&target.stamp, &target.occupied) {
            (Some(stamp), _) if !self.is_own(stamp) => found.push((
                format!("the target belongs to `{}` · `{}`, its stamp says", stamp.platform, stamp.environment),
                "choose another target; only an earlier restore into the same environment can be replaced".to_owned(),
            )),
            (Some(_), Some(holds)) if !replace => found.push((
                format!("the target holds {holds} of an earlier restore"),
                "replace it with --replace, or choose an empty target".to_owned(),
            )),
            (None, Some(holds)) => found.push((
                format!("the target holds {holds} and bears no stamp, so it may be somebody's original"),
                "choose an empty target; an original is only replaced with --in-place".to_owned(),
            )),
            _ => {}
        }
        found
    }

    fn is_own(&self, stamp: &Stamp) -> bool {
        stamp.platform == self.platform.as_str() && stamp.environment == self.target_environment.as_str()
    }

    fn check_in_place(&self, target: &Target, typed: &[String]) -> Vec<(String, String)> {
        let mut found = Vec::new();
        match &target.identity {
            Some(identity) if typed.iter().any(|text| text == identity.typed()) => {}
            Some(identity) => found.push((
                format!("replacing {} in place was not confirmed", identity.typed()),
                format!("type its identity: --in-place --confirm {}", identity.typed()),
            )),
            None => found.push((
                "the store does not exist, so it cannot be replaced in place".to_owned(),
                "restore it into an environment, or with --to".to_owned(),
            )),
        }
        if let Some(stamp) = target.stamp.as_ref().filter(|stamp| !self.is_own(stamp)) {
            found.push((
                format!("the store belongs to `{}` · `{}`, its stamp says", stamp.platform, stamp.environment),
                "platform.yaml names a restored copy; correct its environment or the store's settings".to_owned(),
            ));
        }
        found
    }
}

fn same_target(one: &Target, other: &Target) -> bool {
    match (&one.identity, &other.identity) {
        (Some(one), Some(other)) => relation(&one.endpoint, &other.endpoint) == Relation::Same,
        _ => false,
    }
}

/// Whether the target is, holds or lies in something that must stay as it is.
fn meets(source: &Source, target: &Identity, own_copy: bool) -> Option<(String, String)> {
    let what = &source.what;
    let elsewhere = || "restore into another place, or the source itself with --in-place".to_owned();
    match relation(&target.endpoint, &source.identity.endpoint) {
        Relation::Same => return Some((format!("the target {} is {what}", target.endpoint), elsewhere())),
        Relation::Inside => {
            let place = &source.identity.endpoint;
            return Some((format!("the target {} lies inside {what} ({place})", target.endpoint), elsewhere()));
        }
        Relation::Around => {
            let place = &source.identity.endpoint;
            return Some((format!("the target {} contains {what} ({place})", target.endpoint), elsewhere()));
        }
        Relation::Apart => {}
    }
    let same_native = target.driver == source.identity.driver && target.native == source.identity.native;
    match &target.native {
        Some(native) if same_native && !own_copy => Some((
            format!("the target {} calls itself {native}, and so does {what}", target.endpoint),
            "it is the source under another address, or an unstamped copy of it; choose an empty target".to_owned(),
        )),
        _ => None,
    }
}
