//! What commands do to single values, as far as references need it.
//!
//! Pure. Knows few commands, and says so of all others: what cannot be carried out here must become an
//! error, never a guess.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_core::error::{Error, Kind, Result};

use super::edges::Verb;

/// What a key holds, of what a query needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// There is no such key.
    Absent,
    /// There is one; what it holds is of no concern.
    Present,
    Text(Vec<u8>),
    List(Vec<Vec<u8>>),
    /// A set, or the members of a sorted set.
    Set(BTreeSet<Vec<u8>>),
    Map(BTreeMap<Vec<u8>, Vec<u8>>),
}

impl Value {
    /// Adds a piece of the image.
    pub fn add(&mut self, first: Vec<u8>, second: Option<Vec<u8>>) {
        match (self, second) {
            (Self::Text(text), None) => *text = first,
            (Self::List(items), None) => items.push(first),
            (Self::Set(members), None) => {
                members.insert(first);
            }
            (Self::Map(map), Some(value)) => {
                map.insert(first, value);
            }
            _ => {}
        }
    }
}

/// Which keys a command touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Touch {
    /// None.
    Nothing,
    /// It chooses a database.
    Select(u32),
    /// All of this database go.
    Empties,
    /// All of every database go.
    EmptiesAll,
    /// Those at these arguments.
    Keys(Vec<usize>),
    /// Two databases change places.
    Swaps,
    /// It is not known here.
    Unknown,
}

/// Which arguments of a command are keys.
pub(super) fn touched(arguments: &[Vec<u8>]) -> Touch {
    let Some(name) = arguments.first().map(|name| name.to_ascii_uppercase()) else { return Touch::Nothing };
    match name.as_slice() {
        b"PING" | b"REPLCONF" | b"PUBLISH" | b"SPUBLISH" | b"MULTI" | b"EXEC" | b"SCRIPT" | b"FUNCTION" => {
            Touch::Nothing
        }
        b"SELECT" => {
            let database = arguments.get(1).and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
            database.map_or(Touch::Unknown, Touch::Select)
        }
        b"FLUSHDB" => Touch::Empties,
        b"FLUSHALL" => Touch::EmptiesAll,
        b"SWAPDB" => Touch::Swaps,
        b"DEL" | b"UNLINK" => Touch::Keys((1..arguments.len()).collect()),
        b"MSET" | b"MSETNX" => Touch::Keys((1..arguments.len()).step_by(2).collect()),
        b"SMOVE" => Touch::Keys(vec![1, 2]),
        b"XGROUP" => Touch::Keys(vec![2]),
        b"SET" | b"SETNX" | b"SETEX" | b"PSETEX" | b"GETSET" | b"GETDEL" | b"GETEX" | b"APPEND" | b"INCR" | b"DECR"
        | b"INCRBY" | b"DECRBY" | b"INCRBYFLOAT" | b"SETRANGE" | b"SETBIT" | b"PERSIST" | b"PEXPIREAT"
        | b"EXPIREAT" | b"PEXPIRE" | b"EXPIRE" | b"HSET" | b"HMSET" | b"HSETNX" | b"HDEL" | b"HINCRBY"
        | b"HINCRBYFLOAT" | b"HPEXPIREAT" | b"HPERSIST" | b"SADD" | b"SREM" | b"LPUSH" | b"RPUSH" | b"LPUSHX"
        | b"RPUSHX" | b"LPOP" | b"RPOP" | b"LREM" | b"LTRIM" | b"LSET" | b"ZADD" | b"ZREM" | b"ZINCRBY" | b"XADD"
        | b"XDEL" | b"XTRIM" | b"XACK" | b"XCLAIM" | b"XSETID" | b"PFADD" | b"GEOADD" => Touch::Keys(vec![1]),
        _ => Touch::Unknown,
    }
}

/// Which kind of value a command makes or works on.
enum Family {
    Text,
    List,
    Set,
    Map,
    Stream,
}

