//! The conformance suite on real servers, and what only this kind of store can get wrong.
//!
//! Every test starts its own servers, with the programs that the rigs name, and stops them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_core::Result;
use stillpoint_core::driver::{Context, Driver, EdgeQuery, Pin, RestoreMode, RestoreRequest, Validity};
use stillpoint_core::error::Kind;
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::TreePath;
use stillpoint_testkit::conformance::{self, Content, Harness, Subject};
use stillpoint_testkit::{MemoryTree, skip};

use super::REGISTRATION;
use crate::trial;

/// A server of the test's own; dropping it stops it.
pub(super) struct Server {
    pub port: u16,
    child: Child,
    folder: tempfile::TempDir,
}

/// What every test server is told: nothing on disk by itself, no waiting for more replicas.
const QUIET: [&str; 8] =
    ["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", "--enable-debug-command", "yes"];

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    fn start(program: &Path, extra: &[&str]) -> Self {
        Self::start_in(program, tempfile::tempdir().unwrap(), free_port(), extra)
    }

    fn start_in(program: &Path, folder: tempfile::TempDir, port: u16, extra: &[&str]) -> Self {
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"])
            .arg(folder.path())
            .args(QUIET)
            .args(extra)
            .stdout(Stdio::from(log))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { port, child, folder };
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(mut hands) = Hands::try_new(port)
                && hands.raw(&[b"PING"]).is_ok_and(|answer| !answer.starts_with("-LOADING"))
            {
                return server;
            }
            assert!(Instant::now() < until, "the server does not come up: {}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn hands(&self) -> Hands {
        Hands::try_new(self.port).unwrap()
    }

    fn settings(&self) -> Value {
        json!({ "url": format!("redis://127.0.0.1:{}", self.port), "keepOld": self.folder.path().join("kept") })
    }

    fn open(&self) -> Result<Arc<dyn Driver>> {
        open(self.settings(), &self.folder.path().join("scratch"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn open(settings: Value, scratch: &Path) -> Result<Arc<dyn Driver>> {
    trial::open(&REGISTRATION, settings, scratch)
}

/// A client of the tests' own: it shares no code with the driver.
pub(super) struct Hands {
    stream: BufReader<TcpStream>,
}

impl Hands {
    fn try_new(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn write(&mut self, words: &[&[u8]]) -> std::io::Result<()> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend(format!("${}\r\n", word.len()).bytes());
            bytes.extend_from_slice(word);
            bytes.extend(b"\r\n");
        }
        self.stream.get_mut().write_all(&bytes)
    }

    /// One answer, flat: every string, number or status of it.
    fn read(&mut self) -> std::io::Result<Vec<Vec<u8>>> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line)?;
        if line.len() < 3 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        line.truncate(line.len() - 2);
        let count = || String::from_utf8_lossy(&line[1..]).parse::<i64>().unwrap_or(0);
        Ok(match line[0] {
            b'$' if count() >= 0 => {
                let mut bytes = vec![0; count() as usize + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                vec![bytes]
            }
            b'*' => {
                let mut all = Vec::new();
                for _ in 0..count() {
                    all.extend(self.read()?);
                }
                all
            }
            b'$' => Vec::new(),
            b':' => vec![line[1..].to_vec()],
            _ => vec![line],
        })
    }

    fn raw(&mut self, words: &[&[u8]]) -> std::io::Result<String> {
        self.write(words)?;
        Ok(String::from_utf8_lossy(&self.read()?.concat()).into_owned())
    }

    /// Carries out a command that must succeed.
    fn run(&mut self, words: &[&[u8]]) -> Vec<Vec<u8>> {
        self.write(words).unwrap();
        let answer = self.read().unwrap();
        let refuses = |word: &Vec<u8>| matches!(word.as_slice(), [b'-', b'A'..=b'Z', ..]);
        assert!(!answer.first().is_some_and(refuses), "{:?}", String::from_utf8_lossy(&answer[0]));
        answer
    }

    /// Carries out a command made of words.
    fn say(&mut self, line: &str) -> String {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        String::from_utf8_lossy(&self.run(&words).join(&b' ')).into_owned()
    }

    /// The server's own digest of everything it holds.
    fn digest(&mut self) -> String {
        self.say("DEBUG DIGEST")
    }
}

/// The programs that the rigs name, with their names; says so and returns none where there are none.
pub(super) fn programs(test: &str) -> Vec<(&'static str, PathBuf)> {
    let named = [("redis", "STILLPOINT_RIG_REDIS_SERVER"), ("valkey", "STILLPOINT_RIG_VALKEY_SERVER")];
    let mut found = Vec::new();
    for (name, variable) in named {
        match std::env::var_os(variable) {
            Some(path) => found.push((name, PathBuf::from(path))),
            None => skip(&format!("{test} on {name}"), &format!("no rig: cargo xtask rig up {name}")),
        }
    }
    found
}

struct Servers(PathBuf);

impl Harness for Servers {
    fn source(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(Server::start(&self.0, &[])))
    }

    fn target(&self) -> Result<Box<dyn Subject>> {
        Ok(Box::new(Server::start(&self.0, &[])))
    }

    fn exempt(&self) -> Vec<(&'static str, &'static str)> {
        vec![(
            "absent_store_fails",
            "a target is an empty server, which is there; a server that is not is tested apart",
        )]
    }

    fn part_of(&self, _: &MemoryTree, key: &str) -> Result<Option<TreePath>> {
        TreePath::parse(&format!("keys/{key}")).map(Some)
    }
}

impl Subject for Server {
    fn open(&self) -> Result<Arc<dyn Driver>> {
        Self::open(self)
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        self.hands().run(&[b"SET", key.as_bytes(), value]);
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<()> {
        assert_eq!(self.hands().run(&[b"DEL", key.as_bytes()]), [b"1"]);
        Ok(())
    }

    fn read(&self) -> Result<Content> {
        let mut hands = self.hands();
        let keys = hands.run(&[b"KEYS", b"*"]);
        let mut content = Content::new();
        for key in keys.into_iter().filter(|key| key != b"stillpoint:stamp") {
            let value = hands.run(&[b"GET", &key]).concat();
            content.insert(String::from_utf8(key).unwrap(), value);
        }
        Ok(content)
    }

    fn edges(&self) -> Result<Option<(EdgeQuery, BTreeSet<Vec<u8>>)>> {
        let keys = self.read()?.into_keys().map(String::into_bytes).collect();
        Ok(Some((EdgeQuery::Held("keys".to_owned()), keys)))
    }
}

#[test]
fn the_contract_holds() {
    for (name, program) in programs("the_contract_holds") {
        conformance::run(&Servers(program)).assert_clean(name);
    }
}

/// Fills a server with every type of value that it has, in small and large form.
fn fill(hands: &mut Hands) {
    let mut random = fastrand::Rng::with_seed(5);
    let big: Vec<u8> = (0..300_000).map(|_| random.u8(..)).collect();
    hands.run(&[b"SET", b"bin\0\r\n\xff key", &big]);
    hands.run(&[b"SET", b"compressible", &b"abcabcabd".repeat(2000)]);
    for (key, value) in [("int8", "-5"), ("int16", "-3000"), ("int32", "2000000000"), ("int64", "9007199254740993")] {
        hands.say(&format!("SET number:{key} {value}"));
    }
    hands.run(&[b"SET", b"empty", b""]);
    hands.say("SET soon v PX 86400000");
    hands.say("SET session:1 v EX 3600");
    for number in 0..600 {
        hands.say(&format!("RPUSH list:long item-{number}"));
        hands.say(&format!("SADD set:words word-{number}"));
        hands.say(&format!("SADD set:numbers {}", number * 7919));
        hands.say(&format!("ZADD zset:long {}.5 member-{number}", number * 3));
        hands.say(&format!("HSET hash:long field-{number} value-{number}"));
        hands.say(&format!("XADD stream:long {}-{number} a {number} b text", 1000 + number));
    }
    hands.run(&[b"RPUSH", b"list:plain", &big, b"-1", b"127", b"128", b"-4096", b"70000", b"-9000000", b"5000000000"]);
    hands.say("SADD set:small a b c 17");
    hands.say("SADD set:ints 1 2 300 70000 5000000000");
    hands.say("ZADD zset:small 1 a 2.5 b -inf c +inf d");
    hands.say("HSET hash:small name model-1 artifact models/1.bin size 12");
    hands.run(&[b"HSET", b"hash:big", b"f", &big]);
    hands.say("PFADD hll a b c d");
    hands.say("GEOADD geo 13.36 38.11 Palermo 15.08 37.50 Catania");
    hands.say("SETBIT bits 1000 1");
    hands.say("XGROUP CREATE stream:long g1 0");
    hands.say("XGROUP CREATE stream:long g2 $");
    hands.say("XREADGROUP GROUP g1 alice COUNT 5 STREAMS stream:long >");
    hands.say("XREADGROUP GROUP g1 bob COUNT 3 STREAMS stream:long >");
    hands.say("XACK stream:long g1 1001-1");
    hands.say("XDEL stream:long 1010-10 1300-300");
    hands.say("XADD stream:other * only here");
    hands.say("XGROUP CREATECONSUMER stream:long g2 idle");
    hands.run(&[b"FUNCTION", b"LOAD", b"#!lua name=lib\nredis.register_function('answer', function() return 42 end)"]);
    for database in 1..16 {
        hands.say(&format!("SELECT {database}"));
        hands.say(&format!("SET only:{database} {database}"));
        hands.say("RPUSH shared a b c");
    }
    hands.say("SELECT 0");
}

/// Everything that the driver promises of a copy: the server's own digest, its functions, its groups.
fn proof(hands: &mut Hands) -> Vec<String> {
    let mut seen = vec![hands.digest(), hands.say("FUNCTION LIST WITHCODE")];
    for line in ["XINFO STREAM stream:long FULL", "XPENDING stream:long g1", "PEXPIRETIME session:1", "INFO keyspace"] {
        let text = hands.say(line);
        // Ages of consumers and averages of times to live move by themselves.
        let lines = text.split("seen-time").next().unwrap_or_default();
        seen.push(
            lines.lines().map(|line| line.split(",avg_ttl").next().unwrap_or(line)).collect::<Vec<_>>().join("\n"),
        );
    }
    seen
}

#[test]
fn every_type_comes_back_as_the_servers_own_digest_has_it() {
    for (name, program) in programs("every_type_comes_back_as_the_servers_own_digest_has_it") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let (tree, drained) = trial::back_up(&source.open().unwrap(), None);
        assert_eq!(drained.unit, "keys", "{name}");
        let expected = proof(&mut source.hands());
        for restore_by in ["master", "keys"] {
            let target = Server::start(&program, &[]);
            let mut settings = target.settings();
            settings["restoreBy"] = json!(restore_by);
            let driver = open(settings, target.folder.path()).unwrap();
            let restored = trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
            assert_eq!(restored.items, drained.items, "{name} by {restore_by}");
            assert_eq!(proof(&mut target.hands()), expected, "{name} by {restore_by}");
            assert_eq!(trial::differences(&driver, &tree), Vec::<String>::new(), "{name} by {restore_by}");
            assert_eq!(target.hands().say("CONFIG GET masterauth"), "masterauth ");
            target.hands().say("XACK stream:long g1 1002-2");
            target.hands().say("HSET hash:small artifact other");
            let found = trial::differences(&driver, &tree);
            assert_eq!(found.len(), 2, "{name} by {restore_by}: {found:?}");
        }
    }
}

/// Makes a cluster of masters that hold these ranges of slots.
fn cluster(program: &Path, ranges: &[(u16, u16)]) -> Vec<Server> {
    let nodes: Vec<Server> = ranges
        .iter()
        .map(|(from, to)| {
            // The bus listens ten thousand above.
            let port = std::iter::repeat_with(free_port).find(|port| *port < 50_000).unwrap();
            let node = Server::start_in(program, tempfile::tempdir().unwrap(), port, &["--cluster-enabled", "yes"]);
            node.hands().say(&format!("CLUSTER ADDSLOTSRANGE {from} {to}"));
            node
        })
        .collect();
    for node in &nodes[1..] {
        nodes[0].hands().say(&format!("CLUSTER MEET 127.0.0.1 {}", node.port));
    }
    wait_until("the cluster forms", || {
        let is_whole = |node: &Server| {
            let lines = node.hands().say("CLUSTER NODES");
            let masters = lines.lines().filter(|line| line.contains("master") && line.contains(" connected ")).count();
            node.hands().say("CLUSTER INFO").contains("cluster_state:ok") && masters == ranges.len()
        };
        nodes.iter().all(is_whole)
    });
    nodes
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a command to whichever node of a cluster takes it.
fn to_cluster(nodes: &[Server], line: &str) -> String {
    for node in nodes {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let answer = node.hands().raw(&words).unwrap();
        if !answer.starts_with("-MOVED") {
            return answer;
        }
    }
    panic!("no node takes `{line}`");
}

#[test]
fn a_cluster_comes_back_into_another_one_and_into_a_server() {
    for (name, program) in programs("a_cluster_comes_back_into_another_one_and_into_a_server") {
        let source = cluster(&program, &[(0, 5460), (5461, 10922), (10923, 16383)]);
        for number in 0..500 {
            to_cluster(&source, &format!("SET key:{number} value-{number}"));
            to_cluster(&source, &format!("RPUSH list:{number} a b {number}"));
        }
        to_cluster(&source, "HSET {tag}:hash a 1 b 2");
        let driver = source[1].open().unwrap();
        let before = trial::run(driver.identity(&Context::default())).unwrap();
        assert_eq!(before.native, trial::run(source[2].open().unwrap().identity(&Context::default())).unwrap().native);
        let pin = trial::pin(&driver, 1);
        to_cluster(&source, "SET key:1 later");
        let (drain, drained) = trial::drain(&driver, &pin, None).unwrap();
        assert_eq!(trial::run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid);
        trial::run(driver.release(&Context::default(), &[])).unwrap();
        assert_eq!(drained.items, 1001, "{name}");
        assert_eq!(pin.position.text.split(',').count(), 3);
        let files = drain.tree.files();
        for shard in ["00000", "05461", "10923"] {
            assert!(files.contains_key(&format!("shards/{shard}/dump.rdb")), "{name}: {:?}", files.keys());
        }

        let other = cluster(&program, &[(0, 9000), (9001, 16383)]);
        let target = other[0].open().unwrap();
        let restored = trial::restore(&target, &drain.tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(restored.items, 1001, "{name}");
        assert_eq!(to_cluster(&other, "GET key:1"), "value-1");
        assert_eq!(to_cluster(&other, "LRANGE list:77 0 -1"), "ab77");
        assert_eq!(trial::differences(&target, &drain.tree), Vec::<String>::new(), "{name}");
        let stamp = stamp();
        trial::run(target.stamp(&Context::default(), &stamp)).unwrap();
        let read = trial::run(other[1].open().unwrap().read_stamp(&Context::default())).unwrap();
        assert_eq!(read, Some(stamp), "{name}");
        assert_eq!(trial::differences(&target, &drain.tree), Vec::<String>::new(), "{name}");
        to_cluster(&other, "SET key:5 changed");
        assert_eq!(trial::differences(&target, &drain.tree), ["database 0 key `key:5` differs"]);
        let replaced = trial::restore(&target, &drain.tree, RestoreMode::InPlace, None).unwrap();
        assert_eq!(replaced.kept_old.len(), 2);
        assert_eq!(trial::differences(&target, &drain.tree), Vec::<String>::new(), "{name}");

        let single = Server::start(&program, &[]);
        let target = single.open().unwrap();
        trial::restore(&target, &drain.tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(single.hands().say("DBSIZE"), "1001");
        assert_eq!(trial::differences(&target, &drain.tree), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn a_cluster_whose_slots_migrate_or_are_not_held_is_refused() {
    for (name, program) in programs("a_cluster_whose_slots_migrate_or_are_not_held_is_refused") {
        let nodes = cluster(&program, &[(0, 8000), (8001, 16383)]);
        let id = nodes[1].hands().say("CLUSTER MYID");
        // Only the node that slots leave tells of it: whichever is asked.
        for asked in &nodes {
            nodes[0].hands().say(&format!("CLUSTER SETSLOT 100 MIGRATING {id}"));
            let driver = asked.open().unwrap();
            let error = trial::run(driver.prepare(&Context::default())).unwrap_err();
            assert!(error.message().contains("migrating"), "{name}: {error}");
            nodes[0].hands().say("CLUSTER SETSLOT 100 STABLE");
            let pin = trial::pin(&driver, 1);
            assert_eq!(trial::run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid, "{name}");
            nodes[0].hands().say(&format!("CLUSTER SETSLOT 100 MIGRATING {id}"));
            let lost = trial::run(driver.still_valid(&Context::default(), &pin)).unwrap();
            assert!(matches!(lost, Validity::Lost(_)), "{name}: {lost:?}");
        }
    }
}

fn stamp() -> Stamp {
    Stamp {
        platform: "p".to_owned(),
        environment: "e".to_owned(),
        point: "x".to_owned(),
        restore: "r".to_owned(),
        at: jiff::Timestamp::UNIX_EPOCH,
    }
}

/// Increments one counter again and again; `begun` and `acknowledged` are what it knows of it.
struct Counter {
    begun: AtomicU64,
    acknowledged: AtomicU64,
    stop: AtomicBool,
}

fn count(port: u16, key: &str, counter: &Counter) {
    let mut hands = Hands::try_new(port).unwrap();
    while !counter.stop.load(Ordering::SeqCst) {
        counter.begun.fetch_add(1, Ordering::SeqCst);
        hands.run(&[b"INCR", key.as_bytes()]);
        hands.run(&[b"SET", format!("{key}:{}", counter.begun.load(Ordering::SeqCst) % 500).as_bytes(), b"x"]);
        counter.acknowledged.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn the_cut_is_exact_among_busy_writers_and_a_plain_server_starts_from_the_point() {
    for (name, program) in programs("the_cut_is_exact_among_busy_writers_and_a_plain_server_starts_from_the_point") {
        let source = Server::start(&program, &[]);
        let mut hands = source.hands();
        hands.say("DEBUG POPULATE 200000 filler 100");
        let counters: Vec<Counter> =
            (0..4).map(|_| Counter { begun: 0.into(), acknowledged: 0.into(), stop: false.into() }).collect();
        let driver = source.open().unwrap();
        let (low, high, tree) = std::thread::scope(|scope| {
            for (number, counter) in counters.iter().enumerate() {
                let key = format!("counter:{number}");
                scope.spawn(move || count(source.port, &key, counter));
            }
            let all = |which: fn(&Counter) -> &AtomicU64| -> Vec<u64> {
                counters.iter().map(|counter| which(counter).load(Ordering::SeqCst)).collect()
            };
            trial::run(driver.prepare(&Context::default())).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let low = all(|counter| &counter.acknowledged);
            let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(2))).unwrap();
            let high = all(|counter| &counter.begun);
            std::thread::sleep(Duration::from_millis(200));
            let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
            counters.iter().for_each(|counter| counter.stop.store(true, Ordering::SeqCst));
            (low, high, drain.tree)
        });
        let target = Server::start(&program, &[]);
        let restored = target.open().unwrap();
        trial::restore(&restored, &tree, RestoreMode::Fresh, None).unwrap();
        let value = |server: &Server, number: usize| -> u64 {
            server.hands().say(&format!("GET counter:{number}")).parse().unwrap()
        };
        for number in 0..counters.len() {
            let seen = value(&target, number);
            assert!(
                (low[number]..=high[number]).contains(&seen),
                "{name}: {} <= {seen} <= {}",
                low[number],
                high[number]
            );
        }
        assert!(tree.files()["replay.aof"].len() > 1000, "the point has commands behind its image");
        assert_eq!(trial::differences(&restored, &tree), Vec::<String>::new(), "{name}");
        target.hands().say("SET filler:17 changed");
        target.hands().say("SET counter:0:1 changed");
        let found = trial::differences(&restored, &tree);
        assert_eq!(found.len(), 2, "{name}: {found:?}");
        let digest = {
            let again = Server::start(&program, &[]);
            let driver = again.open().unwrap();
            trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
            again.hands().digest()
        };

        // As HOW-TO-RESTORE.txt says, and as `restore --to` writes it.
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let settings = (REGISTRATION.into_folder.unwrap())(&serde_json::from_value(source.settings()).unwrap(), &data);
        let files = open(serde_json::to_value(settings).unwrap(), folder.path()).unwrap();
        trial::restore(&files, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(trial::differences(&files, &tree), Vec::<String>::new());
        trial::run(files.stamp(&Context::default(), &stamp())).unwrap();
        assert_eq!(trial::run(files.read_stamp(&Context::default())).unwrap(), Some(stamp()));
        let refused = trial::restore(&files, &tree, RestoreMode::Fresh, None).unwrap_err();
        assert_eq!(refused.kind(), Kind::AlreadyExists);
        let home = tempfile::tempdir().unwrap();
        std::fs::rename(data.join("appendonlydir"), home.path().join("appendonlydir")).unwrap();
        let plain = Server::start_in(&program, home, free_port(), &["--appendonly", "yes"]);
        assert_eq!(plain.hands().digest(), digest, "{name}");

        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("dump.rdb"), &tree.files()["dump.rdb"]).unwrap();
        let plain = Server::start_in(&program, home, free_port(), &[]);
        assert!(plain.hands().say("DBSIZE").parse::<u64>().unwrap() >= 200_000);
        let mut hands = plain.hands();
        hands.stream.get_mut().write_all(&tree.files()["replay.aof"]).unwrap();
        hands.run(&[b"PING"]);
        wait_until("the commands are carried out", || plain.hands().digest() == digest);
    }
}

#[test]
fn signs_of_life_of_the_master_are_no_writes() {
    for (name, program) in programs("signs_of_life_of_the_master_are_no_writes") {
        let source = Server::start(&program, &["--repl-ping-replica-period", "1"]);
        source.hands().say("SET a 1");
        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        let offset = || {
            source
                .hands()
                .say("INFO replication")
                .lines()
                .find(|l| l.starts_with("master_repl_offset"))
                .unwrap()
                .to_owned()
        };
        let (before, first) = (trial::run(driver.observe(&Context::default())).unwrap(), offset());
        std::thread::sleep(Duration::from_millis(2500));
        source.hands().say("PUBLISH channel message");
        assert_ne!(first, offset(), "the offset moved");
        assert_eq!(before, trial::run(driver.observe(&Context::default())).unwrap(), "{name}");
        source.hands().say("SET a 2");
        assert_ne!(before, trial::run(driver.observe(&Context::default())).unwrap(), "{name}");
    }
}

#[test]
fn times_of_expiry_are_kept_shifted_or_frozen() {
    for (name, program) in programs("times_of_expiry_are_kept_shifted_or_frozen") {
        let source = Server::start(&program, &[]);
        let mut hands = source.hands();
        hands.say("SET brief v PX 1500");
        hands.say("SET lasting v EX 10000");
        hands.say("SET eternal v");
        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        hands.say("SET late v PX 1500");
        hands.say("SETEX late:2 2 v");
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        let expires = hands.say("PEXPIRETIME lasting");
        std::thread::sleep(Duration::from_millis(2200));
        for (policy, by) in
            [("keep", "master"), ("shift", "master"), ("freeze", "master"), ("shift", "keys"), ("freeze", "keys")]
        {
            let target = Server::start(&program, &[]);
            let mut settings = target.settings();
            settings["ttl"] = json!(policy);
            settings["restoreBy"] = json!(by);
            let restored = open(settings, target.folder.path()).unwrap();
            trial::restore(&restored, &drain.tree, RestoreMode::Fresh, None).unwrap();
            let mut seen = target.hands();
            let alive: Vec<String> = ["brief", "late", "late:2"].map(|key| seen.say(&format!("EXISTS {key}"))).into();
            let time = |seen: &mut Hands, key: &str| seen.say(&format!("PEXPIRETIME {key}")).parse::<i64>().unwrap();
            let note = format!("{name} {policy} by {by}");
            match policy {
                "keep" => {
                    assert_eq!(alive, ["0", "0", "0"], "{note}");
                    assert_eq!(seen.say("PEXPIRETIME lasting"), expires, "{note}");
                }
                "shift" => {
                    assert_eq!(alive, ["1", "1", "1"], "{note}");
                    let by = time(&mut seen, "lasting") - expires.parse::<i64>().unwrap();
                    assert!((2100..20_000).contains(&by), "{note}: {by} ms");
                }
                _ => {
                    assert_eq!(alive, ["1", "1", "1"], "{note}");
                    for key in ["brief", "lasting", "late", "late:2"] {
                        assert_eq!(time(&mut seen, key), -1, "{note}");
                    }
                }
            }
            assert_eq!(trial::differences(&restored, &drain.tree), Vec::<String>::new(), "{note}");
        }
    }
}

#[test]
fn a_key_that_expired_does_not_come_back_for_ever() {
    for (name, program) in programs("a_key_that_expired_does_not_come_back_for_ever") {
        let source = Server::start(&program, &[]);
        let mut hands = source.hands();
        hands.say("MSET lasting 1 eternal 1");
        hands.say("SET rate:1 5 PX 2500");
        hands.say("EXPIRE lasting 10000");
        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        hands.say("INCR rate:1");
        hands.say("INCR lasting");
        hands.say("SET late v PX 1000");
        hands.say("SET later v PX 20000000");
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let tree = trial::drain(&driver, &pin, None).unwrap().0.tree;
        std::thread::sleep(Duration::from_secs(3));
        for by in ["master", "keys"] {
            let target = Server::start(&program, &[]);
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            let into = open(settings, target.folder.path()).unwrap();
            trial::restore(&into, &tree, RestoreMode::Fresh, None).unwrap();
            let mut seen = target.hands();
            assert_eq!(seen.say("EXISTS rate:1 late"), "0", "{name} by {by}");
            assert_eq!(seen.say("MGET lasting eternal later"), "2 1 v", "{name} by {by}");
            for key in ["lasting", "eternal", "later"] {
                let question = format!("PEXPIRETIME {key}");
                assert_eq!(seen.say(&question), hands.say(&question), "{name} by {by}: {key}");
            }
        }
    }
}

#[test]
fn parts_come_back_alone_and_replace_only_themselves() {
    for (name, program) in programs("parts_come_back_alone_and_replace_only_themselves") {
        let source = Server::start(&program, &[]);
        let mut hands = source.hands();
        fill(&mut hands);
        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        hands.say("MSET session:2 new other:1 new");
        hands.say("DEL session:1 number:int8");
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let tree = trial::drain(&driver, &pin, None).unwrap().0.tree;
        let target = Server::start(&program, &[]);
        let into = target.open().unwrap();
        trial::restore(&into, &tree, RestoreMode::Fresh, Some("databases/3")).unwrap();
        assert_eq!(target.hands().say("INFO keyspace").trim().lines().count(), 2, "{name}");
        let mut seen = target.hands();
        seen.say("SELECT 3");
        assert_eq!(seen.say("LRANGE shared 0 -1"), "a b c");
        seen.say("SELECT 0");
        seen.say("MSET session:old 1 elsewhere 1");
        let occupied = trial::restore(&into, &tree, RestoreMode::Fresh, Some("keys/session:")).unwrap_err();
        assert_eq!(occupied.kind(), Kind::AlreadyExists, "{name}");
        let restored = trial::restore(&into, &tree, RestoreMode::InPlace, Some("databases/0/keys/session:")).unwrap();
        assert_eq!(restored.kept_old.len(), 1, "{name}");
        let kept = std::fs::metadata(&restored.kept_old[0]).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&kept.permissions()) & 0o777, 0o600, "{name}");
        let mut keys = target.hands().run(&[b"KEYS", b"*"]);
        keys.sort();
        assert_eq!(keys, [&b"elsewhere"[..], b"session:2"], "{name}");
        let absent = trial::restore(&into, &tree, RestoreMode::InPlace, Some("keys/nothing:")).unwrap_err();
        assert_eq!(absent.kind(), Kind::NotFound, "{name}");
        assert_eq!(target.hands().say("EXISTS elsewhere session:2"), "2", "{name}");
        assert_eq!(target.hands().say("INFO commandstats").matches("cmdstat_flushall").count(), 0, "{name}");
        // The part fails halfway: it comes back, and all else is as others left it meanwhile.
        trial::run(into.stamp(&Context::default(), &stamp())).unwrap();
        let mut image = tree.files()["dump.rdb"].clone();
        let end = image.len() - 3;
        image[end] ^= 0x40;
        let damaged = tree.with_file(&[b"dump.rdb"], image);
        let error = trial::restore(&into, &damaged, RestoreMode::InPlace, Some("keys/session:")).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{name}: {error}");
        assert_eq!(target.hands().say("EXISTS elsewhere session:2 stillpoint:stamp"), "3", "{name}");
        assert_eq!(target.hands().say("INFO commandstats").matches("cmdstat_flushall").count(), 0, "{name}");
    }
}

#[test]
fn mode_rdb_forks_in_the_cut() {
    for (name, program) in programs("mode_rdb_forks_in_the_cut") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let mut settings = source.settings();
        settings["mode"] = json!("rdb");
        let driver = open(settings, &source.folder.path().join("scratch")).unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        source.hands().say("SET before-the-cut 1");
        let expected = proof(&mut source.hands());
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        source.hands().say("SET after-the-cut 1");
        let (drain, drained) = trial::drain(&driver, &pin, None).unwrap();
        assert!(drained.notes.iter().any(|note| note.contains("fork")), "{name}: {:?}", drained.notes);
        assert!(drain.tree.files()["replay.aof"].is_empty());
        let target = Server::start(&program, &[]);
        trial::restore(&target.open().unwrap(), &drain.tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(proof(&mut target.hands()), expected, "{name}");
    }
}

#[test]
fn mode_rdb_takes_no_image_that_was_begun_before_the_cut() {
    for (name, program) in programs("mode_rdb_takes_no_image_that_was_begun_before_the_cut") {
        let slow = ["--rdb-key-save-delay", "2000", "--repl-diskless-sync", "no"];
        let source = Server::start(&program, &slow);
        source.hands().say("DEBUG POPULATE 2000 key 10");
        let mut settings = source.settings();
        settings["mode"] = json!("rdb");
        let driver = open(settings, &source.folder.path().join("scratch")).unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        let mut other = source.hands();
        other.say("REPLCONF capa psync2 rdb-only 1");
        other.write(&[b"PSYNC", b"?", b"-1"]).unwrap();
        wait_until("another one's image is made", || {
            source.hands().say("INFO persistence").contains("rdb_bgsave_in_progress:1")
        });
        source.hands().say("SET before-the-cut 1");
        let error = fails(trial::run(driver.cut(&Context::default(), &trial::cut_id(1))));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Conflict, true), "{name}: {error}");
        assert!(error.message().contains("older image"), "{name}: {error}");
    }
}

#[test]
fn references_are_those_of_the_cut() {
    for (name, program) in programs("references_are_those_of_the_cut") {
        let source = Server::start(&program, &[]);
        let mut hands = source.hands();
        for number in 0..50 {
            hands.say(&format!("SET models:{number} artifacts/{number}"));
            hands.say(&format!("HSET run:{number} artifact out/{number} state done"));
        }
        hands.say("SADD wanted a b c");
        hands.say("RPUSH queue q1 q2 q3");
        hands.say("ZADD ranking 1 r1 2 r2");
        hands.say("SET elsewhere x");
        let queries: Vec<EdgeQuery> = [
            "GET models:*",
            "HGET run:* artifact",
            "SMEMBERS wanted",
            "LRANGE queue",
            "ZRANGE ranking 0 -1",
            "KEYS models:*",
            "GET models:* IN 3",
            "HVALS run:1",
            "HKEYS run:1",
        ]
        .map(|text| EdgeQuery::From(text.to_owned()))
        .into();
        let driver = source.open().unwrap();
        trial::run(driver.expect_edges(&queries)).unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        for line in [
            "SET models:1 changed",
            "DEL models:2",
            "MSET models:new fresh models:3 third",
            "HSET run:5 artifact other more x",
            "HDEL run:6 artifact",
            "SADD wanted d",
            "SREM wanted a",
            "LPUSH queue q0",
            "RPOP queue",
            "ZREM ranking r1",
            "ZADD ranking 3 r3",
            "SELECT 3",
            "SET models:3 in-three",
            "SELECT 0",
        ] {
            hands.say(line);
        }
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        hands.say("SET models:4 too-late");
        hands.say("DEL wanted queue");
        let ask = |driver: &Arc<dyn Driver>, pin: Option<&Pin>, query: &EdgeQuery| -> BTreeSet<String> {
            let edges = trial::edges(driver, pin, query).unwrap();
            edges.into_iter().map(|edge| String::from_utf8(edge.referent).unwrap()).collect()
        };
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        let of = |number: usize| ask(&driver, Some(&pin), &queries[number]);
        let set = |items: &[&str]| -> BTreeSet<String> { items.iter().map(|item| (*item).to_owned()).collect() };
        let models = of(0);
        assert_eq!(models.len(), 51, "{name}: {models:?}");
        assert!(
            models.is_superset(&set(&["changed", "fresh", "third", "artifacts/4", "in-three"])),
            "{name}: {models:?}"
        );
        assert!(models.is_disjoint(&set(&["artifacts/1", "artifacts/2", "artifacts/3", "too-late"])), "{name}");
        let artifacts = of(1);
        assert!(artifacts.len() == 49 && artifacts.contains("other") && !artifacts.contains("out/6"), "{name}");
        assert_eq!(of(2), set(&["b", "c", "d"]), "{name}");
        assert_eq!(of(3), set(&["q0", "q1", "q2"]), "{name}");
        assert_eq!(of(4), set(&["r2", "r3"]), "{name}");
        assert_eq!(of(5).len(), 50, "{name}");
        assert_eq!(of(6), set(&["in-three"]), "{name}");
        assert_eq!(of(7), set(&["out/1", "done"]), "{name}");
        assert_eq!(of(8), set(&["artifact", "state"]), "{name}");
        // A restored store, asked alive, gives the same answers.
        let target = Server::start(&program, &[]);
        let restored = target.open().unwrap();
        trial::restore(&restored, &drain.tree, RestoreMode::Fresh, None).unwrap();
        for (number, query) in queries.iter().enumerate() {
            assert_eq!(ask(&restored, None, query), of(number), "{name}: {query:?}");
        }
        let unknown = trial::edges(&driver, Some(&pin), &EdgeQuery::From("GET other:*".to_owned())).unwrap_err();
        assert!(unknown.message().contains("not announced"), "{name}: {unknown}");
        for wrong in ["GET", "SELECT * FROM models", "GET a b", "HGET a", "GET a IN x"] {
            let error = trial::run(driver.expect_edges(&[EdgeQuery::From(wrong.to_owned())])).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{wrong}");
        }
    }
}

#[test]
fn a_command_that_references_cannot_follow_is_an_error_with_a_way_out() {
    for (name, program) in programs("a_command_that_references_cannot_follow_is_an_error_with_a_way_out") {
        let source = Server::start(&program, &[]);
        source.hands().say("MSET models:1 a other:1 b");
        let query = EdgeQuery::From("GET models:*".to_owned());
        let driver = source.open().unwrap();
        trial::run(driver.expect_edges(std::slice::from_ref(&query))).unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        source.hands().say("RENAME other:1 other:2");
        source.hands().say("RENAME models:1 models:2");
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        // The image may have been made before or after; only a command behind it must be followed.
        if drain.tree.files()["replay.aof"].windows(8).any(|window| window == b"models:1") {
            let error = trial::edges(&driver, Some(&pin), &query).unwrap_err();
            assert!(error.message().contains("RENAME"), "{name}: {error}");
            assert!(error.hint_text().unwrap().contains("mode: rdb"), "{name}");
        }
    }
}

#[test]
fn keys_that_change_their_database_are_an_error_for_parts_and_references() {
    for (name, program) in programs("keys_that_change_their_database_are_an_error_for_parts_and_references") {
        for line in ["MOVE a 3", "COPY a b DB 3", "SWAPDB 0 3"] {
            let source = Server::start(&program, &[]);
            source.hands().say("MSET a 1 other 1");
            let query = EdgeQuery::From("GET * IN 3".to_owned());
            let driver = source.open().unwrap();
            trial::run(driver.expect_edges(std::slice::from_ref(&query))).unwrap();
            trial::run(driver.prepare(&Context::default())).unwrap();
            await_image(&source, &driver);
            source.hands().say(line);
            let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
            let tree = trial::drain(&driver, &pin, None).unwrap().0.tree;
            let error = fails(trial::edges(&driver, Some(&pin), &query));
            assert_eq!(error.kind(), Kind::Unsupported, "{name} {line}: {error}");
            let target = Server::start(&program, &[]);
            target.hands().say("SET a old");
            let into = target.open().unwrap();
            let error = fails(trial::restore(&into, &tree, RestoreMode::InPlace, Some("databases/0")));
            assert_eq!(error.kind(), Kind::Unsupported, "{name} {line}: {error}");
            assert_eq!(target.hands().say("GET a"), "old", "{name} {line}");
            trial::restore(&into, &tree, RestoreMode::InPlace, None).unwrap();
            assert_eq!(target.hands().digest(), source.hands().digest(), "{name} {line}");
        }
    }
}

fn fails<T: std::fmt::Debug>(result: Result<T>) -> stillpoint_core::Error {
    result.unwrap_err()
}

fn signal(server: &Server, name: &str) {
    let sent = Command::new("kill").args([name, &server.child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits until the driver, attached already, has received the image: something behind it has come.
fn await_image(server: &Server, driver: &Arc<dyn Driver>) {
    server.hands().say("PUBLISH nobody listens");
    wait_until("the image is here", || {
        let position = trial::run(driver.observe(&Context::default())).unwrap();
        position.is_some_and(|position| position.text.ends_with("written"))
    });
}

#[test]
fn a_server_that_is_away_or_shut_is_named() {
    for (name, program) in programs("a_server_that_is_away_or_shut_is_named") {
        let scratch = tempfile::tempdir().unwrap();
        let port = free_port();
        let away = open(json!({ "url": format!("redis://127.0.0.1:{port}") }), scratch.path()).unwrap();
        let error = fails(trial::run(away.prepare(&Context::default())));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{name}");
        assert!(error.to_string().contains(&format!("cannot connect to 127.0.0.1:{port}")), "{error}");

        let shut = Server::start(&program, &["--requirepass", "right"]);
        let with = |password: Option<&str>| {
            let mut settings = shut.settings();
            if let Some(password) = password {
                settings["password"] = json!(password);
            }
            open(settings, scratch.path()).unwrap()
        };
        let error = fails(trial::run(with(None).prepare(&Context::default())));
        assert_eq!(error.kind(), Kind::Unauthenticated, "{name}: {error}");
        assert!(error.hint_text().unwrap().contains("password:"), "{name}");
        let error = fails(trial::run(with(Some("wrong")).prepare(&Context::default())));
        assert_eq!(error.kind(), Kind::Unauthenticated, "{name}: {error}");
        assert!(!format!("{error:?}").contains("wrong"), "a password is shown: {error:?}");
        trial::run(with(Some("right")).prepare(&Context::default())).unwrap();
        let open = Server::start(&program, &[]);
        let mut settings = open.settings();
        settings["password"] = json!("needless");
        let needless = trial::open(&REGISTRATION, settings, scratch.path()).unwrap();
        assert!(trial::run(needless.prepare(&Context::default())).is_err(), "{name}");
    }
}

#[test]
fn passwords_are_not_in_the_point() {
    for (name, program) in programs("passwords_are_not_in_the_point") {
        let source = Server::start(&program, &["--masterauth", "s3cret-1", "--tls-key-file-pass", "s3cret-2"]);
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let settings = String::from_utf8(tree.files()["config.txt"].clone()).unwrap();
        assert!(settings.contains("maxmemory") && !settings.contains("s3cret"), "{name}: {settings}");
    }
}

#[test]
fn the_least_privileges_are_enough_and_a_missing_one_is_named() {
    for (name, program) in programs("the_least_privileges_are_enough_and_a_missing_one_is_named") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        source.hands().say("ACL SETUSER backup on >pw +psync +replconf +ping +info");
        let mut settings = source.settings();
        settings["user"] = json!("backup");
        settings["password"] = json!("pw");
        let opened = || open(settings.clone(), &source.folder.path().join("scratch")).unwrap();
        let probe = trial::run(opened().probe(&Context::default())).unwrap();
        assert_eq!(probe.missing_privileges, Vec::<String>::new(), "{name}");
        assert!(probe.warnings.iter().any(|warning| warning.contains("+config|get")), "{name}: {:?}", probe.warnings);
        let (tree, drained) = trial::back_up(&opened(), None);
        assert_eq!(drained.items, 1, "{name}");
        assert!(!tree.files().contains_key("acl.txt"), "{name}");
        source.hands().say("ACL SETUSER backup -psync");
        let error = fails(trial::run(opened().prepare(&Context::default())));
        assert_eq!(error.kind(), Kind::PermissionDenied, "{name}: {error}");
        assert!(error.hint_text().unwrap().contains("+psync"), "{name}: {:?}", error.hint_text());
        source.hands().say("ACL SETUSER backup -replconf");
        let probe = trial::run(opened().probe(&Context::default())).unwrap();
        assert!(probe.missing_privileges[0].contains("ACL SETUSER backup +psync +replconf"), "{name}");
    }
}

#[test]
fn a_server_that_dies_or_falls_silent_fails_the_point_in_every_phase() {
    for (name, program) in programs("a_server_that_dies_or_falls_silent_fails_the_point_in_every_phase") {
        let start = || {
            let server = Server::start(&program, &[]);
            server.hands().say("DEBUG POPULATE 1000 key 1000");
            let mut settings = server.settings();
            settings["timeoutSeconds"] = json!(2);
            let driver = open(settings, &server.folder.path().join("scratch")).unwrap();
            trial::run(driver.prepare(&Context::default())).unwrap();
            (server, driver)
        };
        let (mut server, driver) = start();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        let error = fails(trial::run(driver.cut(&Context::default(), &trial::cut_id(1))));
        assert_eq!(error.kind(), Kind::Unreachable, "{name} killed before the cut: {error}");
        trial::run(driver.release(&Context::default(), &[])).unwrap();

        let (mut server, driver) = start();
        await_image(&server, &driver);
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        // All that the cut shows was received before the server died: the point is whole.
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        assert!(drain.tree.files()["dump.rdb"].len() > 10_000, "{name}");
        assert_eq!(trial::run(driver.still_valid(&Context::default(), &pin)).unwrap(), Validity::Valid, "{name}");

        let (server, driver) = start();
        await_image(&server, &driver);
        signal(&server, "-STOP");
        let begun = Instant::now();
        let error = fails(trial::run(driver.cut(&Context::default(), &trial::cut_id(1))));
        assert_eq!(error.kind(), Kind::TimedOut, "{name} stopped before the cut: {error}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{name}");
        signal(&server, "-CONT");
        drop(driver);
    }
}

#[test]
fn a_server_that_stops_while_it_sends_its_image_is_not_waited_for_for_ever() {
    for (name, program) in programs("a_server_that_stops_while_it_sends_its_image_is_not_waited_for_for_ever") {
        // The child waits between keys, so that the image takes long.
        for (what, kind) in [("-STOP", Kind::TimedOut), ("-KILL", Kind::Unreachable)] {
            let server = Server::start(&program, &["--rdb-key-save-delay", "2000"]);
            server.hands().say("DEBUG POPULATE 20000 key 1000");
            let mut settings = server.settings();
            settings["timeoutSeconds"] = json!(2);
            let driver = open(settings, &server.folder.path().join("scratch")).unwrap();
            let pin = trial::pin(&driver, 1);
            signal(&server, what);
            let error = fails(trial::drain(&driver, &pin, None).map(drop));
            assert_eq!(error.kind(), kind, "{name} {what}: {error}");
            let lost = trial::run(driver.still_valid(&Context::default(), &pin)).unwrap();
            assert!(matches!(lost, Validity::Lost(_)), "{name} {what}: {lost:?}");
        }
    }
}

#[test]
fn a_connection_that_breaks_is_taken_up_again_while_the_server_has_the_commands() {
    for (name, program) in programs("a_connection_that_breaks_is_taken_up_again_while_the_server_has_the_commands") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 0");
        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        for turn in 0..3 {
            source.hands().say("INCR a");
            source.hands().say("CLIENT KILL TYPE replica");
            source.hands().say(&format!("SET turn:{turn} x"));
        }
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        assert!(source.hands().say("INFO stats").contains("sync_partial_ok:"), "{name}");
        assert!(!source.hands().say("INFO stats").contains("sync_partial_ok:0"), "{name}");
        let target = Server::start(&program, &[]);
        trial::restore(&target.open().unwrap(), &drain.tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(target.hands().digest(), source.hands().digest(), "{name}");

        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        source.hands().say("DEBUG CHANGE-REPL-ID");
        source.hands().say("CLIENT KILL TYPE replica");
        let lost = |driver: &Arc<dyn Driver>| trial::run(driver.cut(&Context::default(), &trial::cut_id(1)));
        let error = fails(lost(&driver));
        assert_eq!(error.kind(), Kind::PinLost, "{name}: {error}");

        let driver = source.open().unwrap();
        trial::run(driver.prepare(&Context::default())).unwrap();
        source.hands().say(&format!("REPLICAOF 127.0.0.1 {}", target.port));
        let error = fails(lost(&driver));
        assert_eq!(error.kind(), Kind::PinLost, "{name}: {error}");
        assert!(error.message().contains("no master"), "{name}: {error}");
        let error = fails(trial::run(source.open().unwrap().prepare(&Context::default())));
        assert!(error.hint_text().unwrap().contains(&format!("redis://127.0.0.1:{}", target.port)), "{name}: {error}");
    }
}

#[test]
fn a_slow_bucket_goes_to_disk_and_its_limit_is_kept() {
    for (name, program) in programs("a_slow_bucket_goes_to_disk_and_its_limit_is_kept") {
        let source = Server::start(&program, &[]);
        let mut random = fastrand::Rng::with_seed(9);
        let noise: Vec<u8> = (0..1_000_000).map(|_| random.u8(..)).collect();
        for number in 0..40 {
            source.hands().run(&[b"SET", format!("noise:{number}").as_bytes(), &noise]);
        }
        let opened = |mib: u64| {
            let mut settings = source.settings();
            settings["spoolMibMax"] = json!(mib);
            open(settings, &source.folder.path().join("scratch")).unwrap()
        };
        let driver = opened(0);
        trial::run(driver.prepare(&Context::default())).unwrap();
        await_image(&source, &driver);
        let pin = trial::run(driver.cut(&Context::default(), &trial::cut_id(1))).unwrap();
        let (drain, _) = trial::drain(&driver, &pin, None).unwrap();
        assert!(drain.tree.files()["dump.rdb"].len() > 40_000_000, "{name}");
        let driver = opened(1);
        trial::run(driver.prepare(&Context::default())).unwrap();
        wait_until("the disk is full", || trial::run(driver.observe(&Context::default())).is_err());
        let error = fails(trial::run(driver.cut(&Context::default(), &trial::cut_id(1))));
        assert_eq!(error.kind(), Kind::Exhausted, "{name}: {error}");
        assert!(error.to_string().contains("spoolMibMax"), "{name}: {error}");
    }
}

#[test]
fn a_damaged_image_never_reaches_a_server_whole() {
    for (name, program) in programs("a_damaged_image_never_reaches_a_server_whole") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let mut image = tree.files()["dump.rdb"].clone();
        let middle = image.len() / 2;
        image[middle] ^= 0x40;
        let damaged = tree.with_file(&[b"dump.rdb"], image);
        for by in ["master", "keys"] {
            let target = Server::start(&program, &[]);
            target.hands().say("SET old content");
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            let driver = open(settings, target.folder.path()).unwrap();
            let error = fails(trial::restore(&driver, &damaged, RestoreMode::InPlace, None));
            assert_eq!(error.kind(), Kind::Corrupt, "{name} by {by}: {error}");
            assert_eq!(target.hands().say("GET old"), "content", "{name} by {by}");
            assert_eq!(target.hands().say("DBSIZE"), "1", "{name} by {by}");
            assert!(target.hands().say("INFO replication").contains("role:master"), "{name} by {by}");
            trial::run(driver.stamp(&Context::default(), &stamp())).unwrap();
            fails(trial::restore(&driver, &damaged, RestoreMode::InPlace, None));
            let read = trial::run(driver.read_stamp(&Context::default())).unwrap();
            assert_eq!(read, Some(stamp()), "{name} by {by}");
        }
    }
}

#[test]
fn a_target_that_was_not_touched_is_not_undone() {
    for (name, program) in programs("a_target_that_was_not_touched_is_not_undone") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let target = Server::start(&program, &[]);
        target.hands().say("SET old content");
        let mut settings = target.settings();
        // An address that the target cannot reach, so that it never attaches.
        settings["advertise"] = json!("127.0.0.77.invalid");
        let driver = open(settings, target.folder.path()).unwrap();
        let context = Context::default();
        let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: "r1".to_owned() };
        let error = std::thread::scope(|scope| {
            let running = scope.spawn(|| fails(trial::run(driver.restore(&context, &tree, &request))));
            std::thread::sleep(Duration::from_secs(1));
            target.hands().raw(&[b"REPLICAOF", b"NO", b"ONE"]).unwrap();
            target.hands().say("SET written meanwhile");
            context.cancel();
            running.join().unwrap()
        });
        assert_eq!(error.kind(), Kind::Cancelled, "{name}: {error}");
        assert_eq!(target.hands().say("GET written"), "meanwhile", "{name}");
        assert_eq!(target.hands().say("GET old"), "content", "{name}");
    }
}

/// What the next test starts and kills: it restores in place what the one server holds into the other.
#[test]
#[ignore = "started by what_a_killed_restore_left_is_taken_up_again, and killed"]
fn restores_until_it_is_killed() {
    let given = |name: &str| std::env::var(format!("STILLPOINT_TEST_{name}")).ok();
    let (Some(from), Some(into), Some(kept)) = (given("FROM"), given("INTO"), given("KEPT")) else { return };
    let by = given("BY").unwrap_or_else(|| "auto".to_owned());
    let scratch = tempfile::tempdir().unwrap();
    let at = |port: &str| {
        let settings = json!({ "url": format!("redis://127.0.0.1:{port}"), "keepOld": kept, "restoreBy": by });
        open(settings, scratch.path()).unwrap()
    };
    let (tree, _) = trial::back_up(&at(&from), None);
    trial::restore(&at(&into), &tree, RestoreMode::InPlace, None).unwrap();
}

/// A process that restores what `source` holds into `target`, to be killed.
fn restoring(source: &Server, target: &Server, by: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "redis::tests::restores_until_it_is_killed", "--ignored", "--test-threads=1"])
        .env("STILLPOINT_TEST_FROM", source.port.to_string())
        .env("STILLPOINT_TEST_INTO", target.port.to_string())
        .env("STILLPOINT_TEST_KEPT", target.folder.path().join("kept"))
        .env("STILLPOINT_TEST_BY", by)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// A target with old content, a stamp and a password for its master, whose restore was killed while it loaded.
fn interrupted(program: &Path, source: &Server) -> Server {
    // Half a millisecond a key: loading takes two seconds.
    let slow = ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "4096"];
    let target = Server::start(program, &slow);
    target.hands().say("SET old content");
    target.hands().say("CONFIG SET masterauth s3cret");
    target.hands().say("CONFIG SET masteruser app");
    trial::run(target.open().unwrap().stamp(&Context::default(), &stamp())).unwrap();
    let mut child = restoring(source, &target, "auto");
    let shows = |text: &str| target.hands().say("INFO").lines().any(|line| line.trim() == text);
    wait_until("the target loads", || shows("loading:1") || shows("async_loading:1"));
    child.kill().unwrap();
    child.wait().unwrap();
    // It notices only then that nobody feeds it any more.
    wait_until("the target has loaded", || {
        shows("loading:0") && !shows("async_loading:1") && shows("master_link_status:down")
    });
    assert!(shows("role:slave"));
    target
}

