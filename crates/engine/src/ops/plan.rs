//! `plan`: what a restore would do, overwrite and lose. Read-only.
//!
//! The same look at point and targets serves `apply`, which compares what it sees with the plan
//! that was reviewed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stillpoint_core::driver::{Context, Driver};
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::plan::RestorePlan;
use stillpoint_core::plan::backup::restore_precedences;
use stillpoint_core::plan::order::{Precedence, layers};
use stillpoint_core::plan::restore::{PlanHash, RestoreStep, SCHEMA, TargetFound};
use stillpoint_core::position::Identity;
use stillpoint_core::statefile::{Level, Statefile, StoreState, Verdict};
use stillpoint_core::tree::{Node, NodeKind, Tree, TreePath};
use stillpoint_repo::SnapshotId;

use super::destination::Destination;
use crate::cancel::CancelToken;
use crate::effects::on_thread;
use crate::fence::{self, Fence, Finding, Intent, Source, Target};
use crate::open::{self, Session};
use crate::points;

/// How long a source may take to say who it is; it may be the very thing that burned down.
const SOURCE_WITHIN: Duration = Duration::from_secs(10);
/// How long a target may take to be looked at.
const TARGET_WITHIN: Duration = Duration::from_secs(120);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanRequest {
    /// The point: an id, a prefix of at least 4 characters, or `latest`.
    pub point: String,
    /// Where to.
    pub destination: Destination,
    /// Which stores; empty for all of the point.
    pub stores: Vec<StoreName>,
    /// Only this path of a store's tree.
    pub parts: BTreeMap<StoreName, String>,
    /// Overwrite what an earlier restore into the same environment left.
    pub replace: bool,
    /// Accept that stores of different points stand side by side afterwards.
    pub accept_mixed: bool,
    /// Read back what was written and compare it with the point.
    pub compare: bool,
}

impl PlanRequest {
    /// Everything of `point`, to `destination`.
    pub fn new(point: impl Into<String>, destination: Destination) -> Self {
        Self {
            point: point.into(),
            destination,
            stores: Vec::new(),
            parts: BTreeMap::new(),
            replace: false,
            accept_mixed: false,
            compare: true,
        }
    }

    /// The request that a plan was made for.
    pub fn of(plan: &RestorePlan, typed: Vec<String>) -> Self {
        let part = |step: &RestoreStep| Some((step.store.clone(), step.part.clone()?));
        Self {
            point: plan.point.as_str().to_owned(),
            destination: Destination::of(plan, typed),
            stores: plan.steps.iter().map(|step| step.store.clone()).collect(),
            parts: plan.steps.iter().filter_map(part).collect(),
            replace: plan.replaces,
            accept_mixed: plan.accepts_mixed,
            compare: plan.compares,
        }
    }
}

/// A plan, and whether it may be carried out.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// The plan.
    pub plan: RestorePlan,
    /// Its name.
    pub hash: PlanHash,
    /// The point.
    pub statefile: Statefile,
    /// What stands against it. `apply` refuses while there is anything.
    pub fence: Vec<Finding>,
}

/// Plans a restore.
///
/// # Errors
/// `NotFound` and `Config` for what does not exist; those of drivers and bucket. What the fence
/// finds is no error here.
pub async fn run(session: &Session, request: &PlanRequest, cancel: &CancelToken) -> Result<Planned> {
    let (context, ours) = (Context::default(), BTreeSet::new());
    let draft = tokio::select! {
        draft = draft(session, request, &ours, &context) => draft?,
        () = cancel.cancelled() => return Err(Error::new(Kind::Cancelled, "stopped on request")),
    };
    Ok(Planned { hash: draft.plan.hash()?, plan: draft.plan, statefile: draft.statefile, fence: draft.findings })
}

/// A plan with everything that carrying it out needs.
pub(super) struct Draft {
    pub(super) plan: RestorePlan,
    pub(super) findings: Vec<Finding>,
    pub(super) statefile: Statefile,
    pub(super) drivers: BTreeMap<StoreName, Arc<dyn Driver>>,
    pub(super) trees: BTreeMap<StoreName, Arc<dyn Tree>>,
    pub(super) sources: Vec<Source>,
    pub(super) scratch: tempfile::TempDir,
}