fn family(name: &[u8]) -> Option<Family> {
    Some(match name {
        b"APPEND" | b"INCR" | b"DECR" | b"INCRBY" | b"DECRBY" | b"INCRBYFLOAT" | b"SETRANGE" | b"SETBIT" | b"PFADD" => {
            Family::Text
        }
        b"LPUSH" | b"RPUSH" | b"LPUSHX" | b"RPUSHX" | b"LPOP" | b"RPOP" | b"LREM" | b"LTRIM" | b"LSET" => Family::List,
        b"SADD" | b"SREM" | b"SMOVE" | b"ZADD" | b"ZREM" | b"ZINCRBY" | b"GEOADD" => Family::Set,
        b"HSET" | b"HMSET" | b"HSETNX" | b"HDEL" | b"HINCRBY" | b"HINCRBYFLOAT" => Family::Map,
        b"XADD" | b"XDEL" | b"XTRIM" | b"XACK" | b"XCLAIM" | b"XSETID" | b"XGROUP" => Family::Stream,
        _ => return None,
    })
}

/// Drops what a query does not look at: a key that became another type than it asks for.
pub(super) fn fit(verb: &Verb, value: &mut Value) {
    let fits = match verb {
        Verb::Names => true,
        Verb::Text => matches!(value, Value::Text(_)),
        Verb::Field(_) | Verb::Values | Verb::Fields => matches!(value, Value::Map(_)),
        Verb::Members | Verb::Ranked => matches!(value, Value::Set(_)),
        Verb::Items => matches!(value, Value::List(_)),
    };
    if !fits {
        *value = Value::Absent;
    }
}

/// Carries out a command on one of its keys.
///
/// # Errors
/// `Unsupported` where the outcome is not known here.
pub(super) fn apply(value: &mut Value, key: &[u8], arguments: &[Vec<u8>]) -> Result<()> {
    let name = arguments.first().map(|name| name.to_ascii_uppercase()).unwrap_or_default();
    let unknown = || {
        let name = String::from_utf8_lossy(&name).into_owned();
        Error::new(
            Kind::Unsupported,
            format!(
                "references cannot be evaluated: `{name}` was carried out on key `{}` after the image",
                key.escape_ascii()
            ),
        )
        .hint("`mode: rdb` makes the image at the cut, so that no command has to be followed")
    };
    let argument = |at: usize| arguments.get(at).cloned().unwrap_or_default();
    let names_only = *value == Value::Present;
    let text = match name.as_slice() {
        b"DEL" | b"UNLINK" | b"GETDEL" => {
            *value = Value::Absent;
            return Ok(());
        }
        b"PERSIST" | b"PEXPIREAT" | b"EXPIREAT" | b"PEXPIRE" | b"EXPIRE" | b"GETEX" | b"HPEXPIREAT" | b"HPERSIST" => {
            return Ok(());
        }
        b"SET" | b"SETNX" | b"GETSET" => Some(argument(2)),
        b"SETEX" | b"PSETEX" => Some(argument(3)),
        b"MSET" | b"MSETNX" => {
            // Of a key that is named twice, the last value counts.
            let pairs: Vec<&[Vec<u8>]> = arguments[1..].chunks_exact(2).collect();
            pairs.iter().rev().find(|pair| pair[0] == key).map(|pair| pair[1].clone())
        }
        _ => None,
    };
    if let Some(text) = text {
        *value = if names_only { Value::Present } else { Value::Text(text) };
        return Ok(());
    }
    let done = match family(&name).ok_or_else(unknown)? {
        Family::Text => change_text(value, &name, arguments),
        Family::List => change_list(value, &name, arguments),
        Family::Set => change_set(value, &name, key, arguments),
        Family::Map => change_map(value, &name, arguments),
        Family::Stream => {
            if name == b"XADD" || name == b"XGROUP" {
                *value = Value::Present;
            }
            Some(())
        }
    };
    done.ok_or_else(unknown)
}

fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `None` where the outcome is not known.
fn change_text(value: &mut Value, name: &[u8], arguments: &[Vec<u8>]) -> Option<()> {
    let text = match value {
        Value::Present => return Some(()),
        Value::Absent => Vec::new(),
        Value::Text(text) => std::mem::take(text),
        _ => return None,
    };
    let by = match name {
        b"APPEND" => {
            *value = Value::Text([text, arguments.get(2)?.clone()].concat());
            return Some(());
        }
        b"INCR" => 1,
        b"DECR" => -1,
        b"INCRBY" => integer(arguments.get(2)?)?,
        b"DECRBY" => integer(arguments.get(2)?)?.checked_neg()?,
        _ => return None,
    };
    let old = if text.is_empty() { 0 } else { integer(&text)? };
    *value = Value::Text(old.checked_add(by)?.to_string().into_bytes());
    Some(())
}