#[test]
fn what_a_killed_restore_left_is_taken_up_again() {
    for (name, program) in programs("what_a_killed_restore_left_is_taken_up_again") {
        let source = Server::start(&program, &[]);
        source.hands().say("DEBUG POPULATE 4000 key 100");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let mut image = tree.files()["dump.rdb"].clone();
        let end = image.len() - 3;
        image[end] ^= 0x40;
        let damaged = tree.clone().with_file(&[b"dump.rdb"], image);
        let is_whole = |target: &Server, note: &str| {
            let mut seen = target.hands();
            assert!(seen.say("INFO replication").contains("role:master"), "{note}");
            assert_eq!(seen.say("CONFIG GET masteruser"), "masteruser app", "{note}");
            assert_eq!(seen.say("CONFIG GET repl-diskless-load"), "repl-diskless-load disabled", "{note}");
            assert_eq!(seen.say("CONFIG GET masterauth"), "masterauth ", "{note}");
        };
        for by in ["master", "keys"] {
            let note = format!("{name} by {by}");
            let target = interrupted(&program, &source);
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            let driver = open(settings, target.folder.path()).unwrap();
            let error = fails(trial::run(driver.probe(&Context::default())));
            assert!(error.message().contains("`r1`") && error.message().contains("interrupted"), "{note}: {error}");
            let read = trial::run(driver.read_stamp(&Context::default())).unwrap();
            assert_eq!(read, Some(stamp()), "{note}");
            assert!(trial::run(driver.occupied(&Context::default())).unwrap().unwrap().contains("`r1`"), "{note}");
            let fresh = fails(trial::restore(&driver, &tree, RestoreMode::Fresh, None));
            assert_eq!(fresh.kind(), Kind::AlreadyExists, "{note}");
            let part = fails(trial::restore(&driver, &tree, RestoreMode::InPlace, Some("keys/key:1")));
            assert_eq!(part.kind(), Kind::Conflict, "{note}: {part}");
            let restored = trial::restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
            assert_eq!(target.hands().digest(), source.hands().digest(), "{note}");
            is_whole(&target, &note);
            assert!(restored.losses.iter().any(|loss| loss.what.contains("masterauth")), "{note}: {restored:?}");
            let kept = std::fs::File::open(&restored.kept_old[0]).unwrap();
            let held = super::count_keys(kept).unwrap();
            assert_eq!((restored.kept_old.len(), held[&0]), (1, 2), "{note}: the old content and the stamp");

            // A further failure puts back what was there before the first try.
            let target = interrupted(&program, &source);
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            let driver = open(settings, target.folder.path()).unwrap();
            let error = fails(trial::restore(&driver, &damaged, RestoreMode::InPlace, None));
            assert_eq!(error.kind(), Kind::Corrupt, "{note}: {error}");
            assert_eq!(target.hands().say("GET old"), "content", "{note}");
            assert_eq!(target.hands().say("DBSIZE"), "2", "{note}");
            let read = trial::run(driver.read_stamp(&Context::default())).unwrap();
            assert_eq!(read, Some(stamp()), "{note}");
            is_whole(&target, &note);
        }

        let target = interrupted(&program, &source);
        target.hands().say("REPLICAOF NO ONE");
        target.hands().say("SET written meanwhile");
        let restored = trial::restore(&target.open().unwrap(), &tree, RestoreMode::InPlace, None).unwrap();
        assert_eq!(restored.kept_old.len(), 2, "{name}: what was found, and what was before: {restored:?}");
        assert_eq!(target.hands().digest(), source.hands().digest(), "{name}");
        is_whole(&target, name);

        let target = interrupted(&program, &source);
        let other = Server::start(&program, &[]);
        target.hands().say(&format!("REPLICAOF 127.0.0.1 {}", other.port));
        let error = fails(trial::restore(&target.open().unwrap(), &tree, RestoreMode::InPlace, None));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Conflict, false), "{name}: {error}");
        // Nobody listens there any more, and still it is the replica of another one.
        drop(other);
        let seen = |text: &str| target.hands().say("INFO replication").contains(text);
        wait_until("the link is down", || seen("master_link_status:down"));
        let error = fails(trial::restore(&target.open().unwrap(), &tree, RestoreMode::InPlace, None));
        assert!(error.kind() == Kind::Conflict && error.message().contains("is a replica"), "{name}: {error}");
        assert!(seen("role:slave"), "{name}");
    }
}

