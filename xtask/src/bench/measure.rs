//! Times one process from outside: wall clock and peak resident memory.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What one run of a process took.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Wall-clock seconds from spawn to exit.
    pub seconds: f64,
    /// Peak resident memory in MB (10⁶ bytes), as the kernel's high-water mark said when last seen.
    pub peak_mb: f64,
}

/// How often the high-water mark is read.
const POLL: Duration = Duration::from_millis(2);

/// Runs `command` to its end; a non-zero exit is an error with the end of what it printed.
pub fn run(command: &mut Command) -> Result<Run, String> {
    let shown = format!("{command:?}");
    let log = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    let output = log.reopen().map_err(|error| error.to_string())?;
    let errors = output.try_clone().map_err(|error| error.to_string())?;
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|error| format!("{shown}: {error}"))?;
    let status_path = format!("/proc/{}/status", child.id());
    let mut peak_kib = 0_u64;
    let status = loop {
        if let Ok(text) = std::fs::read_to_string(&status_path) {
            let line = text.lines().find(|line| line.starts_with("VmHWM:"));
            let value = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
            peak_kib = peak_kib.max(value.unwrap_or(0));
        }
        match child.try_wait().map_err(|error| format!("{shown}: {error}"))? {
            Some(status) => break status,
            None => std::thread::sleep(POLL),
        }
    };
    let seconds = begin.elapsed().as_secs_f64();
    if !status.success() {
        let text = std::fs::read_to_string(log.path()).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(12).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        return Err(format!("{shown}: {status}\n{}", tail.join("\n")));
    }
    Ok(Run { seconds, peak_mb: peak_kib as f64 * 1024.0 / 1e6 })
}

/// The middle value; the mean of the two middle ones for an even count. 0 for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_takes_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_failing_process_is_an_error_with_its_output() {
        let error = run(Command::new("sh").args(["-c", "echo broken; exit 3"])).expect_err("exit 3");
        assert!(error.contains("broken"), "{error}");
    }
}
