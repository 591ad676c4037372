//! What a soak came to.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

/// A soak that breaks so many obligations need not go on.
pub const VIOLATIONS_MAX: usize = 20;

/// Counts over all rounds.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    /// When the soak began.
    pub begun: Instant,
    /// Platforms that were made.
    pub platforms: u64,
    /// Rounds.
    pub rounds: u64,
    /// Faults by their names.
    pub faults: BTreeMap<String, u64>,
    /// Runs that ended with a point, with an error, and by being killed.
    pub runs: BTreeMap<&'static str, u64>,
    /// Points by level.
    pub points: BTreeMap<String, u64>,
    /// Copies that were judged.
    pub restores: u64,
    /// Versions that had to be in a copy, and were looked for.
    pub expected: u64,
    /// Versions that could not be in a copy.
    pub later: u64,
    /// References followed on copies.
    pub references: u64,
    /// Objects that had been deleted before the cut, and were looked for.
    pub deleted: u64,
    /// Uploads in parts that had replaced each other before the cut.
    pub bundles: u64,
    /// Pauses of writers, and the longest, in milliseconds.
    pub pauses: u64,
    /// The longest pause as the application saw it.
    pub longest_pause_millis: f64,
    /// What was broken.
    pub violations: Vec<String>,
}

impl Report {
    /// Nothing yet.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            begun: Instant::now(),
            platforms: 0,
            rounds: 0,
            faults: BTreeMap::new(),
            runs: BTreeMap::new(),
            points: BTreeMap::new(),
            restores: 0,
            expected: 0,
            later: 0,
            references: 0,
            deleted: 0,
            bundles: 0,
            pauses: 0,
            longest_pause_millis: 0.0,
            violations: Vec::new(),
        }
    }

    /// Notes what was broken, at once on the screen.
    pub fn violation(&mut self, text: String) {
        println!("VIOLATION in round {} (seed {}): {text}", self.rounds, self.seed);
        self.violations.push(format!("round {}: {text}", self.rounds));
    }

    /// What people read at the end.
    pub fn summary(&self) -> String {
        let elapsed = self.begun.elapsed();
        let counts = |map: &mut dyn Iterator<Item = (String, u64)>| {
            map.map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(" · ")
        };
        let mut text = format!("\nsoak of {:.1} min, seed {}\n", elapsed.as_secs_f64() / 60.0, self.seed);
        let mut line = |name: &str, value: String| {
            // Writing to a text cannot fail.
            let _written = writeln!(text, "  {name:<11} {value}");
        };
        line("rounds", format!("{} on {} platforms", self.rounds, self.platforms));
        line("faults", counts(&mut self.faults.iter().map(|(name, count)| (name.clone(), *count))));
        line("runs", counts(&mut self.runs.iter().map(|(name, count)| ((*name).to_owned(), *count))));
        line("points", counts(&mut self.points.iter().map(|(name, count)| (name.clone(), *count))));
        line("pauses", format!("{}, the longest {:.0} ms", self.pauses, self.longest_pause_millis));
        line(
            "restores",
            format!(
                "{} judged · {} acknowledged versions expected and found · {} later ones rightly absent · {} references",
                self.restores, self.expected, self.later, self.references
            ),
        );
        line("objects", format!("{} deleted ones rightly absent · {} uploads in parts", self.deleted, self.bundles));
        line("violations", self.violations.len().to_string());
        for violation in &self.violations {
            line("", violation.clone());
        }
        text
    }
}
