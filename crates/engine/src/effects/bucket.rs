//! The bucket's part of a run: the lease, the backup session, the snapshot and the commit.

use std::sync::Arc;
use std::time::Duration;

use stillpoint_core::coordinator::{Failure, Outcome};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::platform::Compression as Wanted;
use stillpoint_core::statefile::Statefile;
use stillpoint_repo::depot::WriteMode;
use stillpoint_repo::{BackupOptions, Compression, SnapshotMeta};

use super::{Hands, Role, locked, on_thread};
use crate::journal;
use crate::lease::{self, Holder, Lease, LeaseRequest};
use crate::points;

/// How long the repository's workers may take to stop.
const ABANDON_WITHIN: Duration = Duration::from_secs(3);

impl Hands {
    /// Takes the lease, cleans up after those who lost it, and opens the backup session: everything
    /// in the bucket that can refuse us, before any store is touched.
    pub(super) async fn acquire_lease(self: Arc<Self>) -> Result<Outcome> {
        let Role::Own { take_over } = self.role else { return Ok(Outcome::Done) };
        let hands = Arc::clone(&self);
        let lease = on_thread("take lease", move || hands.take_lease(take_over)).await?;
        let lease = Arc::new(lease);
        *locked(&self.lease) = Some(Arc::clone(&lease));
        self.watch_lease(&lease);
        for unfinished in lease.unfinished() {
            crate::recover::take_over(&self, &unfinished.run).await?;
            let (lease, run) = (Arc::clone(&lease), unfinished.run);
            on_thread("lease", move || lease.mark_cleaned(&run)).await?;
        }
        // The head, with what an undo needs, is in the bucket before anything can be held anywhere.
        self.copier.copy().await?;
        let hands = Arc::clone(&self);
        on_thread("begin backup", move || {
            let backup = hands.session.repository().begin(hands.backup_options())?;
            *locked(&hands.backup) = Some(backup);
            Ok(())
        })
        .await?;
        Ok(Outcome::Done)
    }

    fn take_lease(&self, take_over: bool) -> Result<Lease> {
        let head = &self.head;
        let platform = &head.platform.platform;
        let state = &self.surroundings.state_folder;
        let is_dead = |holder: &Holder| journal::is_dead_here(state, platform, &holder.run);
        Lease::acquire(&LeaseRequest {
            bucket: Arc::clone(self.session.bucket()),
            platform,
            holder: Holder {
                run: head.run.clone(),
                point: Some(head.point.clone()),
                purpose: "backup".to_owned(),
                host: head.host.clone(),
                process: head.process,
            },
            clock: Arc::clone(&self.surroundings.clock),
            is_dead: &is_dead,
            take_over,
        })
    }

