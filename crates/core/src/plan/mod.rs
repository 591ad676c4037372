//! Plans: what a backup and a restore will do, decided before anything is done.

pub mod backup;
pub mod order;
pub mod restore;

pub use backup::BackupPlan;
pub use restore::RestorePlan;
