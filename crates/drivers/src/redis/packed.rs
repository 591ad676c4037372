//! Values that servers keep as one string: listpacks, ziplists, sets of integers, compressed text.
//!
//! Pure, and fed with foreign bytes: every index is checked, nothing is taken on trust. Formats:
//! `src/listpack.c`, `src/ziplist.c`, `src/intset.c`, `src/lzf_d.c` of Redis and Valkey.

use stillpoint_core::error::{Error, Result};

use super::rdb::{Element, Visit, damaged};

/// Takes the entries of a packed list.
pub(super) type Entries<'a> = &'a mut (dyn FnMut(&[u8]) -> Result<()> + 'a);

/// How a packed list is read: [`listpack`] or [`ziplist`].
pub(super) type Unpack = dyn Fn(&[u8], Entries<'_>) -> Result<()>;

fn short() -> Error {
    damaged("a packed value ends too early")
}

fn slice(data: &[u8], from: usize, count: usize) -> Result<&[u8]> {
    let to = from.checked_add(count).ok_or_else(short)?;
    data.get(from..to).ok_or_else(short)
}

fn array<const N: usize>(data: &[u8], from: usize) -> Result<[u8; N]> {
    slice(data, from, N)?.try_into().map_err(|_| short())
}

/// Three bytes, little end first, as a signed number.
fn three_bytes(data: &[u8], from: usize) -> Result<i64> {
    let [a, b, c] = array(data, from)?;
    Ok(i64::from(i32::from_le_bytes([0, a, b, c]) >> 8))
}

/// Hands out the entries of a listpack; numbers as decimal text.
pub(super) fn listpack(data: &[u8], visit: Entries<'_>) -> Result<()> {
    const HEAD_BYTES: usize = 6;
    let mut at = HEAD_BYTES;
    loop {
        let first = *data.get(at).ok_or_else(short)?;
        let number = |value: i64| value.to_string().into_bytes();
        let (size, text) = match first {
            0xff => return Ok(()),
            0..=0x7f => (1, Err(i64::from(first))),
            0x80..=0xbf => (1, Ok(usize::from(first & 0x3f))),
            0xc0..=0xdf => {
                let raw = i64::from(first & 0x1f) << 8 | i64::from(array::<1>(data, at + 1)?[0]);
                (2, Err(if raw >= 1 << 12 { raw - (1 << 13) } else { raw }))
            }
            0xe0..=0xef => (2, Ok(usize::from(first & 0x0f) << 8 | usize::from(array::<1>(data, at + 1)?[0]))),
            0xf0 => (5, Ok(u32::from_le_bytes(array(data, at + 1)?) as usize)),
            0xf1 => (3, Err(i64::from(i16::from_le_bytes(array(data, at + 1)?)))),
            0xf2 => (4, Err(three_bytes(data, at + 1)?)),
            0xf3 => (5, Err(i64::from(i32::from_le_bytes(array(data, at + 1)?)))),
            0xf4 => (9, Err(i64::from_le_bytes(array(data, at + 1)?))),
            other => return Err(damaged(format!("a listpack holds the unknown encoding {other}"))),
        };
        let bytes = match text {
            Ok(length) => {
                visit(slice(data, at + size, length)?)?;
                size + length
            }
            Err(value) => {
                visit(&number(value))?;
                size
            }
        };
        at = at.checked_add(bytes + backward_bytes(bytes)).ok_or_else(short)?;
    }
}

/// Bytes of the length that stands behind an entry of a listpack, for walking backwards.
fn backward_bytes(entry: usize) -> usize {
    match entry {
        0..=127 => 1,
        128..=16_382 => 2,
        16_383..=2_097_150 => 3,
        2_097_151..=268_435_454 => 4,
        _ => 5,
    }
}

/// Hands out the entries of a ziplist; numbers as decimal text.
pub(super) fn ziplist(data: &[u8], visit: Entries<'_>) -> Result<()> {
    const HEAD_BYTES: usize = 10;
    let mut at = HEAD_BYTES;
    loop {
        match *data.get(at).ok_or_else(short)? {
            0xff => return Ok(()),
            0xfe => at += 5,
            _ => at += 1,
        }
        let first = *data.get(at).ok_or_else(short)?;
        let (size, text) = match first {
            0..=0x3f => (1, Ok(usize::from(first))),
            0x40..=0x7f => (2, Ok(usize::from(first & 0x3f) << 8 | usize::from(array::<1>(data, at + 1)?[0]))),
            0x80..=0xbf => (5, Ok(u32::from_be_bytes(array(data, at + 1)?) as usize)),
            0xc0 => (3, Err(i64::from(i16::from_le_bytes(array(data, at + 1)?)))),
            0xd0 => (5, Err(i64::from(i32::from_le_bytes(array(data, at + 1)?)))),
            0xe0 => (9, Err(i64::from_le_bytes(array(data, at + 1)?))),
            0xf0 => (4, Err(three_bytes(data, at + 1)?)),
            0xfe => (2, Err(i64::from(i8::from_le_bytes(array(data, at + 1)?)))),
            0xf1..=0xfd => (1, Err(i64::from(first & 0x0f) - 1)),
            other => return Err(damaged(format!("a ziplist holds the unknown encoding {other}"))),
        };
        at = at.checked_add(size).ok_or_else(short)?;
        match text {
            Ok(length) => {
                visit(slice(data, at, length)?)?;
                at += length;
            }
            Err(value) => visit(value.to_string().as_bytes())?,
        }
    }
}

/// Hands out the members of a set of integers, as decimal text.
pub(super) fn intset(data: &[u8], visit: Entries<'_>) -> Result<()> {
    let width = u32::from_le_bytes(array(data, 0)?) as usize;
    let count = u32::from_le_bytes(array(data, 4)?) as usize;
    if !matches!(width, 2 | 4 | 8) {
        return Err(damaged("a set of integers has an unknown width"));
    }
    for index in 0..count {
        let at = index.checked_mul(width).and_then(|at| at.checked_add(8)).ok_or_else(short)?;
        let value = match width {
            2 => i64::from(i16::from_le_bytes(array(data, at)?)),
            4 => i64::from(i32::from_le_bytes(array(data, at)?)),
            _ => i64::from_le_bytes(array(data, at)?),
        };
        visit(value.to_string().as_bytes())?;
    }
    Ok(())
}

/// A score that was written as text.
pub(super) fn score(text: &[u8]) -> Result<f64> {
    let text = std::str::from_utf8(text).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| damaged("the score of a member is no number"))
}

/// A packed list of members, each followed by its score.
pub(super) fn scored(unpack: &Unpack, data: &[u8], visit: Visit<'_>) -> Result<()> {
    let mut member = None;
    unpack(data, &mut |entry| match member.take() {
        None => {
            member = Some(entry.to_vec());
            Ok(())
        }
        Some(member) => visit(Element::Scored(&member, score(entry)?)),
    })?;
    if member.is_some() { Err(damaged("a member of a sorted set has no score")) } else { Ok(()) }
}

/// A packed list of fields, each followed by its value.
pub(super) fn fields(unpack: &Unpack, data: &[u8], visit: Visit<'_>) -> Result<()> {
    let mut field = None;
    unpack(data, &mut |entry| match field.take() {
        None => {
            field = Some(entry.to_vec());
            Ok(())
        }
        Some(field) => visit(Element::Field(&field, entry, None)),
    })?;
    if field.is_some() { Err(damaged("a field of a hash has no value")) } else { Ok(()) }
}

/// A listpack of fields, each followed by its value and expiry in milliseconds; 0 for never.
pub(super) fn expiring_fields(data: &[u8], visit: Visit<'_>) -> Result<()> {
    let mut pending: Vec<Vec<u8>> = Vec::new();
    listpack(data, &mut |entry| {
        let [field, value] = pending.as_slice() else {
            pending.push(entry.to_vec());
            return Ok(());
        };
        let expires = std::str::from_utf8(entry).ok().and_then(|text| text.parse::<i64>().ok());
        let expires = expires.ok_or_else(|| damaged("the expiry of a field is no number"))?;
        visit(Element::Field(field, value, (expires > 0).then_some(expires)))?;
        pending.clear();
        Ok(())
    })?;
    if pending.is_empty() { Ok(()) } else { Err(damaged("a field of a hash has no value or no expiry")) }
}

/// Undoes LZF. The result must have `whole_bytes`.
pub(super) fn inflate(data: &[u8], whole_bytes: u64) -> Result<Vec<u8>> {
    let wrong = || damaged("a compressed string is damaged");
    let whole = usize::try_from(whole_bytes).map_err(|_| wrong())?;
    let mut out: Vec<u8> = Vec::with_capacity(whole.min(1 << 20));
    let mut at = 0;
    while let Some(&control) = data.get(at) {
        at += 1;
        let control = usize::from(control);
        if control < 32 {
            out.extend_from_slice(data.get(at..at + control + 1).ok_or_else(wrong)?);
            at += control + 1;
        } else {
            let mut length = control >> 5;
            if length == 7 {
                length += usize::from(*data.get(at).ok_or_else(wrong)?);
                at += 1;
            }
            let distance = (control & 0x1f) << 8 | usize::from(*data.get(at).ok_or_else(wrong)?);
            at += 1;
            let from = out.len().checked_sub(distance + 1).ok_or_else(wrong)?;
            // What is copied may overlap what it becomes: byte by byte.
            for index in from..from + length + 2 {
                out.push(out[index]);
            }
        }
        if out.len() > whole {
            return Err(wrong());
        }
    }
    if out.len() == whole { Ok(out) } else { Err(wrong()) }
}
