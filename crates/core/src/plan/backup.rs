//! What a backup will do, from the platform alone: which stores, pinned in which order.
//!
//! The settings of stores and what they can do are the drivers' business and found out later.

use std::collections::BTreeSet;
use std::time::Duration;

use super::order::{Circle, Precedence, layers};
use crate::coordinator::{ReferenceSpec, Spec};
use crate::duration;
use crate::error::{Error, Kind, Result};
use crate::id::{RunId, StoreName};
use crate::platform::{PauseStep, PinFirst, Platform, Reference, ReferencePolicy};
use crate::statefile::Level;

/// The plan of a backup.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupPlan {
    /// The stores in pin order: groups one after the other, each group at once.
    pub pin_groups: Vec<Vec<StoreName>>,
    /// Whether that order makes an unpaused point `ordered`.
    pub order_holds: bool,
    /// How long writers may be held back.
    pub pause_budget: Duration,
    /// The stores in the order in which a restore brings them back.
    pub restore_groups: Vec<Vec<StoreName>>,
    level: Level,
    accept: Vec<Level>,
    optimistic_tries: u32,
    pause_steps: u32,
    accept_named_loss: bool,
    references: Vec<ReferenceSpec>,
}

impl BackupPlan {
    /// Checks the platform as a whole and orders its stores.
    ///
    /// Fails with `Config` if a name leads nowhere or what is asked for contradicts itself.
    pub fn new(platform: &Platform) -> Result<Self> {
        if platform.stores.is_empty() {
            return Err(Error::new(Kind::Config, "the platform has no stores").hint("add one below `stores:`"));
        }
        check_names(platform)?;
        check_cut(platform)?;
        let pause_budget = duration::parse(&platform.cut.pause_budget)?;
        if pause_budget.is_zero() && !platform.pause.is_empty() {
            return Err(Error::new(Kind::Config, "the pause budget is 0, but there are pause steps")
                .hint("give cut.pauseBudget some time, e.g. 5s, or remove the pause steps"));
        }
        let (pin_groups, order_holds) = pin_order(platform)?;
        Ok(Self {
            pin_groups,
            order_holds,
            pause_budget,
            restore_groups: restore_order(platform)?,
            level: platform.cut.level,
            accept: platform.cut.accept.clone(),
            optimistic_tries: platform.cut.optimistic_tries.max(1),
            pause_steps: u32::try_from(platform.pause.len()).unwrap_or(u32::MAX),
            accept_named_loss: platform.cut.accept_named_loss,
            references: platform.references.iter().map(reference_spec).collect(),
        })
    }

    /// The specification of one run of this plan.
    pub fn spec(&self, run: RunId) -> Spec {
        Spec {
            run,
            pin_groups: self.pin_groups.clone(),
            order_holds: self.order_holds,
            level: self.level,
            accept: self.accept.clone(),
            optimistic_tries: self.optimistic_tries,
            pause_steps: self.pause_steps,
            pause_budget_micros: u64::try_from(self.pause_budget.as_micros()).unwrap_or(u64::MAX),
            accept_named_loss: self.accept_named_loss,
            references: self.references.clone(),
        }
    }
}

fn reference_spec(reference: &Reference) -> ReferenceSpec {
    let missing_max = match reference.policy {
        ReferencePolicy::Fail => Some(reference.allow_missing),
        ReferencePolicy::Warn => None,
    };
    let Reference { from, to, kind, .. } = reference;
    ReferenceSpec { from: from.clone(), to: to.clone(), kind: kind.clone(), missing_max }
}

fn check_names(platform: &Platform) -> Result<()> {
    let known = |store: &StoreName, field: &str| {
        if platform.stores.contains_key(store) {
            return Ok(());
        }
        let stores: Vec<_> = platform.stores.keys().map(StoreName::as_str).collect();
        Err(Error::new(Kind::Config, format!("{field} names the store `{store}`, which is not declared"))
            .hint(format!("stores: {}", stores.join(", "))))
    };
    for (name, store) in &platform.stores {
        for need in &store.needs {
            known(need, &format!("stores.{name}.needs"))?;
        }
    }
    for (index, reference) in platform.references.iter().enumerate() {
        known(&reference.from, &format!("references[{index}].from"))?;
        known(&reference.to, &format!("references[{index}].to"))?;
        if platform.references[..index].contains(reference) {
            return Err(Error::new(Kind::Config, format!("references[{index}] is declared twice")).hint("remove one"));
        }
    }
    for (index, cursor) in platform.cut.cursors.iter().enumerate() {
        known(&cursor.cursor, &format!("cut.cursors[{index}].cursor"))?;
        known(&cursor.sink, &format!("cut.cursors[{index}].sink"))?;
    }
    for (index, step) in platform.pause.iter().enumerate() {
        if let PauseStep::Sql { store, .. } = step {
            known(store, &format!("pause[{index}].store"))?;
        }
    }
    for (environment, target) in &platform.targets {
        for store in target.stores.keys() {
            known(store, &format!("targets.{environment}.stores"))?;
        }
    }
    Ok(())
}

