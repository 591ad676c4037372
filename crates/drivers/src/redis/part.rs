//! Which keys a part of a point names. Pure: nothing here touches a store.

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::tree::TreePath;

/// Which keys are restored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Part {
    /// Of this database alone.
    pub database: Option<u32>,
    /// Those whose names begin so.
    pub prefix: Vec<u8>,
}

impl Part {
    /// Reads `databases/1`, `keys/prefix` or `databases/1/keys/prefix`. In a prefix, `/` stands for
    /// itself between names, and every byte may be written as `%2F`.
    pub fn parse(path: &TreePath) -> Result<Self> {
        let wrong = || {
            Error::new(Kind::NotFound, format!("a point of a Redis server has no part `{path}`"))
                .hint("parts are `databases/1`, `keys/session:` and `databases/1/keys/session:`")
        };
        let mut part = Self::default();
        let mut rest = path.names();
        if let [first, number, more @ ..] = rest
            && first == b"databases"
        {
            let number = std::str::from_utf8(number).ok().and_then(|text| text.parse().ok());
            part.database = Some(number.ok_or_else(wrong)?);
            rest = more;
        }
        match rest {
            [] if part.database.is_some() => Ok(part),
            [first, names @ ..] if first == b"keys" && !names.is_empty() => {
                part.prefix = unescape(&names.join(&b'/')).ok_or_else(wrong)?;
                Ok(part)
            }
            _ => Err(wrong()),
        }
    }

    /// Whether a key belongs to it.
    pub fn holds(&self, database: u32, name: &[u8]) -> bool {
        self.database.is_none_or(|only| only == database) && name.starts_with(&self.prefix)
    }
}

fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.iter();
    while let Some(&byte) = rest.next() {
        if byte == b'%' {
            let pair = [*rest.next()?, *rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_and_nothing_else_is() {
        let part = |text: &str| Part::parse(&TreePath::parse(text).unwrap());
        assert_eq!(part("databases/3").unwrap(), Part { database: Some(3), prefix: Vec::new() });
        assert_eq!(part("keys/a/b").unwrap(), Part { database: None, prefix: b"a/b".to_vec() });
        assert_eq!(part("databases/1/keys/a%2F%00").unwrap(), Part { database: Some(1), prefix: b"a/\0".to_vec() });
        for wrong in ["", "keys", "databases", "databases/x", "no/such/part", "databases/1/x", "keys/%2", "keys/%zz"] {
            assert_eq!(part(wrong).unwrap_err().kind(), Kind::NotFound, "{wrong}");
        }
    }
}
