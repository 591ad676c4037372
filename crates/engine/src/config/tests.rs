//! Each kind of mistake in `platform.yaml`, with the place and hint that the operator sees.

use std::path::Path;

use super::{Mistakes, parse};

const GOOD: &str = "\
apiVersion: stillpoint.dev/v1
platform: churn
environment: production
bucket:
  url: /srv/backup
  key: file:stillpoint.key
stores:
  meta:
    driver: sqlite
    path: /srv/meta.db
  artifacts:
    driver: objects
    path: /srv/artifacts
    needs: [meta]
references:
  - { from: meta, query: SELECT key FROM models, to: artifacts, kind: keys }
";

/// The mistakes of `GOOD` with `from` replaced by `to`, one per line, with their hints.
fn mistakes(from: &str, to: &str) -> Vec<String> {
    assert!(GOOD.contains(from), "{from}");
    let text = GOOD.replacen(from, to, 1);
    let error = parse(&text, Path::new("platform.yaml")).expect_err("mistaken");
    let source = std::error::Error::source(&error).expect("a source");
    let mistakes = source.downcast_ref::<Mistakes>().expect("mistakes");
    let show = |m: &super::Mistake| format!("{}:{} {} | {}", m.place.line, m.place.column, m.message, m.hint);
    mistakes.list.iter().map(show).collect()
}

/// Whether the one mistake is at the place and says the words.
fn expect(from: &str, to: &str, wanted: &str) {
    let found = mistakes(from, to);
    assert!(found.iter().any(|line| line.starts_with(wanted)), "wanted {wanted}, found {found:#?}");
}

#[test]
fn a_right_file_is_read() {
    let platform = parse(GOOD, Path::new("platform.yaml")).expect("right");
    assert_eq!(platform.stores.len(), 2);
    assert_eq!(platform.references[0].to.as_str(), "artifacts");
}

#[test]
fn form() {
    expect(
        "environment:",
        "enviroment:",
        "3:1 there is no field `enviroment` in the file | did you mean `environment`?",
    );
    expect("environment: production\n", "", "1:1 the file needs the field `environment` |");
    expect("  url: /srv/backup", "  url: 7", "5:8 `bucket.url` must be a text, not the number 7 | put it in quotes");
    expect("needs: [meta]", "needs: meta", "14:12 `stores.artifacts.needs` must be a list, not a text");
    expect(
        "references:",
        "cut: { optimisticTries: many }\nreferences:",
        "15:25 `cut.optimisticTries` must be a whole number",
    );
    expect(
        "references:",
        "cut: { level: strictly }\nreferences:",
        "15:15 `cut.level` may not be `strictly` | did you mean `strict`?",
    );
    expect(
        "kind: keys }",
        "kind: keys, alow_missing: 1 }",
        "16:77 there is no field `alow_missing` in `references[0]`",
    );
    expect(
        "references:",
        "pause: [{ kind: htp }]\nreferences:",
        "15:17 `pause[0].kind` may not be `htp` | did you mean `http`?",
    );
    expect("references:", "pause: [{ pause: [x] }]\nreferences:", "15:9 `pause[0]` needs the field `kind`");
    expect("platform: churn", "platform: churn\nplatform: x", "3:1 not valid YAML");
    expect("bucket:\n", "bucket: [\n", "");
}

#[test]
fn meaning() {
    expect("stillpoint.dev/v1", "stillpoint.dev/v9", "1:13 this version of stillpoint does not read apiVersion");
    expect("platform: churn", "platform: Churn", "2:11 `Churn` is not a valid platform name");
    expect("  meta:\n", "  Meta_db:\n", "8:3 `Meta_db` is not a valid store name");
    expect("driver: sqlite", "driver: sqlight", "9:13 there is no driver `sqlight`");
    expect(
        "needs: [meta]",
        "needs: [mta]",
        "14:13 `needs` names the store `mta`, which is not under `stores` | did you mean `meta`?",
    );
    expect(
        "to: artifacts",
        "to: objects",
        "16:54 `to` names the store `objects`, which is not under `stores` | stores: meta, artifacts",
    );
    expect(
        "path: /srv/meta.db",
        "path: /srv/meta.db\n    needs: [artifacts]",
        "11:13 stores need each other in a circle: artifacts → meta → artifacts",
    );
    expect(
        "references:",
        "cut: { pauseBudget: soon }\nreferences:",
        "15:21 `cut.pauseBudget`: `soon` is not a span of time",
    );
    expect("references:", "retention: { within: 7 days }\nreferences:", "15:22 `retention.within`");
    expect("/srv/backup", "backup", "5:8 `backup` is not an absolute path or an address");
    expect(
        "references:",
        "targets: { production: {} }\nreferences:",
        "15:12 the target `production` has the name of the environment",
    );
    expect(
        "references:",
        "targets: { lab: { stores: { x: {} } } }\nreferences:",
        "15:29 `targets.lab` names the store `x`",
    );
    expect(
        "references:",
        "pause: [{ kind: sql, store: mta, pause: a, resume: b }]\nreferences:",
        "15:29 `store` names the store `mta`",
    );
}

#[test]
fn plain_secrets_are_refused_and_never_repeated() {
    let cases = [
        ("file:stillpoint.key", "hunter2", "6:8 a secret may not stand here in plain text"),
        ("stores:", "  credentials: { secret_access_key: hunter2 }\nstores:", "7:37 a secret may not stand here"),
        ("stores:", "  options: { secret_access_key: hunter2 }\nstores:", "7:14 `secret_access_key` is a secret"),
        ("/srv/backup", "s3://key:hunter2@b", "5:8 the address of the bucket may not hold credentials"),
        (
            "references:",
            "pause:\n  - kind: http\n    pause: { url: 'http://x', headers: { Authorization: hunter2 } }\n    resume: { url: 'http://x' }\nreferences:",
            "17:57 the header `Authorization` holds a secret",
        ),
        (
            "references:",
            "pause:\n  - kind: http\n    pause: { url: 'http://x', headers: { X-Gitlab-Token: hunter2 } }\n    resume: { url: 'http://x' }\nreferences:",
            "17:58 the header `X-Gitlab-Token` holds a secret",
        ),
        (
            "references:",
            "pause:\n  - kind: http\n    pause: { url: 'http://me:hunter2@x/y' }\n    resume: { url: 'http://x' }\nreferences:",
            "17:19 the address of a pause step may not hold a user or a password | send them in a header",
        ),
        (
            "references:",
            "pause:\n  - kind: http\n    pause: { url: 'http://x/y?job=1&api_key=hunter2' }\n    resume: { url: 'http://x' }\nreferences:",
            "17:19 the parameter `api_key` holds a secret",
        ),
    ];
    for (from, to, wanted) in cases {
        expect(from, to, wanted);
        assert!(!mistakes(from, to).join("\n").contains("hunter2"), "{to}");
    }
}
