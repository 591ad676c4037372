//! SQL scripts taken apart into statements, and statements into words.
//!
//! The scripts are those that PostgreSQL's own tools write (`pg_dumpall --globals-only`, statistics,
//! `setval`), but they come out of a bucket: whatever is in them, this page cuts between statements and
//! never within one. Pure; knows nothing of what the statements mean.

/// Cuts `script` at the semicolons outside of quotes, dollar quotes and comments. Comments before a
/// statement, and lines for psql (`\connect`, `\restrict`), are left out.
pub(in super::super) fn statements(script: &str) -> Vec<&str> {
    let bytes = script.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    let mut begin = None;
    while at < bytes.len() {
        match bytes[at] {
            b';' => {
                if let Some(begin) = begin.take() {
                    found.push(script[begin..at].trim_end());
                }
                at += 1;
            }
            b'\\' if begin.is_none() => at = line_end(bytes, at),
            b'-' if bytes.get(at + 1) == Some(&b'-') => at = line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => at = block_comment_end(bytes, at),
            byte if byte.is_ascii_whitespace() => at += 1,
            _ => {
                begin.get_or_insert(at);
                at = token_end(bytes, at);
            }
        }
    }
    if let Some(begin) = begin {
        found.push(script[begin..].trim_end());
    }
    found
}

/// One word of a statement: a keyword or name as written, or what was within quotes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Word {
    /// Names in lower case as the server folds them, quoted ones as they are.
    pub(in super::super) text: String,
    /// Whether it stood in single or double quotes, so that it is no keyword.
    pub(in super::super) is_quoted: bool,
}

impl Word {
    /// Whether this is the keyword, given in upper case.
    pub(in super::super) fn is(&self, keyword: &str) -> bool {
        !self.is_quoted && self.text.eq_ignore_ascii_case(keyword)
    }
}

/// The words of one statement; signs such as commas are words of one character.
pub(in super::super) fn words(statement: &str) -> Vec<Word> {
    let bytes = statement.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at].is_ascii_whitespace() {
            at += 1;
            continue;
        }
        let end = token_end(bytes, at);
        let token = &statement[at..end];
        let unquoted = |quote: char| {
            let inner = token.trim_start_matches(['E', 'e']);
            let inner = inner.strip_prefix(quote).unwrap_or(inner);
            let inner = inner.strip_suffix(quote).unwrap_or(inner);
            inner.replace(&format!("{quote}{quote}"), &quote.to_string())
        };
        found.push(match bytes[at] {
            b'"' => Word { text: unquoted('"'), is_quoted: true },
            b'\'' => Word { text: unquoted('\''), is_quoted: true },
            b'E' | b'e' if bytes.get(at + 1) == Some(&b'\'') => Word { text: unquoted('\''), is_quoted: true },
            _ => Word { text: token.to_owned(), is_quoted: false },
        });
        at = end;
    }
    found
}

/// Where the token that begins at `at` ends: a quoted text, a dollar quote, a word, or one sign.
fn token_end(bytes: &[u8], at: usize) -> usize {
    match bytes[at] {
        quote @ (b'\'' | b'"') => quoted_end(bytes, at + 1, quote, false),
        b'E' | b'e' if bytes.get(at + 1) == Some(&b'\'') => quoted_end(bytes, at + 2, b'\'', true),
        b'$' => dollar_end(bytes, at),
        byte if is_word(byte) => at + bytes[at..].iter().take_while(|&&byte| is_word(byte) || byte == b'$').count(),
        _ => at + 1,
    }
}

/// Bytes above 127 are parts of names, in whatever encoding.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn quoted_end(bytes: &[u8], mut at: usize, quote: u8, has_escapes: bool) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if has_escapes => at += 2,
            byte if byte == quote && bytes.get(at + 1) == Some(&quote) => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of `$tag$ … $tag$`, or of the lone sign.
fn dollar_end(bytes: &[u8], at: usize) -> usize {
    let tag_length = bytes[at + 1..].iter().take_while(|&&byte| is_word(byte)).count();
    let tag = match bytes.get(at + 1 + tag_length) {
        Some(b'$') => &bytes[at..at + tag_length + 2],
        _ => return at + 1,
    };
    let inner = at + tag.len();
    match bytes[inner..].windows(tag.len()).position(|window| window == tag) {
        Some(position) => inner + position + tag.len(),
        None => bytes.len(),
    }
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |position| at + position + 1)
}

/// Comments of this kind nest.
fn block_comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0;
    while at < bytes.len() {
        match &bytes[at..bytes.len().min(at + 2)] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_cut_between_statements_only() {
        let script = "--\n-- Roles; all\n--\n\n\\restrict x;y\nCREATE ROLE \"a;\"\"b\";\nCOMMENT ON ROLE a IS 'it''s; -- no comment\n\\fine';\n\
                      ALTER ROLE a SET x TO E'q\\';';  /* ; /* nested; */ */ DO $tag$ ; $$ ; $tag$; SELECT $1, a$b;; SELECT 1";
        assert_eq!(
            statements(script),
            [
                "CREATE ROLE \"a;\"\"b\"",
                "COMMENT ON ROLE a IS 'it''s; -- no comment\n\\fine'",
                "ALTER ROLE a SET x TO E'q\\';'",
                "DO $tag$ ; $$ ; $tag$",
                "SELECT $1, a$b",
                "SELECT 1",
            ]
        );
        for cut in 0..script.len() {
            // Whatever is cut off, nothing is read beyond the end.
            statements(script.get(..cut).unwrap_or_default());
        }
    }

    #[test]
    fn words_keep_what_is_quoted() {
        let found = words("GRANT \"A \"\"b\"\"\" TO c_1 WITH ADMIN OPTION GRANTED BY \"é\"");
        let text: Vec<_> = found.iter().map(|word| word.text.as_str()).collect();
        assert_eq!(text, ["GRANT", "A \"b\"", "TO", "c_1", "WITH", "ADMIN", "OPTION", "GRANTED", "BY", "é"]);
        assert!(found[0].is("grant") && !found[1].is("A \"b\""));
        assert_eq!(words("SET x TO 'it''s'")[3].text, "it's");
    }
}
