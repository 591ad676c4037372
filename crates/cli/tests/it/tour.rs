//! The tour as a test: the main job, whole, with its proof.

use std::time::{Duration, Instant};

use crate::support::World;

#[test]
fn the_tour_proves_what_it_says() {
    if std::process::Command::new("git").arg("--version").output().is_err() {
        return stillpoint_testkit::skip("the_tour_proves_what_it_says", "git is not installed");
    }
    let world = World::empty();
    let begin = Instant::now();
    let folder = world.path("tour");
    let screen = world.run(&["tour", "--json", "--keep", "--dir", &folder.display().to_string()]);
    assert_eq!(screen.code, 0, "{screen:?}");
    let report = screen.json();
    assert_eq!(report["proven"], true);
    assert_eq!(report["second"]["statefile"]["level"], "strict");
    assert!(report["proof"]["acknowledged"].as_u64() > Some(400), "{report:#}");
    assert!(report["proof"]["later"].as_u64() > Some(0), "some writes must come after the cut: {report:#}");
    // Not a measurement: a tour that takes minutes is broken.
    assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", begin.elapsed());
    let list = world.run(&["list", "--json", "--config", &folder.join("platform.yaml").display().to_string()]);
    assert_eq!(list.json()["points"].as_array().map(Vec::len), Some(2), "{list:?}");
}
