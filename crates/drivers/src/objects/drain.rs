//! DRAIN and the edges of references: the objects of the view as a tree.

use std::collections::HashSet;

use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Loss, Pin};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::{self, Metadata, Node, NodeKind, Sink, Tree, TreePath};

use super::client::{Fetched, Listed};
use super::cut::View;
use super::spool::{Entries, Sorted};
use super::wire::{self, HOW_TO, MANIFEST, OBJECTS, Record, SCHEMA, SUMMARY, Summary};
use super::{Objects, Where, keys};

/// The instructions at the top of every point.
const HOW_TO_TEXT: &[u8] = include_bytes!("HOW-TO-RESTORE.txt");
/// More than a summary takes.
pub(super) const SUMMARY_BYTES_MAX: u64 = 1 << 20;

/// One object of a list, with what its neighbour tells of it.
struct Item {
    names: Vec<Vec<u8>>,
    key: Vec<u8>,
    record: Record,
    /// Other keys lie below this key.
    is_folder: bool,
}

/// The names and the payload of the next entry.
type Ahead = (Vec<Vec<u8>>, Vec<u8>);

/// Walks a list and looks one entry ahead.
struct Items {
    entries: Entries,
    ahead: Option<Ahead>,
}

impl Items {
    fn new(list: &Sorted) -> Result<Self> {
        let mut items = Self { entries: list.entries()?, ahead: None };
        items.ahead = items.read()?;
        Ok(items)
    }

    fn read(&mut self) -> Result<Option<Ahead>> {
        Ok(self.entries.next_entry()?.map(|(key, payload)| (keys::split_sort_key(&key), payload)))
    }

    fn next_item(&mut self) -> Result<Option<Item>> {
        let Some((names, payload)) = self.ahead.take() else { return Ok(None) };
        self.ahead = self.read()?;
        // Paths below a path follow it directly: its names are their beginning.
        let is_folder = self.ahead.as_ref().is_some_and(|(next, _)| next.starts_with(&names));
        let (key, record) = (keys::unescape(&names)?, Record::parse(&payload)?);
        Ok(Some(Item { names, key, record, is_folder }))
    }
}

/// Writes summary, manifest and objects of the view.
pub(super) fn drain(
    driver: &Objects,
    context: &Context,
    pin: &Pin,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
) -> Result<Drained> {
    let view = driver.view(context, pin, parent)?;
    let summary = summarise(driver, &view)?;
    context.expect_bytes(summary.bytes);
    let stream = Metadata::stream(view.at);
    let folder = Metadata::folder(view.at);
    let text = summary.to_bytes()?;
    sink.file(HOW_TO, &stream, Some(HOW_TO_TEXT.len() as u64), tree::bytes(HOW_TO_TEXT))?;
    sink.file(SUMMARY, &stream, Some(text.len() as u64), tree::bytes(text))?;
    sink.enter(MANIFEST, &folder)?;
    write_manifest(context, &view, sink)?;
    sink.leave()?;
    sink.enter(OBJECTS, &folder)?;
    let parent_cut_nanos = match parent {
        Some(parent) => parent_cut(parent)?,
        None => None,
    };
    let mut drained = Drained { unit: "objects".to_owned(), losses: view.losses.clone(), ..Drained::default() };
    drained.notes.clone_from(&view.notes);
    if matches!(driver.place, Where::Bucket(_)) {
        drained.notes.push(
            "nothing holds a bucket without versions: an object that was written between the listing before the cut \
             and the cut, and overwritten or deleted after it, is missing without being named"
                .to_owned(),
        );
    }
    let mut writer = Writer { driver, context, sink, folder, inside: Vec::new(), parent_cut_nanos, drained };
    let mut items = Items::new(&view.records)?;
    let mut batch: Vec<Item> = Vec::new();
    while let Some(item) = items.next_item()? {
        context.check()?;
        let fits = batch.len() < driver.place.as_place().fetch_count()
            && batch.first().is_none_or(|first| above(&first.names) == above(&item.names))
            && !item.is_folder;
        if !fits {
            writer.write(std::mem::take(&mut batch))?;
        }
        if item.is_folder {
            writer.go_to(&item.names.clone())?;
            writer.inside.last_mut().expect("an object's path has names").1 = Some(item);
        } else {
            batch.push(item);
        }
    }
    writer.write(batch)?;
    writer.go_to(&[])?;
    let drained = writer.drained;
    sink.leave()?;
    Ok(drained)
}

