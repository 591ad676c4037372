//! Takes and keeps the locks that restic honours.
