//! Statefiles of every released form stay readable for ever.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stillpoint_core::error::Kind;
use stillpoint_core::statefile::{Level, Statefile, Verdict};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/statefile-v1")
}

fn sample(name: &str) -> Statefile {
    let bytes = std::fs::read(folder().join(name)).expect("the sample is there");
    Statefile::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error:?}"))
}

#[test]
fn every_sample_is_mentioned_here() {
    let found: BTreeSet<String> = std::fs::read_dir(folder())
        .expect("testdata is there")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("text"))
        .filter(|name| name.ends_with(".json"))
        .collect();
    assert_eq!(found, ["complete.json", "named-loss.json", "partial.json"].map(str::to_owned).into());
}

#[test]
fn the_complete_sample_says_what_it_said() {
    let statefile = sample("complete.json");
    assert_eq!((statefile.level, statefile.verdict, statefile.fencing), (Level::Strict, Verdict::Restorable, 17));
    assert_eq!(statefile.stores.len(), 2);
    assert_eq!(statefile.parent.as_ref().map(|parent| parent.as_str()), Some("h2c8v6b4n1"));
    assert_eq!(statefile.cut_at.to_string(), "2026-11-21T10:00:03.412Z");
    let meta = statefile.stores.values().nth(1).expect("two stores");
    assert_eq!((meta.items, meta.unit.as_str()), (41_022, "rows"));
}

#[test]
fn the_sample_with_losses_names_them() {
    let statefile = sample("named-loss.json");
    assert_eq!((statefile.level, statefile.level_asked), (Level::Ordered, Level::Strict));
    assert_eq!(statefile.verdict, Verdict::RestorableWithNamedLoss);
    let logs = statefile.stores.values().next().expect("one store");
    assert_eq!(logs.losses[0].what, "app/today.log");
    assert_eq!(statefile.references[0].examples[0].1, "index line 2");
    assert_eq!(statefile.fencing, 0, "written before there was one");
}

#[test]
fn the_sample_of_some_stores_says_which_are_left_out() {
    let statefile = sample("partial.json");
    assert!(!statefile.is_whole());
    assert_eq!(statefile.left_out.iter().map(|store| store.as_str()).collect::<Vec<_>>(), ["orders"]);
    assert!(sample("complete.json").is_whole(), "a point from before there was the field");
}

#[test]
fn the_authenticated_bytes_do_not_move() {
    // Whoever changes the next lines breaks the authentication of every point in the world.
    let raw = std::fs::read(folder().join("complete.json")).expect("the sample is there");
    let bytes = Statefile::authenticated_bytes(&raw).expect("readable");
    let text = std::str::from_utf8(&bytes).expect("text");
    assert!(text.starts_with("{\"cut_at\":\"2026-11-21T10:00:03.412Z\",\"cut_tries\":2,"), "{text}");
    assert!(!text.contains("authentication"));
    assert_eq!(text.len(), 1_521, "{text}");
    assert_eq!(bytes, sample("complete.json").canonical_bytes().expect("serializes"), "the writer covers the same");
}

#[test]
fn fields_of_other_versions_stay_under_the_authentication() {
    let raw = std::fs::read(folder().join("named-loss.json")).expect("the sample is there");
    let before = Statefile::authenticated_bytes(&raw).expect("readable");
    assert!(!String::from_utf8_lossy(&before).contains("fencing"), "an old point does not get new fields");
    let mut value: serde_json::Value = serde_json::from_slice(&raw).expect("json");
    value["added_later"] = 1.into();
    let later = Statefile::authenticated_bytes(&serde_json::to_vec(&value).expect("json")).expect("readable");
    assert_ne!(before, later, "a field that this version does not know is covered too");
}

#[test]
fn a_newer_schema_is_refused_before_its_fields_are_looked_at() {
    let newer = br#"{"schema": "stillpoint.dev/statefile/v2", "everything": "else", "is": ["different"]}"#;
    let error = Statefile::parse(newer).expect_err("refused");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("stillpoint.dev/statefile/v2"), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("newer stillpoint")));
}

#[test]
fn damage_is_told_with_its_line() {
    let whole = std::fs::read(folder().join("complete.json")).expect("the sample is there");
    for end in 0..whole.len() - 2 {
        let error = Statefile::parse(&whole[..end]).expect_err("truncated");
        assert_eq!(error.kind(), Kind::Corrupt, "cut at {end}");
    }
}
