//! A stored tree in memory: what a repository would give back, for tests without a repository.
//!
//! Kept apart from the sink that builds it, because restores are also tested from trees that were
//! never drained: hostile ones, broken ones, ones made by hand.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{
    Difference, Existing, ExtractOptions, Extracted, FileTime, Metadata, Node, NodeKind, Tree, TreePath,
};

use crate::extract;

/// A tree in memory. Cheap to clone; clones share content.
#[derive(Debug, Clone, Default)]
pub struct MemoryTree {
    pub(crate) root: Arc<Folder>,
}

/// The entries of one directory, in ascending byte order of their names.
#[derive(Debug, Clone, Default)]
pub(crate) struct Folder {
    pub(crate) entries: BTreeMap<Vec<u8>, Entry>,
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) node: Node,
    pub(crate) body: Body,
}

#[derive(Debug, Clone)]
pub(crate) enum Body {
    Data(Arc<Vec<u8>>),
    Folder(Arc<Folder>),
    Nothing,
}

impl MemoryTree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file made of `data` at `path`, making folders on the way; replaces what is there.
    ///
    /// Names are taken as they are, also invalid ones: a hostile bucket would not ask either.
    #[must_use]
    pub fn with_file(mut self, path: &[&[u8]], data: impl Into<Vec<u8>>) -> Self {
        let data = data.into();
        let name = path.last().expect("a file has a name").to_vec();
        let kind = NodeKind::File { size: data.len() as u64 };
        let node = Node { name: name.clone(), kind, meta: Metadata::stream(FileTime::default()) };
        insert(Arc::make_mut(&mut self.root), path, Entry { node, body: Body::Data(Arc::new(data)) });
        self
    }

    /// Adds an entry without content, such as a link, below the folder at `path`.
    #[must_use]
    pub fn with_node(mut self, folder: &[&[u8]], node: Node) -> Self {
        let name = node.name.clone();
        let mut path = folder.to_vec();
        path.push(&name);
        let body = if node.kind == NodeKind::Dir { Body::Folder(Arc::default()) } else { Body::Nothing };
        insert(Arc::make_mut(&mut self.root), &path, Entry { node, body });
        self
    }

    /// The same tree without the entry at `path`, which must be there.
    #[must_use]
    pub fn without(mut self, path: &[&[u8]]) -> Self {
        remove(Arc::make_mut(&mut self.root), path);
        self
    }

    /// Every file's path and content, folders left out.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.root, "", &mut files);
        files
    }

    /// The folder at `path`.
    pub(crate) fn folder(&self, path: &TreePath) -> Result<Arc<Folder>> {
        let mut folder = Arc::clone(&self.root);
        for name in path.names() {
            let next = match folder.entries.get(name) {
                Some(Entry { body: Body::Folder(next), .. }) => Arc::clone(next),
                Some(_) => return Err(Error::new(Kind::Config, format!("`{path}` is not a directory"))),
                None => return Err(Error::new(Kind::NotFound, format!("`{path}` is not in the tree"))),
            };
            folder = next;
        }
        Ok(folder)
    }

    fn entry(&self, path: &TreePath) -> Result<Option<Entry>> {
        let Some((last, above)) = path.names().split_last() else {
            let node = Node { name: Vec::new(), kind: NodeKind::Dir, meta: Metadata::folder(FileTime::default()) };
            return Ok(Some(Entry { node, body: Body::Folder(Arc::clone(&self.root)) }));
        };
        let mut parent = TreePath::root();
        for name in above {
            parent.push(name)?;
        }
        match self.folder(&parent) {
            Ok(folder) => Ok(folder.entries.get(last).cloned()),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn insert(folder: &mut Folder, path: &[&[u8]], entry: Entry) {
    let (first, rest) = path.split_first().expect("a path has a name");
    if rest.is_empty() {
        folder.entries.insert(first.to_vec(), entry);
        return;
    }
    let meta = Metadata::folder(FileTime::default());
    let below = folder.entries.entry(first.to_vec()).or_insert_with(|| Entry {
        node: Node { name: first.to_vec(), kind: NodeKind::Dir, meta },
        body: Body::Folder(Arc::default()),
    });
    let Body::Folder(below) = &mut below.body else { panic!("a file stands where a folder is needed") };
    insert(Arc::make_mut(below), rest, entry);
}

fn remove(folder: &mut Folder, path: &[&[u8]]) {
    let (first, rest) = path.split_first().expect("a path has a name");
    if rest.is_empty() {
        folder.entries.remove(*first).expect("the entry is there");
        return;
    }
    let Some(Entry { body: Body::Folder(below), .. }) = folder.entries.get_mut(*first) else {
        panic!("the folder is there")
    };
    remove(Arc::make_mut(below), rest);
}

fn collect(folder: &Folder, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for (name, entry) in &folder.entries {
        let path = format!("{prefix}{}", String::from_utf8_lossy(name));
        match &entry.body {
            Body::Data(data) => {
                files.insert(path, data.to_vec());
            }
            Body::Folder(below) => collect(below, &format!("{path}/"), files),
            Body::Nothing => {}
        }
    }
}

/// Hands out shared bytes without copying them first.
struct Shared(Arc<Vec<u8>>, usize);

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = (&self.0[self.1..]).read(buffer)?;
        self.1 += count;
        Ok(count)
    }
}

impl Tree for MemoryTree {
    fn get(&self, path: &TreePath) -> Result<Option<Node>> {
        Ok(self.entry(path)?.map(|entry| entry.node))
    }

    fn list(&self, path: &TreePath, visit: &mut dyn FnMut(Node) -> Result<bool>) -> Result<()> {
        for entry in self.folder(path)?.entries.values() {
            if !visit(entry.node.clone())? {
                break;
            }
        }
        Ok(())
    }

    fn open(&self, path: &TreePath) -> Result<Box<dyn Read + Send>> {
        match self.entry(path)? {
            Some(Entry { body: Body::Data(data), .. }) => Ok(Box::new(Shared(data, 0))),
            Some(_) => Err(Error::new(Kind::Config, format!("`{path}` is not a file"))),
            None => Err(Error::new(Kind::NotFound, format!("`{path}` is not in the tree"))),
        }
    }

    fn extract(&self, path: &TreePath, to: &Path, options: &ExtractOptions, context: &Context) -> Result<Extracted> {
        if options.existing == Existing::Refuse {
            extract::refuse_content(to)?;
        }
        let folder = self.folder(path)?;
        extract::folder(&folder, to, options, context)
    }

    fn compare(&self, path: &TreePath, with: &Path, context: &Context) -> Result<Vec<Difference>> {
        context.check()?;
        let folder = self.folder(path)?;
        extract::compare(&folder, with)
    }
}
