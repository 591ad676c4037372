//! Starts and stops a rig's server.
//!
//! State of a running rig: `run/<name>/` in the cache, with the process's number and start time
//! (so that a number used again is never mistaken for it), what tests are given, the data and the
//! server's log. Taking it down removes the folder.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stillpoint_testkit::servers;

use super::describe::{Ready, Rig};

const READY_WITHIN: Duration = Duration::from_secs(60);
const STOPPED_WITHIN: Duration = Duration::from_secs(10);

/// Starts the server unless it runs, waits until it answers, and returns what tests are given.
/// `folder` is where its state lies while it runs.
pub fn up(rig: &Rig, cache: &Path, folder: &Path) -> Result<BTreeMap<String, String>, String> {
    if process(folder).is_some() {
        let text = std::fs::read_to_string(folder.join("give.json")).map_err(|error| error.to_string())?;
        return serde_json::from_str(&text).map_err(|error| error.to_string());
    }
    down(folder)?;
    let data = folder.join("data");
    std::fs::create_dir_all(&data).map_err(|error| format!("{}: {error}", data.display()))?;
    // If someone else is faster, the server fails and says so.
    let port = servers::free_port().map_err(|error| format!("a port: {error}"))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (program, port) = (rig.program(cache), address.port().to_string());
    let fill = |text: &str| {
        let bin = program.parent().unwrap_or(cache).display().to_string();
        let text = text.replace("{binary}", &program.display().to_string()).replace("{bin}", &bin);
        let text = text.replace("{port}", &port).replace("{data}", &data.display().to_string());
        text.replace("{folder}", &folder.display().to_string())
    };
    let command = |words: &[String]| command(rig, folder, words.iter().map(|word| fill(word)).collect());
    if rig.not_root {
        servers::give_to_nobody(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    for words in &rig.prepare {
        let output = command(words)?.output().map_err(|error| format!("{}: {error}", words[0]))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            down(folder)?;
            return Err(format!("rig {} could not be prepared: {}", rig.name, said.trim()));
        }
    }
    let log = std::fs::File::create(folder.join("log")).map_err(|error| error.to_string())?;
    let errors = log.try_clone().map_err(|error| error.to_string())?;
    let mut server = command(&rig.args)?;
    server.stdin(Stdio::null()).stdout(log).stderr(errors);
    // A group of its own, so that Ctrl-C at the terminal does not reach it before `down` does.
    std::os::unix::process::CommandExt::process_group(&mut server, 0);
    let mut child = server.spawn().map_err(|error| format!("{}: {error}", rig.args[0]))?;
    let start = start_time(child.id()).unwrap_or_default();
    std::fs::write(folder.join("pid"), format!("{} {start}", child.id())).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let is_ready = || match &rig.ready {
        Ready::Path(path) => Ok(answers(address, path)),
        Ready::Command(words) => command(words)?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map(|status| status.success())
            .map_err(|error| format!("{}: {error}", words[0])),
    };
    while !is_ready()? {
        let ended = child.try_wait().map_err(|error| error.to_string())?;
        if ended.is_some() || begun.elapsed() > READY_WITHIN {
            let text = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
            down(folder)?;
            return Err(format!(
                "rig {} did not start: {}",
                rig.name,
                text.lines().last().unwrap_or("it said nothing")
            ));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let give: BTreeMap<String, String> = rig.give.iter().map(|(name, value)| (name.clone(), fill(value))).collect();
    let text = serde_json::to_string_pretty(&give).map_err(|error| error.to_string())?;
    std::fs::write(folder.join("give.json"), text).map_err(|error| error.to_string())?;
    Ok(give)
}

/// A command of the rig's, as nobody where the server refuses root.
fn command(rig: &Rig, folder: &Path, words: Vec<String>) -> Result<Command, String> {
    let (program, args) = words.split_first().ok_or("a command of the rig is empty")?;
    let mut command = match rig.not_root {
        true => servers::not_as_root(Path::new(program)),
        false => Command::new(program),
    };
    command.args(args).envs(&rig.environment).current_dir(folder);
    Ok(command)
}

/// Stops the server and removes everything it had.
pub fn down(folder: &Path) -> Result<(), String> {
    if let Some(pid) = process(folder) {
        signal(pid, "-INT");
        let begun = Instant::now();
        while process(folder).is_some() && begun.elapsed() < STOPPED_WITHIN {
            std::thread::sleep(Duration::from_millis(20));
        }
        if process(folder).is_some() {
            signal(pid, "-KILL");
        }
    }
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {error}", folder.display())),
        _ => Ok(()),
    }
}

/// The names of rigs whose server runs.
pub fn running(cache: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(cache.join("run")).into_iter().flatten().flatten();
    let alive = entries.filter(|entry| process(&entry.path()).is_some());
    alive.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Where the state of the rig `name` lies while it runs for tests.
pub fn folder(cache: &Path, name: &str) -> PathBuf {
    cache.join("run").join(name)
}

/// The server's process number, if it is still that process.
fn process(folder: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(folder.join("pid")).ok()?;
    let (pid, start) = text.trim().split_once(' ')?;
    let pid = pid.parse().ok()?;
    (start_time(pid)? == start).then_some(pid)
}

/// When the process started, in the kernel's ticks; `None` if it is gone or dead.
fn start_time(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces, so fields are counted behind it.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" { None } else { fields.nth(18).map(str::to_owned) }
}

fn signal(pid: u32, which: &str) {
    // A process that is gone already is what is wanted.
    drop(Command::new("kill").args([which, &pid.to_string()]).stderr(Stdio::null()).status());
}

fn answers(address: SocketAddr, path: &str) -> bool {
    let ask = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        stream.read(&mut [0; 16])
    };
    ask().is_ok_and(|read| read > 0)
}
