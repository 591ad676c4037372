//! `export`: a store of a point, or a path in it, as plain files in a directory.
//!
//! What comes out is what the driver wrote: readable without Stillpoint, with a
//! `HOW-TO-RESTORE.txt`. No store is touched.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::id::{PointId, StoreName};
use stillpoint_core::tree::{Existing, ExtractOptions, Extracted, NodeKind, Tree, TreePath};

use super::plan::{point, tree};
use crate::cancel::CancelToken;
use crate::effects::on_thread;
use crate::open::Session;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest {
    /// The point: an id, a prefix of at least 4 characters, or `latest`.
    pub point: String,
    /// The store.
    pub store: StoreName,
    /// A path in the store's tree; the whole without it.
    pub path: Option<String>,
    /// The directory to write, absent or empty.
    pub to: PathBuf,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The point.
    pub point: PointId,
    /// The store.
    pub store: StoreName,
    /// The path in the store's tree.
    pub path: Option<String>,
    /// The directory that was written.
    pub to: PathBuf,
    /// Regular files written.
    pub files: u64,
    /// Bytes of content written.
    pub bytes: u64,
    /// What could not be reproduced exactly, for people.
    pub losses: Vec<String>,
    /// How long it took.
    pub elapsed_millis: u64,
}

/// Exports.
///
/// # Errors
/// `AlreadyExists` if the directory holds anything; `NotFound` if the point lacks store or path.
pub async fn run(session: &Session, request: &ExportRequest, cancel: &CancelToken) -> Result<ExportReport> {
    let begin = Instant::now();
    let statefile = point(session, &request.point, &[request.store.clone()].into()).await?;
    if !statefile.stores.contains_key(&request.store) {
        let known: Vec<_> = statefile.stores.keys().map(StoreName::as_str).collect();
        let message = format!("the point {} holds no store `{}`", statefile.point, request.store);
        return Err(Error::new(Kind::NotFound, message).hint(format!("stores of the point: {}", known.join(", "))));
    }
    let tree = tree(session, &statefile, &request.store).await?;
    let path = request.path.as_deref().map_or(Ok(TreePath::root()), TreePath::parse)?;
    let to = std::path::absolute(&request.to).or_io(|| format!("cannot resolve `{}`", request.to.display()))?;
    let context = Context::default();
    let work = {
        let (to, path, context) = (to.clone(), path, context.clone());
        on_thread("export", move || export(tree.as_ref(), &path, &to, &context))
    };
    let extracted = tokio::select! {
        extracted = work => extracted.map_err(|error| error.store(request.store.as_str()).operation("export"))?,
        () = cancel.cancelled() => {
            context.cancel();
            return Err(Error::new(Kind::Cancelled, "stopped on request")
                .hint(format!("`{}` holds a part of the export; remove it", to.display())));
        }
    };
    Ok(ExportReport {
        point: statefile.point,
        store: request.store.clone(),
        path: request.path.clone(),
        to,
        files: extracted.files,
        bytes: extracted.bytes,
        losses: extracted.losses,
        elapsed_millis: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

fn export(tree: &dyn Tree, path: &TreePath, to: &Path, context: &Context) -> Result<Extracted> {
    let node = tree.get(path)?.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("the point holds no `{path}`")).hint("`restic ls` lists what there is")
    })?;
    let owners = rustix::process::geteuid().is_root();
    match node.kind {
        NodeKind::Dir => tree.extract(path, to, &ExtractOptions { existing: Existing::Refuse, owners }, context),
        NodeKind::File { size } => {
            let name = path.names().last().cloned().unwrap_or_default();
            export_file(tree, path, &to.join(OsStr::from_bytes(&name)), context)?;
            Ok(Extracted { files: 1, bytes: size, losses: Vec::new() })
        }
        _ => Err(Error::new(Kind::Unsupported, format!("`{path}` is neither a file nor a directory"))
            .hint("export the directory around it")),
    }
}

fn export_file(tree: &dyn Tree, path: &TreePath, to: &Path, context: &Context) -> Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).or_io(|| format!("cannot create the folder `{}`", parent.display()))?;
    }
    let shown = to.display();
    let mut file = std::fs::File::create_new(to).or_io(|| format!("cannot create `{shown}`"))?;
    let mut reader = tree.open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        context.check()?;
        let count = reader.read(&mut buffer).or_io(|| format!("cannot read `{path}`"))?;
        if count == 0 {
            break;
        }
        file.write_all(&buffer[..count]).or_io(|| format!("cannot write `{shown}`"))?;
    }
    file.sync_all().or_io(|| format!("cannot write `{shown}`"))
}
