//! Orders of stores: which is pinned first, which is restored first.
//!
//! Both are layers of a directed graph; a circle is named store by store, because "there is a
//! cycle" helps nobody who has forty stores.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::StoreName;

/// `before` comes before `after`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence {
    /// The one that comes first.
    pub before: StoreName,
    /// The one that comes later.
    pub after: StoreName,
}

/// Stores that come before each other in a circle, each once; the first also follows the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Circle(pub Vec<StoreName>);

impl std::fmt::Display for Circle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for store in &self.0 {
            write!(f, "{store} → ")?;
        }
        match self.0.first() {
            Some(first) => write!(f, "{first}"),
            None => Ok(()),
        }
    }
}

/// Groups of stores such that every precedence leads from an earlier group to a later one. A store
/// stands in the earliest group that it can stand in; groups are sorted by name.
pub fn layers(stores: &BTreeSet<StoreName>, precedences: &[Precedence]) -> Result<Vec<Vec<StoreName>>, Circle> {
    let mut waits_for: BTreeMap<&StoreName, BTreeSet<&StoreName>> =
        stores.iter().map(|store| (store, BTreeSet::new())).collect();
    for Precedence { before, after } in precedences {
        if stores.contains(before)
            && let Some(waits) = waits_for.get_mut(after)
        {
            waits.insert(before);
        }
    }
    let mut layers: Vec<Vec<StoreName>> = Vec::new();
    while !waits_for.is_empty() {
        let free: Vec<&StoreName> =
            waits_for.iter().filter(|(_, waits)| waits.is_empty()).map(|(store, _)| *store).collect();
        if free.is_empty() {
            return Err(find_circle(&waits_for));
        }
        for store in &free {
            waits_for.remove(store);
        }
        for waits in waits_for.values_mut() {
            for store in &free {
                waits.remove(store);
            }
        }
        layers.push(free.into_iter().cloned().collect());
    }
    Ok(layers)
}

/// Walks against the precedences until a store comes twice. Every store left waits for another
/// one that is left, so the walk cannot end elsewhere.
fn find_circle(waits_for: &BTreeMap<&StoreName, BTreeSet<&StoreName>>) -> Circle {
    let mut path: Vec<&StoreName> = Vec::new();
    let mut next = waits_for.keys().next().copied();
    while let Some(store) = next {
        if let Some(begin) = path.iter().position(|seen| *seen == store) {
            let mut circle: Vec<StoreName> = path[begin..].iter().rev().map(|store| (*store).clone()).collect();
            let smallest = circle.iter().enumerate().min_by_key(|(_, store)| *store).map_or(0, |(index, _)| index);
            circle.rotate_left(smallest);
            return Circle(circle);
        }
        path.push(store);
        next = waits_for.get(store).and_then(|waits| waits.first()).copied();
    }
    Circle(path.into_iter().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> StoreName {
        StoreName::new(text).expect("valid")
    }

    fn order(stores: &str, precedences: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let stores = stores.split(' ').map(name).collect();
        let precedences: Vec<_> =
            precedences.iter().map(|(a, b)| Precedence { before: name(a), after: name(b) }).collect();
        let layers = layers(&stores, &precedences).map_err(|circle| circle.to_string())?;
        Ok(layers.iter().map(|l| l.iter().map(StoreName::as_str).collect::<Vec<_>>().join(" ")).collect())
    }

    #[test]
    fn stores_stand_as_early_as_they_can() {
        assert_eq!(order("a b c", &[]).expect("acyclic"), ["a b c"]);
        assert_eq!(order("a b c d", &[("c", "a"), ("a", "b")]).expect("acyclic"), ["c d", "a", "b"]);
        assert_eq!(
            order("a b c", &[("a", "b"), ("a", "c"), ("b", "c"), ("a", "b")]).expect("acyclic"),
            ["a", "b", "c"]
        );
    }

    #[test]
    fn a_circle_is_named_in_its_direction() {
        assert_eq!(
            order("a b c d", &[("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]),
            Err("a → b → c → a".to_owned())
        );
        assert_eq!(order("a b", &[("b", "b")]), Err("b → b".to_owned()));
    }
}
