//! The way back: built beside with git's own tools, proven by fsck, swapped in by one rename.
//!
//! Nothing of the point's configuration is in force while git runs, and no hook is where git would
//! run it, unless the settings ask for that.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use stillpoint_core::driver::{Context, Loss, RestoreMode, RestoreRequest, Restored, Verification};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::{Existing, ExtractOptions, NodeKind, Tree, TreePath};

use super::client::{self, Repository, git, output};
use super::drain::point_file;
use super::wire::{self, Description, Refs, Target};
use super::{Git, REPOSITORIES, STAMP, STORE};

const DIFFERENCES_MAX: usize = 100;

/// One repository of a point.
struct Stored {
    /// Its folder in the point.
    folder: TreePath,
    /// Its path within the store.
    path: Vec<u8>,
    description: Description,
    refs: Refs,
}

/// Reads a repository's description and refs from its folder in a point.
pub(super) fn read_point(tree: &dyn Tree, folder: &TreePath) -> Result<(Description, Refs)> {
    let damaged = |what: &str| Error::new(Kind::Corrupt, format!("`{folder}` of the point {what}"));
    let text = point_file(tree, &folder.join(b"repository.json")?)?;
    let description: Description =
        serde_json::from_slice(&text).map_err(|error| damaged("has no readable description").source(error))?;
    let mut refs = Refs::default();
    for (name, id) in wire::parse_packed(&point_file(tree, &folder.join(b"packed-refs")?)?)? {
        refs.0.insert(name, Target::Object(id));
    }
    for (name, target) in &description.symbolic {
        if !wire::is_ref_name(name) || !wire::is_ref_name(target) {
            return Err(damaged("names refs that are none"));
        }
        refs.0.insert(name.clone(), Target::Symbolic(target.clone()));
    }
    let head = wire::parse_loose(description.head.as_bytes()).ok_or_else(|| damaged("has no HEAD"))?;
    refs.0.insert("HEAD".to_owned(), head);
    if refs.hash() != description.refs_sha256 {
        return Err(damaged("holds other refs than it says"));
    }
    Ok((description, refs))
}

fn stored(context: &Context, source: &dyn Tree, part: Option<&TreePath>) -> Result<Vec<Stored>> {
    let top = TreePath::root().join(REPOSITORIES.as_bytes())?;
    if source.get(&top)?.is_none() {
        return Err(Error::new(Kind::Corrupt, format!("the point holds no `{REPOSITORIES}/` of a git store")));
    }
    let mut names = Vec::new();
    source.list(&top, &mut |node| {
        names.push(node.name);
        Ok(true)
    })?;
    let store: serde_json::Value =
        serde_json::from_slice(&point_file(source, &TreePath::root().join(STORE.as_bytes())?)?).map_err(|error| {
            Error::new(Kind::Corrupt, format!("`{STORE}` of the point cannot be read")).source(error)
        })?;
    if store["repositories"].as_u64() != Some(names.len() as u64) {
        return Err(Error::new(Kind::Corrupt, "the point holds another number of repositories than it says"));
    }
    let mut found = Vec::new();
    for name in names {
        context.check()?;
        let (folder, path) = (top.join(&name)?, wire::decode(&name)?);
        if part.is_some_and(|part| *part != folder && part.to_string().as_bytes() != path) {
            continue;
        }
        let (description, refs) = read_point(source, &folder)?;
        found.push(Stored { folder, path, description, refs });
    }
    match part {
        Some(part) if found.is_empty() => Err(Error::new(Kind::NotFound, format!("the point holds no `{part}`"))
            .hint("name a repository by its path, e.g. group/project.git")),
        _ => Ok(found),
    }
}

/// What is put in place by one rename: the whole store, or the one repository's own directory.
fn unit(driver: &Git, stored: &[Stored]) -> PathBuf {
    match stored {
        [only] if only.path == b"." && only.description.working_tree => driver.settings.path.join(".git"),
        _ => driver.settings.path.clone(),
    }
}

/// Builds everything beside the target; until the swap, a failure has changed nothing.
pub(super) fn restore(
    driver: &Git,
    context: &Context,
    source: &dyn Tree,
    request: &RestoreRequest,
) -> Result<Restored> {
    context.check()?;
    let path = &driver.settings.path;
    let vacant = client::is_vacant(path, STAMP)?;
    if request.mode == RestoreMode::Fresh && !vacant {
        return Err(Error::new(Kind::AlreadyExists, format!("{} is not empty", path.display()))
            .hint("restore into a new path, or in place if the old content is to be replaced"));
    }
    let stored = stored(context, source, request.part.as_ref())?;
    if request.part.is_some() && !vacant {
        return Err(Error::new(Kind::AlreadyExists, "a part of a git store is restored into an empty path only"));
    }
    let unit = unit(driver, &stored);
    let beside = beside(&unit, &format!("restoring-{}", request.restore))?;
    remove(&beside)?;
    let built = build(driver, context, source, &stored, &unit, &beside);
    let mut restored = match built {
        Ok(restored) => restored,
        Err(error) => {
            remove(&beside)?;
            return Err(error);
        }
    };
    restored.kept_old.extend(swap(&unit, &beside, &request.restore)?);
    Ok(restored)
}

