//! Names as they lie in stored directories: one prefix is ours.
//!
//! A directory of more than [`PART_NODES_MAX`](super::tree_write::PART_NODES_MAX) entries is stored
//! as a directory of parts, whose names are [`PREFIX`] and eight digits. A plain name that begins
//! with the prefix gets a `=` behind it, so that no name of a user's is taken for a part. Escaping
//! keeps the order of names.

use std::borrow::Cow;

/// Begin of every name that is ours.
pub const PREFIX: &[u8] = b".stillpoint-part-";

/// What a stored name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredName<'n> {
    /// An entry of this name.
    Plain(Cow<'n, [u8]>),
    /// A part of the directory around it, counted from 0.
    Part(u32),
}

/// The stored form of a plain name.
pub fn encode(name: &[u8]) -> Cow<'_, [u8]> {
    match name.strip_prefix(PREFIX) {
        None => Cow::Borrowed(name),
        Some(rest) => Cow::Owned([PREFIX, b"=", rest].concat()),
    }
}

/// The stored name of part `number`.
pub fn part(number: u32) -> Vec<u8> {
    [PREFIX, format!("{number:08}").as_bytes()].concat()
}

/// Reads a stored name. What restic itself wrote with our prefix stands for itself.
pub fn decode(stored: &[u8]) -> StoredName<'_> {
    let Some(rest) = stored.strip_prefix(PREFIX) else {
        return StoredName::Plain(Cow::Borrowed(stored));
    };
    if let Some(rest) = rest.strip_prefix(b"=") {
        return StoredName::Plain(Cow::Owned([PREFIX, rest].concat()));
    }
    match std::str::from_utf8(rest).ok().filter(|text| text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit())) {
        Some(digits) => StoredName::Part(digits.parse().expect("eight digits fit")),
        None => StoredName::Plain(Cow::Borrowed(stored)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<Vec<u8>>(),
            any::<Vec<u8>>().prop_map(|rest| [PREFIX, &rest].concat()),
            "[=0-9]{0,10}".prop_map(|rest| [PREFIX, rest.as_bytes()].concat()),
        ]
    }

    proptest! {
        #[test]
        fn plain_names_survive_and_keep_their_order(a in names(), b in names()) {
            let stored = encode(&a);
            prop_assert_eq!(decode(&stored), StoredName::Plain(Cow::Borrowed(&a[..])));
            prop_assert_eq!(encode(&a).cmp(&encode(&b)), a.cmp(&b));
        }

        #[test]
        fn parts_are_parts(number in 0..100_000_000_u32) {
            let stored = part(number);
            prop_assert_eq!(decode(&stored), StoredName::Part(number));
        }
    }
}
