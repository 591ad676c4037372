//! The lease: one holder at a time, growing numbers, and no clock that decides about a point.

use std::sync::Arc;

use stillpoint_core::Kind;
use stillpoint_core::id::{PlatformName, PointId, RunId};
use stillpoint_core::statefile::Statefile;
use stillpoint_engine::lease::{Holder, Lease, LeaseRequest, release_dead};
use stillpoint_repo::depot::memory::MemoryDepot;
use stillpoint_repo::depot::{Depot, WriteMode};

use crate::world::JumpingClock;

fn holder(number: u8) -> Holder {
    Holder {
        run: RunId::from_random([number; 8]),
        point: Some(PointId::from_random([number; 8])),
        purpose: "backup".to_owned(),
        host: format!("host-{number}"),
        process: u32::from(number),
    }
}

struct Scene {
    bucket: Arc<dyn Depot>,
    clock: Arc<JumpingClock>,
    platform: PlatformName,
}

impl Scene {
    fn new() -> Self {
        Self {
            bucket: Arc::new(MemoryDepot::new()),
            clock: Arc::default(),
            platform: PlatformName::new("churn").expect("valid"),
        }
    }

    fn acquire(&self, number: u8, take_over: bool, dead: bool) -> stillpoint_core::Result<Lease> {
        Lease::acquire(&LeaseRequest {
            bucket: Arc::clone(&self.bucket),
            platform: &self.platform,
            holder: holder(number),
            clock: Arc::<JumpingClock>::clone(&self.clock),
            is_dead: &|_| dead,
            take_over,
        })
    }

    fn statefile_of(&self, number: u8) -> Option<Vec<u8>> {
        let point = PointId::from_random([number; 8]);
        self.bucket.read(&format!("points/{point}/statefile.json")).ok().map(|(bytes, _)| bytes.to_vec())
    }
}

#[test]
fn the_number_grows_with_every_holder_whatever_the_bucket_can_do() {
    let scene = Scene::new();
    for expected in 1..4 {
        let lease = scene.acquire(1, false, false).expect("free");
        assert_eq!(lease.fencing(), expected);
        lease.check().expect("ours");
        lease.release().expect("given back");
    }
}

#[test]
fn the_second_engine_reads_who_holds_the_platform_and_what_to_do() {
    let scene = Scene::new();
    let _held = scene.acquire(1, false, false).expect("free");
    let error = scene.acquire(2, false, false).expect_err("held");
    assert_eq!(error.kind(), Kind::Locked);
    let text = error.to_string();
    let begin = format!(
        "another engine works on platform `churn` in this bucket: backup {} on host-1, process 1, since 20",
        holder(1).run
    );
    assert!(text.starts_with(&begin), "{text}");
    let hint = error.hint_text().expect("a hint");
    assert!(hint.starts_with("wait until it ends; if that engine is gone, its lease ends at 20"), "{hint}");
    assert!(hint.ends_with("or take it over now with `--take-over`"), "{hint}");
    assert!(scene.statefile_of(1).is_none(), "nothing was voided");
}

#[test]
fn an_expired_lease_is_taken_over_and_its_point_can_never_be_committed() {
    let scene = Scene::new();
    let first = scene.acquire(1, false, false).expect("free");
    scene.clock.jump(61);
    let second = scene.acquire(2, false, false).expect("expired");
    assert_eq!((second.fencing(), second.unfinished().len()), (2, 1));
    let error = first.check().expect_err("lost");
    assert_eq!(error.kind(), Kind::Locked);
    let begin = format!("the lease was taken over by run {} on host-2, process 2, since 20", holder(2).run);
    assert!(error.to_string().starts_with(&begin), "{error}");
    assert!(Statefile::is_void(&scene.statefile_of(1).expect("occupied")));
    first.release().expect("giving back what was lost is fine");
    second.check().expect("still the second one's");
    second.mark_cleaned(&holder(1).run).expect("writable");
    assert!(second.unfinished().is_empty());
    second.release().expect("given back");
}