fn build(
    driver: &Git,
    context: &Context,
    source: &dyn Tree,
    stored: &[Stored],
    unit: &Path,
    beside: &Path,
) -> Result<Restored> {
    let mut restored = Restored::default();
    fs::create_dir_all(beside).or_io(|| format!("cannot make {}", beside.display()))?;
    for one in stored {
        context.check()?;
        let own_unit = unit != driver.settings.path;
        let place = if one.path == b"." { beside.to_owned() } else { beside.join(client::path_of(&one.path)) };
        let git_dir = if one.description.working_tree && !own_unit { place.join(".git") } else { place };
        let mut building = Building { driver, context, source, one, git_dir, restored: &mut restored };
        building.run()?;
    }
    // One sync of the file system instead of one per file.
    let folder = fs::File::open(beside).or_io(|| format!("cannot open {}", beside.display()))?;
    rustix::fs::syncfs(&folder).map_err(std::io::Error::from).or_io(|| format!("cannot sync {}", beside.display()))?;
    Ok(restored)
}

/// One repository being built.
struct Building<'a> {
    driver: &'a Git,
    context: &'a Context,
    source: &'a dyn Tree,
    one: &'a Stored,
    git_dir: PathBuf,
    restored: &'a mut Restored,
}

impl Building<'_> {
    fn run(&mut self) -> Result<()> {
        self.init()?;
        let shallow = self.file(b"shallow", "shallow")?;
        if self.one.description.shallow != shallow {
            return Err(Error::new(Kind::Corrupt, format!("`{}` of the point lacks `shallow`", self.one.folder)));
        }
        self.index_packs()?;
        self.write_refs()?;
        self.prove()?;
        // From here on git is not called any more: now the point's settings may come.
        for name in ["config", "description"] {
            self.file(name.as_bytes(), name)?;
        }
        for (name, to) in [("hooks", "hooks.restored"), ("info", "info"), ("lfs", "lfs"), ("logs", "logs")] {
            self.folder(name.as_bytes(), to)?;
        }
        self.wake_hooks()
    }

    /// Hooks come back asleep, because they are programs; git's own samples are asleep anyway.
    fn wake_hooks(&mut self) -> Result<()> {
        let asleep = self.git_dir.join("hooks.restored");
        let unreadable = || format!("cannot list {}", asleep.display());
        let entries = match fs::read_dir(&asleep) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.or_io(unreadable)?.collect::<std::io::Result<Vec<_>>>().or_io(unreadable)?,
        };
        let is_sample = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|extension| extension == "sample");
        let only_samples = entries.iter().all(is_sample);
        if self.driver.settings.restore_hooks || only_samples {
            let awake = self.git_dir.join("hooks");
            return fs::rename(&asleep, &awake).or_io(|| format!("cannot move hooks to {}", awake.display()));
        }
        let why = "hooks came back asleep, as hooks.restored; restoreHooks: true wakes them".to_owned();
        self.restored.losses.push(Loss { what: self.one.folder.to_string(), why });
        Ok(())
    }

    fn init(&self) -> Result<()> {
        let what = format!("cannot make a repository at {}", self.git_dir.display());
        fs::create_dir_all(&self.git_dir).or_io(|| what.clone())?;
        let description = &self.one.description;
        if !["sha1", "sha256"].contains(&description.object_format.as_str()) {
            return Err(Error::new(Kind::Unsupported, format!("object format {:?}", description.object_format)));
        }
        let mut command = git(&self.git_dir);
        // An empty template: no sample hooks, nothing of this machine.
        command.args(["init", "--quiet", "--bare", "--template="]);
        command.arg(format!("--object-format={}", description.object_format));
        if description.ref_storage == "reftable" {
            command.arg("--ref-format=reftable");
        }
        output(&mut command, &what).map(drop)
    }

    fn index_packs(&mut self) -> Result<()> {
        let folder = self.one.folder.join(b"packs")?;
        for pack in &self.one.description.packs {
            self.context.check()?;
            let path = folder.join(pack.name.as_bytes())?;
            let reader = Watched { driver: self.source.open(&path)?, context: self.context.clone() };
            let mut command = git(&self.git_dir);
            command.args(["index-pack", "--stdin", "--fix-thin"]);
            client::feed(&mut command, &format!("cannot index `{path}`"), reader)?;
            if let Some(NodeKind::File { size }) = self.source.get(&path)?.map(|node| node.kind) {
                self.restored.bytes += size;
            }
        }
        Ok(())
    }

    /// All refs in one transaction; git checks each name and that its object is there.
    fn write_refs(&mut self) -> Result<()> {
        let refs = &self.one.refs;
        let what = format!("cannot write the refs of `{}`", self.one.folder);
        let mut input = Vec::new();
        for (name, id) in refs.objects().filter(|(name, _)| *name != "HEAD") {
            input.extend(format!("create {name}\0{id}\0").into_bytes());
        }
        let mut update = git(&self.git_dir);
        update.args(["-c", "core.logAllRefUpdates=false", "update-ref", "--stdin", "-z"]);
        client::feed(&mut update, &what, input.as_slice())?;
        output(git(&self.git_dir).args(["pack-refs", "--all"]), &what)?;
        for (name, target) in &refs.0 {
            match target {
                Target::Symbolic(to) if name == "HEAD" && !to.starts_with("refs/") => {
                    return Err(Error::new(Kind::Corrupt, format!("HEAD names `{to}`, which is no ref")));
                }
                Target::Symbolic(to) => output(git(&self.git_dir).args(["symbolic-ref", name, to]), &what).map(drop)?,
                Target::Object(id) if name == "HEAD" => {
                    output(git(&self.git_dir).args(["update-ref", "--no-deref", "HEAD", id]), &what).map(drop)?;
                }
                Target::Object(_) => {}
            }
        }
        let written = client::read_refs(&self.repository())?.refs;
        if written != *refs {
            return Err(Error::new(Kind::Unproven, format!("{what}: they read back differently")));
        }
        let count = refs.objects().count() as u64;
        self.restored.items += count;
        self.context.advance(0, count);
        Ok(())
    }

    fn repository(&self) -> Repository {
        Repository { path: self.one.path.clone(), git_dir: self.git_dir.clone(), working_tree: false }
    }

    /// Everything that the refs reach must be there.
    fn prove(&self) -> Result<()> {
        if self.one.description.partial {
            return Ok(());
        }
        fsck(&self.git_dir).map_err(|error| {
            Error::new(Kind::Corrupt, format!("`{}` of the point is not complete", self.one.folder)).source(error)
        })
    }

    /// Copies one small file; returns whether the point has it.
    fn file(&self, name: &[u8], to: &str) -> Result<bool> {
        let path = self.one.folder.join(name)?;
        match self.source.get(&path)?.map(|node| node.kind) {
            None => return Ok(false),
            Some(NodeKind::File { .. }) => {}
            Some(_) => return Err(Error::new(Kind::Corrupt, format!("`{path}` of the point is no file"))),
        }
        let to = self.git_dir.join(to);
        fs::write(&to, point_file(self.source, &path)?).or_io(|| format!("cannot write {}", to.display()))?;
        Ok(true)
    }

    fn folder(&mut self, name: &[u8], to: &str) -> Result<()> {
        let path = self.one.folder.join(name)?;
        if self.source.get(&path)?.is_none_or(|node| node.kind != NodeKind::Dir) {
            return Ok(());
        }
        let options = ExtractOptions { existing: Existing::Replace, owners: false };
        let extracted = self.source.extract(&path, &self.git_dir.join(to), &options, self.context)?;
        self.restored.bytes += extracted.bytes;
        let losses = extracted.losses.into_iter().map(|why| Loss { what: path.to_string(), why });
        self.restored.losses.extend(losses);
        Ok(())
    }
}

