//! What a tree blob says of each entry of a directory, and how restic numbers types and modes.
//!
//! A directory is one tree blob, or, when it is huge, a tree blob of parts, each of which is a tree
//! blob of entries (see [`super::name`]). Writing is in [`super::tree_write`], reading in
//! [`super::tree_read`].

use stillpoint_core::tree::{Metadata, Node, NodeKind};

use super::id::Id;

/// One entry with where its bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeNode {
    /// Name, kind and metadata.
    pub node: Node,
    /// A file's chunks, in order.
    pub content: Vec<Id>,
    /// A directory's tree blob.
    pub subtree: Option<Id>,
}

impl TreeNode {
    /// The entry for the writer.
    pub fn as_entry(&self) -> Entry<'_> {
        Entry {
            name: &self.node.name,
            kind: &self.node.kind,
            meta: &self.node.meta,
            content: &self.content,
            subtree: self.subtree,
        }
    }
}

/// One entry, borrowed, for the writer.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'e> {
    /// The plain name.
    pub name: &'e [u8],
    /// What it is.
    pub kind: &'e NodeKind,
    /// What `lstat(2)` said.
    pub meta: &'e Metadata,
    /// A file's chunks, in order.
    pub content: &'e [Id],
    /// A directory's tree blob.
    pub subtree: Option<Id>,
}

/// Go's `os.FileMode` bits, which restic stores instead of Unix's.
pub(super) mod mode_bits {
    pub const DIR: u32 = 1 << 31;
    pub const SYMLINK: u32 = 1 << 27;
    pub const DEVICE: u32 = 1 << 26;
    pub const FIFO: u32 = 1 << 25;
    pub const SOCKET: u32 = 1 << 24;
    pub const SETUID: u32 = 1 << 23;
    pub const SETGID: u32 = 1 << 22;
    pub const CHAR_DEVICE: u32 = 1 << 21;
    pub const STICKY: u32 = 1 << 20;
    pub const PERMISSIONS: u32 = 0o777;
}

/// restic's word for the kind, and its type bits.
pub(super) fn type_of(kind: &NodeKind) -> (&'static str, u32) {
    use mode_bits as m;
    match kind {
        NodeKind::File { .. } => ("file", 0),
        NodeKind::Dir => ("dir", m::DIR),
        NodeKind::Symlink { .. } => ("symlink", m::SYMLINK),
        NodeKind::Fifo => ("fifo", m::FIFO),
        NodeKind::Socket => ("socket", m::SOCKET),
        NodeKind::CharDevice { .. } => ("chardev", m::DEVICE | m::CHAR_DEVICE),
        NodeKind::BlockDevice { .. } => ("dev", m::DEVICE),
    }
}

/// Unix permission bits as Go's, without the type.
pub(super) fn mode_to_go(mode: u32) -> u32 {
    use mode_bits as m;
    let bit = |unix: u32, go: u32| if mode & unix != 0 { go } else { 0 };
    mode & m::PERMISSIONS | bit(0o4000, m::SETUID) | bit(0o2000, m::SETGID) | bit(0o1000, m::STICKY)
}

/// The inverse of [`mode_to_go`]; type bits are dropped.
pub(super) fn mode_from_go(mode: u32) -> u32 {
    use mode_bits as m;
    let bit = |go: u32, unix: u32| if mode & go != 0 { unix } else { 0 };
    mode & m::PERMISSIONS | bit(m::SETUID, 0o4000) | bit(m::SETGID, 0o2000) | bit(m::STICKY, 0o1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_modes_survive() {
        for mode in 0..=0o7777 {
            assert_eq!(mode_from_go(mode_to_go(mode) | mode_bits::DIR), mode);
        }
    }
}