fn above(names: &[Vec<u8>]) -> &[Vec<u8>] {
    &names[..names.len() - 1]
}

fn summarise(driver: &Objects, view: &View) -> Result<Summary> {
    let kind = if matches!(driver.place, Where::Directory(_)) { "directory" } else { "bucket" };
    let mut summary = Summary { schema: SCHEMA.to_owned(), kind: kind.to_owned(), ..Summary::default() };
    summary.cut_nanos = nanos((view.at.seconds, view.at.nanos));
    let mut items = Items::new(&view.records)?;
    while let Some(item) = items.next_item()? {
        summary.objects += 1;
        summary.bytes += item.record.size;
        summary.escaped += u64::from(item.is_folder || item.names.join(&b'/') != item.key);
        summary.bucket_only += u64::from(item.is_folder || !keys::fits_directory(&item.key));
    }
    Ok(summary)
}

fn nanos((seconds, nanos): (i64, u32)) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(nanos))
}

fn write_manifest(context: &Context, view: &View, sink: &mut dyn Sink) -> Result<()> {
    let mut items = Items::new(&view.records)?;
    let (mut page, mut on_page, mut pages) = (Vec::new(), 0, 0u32);
    loop {
        let item = items.next_item()?;
        let ends = match &item {
            Some(item) => {
                let path = wire::object_path(&item.names, item.is_folder);
                wire::add_line(&mut page, on_page, &item.key, &path, &item.record)?
            }
            None => !page.is_empty(),
        };
        on_page += 1;
        if ends {
            context.check()?;
            pages += 1;
            let (name, data) = (format!("{pages:08}.ndjson"), std::mem::take(&mut page));
            on_page = 0;
            let meta = Metadata::stream(view.at);
            sink.file(name.as_bytes(), &meta, Some(data.len() as u64), tree::bytes(data))?;
        }
        if item.is_none() {
            return Ok(());
        }
    }
}

/// The moment of the parent's cut; `None` if the parent is of another kind or version.
fn parent_cut(parent: &dyn Tree) -> Result<Option<i64>> {
    let path = TreePath::root().join(SUMMARY)?;
    if parent.get(&path)?.is_none() {
        return Ok(None);
    }
    let bytes = tree::read_small(parent, &path, SUMMARY_BYTES_MAX)?;
    Ok(Summary::parse(&bytes).ok().map(|summary| summary.cut_nanos))
}

/// Writes objects in the order of the tree, and folders around them.
struct Writer<'a> {
    driver: &'a Objects,
    context: &'a Context,
    sink: &'a mut dyn Sink,
    folder: Metadata,
    /// The open folders, each with the object of the same key, which waits for its place.
    inside: Vec<(Vec<u8>, Option<Item>)>,
    parent_cut_nanos: Option<i64>,
    drained: Drained,
}

