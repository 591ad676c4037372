//! Cuts streams into chunks where their content says so.
