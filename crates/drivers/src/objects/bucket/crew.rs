//! Threads that each do one piece of work after the other and mostly wait; and the memory that they
//! share. Knows no service.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};

/// Does `work` for everything that `feed` hands out, by so many threads. Returns the sum of what the
/// pieces return. After the first failure nothing new is begun, and that failure is returned.
pub(in super::super) fn each<T: Send>(
    threads: usize,
    context: &Context,
    feed: impl FnOnce(&mut dyn FnMut(T) -> Result<()>) -> Result<()>,
    work: impl Fn(T) -> Result<u64> + Sync,
) -> Result<u64> {
    let done = Mutex::new((0u64, None::<Error>));
    let (sender, receiver) = sync_channel::<T>(threads * 4);
    let receiver = Mutex::new(receiver);
    let has_failed = || done.lock().expect("no holder panics").1.is_some();
    let fed = std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = receiver.lock().expect("no holder panics").recv();
                    let Ok(next) = next else { return };
                    if has_failed() {
                        continue;
                    }
                    let result = context.check().and_then(|()| work(next));
                    let mut done = done.lock().expect("no holder panics");
                    match result {
                        Ok(count) => done.0 += count,
                        Err(error) => done.1 = done.1.take().or(Some(error)),
                    }
                }
            });
        }
        let sender = sender;
        feed(&mut |piece| {
            context.check()?;
            if has_failed() {
                return Err(Error::new(Kind::Cancelled, "another piece failed"));
            }
            sender.send(piece).map_err(|_| Error::internal("all threads ended early"))
        })
    });
    let (sum, failure) = done.into_inner().expect("no holder panics");
    match failure {
        Some(error) => Err(error),
        None => fed.map(|()| sum),
    }
}

/// One value that a task owes a thread: who pays it, and who waits for it.
pub(in super::super) fn owed<T>() -> (Debt<T>, Owed<T>) {
    let (sender, receiver) = sync_channel(1);
    (Debt(sender), Owed(receiver))
}

/// See [`owed`].
pub(in super::super) struct Debt<T>(SyncSender<T>);

impl<T> Debt<T> {
    /// Hands the value over. Who waited for it may have given up: then nobody needs it.
    pub fn pay(self, value: T) {
        drop(self.0.send(value));
    }
}

/// See [`owed`].
pub(in super::super) struct Owed<T>(Receiver<T>);

impl<T> Owed<T> {
    /// Waits for the value; fails if its task ended without.
    pub fn wait(self) -> Result<T> {
        self.0.recv().map_err(|error| Error::internal("a request ended without an answer").source(error))
    }
}

/// Memory that threads take and give back.
#[derive(Clone)]
pub(in super::super) struct Memory(Arc<Counted>);

struct Counted {
    limit: u64,
    taken: Mutex<u64>,
    given_back: Condvar,
}

/// Memory that was taken; goes back when dropped.
pub(in super::super) struct Taken(Memory, u64);

impl Memory {
    /// So many bytes for all.
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Counted { limit, taken: Mutex::new(0), given_back: Condvar::new() }))
    }

    /// Waits until so many bytes are free; more than there are is all there are.
    pub fn take(&self, bytes: u64) -> Taken {
        let counted = &*self.0;
        let bytes = bytes.min(counted.limit);
        let taken = counted.taken.lock().expect("no holder panics");
        let fits = |taken: &mut u64| *taken + bytes > counted.limit;
        *counted.given_back.wait_while(taken, fits).expect("no holder panics") += bytes;
        Taken(self.clone(), bytes)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let counted = &*self.0.0;
        *counted.taken.lock().expect("no holder panics") -= self.1;
        counted.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_ends_without_an_answer_is_a_failure() {
        let (debt, owed) = super::owed();
        debt.pay(7);
        assert_eq!(owed.wait().unwrap(), 7);
        let (debt, owed) = super::owed::<u8>();
        drop(debt);
        assert_eq!(owed.wait().unwrap_err().message(), "a request ended without an answer");
    }

    #[test]
    fn all_is_done_once_and_the_first_failure_ends_it() {
        let context = Context::default();
        let feed = |give: &mut dyn FnMut(u64) -> Result<()>| (0..1000).try_for_each(give);
        let memory = Memory::new(10);
        let sum = each(7, &context, feed, |number| {
            let _taken = memory.take(number % 20);
            Ok(number)
        });
        assert_eq!(sum.unwrap(), 499_500);
        let failed = each(7, &context, feed, |number| match number {
            500 => Err(Error::new(Kind::Io, "broken")),
            other => Ok(other),
        });
        assert_eq!(failed.unwrap_err().message(), "broken");
        context.cancel();
        assert_eq!(each(2, &context, feed, Ok).unwrap_err().kind(), Kind::Cancelled);
    }
}