impl Writer<'_> {
    /// Leaves and enters folders until `folder` is open.
    fn go_to(&mut self, folder: &[Vec<u8>]) -> Result<()> {
        let shared = self.inside.iter().zip(folder).take_while(|((open, _), name)| open == *name).count();
        while self.inside.len() > shared {
            self.write_waiting(None)?;
            self.inside.pop();
            self.sink.leave()?;
        }
        for name in &folder[shared..] {
            self.write_waiting(Some(name))?;
            self.sink.enter(name, &self.folder)?;
            self.inside.push((name.clone(), None));
        }
        Ok(())
    }

    /// Writes the object that the open folder's key also is, if its name comes before `next`.
    fn write_waiting(&mut self, next: Option<&[u8]>) -> Result<()> {
        if next.is_some_and(|next| next < keys::SELF) {
            return Ok(());
        }
        let waiting = self.inside.last_mut().and_then(|(_, waiting)| waiting.take());
        waiting.map_or(Ok(()), |item| self.write_here(vec![(keys::SELF.to_vec(), item)]))
    }

    /// Writes neighbours: objects of one folder, in order.
    fn write(&mut self, batch: Vec<Item>) -> Result<()> {
        let Some(first) = batch.first() else { return Ok(()) };
        self.go_to(above(&first.names))?;
        let named = batch.into_iter().map(|item| (item.names.last().cloned().unwrap_or_default(), item)).collect();
        self.write_here(named)
    }

    fn write_here(&mut self, batch: Vec<(Vec<u8>, Item)>) -> Result<()> {
        let mut old = Vec::with_capacity(batch.len());
        let mut wanted: Vec<Listed> = Vec::new();
        for (name, item) in &batch {
            let node = self.sink.parent(name)?.filter(|node| self.is_unchanged(node, &item.record));
            if node.is_none() {
                wanted.push((item.key.clone(), item.record.clone()));
            }
            old.push(node);
        }
        let mut fetched = self.driver.place.as_place().fetch(&wanted)?.into_iter();
        for ((name, item), old) in batch.into_iter().zip(old) {
            if name != keys::SELF {
                self.write_waiting(Some(&name))?;
            }
            if let Some(node) = old {
                self.sink.reuse(&name, &item.record.metadata(other_attributes(node)))?;
            } else {
                match fetched.next() {
                    Some(Fetched::Found(content, attributes)) => {
                        let meta = item.record.metadata(attributes);
                        self.drained.bytes_read += item.record.size;
                        self.sink.file(&name, &meta, Some(item.record.size), content)?;
                    }
                    Some(Fetched::Gone) => {
                        let why = "was deleted before it was read".to_owned();
                        self.drained.losses.push(Loss { what: keys::shown(&item.key), why });
                        continue;
                    }
                    None => return Err(Error::internal("fewer objects were fetched than asked for")),
                }
            }
            self.drained.items += 1;
            self.drained.bytes += item.record.size;
            self.context.advance(item.record.size, 1);
        }
        Ok(())
    }

    /// Whether the parent's content is surely that of the object now.
    fn is_unchanged(&self, node: &Node, record: &Record) -> bool {
        if node.kind != (NodeKind::File { size: record.size }) || node.meta.mtime != record.modified_time() {
            return false;
        }
        let Some((inode, ..)) = record.file else {
            // A bucket: the tag names the content, the version names the writing of it.
            let fact = |name| node.meta.xattrs.iter().find(|(n, _)| *n == wire::attribute_name(name)).map(|(_, v)| v);
            return record.etag.as_ref().is_some_and(|etag| fact("etag") == Some(&etag.clone().into_bytes()))
                && fact("version") == record.version.as_ref().map(|version| version.clone().into_bytes()).as_ref();
        };
        // What was written after the parent's cut bears a later time than that cut, always.
        let changed = record.changed_time();
        node.meta.inode == inode
            && node.meta.ctime == changed
            && self.parent_cut_nanos.is_some_and(|cut| nanos((changed.seconds, changed.nanos)) <= cut)
    }
}

/// The attributes that a record does not know by itself.
fn other_attributes(node: Node) -> Vec<(Vec<u8>, Vec<u8>)> {
    let known = [wire::attribute_name("etag"), wire::attribute_name("version")];
    node.meta.xattrs.into_iter().filter(|(name, _)| !known.contains(name)).collect()
}

/// Yields the keys of the view, or of the objects as they are now.
pub(super) fn edges(
    driver: &Objects,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let (kind, only) = match query {
        EdgeQuery::Held(kind) => (kind, None),
        EdgeQuery::Which { kind, referents } => (kind, Some(referents.iter().collect::<HashSet<_>>())),
        EdgeQuery::From(_) => {
            return Err(Error::new(Kind::Unsupported, "objects refer to nothing that could be asked for"));
        }
    };
    if kind != "keys" {
        return Err(Error::new(Kind::Config, format!("objects hold no `{kind}`")).hint("kind: keys"));
    }
    let mut yield_key = |key: Vec<u8>| {
        if only.as_ref().is_none_or(|only| only.contains(&key)) {
            visit(Edge { referent: key, owner: String::new() })?;
        }
        Ok(())
    };
    let Some(pin) = pin else {
        driver.place.as_place().list(context, &mut |key, _| yield_key(key))?;
        return Ok(());
    };
    let view = driver.view(context, pin, None)?;
    let mut entries = view.records.entries()?;
    while let Some((key, _)) = entries.next_entry()? {
        context.check()?;
        yield_key(keys::unescape(&keys::split_sort_key(&key))?)?;
    }
    Ok(())
}
