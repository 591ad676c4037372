//! DRAIN: from the pinned refs to packs, one per generation; and the edges of the pinned view.
//!
//! A generation's pack holds what its refs reach and the parent point's refs do not, as deltas
//! against what the parent holds. So packs are indexed in their order, and a point without news
//! adds none.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::PoisonError;

use std::os::unix::ffi::{OsStrExt, OsStringExt};

use stillpoint_core::driver::{Context, Drained, Edge, EdgeQuery, Loss, Pin};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{
    Content, ContentEnd, FileTime, Metadata, Node, NodeKind, Sink, Tree, TreePath, bytes, read_small,
};

use super::client::{self, Repository, Seen};
use super::cut::{self, View};
use super::wire::{self, Description, Pack};
use super::{Git, REPOSITORIES, STORE};

/// Packs up to this size are held in memory, so that git's success is known before they are handed on.
const HELD_PACK_BYTES_MAX: usize = 1 << 20;
/// Refs and descriptions in a point above this size are refused as damaged.
pub(super) const SMALL_FILE_BYTES_MAX: u64 = 1 << 30;

const HOW_TO_RESTORE: &str = "\
Each folder below repositories/ is one git repository; its name is its path, with / written as %2F.
With nothing but git, in an empty directory (add --object-format=sha256 if repository.json says so):

    git init --bare new.git
    for pack in repositories/NAME/packs/*.pack; do          # in this order: later packs build on earlier ones
        git --git-dir=new.git index-pack --stdin --fix-thin < \"$pack\"
    done
    cp repositories/NAME/packed-refs repositories/NAME/HEAD repositories/NAME/config new.git/
    cp repositories/NAME/shallow new.git/                   # only if it is there
    git --git-dir=new.git fsck --connectivity-only

Hooks are programs: read hooks/ before you copy it. For a working tree, name the directory .git
instead of new.git and run `git reset --hard`; uncommitted changes are not part of the store.
";

/// What is copied as it is, before the refs and packs, in the order of names.
const FILES_BEFORE: [&str; 2] = ["config", "description"];

pub(super) fn drain(
    driver: &Git,
    context: &Context,
    pin: &Pin,
    sink: &mut dyn Sink,
    parent: Option<&dyn Tree>,
) -> Result<Drained> {
    context.check()?;
    let view = cut::pinned(driver, pin)?;
    let mut drained = Drained { unit: "refs".to_owned(), ..Drained::default() };
    let folder = Metadata::folder(FileTime::default());
    sink.file(b"HOW-TO-RESTORE.txt", &plain(), None, bytes(HOW_TO_RESTORE))?;
    sink.enter(REPOSITORIES.as_bytes(), &folder)?;
    let mut named: Vec<(Vec<u8>, &(Repository, Seen))> =
        view.repositories.iter().map(|item| (wire::encode(&item.0.path), item)).collect();
    named.sort_by(|one, two| one.0.cmp(&two.0));
    for (name, (repository, seen)) in &named {
        context.check()?;
        sink.enter(name, &folder)?;
        let mut one = One { driver, context, sink: &mut *sink, view: &view, repository, seen, drained: &mut drained };
        one.drain(&TreePath::root().join(REPOSITORIES.as_bytes())?.join(name)?, parent)?;
        sink.leave()?;
    }
    sink.leave()?;
    let refs =
        cut::refs_hash(named.iter().map(|(_, (repository, seen))| (repository.path.as_slice(), seen.refs.hash())));
    let store = serde_json::json!({ "repositories": named.len(), "refsSha256": refs });
    sink.file(STORE.as_bytes(), &plain(), None, bytes(format!("{store:#}\n")))?;
    drained.checksums.insert("refs".to_owned(), refs);
    if view.repositories.iter().any(|(repository, _)| repository.working_tree) {
        drained.notes.push("uncommitted changes in working trees are not part of the store".to_owned());
    }
    *driver.drained.lock().unwrap_or_else(PoisonError::into_inner) = Some(pin.cut.clone());
    Ok(drained)
}

fn plain() -> Metadata {
    Metadata::stream(FileTime::default())
}

/// What a file means that changed after the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    /// The cut's content is lost, and named.
    Loss,
    /// It was added after the cut and is not part of it: such files are named by their content.
    LeftOut,
    /// It only grows; what was added does no harm.
    Fine,
}

/// One repository on its way into the sink.
struct One<'a> {
    driver: &'a Git,
    context: &'a Context,
    sink: &'a mut dyn Sink,
    view: &'a View,
    repository: &'a Repository,
    seen: &'a Seen,
    drained: &'a mut Drained,
}

impl One<'_> {
    /// Writes the repository's folder, names ascending.
    fn drain(&mut self, path: &TreePath, parent: Option<&dyn Tree>) -> Result<()> {
        let mut description = self.describe()?;
        let refs = &self.seen.refs;
        self.small(b"HEAD", (refs.head()? + "\n").into_bytes())?;
        let git_dir = &self.repository.git_dir;
        for name in FILES_BEFORE {
            self.copy_file(&git_dir.join(name), name.as_bytes(), Late::Loss)?;
        }
        self.copy_folder(&git_dir.join("hooks"), b"hooks", Late::Loss)?;
        self.copy_folder(&git_dir.join("info"), b"info", Late::Loss)?;
        if git_dir.join("lfs/objects").is_dir() {
            self.sink.enter(b"lfs", &Metadata::folder(FileTime::default()))?;
            self.copy_folder(&git_dir.join("lfs/objects"), b"objects", Late::LeftOut)?;
            self.sink.leave()?;
        }
        if self.driver.settings.reflogs {
            self.copy_folder(&git_dir.join("logs"), b"logs", Late::Fine)?;
        }
        self.small(b"packed-refs", refs.packed())?;
        description.packs = self.packs(path, parent)?;
        let text = serde_json::to_string_pretty(&description)
            .map_err(|error| Error::internal("a description does not serialize").source(error))?;
        self.small(b"repository.json", (text + "\n").into_bytes())?;
        self.copy_file(&git_dir.join("shallow"), b"shallow", Late::Loss)?;
        self.drained.items += description.refs;
        self.context.advance(0, description.refs);
        Ok(())
    }

    fn describe(&mut self) -> Result<Description> {
        let (repository, refs) = (self.repository, &self.seen.refs);
        let config = client::config_text(repository)?;
        let value = |section: &str, key: &str| wire::config_value(&config, section, key);
        let alternates =
            client::read_optional(&repository.git_dir.join("objects/info/alternates"))?.unwrap_or_default();
        let partial = value("extensions", "partialclone").is_some();
        let path = String::from_utf8_lossy(&repository.path).into_owned();
        if partial {
            let what = "objects that a partial clone left on its remote are not in the point".to_owned();
            self.drained.notes.push(format!("{path}: {what}"));
        }
        Ok(Description {
            object_format: value("extensions", "objectformat").unwrap_or_else(|| "sha1".to_owned()),
            ref_storage: value("extensions", "refstorage").unwrap_or_else(|| "files".to_owned()),
            working_tree: repository.working_tree,
            head: refs.head()?,
            symbolic: refs.symbolic(),
            packs: Vec::new(),
            refs: refs.objects().count() as u64,
            refs_sha256: refs.hash(),
            alternates: String::from_utf8_lossy(&alternates).lines().map(str::to_owned).collect(),
            shallow: repository.git_dir.join("shallow").exists(),
            partial,
            path,
        })
    }

    fn small(&mut self, name: &[u8], content: Vec<u8>) -> Result<()> {
        self.count(content.len() as u64, true);
        self.context.advance(content.len() as u64, 0);
        self.sink.file(name, &plain(), Some(content.len() as u64), bytes(content))
    }

    fn count(&mut self, bytes: u64, read: bool) {
        self.drained.bytes += bytes;
        self.drained.bytes_read += if read { bytes } else { 0 };
    }

    /// The packs: those of the parent again, and one with what is new since.
    fn packs(&mut self, path: &TreePath, parent: Option<&dyn Tree>) -> Result<Vec<Pack>> {
        let tips = self.seen.refs.tips();
        if tips.is_empty() {
            return Ok(Vec::new());
        }
        let base = parent.map(|tree| base(tree, path, self.repository)).transpose()?.flatten();
        let (mut packs, known) = match base {
            // Nothing moved: no need to ask git, which matters with thousands of repositories.
            Some((description, known)) if description.refs_sha256 == self.seen.refs.hash() => {
                (description.packs, known)
            }
            Some((description, known)) if description.packs.len() < self.driver.settings.generations_max as usize => {
                // What another repository's point holds says nothing, unless the objects are here.
                let here = client::present(self.repository, &known)?;
                if here.is_empty() { (Vec::new(), Vec::new()) } else { (description.packs, here) }
            }
            _ => (Vec::new(), Vec::new()),
        };
        self.sink.enter(b"packs", &Metadata::folder(FileTime::default()))?;
        for pack in &packs {
            let node = self.sink.parent(pack.name.as_bytes())?;
            if let Some(NodeKind::File { size }) = node.map(|node| node.kind) {
                self.count(size, false);
            }
            self.sink.reuse(pack.name.as_bytes(), &plain())?;
        }
        let known_set: HashSet<&String> = known.iter().collect();
        if tips.iter().any(|tip| !known_set.contains(tip)) {
            packs.extend(self.pack(packs.len() + 1, &tips, &known)?);
        }
        self.sink.leave()?;
        Ok(packs)
    }

    /// Packs what `tips` reach and `known` do not; no pack if that is nothing.
    fn pack(&mut self, number: usize, tips: &[String], known: &[String]) -> Result<Option<Pack>> {
        let mut running = Running::start(self.repository, tips, known, self.context)?;
        let mut held = Vec::new();
        running
            .stdout
            .by_ref()
            .take(HELD_PACK_BYTES_MAX as u64)
            .read_to_end(&mut held)
            .or_io(|| running.what.clone())?;
        let whole = held.len() < HELD_PACK_BYTES_MAX;
        if whole {
            running.end()?;
        }
        let objects = wire::pack_objects(&held)?;
        if objects == 0 {
            return Ok(None);
        }
        // Ten thousand generations sort by name; a consolidation begins again at one.
        let name = format!("{number:05}.pack");
        if whole {
            self.small(name.as_bytes(), held)?;
        } else {
            let size = disk_usage(self.repository, tips, known)?;
            self.count(size, true);
            running.held = Cursor::new(held);
            self.sink.file(name.as_bytes(), &plain(), Some(size), Box::new(running))?;
        }
        Ok(Some(Pack { name, objects }))
    }

    /// Copies a file if it is there.
    fn copy_file(&mut self, path: &Path, name: &[u8], late: Late) -> Result<()> {
        let found = match std::fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
        };
        let meta = metadata(&found);
        if found.is_symlink() {
            let target = std::fs::read_link(path).or_io(|| format!("cannot read {}", path.display()))?;
            let kind = NodeKind::Symlink { target: target.into_os_string().into_vec() };
            return self.sink.node(&Node { name: name.to_vec(), kind, meta });
        }
        if !found.is_file() {
            self.drained.notes.push(format!("{} is no file and was left out", path.display()));
            return Ok(());
        }
        let is_late = found.modified().is_ok_and(|modified| modified > self.view.at);
        match late {
            Late::LeftOut if is_late => return Ok(()),
            Late::Loss if is_late => {
                let why = "it changed after the cut".to_owned();
                self.drained.losses.push(Loss { what: path.display().to_string(), why });
            }
            _ => {}
        }
        let unchanged = self.sink.parent(name)?.is_some_and(|node| {
            node.kind == NodeKind::File { size: found.len() }
                && node.meta.mtime == meta.mtime
                && node.meta.ctime == meta.ctime
        });
        self.count(found.len(), !unchanged);
        if unchanged {
            return self.sink.reuse(name, &meta);
        }
        let file = File::open(path).or_io(|| format!("cannot read {}", path.display()))?;
        let content = Copied { file, path: path.to_owned(), left: found.len(), context: self.context.clone() };
        self.sink.file(name, &meta, Some(found.len()), Box::new(content))
    }

    /// Copies a folder if it is there and not empty.
    fn copy_folder(&mut self, path: &Path, name: &[u8], late: Late) -> Result<()> {
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io(format!("cannot list {}", path.display()), error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry.or_io(|| format!("cannot list {}", path.display()))?.file_name());
        }
        // For clients of the oldest protocol, made anew by every push.
        names.retain(|name| !path.ends_with("info") || name != "refs");
        names.sort();
        if names.is_empty() {
            return Ok(());
        }
        let found = std::fs::metadata(path).or_io(|| format!("cannot look at {}", path.display()))?;
        self.sink.enter(name, &metadata(&found))?;
        for name in &names {
            self.context.check()?;
            let path = path.join(name);
            let is_folder = std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir());
            if is_folder {
                self.copy_folder(&path, name.as_bytes(), late)?;
            } else {
                self.copy_file(&path, name.as_bytes(), late)?;
            }
        }
        self.sink.leave()
    }
}

fn metadata(found: &std::fs::Metadata) -> Metadata {
    let time = |seconds, nanos: i64| FileTime { seconds, nanos: u32::try_from(nanos).unwrap_or(0) };
    Metadata {
        mode: found.mode() & 0o7777,
        mtime: time(found.mtime(), found.mtime_nsec()),
        atime: time(found.mtime(), found.mtime_nsec()),
        ctime: time(found.ctime(), found.ctime_nsec()),
        ..Metadata::default()
    }
}

/// What an earlier point says of the repository, if packs can build on it: its description and the
/// ids that its refs named.
fn base(parent: &dyn Tree, path: &TreePath, repository: &Repository) -> Result<Option<(Description, Vec<String>)>> {
    if parent.get(&path.join(b"repository.json")?)?.is_none() {
        return Ok(None);
    }
    let (description, refs) = super::restore::read_point(parent, path)?;
    // A pack that the parent has lost cannot be built upon.
    for pack in &description.packs {
        if parent.get(&path.join(b"packs")?.join(pack.name.as_bytes())?)?.is_none() {
            return Ok(None);
        }
    }
    // "Everything behind this commit" means less where history is cut off or left on a remote, so
    // it must be cut off at the same places.
    let shallow = path.join(b"shallow")?;
    let before = parent.get(&shallow)?.map(|_| point_file(parent, &shallow)).transpose()?;
    let same = before == client::read_optional(&repository.git_dir.join("shallow"))?;
    Ok((same && !description.partial).then(|| (description, refs.tips())))
}

/// `git pack-objects` at work, read as a stream.
struct Running {
    child: Child,
    stdout: ChildStdout,
    stderr: Option<std::thread::JoinHandle<Vec<u8>>>,
    held: Cursor<Vec<u8>>,
    context: Context,
    what: String,
    ended: bool,
}

impl Running {
    fn start(repository: &Repository, tips: &[String], known: &[String], context: &Context) -> Result<Self> {
        let what = format!("cannot pack {}", repository.git_dir.display());
        let mut command = client::git(&repository.git_dir);
        // The repository compresses what git did not; recompressing here would only cost time.
        command.args(["pack-objects", "--revs", "--stdout", "--thin", "--delta-base-offset", "-q"]);
        if wire::config_value(&client::config_text(repository)?, "extensions", "partialclone").is_some() {
            command.arg("--missing=allow-promisor");
        }
        let mut child = command.stdin(Stdio::piped()).spawn().map_err(|error| client::no_git(&what, error))?;
        let mut input = revisions(tips, known);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(mut stderr)) = (stdin, stdout, stderr) else {
            return Err(Error::internal("a child without pipes"));
        };
        // If git gives up early, its exit code says so; the broken pipe adds nothing.
        std::thread::spawn(move || drop(stdin.write_all(std::mem::take(&mut input).as_bytes())));
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            drop(stderr.read_to_end(&mut text));
            text
        });
        let held = Cursor::new(Vec::new());
        Ok(Self { child, stdout, stderr: Some(stderr), held, context: context.clone(), what, ended: false })
    }

    /// Waits for git and fails if it failed: then an object of the cut is gone or damaged.
    fn end(&mut self) -> Result<()> {
        self.ended = true;
        let status = self.child.wait().or_io(|| self.what.clone())?;
        if status.success() {
            return Ok(());
        }
        let text = self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let cause = client::failed(&self.what, &text);
        let kind = if cause.kind() == Kind::Corrupt { Kind::PinLost } else { cause.kind() };
        Err(Error::new(kind, format!("{}: an object is gone or damaged", self.what))
            .hint("git fsck tells which; if it finds nothing, objects were pruned during the backup: run it again")
            .source(cause))
    }
}

impl Content for Running {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.context.check()?;
        let mut read = self.held.read(buffer).or_io(|| self.what.clone())?;
        if read == 0 {
            read = self.stdout.read(buffer).or_io(|| self.what.clone())?;
        }
        self.context.advance(read as u64, 0);
        Ok(read)
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        self.end().map(|()| ContentEnd::Whole)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            // Nobody wants the pack any more.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// A file on its way; one that shrank meanwhile is torn.
struct Copied {
    file: File,
    path: std::path::PathBuf,
    left: u64,
    context: Context,
}

impl Content for Copied {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.context.check()?;
        let limit = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..limit]).or_io(|| format!("cannot read {}", self.path.display()))?;
        self.left -= read as u64;
        self.context.advance(read as u64, 0);
        Ok(read)
    }

    fn finish(&mut self) -> Result<ContentEnd> {
        let torn = || ContentEnd::Torn(format!("{} became shorter while it was read", self.path.display()));
        Ok(if self.left == 0 { ContentEnd::Whole } else { torn() })
    }
}

/// What git reads to know which objects are meant.
fn revisions(tips: &[String], known: &[String]) -> String {
    let mut text = tips.join("\n") + "\n";
    for id in known {
        text.push_str(&format!("^{id}\n"));
    }
    text
}

/// How much the objects take in the repository; their pack will be about as large.
fn disk_usage(repository: &Repository, tips: &[String], known: &[String]) -> Result<u64> {
    let mut command = client::git(&repository.git_dir);
    command.args(["rev-list", "--disk-usage", "--objects", "--stdin"]);
    let text = client::feed(&mut command, "cannot measure what is new", revisions(tips, known).as_bytes())?;
    Ok(String::from_utf8_lossy(&text).trim().parse().unwrap_or(0))
}

/// Yields the commits that the refs reach: of the pinned view, or of the live store.
pub(super) fn edges(
    driver: &Git,
    context: &Context,
    pin: Option<&Pin>,
    query: &EdgeQuery,
    visit: &mut (dyn FnMut(Edge) -> Result<()> + Send),
) -> Result<()> {
    let mut wanted: Option<HashSet<&[u8]>> = match query {
        EdgeQuery::Held(kind) if kind == "commits" => None,
        EdgeQuery::Which { kind, referents } if kind == "commits" => {
            Some(referents.iter().map(Vec::as_slice).collect())
        }
        _ => {
            return Err(
                Error::new(Kind::Unsupported, "a git store holds commits, and names nothing").hint("kind: commits")
            );
        }
    };
    let view = match pin {
        Some(pin) => cut::pinned(driver, pin)?,
        None => std::sync::Arc::new(cut::view(driver)?),
    };
    for (repository, seen) in &view.repositories {
        context.check()?;
        let tips = seen.refs.tips();
        if tips.is_empty() || (wanted.is_some() && !holds_any(repository, wanted.as_ref())?) {
            continue;
        }
        commits(repository, &tips, &mut |id| {
            context.check()?;
            if wanted.as_mut().is_none_or(|wanted| wanted.remove(id)) {
                visit(Edge { referent: id.to_vec(), owner: String::new() })?;
            }
            Ok(wanted.as_ref().is_none_or(|wanted| !wanted.is_empty()))
        })?;
    }
    Ok(())
}

/// Whether the repository has any of the wanted objects at all: asked first, because that is a
/// look-up and not a walk.
fn holds_any(repository: &Repository, wanted: Option<&HashSet<&[u8]>>) -> Result<bool> {
    let ids = wanted.into_iter().flatten().filter_map(|id| std::str::from_utf8(id).ok());
    let ids: Vec<String> = ids.filter(|id| wire::is_object_id(id)).map(str::to_owned).collect();
    Ok(!client::present(repository, &ids)?.is_empty())
}

/// Walks history from the tips until `visit` returns `false`.
fn commits(repository: &Repository, tips: &[String], visit: &mut dyn FnMut(&[u8]) -> Result<bool>) -> Result<()> {
    let what = format!("cannot walk the history of {}", repository.git_dir.display());
    let mut list = tempfile::tempfile().or_io(|| what.clone())?;
    list.write_all(revisions(tips, &[]).as_bytes()).or_io(|| what.clone())?;
    std::io::Seek::rewind(&mut list).or_io(|| what.clone())?;
    let mut command = client::git(&repository.git_dir);
    command.args(["rev-list", "--stdin"]).stdin(list);
    let mut child = command.spawn().map_err(|error| client::no_git(&what, error))?;
    let stdout = child.stdout.take().ok_or_else(|| Error::internal("a child without output"))?;
    let mut go_on = Ok(true);
    for line in BufReader::new(stdout).split(b'\n') {
        go_on = line.or_io(|| what.clone()).and_then(|line| visit(&line));
        if !matches!(go_on, Ok(true)) {
            break;
        }
    }
    if !matches!(go_on, Ok(true)) {
        // Enough was seen; what git would still say does not matter.
        drop(child.kill());
    }
    let output = child.wait_with_output().or_io(|| what.clone())?;
    match go_on {
        Ok(true) if !output.status.success() => Err(client::failed(&what, &output.stderr)),
        other => other.map(drop),
    }
}

/// Reads a small file of a point.
pub(super) fn point_file(tree: &dyn Tree, path: &TreePath) -> Result<Vec<u8>> {
    read_small(tree, path, SMALL_FILE_BYTES_MAX)
}
