//! The hands of Stillpoint: everything that touches clocks, processes, stores and buckets.

pub mod budget;
pub mod effects;
pub mod recover;
pub mod run;
pub mod cancel;
pub mod clock;
pub mod journal;
pub mod lease;
pub mod pause;
pub mod watchdog;
pub mod progress;
pub mod config;
pub mod secrets;
pub mod open;
pub mod points;
pub mod ops;
pub mod references;
pub mod fence;
