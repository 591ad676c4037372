//! A scratch platform, the program run on it, and its screens without what changes from run to run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// Rows that the scratch database holds.
pub const ROWS: u32 = 2_000;

/// A folder with a database and a configuration, and a state folder of its own.
pub struct World {
    folder: TempDir,
    /// Point ids that were seen; their text is replaced in screens.
    ids: Vec<String>,
}

/// What one call of the program left.
#[derive(Debug)]
pub struct Screen {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Screen {
    /// Both streams and the exit code, as one text.
    pub fn all(&self) -> String {
        format!("{}{}[exit {}]\n", self.out, self.err, self.code)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl World {
    /// A database, and nothing else.
    pub fn empty() -> Self {
        let folder = tempfile::Builder::new().prefix("stillpoint-it-").tempdir().expect("temp");
        let database = rusqlite::Connection::open(folder.path().join("meta.db")).expect("open");
        database
            .execute_batch(&format!(
                "PRAGMA journal_mode = wal; CREATE TABLE models (id INTEGER PRIMARY KEY, name TEXT);
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
                 INSERT INTO models SELECT i, 'model number ' || i FROM n;"
            ))
            .expect("fill");
        Self { folder, ids: Vec::new() }
    }

    /// With a configuration; no bucket yet.
    pub fn configured() -> Self {
        let world = Self::empty();
        world.write("platform.yaml", &world.platform_yaml());
        world
    }

    /// With a bucket.
    pub fn ready() -> Self {
        let world = Self::configured();
        let made = world.run(&["init"]);
        assert_eq!(made.code, 0, "{made:?}");
        world
    }

    pub fn platform_yaml(&self) -> String {
        let folder = self.path("").display().to_string();
        let folder = folder.trim_end_matches('/');
        format!(
            "apiVersion: stillpoint.dev/v1\nplatform: churn\nenvironment: production\n\
             bucket:\n  url: {folder}/bucket\n  key: file:stillpoint.key\n\
             stores:\n  meta:\n    driver: sqlite\n    path: {folder}/meta.db\n\
             retention: {{ last: 2 }}\n"
        )
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write");
    }

    /// Replaces a part of the configuration; the part must be there.
    pub fn edit(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path("platform.yaml")).expect("read");
        assert!(text.contains(from), "{from} is not in {text}");
        self.write("platform.yaml", &text.replacen(from, to, 1));
    }

    /// The program, ready to be run in the world's folder, away from this user's own settings.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.folder.path())
            .env("STILLPOINT_STATE", self.path("state"))
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Screen {
        self.run_command(self.command(arguments))
    }

    pub fn run_command(&self, mut command: Command) -> Screen {
        let output = command.output().expect("the program runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("screens are UTF-8");
        Screen { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Makes a point and returns its id.
    pub fn backup(&mut self) -> String {
        let made = self.run(&["backup", "--json"]);
        assert_eq!(made.code, 0, "{made:?}");
        let id = made.json()["statefile"]["point"].as_str().expect("an id").to_owned();
        self.ids.push(id.clone());
        id
    }

    /// Makes a point as people do, and remembers its id.
    pub fn backup_shown(&mut self) -> Screen {
        let screen = self.run(&["backup"]);
        let id = screen.out.strip_prefix("point ").and_then(|rest| rest.split(' ').next());
        self.ids.push(id.unwrap_or_else(|| panic!("no point: {screen:?}")).to_owned());
        screen
    }

    /// The screen with folder, ids, times and sizes replaced, and runs of spaces shortened.
    pub fn redact(&self, screen: &Screen) -> String {
        let mut text = screen.all().replace(&self.folder.path().display().to_string(), "[FOLDER]");
        for (number, id) in self.ids.iter().enumerate() {
            text = text.replace(id, &format!("[POINT {}]", number + 1));
            text = text.replace(&id[..6], &format!("[POI {}]", number + 1));
        }
        text.split_inclusive('\n').map(redact_line).collect()
    }
}

/// Replaces numbers with a unit behind them, dates, and long hex.
fn redact_line(line: &str) -> String {
    let ended = line.ends_with('\n');
    let indent = line.len() - line.trim_start_matches(' ').len();
    let mut words: Vec<String> = Vec::new();
    // Two spaces or more are a column's gap; they vary with what was replaced.
    for word in line.split_whitespace() {
        words.push(redact_word(word));
    }
    let mut shown: Vec<String> = Vec::new();
    for word in words {
        let unit = match word.trim_end_matches([',', ';']) {
            "ms" | "s" | "µs" | "min" | "h" => Some("[TIME]"),
            "B" | "KiB" | "MiB" | "GiB" => Some("[SIZE]"),
            _ => None,
        };
        let number = |text: &String| text.trim_start_matches(['+', '(']).parse::<f64>().is_ok();
        match unit {
            Some(replaced) if shown.last().is_some_and(number) => {
                let bracket = if shown.pop().is_some_and(|text| text.starts_with('(')) { "(" } else { "" };
                shown.push(format!("{bracket}{replaced}"));
            }
            _ => shown.push(word),
        }
    }
    for at in 1..shown.len() {
        // Coordinates of the store's own, which differ from machine to machine.
        if ["inode", "observer"].contains(&shown[at - 1].as_str()) {
            shown[at] = "[N]".to_owned();
        }
    }
    let mut text = " ".repeat(indent.min(12)) + &shown.join(" ");
    for age in ["just now", "[TIME] ago"] {
        text = text.replace(age, "[AGE]");
    }
    if ended {
        text.push('\n');
    }
    text
}

fn redact_word(word: &str) -> String {
    let date = word.len() == 10
        && word.bytes().enumerate().all(
            |(at, byte)| {
                if at == 4 || at == 7 { byte == b'-' } else { byte.is_ascii_digit() }
            },
        );
    let time = word.len() >= 8 && word.as_bytes()[2] == b':' && word.as_bytes()[5] == b':';
    let hex = word.len() >= 12 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    match (date, time, hex) {
        (true, _, _) => "[DATE]".to_owned(),
        (_, true, _) => "[CLOCK]".to_owned(),
        (_, _, true) => "[HEX]".to_owned(),
        _ => word.to_owned(),
    }
}

/// The names of all files below `folder`, sorted.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("readable").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
