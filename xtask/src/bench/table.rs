//! The rows of a bench: `{"case","metric","ours","peer","peer_name","ratio","goal","met"}`.

use std::path::Path;

use serde::Serialize;

/// One comparison. Times in seconds, sizes in MB (10⁶ bytes).
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was done, e.g. `first backup`.
    pub case: String,
    /// What was measured: `seconds`, `stored_mb`, `new_mb`, `peak_mb`.
    pub metric: String,
    /// Our median.
    pub ours: f64,
    /// The peer's median; absent where a goal is absolute.
    pub peer: Option<f64>,
    /// The peer with its version.
    pub peer_name: String,
    /// ours / peer.
    pub ratio: Option<f64>,
    /// The ratio, or for absolute goals the value, that must not be exceeded.
    pub goal: Option<f64>,
    /// Whether the goal is met.
    pub met: Option<bool>,
}

impl Row {
    /// A comparison with a peer; `goal` bounds the ratio.
    pub fn against(case: &str, metric: &str, ours: f64, peer: (&str, f64), goal: Option<f64>) -> Self {
        let ratio = ours / peer.1;
        Self {
            case: case.to_owned(),
            metric: metric.to_owned(),
            ours,
            peer: Some(peer.1),
            peer_name: peer.0.to_owned(),
            ratio: Some(ratio),
            goal,
            met: goal.map(|goal| ratio <= goal),
        }
    }

    /// A figure without peer; `goal` bounds the figure itself.
    pub fn alone(case: &str, metric: &str, ours: f64, goal: Option<f64>) -> Self {
        Self {
            case: case.to_owned(),
            metric: metric.to_owned(),
            ours,
            peer: None,
            peer_name: String::new(),
            ratio: None,
            goal,
            met: goal.map(|goal| ours <= goal),
        }
    }
}

/// The rows as aligned text.
pub fn render(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "{:<24} {:<10} {:>9} {:>9} {:<26} {:>6} {:>7} {}",
        "case", "metric", "ours", "peer", "peer name", "ratio", "goal", "met"
    )];
    let number = |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |v| format!("{v:.digits$}"));
    for row in rows {
        lines.push(format!(
            "{:<24} {:<10} {:>9} {:>9} {:<26} {:>6} {:>7} {}",
            row.case,
            row.metric,
            number(Some(row.ours), 3),
            number(row.peer, 3),
            row.peer_name,
            number(row.ratio, 2),
            number(row.goal, 2),
            row.met.map_or("–", |met| if met { "yes" } else { "no" })
        ));
    }
    lines.join("\n")
}

/// Writes rows, one JSON object a line, after a line that names the machine.
pub fn write_json(path: &Path, rows: &[Row]) -> Result<(), String> {
    let mut text = serde_json::json!({ "machine": machine() }).to_string();
    for row in rows {
        text.push('\n');
        text.push_str(&serde_json::to_string(row).map_err(|error| error.to_string())?);
    }
    text.push('\n');
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn machine() -> serde_json::Value {
    let first = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    serde_json::json!({
        "cpu": first("/proc/cpuinfo", "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
    })
}
