//! DRAIN and SEAL: from the pins to the commit, and the statefile made of what the journal tells.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::cut::level_name;
use super::effect::Action;
use super::event::{Failure, Outcome, ReferenceCount, StoreDrained};
use super::{Coordinator, State};
use crate::driver::Pin;
use crate::error::{Error, Kind, Result};
use crate::id::{EnvironmentName, PlatformName, PointId, StoreName};
use crate::statefile::{ReferenceState, SCHEMA, Statefile, StoreState, Totals};

/// What a statefile says that the machine does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatefileHead {
    /// The point.
    pub point: PointId,
    /// The platform.
    pub platform: PlatformName,
    /// The environment.
    pub environment: EnvironmentName,
    /// All stores of the platform, also those that this run does not take.
    pub platform_stores: BTreeSet<StoreName>,
    /// The point whose content served as the parent, if any.
    pub parent: Option<PointId>,
    /// When the run began.
    pub started_at: Timestamp,
    /// When the statefile is written.
    pub sealed_at: Timestamp,
    /// The version of stillpoint.
    pub tool_version: String,
    /// The number of the lease under which the run writes.
    pub fencing: u64,
}

impl Coordinator {
    pub(super) fn begin_drain(&mut self) {
        self.state = State::Draining;
        for (store, pin) in self.pins() {
            self.ask(Action::Drain { store, pin });
        }
    }

    fn pins(&self) -> Vec<(StoreName, Box<Pin>)> {
        let pinned = self.stores.iter().filter_map(|(store, record)| Some((store, record.pinned.as_ref()?)));
        pinned.map(|(store, pinned)| (store.clone(), Box::new(pinned.pin.clone()))).collect()
    }

    pub(super) fn note_drained(&mut self, store: &StoreName, drained: StoreDrained) {
        if let (Some(loss), false) = (drained.drained.losses.first(), self.spec.accept_named_loss) {
            let count = drained.drained.losses.len();
            let message = format!("{count} named losses, the first one is `{}`: {}", loss.what, loss.why);
            let mut failure = Failure::new(Kind::Unproven, message);
            failure.operation = Some("drain".to_owned());
            failure.store = Some(store.as_str().to_owned());
            failure.hint = Some("set cut.acceptNamedLoss to keep such points".to_owned());
            self.fail(failure);
        }
        self.record(store).drained = Some(drained);
    }

    pub(super) fn begin_seal(&mut self) {
        self.state = State::CheckingReferences;
        self.check_references();
    }

    /// Starts every reference whose two stores are free; after the last one the pins are checked.
    pub(super) fn check_references(&mut self) {
        let mut under_way: Vec<u32> = Vec::new();
        for pending in self.pending.values() {
            if let Action::CheckReference { reference } = pending.action {
                under_way.push(reference);
            }
        }
        let mut busy: Vec<StoreName> = Vec::new();
        for reference in &under_way {
            let spec = &self.spec.references[*reference as usize];
            busy.extend([spec.from.clone(), spec.to.clone()]);
        }
        for index in 0..self.references.len() {
            let spec = &self.spec.references[index];
            let reference = index as u32;
            let waits = self.references[index].is_none() && !under_way.contains(&reference);
            if waits && !busy.contains(&spec.from) && !busy.contains(&spec.to) {
                busy.extend([spec.from.clone(), spec.to.clone()]);
                self.ask(Action::CheckReference { reference });
            }
        }
        if !self.is_working() {
            self.state = State::CheckingPins;
            for (store, pin) in self.pins() {
                self.ask(Action::CheckPin { store, pin });
            }
        }
    }

    pub(super) fn note_reference(&mut self, reference: u32, count: ReferenceCount) {
        let index = reference as usize;
        let Some(spec) = self.spec.references.get(index) else { return };
        if spec.missing_max.is_some_and(|max| count.missing > max) {
            let (from, to, kind) = (&spec.from, &spec.to, &spec.kind);
            let mut message =
                format!("{} of {} references to {kind} of `{to}` lead nowhere", count.missing, count.checked);
            if let Some((referent, owner)) = count.examples.first() {
                message.push_str(&format!(", e.g. `{referent}` named by {owner}"));
            }
            let mut failure = Failure::new(Kind::Unproven, message);
            failure.operation = Some("references".to_owned());
            failure.store = Some(from.as_str().to_owned());
            failure.hint = Some("repair the rows, or raise allowMissing of this reference".to_owned());
            self.fail(failure);
        }
        self.references[index] = Some(count);
    }