/// Looks at point and targets. Stores in `ours` were begun by the restore that asks: that their
/// targets hold something is no finding.
pub(super) async fn draft(
    session: &Session,
    request: &PlanRequest,
    ours: &BTreeSet<StoreName>,
    context: &Context,
) -> Result<Draft> {
    let named: BTreeSet<StoreName> = request.stores.iter().chain(request.parts.keys()).cloned().collect();
    let statefile = point(session, &request.point, &named).await?;
    let selected = select(&statefile, request)?;
    let scratch = scratch_folder()?;
    let mut warnings = point_warnings(session, &statefile);
    let mut drivers = BTreeMap::new();
    let mut trees = BTreeMap::new();
    let mut targets = Vec::new();
    for store in &selected {
        let folder = scratch.path().join(store.as_str());
        let driver = request.destination.open(session.config(), store, statefile.stores.get(store), &folder)?;
        let look = tokio::time::timeout(TARGET_WITHIN, fence::look(store, driver.as_ref(), context));
        let mut target = look.await.unwrap_or_else(|_| Err(slow(store)))?;
        if ours.contains(store) {
            target.occupied = None;
        }
        targets.push(target);
        drivers.insert(store.clone(), driver);
        trees.insert(store.clone(), tree(session, &statefile, store).await?);
    }
    let sources = sources(session, &statefile, scratch.path().to_owned(), context, &mut warnings).await;
    let mut findings = fence_of(session, &statefile, request, &sources).check(&targets);
    findings.extend(mixed(session, request, &statefile, &selected, &scratch, context).await);
    let sizes = part_sizes(request, &trees, &mut warnings).await?;
    let steps = steps(session, request, &statefile, &selected, &targets, &sizes)?;
    let in_place = matches!(request.destination, Destination::InPlace { .. });
    let plan = RestorePlan {
        schema: SCHEMA.to_owned(),
        platform: statefile.platform.clone(),
        point: statefile.point.clone(),
        source_environment: statefile.environment.clone(),
        target_environment: request.destination.environment(session.config()).clone(),
        to: request.destination.absolute()?.map(|folder| folder.to_string_lossy().into_owned()),
        in_place,
        replaces: request.replace,
        accepts_mixed: request.accept_mixed,
        compares: request.compare,
        snapshot: statefile.snapshot.clone(),
        cut_at: statefile.cut_at,
        steps,
        warnings,
    };
    Ok(Draft { plan, findings, statefile, drivers, trees, sources, scratch })
}

/// The fence of a restore of this point to this destination.
pub(super) fn fence_of<'a>(
    session: &'a Session,
    statefile: &'a Statefile,
    request: &'a PlanRequest,
    sources: &'a [Source],
) -> Fence<'a> {
    let intent = match &request.destination {
        Destination::InPlace { typed } => Intent::InPlace { typed },
        _ => Intent::Copy { replace: request.replace },
    };
    Fence {
        platform: &statefile.platform,
        source_environment: &statefile.environment,
        target_environment: request.destination.environment(session.config()),
        sources,
        intent,
    }
}

fn slow(store: &StoreName) -> Error {
    let seconds = TARGET_WITHIN.as_secs();
    Error::new(Kind::TimedOut, format!("the target did not answer within {seconds} s")).store(store.as_str())
}

/// A folder for temporary files, gone when it is dropped.
pub(super) fn scratch_folder() -> Result<tempfile::TempDir> {
    let parent = open::state_folder().join("scratch");
    std::fs::create_dir_all(&parent).or_io(|| format!("cannot create the folder `{}`", parent.display()))?;
    let made = tempfile::Builder::new().prefix("restore-").tempdir_in(&parent);
    made.or_io(|| format!("cannot create a folder in `{}`", parent.display()))
}

/// The authenticated statefile of the point that `name` means to someone who needs these stores, or
/// all if none is named.
pub(super) async fn point(session: &Session, name: &str, stores: &BTreeSet<StoreName>) -> Result<Statefile> {
    let (session, name, stores) = (session.clone(), name.to_owned(), stores.clone());
    on_thread("points", move || {
        let listing = points::list(session.bucket().as_ref(), session.repository())?;
        let platform = session.platform();
        listing.find_for(&name, &platform.platform, &platform.environment, &stores).cloned()
    })
    .await
}

/// What the point holds of one store.
pub(super) async fn tree(session: &Session, statefile: &Statefile, store: &StoreName) -> Result<Arc<dyn Tree>> {
    let repository = session.repository().clone();
    let (snapshot, name) = (SnapshotId::parse(&statefile.snapshot)?, store.clone());
    let tree = on_thread("tree", move || repository.tree(&snapshot, Some(&name))).await?;
    tree.ok_or_else(|| {
        Error::new(Kind::Corrupt, "the snapshot of the point lacks the store's folder")
            .store(store.as_str())
            .context("point", &statefile.point)
            .hint("`stillpoint verify` tells what else is missing; another point may be whole")
    })
}

