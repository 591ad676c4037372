//! What all drains of a run share: memory and connections.
//!
//! One budget per run, so that ten stores need no more than one does. Waiting is first come, first
//! served; what is taken comes back by dropping the permit.

use std::sync::Arc;

use stillpoint_core::error::{Error, Result};
use stillpoint_core::platform::Limits;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// One unit of the memory budget, in bytes; requests are rounded up to it.
const MEMORY_UNIT_BYTES: u64 = 64 << 10;

/// The budget of one run. Clones share it.
#[derive(Debug, Clone)]
pub struct Budget {
    memory: Arc<Semaphore>,
    memory_units: u32,
    connections: Arc<Semaphore>,
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    _permit: OwnedSemaphorePermit,
}

impl Budget {
    /// A budget as the platform's limits say; at least 1 MiB and one connection.
    pub fn new(limits: &Limits) -> Self {
        let units = (limits.memory_mib.max(1) << 20).div_ceil(MEMORY_UNIT_BYTES);
        let memory_units = u32::try_from(units).unwrap_or(u32::MAX);
        Self {
            memory: Arc::new(Semaphore::new(memory_units as usize)),
            memory_units,
            connections: Arc::new(Semaphore::new(limits.connections.max(1) as usize)),
        }
    }

    /// Waits for `bytes` of memory. Asking for more than there is gets all of it.
    pub async fn memory(&self, bytes: u64) -> Result<Permit> {
        let units = u32::try_from(bytes.div_ceil(MEMORY_UNIT_BYTES)).unwrap_or(u32::MAX).clamp(1, self.memory_units);
        Self::take(&self.memory, units).await
    }

    /// Waits for a connection.
    pub async fn connection(&self) -> Result<Permit> {
        Self::take(&self.connections, 1).await
    }

    /// [`memory`](Self::memory), for threads that may block. Must not be called from async code.
    pub fn memory_blocking(&self, runtime: &tokio::runtime::Handle, bytes: u64) -> Result<Permit> {
        runtime.block_on(self.memory(bytes))
    }

    /// [`connection`](Self::connection), for threads that may block. Must not be called from async code.
    pub fn connection_blocking(&self, runtime: &tokio::runtime::Handle) -> Result<Permit> {
        runtime.block_on(self.connection())
    }

    async fn take(semaphore: &Arc<Semaphore>, permits: u32) -> Result<Permit> {
        match Arc::clone(semaphore).acquire_many_owned(permits).await {
            Ok(permit) => Ok(Permit { _permit: permit }),
            Err(_) => Err(Error::internal("a budget that is never closed was closed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn connections_wait_until_one_comes_back_and_too_large_a_request_gets_all_there_is() {
        let budget = Budget::new(&Limits { connections: 1, memory_mib: 1, ..Limits::default() });
        let first = budget.connection().await.expect("free");
        let waiting = tokio::time::timeout(Duration::from_millis(20), budget.connection()).await;
        assert!(waiting.is_err(), "the only connection is taken");
        drop(first);
        budget.connection().await.expect("free again");
        let all = budget.memory(u64::MAX).await.expect("all of it");
        assert!(tokio::time::timeout(Duration::from_millis(20), budget.memory(1)).await.is_err());
        drop(all);
        budget.memory(1).await.expect("free again");
    }
}