    fn watch_lease(self: &Arc<Self>, lease: &Lease) {
        let mut lost = lease.lost();
        let hands = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(reason) = lost.wait_for(Option::is_some).await {
                hands.lost.send_replace(reason.clone());
            }
        });
    }

    fn backup_options(&self) -> BackupOptions {
        let platform = &self.head.platform;
        BackupOptions {
            memory_bytes_max: platform.limits.memory_mib << 20,
            compression: match platform.bucket.compression {
                Wanted::Auto => Compression::Auto,
                Wanted::None => Compression::None,
            },
            context: self.repository_context.clone(),
            ..BackupOptions::default()
        }
    }

    pub(super) async fn write_snapshot(self: Arc<Self>) -> Result<Outcome> {
        let backup = locked(&self.backup).take();
        let backup = backup.ok_or_else(|| Error::internal("the snapshot was asked for without a backup"))?;
        let head = &self.head;
        let meta = SnapshotMeta {
            time: self.surroundings.clock.utc(),
            hostname: head.host.clone(),
            tags: vec![
                "stillpoint".to_owned(),
                self.point_tag(),
                format!("platform:{}", head.platform.platform),
                format!("environment:{}", head.platform.environment),
            ],
            paths: head.platform.stores.keys().map(|store| format!("/{store}")).collect(),
        };
        let summary = on_thread("write snapshot", move || backup.finish(meta)).await?;
        Ok(Outcome::SnapshotWritten { snapshot: summary.snapshot.to_string(), bytes_stored: summary.bytes_stored })
    }

    fn point_tag(&self) -> String {
        format!("point:{}", self.head.point)
    }

    /// The commit: one write, only if absent, right after the bucket said that the lease is ours.
    pub(super) async fn write_statefile(self: Arc<Self>, statefile: Option<Statefile>) -> Result<Outcome> {
        let statefile = statefile.ok_or_else(|| Error::internal("the commit was asked for without a statefile"))?;
        let lease = locked(&self.lease).clone();
        let lease = lease.ok_or_else(|| Error::internal("the commit was asked for without a lease"))?;
        on_thread("commit", move || {
            // What is refused here was certainly not written; any later error leaves that open.
            if let Err(error) = lease.check() {
                let refused = Failure::from(&error.operation("seal"));
                return Ok(Outcome::Failed(Box::new(Failure { certain: true, ..refused })));
            }
            let bytes = serde_json::to_vec_pretty(&statefile)
                .map_err(|error| Error::internal("the statefile does not serialize").source(error))?;
            let name = points::object_name(statefile.point.as_str());
            self.session.bucket().write(&name, &[&bytes], &WriteMode::Create)?;
            Ok(Outcome::Done)
        })
        .await
    }

    pub(super) async fn read_statefile(self: Arc<Self>) -> Result<Outcome> {
        on_thread("read commit", move || {
            match points::get(self.session.bucket().as_ref(), self.session.repository(), &self.head.point) {
                Ok(statefile) => Ok(Outcome::StatefileRead { present: statefile.run == self.head.run }),
                Err(error) if error.kind() == Kind::NotFound => Ok(Outcome::StatefileRead { present: false }),
                Err(error) => Err(error),
            }
        })
        .await
    }

    pub(super) async fn abandon_backup(&self) -> Result<Outcome> {
        let Some(backup) = locked(&self.backup).take() else { return Ok(Outcome::Done) };
        // Whether the workers ended well does not matter: nothing names what they wrote.
        self.repository_context.cancel();
        // A stream that hangs must not keep the run: its thread ends with the process.
        match tokio::time::timeout(ABANDON_WITHIN, on_thread("abandon backup", move || backup.abandon())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the abandoned backup did not end well"),
            Err(_) => self.warn("a stream hangs; the repository's lock goes with this process".to_owned()),
        }
        Ok(Outcome::Done)
    }

    /// Removes the run's snapshot, unless its point was committed after all: a journal that lost its
    /// last lines can owe this for a sealed run.
    pub(super) async fn remove_snapshot(self: Arc<Self>) -> Result<Outcome> {
        on_thread("remove snapshot", move || {
            let repository = self.session.repository();
            let tag = self.point_tag();
            let ours = repository.snapshots()?.into_iter().filter(|snapshot| snapshot.tags.contains(&tag));
            let ids: Vec<_> = ours.map(|snapshot| snapshot.id).collect();
            if !ids.is_empty() && self.rule_out_commit()? {
                repository.forget(&ids)?;
            }
            Ok(Outcome::Done)
        })
        .await
    }

    /// Takes the place of the commit, so that none can land there any more; `false` if anything but
    /// such a mark is there already, readable or not.
    fn rule_out_commit(&self) -> Result<bool> {
        let name = points::object_name(self.head.point.as_str());
        let bucket = self.session.bucket();
        let mark = Statefile::void_mark(&self.head.run);
        match bucket.write(&name, &[&mark], &WriteMode::Create) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::AlreadyExists => {
                let (bytes, _) = bucket.read(&name)?;
                Ok(Statefile::is_void(&bytes))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn release_lease(self: Arc<Self>) -> Result<Outcome> {
        // A backup that nobody drained into still holds the repository's lock.
        self.abandon_backup().await?;
        if self.role == Role::DeadHere {
            let (bucket, head) = (Arc::clone(self.session.bucket()), self.head.clone());
            on_thread("lease", move || lease::release_dead(bucket, &head.platform.platform, &head.run)).await?;
        }
        let Some(lease) = locked(&self.lease).take() else { return Ok(Outcome::Done) };
        match Arc::into_inner(lease) {
            Some(lease) => on_thread("lease", move || lease.release()).await?,
            None => return Err(Error::internal("the lease is given back while it is in use")),
        }
        Ok(Outcome::Done)
    }
}