fn select(statefile: &Statefile, request: &PlanRequest) -> Result<BTreeSet<StoreName>> {
    let mut selected: BTreeSet<StoreName> = request.stores.iter().chain(request.parts.keys()).cloned().collect();
    if let Some(unknown) = selected.iter().find(|store| !statefile.stores.contains_key(*store)) {
        let known: Vec<_> = statefile.stores.keys().map(StoreName::as_str).collect();
        return Err(Error::new(Kind::NotFound, format!("the point {} holds no store `{unknown}`", statefile.point))
            .hint(format!("stores of the point: {}", known.join(", "))));
    }
    if selected.is_empty() {
        selected = statefile.stores.keys().cloned().collect();
    }
    Ok(selected)
}

fn point_warnings(session: &Session, statefile: &Statefile) -> Vec<String> {
    let mut warnings = Vec::new();
    if statefile.verdict == Verdict::RestorableWithNamedLoss {
        warnings.push("the point itself has named losses".to_owned());
    }
    if statefile.level < Level::Strict && statefile.stores.len() > 1 {
        let millis = statefile.skew_micros.div_ceil(1_000);
        warnings.push(format!("the stores were pinned within {millis} ms of each other, while writers ran"));
    }
    for store in session.platform().stores.keys().filter(|store| !statefile.stores.contains_key(*store)) {
        warnings.push(format!("store `{store}` of platform.yaml is not in the point"));
    }
    warnings
}

