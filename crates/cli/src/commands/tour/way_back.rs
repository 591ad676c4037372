//! The tour's way back: the fence that must say no, and the restore that must work.

use std::sync::Arc;

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::EnvironmentName;
use stillpoint_engine::open::Session;
use stillpoint_engine::ops::apply::RestoreReport;
use stillpoint_engine::ops::backup::BackupOutcome;
use stillpoint_engine::ops::destination::Destination;
use stillpoint_engine::ops::plan::PlanRequest;
use stillpoint_engine::ops::restore;
use stillpoint_engine::progress::Silent;

use super::scene::Scene;
use crate::app::App;

impl Scene {
    /// Tries to restore over the original and returns how it was refused.
    ///
    /// # Errors
    /// `Unproven` if it was not: then the tour must not go on.
    pub fn restore_over_source(&self, app: &App, point: &BackupOutcome) -> Result<String> {
        match self.restore(app, point, "mistake") {
            Err(error) if error.kind() == Kind::Fenced => Ok(error.to_string()),
            Err(error) => Err(error),
            Ok(_) => Err(Error::new(Kind::Unproven, "the fence let a restore go over its source")),
        }
    }

    /// Restores the point into the environment `rehearsal`.
    pub fn restore_elsewhere(&self, app: &App, point: &BackupOutcome) -> Result<RestoreReport> {
        self.restore(app, point, "rehearsal")
    }

    fn restore(&self, app: &App, point: &BackupOutcome, environment: &str) -> Result<RestoreReport> {
        let session = Session::open(&self.config)?;
        let destination = Destination::Environment(EnvironmentName::new(environment)?);
        let request = PlanRequest::new(point.statefile.point.as_str(), destination);
        app.block_on(restore::run(&session, &request, Arc::new(Silent), &app.cancel))
    }
}
