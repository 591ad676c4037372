//! The first error of a backup: it stops every thread, and every caller hears of it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

/// Set once, never cleared.
#[derive(Debug, Default)]
pub(super) struct Failure {
    failed: AtomicBool,
    first: Mutex<Option<Error>>,
    context: Context,
}

impl Failure {
    pub(super) fn new(context: Context) -> Self {
        Self { context, ..Self::default() }
    }

    /// Records an error; the first counts.
    pub(super) fn set(&self, error: Error) {
        self.lock().get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    /// Fails if the backup has failed or was cancelled.
    pub(super) fn check(&self) -> Result<()> {
        self.context.check()?;
        if self.failed.load(Ordering::Acquire) { Err(self.error()) } else { Ok(()) }
    }

    /// The first error again, as far as an error can be told twice.
    fn error(&self) -> Error {
        match &*self.lock() {
            Some(first) => {
                let mut error = Error::new(first.kind(), first.to_string()).status(first.status_value());
                if let Some(hint) = first.hint_text() {
                    error = error.hint(hint);
                }
                match std::error::Error::source(first) {
                    Some(source) => error.source(source.to_string()),
                    None => error,
                }
            }
            None => Error::new(Kind::Internal, "the backup was stopped"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Error>> {
        self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Turns the panic of a thread into a failure of the backup, so that nobody waits for it.
pub(super) struct PanicGuard<'f>(pub(super) &'f Failure);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set(Error::internal("a thread of the backup panicked"));
        }
    }
}
