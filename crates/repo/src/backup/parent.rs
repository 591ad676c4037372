//! One directory of the parent snapshot, read along with the directory being written.

use stillpoint_core::error::Result;

use super::pipeline::Pipeline;
use crate::format::id::Id;
use crate::format::tree::TreeNode;
use crate::format::tree_read::DirectoryReader;

/// A merge of ascending names: what lies before the name asked for is passed over.
pub(super) struct ParentDirectory {
    blob: Id,
    reader: DirectoryReader,
    /// The entry that was read last: the first one not smaller than `asked`. `None` at the end.
    current: Option<TreeNode>,
    /// The name asked for last.
    asked: Vec<u8>,
}

impl ParentDirectory {
    pub(super) fn open(pipeline: &Pipeline, blob: Id) -> Result<Self> {
        let mut reader = DirectoryReader::new(pipeline.loader.tree(&blob)?)?;
        let current = reader.next(&mut |id| pipeline.loader.tree(id))?;
        Ok(Self { blob, reader, current, asked: Vec::new() })
    }

    /// The entry of this name. Names that do not ascend cost reading the directory again.
    pub(super) fn find(&mut self, pipeline: &Pipeline, name: &[u8]) -> Result<Option<&TreeNode>> {
        if name < self.asked.as_slice() {
            *self = Self::open(pipeline, self.blob)?;
        }
        self.asked.clear();
        self.asked.extend_from_slice(name);
        while self.current.as_ref().is_some_and(|entry| entry.node.name.as_slice() < name) {
            self.current = self.reader.next(&mut |id| pipeline.loader.tree(id))?;
        }
        Ok(self.current.as_ref().filter(|entry| entry.node.name == name))
    }
}