fn change_list(value: &mut Value, name: &[u8], arguments: &[Vec<u8>]) -> Option<()> {
    let pushes = matches!(name, b"LPUSH" | b"RPUSH" | b"LPUSHX" | b"RPUSHX");
    match value {
        // Whether a key is left when elements go is not known without them.
        Value::Present => return pushes.then_some(()),
        Value::Absent if name.ends_with(b"X") => return Some(()),
        Value::Absent => *value = Value::List(Vec::new()),
        _ => {}
    }
    let Value::List(items) = value else { return None };
    match name {
        b"RPUSH" | b"RPUSHX" => items.extend_from_slice(arguments.get(2..)?),
        b"LPUSH" | b"LPUSHX" => {
            items.splice(0..0, arguments.get(2..)?.iter().rev().cloned());
        }
        b"LPOP" | b"RPOP" => {
            let count = arguments.get(2).map_or(Some(1), |count| integer(count))?;
            let count = usize::try_from(count).ok()?.min(items.len());
            let from = if name == b"LPOP" { 0 } else { items.len() - count };
            items.drain(from..from + count);
        }
        b"LSET" => {
            let at = integer(arguments.get(2)?)?;
            let at = if at < 0 { items.len() as i64 + at } else { at };
            *items.get_mut(usize::try_from(at).ok()?)? = arguments.get(3)?.clone();
        }
        b"LTRIM" => {
            let count = items.len() as i64;
            let place = |at: usize| integer(arguments.get(at)?).map(|at| if at < 0 { (count + at).max(0) } else { at });
            let last = integer(arguments.get(3)?)?;
            let last = if last < 0 { count + last } else { last.min(count - 1) };
            let first = place(2)?;
            *items = if first > last { Vec::new() } else { items.get(first as usize..=last as usize)?.to_vec() };
        }
        b"LREM" if integer(arguments.get(2)?)? == 0 => items.retain(|item| Some(item) != arguments.get(3)),
        _ => return None,
    }
    if items.is_empty() {
        *value = Value::Absent;
    }
    Some(())
}

fn change_set(value: &mut Value, name: &[u8], key: &[u8], arguments: &[Vec<u8>]) -> Option<()> {
    let adds = matches!(name, b"SADD" | b"ZADD" | b"ZINCRBY" | b"GEOADD");
    match value {
        Value::Present => return adds.then_some(()),
        Value::Absent => *value = Value::Set(BTreeSet::new()),
        _ => {}
    }
    let Value::Set(members) = value else { return None };
    match name {
        b"SADD" => members.extend(arguments.get(2..)?.iter().cloned()),
        b"SREM" | b"ZREM" => {
            let gone = arguments.get(2..)?;
            members.retain(|member| !gone.contains(member));
        }
        b"SMOVE" => {
            let member = arguments.get(3)?;
            if arguments.get(1).is_some_and(|from| from == key) {
                members.remove(member);
            }
            if arguments.get(2).is_some_and(|to| to == key) {
                members.insert(member.clone());
            }
        }
        b"ZINCRBY" => members.extend(arguments.get(3).cloned()),
        b"ZADD" => {
            let options: [&[u8]; 6] = [b"NX", b"XX", b"GT", b"LT", b"CH", b"INCR"];
            let is_option = |word: &&Vec<u8>| options.iter().any(|option| word.eq_ignore_ascii_case(option));
            let given: Vec<&Vec<u8>> = arguments.get(2..)?.iter().take_while(is_option).collect();
            // With these, whether a member is added depends on what is there.
            if given.iter().any(|word| !word.eq_ignore_ascii_case(b"CH") && !word.eq_ignore_ascii_case(b"NX")) {
                return None;
            }
            let pairs = arguments.get(2 + given.len()..)?.chunks_exact(2);
            members.extend(pairs.map(|pair| pair[1].clone()));
        }
        _ => return None,
    }
    if members.is_empty() {
        *value = Value::Absent;
    }
    Some(())
}

