//! DRAIN and the edges of references: the objects of the view as a tree.

use std::collections::{HashSet, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Loss, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{self, FileTime, Metadata, Node, NodeKind, Sink, Tree, TreePath};

use super::bucket::{mirror, policy};
use super::client::{Attributes, Fetched, Place, Waiting, WaitingFacts};
use super::config::Mode;
use super::cut::{View, next_of};
use super::spool::{Entries, Sorted, Sorter};
use super::wire::{self, HOW_TO, MANIFEST, OBJECTS, Record, SCHEMA, SUMMARY, Summary};
use super::{Objects, Where, keys};

/// The instructions at the top of every point.
const HOW_TO_TEXT: &[u8] = include_bytes!("HOW-TO-RESTORE.txt");
/// More than a line of the manifest takes.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// More than a summary takes.
pub(super) const SUMMARY_BYTES_MAX: u64 = 1 << 20;

/// One object of a list, with what its neighbour tells of it.
pub(super) struct Item {
    pub names: Vec<Vec<u8>>,
    pub key: Vec<u8>,
    pub record: Record,
    /// Other keys lie below this key.
    pub is_folder: bool,
}

/// Losses that are listed one by one; the rest is counted.
const LOSSES_MAX: usize = 1_000;

/// What is lost: all keys, of which only the first are listed for people. It may be all of a bucket.
pub(super) struct Losses {
    listed: Vec<Loss>,
    more: u64,
    keys: Sorter,
}

impl Losses {
    /// None yet; keys spill into `scratch`.
    pub fn new(scratch: &Path) -> Result<Self> {
        Ok(Self { listed: Vec::new(), more: 0, keys: Sorter::new(scratch)? })
    }

    /// Notes a loss.
    pub fn add(&mut self, key: &[u8], why: &str) -> Result<()> {
        if self.listed.len() < LOSSES_MAX {
            self.listed.push(Loss { what: keys::shown(key), why: why.to_owned() });
        } else {
            self.more += 1;
        }
        self.keys.push(keys::sort_key(&keys::escape(key)), Vec::new())
    }

    /// The losses to report, and the keys of all in the order of the tree.
    pub fn finish(self) -> Result<(Vec<Loss>, Sorted)> {
        let mut listed = self.listed;
        if self.more > 0 {
            let what = format!("{} more objects", self.more);
            listed.push(Loss { what, why: "are lost for reasons like those above".to_owned() });
        }
        Ok((listed, self.keys.finish()?))
    }
}

/// The names and the payload of the next entry.
type Ahead = (Vec<Vec<u8>>, Vec<u8>);

/// The manifest of a point, line by line, in the order of the tree.
pub(super) struct Lines<'a> {
    tree: &'a dyn Tree,
    /// Names of the pages that are not read yet, the next one last.
    pages: Vec<Vec<u8>>,
    page: Option<BufReader<Box<dyn Read + Send>>>,
    /// What [`Lines::find`] looks at; `None` before its first call, and at the end.
    current: Option<(Vec<u8>, Record)>,
    has_begun: bool,
}

impl<'a> Lines<'a> {
    /// Reads from the begin. A tree without manifest has no lines.
    pub fn new(tree: &'a dyn Tree) -> Result<Self> {
        let mut pages = manifest_pages(tree)?;
        pages.reverse();
        Ok(Self { tree, pages, page: None, current: None, has_begun: false })
    }

    /// The key and the record of the next line.
    pub fn next_line(&mut self) -> Result<Option<(Vec<u8>, Record)>> {
        let mut line = Vec::new();
        loop {
            if let Some(page) = &mut self.page {
                let read = page.take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
                if read.or_io(|| "cannot read the manifest of a point".to_owned())? > 0 {
                    return wire::parse_line(&line).map(Some);
                }
            }
            let Some(name) = self.pages.pop() else { return Ok(None) };
            self.page = Some(BufReader::new(self.tree.open(&TreePath::root().join(MANIFEST)?.join(&name)?)?));
        }
    }

    /// The record at this place of the tree; calls come in ascending order.
    pub fn find(&mut self, sort_key: &[u8]) -> Result<Option<&Record>> {
        let is_before = |(current, _): &(Vec<u8>, Record)| current.as_slice() < sort_key;
        while !self.has_begun || self.current.as_ref().is_some_and(is_before) {
            self.has_begun = true;
            self.current = self.next_line()?.map(|(key, record)| (keys::sort_key(&keys::escape(&key)), record));
        }
        Ok(self.current.as_ref().filter(|(current, _)| current == sort_key).map(|(_, record)| record))
    }
}