fn check_cut(platform: &Platform) -> Result<()> {
    let cut = &platform.cut;
    match cut.accept.iter().find(|level| **level >= cut.level) {
        Some(_) => Err(Error::new(Kind::Config, "cut.accept names a level that is not below cut.level")
            .hint("levels from high to low: strict, ordered, independent")),
        None => Ok(()),
    }
}

/// Groups in pin order, and whether they honour every reference.
fn pin_order(platform: &Platform) -> Result<(Vec<Vec<StoreName>>, bool)> {
    let stores: BTreeSet<_> = platform.stores.keys().cloned().collect();
    let mut precedences = Vec::new();
    for Reference { from, to, pin_first, .. } in platform.references.iter().filter(|r| r.from != r.to) {
        let (before, after) = match pin_first {
            PinFirst::Referrer => (from, to),
            PinFirst::Referent => (to, from),
        };
        precedences.push(Precedence { before: before.clone(), after: after.clone() });
    }
    for cursor in platform.cut.cursors.iter().filter(|cursor| cursor.cursor != cursor.sink) {
        precedences.push(Precedence { before: cursor.cursor.clone(), after: cursor.sink.clone() });
    }
    match layers(&stores, &precedences) {
        Ok(groups) => Ok((groups, !precedences.is_empty())),
        Err(circle) if relies_on_order(platform) => Err(pin_circle(&circle)),
        // Nobody relies on the order: a strict point needs none, an independent one has none.
        Err(_) => Ok((vec![stores.into_iter().collect()], false)),
    }
}

fn relies_on_order(platform: &Platform) -> bool {
    platform.cut.level == Level::Ordered || platform.cut.accept.contains(&Level::Ordered)
}

fn pin_circle(circle: &Circle) -> Error {
    Error::new(Kind::Config, format!("references and cursors allow no order of pins: {circle}"))
        .hint("turn one reference round with pinFirst, or do without the level `ordered`")
}

/// Groups in restore order: what is needed or named first. `needs` must be free of circles; a
/// reference that would close one is left out, for it is evaluated after the restore anyway.
pub fn restore_order(platform: &Platform) -> Result<Vec<Vec<StoreName>>> {
    let stores: BTreeSet<_> = platform.stores.keys().cloned().collect();
    let precedences = restore_precedences(platform)?;
    layers(&stores, &precedences).map_err(|circle| needs_circle(&circle))
}

/// Which store must be there before which other one, as far as this is free of contradiction.
pub fn restore_precedences(platform: &Platform) -> Result<Vec<Precedence>> {
    let stores: BTreeSet<_> = platform.stores.keys().cloned().collect();
    let mut precedences = Vec::new();
    for (name, store) in &platform.stores {
        for need in &store.needs {
            precedences.push(Precedence { before: need.clone(), after: name.clone() });
        }
    }
    layers(&stores, &precedences).map_err(|circle| needs_circle(&circle))?;
    for reference in platform.references.iter().filter(|r| r.from != r.to) {
        precedences.push(Precedence { before: reference.to.clone(), after: reference.from.clone() });
        if layers(&stores, &precedences).is_err() {
            precedences.pop();
        }
    }
    precedences.sort();
    precedences.dedup();
    Ok(precedences)
}