fn change_map(value: &mut Value, name: &[u8], arguments: &[Vec<u8>]) -> Option<()> {
    match value {
        Value::Present => return (name != b"HDEL").then_some(()),
        Value::Absent => *value = Value::Map(BTreeMap::new()),
        _ => {}
    }
    let Value::Map(map) = value else { return None };
    match name {
        b"HSET" | b"HMSET" | b"HSETNX" => {
            map.extend(arguments.get(2..)?.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
        }
        b"HDEL" => {
            let gone = arguments.get(2..)?;
            map.retain(|field, _| !gone.contains(field));
        }
        b"HINCRBY" => {
            let (field, by) = (arguments.get(2)?.clone(), integer(arguments.get(3)?)?);
            let old = map.get(&field).map_or(Some(0), |old| integer(old))?;
            map.insert(field, old.checked_add(by)?.to_string().into_bytes());
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(mut value: Value, lines: &[&str]) -> Option<Value> {
        for line in lines {
            let arguments: Vec<Vec<u8>> = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
            apply(&mut value, b"k", &arguments).ok()?;
        }
        Some(value)
    }

    fn text(text: &str) -> Option<Value> {
        Some(Value::Text(text.into()))
    }

    #[test]
    fn strings_follow_their_commands() {
        assert_eq!(after(Value::Absent, &["SET k 5", "INCRBY k 3", "DECR k", "APPEND k x"]), text("7x"));
        assert_eq!(after(Value::Text("a".into()), &["MSET j 1 k 2 k 3"]), text("3"));
        assert_eq!(after(Value::Text("a".into()), &["DEL k"]), Some(Value::Absent));
        assert_eq!(after(Value::Text("a".into()), &["INCR k"]), None);
        assert_eq!(after(Value::Text("a".into()), &["BITOP AND k a b"]), None);
    }

    #[test]
    fn collections_follow_their_commands_until_they_are_empty() {
        let set = |members: &[&str]| Some(Value::Set(members.iter().map(|m| m.as_bytes().to_vec()).collect()));
        assert_eq!(after(Value::Absent, &["SADD k a b c", "SREM k b", "SMOVE k j a", "SMOVE j k z"]), set(&["c", "z"]));
        assert_eq!(after(Value::Absent, &["SADD k a", "SREM k a"]), Some(Value::Absent));
        assert_eq!(after(Value::Absent, &["ZADD k CH 1 a 2 b", "ZREM k a"]), set(&["b"]));
        assert_eq!(after(Value::Absent, &["ZADD k XX 1 a"]), None);
        let list = |items: &[&str]| Some(Value::List(items.iter().map(|m| m.as_bytes().to_vec()).collect()));
        let pushed = ["RPUSH k a b", "LPUSH k x y"];
        assert_eq!(after(Value::Absent, &pushed), list(&["y", "x", "a", "b"]));
        assert_eq!(after(Value::Absent, &[pushed[0], pushed[1], "LPOP k 2", "LSET k -1 c"]), list(&["a", "c"]));
        assert_eq!(after(Value::Absent, &[pushed[0], pushed[1], "LTRIM k 1 -2"]), list(&["x", "a"]));
        assert_eq!(after(Value::Absent, &["RPUSH k a", "RPOP k"]), Some(Value::Absent));
        let map = after(Value::Absent, &["HSET k f 1 g x", "HINCRBY k f 4", "HDEL k g"]).unwrap();
        assert_eq!(map, Value::Map(BTreeMap::from([(b"f".to_vec(), b"5".to_vec())])));
    }

    #[test]
    fn whether_a_key_is_left_is_known_or_an_error() {
        assert_eq!(after(Value::Present, &["SADD k a", "XADD k 1-1 a b"]), Some(Value::Present));
        assert_eq!(after(Value::Present, &["SREM k a"]), None);
        assert_eq!(after(Value::Present, &["DEL k", "HSET k a b"]).map(|value| value != Value::Absent), Some(true));
    }
}