fn manifest_pages(tree: &dyn Tree) -> Result<Vec<Vec<u8>>> {
    let folder = TreePath::root().join(MANIFEST)?;
    let mut pages = Vec::new();
    if tree.get(&folder)?.is_some() {
        tree.list(&folder, &mut |node| {
            pages.push(node.name);
            Ok(true)
        })?;
    }
    Ok(pages)
}

/// The first key of every page of a manifest, ascending: where the keys of a bucket are.
pub(super) fn first_keys(tree: &dyn Tree) -> Result<Vec<Vec<u8>>> {
    let mut first = Vec::new();
    for name in manifest_pages(tree)?.into_iter().rev() {
        let mut lines = Lines { tree, pages: vec![name], page: None, current: None, has_begun: false };
        first.extend(lines.next_line()?.map(|(key, _)| key));
    }
    first.sort();
    Ok(first)
}

/// Walks a list and looks one entry ahead.
pub(super) struct Items {
    entries: Entries,
    ahead: Option<Ahead>,
}

impl Items {
    /// Reads from the begin.
    pub fn new(list: &Sorted) -> Result<Self> {
        let mut items = Self { entries: list.entries()?, ahead: None };
        items.ahead = items.read()?;
        Ok(items)
    }

    fn read(&mut self) -> Result<Option<Ahead>> {
        Ok(self.entries.next_entry()?.map(|(key, payload)| (keys::split_sort_key(&key), payload)))
    }

