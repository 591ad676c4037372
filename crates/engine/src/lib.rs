//! The hands of Stillpoint: everything that touches clocks, processes, stores and buckets.

pub mod cancel;
pub mod clock;
pub mod progress;
pub mod config;
pub mod secrets;
