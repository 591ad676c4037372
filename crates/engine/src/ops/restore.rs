//! `restore`: plan and apply in one, for the simple case.
//!
//! The same plan, the same fence: what `apply` would refuse is refused here.

use std::sync::Arc;

use stillpoint_core::error::Result;

use super::apply::{self, ApplyRequest, RestoreReport};
use super::destination::Destination;
use super::plan::{self, PlanRequest};
use crate::cancel::CancelToken;
use crate::fence;
use crate::open::Session;
use crate::progress::Progress;

/// Restores.
///
/// # Errors
/// `Fenced` if the fence finds anything; otherwise those of [`plan::run`] and [`apply::run`].
pub async fn run(
    session: &Session,
    request: &PlanRequest,
    progress: Arc<dyn Progress>,
    cancel: &CancelToken,
) -> Result<RestoreReport> {
    let planned = plan::run(session, request, cancel).await?;
    fence::refuse(&planned.fence)?;
    let typed = match &request.destination {
        Destination::InPlace { typed } => typed.clone(),
        _ => Vec::new(),
    };
    let request = ApplyRequest { plan: planned.plan, hash: planned.hash, typed };
    apply::run(session, &request, progress, cancel).await
}