/// Everything that a copy must not touch: the stores as the point knew them, the stores as
/// platform.yaml names them now, and the bucket.
async fn sources(
    session: &Session,
    statefile: &Statefile,
    scratch: PathBuf,
    context: &Context,
    warnings: &mut Vec<String>,
) -> Vec<Source> {
    let mut sources: Vec<Source> = Vec::new();
    for (store, state) in &statefile.stores {
        sources.push(Source { what: format!("store `{store}` of the point"), identity: state.identity.clone() });
    }
    for store in session.platform().stores.keys() {
        let folder = scratch.join("sources").join(store.as_str());
        let identity = async { open::driver(session.config(), store, &folder)?.identity(context).await };
        match tokio::time::timeout(SOURCE_WITHIN, identity).await {
            Ok(Ok(identity)) if sources.iter().all(|source| source.identity != identity) => {
                sources.push(Source { what: format!("store `{store}` of platform.yaml"), identity });
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == Kind::NotFound => {}
            _ => warnings.push(format!("store `{store}` does not answer; it is known by what the point says of it")),
        }
    }
    let bucket = Identity { driver: "bucket".to_owned(), native: None, endpoint: session.bucket().location() };
    sources.push(Source { what: "the bucket".to_owned(), identity: bucket });
    sources
}

/// Whether stores of different points would stand side by side, without anybody's consent.
async fn mixed(
    session: &Session,
    request: &PlanRequest,
    statefile: &Statefile,
    selected: &BTreeSet<StoreName>,
    scratch: &tempfile::TempDir,
    context: &Context,
) -> Vec<Finding> {
    if request.accept_mixed {
        return Vec::new();
    }
    let hint = || "restore every store, or accept the loss of consistency with --accept-mixed".to_owned();
    // Also those that the point was not asked to cover: they come from another one, if at all.
    let others = statefile.stores.keys().chain(&statefile.left_out).filter(|store| !selected.contains(*store));
    let others: Vec<_> = others.collect();
    let first = selected.first().into_iter();
    if let (Destination::InPlace { .. }, Some(other)) = (&request.destination, others.first()) {
        let what = format!("it would stand beside `{other}`, which goes on from a later state");
        return first.map(|store| Finding { store: store.clone(), what: what.clone(), hint: hint() }).collect();
    }
    let mut findings = Vec::new();
    for other in others {
        let folder = scratch.path().join("others").join(other.as_str());
        let Ok(driver) = request.destination.open(session.config(), other, statefile.stores.get(other), &folder) else {
            continue;
        };
        let stamp = tokio::time::timeout(SOURCE_WITHIN, driver.read_stamp(context)).await;
        let what = match stamp {
            Ok(Ok(Some(stamp))) if stamp.point != statefile.point.as_str() => {
                format!("beside it stands `{other}`, restored from the point {}", stamp.point)
            }
            Ok(Err(error)) if matches!(error.kind(), Kind::Conflict | Kind::Fenced) => {
                format!("beside it stands `{other}`, and of which point that is cannot be told: {}", error.message())
            }
            _ => continue,
        };
        findings.extend(selected.first().map(|store| Finding { store: store.clone(), what, hint: hint() }));
    }
    findings
}

fn steps(
    session: &Session,
    request: &PlanRequest,
    statefile: &Statefile,
    selected: &BTreeSet<StoreName>,
    targets: &[Target],
    sizes: &BTreeMap<StoreName, (u64, u64)>,
) -> Result<Vec<RestoreStep>> {
    let precedences: Vec<Precedence> = restore_precedences(session.platform())?
        .into_iter()
        .filter(|order| selected.contains(&order.before) && selected.contains(&order.after))
        .collect();
    let order = layers(selected, &precedences).map_err(|circle| Error::internal(format!("a circle: {circle}")))?;
    let mut steps = Vec::new();
    for store in order.into_iter().flatten() {
        let missing = || Error::internal("a selected store is not in the point").store(store.as_str());
        let state = statefile.stores.get(&store).ok_or_else(missing)?;
        let target = targets.iter().find(|target| target.store == store).ok_or_else(missing)?;
        let needs = precedences.iter().filter(|order| order.after == store).map(|order| order.before.clone()).collect();
        let part = request.parts.get(&store).cloned();
        let (files, bytes) = sizes.get(&store).copied().unwrap_or((state.files, state.bytes));
        steps.push(RestoreStep {
            driver: state.driver.clone(),
            needs,
            target: TargetFound {
                identity: target.identity.clone(),
                stamp: target.stamp.clone(),
                overwrites: target.occupied.clone(),
            },
            files,
            bytes,
            items: state.items,
            unit: state.unit.clone(),
            loses: loses(state, part.as_deref()),
            named_losses: state.losses.iter().map(|loss| format!("{}: {}", loss.what, loss.why)).collect(),
            part,
            store,
        });
    }
    Ok(steps)
}

/// The loss statement. A write that fell into the pin itself may be lost, so its begin counts.
fn loses(state: &StoreState, part: Option<&str>) -> String {
    let since = state.pinned_at.0.strftime("%Y-%m-%d %H:%M:%S%.3f UTC");
    match part {
        Some(part) => format!("everything in `{part}` after {since}"),
        None => format!("everything after {since}"),
    }
}

/// Files and bytes of each part that is asked for. Reads the repository, hence on a thread.
async fn part_sizes(
    request: &PlanRequest,
    trees: &BTreeMap<StoreName, Arc<dyn Tree>>,
    warnings: &mut Vec<String>,
) -> Result<BTreeMap<StoreName, (u64, u64)>> {
    let mut sizes = BTreeMap::new();
    for (store, part) in &request.parts {
        let Some(tree) = trees.get(store).cloned() else { continue };
        let path = TreePath::parse(part)?;
        if path.names().is_empty() {
            return Err(Error::new(Kind::Config, "the part is the whole store")
                .store(store.as_str())
                .hint("leave it out"));
        }
        let size = on_thread("part", move || part_size(tree.as_ref(), &path)).await;
        let size = size.map_err(|error| error.store(store.as_str()))?;
        if size.is_none() {
            // Keys and names may be spelled as the store spells them; only the driver knows how.
            warnings.push(format!("store `{store}`: how large `{part}` is, and whether it is there, will be seen"));
        }
        sizes.insert(store.clone(), size.unwrap_or_default());
    }
    Ok(sizes)
}

/// Files and bytes below a path of the store's tree, or of the folder in which its driver keeps
/// the store's own names. `None` if it is in neither.
fn part_size(tree: &dyn Tree, part: &TreePath) -> Result<Option<(u64, u64)>> {
    let mut tops = vec![TreePath::root()];
    tree.list(&TreePath::root(), &mut |node| {
        if node.kind == NodeKind::Dir {
            tops.push(TreePath::root().join(&node.name)?);
        }
        Ok(true)
    })?;
    for top in tops {
        let mut path = top;
        for name in part.names() {
            path.push(name)?;
        }
        if let Some(node) = tree.get(&path)? {
            return size_below(tree, path, &node).map(Some);
        }
    }
    Ok(None)
}

fn size_below(tree: &dyn Tree, path: TreePath, top: &Node) -> Result<(u64, u64)> {
    let mut size = (0, 0);
    let mut folders = Vec::new();
    let mut count = |node: &Node, path: TreePath, folders: &mut Vec<TreePath>| match node.kind {
        NodeKind::File { size: bytes } => size = (size.0 + 1, size.1 + bytes),
        NodeKind::Dir => folders.push(path),
        _ => {}
    };
    count(top, path, &mut folders);
    while let Some(folder) = folders.pop() {
        tree.list(&folder, &mut |node| {
            let path = folder.join(&node.name)?;
            count(&node, path, &mut folders);
            Ok(true)
        })?;
    }
    Ok(size)
}
