//! Quirks
