//! From threads that wait to a library that does not: a small runtime of the depots' own.
//!
//! Callers may themselves run inside some runtime (a driver that blocks on its own thread), where
//! waiting through the runtime would panic. So the work is handed over as a task, and the caller
//! waits on a plain channel.

use std::future::Future;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use stillpoint_core::error::{Error, Kind, Result};
use tokio::runtime::{Builder, Runtime};

/// Requests are mostly waiting; two threads keep two cores busy with encryption in transit.
const THREADS: usize = 2;

/// Chooses who does the cryptography of TLS, for the whole process. Clients cannot be made before.
pub(super) fn choose_cryptography() {
    // Whoever came first has chosen the same; there is but one in the program.
    drop(rustls::crypto::ring::default_provider().install_default());
}

fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<std::result::Result<Runtime, String>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        let builder = Builder::new_multi_thread().worker_threads(THREADS).thread_name("depot").enable_all().build();
        builder.map_err(|error| error.to_string())
    });
    made.as_ref().map_err(|error| Error::new(Kind::Exhausted, format!("cannot start threads for the bucket: {error}")))
}

/// Runs the future on the depots' runtime and waits for it, for `deadline` at most.
pub(super) fn run<T, F>(deadline: Duration, future: F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        let result = tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| Err(too_slow(deadline)));
        // A caller that has gone needs no answer.
        drop(sender.send(result));
    });
    receiver.recv().map_err(|_| Error::internal("a request to the bucket ended without an answer"))?
}

/// Starts the future without waiting.
pub(super) fn spawn<F>(future: F) -> Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    runtime()?.spawn(future);
    Ok(())
}

/// The error of a request that did not end in time.
pub(super) fn too_slow(deadline: Duration) -> Error {
    Error::new(Kind::TimedOut, format!("the bucket did not answer within {} s", deadline.as_secs())).temporary()
}
