//! The value of a stream in an RDB file: entries, and the groups that read them.
//!
//! Apart from the other values, because a stream is the only one with a structure of its own. What
//! is handed out depends on the content alone, not on how the server spread it over nodes.
//! Format: `src/rdb.c` and `src/t_stream.c` of Redis and Valkey.

use std::io::Read;

use stillpoint_core::error::Result;

use super::packed;
use super::rdb::{Element, Visit, Walker, damaged};

/// Bytes of an entry's id.
const ID_BYTES: usize = 16;
/// Marks an entry that was deleted, and one that has the fields of the node's first entry.
const DELETED: i64 = 1;
const SAME_FIELDS: i64 = 2;

impl<R: Read> Walker<R> {
    /// Passes a stream of the given type: 15 first, 19 with counts, 21 with the activity of consumers.
    pub(super) fn stream(&mut self, kind: u8, visit: &mut Option<Visit<'_>>) -> Result<()> {
        for _ in 0..self.length()? {
            match visit {
                None => {
                    self.skip_string()?;
                    self.skip_string()?;
                }
                Some(visit) => {
                    let (id, node) = (self.string()?, self.string()?);
                    entries(&id, &node, visit)?;
                }
            }
        }
        // Length and last id; first id, highest deleted id and count of entries ever added.
        let mut facts = Vec::new();
        for _ in 0..if kind >= 19 { 8 } else { 3 } {
            facts.extend_from_slice(&self.length()?.to_be_bytes());
        }
        if let Some(visit) = visit {
            visit(Element::Part(&facts))?;
        }
        for _ in 0..self.length()? {
            self.group(kind, visit)?;
        }
        Ok(())
    }

    fn group(&mut self, kind: u8, visit: &mut Option<Visit<'_>>) -> Result<()> {
        let mut facts = self.string()?;
        facts.push(0);
        for _ in 0..if kind >= 19 { 3 } else { 2 } {
            facts.extend_from_slice(&self.length()?.to_be_bytes());
        }
        if let Some(visit) = visit {
            visit(Element::Part(&facts))?;
        }
        // Entries that were delivered and not confirmed: id, when and how often.
        for _ in 0..self.length()? {
            let id = self.array::<ID_BYTES>()?;
            let delivered = self.array::<8>()?;
            let times = self.length()?;
            if let Some(visit) = visit {
                visit(Element::Part(&[&id[..], &delivered, &times.to_be_bytes()].concat()))?;
            }
        }
        for _ in 0..self.length()? {
            let name = self.string()?;
            // When it was last seen, and active: replicas may differ, and nothing depends on it.
            self.array::<8>()?;
            if kind >= 21 {
                self.array::<8>()?;
            }
            if let Some(visit) = visit {
                visit(Element::Part(&name))?;
            }
            for _ in 0..self.length()? {
                let id = self.array::<ID_BYTES>()?;
                if let Some(visit) = visit {
                    visit(Element::Part(&id))?;
                }
            }
        }
        Ok(())
    }
}

/// The entries of one node that were not deleted.
fn entries(id: &[u8], node: &[u8], visit: Visit<'_>) -> Result<()> {
    let wrong = || damaged("a stream is damaged");
    let id: [u8; ID_BYTES] = id.try_into().map_err(|_| wrong())?;
    let millis = u64::from_be_bytes(id[..8].try_into().map_err(|_| wrong())?);
    let sequence = u64::from_be_bytes(id[8..].try_into().map_err(|_| wrong())?);
    let mut values: Vec<Vec<u8>> = Vec::new();
    packed::listpack(node, &mut |entry| {
        values.push(entry.to_vec());
        Ok(())
    })?;
    let mut values = values.into_iter();
    let mut next = || values.next().ok_or_else(wrong);
    let number = |text: Vec<u8>| -> Result<i64> {
        std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok()).ok_or_else(wrong)
    };
    let count = |number: i64| usize::try_from(number).map_err(|_| wrong());
    let all = count(number(next()?)?)?.checked_add(count(number(next()?)?)?).ok_or_else(wrong)?;
    let shared_count = count(number(next()?)?)?;
    let mut shared = Vec::new();
    for _ in 0..shared_count {
        shared.push(next()?);
    }
    next()?;
    for _ in 0..all {
        let flags = number(next()?)?;
        let at = (millis.wrapping_add_signed(number(next()?)?), sequence.wrapping_add_signed(number(next()?)?));
        let mut entry = [at.0.to_be_bytes(), at.1.to_be_bytes()].concat();
        let same = flags & SAME_FIELDS != 0;
        let fields = if same { shared_count } else { count(number(next()?)?)? };
        let mut names = shared.iter();
        for _ in 0..fields {
            let own;
            let field = match names.next().filter(|_| same) {
                Some(name) => name,
                None => {
                    own = next()?;
                    &own
                }
            };
            for text in [field, &next()?] {
                entry.extend_from_slice(&(text.len() as u64).to_be_bytes());
                entry.extend_from_slice(text);
            }
        }
        next()?;
        if flags & DELETED == 0 {
            visit(Element::Part(&entry))?;
        }
    }
    Ok(())
}
