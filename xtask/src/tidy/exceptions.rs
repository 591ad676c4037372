//! The named exceptions: `rule path reason`, one a line, `#` for comments.

use std::path::Path;

/// The list, and which entries were used in this run.
pub struct Exceptions {
    entries: Vec<Entry>,
}

struct Entry {
    rule: String,
    subject: String,
    used: bool,
}

const FILE: &str = "xtask/tidy-exceptions.txt";

impl Exceptions {
    /// Reads the list; an entry without a reason is refused.
    pub fn load(root: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(root.join(FILE)).map_err(|error| format!("{FILE}: {error}"))?;
        let mut entries = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.splitn(3, char::is_whitespace);
            let (Some(rule), Some(subject), Some(_reason)) = (words.next(), words.next(), words.next()) else {
                return Err(format!("{FILE}:{}: expected `rule subject reason`", index + 1));
            };
            entries.push(Entry { rule: rule.to_owned(), subject: subject.to_owned(), used: false });
        }
        Ok(Self { entries })
    }

    /// Whether `subject` is excused from `rule`; marks the entry as used.
    pub fn allows(&mut self, rule: &str, subject: &str) -> bool {
        let entry = self.entries.iter_mut().find(|entry| entry.rule == rule && entry.subject == subject);
        match entry {
            Some(entry) => {
                entry.used = true;
                true
            }
            None => false,
        }
    }

    /// Entries that nothing needed any more.
    pub fn unused(&self) -> Vec<String> {
        let unused = self.entries.iter().filter(|entry| !entry.used);
        unused.map(|entry| format!("{FILE}: `{} {}` is no longer needed", entry.rule, entry.subject)).collect()
    }
}