/// Stops a long pack when asked to.
struct Watched {
    driver: Box<dyn std::io::Read + Send>,
    context: Context,
}

impl std::io::Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.context.check().map_err(std::io::Error::other)?;
        let read = self.driver.read(buffer)?;
        self.context.advance(read as u64, 0);
        Ok(read)
    }
}

fn fsck(git_dir: &Path) -> Result<()> {
    let mut command = git(git_dir);
    command.args(["fsck", "--connectivity-only", "--no-reflogs", "--no-dangling", "--no-progress"]);
    output(&mut command, &format!("{} is not complete", git_dir.display())).map(drop)
}

/// A name in the same directory, so that the swap is a rename.
fn beside(unit: &Path, suffix: &str) -> Result<PathBuf> {
    let (Some(parent), Some(name)) = (unit.parent(), unit.file_name()) else {
        return Err(Error::new(Kind::Config, format!("{} cannot be replaced", unit.display())));
    };
    let mut name = name.to_owned();
    name.push(format!(".{suffix}"));
    Ok(parent.join(name))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Puts the new in place and keeps the old beside it; says where, if there was an old one.
fn swap(unit: &Path, beside_new: &Path, restore: &str) -> Result<Option<String>> {
    let what = || format!("cannot put {} in place", unit.display());
    let mut kept = None;
    if client::is_vacant(unit, STAMP)? {
        // Nothing but, perhaps, a stamp: it goes with the place it was planted in.
        remove(unit)?;
    } else {
        let old = beside(unit, &format!("before-{restore}"))?;
        if fs::symlink_metadata(&old).is_ok() {
            return Err(Error::new(Kind::AlreadyExists, format!("{} is there from an earlier restore", old.display()))
                .hint("move it away, then restore again"));
        }
        fs::rename(unit, &old).or_io(what)?;
        kept = Some(old);
    }
    if let Err(error) = fs::rename(beside_new, unit) {
        if let Some(old) = &kept {
            fs::rename(old, unit).or_io(|| format!("cannot bring {} back", old.display()))?;
        }
        return Err(Error::io(what(), error));
    }
    if let Some(parent) = unit.parent() {
        fs::File::open(parent).and_then(|folder| folder.sync_all()).or_io(what)?;
    }
    Ok(kept.map(|old| old.display().to_string()))
}

/// Compares all refs with the point's, and asks git whether everything behind them is there.
pub(super) fn verify(driver: &Git, context: &Context, source: &dyn Tree) -> Result<Verification> {
    let stored = stored(context, source, None)?;
    let live = client::discover(&driver.settings.path)?;
    let mut verification = Verification::default();
    let mut differences = Vec::new();
    for one in &stored {
        context.check()?;
        let shown = String::from_utf8_lossy(&one.path).into_owned();
        let Some(repository) = live.iter().find(|live| live.path == one.path) else {
            differences.push(format!("{shown}: missing"));
            continue;
        };
        let refs = client::read_refs(repository)?.refs;
        let names: BTreeSet<&String> = refs.0.keys().chain(one.refs.0.keys()).collect();
        for name in names {
            verification.checked += 1;
            match (one.refs.0.get(name), refs.0.get(name)) {
                (Some(expected), Some(found)) if expected == found => {}
                (Some(_), Some(_)) => differences.push(format!("{shown}: {name} points elsewhere")),
                (Some(_), None) => differences.push(format!("{shown}: {name} is missing")),
                (None, _) => differences.push(format!("{shown}: {name} is not in the point")),
            }
        }
        if !one.description.partial
            && let Err(error) = fsck(&repository.git_dir)
        {
            differences.push(format!("{shown}: git fsck fails: {error}"));
        }
    }
    for repository in live.iter().filter(|live| !stored.iter().any(|one| one.path == live.path)) {
        differences.push(format!("{}: not in the point", String::from_utf8_lossy(&repository.path)));
    }
    differences.truncate(DIFFERENCES_MAX);
    verification.differences = differences;
    Ok(verification)
}

/// What a restore would overwrite, for people.
pub(super) fn occupied(driver: &Git) -> Result<Option<String>> {
    let path = &driver.settings.path;
    if client::is_vacant(path, STAMP)? {
        return Ok(None);
    }
    Ok(Some(match client::discover(path)?.as_slice() {
        [] => "files that are no repository".to_owned(),
        [_] => "1 repository".to_owned(),
        many => format!("{} repositories", many.len()),
    }))
}

fn stamp_path(driver: &Git) -> PathBuf {
    let path = &driver.settings.path;
    let inner_git = path.join(".git");
    if client::is_git_dir(&inner_git) { inner_git.join(STAMP) } else { path.join(STAMP) }
}

pub(super) fn stamp(driver: &Git, stamp: &Stamp) -> Result<()> {
    let path = stamp_path(driver);
    let what = || format!("cannot stamp {}", path.display());
    let text = serde_json::to_vec_pretty(stamp)
        .map_err(|error| Error::internal("a stamp does not serialize").source(error))?;
    let mut temporary = path.clone().into_os_string();
    temporary.push(".new");
    let mut file = fs::File::create(&temporary).or_io(what)?;
    file.write_all(&text).and_then(|()| file.sync_all()).or_io(what)?;
    fs::rename(&temporary, &path).or_io(what)?;
    let folder = path.parent().unwrap_or(&driver.settings.path);
    fs::File::open(folder).and_then(|folder| folder.sync_all()).or_io(what)
}

pub(super) fn read_stamp(driver: &Git) -> Result<Option<Stamp>> {
    let path = stamp_path(driver);
    let Some(text) = client::read_optional(&path)? else { return Ok(None) };
    let stamp = serde_json::from_slice(&text);
    stamp.map(Some).map_err(|error| {
        Error::new(Kind::Corrupt, format!("the stamp {} cannot be read", path.display())).source(error)
    })
}
