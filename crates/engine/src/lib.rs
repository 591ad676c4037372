//! The hands of Stillpoint: everything that touches clocks, processes, stores and buckets.

pub mod budget;
pub mod cancel;
pub mod clock;
pub mod config;
pub mod effects;
pub mod fence;
pub mod journal;
pub mod lease;
pub mod open;
pub mod ops;
pub mod pause;
pub mod points;
pub mod progress;
pub mod recover;
pub mod references;
pub mod run;
pub mod secrets;
pub mod watchdog;
