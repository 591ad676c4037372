//! Evaluates a reference: which edges lead to something, and which lead nowhere.
//!
//! Both sides come sorted by referent, so that one pass and the memory of two lines are enough,
//! whatever the size of the platform. Sorting is the engine's; nothing here keeps what it has seen.

use crate::coordinator::ReferenceCount;
use crate::driver::Edge;
use crate::error::{Error, Result};

/// How many missing referents are named.
pub const EXAMPLES_MAX: usize = 10;

/// What one reference came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Edges that were checked.
    pub checked: u64,
    /// Edges whose referent is missing.
    pub missing: u64,
    /// The first [`EXAMPLES_MAX`] of them, by referent.
    pub examples: Vec<Edge>,
    /// Different referents that are held and that no edge names; `None` if the store was only asked
    /// for those that edges name.
    pub unreferenced: Option<u64>,
}

impl Checked {
    /// The same as journals and statefiles keep it. Referents that are no text are shown in hex.
    pub fn count(&self) -> ReferenceCount {
        let examples = self.examples.iter().map(|edge| (text(&edge.referent), edge.owner.clone())).collect();
        ReferenceCount { checked: self.checked, missing: self.missing, examples, unreferenced: self.unreferenced }
    }
}

fn text(referent: &[u8]) -> String {
    std::str::from_utf8(referent).map_or_else(|_| format!("0x{}", hex::encode(referent)), str::to_owned)
}

/// Merges the edges that leave one store with the referents that another one holds.
///
/// Both must ascend by referent; repetitions are allowed on both sides. Fails with `Internal` if
/// they do not, and with whatever the iterators fail with.
pub fn merge(
    edges: impl IntoIterator<Item = Result<Edge>>,
    held: impl IntoIterator<Item = Result<Vec<u8>>>,
) -> Result<Checked> {
    let mut result = Checked::default();
    let mut held = Ascending { inner: held.into_iter(), latest: None, named: false, unreferenced: 0 };
    held.advance()?;
    let mut latest: Option<Vec<u8>> = None;
    for edge in edges {
        let edge = edge?;
        if latest.as_ref().is_some_and(|latest| *latest > edge.referent) {
            return Err(unsorted("edges"));
        }
        if latest.as_ref() != Some(&edge.referent) {
            latest = Some(edge.referent.clone());
        }
        result.checked += 1;
        while held.latest.as_ref().is_some_and(|held| *held < edge.referent) {
            held.advance()?;
        }
        if held.latest.as_ref() == Some(&edge.referent) {
            held.named = true;
            continue;
        }
        result.missing += 1;
        if result.examples.len() < EXAMPLES_MAX {
            result.examples.push(edge);
        }
    }
    while held.latest.is_some() {
        held.advance()?;
    }
    result.unreferenced = Some(held.unreferenced);
    Ok(result)
}

/// The held side: one referent at a time, repetitions passed over, those without an edge counted.
struct Ascending<I> {
    inner: I,
    latest: Option<Vec<u8>>,
    named: bool,
    unreferenced: u64,
}

impl<I: Iterator<Item = Result<Vec<u8>>>> Ascending<I> {
    fn advance(&mut self) -> Result<()> {
        loop {
            let next = self.inner.next().transpose()?;
            match (&self.latest, &next) {
                (Some(latest), Some(next)) if next == latest => continue,
                (Some(latest), Some(next)) if next < latest => return Err(unsorted("referents")),
                _ => {}
            }
            if self.latest.is_some() && !self.named {
                self.unreferenced += 1;
            }
            self.latest = next;
            self.named = false;
            return Ok(());
        }
    }
}

fn unsorted(what: &str) -> Error {
    Error::internal(format!("the {what} of a reference are not sorted"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn edge(referent: &[u8]) -> Edge {
        Edge { referent: referent.to_vec(), owner: format!("row {}", String::from_utf8_lossy(referent)) }
    }

    fn run(edges: &[&str], held: &[&str]) -> Checked {
        let edges = edges.iter().map(|text| Ok(edge(text.as_bytes())));
        merge(edges, held.iter().map(|text| Ok(text.as_bytes().to_vec()))).expect("sorted")
    }

    #[test]
    fn a_missing_referent_is_named_with_its_owner() {
        let checked = run(&["a", "b", "b", "d"], &["a", "a", "c", "d"]);
        assert_eq!((checked.checked, checked.missing, checked.unreferenced), (4, 2, Some(1)));
        assert_eq!(checked.examples[0].owner, "row b");
    }

    #[test]
    fn either_side_may_be_empty() {
        assert_eq!(run(&[], &[]), Checked { unreferenced: Some(0), ..Checked::default() });
        assert_eq!(run(&[], &["a", "b"]).unreferenced, Some(2));
        assert_eq!(run(&["a", "b"], &[]).missing, 2);
    }

    #[test]
    fn examples_are_bounded() {
        let edges = (0..100_u8).map(|byte| Ok(edge(&[byte])));
        let checked = merge(edges, []).expect("sorted");
        assert_eq!((checked.missing, checked.examples.len()), (100, EXAMPLES_MAX));
    }

    #[test]
    fn unsorted_input_is_noticed() {
        let held = |names: &[&[u8]]| names.iter().map(|name| Ok(name.to_vec())).collect::<Vec<Result<_>>>();
        assert!(merge([Ok(edge(b"b")), Ok(edge(b"a"))], held(&[b"0"])).is_err());
        assert!(merge([Ok(edge(b"z"))], held(&[b"b", b"a"])).is_err());
    }

    #[test]
    fn a_failing_side_fails_the_whole() {
        assert!(merge([Err(Error::internal("x"))], []).is_err());
        assert!(merge([], [Err(Error::internal("x"))]).is_err());
    }

    proptest! {
        #[test]
        fn the_merge_says_what_sets_say(mut edges: Vec<u8>, mut held: Vec<u8>) {
            edges.sort_unstable();
            held.sort_unstable();
            let checked = merge(edges.iter().map(|b| Ok(edge(&[*b]))), held.iter().map(|b| Ok(vec![*b]))).expect("sorted");
            let missing = edges.iter().filter(|byte| !held.contains(byte)).count() as u64;
            held.dedup();
            let unreferenced = held.iter().filter(|byte| !edges.contains(byte)).count() as u64;
            prop_assert_eq!((checked.checked, checked.missing), (edges.len() as u64, missing));
            prop_assert_eq!(checked.unreferenced, Some(unreferenced));
        }
    }
}
