//! How the operator stops a run: once for an orderly end.
//!
//! The CLI owns signals and calls [`CancelToken::cancel`] at the first one; at the second it exits
//! and leaves the journal and the watchdog to do the rest.

use std::sync::Arc;

use stillpoint_core::{Error, Kind, Result};
use tokio::sync::watch;

/// Asks a run to stop; clones share the request.
#[derive(Debug, Clone)]
pub struct CancelToken {
    sender: Arc<watch::Sender<bool>>,
}

impl Default for CancelToken {
    fn default() -> Self {
        Self { sender: Arc::new(watch::Sender::new(false)) }
    }
}

impl CancelToken {
    /// Asks for an orderly stop. Repeating it changes nothing.
    pub fn cancel(&self) {
        self.sender.send_replace(true);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        *self.sender.borrow()
    }

    /// Fails with `Cancelled` once a stop was asked for.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::new(Kind::Cancelled, "stopped on request")) } else { Ok(()) }
    }

    /// Returns as soon as a stop is asked for; at once if it was.
    pub async fn cancelled(&self) {
        let mut receiver = self.sender.subscribe();
        // The sender lives in `self`, so waiting can only end with the value itself.
        if receiver.wait_for(|cancelled| *cancelled).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
