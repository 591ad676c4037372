//! What a run of the suite came to, for tests and for `stillpoint driver check`.

use std::fmt;

/// What became of one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The duty is met.
    Passed,
    /// It is not; the text says what was seen.
    Failed(String),
    /// The case does not apply; the text says why.
    Skipped(String),
}

/// One case and its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The case's name, as `docs/driver-spec.md` has it.
    pub name: &'static str,
    /// The duty in one sentence.
    pub duty: &'static str,
    /// What became of it.
    pub outcome: Outcome,
}

/// All cases of one run, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The cases.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether no case failed.
    pub fn is_clean(&self) -> bool {
        !self.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    /// Panics with the whole report if a case failed; names the skipped ones on stderr otherwise.
    ///
    /// # Panics
    /// When a case failed, which is what a test wants.
    pub fn assert_clean(&self, driver: &str) {
        assert!(self.is_clean(), "driver `{driver}` breaks its contract:\n{self}");
        for row in &self.rows {
            if let Outcome::Skipped(reason) = &row.outcome {
                crate::skip(&format!("{driver} conformance {}", row.name), reason);
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            match &row.outcome {
                Outcome::Passed => writeln!(f, "passed   {}", row.name)?,
                Outcome::Skipped(reason) => writeln!(f, "skipped  {}: {reason}", row.name)?,
                Outcome::Failed(seen) => writeln!(f, "FAILED   {}: {}\n         {seen}", row.name, row.duty)?,
            }
        }
        Ok(())
    }
}