fn needs_circle(circle: &Circle) -> Error {
    Error::new(Kind::Config, format!("stores need each other in a circle: {circle}"))
        .hint("remove one of these `needs`; a restore must begin somewhere")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(more: serde_json::Value) -> Platform {
        let mut value = serde_json::json!({
            "apiVersion": "stillpoint.dev/v1", "platform": "p", "environment": "e", "bucket": {"url": "/b"},
            "stores": {"a": {"driver": "memory"}, "b": {"driver": "memory"}, "c": {"driver": "memory"}},
        });
        let object = value.as_object_mut().expect("an object");
        for (key, part) in more.as_object().expect("an object") {
            object.insert(key.clone(), part.clone());
        }
        serde_json::from_value(value).expect("a platform")
    }

    fn reference(from: &str, to: &str) -> serde_json::Value {
        serde_json::json!({"from": from, "query": "q", "to": to, "kind": "keys"})
    }

    fn names(groups: &[Vec<StoreName>]) -> Vec<Vec<&str>> {
        groups.iter().map(|group| group.iter().map(StoreName::as_str).collect()).collect()
    }

    #[track_caller]
    fn refused(more: serde_json::Value) -> String {
        let error = BackupPlan::new(&platform(more)).expect_err("refused");
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.hint_text().is_some(), "{error} has no hint");
        error.to_string()
    }

    #[test]
    fn referrers_are_pinned_first_and_restored_last() {
        let plan = BackupPlan::new(&platform(serde_json::json!({"references": [reference("a", "b")]}))).expect("plan");
        assert_eq!(names(&plan.pin_groups), [vec!["a", "c"], vec!["b"]]);
        assert_eq!(names(&plan.restore_groups), [vec!["b", "c"], vec!["a"]]);
        assert!(plan.order_holds);
    }

    #[test]
    fn pin_first_turns_the_pins_round_but_not_the_restore() {
        let mut turned = reference("a", "b");
        turned["pinFirst"] = "referent".into();
        let plan = BackupPlan::new(&platform(serde_json::json!({"references": [turned]}))).expect("plan");
        assert_eq!(names(&plan.pin_groups), [vec!["b", "c"], vec!["a"]]);
        assert_eq!(names(&plan.restore_groups), [vec!["b", "c"], vec!["a"]]);
    }

    #[test]
    fn cursors_are_pinned_before_their_sinks() {
        let cut = serde_json::json!({"level": "ordered", "cursors": [{"cursor": "c", "sink": "a"}]});
        let more = serde_json::json!({"cut": cut, "references": [reference("a", "b")]});
        let plan = BackupPlan::new(&platform(more)).expect("plan");
        assert_eq!(names(&plan.pin_groups), [vec!["c"], vec!["a"], vec!["b"]]);
        assert!(plan.order_holds);
        let cut = serde_json::json!({"level": "ordered", "cursors": [{"cursor": "b", "sink": "a"}]});
        let message = refused(serde_json::json!({"cut": cut, "references": [reference("a", "b")]}));
        assert_eq!(message, "references and cursors allow no order of pins: a → b → a");
        let cut = serde_json::json!({"cursors": [{"cursor": "z", "sink": "a"}]});
        assert_eq!(
            refused(serde_json::json!({"cut": cut})),
            "cut.cursors[0].cursor names the store `z`, which is not declared"
        );
    }

    #[test]
    fn without_references_no_order_is_claimed() {
        let plan = BackupPlan::new(&platform(serde_json::json!({}))).expect("plan");
        assert_eq!(names(&plan.pin_groups), [vec!["a", "b", "c"]]);
        assert!(!plan.order_holds);
    }

    #[test]
    fn a_circle_of_references_matters_only_where_order_does() {
        let circle = [reference("a", "b"), reference("b", "c"), reference("c", "a")];
        let plan = BackupPlan::new(&platform(serde_json::json!({"references": circle}))).expect("strict needs none");
        assert!(!plan.order_holds);
        assert_eq!(names(&plan.pin_groups), [vec!["a", "b", "c"]]);
        let message = refused(serde_json::json!({"references": circle, "cut": {"accept": ["ordered"]}}));
        assert_eq!(message, "references and cursors allow no order of pins: a → b → c → a");
    }

    #[test]
    fn names_that_lead_nowhere_are_refused() {
        let message = refused(serde_json::json!({"references": [reference("a", "z")]}));
        assert_eq!(message, "references[0].to names the store `z`, which is not declared");
        let message = refused(serde_json::json!({"stores": {"a": {"driver": "m", "needs": ["z"]}}}));
        assert_eq!(message, "stores.a.needs names the store `z`, which is not declared");
        let pause = serde_json::json!([{"kind": "sql", "store": "z", "pause": "p", "resume": "r"}]);
        assert_eq!(
            refused(serde_json::json!({"pause": pause})),
            "pause[0].store names the store `z`, which is not declared"
        );
        let targets = serde_json::json!({"staging": {"stores": {"z": {}}}});
        assert_eq!(
            refused(serde_json::json!({"targets": targets})),
            "targets.staging.stores names the store `z`, which is not declared"
        );
        assert_eq!(refused(serde_json::json!({"stores": {}})), "the platform has no stores");
    }

    #[test]
    fn contradictions_are_refused() {
        let twice = [reference("a", "b"), reference("a", "b")];
        assert_eq!(refused(serde_json::json!({"references": twice})), "references[1] is declared twice");
        let stores = serde_json::json!({"a": {"driver": "m", "needs": ["b"]}, "b": {"driver": "m", "needs": ["a"]}});
        assert_eq!(refused(serde_json::json!({"stores": stores})), "stores need each other in a circle: a → b → a");
        let message = refused(serde_json::json!({"cut": {"level": "ordered", "accept": ["strict"]}}));
        assert_eq!(message, "cut.accept names a level that is not below cut.level");
        assert_eq!(refused(serde_json::json!({"cut": {"pauseBudget": "soon"}})), "`soon` is not a span of time");
    }

    #[test]
    fn needs_win_over_references_in_the_restore() {
        let stores = serde_json::json!({"a": {"driver": "m"}, "b": {"driver": "m", "needs": ["a"]}});
        let plan =
            BackupPlan::new(&platform(serde_json::json!({"stores": stores, "references": [reference("a", "b")]})));
        assert_eq!(names(&plan.expect("plan").restore_groups), [vec!["a"], vec!["b"]]);
    }

    #[test]
    fn the_spec_carries_what_the_machine_needs() {
        let mut warned = reference("a", "b");
        warned["policy"] = "warn".into();
        let mut allowed = reference("a", "c");
        allowed["allowMissing"] = 3.into();
        let platform = platform(serde_json::json!({"references": [warned, allowed], "cut": {"pauseBudget": "800ms"}}));
        let spec = BackupPlan::new(&platform).expect("plan").spec(RunId::from_random([1; 8]));
        assert_eq!(spec.references.iter().map(|r| r.missing_max).collect::<Vec<_>>(), [None, Some(3)]);
        assert_eq!(spec.pause_budget_micros, 800_000);
    }
}