    /// The next object.
    pub fn next_item(&mut self) -> Result<Option<Item>> {
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
    let mut drained = Drained { unit: "objects".to_owned(), losses: view.losses.clone(), ..Drained::default() };
    drained.notes.clone_from(&view.notes);
    let narrowed = match (&driver.place, driver.settings.mode) {
        (Where::S3(s3), Mode::Mirror) => {
            let mirror = s3.mirror.as_ref().ok_or_else(|| Error::internal("a mirror without its bucket"))?;
            Some(mirror::copy(driver, s3, mirror, context, &view.records, parent, &mut drained)?)
        }
        (_, Mode::Reference) => Some(readable(driver, &view.records)?),
        _ => None,
    };
    let (narrowed, losses) = match narrowed {
        Some((records, losses)) => (Some(records), losses),
        None => (None, Losses::new(&driver.scratch)?),
    };
    let records = narrowed.as_ref().unwrap_or(&view.records);
    let summary = summarise(driver, records, &view, &mut drained)?;
    context.expect_bytes(summary.bytes);
    let stream = Metadata::stream(view.at);
    let folder = Metadata::folder(view.at);
    let text = summary.to_bytes()?;
    sink.file(HOW_TO, &stream, Some(HOW_TO_TEXT.len() as u64), tree::bytes(HOW_TO_TEXT))?;
    sink.file(SUMMARY, &stream, Some(text.len() as u64), tree::bytes(text))?;
    sink.enter(MANIFEST, &folder)?;
    write_manifest(context, records, view.at, sink)?;
    sink.leave()?;
    let losses = if driver.settings.mode.is_copy() {
        sink.enter(OBJECTS, &folder)?;
        let parent_cut_nanos = match parent {
            Some(parent) => parent_summary(parent)?.map(|summary| summary.cut_nanos),
            None => None,
        };
        let inside = Vec::new();
        let mut writer = Writer { driver, context, sink, folder, inside, parent_cut_nanos, losses, drained, reused: 0 };
        write_objects(&mut writer, records, parent)?;
        writer.sink.leave()?;
        drained = writer.drained;
        drained.notes.extend(notes(driver, &view, writer.reused));
        writer.losses
    } else {
        (drained.items, drained.bytes) = (summary.objects, summary.bytes);
        context.advance(summary.bytes, summary.objects);
        losses
    };
    let (listed, lost) = losses.finish()?;
    drained.losses.extend(listed);
    driver.note_lost(pin, lost);
    Ok(drained)
}

/// What people should know of how the bytes were read.
fn notes(driver: &Objects, view: &View, reused: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if matches!(driver.place, Where::S3(_)) && reused > 0 {
        notes.push(format!(
            "tags, locks and grants of {reused} unchanged objects are those of when they were first read: `refresh: \
             true` asks again"
        ));
    }
    if !matches!(driver.place, Where::Directory(_)) && !view.holds {
        notes.push(
            "nothing holds a bucket without versions: an object that was written between the listing before the cut \
             and the cut, and overwritten or deleted after it, is missing without being named"
                .to_owned(),
        );
    }
    if let Where::S3(s3) = &driver.place
        && let (_, repeated @ 1..) = s3.client.counts()
    {
        notes.push(format!("{repeated} requests failed at first and were sent again"));
    }
    notes
}

/// What is on its way of an object before its turn comes.
enum Asked {
    Nothing,
    /// All of it.
    Content(Waiting),
    /// What is kept beside its bytes, which the parent point has.
    Facts(WaitingFacts),
}

impl Asked {
    fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

/// Hands the objects to the writer, some of them asked for ahead.
fn write_objects(writer: &mut Writer<'_>, records: &Sorted, parent: Option<&dyn Tree>) -> Result<()> {
    let place = writer.driver.place.as_place();
    let is_directory = matches!(writer.driver.place, Where::Directory(_));
    let mut lines = match parent.filter(|_| !is_directory) {
        Some(parent) => Some(Lines::new(parent)?),
        None => None,
    };
    let mut items = Items::new(records)?;
    let mut ahead: VecDeque<(Item, Asked)> = VecDeque::new();
    let mut waiting = 0;
    while let Some(item) = items.next_item()? {
        writer.context.check()?;
        let known = match &mut lines {
            Some(lines) => lines.find(&keys::sort_key(&item.names))?,
            None => None,
        };
        // What a directory holds is opened when its turn comes: that costs no round trip.
        let is_old = is_directory || known.is_some_and(|known| item.record.is_same_object(known));
        let asked = match is_old {
            true => place.begin_facts(&item.key, &item.record).map_or(Asked::Nothing, Asked::Facts),
            false if item.record.is_archived() => Asked::Nothing,
            false => Asked::Content(place.begin(&item.key, &item.record)?),
        };
        waiting += usize::from(!asked.is_nothing());
        ahead.push_back((item, asked));
        while waiting >= place.ahead_max() || ahead.front().is_some_and(|(_, asked)| asked.is_nothing()) {
            let Some((item, asked)) = ahead.pop_front() else { break };
            waiting -= usize::from(!asked.is_nothing());
            writer.write(item, asked)?;
        }
    }
    for (item, asked) in ahead {
        writer.context.check()?;
        writer.write(item, asked)?;
    }
    writer.go_to(&[])
}

/// The list without what no restore could read.
fn readable(driver: &Objects, records: &Sorted) -> Result<(Sorted, Losses)> {
    let (mut kept, mut losses) = (Sorter::new(&driver.scratch)?, Losses::new(&driver.scratch)?);
    let mut items = Items::new(records)?;
    while let Some(item) = items.next_item()? {
        match unreadable(driver.place.as_place(), &item) {
            Some(why) => losses.add(&item.key, why)?,
            None => kept.push(keys::sort_key(&item.names), item.record.to_bytes()?)?,
        }
    }
    Ok((kept.finish()?, losses))
}

/// Why an object cannot be read at all.
pub(super) fn unreadable(place: &dyn Place, item: &Item) -> Option<&'static str> {
    if item.record.is_archived() {
        return Some("is kept in an archive, where it cannot be read: bring it back there, then take a new point");
    }
    (!place.can_ask_for(&item.key))
        .then_some("has a key that addresses on the web cannot hold, with `.` or `..` as a part")
}

fn above(names: &[Vec<u8>]) -> &[Vec<u8>] {
    &names[..names.len() - 1]
}

fn summarise(driver: &Objects, records: &Sorted, view: &View, drained: &mut Drained) -> Result<Summary> {
    let kind = if matches!(driver.place, Where::Directory(_)) { "directory" } else { "bucket" };
    let mut summary = Summary { schema: SCHEMA.to_owned(), kind: kind.to_owned(), ..Summary::default() };
    summary.cut_nanos = nanos((view.at.seconds, view.at.nanos));
    summary.mode = driver.settings.mode;
    if let Where::S3(s3) = &driver.place {
        summary.source = Some(s3.location());
        summary.mirror = s3.mirror.as_ref().map(|mirror| mirror.location());
        summary.versioning = Some(format!("{:?}", s3.versioning()?).to_lowercase());
        summary.configuration = s3.configuration()?;
        if driver.settings.mode == Mode::Reference {
            drained.notes.extend(policy::what_becomes_of_references(&summary.configuration, view.at)?);
        }
    }
    let mut items = Items::new(records)?;
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

fn write_manifest(context: &Context, records: &Sorted, at: FileTime, sink: &mut dyn Sink) -> Result<()> {
    let mut items = Items::new(records)?;
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
            let meta = Metadata::stream(at);
            sink.file(name.as_bytes(), &meta, Some(data.len() as u64), tree::bytes(data))?;
        }
        if item.is_none() {
            return Ok(());
        }
    }
}

