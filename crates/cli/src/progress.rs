//! How a run looks while it runs: one bar per store on a terminal, one line per phase elsewhere.
//!
//! Everything goes to standard error; standard output is for what came of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use stillpoint_core::driver::Context;
use stillpoint_core::id::StoreName;
use stillpoint_engine::progress::{Phase, Progress, StoreProgress, Update};

use crate::render;

/// Between two lines about running drains, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The word for a phase, in a column of its own.
fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Recover => "recover",
        Phase::Prepare => "prepare",
        Phase::Cut => "cut",
        Phase::Drain => "drain",
        Phase::Seal => "seal",
        Phase::Release => "release",
    }
}

fn phase_line(phase: Phase, outcome: &str, elapsed_millis: u64) -> String {
    let elapsed = render::duration(Duration::from_millis(elapsed_millis));
    format!("  {:<9} {outcome:<50} {elapsed:>9}", phase_name(phase))
}

/// Bars on a terminal.
pub struct Bars {
    screen: MultiProgress,
    stores: Mutex<BTreeMap<StoreName, ProgressBar>>,
}

impl Bars {
    /// An empty screen.
    pub fn new() -> Self {
        Self { screen: MultiProgress::new(), stores: Mutex::default() }
    }

    fn print(&self, line: &str) {
        // The terminal may be gone; the run goes on without it.
        if self.screen.println(line).is_err() {
            tracing::debug!("the terminal is gone");
        }
    }

    fn show(&self, store: &StoreProgress) {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = stores.entry(store.store.clone()).or_insert_with(|| self.screen.add(new_bar(&store.store)));
        if store.bytes_expected > 0 && bar.length() != Some(store.bytes_expected) {
            bar.set_length(store.bytes_expected);
            bar.set_style(known_style());
        }
        bar.set_position(store.bytes_done);
        bar.set_message(tail(store));
        if store.done {
            bar.set_length(store.bytes_done);
            bar.finish();
        }
    }
}

/// Rate and time left, or that it is done.
fn tail(store: &StoreProgress) -> String {
    if store.done {
        return "done".to_owned();
    }
    let rate = format!("{}/s", render::bytes(store.bytes_per_second));
    let left = store.bytes_expected.saturating_sub(store.bytes_done);
    match left.checked_div(store.bytes_per_second) {
        Some(seconds) if store.bytes_expected > 0 => {
            format!("{rate:>12}   {} left", render::duration(Duration::from_secs(seconds.max(1))))
        }
        _ => format!("{rate:>12}"),
    }
}

fn new_bar(store: &StoreName) -> ProgressBar {
    let style = ProgressStyle::with_template("            {prefix:<14} {binary_bytes:>10}  {spinner}  {msg}");
    let bar = ProgressBar::no_length().with_prefix(store.to_string());
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar
}

fn known_style() -> ProgressStyle {
    ProgressStyle::with_template("            {prefix:<14} {binary_total_bytes:>10}  {bar:10}  {percent:>3} %  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

impl Progress for Bars {
    fn update(&self, update: Update) {
        match update {
            Update::PhaseBegan { .. } => {}
            Update::PhaseEnded { phase, outcome, elapsed_millis } => {
                if phase == Phase::Drain {
                    let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
                    for bar in std::mem::take(&mut *stores).into_values() {
                        bar.finish_and_clear();
                    }
                }
                self.print(&phase_line(phase, &outcome, elapsed_millis));
            }
            Update::Stores { stores } => stores.iter().for_each(|store| self.show(store)),
            Update::Message { text } => self.print(&format!("  note      {text}")),
        }
    }
}

/// Plain lines, for logs and pipes.
pub struct Lines {
    last: Mutex<Option<Instant>>,
}

impl Lines {
    /// Nothing printed yet.
    pub fn new() -> Self {
        Self { last: Mutex::new(None) }
    }

    fn print(&self, line: &str) {
        let mut error = std::io::stderr().lock();
        // Nobody reads standard error any more; the run goes on without it.
        if writeln!(error, "{}", line.trim_end()).is_err() {
            tracing::debug!("standard error is gone");
        }
    }

    fn due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = *last.get_or_insert_with(Instant::now);
        let due = begin.elapsed() >= LINE_INTERVAL;
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

impl Progress for Lines {
    fn update(&self, update: Update) {
        match update {
            Update::PhaseBegan { .. } => {}
            Update::PhaseEnded { phase, outcome, elapsed_millis } => {
                self.print(&phase_line(phase, &outcome, elapsed_millis));
            }
            Update::Stores { stores } if self.due() => {
                for store in &stores {
                    let (done, all) = (render::bytes(store.bytes_done), render::bytes(store.bytes_expected));
                    let all = if store.bytes_expected > 0 { format!(" of {all}") } else { String::new() };
                    self.print(&format!("            {:<14} {done}{all}  {}", store.store, tail(store)));
                }
            }
            Update::Stores { .. } => {}
            Update::Message { text } => self.print(&format!("  note      {text}")),
        }
    }
}

/// Draws one bar from the counters of `context` until `done`.
pub fn follow(name: &'static str, context: &Context, done: &AtomicBool) {
    let bar = ProgressBar::no_length().with_prefix(name);
    let style = ProgressStyle::with_template("  {prefix:<9} {binary_bytes:>10}  {binary_bytes_per_sec:>14}  {spinner}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    while !done.load(Ordering::Relaxed) {
        let (bytes, _, expected) = context.progress();
        if expected > 0 && bar.length() != Some(expected) {
            bar.set_length(expected);
            let style = ProgressStyle::with_template(
                "  {prefix:<9} {binary_bytes:>10}  {bar:20}  {percent:>3} %  {binary_bytes_per_sec:>14}  {eta} left",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
        }
        bar.set_position(bytes);
        std::thread::sleep(Duration::from_millis(100));
    }
    bar.finish_and_clear();
}
