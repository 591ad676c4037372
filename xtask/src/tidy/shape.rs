//! Files and functions stay small enough to be read in one go.

use super::Source;
use super::exceptions::Exceptions;
use super::purity::code_lines;

/// Code lines per file, tests at its end left out.
const FILE_LINES_MAX: usize = 500;
/// Lines per function, signature and braces included.
const FUNCTION_LINES_MAX: usize = 70;

/// Complains about long files, long functions, and files that do not say what they are for.
pub fn check(sources: &[Source], exceptions: &mut Exceptions) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        if !source.text.starts_with("//!") && !source.text.starts_with("#![") {
            complaints.push(format!("{}: opens without `//!`: say what it is for", source.path));
        }
        if source.is_test() {
            continue;
        }
        let text = without_tests(&source.text);
        let lines = code_lines(text).count();
        if lines > FILE_LINES_MAX && !exceptions.allows("file-length", &source.path) {
            complaints.push(format!("{}: {lines} code lines, at most {FILE_LINES_MAX}", source.path));
        }
        for function in functions(text) {
            let subject = format!("{}:{}", source.path, function.name);
            if function.lines > FUNCTION_LINES_MAX && !exceptions.allows("function-length", &subject) {
                let (number, lines) = (function.number, function.lines);
                complaints.push(format!("{subject} (line {number}): {lines} lines, at most {FUNCTION_LINES_MAX}"));
            }
        }
    }
    complaints
}

/// The text before the file's own test module.
pub fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod ").map_or(text, |end| &text[..end])
}

struct Function {
    name: String,
    number: usize,
    lines: usize,
}

/// Finds functions by the layout that rustfmt guarantees: a closing brace at the indent of `fn`.
fn functions(text: &str) -> Vec<Function> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let closing = format!("{}}}", " ".repeat(indent));
        let ends_here = |candidate: &&str| **candidate == *closing;
        if line.trim_end().ends_with(['}', ';']) {
            continue;
        }
        let Some(end) = lines[index..].iter().position(ends_here) else { continue };
        // A declaration without body ends in `;` before any brace opens.
        let declared = lines[index..=index + end].iter().take_while(|l| !l.contains('{')).any(|l| l.ends_with(';'));
        if !declared {
            found.push(Function { name, number: index + 1, lines: end + 1 });
        }
    }
    found
}

fn function_name(line: &str) -> Option<String> {
    let mut rest = line.trim_start();
    for word in ["pub(crate) ", "pub(super) ", "pub ", "const ", "async ", "unsafe "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    let rest = rest.strip_prefix("fn ")?;
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_')?;
    Some(rest[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_functions_with_bodies_only() {
        let text = "trait T {\n    fn declared(\n        a: u8,\n    );\n    fn one(&self) {}\n    pub async fn two(\n        a: u8,\n    ) {\n        a;\n    }\n}\n";
        let found: Vec<_> = functions(text).into_iter().map(|f| (f.name, f.lines)).collect();
        assert_eq!(found, vec![("two".to_owned(), 5)]);
    }
}