#[test]
fn a_target_that_takes_an_image_is_fed_though_nobody_listens_any_more() {
    for (name, program) in programs("a_target_that_takes_an_image_is_fed_though_nobody_listens_any_more") {
        let source = Server::start(&program, &[]);
        source.hands().say("DEBUG POPULATE 4000 key 100");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let target = interrupted(&program, &source);
        let info = target.hands().say("INFO replication");
        let port = info.lines().find_map(|line| line.trim().strip_prefix("master_port:")).unwrap().parse().unwrap();
        // It takes the connection and no other, as one that is out of reach for us.
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let (socket, _) = listener.accept().unwrap();
        drop(listener);
        let mut fed = Hands { stream: BufReader::new(socket) };
        loop {
            let command = fed.read().unwrap();
            let answer: &[u8] = match command[0].as_slice() {
                b"PSYNC" | b"SYNC" => break,
                b"PING" => b"+PONG\r\n",
                _ => b"+OK\r\n",
            };
            fed.stream.get_mut().write_all(answer).unwrap();
        }
        let begin = format!("+FULLRESYNC {} 0\r\n$1000000\r\n", "a".repeat(40));
        fed.stream.get_mut().write_all(begin.as_bytes()).unwrap();
        wait_until("the target takes the image", || {
            target.hands().say("INFO replication").contains("master_sync_in_progress:1")
        });
        let error = fails(trial::restore(&target.open().unwrap(), &tree, RestoreMode::InPlace, None));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Conflict, true), "{name}: {error}");
        assert!(target.hands().say("INFO replication").contains("master_sync_in_progress:1"), "{name}");
    }
}

