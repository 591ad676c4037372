//! What is PostgreSQL's own.

use std::time::Duration;

use stillpoint_core::driver::Context;
use stillpoint_core::error::Kind;

use super::session::{Address, Endpoint, Session};
use super::wire::Tally;

/// The rigs that are up: name and URL of each.
fn rigs() -> Vec<(&'static str, url::Url)> {
    let names = ["POSTGRES", "POSTGRES_16", "POSTGRES_18"];
    let found: Vec<_> = names
        .into_iter()
        .filter_map(|name| Some((name, std::env::var(format!("STILLPOINT_RIG_{name}_URL")).ok()?.parse().ok()?)))
        .collect();
    if found.is_empty() {
        stillpoint_testkit::skip("postgres", "no rig: cargo xtask rig up postgres");
    }
    found
}

fn endpoint(url: &url::Url) -> Endpoint {
    Endpoint {
        address: Address::Tcp { host: url.host_str().unwrap().to_owned(), port: url.port().unwrap() },
        user: url.username().to_owned(),
        password: url.password().map(str::to_owned),
        tls: None,
        tls_required: false,
        connect_time_max: Duration::from_secs(10),
    }
}

#[test]
fn a_session_asks_copies_both_ways_and_survives_errors() {
    for (name, url) in rigs() {
        let mut session = Session::connect(&endpoint(&url), "postgres", &Context::default()).unwrap();
        assert!(session.major() >= 15, "{name}");
        assert_eq!(session.query_one("SELECT 1, NULL, 'a'").unwrap().optional(1).unwrap(), None);
        let error = session.query("SELECT * FROM pg_catalog.nothing").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        session.execute("CREATE TEMPORARY TABLE t (n bigint, x text)").unwrap();
        session.copy_in("COPY pg_temp.t FROM STDIN").unwrap();
        session.copy_write(b"1\tone\n2\ttwo\n").unwrap();
        session.copy_write(format!("3\t{}\n", "long ".repeat(1_000_000)).as_bytes()).unwrap();
        assert_eq!(session.copy_finish().unwrap(), 3);
        session
            .execute("INSERT INTO pg_temp.t SELECT n, repeat('x', (n % 700)::int) FROM generate_series(4, 20000) n")
            .unwrap();
        let mut sums = Vec::new();
        for bytes in [100, 4096, 1 << 20, 8 << 20] {
            let (mut tally, mut buffer, mut all) = (Tally::default(), vec![0; bytes], Vec::new());
            session.copy_out("COPY pg_temp.t TO STDOUT").unwrap();
            loop {
                let count = session.copy_read(&mut buffer, &mut tally).unwrap();
                if count == 0 {
                    break;
                }
                all.extend_from_slice(&buffer[..count]);
            }
            let mut again = Tally::default();
            all.split_inclusive(|&byte| byte == b'\n').for_each(|row| again.row(row));
            assert_eq!((again, tally.rows), (tally, 20000), "{name} {bytes}");
            sums.push(tally);
        }
        assert!(sums.windows(2).all(|pair| pair[0] == pair[1]));
        session.copy_in("COPY pg_temp.t FROM STDIN").unwrap();
        session.copy_write(b"wrong\trow\n").unwrap();
        assert!(session.copy_finish().is_err());
        let context = Context::default();
        session.set_context(&context);
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            context.cancel();
        });
        assert_eq!(session.execute("SELECT pg_sleep(60)").unwrap_err().kind(), Kind::Cancelled);
        stopper.join().unwrap();
        assert!(!session.is_usable());
    }
}

#[test]
fn a_wrong_password_and_a_dead_server_are_told_apart() {
    for (name, url) in rigs() {
        let mut wrong = endpoint(&url);
        wrong.password = Some("wrong".to_owned());
        let error = Session::connect(&wrong, "postgres", &Context::default()).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unauthenticated, false), "{name}");
        let mut dead = endpoint(&url);
        dead.address = Address::Tcp { host: "127.0.0.1".to_owned(), port: 1 };
        let error = Session::connect(&dead, "postgres", &Context::default()).unwrap_err();
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{name}");
        let error = Session::connect(&endpoint(&url), "no such database", &Context::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{name}");
    }
}