    pub(super) fn note_validity(&mut self, store: &StoreName, outcome: Outcome) {
        if let Outcome::PinLost { reason } = outcome {
            let mut failure = Failure::new(Kind::PinLost, format!("the pinned view was lost: {reason}"));
            failure.operation = Some("still_valid".to_owned());
            failure.store = Some(store.as_str().to_owned());
            failure.hint = Some("nothing was sealed; run the backup again".to_owned());
            self.fail(failure);
        } else {
            self.record(store).pin_checked = true;
        }
    }

    pub(super) fn write_snapshot(&mut self) {
        let unchecked = self.stores.iter().find(|(_, record)| !record.pin_checked || record.drained.is_none());
        if let Some((store, _)) = unchecked {
            let mut failure = Failure::new(Kind::Internal, "a store would be sealed without a valid pin");
            failure.store = Some(store.as_str().to_owned());
            self.fail(failure);
            return;
        }
        self.state = State::WritingSnapshot;
        self.ask(Action::WriteSnapshot);
    }

    pub(super) fn write_statefile(&mut self) {
        self.state = State::Committing;
        self.ask(Action::WriteStatefile);
    }

    /// The statefile of this run, without authentication. Fails before the snapshot is written.
    pub fn statefile(&self, head: StatefileHead) -> Result<Statefile> {
        let early = || Error::internal("the statefile was asked for before the snapshot was written");
        let cut = self.cut.as_ref().ok_or_else(early)?;
        let (snapshot, bytes_stored) = self.snapshot.clone().ok_or_else(early)?;
        let mut totals = Totals { bytes_stored, ..Totals::default() };
        let mut stores = std::collections::BTreeMap::new();
        let mut cut_at = head.started_at;
        let begin = self.stores.values().filter_map(|r| r.pinned.as_ref()).map(|p| p.between.0).min();
        for (store, record) in &self.stores {
            let probe = record.probe.as_ref().ok_or_else(early)?;
            let pinned = record.pinned.as_ref().ok_or_else(early)?;
            let drained = record.drained.as_ref().ok_or_else(early)?;
            let since = |at: super::Micros| at.since(begin.unwrap_or(at));
            cut_at = cut_at.max(pinned.between_utc.1);
            totals.files += drained.files;
            totals.bytes += drained.bytes;
            totals.bytes_read += drained.drained.bytes_read;
            let driver = probe.identity.driver.clone();
            let state = StoreState {
                driver,
                version: probe.version.clone(),
                identity: probe.identity.clone(),
                position: pinned.pin.position.clone(),
                pinned_micros: (since(pinned.between.0), since(pinned.between.1)),
                pinned_at: pinned.between_utc,
                files: drained.files,
                bytes: drained.bytes,
                items: drained.drained.items,
                unit: drained.drained.unit.clone(),
                checksums: drained.drained.checksums.clone(),
                losses: drained.drained.losses.clone(),
                notes: drained.drained.notes.clone(),
            };
            stores.insert(store.clone(), state);
        }
        Ok(Statefile {
            schema: SCHEMA.to_owned(),
            point: head.point,
            run: self.spec.run.clone(),
            platform: head.platform,
            environment: head.environment,
            verdict: self.verdict(),
            level: cut.level,
            level_asked: self.spec.level,
            cut_at,
            skew_micros: cut.skew_micros,
            pause_micros: self.pause_micros(),
            cut_tries: cut.tries,
            started_at: head.started_at,
            sealed_at: head.sealed_at,
            snapshot,
            parent: head.parent,
            left_out: head.platform_stores.into_iter().filter(|store| !stores.contains_key(store)).collect(),
            stores,
            references: self.reference_states(),
            totals,
            tool_version: head.tool_version,
            fencing: head.fencing,
            authentication: String::new(),
        })
    }

    /// What the references came to, as the statefile keeps it.
    fn reference_states(&self) -> Vec<ReferenceState> {
        let counted = self.spec.references.iter().zip(&self.references);
        counted
            .filter_map(|(spec, count)| {
                let count = count.as_ref()?;
                Some(ReferenceState {
                    from: spec.from.clone(),
                    to: spec.to.clone(),
                    kind: spec.kind.clone(),
                    checked: count.checked,
                    missing: count.missing,
                    examples: count.examples.clone(),
                    unreferenced: count.unreferenced,
                })
            })
            .collect()
    }

    /// One line for people about what the run aims at and has reached.
    pub fn summary(&self) -> String {
        let reached = self.cut.as_ref().map_or("no cut yet", |cut| level_name(cut.level));
        format!("{}: asked {}, reached {reached}", self.state.phase(), level_name(self.spec.level))
    }
}
