//! Who may come in, and over what: TLS as each setting means it, and a role with the printed privileges.

use std::path::Path;
use std::process::Command;

use super::super::config::{self, Tls};
use super::super::tls;
use super::way_back::rig_of;
use super::*;

/// Runs `openssl` in `folder`; `false` where there is none.
fn openssl(folder: &Path, arguments: &str) -> bool {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
    output.is_ok_and(|output| output.status.success())
}

/// A server whose certificate says `localhost`, signed by an authority of the test's own.
fn encrypted(rig: &Rig, folder: &Path) -> Option<servers::Postgres> {
    let new = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    std::fs::write(folder.join("names"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    let made = ["ours", "other"].iter().all(|name| {
        openssl(folder, &format!("{new} -x509 -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem"))
    }) && openssl(folder, &format!("{new} -subj /CN=localhost -keyout server.key -out server.csr"))
        && openssl(
            folder,
            "x509 -req -in server.csr -CA ours.pem -CAkey ours.key -CAcreateserial -days 2 -extfile names -out server.pem",
        );
    if !made {
        stillpoint_testkit::skip("postgres over TLS", "no openssl makes certificates here");
        return None;
    }
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(folder.join("server.key"), Some(65534), Some(65534)).unwrap();
    }
    std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let file = |setting: &str, name: &str| format!("{setting}={}", folder.join(name).display());
    let settings = ["ssl=on".to_owned(), file("ssl_cert_file", "server.pem"), file("ssl_key_file", "server.key")];
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    match servers::Postgres::start(rig.bin.as_ref(), &settings) {
        Ok(server) => Some(server),
        Err(error) if error.to_string().contains("SSL is not supported") => {
            stillpoint_testkit::skip("postgres over TLS", "this build of the server has none");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn certificates_are_checked_as_each_setting_says() {
    let rigs = rigs();
    let Some(rig) = rig_of(&rigs, "POSTGRES") else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = encrypted(rig, folder.path()) else { return };
    let connect = |host: &str, tls: Tls, authority: Option<&str>| {
        let authority = authority.map(|name| folder.path().join(name));
        let mut endpoint = endpoint(&server.url("postgres").parse().unwrap());
        endpoint.address = Address::Tcp { host: host.to_owned(), port: server.port() };
        endpoint.tls = tls::client_config(tls, authority.as_deref()).unwrap();
        endpoint.tls_required = matches!(tls, Tls::Require | Tls::VerifyFull);
        Session::connect(&endpoint, "postgres", &Context::default())
    };
    let is_encrypted = |session: &mut Session| {
        session.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").unwrap().truth(0)
    };
    for (tls, expected) in [(Tls::Disable, false), (Tls::Prefer, true), (Tls::Require, true)] {
        assert_eq!(is_encrypted(&mut connect("127.0.0.1", tls, None).unwrap()), expected, "{tls:?}");
    }
    assert!(is_encrypted(&mut connect("localhost", Tls::VerifyFull, Some("ours.pem")).unwrap()));
    for (host, authority, why) in [
        ("127.0.0.1", Some("ours.pem"), "the certificate is another host's"),
        ("localhost", Some("other.pem"), "nobody who is trusted signed it"),
        ("localhost", None, "the system does not know who signed it"),
    ] {
        let error = connect(host, Tls::VerifyFull, authority).unwrap_err();
        assert_eq!(error.kind(), Kind::Unauthenticated, "{why}: {error:?}");
        assert!(error.hint_text().unwrap().contains("caFile"), "{why}: {error:?}");
    }
    // Also by the server's own programs, which the definitions come from.
    server.sql("postgres", "CREATE TABLE t AS SELECT 1 AS n").unwrap();
    let more = json!({ "host": "localhost", "tls": "verify-full", "caFile": folder.path().join("ours.pem") });
    let settings = on_server(server.port(), &rig.bin, more);
    let driver = trial::open(&REGISTRATION, settings, folder.path()).unwrap();
    assert_eq!(trial::back_up(&driver, None).1.items, 1);
}

#[test]
fn a_role_with_the_printed_privileges_and_no_more_takes_whole_points() {
    for rig in rigs() {
        let own = Own::new(&rig);
        let role = format!("least_{:08x}", fastrand::u32(..));
        own.execute(&format!(
            "REVOKE CONNECT ON DATABASE {name} FROM PUBLIC; CREATE ROLE {role}_owner; CREATE SCHEMA hidden; \
             CREATE TABLE hidden.t (id serial PRIMARY KEY, v text); ALTER TABLE hidden.t OWNER TO {role}_owner; \
             INSERT INTO hidden.t (v) SELECT repeat('x', 500) FROM generate_series(1, 2000); \
             CREATE MATERIALIZED VIEW hidden.seen AS SELECT count(*) FROM hidden.t; \
             CREATE FUNCTION hidden.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; REVOKE ALL ON FUNCTION hidden.f FROM PUBLIC; \
             CREATE PUBLICATION all_of_it FOR ALL TABLES; SELECT lo_from_bytea(7, 'seven')",
            name = own.name
        ));
        let more = json!({ "user": role, "password": "least" });
        let settings = serde_json::from_value(rig.settings(&own.name, more.clone())).unwrap();
        let policy = config::policy(&settings).unwrap().unwrap();
        rig.psql("postgres", &format!("{policy}\nALTER ROLE {role} PASSWORD 'least';"));
        let driver = own.open(more.clone());
        let probe = run(driver.probe(&Context::default())).unwrap();
        assert_eq!(probe.missing_privileges, Vec::<String>::new(), "{}", rig.name);
        let (tree, drained) = trial::back_up(&driver, None);
        assert_eq!((drained.losses.clone(), drained.items), (Vec::new(), 2001), "{}", rig.name);
        let (again, drained) = trial::back_up(&driver, Some(&tree));
        assert_eq!(drained.items, 2001);
        assert!(drained.bytes_read < 100_000, "{} read again, {}", drained.bytes_read, rig.name);
        let as_superuser = own.open(json!({}));
        assert_eq!(trial::differences(&as_superuser, &again), Vec::<String>::new());

        // What `pg_dump` shows to superusers only is named.
        own.execute(
            "CREATE SUBSCRIPTION theirs CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p WITH (connect = false, slot_name = NONE)",
        );
        let (_, drained) = trial::back_up(&driver, None);
        assert_eq!(drained.losses.len(), 1, "{:?}", drained.losses);
        assert!(drained.losses[0].what.contains("1 subscriptions"), "{:?}", drained.losses);
        own.execute(&format!(
            "DROP SUBSCRIPTION theirs; REASSIGN OWNED BY {role}_owner TO postgres; DROP OWNED BY {role}_owner"
        ));
        own.execute(&format!("DROP ROLE {role}_owner; REVOKE ALL ON DATABASE {} FROM {role}", own.name));
        own.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"));
    }
}
