//! The journal of a restore, in the bucket under `restores/<name>/`.
//!
//! `plan.json` first, then one small numbered object per step, `report.json` last. Each is written
//! once and only if absent, so two processes that carry out one plan notice each other; each is
//! authenticated with the repository's key, so nobody who merely writes to the bucket can make a
//! restore skip a step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::plan::restore::PlanHash;
use stillpoint_repo::Repository;
use stillpoint_repo::depot::{Depot, WriteMode};

use super::{RestoreReport, StoreReport};
use crate::open::Session;

/// What the keyed hash is made for.
const PURPOSE: &str = "restore";
/// Where restores lie in the bucket.
const PREFIX: &str = "restores/";
/// How often one plan can be carried out from its begin.
const ROUNDS_MAX: u32 = 10_000;

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub(super) enum Line {
    /// The store is about to be written.
    Begun {
        /// The store.
        store: StoreName,
        /// When.
        at: Timestamp,
    },
    /// The try that began last found the target taken by somebody else, and ended there.
    Refused {
        /// The store.
        store: StoreName,
        /// When.
        at: Timestamp,
    },
    /// The store is written and bears its stamp.
    Stamped {
        /// The store.
        store: StoreName,
        /// When.
        at: Timestamp,
    },
    /// Nothing more will be done to the store.
    Done {
        /// When.
        at: Timestamp,
        /// What became of it.
        report: Box<StoreReport>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    restore: String,
    hash: PlanHash,
    plan: RestorePlan,
    began_at: Timestamp,
}

/// An object with its keyed hash.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    body: serde_json::Value,
    authentication: String,
}

/// The journal of one restore.
pub(super) struct Record {
    bucket: Arc<dyn Depot>,
    repository: Repository,
    name: String,
    head: Option<Head>,
    next: Mutex<u32>,
    /// How often each store was begun.
    begun: BTreeMap<StoreName, u32>,
    stamped: BTreeSet<StoreName>,
    done: BTreeMap<StoreName, StoreReport>,
}

impl Record {
    /// Finds the unfinished restore of this plan, or names a new one. Writes nothing.
    pub(super) fn open(session: &Session, plan: &RestorePlan, hash: &PlanHash) -> Result<Self> {
        for round in 1..=ROUNDS_MAX {
            let name = format!("{}-{round}", hash.short());
            let mut record = Self {
                bucket: Arc::clone(session.bucket()),
                repository: session.repository().clone(),
                name,
                head: None,
                next: Mutex::new(1),
                begun: BTreeMap::new(),
                stamped: BTreeSet::new(),
                done: BTreeMap::new(),
            };
            let Some(head) = record.read::<Head>("plan.json")? else {
                let (restore, began_at) = (record.name.clone(), Timestamp::now());
                record.head = Some(Head { restore, hash: hash.clone(), plan: plan.clone(), began_at });
                return Ok(record);
            };
            // A round that restored all is over; one that did not is gone on with.
            let ended: Option<RestoreReport> = record.read("report.json")?;
            if head.hash == *hash && !ended.is_some_and(|report| report.proven || report.restored) {
                record.replay()?;
                return Ok(record);
            }
        }
        Err(Error::new(Kind::Exhausted, "this plan was carried out too often").hint("make a new one"))
    }

    fn replay(&mut self) -> Result<()> {
        let mut number = 1;
        while let Some(line) = self.read::<Line>(&line_name(number))? {
            match line {
                Line::Begun { store, .. } => {
                    self.done.remove(&store);
                    self.stamped.remove(&store);
                    *self.begun.entry(store).or_default() += 1;
                }
                Line::Refused { store, .. } => {
                    let tries = self.begun.entry(store).or_default();
                    *tries = tries.saturating_sub(1);
                }
                Line::Stamped { store, .. } => {
                    self.stamped.insert(store);
                }
                Line::Done { report, .. } if report.is_good() => {
                    self.done.insert(report.store.clone(), *report);
                }
                Line::Done { report, .. } => {
                    self.stamped.remove(&report.store);
                }
            }
            number += 1;
        }
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = number;
        Ok(())
    }