#[test]
fn a_restore_that_was_killed_after_the_feeding_or_key_by_key_is_no_old_content() {
    for (name, program) in programs("a_restore_that_was_killed_after_the_feeding_or_key_by_key_is_no_old_content") {
        let source = Server::start(&program, &[]);
        source.hands().say("DEBUG POPULATE 100000 key 10");
        trial::run(source.open().unwrap().stamp(&Context::default(), &stamp())).unwrap();
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let mut image = tree.files()["dump.rdb"].clone();
        let end = image.len() - 3;
        image[end] ^= 0x40;
        let damaged = tree.clone().with_file(&[b"dump.rdb"], image);
        for by in ["master", "keys"] {
            let note = format!("{name} by {by}");
            // Writing the content to its disk takes ten seconds. Valkey makes its append-only file of the image.
            let (shown, slow): (_, &[&str]) = match name {
                "redis" => ("aof_rewrite_in_progress:1", &["--appendonly", "yes", "--rdb-key-save-delay", "100"]),
                _ => ("rdb_bgsave_in_progress:1", &["--save", "3600 1000000", "--rdb-key-save-delay", "100"]),
            };
            let target = Server::start(&program, if by == "master" { slow } else { &[] });
            let mut hands = target.hands();
            hands.say("SET old content");
            hands.say("CONFIG SET masteruser app");
            let mut child = restoring(&source, &target, by);
            wait_until("the restore is midway", || match by {
                "master" => {
                    let info = hands.say("INFO");
                    info.contains("role:master") && info.contains(shown) && info.contains("keys=10000")
                }
                _ => hands.say("EXISTS old") == "0" && hands.say("DBSIZE") != "0",
            });
            if by == "master" {
                wait_until("the stamp is gone", || hands.say("EXISTS stillpoint:stamp") == "0");
                assert!(hands.say("INFO persistence").contains(shown), "{note}");
            }
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(hands.say("EXISTS old"), "0", "{note}");
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            let driver = open(settings, target.folder.path()).unwrap();
            let again = |tree: &MemoryTree, restore: &str| {
                let request = RestoreRequest { mode: RestoreMode::InPlace, part: None, restore: restore.to_owned() };
                trial::run(driver.restore(&Context::default(), tree, &request))
            };
            hands.say("CONFIG SET rdb-key-save-delay 0");
            let error = fails(again(&damaged, "r1-try2"));
            assert_eq!(error.kind(), Kind::Corrupt, "{note}: {error}");
            assert_eq!((hands.say("GET old"), hands.say("DBSIZE")), ("content".to_owned(), "1".to_owned()), "{note}");
            assert_eq!(hands.say("CONFIG GET masteruser"), "masteruser app", "{note}");
            let kept =
                || std::fs::read_dir(target.folder.path().join("kept")).unwrap().map(|entry| entry.unwrap().path());
            assert!(kept().all(|path| path.extension().is_some_and(|ending| ending == "rdb")), "{note}");
            hands.say("SET old newer");
            again(&tree, "r1-try3").unwrap();
            assert_eq!(hands.say("DBSIZE"), "100000", "{note}");
            assert_eq!(hands.say("CONFIG GET masteruser"), "masteruser app", "{note}");
        }
    }
}

