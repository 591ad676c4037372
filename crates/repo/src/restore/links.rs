//! Which files of a restore have several names, and where the first one is.
//!
//! Apart from the walk because this is the one thing that a restore remembers beyond its window: so
//! it is kept small. An entry goes once all names were met that the file had, and what a file holds
//! is remembered as a hash, whatever its length. Only files with names outside of what is restored
//! stay until the end.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use stillpoint_core::tree::Metadata;

use crate::Id;

/// Files with several names by device and inode.
#[derive(Debug, Default)]
pub(super) struct Links {
    files: HashMap<(u64, u64), FirstName>,
}

/// The first name of a hard-linked file.
#[derive(Debug)]
struct FirstName {
    size: u64,
    /// Over the ids of the blobs.
    content: [u8; 32],
    path: Vec<Vec<u8>>,
    /// Names that were met, the first one included.
    met: u64,
    /// Names that there are, as far as any of them said: links may be added while a tree is read.
    links: u64,
}

impl Links {
    /// Takes in a name of a file with several. Returns the path of its first name if there was one
    /// and it held the same: this name is to be linked to it.
    pub(super) fn meet(
        &mut self,
        meta: &Metadata,
        size: u64,
        content: &[Id],
        path: impl FnOnce() -> Vec<Vec<u8>>,
    ) -> Option<Vec<Vec<u8>>> {
        let identity = (meta.device, meta.inode);
        let hash = hash(content);
        let Some(first) = self.files.get_mut(&identity) else {
            self.files.insert(identity, FirstName { size, content: hash, path: path(), met: 1, links: meta.links });
            return None;
        };
        let is_same = first.size == size && first.content == hash;
        first.met += 1;
        first.links = first.links.max(meta.links);
        if first.met < first.links {
            return is_same.then(|| first.path.clone());
        }
        let first = self.files.remove(&identity)?;
        is_same.then_some(first.path)
    }
}

fn hash(content: &[Id]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for id in content {
        hasher.update(id.0);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(inode: u64, links: u64) -> Metadata {
        Metadata { device: 1, inode, links, ..Metadata::default() }
    }

    fn path(name: &str) -> Vec<Vec<u8>> {
        vec![name.as_bytes().to_vec()]
    }

    #[test]
    fn an_entry_goes_with_the_last_name_of_its_file() {
        let mut links = Links::default();
        let content = [Id([1; 32]), Id([2; 32])];
        assert_eq!(links.meet(&meta(7, 3), 9, &content, || path("a")), None);
        assert_eq!(links.meet(&meta(8, 2), 9, &content, || path("x")), None);
        assert_eq!(links.meet(&meta(7, 3), 9, &content, || path("b")), Some(path("a")));
        assert_eq!(links.files.len(), 2);
        assert_eq!(links.meet(&meta(7, 3), 9, &content, || path("c")), Some(path("a")));
        assert_eq!(links.files.len(), 1, "all three names were met");
        assert_eq!(links.meet(&meta(8, 2), 9, &content, || path("y")), Some(path("x")));
        assert!(links.files.is_empty());
    }

    #[test]
    fn a_name_that_holds_something_else_is_a_file_of_its_own_and_counts() {
        let mut links = Links::default();
        let (old, new) = ([Id([1; 32])], [Id([3; 32])]);
        assert_eq!(links.meet(&meta(7, 3), 9, &old, || path("a")), None);
        assert_eq!(links.meet(&meta(7, 3), 9, &new, || path("b")), None, "it changed between the two");
        assert_eq!(links.meet(&meta(7, 3), 9, &old, || path("c")), Some(path("a")));
        assert!(links.files.is_empty());
        assert_eq!(links.meet(&meta(7, 3), 9, &old, || path("d")), None, "one more than anyone noted");
        assert_eq!(links.meet(&meta(7, 3), 8, &old, || path("e")), None, "another length is another file");
    }

    #[test]
    fn a_name_that_was_added_while_the_tree_was_read_is_linked_too() {
        let mut links = Links::default();
        let content = [Id([1; 32])];
        assert_eq!(links.meet(&meta(7, 2), 9, &content, || path("a")), None);
        assert_eq!(links.meet(&meta(7, 3), 9, &content, || path("b")), Some(path("a")));
        assert_eq!(links.meet(&meta(7, 3), 9, &content, || path("c")), Some(path("a")));
        assert!(links.files.is_empty());
    }

    #[test]
    fn memory_does_not_grow_with_the_length_of_a_file() {
        let mut links = Links::default();
        for inode in 1..=100 {
            let content = vec![Id([5; 32]); 10_000];
            assert_eq!(links.meet(&meta(inode, 2), 9, &content, || path("a")), None);
            assert_eq!(links.meet(&meta(inode, 2), 9, &content, || path("b")), Some(path("a")));
        }
        assert!(links.files.is_empty() && links.files.capacity() < 16);
    }
}
