//! How object keys become paths in a point, and back. Pure; the scheme is in docs/formats.md.
//!
//! Ordinary keys become themselves, so that a point can be read and restored without Stillpoint.
//! The escape sign is `%`. Every key has exactly one path and every path at most one key, whatever
//! bytes either holds: keys come from users and paths from buckets, both may be hostile.

use stillpoint_core::error::{Error, Kind, Result};

/// Longest name that file systems take.
const NAME_BYTES_MAX: usize = 255;
/// An empty part of a key: between two slashes, before the first one, behind the last one.
const EMPTY: &[u8] = b"%_";
/// Ends a name whose part of the key goes on in the next one.
const CONTINUED: &[u8] = b"%~";
/// The object whose key is also a folder of other keys; lies within that folder.
pub(super) const SELF: &[u8] = b"%=";

/// The names of the path that `key` gets, outermost first.
///
/// The order of paths by names is that in which a tree is written; it is not the order of keys.
pub(super) fn escape(key: &[u8]) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    for part in key.split(|&byte| byte == b'/') {
        escape_part(part, &mut names);
    }
    names
}

fn escape_part(part: &[u8], names: &mut Vec<Vec<u8>>) {
    if part.is_empty() {
        names.push(EMPTY.to_vec());
        return;
    }
    let is_plain = |byte: &u8| (0x20..0x7f).contains(byte) && *byte != b'%';
    if part.len() <= NAME_BYTES_MAX && part != b"." && part != b".." && part.iter().all(is_plain) {
        // Nearly every key; ten million of them are escaped in one run.
        names.push(part.to_vec());
        return;
    }
    let tokens = tokens(part);
    let whole: usize = tokens.iter().map(Vec::len).sum();
    let mut name = Vec::new();
    for token in tokens {
        if whole > NAME_BYTES_MAX && name.len() + token.len() > NAME_BYTES_MAX - CONTINUED.len() {
            name.extend_from_slice(CONTINUED);
            names.push(std::mem::take(&mut name));
        }
        name.extend_from_slice(&token);
    }
    if name == b"." || name == b".." {
        name = name.iter().flat_map(|_| *b"%2E").collect();
    }
    names.push(name);
}

/// Splits a part into what must stay together: characters, and escapes of single bytes.
fn tokens(part: &[u8]) -> Vec<Vec<u8>> {
    let mut tokens = Vec::with_capacity(part.len());
    for chunk in part.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '%' || character.is_ascii_control() {
                tokens.push(format!("%{:02X}", u32::from(character)).into_bytes());
            } else {
                tokens.push(character.to_string().into_bytes());
            }
        }
        tokens.extend(chunk.invalid().iter().map(|byte| format!("%{byte:02X}").into_bytes()));
    }
    tokens
}

/// The key whose path has these names. Refuses every path that [`escape`] does not make.
pub(super) fn unescape(names: &[Vec<u8>]) -> Result<Vec<u8>> {
    let wrong = || {
        let shown: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name)).collect();
        Error::new(Kind::Corrupt, format!("`{}` is the path of no object", shown.join("/")))
    };
    let plain = match names.split_last() {
        Some((last, above)) if last == SELF => above,
        _ => names,
    };
    let mut key = Vec::new();
    let mut begins_part = false;
    for (index, name) in plain.iter().enumerate() {
        if index > 0 && begins_part {
            key.push(b'/');
        }
        begins_part = !name.ends_with(CONTINUED);
        let name = name.strip_suffix(CONTINUED).unwrap_or(name);
        if name != EMPTY {
            unescape_name(name, &mut key).ok_or_else(wrong)?;
        }
    }
    if plain.is_empty() || escape(&key) != plain {
        return Err(wrong());
    }
    Ok(key)
}

fn unescape_name(name: &[u8], key: &mut Vec<u8>) -> Option<()> {
    let mut rest = name.iter();
    while let Some(&byte) = rest.next() {
        if byte == b'%' {
            let digits = [*rest.next()?, *rest.next()?];
            key.extend(hex::decode(digits).ok()?);
        } else {
            key.push(byte);
        }
    }
    Some(())
}

/// The names joined so that byte order is the order of paths: no name holds a zero byte.
pub(super) fn sort_key(names: &[Vec<u8>]) -> Vec<u8> {
    names.join(&0)
}

/// Splits what [`sort_key`] joined.
pub(super) fn split_sort_key(joined: &[u8]) -> Vec<Vec<u8>> {
    joined.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect()
}

