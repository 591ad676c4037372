//! What the fence lets through and what it does not.

use jiff::Timestamp;

use super::*;

fn identity(endpoint: &str, native: Option<&str>) -> Identity {
    Identity { driver: "memory".to_owned(), native: native.map(str::to_owned), endpoint: endpoint.to_owned() }
}

fn stamp(environment: &str) -> Stamp {
    Stamp {
        platform: "churn".to_owned(),
        environment: environment.to_owned(),
        point: "k3f9".to_owned(),
        restore: "r".to_owned(),
        at: Timestamp::UNIX_EPOCH,
    }
}

fn target(endpoint: &str) -> Target {
    Target {
        store: StoreName::new("meta").expect("valid"),
        identity: Some(identity(endpoint, None)),
        stamp: None,
        unclear: None,
        occupied: None,
    }
}

fn findings(intent: Intent<'_>, into: &str, targets: &[Target]) -> Vec<String> {
    let name = |text| EnvironmentName::new(text).expect("valid");
    let (platform, source, into) = (PlatformName::new("churn").expect("valid"), name("production"), name(into));
    let sources = [
        Source { what: "store `meta` of the point".to_owned(), identity: identity("db/prod", Some("uuid-1")) },
        Source { what: "the bucket".to_owned(), identity: identity("s3://dr", None) },
    ];
    let fence = Fence {
        platform: &platform,
        source_environment: &source,
        target_environment: &into,
        sources: &sources,
        intent,
    };
    let found = fence.check(targets);
    assert!(found.iter().all(|finding| !finding.hint.is_empty()));
    assert_eq!(refuse(&found).is_ok(), found.is_empty());
    found.into_iter().map(|finding| finding.what).collect()
}

fn copy(targets: &[Target]) -> Vec<String> {
    findings(Intent::Copy { replace: false }, "staging", targets)
}

#[test]
fn an_empty_place_elsewhere_is_clear() {
    assert!(copy(&[target("db/staging")]).is_empty());
    let absent = Target { identity: None, ..target("") };
    assert!(copy(&[absent]).is_empty());
}

#[test]
fn the_source_and_the_bucket_are_never_overwritten() {
    assert_eq!(copy(&[target("db/prod")]), ["the target db/prod is store `meta` of the point"]);
    assert_eq!(copy(&[target("db/prod/x")]), ["the target db/prod/x lies inside store `meta` of the point (db/prod)"]);
    assert_eq!(copy(&[target("db")]), ["the target db contains store `meta` of the point (db/prod)"]);
    assert_eq!(copy(&[target("s3://dr/points")]), ["the target s3://dr/points lies inside the bucket (s3://dr)"]);
}

#[test]
fn the_source_under_another_address_is_known_by_its_own_name() {
    let clone = Target { identity: Some(identity("db/other", Some("uuid-1"))), ..target("") };
    let found = copy(std::slice::from_ref(&clone));
    assert_eq!(found, ["the target db/other calls itself uuid-1, and so does store `meta` of the point"]);
    let stamped = Target { stamp: Some(stamp("staging")), ..clone };
    assert!(copy(&[stamped]).is_empty(), "an earlier copy shares the name, but bears our stamp");
}

#[test]
fn what_bears_no_stamp_may_be_an_original() {
    let full = Target { occupied: Some("3 keys".to_owned()), ..target("db/staging") };
    let found = copy(std::slice::from_ref(&full));
    assert_eq!(found, ["the target holds 3 keys and bears no stamp, so it may be somebody's original"]);
    let replaced = findings(Intent::Copy { replace: true }, "staging", &[full]);
    assert_eq!(replaced.len(), 1, "--replace is for stamped copies only");
}

#[test]
fn what_is_stamped_in_part_is_no_place_for_a_copy_and_may_be_replaced_when_typed() {
    let unclear = Some(("`a` bears a stamp, `b` none".to_owned(), "look whose it is".to_owned()));
    let mixed = Target { unclear, occupied: Some("3 tables".to_owned()), ..target("db/app") };
    assert_eq!(copy(std::slice::from_ref(&mixed)), ["`a` bears a stamp, `b` none"]);
    let typed = [mixed.identity.as_ref().expect("there").typed().to_owned()];
    assert_eq!(findings(Intent::InPlace { typed: &typed }, "production", &[mixed]), Vec::<String>::new());
}

#[test]
fn stamps_of_others_are_respected() {
    for environment in ["production", "test"] {
        let stamped = Target { stamp: Some(stamp(environment)), ..target("db/staging") };
        assert_eq!(copy(&[stamped]), [format!("the target belongs to `churn` · `{environment}`, its stamp says")]);
    }
    let foreign = Stamp { platform: "other".to_owned(), ..stamp("staging") };
    assert_eq!(copy(&[Target { stamp: Some(foreign), ..target("db/staging") }]).len(), 1);
}

#[test]
fn an_earlier_copy_is_replaced_only_on_request() {
    let earlier = Target { stamp: Some(stamp("staging")), occupied: Some("3 keys".to_owned()), ..target("db/staging") };
    assert_eq!(copy(std::slice::from_ref(&earlier)), ["the target holds 3 keys of an earlier restore"]);
    assert!(findings(Intent::Copy { replace: true }, "staging", &[earlier]).is_empty());
}

#[test]
fn a_copy_never_belongs_to_the_source_environment() {
    let found = findings(Intent::Copy { replace: true }, "production", &[target("db/new")]);
    assert_eq!(found, ["the target environment is `production`, which the point was taken from"]);
}

#[test]
fn two_stores_do_not_share_a_place() {
    let other = Target { store: StoreName::new("other").expect("valid"), ..target("db/staging") };
    let found = copy(&[target("db/staging"), other]);
    assert_eq!(found, ["the stores `meta` and `other` would be restored into one place"]);
}

#[test]
fn in_place_needs_the_identity_typed() {
    let original = Target { occupied: Some("3 keys".to_owned()), ..target("db/prod") };
    let in_place = |typed: &[&str], target: &Target| {
        let typed: Vec<_> = typed.iter().map(|text| (*text).to_owned()).collect();
        findings(Intent::InPlace { typed: &typed }, "production", std::slice::from_ref(target))
    };
    assert_eq!(in_place(&[], &original), ["replacing db/prod in place was not confirmed"]);
    assert_eq!(in_place(&["db/PROD"], &original).len(), 1);
    assert!(in_place(&["x", "db/prod"], &original).is_empty());
    let copy = Target { stamp: Some(stamp("staging")), ..original.clone() };
    assert_eq!(in_place(&["db/prod"], &copy), ["the store belongs to `churn` · `staging`, its stamp says"]);
    let absent = Target { identity: None, ..original };
    assert_eq!(in_place(&["db/prod"], &absent).len(), 1);
}
