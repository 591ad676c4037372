//! Evaluates a reference on two stores: every edge that leaves one, against what the other holds.
//!
//! Both sides are sorted outside memory and merged in one pass, so ten million edges need no more
//! memory than ten thousand. What a missing referent means for the run is not decided here.

pub(crate) mod command;
mod sort;
#[cfg(test)]
mod tests;

use std::path::Path;

use stillpoint_core::driver::{Context, Driver, Edge, EdgeQuery, Pin};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::Reference;
use stillpoint_core::reference::{Checked, merge};
use tokio::runtime::Handle;

use sort::{Sorted, Sorter};

/// Memory for sorting one side; two sides are sorted at the same time.
const SORT_BYTES_MAX: usize = 64 << 20;

/// Referents per [`EdgeQuery::Which`], as the contract allows.
const WHICH_MAX: usize = 10_000;

/// How many edges pass between two looks at whether to stop.
const CHECK_EVERY: u64 = 4_096;

/// A store, and its pin; without a pin the live store is asked.
pub type Side<'a> = (&'a dyn Driver, Option<&'a Pin>);

/// What `reference` will ask of `store`'s pin; a program asks for itself.
pub(crate) fn queries_of(reference: &Reference, store: &StoreName) -> impl Iterator<Item = EdgeQuery> {
    let leaves = reference.from == *store && command::line_of(&reference.query).is_none();
    let from = leaves.then(|| EdgeQuery::From(reference.query.clone()));
    let to = (reference.to == *store).then(|| EdgeQuery::Held(reference.kind.clone()));
    from.into_iter().chain(to)
}

/// Evaluates `reference` from one store to the other. Blocks; call it on a thread of its own.
///
/// `scratch` takes the temporary files, which are gone when the call returns. `environment` is whose
/// stores these are, for programs that name edges.
///
/// # Errors
/// Those of the drivers; `Unsupported` if one of them has no edges at all.
pub fn check(
    reference: &Reference,
    environment: &str,
    from: Side<'_>,
    to: Side<'_>,
    scratch: &Path,
    context: &Context,
    runtime: &Handle,
) -> Result<Checked> {
    Evaluation { environment, context, runtime, scratch, bytes_max: SORT_BYTES_MAX }.run(reference, from, to)
}

struct Evaluation<'a> {
    environment: &'a str,
    context: &'a Context,
    runtime: &'a Handle,
    scratch: &'a Path,
    bytes_max: usize,
}

impl Evaluation<'_> {
    fn run(&self, reference: &Reference, from: Side<'_>, to: Side<'_>) -> Result<Checked> {
        let leaving = || self.leaving(reference, from);
        let held = || self.asked(to, &EdgeQuery::Held(reference.kind.clone()), false);
        // Calls on one store never overlap.
        let same = std::ptr::addr_eq(std::ptr::from_ref(from.0), std::ptr::from_ref(to.0));
        let (edges, held) = if same {
            (leaving(), held())
        } else {
            std::thread::scope(|scope| {
                let other = scope.spawn(held);
                let edges = leaving();
                let held = other.join().unwrap_or_else(|_| Err(Error::internal("a driver panicked in `edges`")));
                (edges, held)
            })
        };
        let edges = edges.map_err(|error| error.store(reference.from.as_str()).operation("references"))?;
        let at_target = |error: Error| error.store(reference.to.as_str()).operation("references");
        match held {
            Ok(held) => merge_sorted(&edges, &held, true),
            Err(error) if error.kind() == Kind::Unsupported => {
                let held = self.looked_up(to, &reference.kind, &edges).map_err(at_target)?;
                merge_sorted(&edges, &held, false)
            }
            Err(error) => Err(at_target(error)),
        }
    }

    /// The edges that leave a store, as its driver or a program names them.
    fn leaving(&self, reference: &Reference, from: Side<'_>) -> Result<Sorted> {
        let Some(line) = command::line_of(&reference.query) else {
            return self.asked(from, &EdgeQuery::From(reference.query.clone()), true);
        };
        let view = command::View { store: reference.from.as_str(), environment: self.environment, pin: from.1 };
        self.sorted(true, |visit| command::edges(line, &view, self.context, visit))
    }

    /// Everything that a driver yields, sorted by referent.
    fn asked(&self, side: Side<'_>, query: &EdgeQuery, owners: bool) -> Result<Sorted> {
        self.sorted(owners, |visit| self.runtime.block_on(side.0.edges(self.context, side.1, query, visit)))
    }

    fn sorted(
        &self,
        owners: bool,
        yield_edges: impl FnOnce(&mut (dyn FnMut(Edge) -> Result<()> + Send)) -> Result<()>,
    ) -> Result<Sorted> {
        let mut sorter = Sorter::new(self.scratch, self.bytes_max);
        let mut count = 0_u64;
        let mut visit = |edge: Edge| {
            count += 1;
            if count.is_multiple_of(CHECK_EVERY) {
                self.context.check()?;
            }
            sorter.push(&edge.referent, if owners { edge.owner.as_bytes() } else { b"" })
        };
        yield_edges(&mut visit)?;
        sorter.finish()
    }

    /// What the store holds of the referents that the edges name, for stores that cannot list.
    fn looked_up(&self, side: Side<'_>, kind: &str, edges: &Sorted) -> Result<Sorted> {
        let mut found = Sorter::new(self.scratch, self.bytes_max);
        let mut batch: Vec<Vec<u8>> = Vec::new();
        for record in edges.iter()? {
            let referent = record?.0;
            if batch.last() == Some(&referent) {
                continue;
            }
            if batch.len() == WHICH_MAX {
                self.look_up(side, kind, std::mem::take(&mut batch), &mut found)?;
            }
            batch.push(referent);
        }
        if !batch.is_empty() {
            self.look_up(side, kind, batch, &mut found)?;
        }
        found.finish()
    }

    fn look_up(&self, side: Side<'_>, kind: &str, referents: Vec<Vec<u8>>, found: &mut Sorter) -> Result<()> {
        self.context.check()?;
        let query = EdgeQuery::Which { kind: kind.to_owned(), referents };
        let mut visit = |edge: Edge| found.push(&edge.referent, b"");
        self.runtime.block_on(side.0.edges(self.context, side.1, &query, &mut visit))
    }
}

/// `listed` says whether `held` is everything that the store holds, or only what was asked for.
fn merge_sorted(edges: &Sorted, held: &Sorted, listed: bool) -> Result<Checked> {
    let edges = edges.iter()?.map(|record| {
        let (referent, owner) = record?;
        Ok(Edge { referent, owner: String::from_utf8_lossy(&owner).into_owned() })
    });
    let held = held.iter()?.map(|record| Ok(record?.0));
    let mut checked = merge(edges, held)?;
    if !listed {
        checked.unreferenced = None;
    }
    Ok(checked)
}