#[test]
fn a_target_that_takes_no_note_is_restored_key_by_key() {
    for (name, program) in programs("a_target_that_takes_no_note_is_restored_key_by_key") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let target = Server::start(&program, &[]);
        target.hands().say("ACL SETUSER backup on >pw ~* &* +@all -config|set");
        let mut settings = target.settings();
        settings["user"] = json!("backup");
        settings["password"] = json!("pw");
        let auto = open(settings.clone(), target.folder.path()).unwrap();
        settings["restoreBy"] = json!("master");
        let master = open(settings, target.folder.path()).unwrap();
        let error = fails(trial::restore(&master, &tree, RestoreMode::Fresh, None));
        assert!(error.kind() == Kind::Unsupported && error.message().contains("masteruser"), "{name}: {error}");
        trial::restore(&auto, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(target.hands().say("GET a"), "1", "{name}");
    }
}

#[test]
fn users_that_came_back_are_there_after_a_restart_or_named() {
    for (name, program) in programs("users_that_came_back_are_there_after_a_restart_or_named") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        source.hands().say("ACL SETUSER app on >pw ~app:* +get");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("users.acl");
        std::fs::write(&file, "user default on nopass ~* &* +@all\n").unwrap();
        for extra in [vec!["--aclfile", file.to_str().unwrap()], Vec::new()] {
            let target = Server::start(&program, &extra);
            let mut settings = target.settings();
            settings["acl"] = json!(true);
            let driver = open(settings, target.folder.path()).unwrap();
            let restored = trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
            let is_named = restored.losses.iter().any(|loss| loss.what.contains("ACL users"));
            assert_eq!(is_named, extra.is_empty(), "{name}: {restored:?}");
        }
        assert!(std::fs::read_to_string(&file).unwrap().contains("user app on"), "{name}");
    }
}

