//! Collects sealed blobs into packs.
