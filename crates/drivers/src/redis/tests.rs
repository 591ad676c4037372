//! The conformance suite on real servers, and what only this kind of store can get wrong.
//!
//! Every test starts its own servers, with the programs that the rigs name, and stops them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stillpoint_core::Result;
use stillpoint_core::driver::{Driver, EdgeQuery, RestoreMode};
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
        assert!(!answer.first().is_some_and(|word| word.starts_with(b"-")), "{:?}", String::from_utf8_lossy(&answer[0]));
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
        vec![("absent_store_fails", "a target is an empty server, which is there; a server that is not is tested apart")]
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
        seen.push(lines.lines().map(|line| line.split(",avg_ttl").next().unwrap_or(line)).collect::<Vec<_>>().join("\n"));
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
