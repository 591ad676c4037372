//! Reads tree blobs entry by entry, ours and restic's, so that memory does not grow with the
//! directory beyond one part of it.

use std::borrow::Cow;

use serde::Deserialize;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{FileTime, Metadata, Node, NodeKind, check_name};

use super::id::Id;
use super::key::Base64;
use super::name::{self, StoredName};
use super::tree::{TreeNode, mode_bits, mode_from_go};
use super::{quote, time};

/// Loads a tree blob: decrypted, decompressed, verified.
pub type LoadTree<'l> = dyn FnMut(&Id) -> Result<Vec<u8>> + 'l;

/// One directory, read in ascending order of names; parts are followed by themselves.
#[derive(Debug)]
pub struct DirectoryReader {
    top: Nodes,
    part: Option<Nodes>,
}

impl DirectoryReader {
    /// Reads the directory whose tree blob is `blob`.
    pub fn new(blob: Vec<u8>) -> Result<Self> {
        Ok(Self { top: Nodes::new(blob)?, part: None })
    }

    /// The next entry, with its plain name.
    pub fn next(&mut self, load: &mut LoadTree<'_>) -> Result<Option<TreeNode>> {
        loop {
            if let Some(part) = &mut self.part {
                match part.next()? {
                    Some(entry) => return plain(entry).map(Some),
                    None => self.part = None,
                }
            }
            let Some(entry) = self.top.next()? else {
                return Ok(None);
            };
            match (name::decode(&entry.node.name), entry.subtree) {
                (StoredName::Part(_), Some(subtree)) => self.part = Some(Nodes::new(load(&subtree)?)?),
                _ => return plain(entry).map(Some),
            }
        }
    }
}

fn plain(mut entry: TreeNode) -> Result<TreeNode> {
    if let StoredName::Plain(Cow::Owned(name)) = name::decode(&entry.node.name) {
        entry.node.name = name;
    }
    check_name(&entry.node.name)?;
    Ok(entry)
}

/// The entries of one tree blob as they are stored, parts not followed, names not decoded.
///
/// For whoever walks blobs and not directories: check and prune.
#[derive(Debug)]
pub struct Nodes {
    blob: Vec<u8>,
    at: usize,
    first: bool,
    ended: bool,
}

impl Nodes {
    /// Finds the list of entries in the blob.
    pub fn new(blob: Vec<u8>) -> Result<Self> {
        let mut at = 0;
        for token in [&b"{"[..], b"\"nodes\"", b":"] {
            at = skip_space(&blob, at);
            at = blob.get(at..).filter(|rest| rest.starts_with(token)).map(|_| at + token.len()).ok_or_else(corrupt)?;
        }
        at = skip_space(&blob, at);
        match blob.get(at) {
            Some(b'[') => Ok(Self { blob, at: at + 1, first: true, ended: false }),
            // restic before 0.9 wrote null for an empty directory.
            Some(b'n') => Ok(Self { blob, at, first: false, ended: true }),
            _ => Err(corrupt()),
        }
    }

    /// The next entry, with its stored name.
    #[expect(clippy::should_implement_trait, reason = "fallible readers return Result<Option>, which reads better")]
    pub fn next(&mut self) -> Result<Option<TreeNode>> {
        if self.ended {
            return Ok(None);
        }
        self.at = skip_space(&self.blob, self.at);
        match self.blob.get(self.at) {
            Some(b']') => {
                self.end(self.at + 1)?;
                return Ok(None);
            }
            Some(b',') if !self.first => self.at += 1,
            Some(b'{') if self.first => {}
            _ => return Err(corrupt()),
        }
        self.first = false;
        let mut values = serde_json::Deserializer::from_slice(&self.blob[self.at..]).into_iter::<NodeJson<'_>>();
        let json = values.next().ok_or_else(corrupt)?.map_err(|error| corrupt().source(error))?;
        let consumed = values.byte_offset();
        let node = json.into_node()?;
        self.at += consumed;
        Ok(Some(node))
    }