#[test]
fn a_target_is_let_go_of_though_our_connection_to_it_broke() {
    for (name, program) in programs("a_target_is_let_go_of_though_our_connection_to_it_broke") {
        let source = Server::start(&program, &[]);
        source.hands().say("DEBUG POPULATE 4000 key 100");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let slow = ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "4096"];
        let target = Server::start(&program, &slow);
        target.hands().say("SET old content");
        target.hands().say("CONFIG SET masterauth s3cret");
        let driver = target.open().unwrap();
        let error = std::thread::scope(|scope| {
            let running = scope.spawn(|| fails(trial::restore(&driver, &tree, RestoreMode::InPlace, None)));
            wait_until("the target loads", || {
                let info = target.hands().say("INFO persistence");
                info.contains("loading:1")
            });
            target.hands().say("CLIENT KILL TYPE normal");
            running.join().unwrap()
        });
        assert_eq!(error.kind(), Kind::Unreachable, "{name}: {error}");
        assert!(!error.message().contains("could not"), "{name}: {error}");
        let mut seen = target.hands();
        assert!(seen.say("INFO replication").contains("role:master"), "{name}");
        assert_eq!(seen.say("CONFIG GET masterauth"), "masterauth s3cret", "{name}");
        assert_eq!(seen.say("GET old"), "content", "{name}");
        assert_eq!(seen.say("DBSIZE"), "1", "{name}");
    }
}

#[test]
fn values_of_modules_are_fed_to_no_server_that_may_lack_the_module() {
    for (name, program) in programs("values_of_modules_are_fed_to_no_server_that_may_lack_the_module") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        source.hands().say("ACL SETUSER backup on >pw +psync +replconf +ping +info");
        let mut settings = source.settings();
        settings["user"] = json!("backup");
        settings["password"] = json!("pw");
        let driver = open(settings, &source.folder.path().join("scratch")).unwrap();
        let (tree, _) = trial::back_up(&driver, None);
        // The same point, as a server with a module would have given it.
        let mut image = tree.files()["dump.rdb"].clone();
        let end = image.iter().rposition(|byte| *byte == 0xff).filter(|at| *at == image.len() - 9);
        image.truncate(end.unwrap());
        image.extend(b"\x07\x08timeline\x81");
        image.extend(module_id("TSDB-TYPE", 7).to_be_bytes());
        image.extend(b"\x02\x05\x00\xff");
        let checksum = super::rdb::CRC.checksum(&image);
        image.extend(checksum.to_le_bytes());
        let mut facts: Value = serde_json::from_slice(&tree.files()["store.json"]).unwrap();
        assert!(facts["servers"][0]["server"].get("modules").is_none(), "{name}: {facts}");
        facts["servers"][0]["image_bytes"] = json!(image.len());
        facts["servers"][0]["module_types"] = json!(["TSDB-TYPE"]);
        let tree = tree.with_file(&[b"dump.rdb"], image);
        let tree = tree.with_file(&[b"store.json"], serde_json::to_vec(&facts).unwrap());
        let mut target = Server::start(&program, &[]);
        target.hands().say("SET old content");
        target.hands().say("ACL SETUSER blind on >pw ~* &* +@all -module");
        for (user, by, word) in [
            (None, "master", "TSDB-TYPE"),
            // Valkey has a module of its own, so that it cannot be told which types it knows.
            (None, "auto", if name == "valkey" { "timeline" } else { "TSDB-TYPE" }),
            (Some("blind"), "master", "not known"),
            (Some("blind"), "auto", "timeline"),
        ] {
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            if let Some(user) = user {
                settings["user"] = json!(user);
                settings["password"] = json!("pw");
            }
            let driver = open(settings, target.folder.path()).unwrap();
            let error = fails(trial::restore(&driver, &tree, RestoreMode::InPlace, None));
            assert!(format!("{error}").contains(word), "{name} {user:?} {by}: {error}");
            assert!(target.child.try_wait().unwrap().is_none(), "{name} {user:?} {by}: {}", target.log());
            assert_eq!(target.hands().say("GET old"), "content", "{name} {user:?} {by}");
        }
    }
}