    /// Writes the head of a new restore.
    pub(super) fn begin(mut self) -> Result<Self> {
        if let Some(head) = self.head.take() {
            self.write("plan.json", &head, &WriteMode::Create)?;
        }
        Ok(self)
    }

    /// The restore's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The stores whose targets this restore has begun to write, earlier.
    pub(super) fn begun(&self) -> BTreeSet<StoreName> {
        self.begun.keys().cloned().collect()
    }

    /// How often this store was begun, earlier.
    pub(super) fn attempts(&self, store: &StoreName) -> u32 {
        self.begun.get(store).copied().unwrap_or_default()
    }

    /// Whether an earlier process has written and stamped this store, and only the comparison is
    /// left.
    pub(super) fn is_stamped(&self, store: &StoreName) -> bool {
        self.stamped.contains(store)
    }

    /// What an earlier process did to this store, if it is done.
    pub(super) fn done(&self, store: &StoreName) -> Option<&StoreReport> {
        self.done.get(store)
    }

    /// Writes the next line. Durable when it returns.
    ///
    /// # Errors
    /// `Locked` if another process has written that line.
    pub(super) fn append(&self, line: &Line) -> Result<()> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&line_name(*next), line, &WriteMode::Create)?;
        *next += 1;
        Ok(())
    }

    /// Writes the report. Of two attempts that did not succeed, the later one is kept.
    pub(super) fn end(&self, report: &RestoreReport) -> Result<()> {
        self.write("report.json", report, &WriteMode::Replace)
    }

    fn write<T: Serialize>(&self, name: &str, body: &T, mode: &WriteMode) -> Result<()> {
        let fault = |e| Error::internal("a journal line does not serialize").source(e);
        let body = serde_json::to_value(body).map_err(fault)?;
        let authentication = self.authenticate(name, &body)?;
        let bytes = serde_json::to_vec_pretty(&Sealed { body, authentication }).map_err(fault)?;
        match self.bucket.write(&self.path(name), &[&bytes], mode) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == Kind::AlreadyExists => {
                Err(Error::new(Kind::Locked, "another process carries out the same plan")
                    .context("restore", &self.name)
                    .hint("wait for it; it can be gone on with if it stops")
                    .source(error))
            }
            Err(error) => Err(error.operation("restore journal")),
        }
    }

    fn read<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let path = self.path(name);
        let bytes = match self.bucket.read(&path) {
            Ok((bytes, _)) => bytes,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error.operation("restore journal")),
        };
        let corrupt = |message: &str| {
            Error::new(Kind::Corrupt, message)
                .context("object", &path)
                .hint("move this restore's folder away and make a new plan")
        };
        let sealed: Sealed =
            serde_json::from_slice(&bytes).map_err(|e| corrupt("the restore journal is not readable").source(e))?;
        if self.authenticate(name, &sealed.body)? != sealed.authentication {
            return Err(corrupt("the restore journal was not written with this repository's key"));
        }
        serde_json::from_value(sealed.body)
            .map(Some)
            .map_err(|e| corrupt("the restore journal is not readable").source(e))
    }

    fn path(&self, name: &str) -> String {
        format!("{PREFIX}{}/{name}", self.name)
    }

    /// The name is covered too, so that lines cannot be moved.
    fn authenticate(&self, name: &str, body: &serde_json::Value) -> Result<String> {
        let bytes = serde_json::to_vec(&(self.path(name), body))
            .map_err(|e| Error::internal("a journal line does not serialize").source(e))?;
        Ok(hex::encode(self.repository.authenticate(PURPOSE, &bytes)))
    }
}

fn line_name(number: u32) -> String {
    format!("{number:04}.json")
}