/// The summary of the parent; `None` if the parent is of another kind or version.
fn parent_summary(parent: &dyn Tree) -> Result<Option<Summary>> {
    let path = TreePath::root().join(SUMMARY)?;
    if parent.get(&path)?.is_none() {
        return Ok(None);
    }
    let bytes = tree::read_small(parent, &path, SUMMARY_BYTES_MAX)?;
    Ok(Summary::parse(&bytes).ok())
}

/// Writes objects in the order of the tree, and folders around them.
struct Writer<'a> {
    driver: &'a Objects,
    context: &'a Context,
    sink: &'a mut dyn Sink,
    folder: Metadata,
    /// The open folders, each with the object of the same key, which waits for its place.
    inside: Vec<(Vec<u8>, Option<(Item, Asked)>)>,
    parent_cut_nanos: Option<i64>,
    losses: Losses,
    drained: Drained,
    /// Objects that were taken over from the parent with all that is kept of them.
    reused: u64,
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
        waiting.map_or(Ok(()), |(item, asked)| self.write_here(keys::SELF, &item, asked))
    }

    /// Writes one object, or has it wait within the folder that its key also is.
    fn write(&mut self, item: Item, asked: Asked) -> Result<()> {
        if item.is_folder {
            self.go_to(&item.names.clone())?;
            self.inside.last_mut().ok_or_else(|| Error::internal("an object has an empty path"))?.1 =
                Some((item, asked));
            return Ok(());
        }
        self.go_to(above(&item.names))?;
        let name = item.names.last().cloned().unwrap_or_default();
        self.write_waiting(Some(&name))?;
        self.write_here(&name, &item, asked)
    }

    fn write_here(&mut self, name: &[u8], item: &Item, asked: Asked) -> Result<()> {
        let (asked, facts) = match asked {
            Asked::Content(content) => (Some(content), None),
            Asked::Facts(facts) => (None, Some(facts)),
            Asked::Nothing => (None, None),
        };
        let old = if asked.is_some() { None } else { self.sink.parent(name)? };
        if let Some(node) = old.filter(|node| is_unchanged(node, &item.record, self.parent_cut_nanos)) {
            let mut attributes = other_attributes(node);
            match facts.map(|facts| facts()).transpose()? {
                None => self.reused += 1,
                Some(Some(now)) => {
                    // In which parts it was written cannot change.
                    attributes.retain(|(name, _)| *name == wire::attribute_name("parts"));
                    attributes.extend(now);
                }
                Some(None) => return self.losses.add(&item.key, "was deleted before its tags were read"),
            }
            self.sink.reuse(name, &item.record.metadata(attributes))?;
        } else if let Some(why) = unreadable(self.driver.place.as_place(), item) {
            return self.losses.add(&item.key, why);
        } else {
            let waiting = match asked {
                Some(waiting) => waiting,
                None => self.driver.place.as_place().begin(&item.key, &item.record)?,
            };
            match waiting()? {
                Fetched::Found(content, attributes) => {
                    let meta = item.record.metadata(attributes);
                    self.drained.bytes_read += item.record.size;
                    self.sink.file(name, &meta, Some(item.record.size), content)?;
                }
                Fetched::Gone => return self.losses.add(&item.key, "was deleted before it was read"),
            }
        }
        self.drained.items += 1;
        self.drained.bytes += item.record.size;
        self.context.advance(item.record.size, 1);
        Ok(())
    }
}

/// Whether the parent's content is surely that of the object now.
fn is_unchanged(node: &Node, record: &Record, parent_cut_nanos: Option<i64>) -> bool {
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
        && parent_cut_nanos.is_some_and(|cut| nanos((changed.seconds, changed.nanos)) <= cut)
}

/// The attributes that a record does not know by itself.
fn other_attributes(node: Node) -> Attributes {
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
    // What the point lost while it was read does not hold any reference.
    let lost = driver.lost(pin);
    let mut lost = lost.as_ref().map(|lost| lost.entries()).transpose()?;
    let mut next_lost = next_of(&mut lost)?;
    let mut entries = view.records.entries()?;
    while let Some((key, _)) = entries.next_entry()? {
        context.check()?;
        while next_lost.as_ref().is_some_and(|(lost, _)| *lost < key) {
            next_lost = next_of(&mut lost)?;
        }
        if next_lost.as_ref().is_none_or(|(lost, _)| *lost != key) {
            yield_key(keys::unescape(&keys::split_sort_key(&key))?)?;
        }
    }
    Ok(())
}