/// The number of a module's type, as servers make it of its name and version.
fn module_id(name: &str, version: u64) -> u64 {
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    name.chars().fold(0, |id, letter| id << 6 | letters.find(letter).unwrap() as u64) << 10 | version
}

#[test]
fn types_of_modules_are_named_as_an_image_passes() {
    let image = [
        &b"REDIS0011\xf7\x81"[..],
        &module_id("scdtype00", 1).to_be_bytes(),
        b"\x02\x01\x02\x05\x00\xfe\x00\x07\x01k\x81",
        &module_id("ReJSON-RL", 3).to_be_bytes(),
        b"\x05\x01x\x00\xff\0\0\0\0\0\0\0\0",
    ]
    .concat();
    let mut walker = super::rdb::Walker::new(&image[..]).unwrap();
    while let item = walker.next().unwrap()
        && item != super::rdb::Item::End
    {
        if let super::rdb::Item::Key(key) = item {
            walker.skip_value(key.kind).unwrap();
        }
    }
    let types: Vec<String> = walker.modules.iter().map(|id| super::rdb::module_type(*id)).collect();
    assert_eq!(types, ["ReJSON-RL", "scdtype00"]);
}

#[test]
fn a_target_that_saves_to_its_disk_has_the_content_there_when_the_restore_is_done() {
    for (name, program) in programs("a_target_that_saves_to_its_disk_has_the_content_there_when_the_restore_is_done") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        for by in ["master", "keys"] {
            let mut target = Server::start(&program, &["--save", "3600 100000"]);
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            trial::restore(&open(settings, target.folder.path()).unwrap(), &tree, RestoreMode::Fresh, None).unwrap();
            target.child.kill().unwrap();
            target.child.wait().unwrap();
            let folder = std::mem::replace(&mut target.folder, tempfile::tempdir().unwrap());
            let again = Server::start_in(&program, folder, free_port(), &[]);
            assert_eq!(again.hands().digest(), source.hands().digest(), "{name} by {by}");
        }
    }
}

#[test]
fn users_are_kept_and_come_back_after_a_failure() {
    for (name, program) in programs("users_are_kept_and_come_back_after_a_failure") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        source.hands().say("ACL SETUSER app on >new ~app:* +get");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let lines = String::from_utf8(tree.files()["acl.txt"].clone()).unwrap();
        let refused = format!("{lines}user fresh on ~* +get\nuser zz on ~* +nosuchcommand\n");
        let refused = tree.clone().with_file(&[b"acl.txt"], refused.into_bytes());
        for by in ["master", "keys"] {
            let target = Server::start(&program, &[]);
            target.hands().say("ACL SETUSER app on >old ~* +@all");
            target.hands().say("ACL SETUSER theirs on >pw ~their:* (~other +get) +set");
            // Rules that were set anew are shown with this default spelled out.
            let users = || target.hands().say("ACL LIST").replace(" sanitize-payload", "");
            let before = users();
            let mut settings = target.settings();
            settings["restoreBy"] = json!(by);
            settings["acl"] = json!(true);
            let driver = open(settings, target.folder.path()).unwrap();
            let error = fails(trial::restore(&driver, &refused, RestoreMode::Fresh, None));
            assert!(format!("{error}").contains("nosuchcommand"), "{name} by {by}: {error}");
            assert_eq!(users(), before, "{name} by {by}");
            assert_eq!(target.hands().say("DBSIZE"), "0", "{name} by {by}");
            let restored = trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
            let now = target.hands().say("ACL LIST");
            assert!(now.contains("~app:*") && now.contains("user theirs"), "{name} by {by}: {now}");
            let [kept] = restored.kept_old.as_slice() else { panic!("{name} by {by}: {restored:?}") };
            assert!(std::fs::read_to_string(kept).unwrap().contains("user app on"), "{name} by {by}");
        }
    }
}

#[test]
fn the_printed_policy_is_enough_for_a_point_and_for_the_way_back() {
    for (name, program) in programs("the_printed_policy_is_enough_for_a_point_and_for_the_way_back") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let target = Server::start(&program, &[]);
        let settings = |server: &Server| {
            let mut settings = server.settings();
            settings["user"] = json!("backup");
            settings["password"] = json!("pw");
            settings["restoreBy"] = json!("master");
            settings["acl"] = json!(true);
            settings
        };
        let policy = (REGISTRATION.policy)(&serde_json::from_value(settings(&source)).unwrap()).unwrap().unwrap();
        let policy = policy.replace("<password>", "pw");
        let lines: Vec<&str> = policy.lines().filter(|line| !line.starts_with('#')).collect();
        let [least, papers, stamps, restores] = lines.as_slice() else { panic!("{policy}") };
        source.hands().say(least);
        let opened = open(settings(&source), &source.folder.path().join("scratch")).unwrap();
        let (bare, _) = trial::back_up(&opened, None);
        assert!(!bare.files().contains_key("acl.txt"), "{name}");
        source.hands().say(papers);
        let probe = trial::run(opened.probe(&Context::default())).unwrap();
        assert_eq!((probe.missing_privileges.len(), probe.warnings.len()), (0, 0), "{name}: {probe:?}");
        source.hands().say("ACL SETUSER app on >pw ~app:* +get");
        let (tree, _) = trial::back_up(&opened, None);
        assert!(tree.files().contains_key("acl.txt") && tree.files().contains_key("config.txt"), "{name}");
        source.hands().say(stamps);
        assert_eq!(trial::run(opened.read_stamp(&Context::default())).unwrap(), None, "{name}");
        assert_eq!(trial::differences(&opened, &tree), Vec::<String>::new(), "{name}");

        target.hands().say(restores);
        let into = open(settings(&target), target.folder.path()).unwrap();
        trial::restore(&into, &tree, RestoreMode::Fresh, None).unwrap();
        assert_eq!(target.hands().digest(), source.hands().digest(), "{name}");
        assert!(target.hands().say("ACL LIST").contains("user app"), "{name}");
        trial::run(into.stamp(&Context::default(), &stamp())).unwrap();
        trial::restore(&into, &tree, RestoreMode::InPlace, None).unwrap();
        assert_eq!(trial::differences(&into, &tree), Vec::<String>::new(), "{name}");
        let mut image = tree.files()["dump.rdb"].clone();
        let middle = image.len() / 2;
        image[middle] ^= 0x40;
        let damaged = tree.with_file(&[b"dump.rdb"], image);
        let error = fails(trial::restore(&into, &damaged, RestoreMode::InPlace, None));
        assert!(!error.message().contains("could not be put back"), "{name}: {error}");
    }
}

#[test]
fn what_is_replaced_is_kept_in_a_place_that_stays() {
    for (name, program) in programs("what_is_replaced_is_kept_in_a_place_that_stays") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let target = Server::start(&program, &[]);
        target.hands().say("SET old content");
        let home = tempfile::tempdir().unwrap();
        let driver = open(json!({ "url": format!("redis://127.0.0.1:{}", target.port) }), home.path()).unwrap();
        let restored = trial::restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
        let kept = Path::new(&restored.kept_old[0]);
        assert_eq!(kept.parent(), Some(&*home.path().join("kept")), "{name}: {restored:?}");
    }
}

#[test]
fn a_sentinel_is_told_from_a_server_and_its_master_is_left_alone() {
    for (name, program) in programs("a_sentinel_is_told_from_a_server_and_its_master_is_left_alone") {
        let master = Server::start(&program, &[]);
        let (tree, _) = {
            master.hands().say("SET a 1");
            trial::back_up(&master.open().unwrap(), None)
        };
        let folder = tempfile::tempdir().unwrap();
        let (conf, port) = (folder.path().join("sentinel.conf"), free_port());
        std::fs::write(
            &conf,
            format!("port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\n", master.port),
        )
        .unwrap();
        let mut child = Command::new(&program).arg(&conf).arg("--sentinel").stdout(Stdio::null()).spawn().unwrap();
        wait_until("the Sentinel watches", || {
            Hands::try_new(port).is_ok() && master.hands().say("CLIENT LIST").contains("name=sentinel-")
        });
        let scratch = tempfile::tempdir().unwrap();
        let sentinel = open(json!({ "url": format!("redis://127.0.0.1:{port}") }), scratch.path()).unwrap();
        let error = fails(trial::run(sentinel.probe(&Context::default())));
        let refused = trial::restore(&master.open().unwrap(), &tree, RestoreMode::InPlace, None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(error.message().contains("is a Sentinel"), "{name}: {error}");
        assert!(
            error.hint_text().unwrap().contains(&format!("redis://127.0.0.1:{}", master.port)),
            "{name}: {error:?}"
        );
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), Kind::Conflict, "{name}: {refused}");
        assert!(refused.hint_text().unwrap().contains("SENTINEL REMOVE"), "{name}");
    }
}

#[test]
fn users_come_back_when_asked_and_commands_are_carried_out() {
    for (name, program) in programs("users_come_back_when_asked_and_commands_are_carried_out") {
        let source = Server::start(&program, &[]);
        source.hands().say("SET a 1");
        source.hands().say("ACL SETUSER app on >pw ~app:* +get");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let target = Server::start(&program, &[]);
        let mut settings = target.settings();
        trial::restore(&target.open().unwrap(), &tree, RestoreMode::Fresh, None).unwrap();
        assert!(!target.hands().say("ACL LIST").contains("user app"), "{name}");
        settings["acl"] = json!(true);
        let driver = open(settings, target.folder.path()).unwrap();
        trial::restore(&driver, &tree, RestoreMode::InPlace, None).unwrap();
        let users = |server: &Server| {
            server.hands().run(&[b"ACL", b"LIST"]).into_iter().find(|line| line.starts_with(b"user app"))
        };
        assert!(users(&target).is_some(), "{name}");
        assert_eq!(users(&target), users(&source), "{name}");
        trial::run(driver.execute(&Context::default(), "CLIENT PAUSE 400 WRITE")).unwrap();
        let begun = Instant::now();
        target.hands().say("SET a 2");
        assert!(begun.elapsed() > Duration::from_millis(200), "{name}");
        trial::run(driver.execute(&Context::default(), "CLIENT UNPAUSE")).unwrap();
        assert_eq!(fails(trial::run(driver.execute(&Context::default(), " "))).kind(), Kind::Config);
        assert!(trial::run(driver.execute(&Context::default(), "NO SUCH")).is_err(), "{name}");
    }
}