    fn end(&mut self, at: usize) -> Result<()> {
        let at = skip_space(&self.blob, at);
        if self.blob.get(at) != Some(&b'}') || skip_space(&self.blob, at + 1) != self.blob.len() {
            return Err(corrupt());
        }
        self.ended = true;
        Ok(())
    }
}

fn skip_space(blob: &[u8], at: usize) -> usize {
    at + blob.get(at..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

fn corrupt() -> Error {
    Error::new(Kind::Corrupt, "a stored directory is not what it must be")
}

#[derive(Deserialize)]
struct NodeJson<'j> {
    #[serde(borrow)]
    name: Cow<'j, str>,
    #[serde(borrow, rename = "type")]
    kind: Cow<'j, str>,
    #[serde(default)]
    mode: u32,
    #[serde(default, borrow)]
    mtime: Cow<'j, str>,
    #[serde(default, borrow)]
    atime: Cow<'j, str>,
    #[serde(default, borrow)]
    ctime: Cow<'j, str>,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    #[serde(default)]
    user: String,
    #[serde(default)]
    group: String,
    #[serde(default)]
    inode: u64,
    #[serde(default)]
    device_id: u64,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    links: u64,
    #[serde(default, borrow)]
    linktarget: Cow<'j, str>,
    linktarget_raw: Option<Base64>,
    extended_attributes: Option<Vec<AttributeJson>>,
    stillpoint_attributes_raw: Option<Vec<RawAttributeJson>>,
    #[serde(default)]
    device: u64,
    content: Option<Vec<Id>>,
    subtree: Option<Id>,
}

#[derive(Deserialize)]
struct AttributeJson {
    name: String,
    value: Option<Base64>,
}

#[derive(Deserialize)]
struct RawAttributeJson {
    name: Base64,
    value: Base64,
}

impl NodeJson<'_> {
    fn into_node(self) -> Result<TreeNode> {
        let kind = match self.kind.as_ref() {
            "file" => NodeKind::File { size: self.size },
            "dir" => NodeKind::Dir,
            "symlink" => NodeKind::Symlink {
                target: self.linktarget_raw.map_or_else(|| self.linktarget.into_owned().into_bytes(), |raw| raw.0),
            },
            "fifo" => NodeKind::Fifo,
            "socket" => NodeKind::Socket,
            "chardev" => NodeKind::CharDevice { device: self.device },
            "dev" if self.mode & mode_bits::CHAR_DEVICE != 0 => NodeKind::CharDevice { device: self.device },
            "dev" => NodeKind::BlockDevice { device: self.device },
            other => {
                let message = format!("a stored directory holds an entry of the unknown type `{other}`");
                return Err(Error::new(Kind::Unsupported, message));
            }
        };
        if kind == NodeKind::Dir && self.subtree.is_none() {
            return Err(corrupt().context("directory without tree", &self.name));
        }
        let mut xattrs: Vec<_> =
            self.extended_attributes.unwrap_or_default().into_iter().map(AttributeJson::bytes).collect();
        xattrs.extend(
            self.stillpoint_attributes_raw.unwrap_or_default().into_iter().map(|raw| (raw.name.0, raw.value.0)),
        );
        xattrs.sort();
        let meta = Metadata {
            mode: mode_from_go(self.mode),
            mtime: read_time(&self.mtime)?,
            atime: read_time(&self.atime)?,
            ctime: read_time(&self.ctime)?,
            uid: self.uid,
            gid: self.gid,
            user: self.user,
            group: self.group,
            inode: self.inode,
            device: self.device_id,
            links: self.links,
            xattrs,
        };
        let name = quote::unquote(&self.name)?.into_owned();
        let content = self.content.unwrap_or_default();
        Ok(TreeNode { node: Node { name, kind, meta }, content, subtree: self.subtree })
    }
}

impl AttributeJson {
    fn bytes(self) -> (Vec<u8>, Vec<u8>) {
        (self.name.into_bytes(), self.value.map(|value| value.0).unwrap_or_default())
    }
}

