//! What proves drivers and engine: the conformance suite, an in-memory tree, chaos, the oracle.