#[test]
fn a_takeover_leaves_a_point_that_was_committed_before_it() {
    let scene = Scene::new();
    let _first = scene.acquire(1, false, false).expect("free");
    let name = format!("points/{}/statefile.json", PointId::from_random([1; 8]));
    scene.bucket.write(&name, &[b"{\"schema\":\"a point\"}"], &WriteMode::Create).expect("writable");
    scene.acquire(2, true, false).expect("taken over on demand");
    assert_eq!(scene.statefile_of(1).expect("there"), b"{\"schema\":\"a point\"}");
}

#[test]
fn a_takeover_that_dies_before_it_cleans_up_is_continued_by_the_next_holder() {
    let scene = Scene::new();
    let _first = scene.acquire(1, false, false).expect("free");
    let _second = scene.acquire(2, true, false).expect("taken over");
    let third = scene.acquire(3, true, false).expect("taken over");
    let runs: Vec<_> = third.unfinished().into_iter().map(|unfinished| unfinished.run).collect();
    assert_eq!(runs, [holder(1).run, holder(2).run]);
    assert!(Statefile::is_void(&scene.statefile_of(1).expect("occupied")));
    assert!(Statefile::is_void(&scene.statefile_of(2).expect("occupied")));
}

#[test]
fn an_engine_that_is_known_to_be_dead_does_not_keep_others_waiting() {
    let scene = Scene::new();
    drop(scene.acquire(1, false, false).expect("free"));
    assert_eq!(scene.acquire(2, false, true).expect("the first is dead").fencing(), 2);
}

#[test]
fn a_dead_runs_lease_is_given_back_by_whoever_cleans_up_after_it_and_only_that_one() {
    let scene = Scene::new();
    drop(scene.acquire(1, false, false).expect("free"));
    release_dead(Arc::clone(&scene.bucket), &scene.platform, &holder(9).run).expect("nothing to do");
    assert!(scene.acquire(2, false, false).is_err(), "still held by the first");
    release_dead(Arc::clone(&scene.bucket), &scene.platform, &holder(1).run).expect("given back");
    let second = scene.acquire(2, false, false).expect("free");
    assert_eq!((second.fencing(), second.unfinished().len()), (2, 0));
}

#[test]
fn a_clock_that_jumps_back_keeps_the_lease_and_the_message_tells_until_when() {
    let scene = Scene::new();
    drop(scene.acquire(1, false, false).expect("free"));
    scene.clock.jump(-3600);
    let error = scene.acquire(2, false, false).expect_err("seems held for an hour");
    assert_eq!(error.kind(), Kind::Locked);
    assert!(error.hint_text().expect("a hint").contains("take it over now"));
    scene.acquire(2, true, false).expect("the way out that the hint names");
}

#[test]
fn a_lease_that_someone_removed_or_damaged_is_an_error_with_a_way_out() {
    let scene = Scene::new();
    let lease = scene.acquire(1, false, false).expect("free");
    scene.bucket.write("leases/churn.json", &[b"{"], &WriteMode::Replace).expect("writable");
    let error = scene.acquire(2, false, false).expect_err("damaged");
    assert_eq!(error.to_string(), "the lease `leases/churn.json` in the bucket is not readable");
    scene.bucket.delete("leases/churn.json").expect("writable");
    let error = lease.check().expect_err("gone");
    assert_eq!(error.to_string(), "the lease was removed from the bucket while the run held it");
}

#[test]
fn of_many_engines_at_once_exactly_one_gets_the_lease() {
    let scene = Scene::new();
    let won: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..9)
            .map(|number| {
                scope.spawn({
                    let scene = &scene;
                    move || scene.acquire(number, false, false)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let leases: Vec<_> = won.iter().flatten().collect();
    assert_eq!(leases.len(), 1);
    for error in won.iter().filter_map(|result| result.as_ref().err()) {
        assert_eq!(error.kind(), Kind::Locked);
    }
}
