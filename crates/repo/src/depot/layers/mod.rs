//! Layers: depots that wrap a depot and add one thing each.
//!
//! Order matters, outermost first: [`Retry`] repeats what failed below; [`Bandwidth`] slows down;
//! [`Trace`] sees every attempt. [`TimeOut`] bounds depots that cannot bound themselves, [`Before`] and
//! [`Chaos`] are for tests.

mod bandwidth;
mod before;
mod chaos;
mod retry;
mod time_out;
mod trace;

pub use bandwidth::Bandwidth;
pub use before::{Before, Call};
pub use chaos::{Chaos, ChaosPolicy};
pub use retry::{Retry, RetryPolicy};
pub use time_out::TimeOut;
pub use trace::{Trace, TraceCounts, Verb};