/// Whether a directory can hold an object of this key under its own name.
pub(super) fn fits_directory(key: &[u8]) -> bool {
    key.split(|&byte| byte == b'/').all(|part| {
        !part.is_empty() && part != b"." && part != b".." && part.len() <= NAME_BYTES_MAX && !part.contains(&0)
    })
}

/// How a key is shown to people.
pub(super) fn shown(key: &[u8]) -> String {
    String::from_utf8_lossy(key).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stillpoint_core::tree::check_name;

    fn path(key: &[u8]) -> String {
        escape(key).iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect::<Vec<_>>().join("/")
    }

    #[test]
    fn keys_become_paths() {
        for (key, expected) in [
            (&b"models/7/weights.bin"[..], "models/7/weights.bin"),
            (b"a//..%2F", "a/%_/..%252F"),
            (b"a/", "a/%_"),
            (b"/", "%_/%_"),
            (b"/etc/passwd", "%_/etc/passwd"),
            (b"../../x", "%2E%2E/%2E%2E/x"),
            (b".", "%2E"),
            (b"...", "..."),
            (b"tab\tzero\0", "tab%09zero%00"),
            (b"%_", "%25_"),
            (b"caf\xc3\xa9 \xe9", "café %E9"),
            ("日本".as_bytes(), "日本"),
        ] {
            assert_eq!(path(key), expected);
            assert_eq!(unescape(&escape(key)).expect("valid"), key);
        }
    }

    #[test]
    fn long_parts_are_split_between_characters() {
        for length in [250usize, 253, 254, 255, 256, 300, 600, 1024] {
            for tail in ["", ".", "..", "é", "%"] {
                let key = format!("x/{}{tail}/y", "a".repeat(length));
                let names = escape(key.as_bytes());
                assert!(names.iter().all(|name| name.len() <= 255 && std::str::from_utf8(name).is_ok()));
                assert!(names.iter().all(|name| check_name(name).is_ok()), "{names:?}");
                assert_eq!(unescape(&names).expect("valid"), key.as_bytes());
            }
        }
    }

    #[test]
    fn foreign_paths_are_refused() {
        for bad in [
            &["%2e"][..],
            &["%41"],
            &["%"],
            &["a%4"],
            &["%="],
            &["a", "%=", "b"],
            &["a%~"],
            &["a%~", "b"],
            &["%_%~", "a"],
            &["a", ".."],
            &[""],
            &["tab\t"],
            &["a/b"],
            &[],
        ] {
            let names: Vec<Vec<u8>> = bad.iter().map(|name| name.as_bytes().to_vec()).collect();
            assert!(unescape(&names).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_object_that_is_also_a_folder_lies_within_it() {
        let mut names = escape(b"a/b");
        names.push(SELF.to_vec());
        assert_eq!(unescape(&names).expect("valid"), b"a/b");
    }

    fn any_key() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            4 => proptest::collection::vec(any::<u8>(), 0..6),
            4 => proptest::sample::select(vec!["/", "//", ".", "..", "%", "%2F", "%_", "%~", "%=", "\0", "é", "日", "a", "\u{7f}"])
                .prop_map(|text| text.as_bytes().to_vec()),
            1 => (proptest::sample::select(vec!["a", ".", "é", "%", "\n"]), 100usize..400)
                .prop_map(|(text, count)| text.repeat(count).into_bytes()),
        ];
        proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn every_key_has_one_safe_path_and_comes_back(key in any_key(), other in any_key()) {
            let names = escape(&key);
            for name in &names {
                prop_assert!(check_name(name).is_ok() && name.len() <= 255, "{:?}", name);
                prop_assert!(std::str::from_utf8(name).is_ok_and(|name| !name.contains(|c: char| c.is_ascii_control())));
                prop_assert!(name.as_slice() != SELF);
            }
            prop_assert_eq!(&unescape(&names).unwrap(), &key);
            prop_assert_eq!(split_sort_key(&sort_key(&names)), names.clone());
            prop_assert_eq!(key == other, names == escape(&other));
            // Byte order of the joined names is the order of the lists of names.
            prop_assert_eq!(sort_key(&names).cmp(&sort_key(&escape(&other))), names.cmp(&escape(&other)));
        }

        #[test]
        fn any_path_is_refused_or_the_path_of_its_key(names in proptest::collection::vec("[a%/.~_=0-9A-F]{0,6}", 0..4)) {
            let names: Vec<Vec<u8>> = names.into_iter().map(String::into_bytes).collect();
            if let Ok(key) = unescape(&names) {
                let plain = names.strip_suffix(&[SELF.to_vec()][..]).unwrap_or(&names);
                prop_assert_eq!(escape(&key), plain);
            }
        }
    }
}
