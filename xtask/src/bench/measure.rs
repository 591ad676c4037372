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

/// What runs took, by case and tool.
#[derive(Debug, Default)]
pub struct Runs(Vec<(&'static str, &'static str, Run)>);

impl Runs {
    /// Prints and keeps one run.
    pub fn note(&mut self, case: &'static str, tool: &'static str, run: Run) {
        println!("  {case:<20} {tool:<20} {:>9.3} s {:>9.1} MB", run.seconds, run.peak_mb);
        self.0.push((case, tool, run));
    }

    /// The median of a figure over all runs of this case with this tool; `None` if there was none.
    pub fn middle(&self, case: &str, tool: &str, figure: fn(&Run) -> f64) -> Option<f64> {
        let of_both = self.0.iter().filter(|(c, t, _)| *c == case && *t == tool);
        let values: Vec<f64> = of_both.map(|(_, _, run)| figure(run)).collect();
        (!values.is_empty()).then(|| median(&values))
    }
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
    fn medians_are_of_one_case_and_one_tool() {
        let mut runs = Runs::default();
        for (case, tool, seconds) in [("a", "x", 1.0), ("a", "x", 3.0), ("a", "y", 9.0), ("b", "x", 7.0)] {
            runs.note(case, tool, Run { seconds, peak_mb: 1.0 });
        }
        assert_eq!(runs.middle("a", "x", |run| run.seconds), Some(2.0));
        assert_eq!(runs.middle("b", "y", |run| run.seconds), None);
    }

    #[test]
    fn a_failing_process_is_an_error_with_its_output() {
        let error = run(Command::new("sh").args(["-c", "echo broken; exit 3"])).expect_err("exit 3");
        assert!(error.contains("broken"), "{error}");
    }
}
