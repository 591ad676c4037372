//! The machine against a simulated world: named scenes, every fault once, and random lives.

mod faults;
mod lives;
mod scenes;
mod world;