fn read_time(text: &str) -> Result<FileTime> {
    if text.is_empty() {
        return Ok(FileTime::default());
    }
    time::read(text).ok_or_else(|| corrupt().context("time", text))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::tree_write::{DirectoryWriter, PART_NODES_MAX};
    use super::*;
    use proptest::prelude::*;

    /// Tree blobs by id; ids need only be distinct here.
    #[derive(Default)]
    struct Blobs(HashMap<Id, Vec<u8>>);

    impl Blobs {
        fn write(&mut self, entries: &[TreeNode]) -> Id {
            let mut writer = DirectoryWriter::default();
            for entry in entries {
                writer.push(&entry.as_entry(), &mut |blob| Ok(self.put(blob))).unwrap();
            }
            writer.finish(&mut |blob| Ok(self.put(blob))).unwrap()
        }

        fn put(&mut self, blob: &[u8]) -> Id {
            use sha2::Digest as _;
            let id = Id(sha2::Sha256::digest(blob).into());
            self.0.insert(id, blob.to_vec());
            id
        }

        fn read(&self, id: &Id) -> Vec<TreeNode> {
            let mut reader = DirectoryReader::new(self.0[id].clone()).unwrap();
            let mut entries = Vec::new();
            while let Some(entry) = reader.next(&mut |id| Ok(self.0[id].clone())).unwrap() {
                entries.push(entry);
            }
            entries
        }
    }

    fn file(name: Vec<u8>) -> TreeNode {
        let node = Node { name, kind: NodeKind::File { size: 0 }, meta: Metadata::default() };
        TreeNode { node, content: vec![], subtree: None }
    }

    fn any_time() -> impl Strategy<Value = FileTime> {
        (-62_000_000_000..250_000_000_000_i64, 0..1_000_000_000_u32)
            .prop_map(|(seconds, nanos)| FileTime { seconds, nanos })
    }

    fn any_meta() -> impl Strategy<Value = Metadata> {
        let numbers = (0..0o10000_u32, any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), 2..9_u64);
        let xattrs = proptest::collection::btree_map(any::<Vec<u8>>(), any::<Vec<u8>>(), 0..3);
        (numbers, any_time(), any_time(), any_time(), any::<String>(), any::<String>(), xattrs).prop_map(
            |((mode, uid, gid, inode, device, links), mtime, atime, ctime, user, group, xattrs)| {
                let xattrs = xattrs.into_iter().collect();
                Metadata { mode, mtime, atime, ctime, uid, gid, user, group, inode, device, links, xattrs }
            },
        )
    }

    fn any_entry() -> impl Strategy<Value = TreeNode> {
        let kind = prop_oneof![
            any::<u64>().prop_map(|size| NodeKind::File { size }),
            Just(NodeKind::Dir),
            any::<Vec<u8>>().prop_map(|target| NodeKind::Symlink { target }),
            Just(NodeKind::Fifo),
            Just(NodeKind::Socket),
            any::<u64>().prop_map(|device| NodeKind::CharDevice { device }),
            any::<u64>().prop_map(|device| NodeKind::BlockDevice { device }),
        ];
        let name = proptest::collection::vec((1..=255_u8).prop_filter("no slash", |byte| *byte != b'/'), 1..20)
            .prop_filter("a valid name", |name| name != b"." && name != b"..");
        let content = proptest::collection::vec(any::<[u8; 32]>(), 0..4);
        (name, kind, any_meta(), content).prop_map(|(name, kind, meta, content)| {
            let is_file = matches!(kind, NodeKind::File { .. });
            TreeNode {
                subtree: (kind == NodeKind::Dir).then_some(Id([9; 32])),
                content: if is_file { content.into_iter().map(Id).collect() } else { vec![] },
                node: Node { name, kind, meta },
            }
        })
    }

    proptest! {
        #[test]
        fn entries_survive(entries in proptest::collection::vec(any_entry(), 0..12)) {
            let mut entries = entries;
            entries.sort_by(|a, b| a.node.name.cmp(&b.node.name));
            entries.dedup_by(|a, b| a.node.name == b.node.name);
            let mut blobs = Blobs::default();
            let id = blobs.write(&entries);
            prop_assert_eq!(blobs.read(&id), entries);
        }

        #[test]
        fn other_bytes_never_panic(blob in prop_oneof![any::<Vec<u8>>(), "\\{\"nodes\":\\[.*".prop_map(String::into_bytes)]) {
            if let Ok(mut nodes) = Nodes::new(blob) {
                while let Ok(Some(_)) = nodes.next() {}
            }
        }
    }

    #[test]
    fn what_restic_writes_is_read() {
        let blob = br#"{"nodes":[{"name":"a\\xff\u003c","type":"file","mode":420,"mtime":"2026-01-01T00:00:00.5+01:00","atime":"2026-01-01T00:00:00Z","ctime":"2026-01-01T00:00:00Z","uid":0,"gid":0,"size":0,"content":[],"new_field":{"a":[1]}},
            {"name":"d","type":"dir","mode":2147484141,"mtime":"0001-01-01T00:00:00Z","uid":1,"gid":2,"content":null,"subtree":"0909090909090909090909090909090909090909090909090909090909090909"}]}
        "#;
        let mut nodes = Nodes::new(blob.to_vec()).unwrap();
        assert_eq!(nodes.next().unwrap().unwrap().node.name, b"a\xff<");
        let dir = nodes.next().unwrap().unwrap();
        assert_eq!((dir.node.kind, dir.node.meta.mode), (NodeKind::Dir, 0o755));
        assert!(nodes.next().unwrap().is_none());
        assert!(nodes.next().unwrap().is_none());
        assert!(Nodes::new(br#"{"nodes":null}"#.to_vec()).unwrap().next().unwrap().is_none());
    }

    #[test]
    fn damaged_directories_are_errors_and_never_shorter_ones() {
        let mut blobs = Blobs::default();
        let id = blobs.write(&[file(b"a".to_vec()), file(b"b".to_vec())]);
        let whole = blobs.0[&id].clone();
        for length in 0..whole.trim_ascii_end().len() {
            let read = Nodes::new(whole[..length].to_vec()).and_then(|mut nodes| {
                while nodes.next()?.is_some() {}
                Ok(())
            });
            assert!(read.is_err() || length == 0, "{length}");
        }
    }

    #[test]
    fn names_must_ascend_and_stay_inside() {
        for (first, second) in [("b", "a"), ("a", "a"), ("a", "a/b"), ("a", "..")] {
            let mut writer = DirectoryWriter::default();
            let mut store = |_: &[u8]| Ok(Id([0; 32]));
            writer.push(&file(first.into()).as_entry(), &mut store).unwrap();
            assert!(writer.push(&file(second.into()).as_entry(), &mut store).is_err(), "{second}");
        }
    }

    #[test]
    fn huge_directories_are_split_and_a_new_entry_changes_few_parts() {
        let entries: Vec<_> = (0..2 * PART_NODES_MAX).map(|number| file(format!("{number:09}").into_bytes())).collect();
        let mut blobs = Blobs::default();
        let id = blobs.write(&entries);
        assert_eq!(blobs.read(&id), entries);
        let parts = blobs.0.len();
        assert!((4..30).contains(&parts), "{parts}");
        let mut grown = entries;
        grown.insert(0, file(b"!".to_vec()));
        let id = blobs.write(&grown);
        assert_eq!(blobs.read(&id), grown);
        assert!(blobs.0.len() - parts <= 3, "{} new blobs", blobs.0.len() - parts);
    }

    #[test]
    fn a_directory_just_below_the_limit_is_one_blob() {
        let entries: Vec<_> = (0..PART_NODES_MAX).map(|number| file(format!("{number:09}").into_bytes())).collect();
        let mut blobs = Blobs::default();
        let id = blobs.write(&entries);
        assert_eq!((blobs.0.len(), blobs.read(&id).len()), (1, PART_NODES_MAX));
    }
}