#[test]
fn a_target_with_an_append_only_file_starts_again_with_the_restored_content() {
    for (name, program) in programs("a_target_with_an_append_only_file_starts_again_with_the_restored_content") {
        let source = Server::start(&program, &[]);
        fill(&mut source.hands());
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        let mut target = Server::start(&program, &["--appendonly", "yes"]);
        trial::restore(&target.open().unwrap(), &tree, RestoreMode::Fresh, None).unwrap();
        let digest = target.hands().digest();
        assert_eq!(digest, source.hands().digest(), "{name}");
        target.child.kill().unwrap();
        target.child.wait().unwrap();
        let folder = std::mem::replace(&mut target.folder, tempfile::tempdir().unwrap());
        let again = Server::start_in(&program, folder, free_port(), &["--appendonly", "yes"]);
        assert_eq!(again.hands().digest(), digest, "{name}");
    }
}

#[test]
fn what_the_other_family_wrote_is_refused_before_anything_changes() {
    let programs = programs("what_the_other_family_wrote_is_refused_before_anything_changes");
    let [(_, redis), (_, valkey)] = programs.as_slice() else { return };
    let source = Server::start(valkey, &[]);
    source.hands().say("SET a 1");
    let (tree, _) = trial::back_up(&source.open().unwrap(), None);
    let target = Server::start(redis, &[]);
    target.hands().say("SET old content");
    let error = fails(trial::restore(&target.open().unwrap(), &tree, RestoreMode::InPlace, None));
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert_eq!(target.hands().say("GET old"), "content");
    // The other way round works: Valkey reads what Redis 7.0 wrote.
    let source = Server::start(redis, &[]);
    fill(&mut source.hands());
    let (tree, _) = trial::back_up(&source.open().unwrap(), None);
    let target = Server::start(valkey, &[]);
    let driver = target.open().unwrap();
    trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
    assert_eq!(trial::differences(&driver, &tree), Vec::<String>::new());
    assert_eq!(target.hands().digest(), source.hands().digest());
}

/// A certificate for this machine, signed by an authority of the test's own.
fn certificates(folder: &Path) -> bool {
    let script = "openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca \
        && openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server \
        && printf 'subjectAltName=IP:127.0.0.1' > ext && openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key \
        -CAcreateserial -days 2 -extfile ext -out server.pem";
    let made = Command::new("sh").args(["-c", script]).current_dir(folder).stderr(Stdio::null()).status();
    made.is_ok_and(|status| status.success())
}

#[test]
fn encrypted_servers_are_backed_up_and_restored() {
    let test = "encrypted_servers_are_backed_up_and_restored";
    for (name, program) in programs(test).into_iter().filter(|(name, _)| *name == "redis") {
        let keys = tempfile::tempdir().unwrap();
        if !certificates(keys.path()) {
            return skip(test, "openssl is not installed");
        }
        let at = |file: &str| keys.path().join(file).to_str().unwrap().to_owned();
        let tls_port = free_port().to_string();
        let start = |port: &str, replication: &str| {
            Server::start(
                &program,
                &[
                    "--tls-port",
                    port,
                    "--tls-cert-file",
                    &at("server.pem"),
                    "--tls-key-file",
                    &at("server.key"),
                    "--tls-ca-cert-file",
                    &at("ca.pem"),
                    "--tls-auth-clients",
                    "no",
                    "--tls-replication",
                    replication,
                ],
            )
        };
        let open_at = |port: &str, ca: &str| {
            open(json!({ "url": format!("rediss://127.0.0.1:{port}"), "ca": at(ca) }), keys.path()).unwrap()
        };
        let source = start(&tls_port, "no");
        fill(&mut source.hands());
        let (tree, _) = trial::back_up(&open_at(&tls_port, "ca.pem"), None);
        for replication in ["no", "yes"] {
            let port = free_port().to_string();
            let target = start(&port, replication);
            let settings = json!({
                "url": format!("rediss://127.0.0.1:{port}"), "ca": at("ca.pem"), "restoreBy": "master"
            });
            let in_the_clear = open(settings, keys.path()).unwrap();
            let error = fails(trial::restore(&in_the_clear, &tree, RestoreMode::Fresh, None));
            assert_eq!(error.kind(), Kind::Unsupported, "{name} {replication}: {error}");
            let driver = open_at(&port, "ca.pem");
            trial::restore(&driver, &tree, RestoreMode::Fresh, None).unwrap();
            assert_eq!(target.hands().digest(), source.hands().digest(), "{name} {replication}");
        }
        let untrusted = tempfile::tempdir().unwrap();
        assert!(certificates(untrusted.path()));
        std::fs::copy(untrusted.path().join("ca.pem"), keys.path().join("other.pem")).unwrap();
        let error = fails(trial::run(open_at(&tls_port, "other.pem").prepare(&Context::default())));
        assert_eq!(error.kind(), Kind::Unreachable, "{name}: {error}");
        assert!(error.message().contains("TLS"), "{name}: {error}");
    }
}

#[test]
fn only_a_command_without_keys_touches_nothing() {
    for (name, program) in programs("only_a_command_without_keys_touches_nothing") {
        let server = Server::start(&program, &[]);
        server.hands().say("ACL SETUSER asks on >pw +@all -command|getkeys");
        let touched = |user: Option<&str>, line: &str| {
            let mut settings = server.settings();
            if let Some(user) = user {
                settings["user"] = json!(user);
            }
            let settings: super::Settings = serde_json::from_value(settings).unwrap();
            let access = super::client::Access::new(&settings, user.map(|_| "pw".to_owned())).unwrap();
            let mut connection = super::client::Connection::open(&access, &settings.endpoint().unwrap()).unwrap();
            let table = super::commands::Table::read(&mut connection).unwrap();
            let arguments = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
            table.touched(&super::wire::Command { arguments, wire_bytes: 0 }, &mut connection)
        };
        let store = "SORT list STORE sorted";
        assert_eq!(touched(None, store).unwrap(), super::commands::Touched::Keys(vec![1, 3]), "{name}");
        assert_eq!(fails(touched(Some("asks"), store)).kind(), Kind::PermissionDenied, "{name}");
        assert!(touched(None, "ZUNIONSTORE out x a").is_err(), "{name}");
    }
}

#[test]
fn settings_that_cannot_be_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    for (settings, word) in [
        (json!({}), "not named"),
        (json!({ "url": "redis://h", "directory": "/d" }), "both"),
        (json!({ "directory": "d" }), "absolute"),
        (json!({ "url": "http://h" }), "scheme"),
        (json!({ "url": "redis://user:pw@h" }), "password"),
        (json!({ "url": "redis://h/3" }), "one database"),
        (json!({ "url": "redis://h", "certificate": "/c" }), "go together"),
        (json!({ "url": "redis://h", "timeoutSeconds": 0 }), "out of range"),
        (json!({ "url": "redis://h", "colour": 1 }), "colour"),
        (json!({ "url": "redis://h", "mode": "fast" }), "fast"),
    ] {
        let error = open(settings.clone(), scratch.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{settings}");
        assert!(error.to_string().contains(word), "{settings}: {error}");
    }
}

proptest::proptest! {
    #[test]
    fn foreign_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400), kind in 0_u8..30) {
        let image = [&b"REDIS0011\xfe\x00"[..], &[kind], b"\x01k", &bytes].concat();
        super::count_keys(&image[..]).ok();
        super::count_keys(&[b"VALKEY080", &image[9..]].concat()[..]).ok();
        super::count_commands(&bytes[..]).ok();
        super::is_reply(&bytes);
        for entries in [super::packed::listpack, super::packed::ziplist, super::packed::intset] {
            entries(&bytes, &mut |_| Ok(())).ok();
        }
        super::packed::inflate(&bytes, 1000).ok();
    }
}

#[test]
fn replies_and_commands_are_read_as_they_are_written() {
    let words: [&[u8]; 3] = [b"SET", b"a\r\n\0", b""];
    let bytes = super::wire::encode(&words);
    let command = super::wire::read_command(&mut &bytes[..], u64::MAX).unwrap().unwrap();
    assert_eq!(command.arguments, words);
    assert_eq!(command.wire_bytes, bytes.len() as u64);
    let short = super::wire::read_command(&mut &bytes[..], 2).unwrap().unwrap();
    assert_eq!((short.arguments[0].as_slice(), short.wire_bytes), (&b"SE"[..], bytes.len() as u64));
    assert!(super::is_reply(b"*2\r\n$3\r\nabc\r\n:-5\r\n"));
    assert!(super::is_reply(b"$-1\r\n"));
    for wrong in [&b"$5\r\nabc\r\n"[..], b"*99999999999\r\n", b"$-2\r\n", b"", b"?x\r\n", b"$3\r\nabcd\r\n", b":x\r\n"]
    {
        assert!(!super::is_reply(wrong), "{}", wrong.escape_ascii());
    }
    let deep = b"*1\r\n".repeat(100);
    assert!(!super::is_reply(&deep));
}

#[test]
fn a_target_that_dies_or_a_restore_that_is_stopped_midway_is_an_error() {
    for (name, program) in programs("a_target_that_dies_or_a_restore_that_is_stopped_midway_is_an_error") {
        let source = Server::start(&program, &[]);
        source.hands().say("DEBUG POPULATE 20000 key 1000");
        let (tree, _) = trial::back_up(&source.open().unwrap(), None);
        // Half a millisecond a key: loading takes ten seconds.
        let slow = ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "4096"];
        let restore = |target: &Server, context: &Context| {
            let request = RestoreRequest { mode: RestoreMode::Fresh, part: None, restore: "r1".to_owned() };
            trial::run(target.open().unwrap().restore(context, &tree, &request))
        };
        let context = Context::default();
        let target = Server::start(&program, &slow);
        let begun = Instant::now();
        let outcome = std::thread::scope(|scope| {
            let running = scope.spawn(|| restore(&target, &context));
            std::thread::sleep(Duration::from_millis(1500));
            context.cancel();
            running.join().unwrap()
        });
        assert_eq!(fails(outcome).kind(), Kind::Cancelled, "{name}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{name}: {:?}", begun.elapsed());
        assert!(target.hands().say("INFO replication").contains("role:master"), "{name}");
        assert_eq!(target.hands().say("DBSIZE"), "0", "{name}");
        assert_eq!(target.hands().say("CONFIG GET masterauth"), "masterauth ", "{name}");
        assert_eq!(target.hands().say("CONFIG GET repl-diskless-load"), "repl-diskless-load disabled", "{name}");

        let target = Server::start(&program, &slow);
        let context = Context::default();
        let outcome = std::thread::scope(|scope| {
            let running = scope.spawn(|| restore(&target, &context));
            std::thread::sleep(Duration::from_millis(1500));
            signal(&target, "-KILL");
            running.join().unwrap()
        });
        let error = fails(outcome);
        assert_eq!(error.kind(), Kind::Unreachable, "{name}: {error}");
        assert!(error.message().contains("could not be put back"), "{name}: {error}");
    }
}
