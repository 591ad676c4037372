//! Which files of the parent point still hold what the view shows, so that they need not be read.
//!
//! A file holds the rows of a range of blocks, as the parent's view showed them. It still does if every
//! row that this view shows in the range was written before the parent's view began, and if there are as
//! many as the file has: rows never move within a table file, so those rows are among the file's, and an
//! equal number of them is all of them. One query per file tells both, without looking at values. That
//! what is told apart by transaction numbers is told apart rightly, and that equal rows make equal text,
//! rests on the conditions of [`Base::read`] and [`forms`]; docs/decisions/0010 argues each of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};
use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, Result};
use stillpoint_core::tree::{NodeKind, Tree, TreePath, read_small};

use super::cut::{DatabaseView, View};
use super::drain::copy_statement;
use super::layout::{self, Database, Server, Table, Total};
use super::session::Session;
use super::wire::{Tally, qualified, row_hash};

/// More than the descriptions of a million files take.
const DESCRIPTION_BYTES_MAX: u64 = 1 << 30;
/// Files that are asked for in one round trip.
const QUESTIONS_AT_ONCE: usize = 20;
/// Of so many files that would be taken over, one is read and compared all the same.
const SAMPLE_OF: usize = 64;
/// Transaction numbers come again after 2³²; half of them can be told apart from the other half.
const TRANSACTIONS_MAX: u64 = (1 << 31) - (1 << 24);

/// Types whose text depends on the value alone, given the session's settings.
const PLAIN_TYPES: &[&str] = &[
    "bool",
    "bytea",
    "char",
    "name",
    "int8",
    "int2",
    "int4",
    "text",
    "oid",
    "json",
    "jsonb",
    "xml",
    "point",
    "lseg",
    "path",
    "box",
    "polygon",
    "line",
    "circle",
    "float4",
    "float8",
    "macaddr",
    "macaddr8",
    "inet",
    "cidr",
    "bpchar",
    "varchar",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "interval",
    "timetz",
    "bit",
    "varbit",
    "numeric",
    "uuid",
    "tsvector",
    "tsquery",
    "pg_lsn",
    "int4range",
    "int8range",
    "numrange",
    "tsrange",
    "tstzrange",
    "daterange",
    "int4multirange",
    "int8multirange",
    "nummultirange",
    "tsmultirange",
    "tstzmultirange",
    "datemultirange",
];

/// What the parent point holds of one database.
pub(super) struct Base {
    /// The oldest transaction that the parent's view did not know the end of.
    begin: u64,
    /// By folder.
    tables: BTreeMap<String, (Table, Total)>,
}

/// The two borders of a snapshot's text, `xmin:xmax:xip`.
fn borders(snapshot: &str) -> Option<(u64, u64)> {
    let mut parts = snapshot.split(':');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

impl Base {
    /// Reads what the parent holds; `None` if nothing of it can be used. A parent of another form, from
    /// another server or from before a restart is no reason to fail: everything is read.
    pub(super) fn read(parent: &dyn Tree, view: &View, database: &DatabaseView) -> Option<Self> {
        if view.facts.standby || view.facts.system_identifier.is_empty() {
            return None;
        }
        let small = |path: &str| read_small(parent, &TreePath::parse(path).ok()?, DESCRIPTION_BYTES_MAX).ok();
        let folder = format!("{}/{}", layout::DATABASES, layout::database_folder(&database.name));
        let server = Server::parse(&small(layout::SERVER)?).ok()?;
        if server.system_identifier != view.facts.system_identifier || server.timeline != view.facts.timeline {
            return None;
        }
        let described: Database =
            layout::parse(layout::DATABASE, &small(&format!("{folder}/{}", layout::DATABASE))?).ok()?;
        let (begin, _) = borders(&described.snapshot)?;
        let (now, end) = borders(&database.snapshot)?;
        if !described.settled || begin > now || end - begin > TRANSACTIONS_MAX {
            return None;
        }
        let totals: Vec<Total> = layout::parse_lines(layout::TOTALS, &small(layout::TOTALS)?).ok()?;
        let mut totals: BTreeMap<(String, String), Total> = totals
            .into_iter()
            .filter(|total| total.database == database.name)
            .map(|total| ((total.schema.clone(), total.table.clone()), total))
            .collect();
        let tables: Vec<Table> =
            layout::parse_lines(layout::TABLES, &small(&format!("{folder}/{}", layout::TABLES))?).ok()?;
        let pairs = tables.into_iter().filter_map(|table| {
            let total = totals.remove(&(table.schema.clone(), table.name.clone()))?;
            Some((table.folder.clone(), (table, total)))
        });
        Some(Self { begin, tables: pairs.collect() })
    }

    /// The files of `tables` that may be taken over if their rows did not change.
    fn candidates(&self, parent: &dyn Tree, database: &str, tables: &[Table]) -> Vec<Candidate> {
        let mut found = Vec::new();
        for (position, table) in tables.iter().enumerate() {
            let Some((before, total)) = self.tables.get(&table.folder) else { continue };
            if table.form.is_none() || table.form != before.form || before.files != total.files.len() as u64 {
                continue;
            }
            for index in 0..table.files.min(before.files) {
                // A table that grew or shrank across the length of one file is one file in one of the two.
                let same_range = before.stride == table.stride || (index == 0 && before.stride.min(table.stride) == 0);
                if !same_range {
                    continue;
                }
                let Some(tally) = total.file(index as usize) else { continue };
                if self.is_stored(parent, database, table, index, tally.bytes) {
                    found.push(Candidate { position, index, tally });
                }
            }
        }
        found
    }

    fn is_stored(&self, parent: &dyn Tree, database: &str, table: &Table, index: u64, bytes: u64) -> bool {
        let folder = layout::database_folder(database);
        let path = format!("{}/{folder}/{}/{}", layout::DATABASES, layout::DATA, table.folder);
        let path = TreePath::parse(&path).and_then(|path| path.join(layout::file_name(index).as_bytes()));
        let node = path.and_then(|path| parent.get(&path));
        matches!(node, Ok(Some(node)) if node.kind == NodeKind::File { size: bytes })
    }
}

/// A file that may be taken over.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Which of the tables.
    position: usize,
    /// Which of its files.
    index: u64,
    /// What the parent counted in it.
    tally: Tally,
}

/// What of the parent holds: by table (its place in the list) and file, what was counted in it.
pub(super) type Unchanged = BTreeMap<(usize, u64), Tally>;

/// Finds the files that need not be read. `threads` sessions ask at the same time.
pub(super) fn unchanged(
    context: &Context,
    database: &DatabaseView,
    (base, parent): (&Base, &dyn Tree),
    tables: &[Table],
    (encoding, threads): (&str, usize),
) -> Result<Unchanged> {
    let candidates = base.candidates(parent, &database.name, tables);
    let groups: Vec<&[Candidate]> = candidates.chunks(QUESTIONS_AT_ONCE).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Unchanged::new()));
    let work = || -> Result<()> {
        let mut lease = database.pool.take(context)?;
        loop {
            let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) else { return Ok(()) };
            let same = ask(lease.session()?, base.begin, tables, group)?;
            for candidate in same.iter().filter(|candidate| is_sample(&database.exported, candidate)) {
                compare(lease.session()?, &tables[candidate.position], candidate, encoding)?;
            }
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(same.iter().map(|candidate| ((candidate.position, candidate.index), candidate.tally)));
        }
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.min(groups.len())).map(|_| scope.spawn(work)).collect();
        let joined = running.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(Error::internal("a thread that asks for unchanged rows panicked")))
        });
        joined.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Those of a group whose rows are the parent's.
fn ask(session: &mut Session, begin: u64, tables: &[Table], group: &[Candidate]) -> Result<Vec<Candidate>> {
    // Ages count backwards from now, so that they compare across the end of the numbers. Rows that are
    // so old that their number came again have a negative age; special numbers have the greatest.
    let begin = begin % (1 << 32);
    let question = |candidate: &Candidate| {
        let table = &tables[candidate.position];
        format!(
            "SELECT count(*), coalesce(min(age(xmin)) FILTER (WHERE age(xmin) >= 0), 2147483647) > age('{begin}'::xid) \
             FROM ONLY {}{}",
            qualified(&table.schema, &table.name),
            range(table, candidate.index)
        )
    };
    let rows = session.query(&group.iter().map(question).collect::<Vec<_>>().join("; "))?;
    let mut same = Vec::new();
    for (candidate, row) in group.iter().zip(&rows) {
        if row.number::<u64>(0)? == candidate.tally.rows && row.truth(1) {
            same.push(*candidate);
        }
    }
    Ok(same)
}

/// The condition for the blocks of a file.
pub(super) fn range(table: &Table, index: u64) -> String {
    if table.stride == 0 {
        return String::new();
    }
    let from = format!(" WHERE ctid >= '({},0)'", index * table.stride);
    // The last file takes whatever came behind the last block that was counted.
    let last = index + 1 == table.files;
    if last { from } else { format!("{from} AND ctid < '({},0)'", (index + 1) * table.stride) }
}

/// Whether a file is read although it need not be; differs from cut to cut.
fn is_sample(cut: &str, candidate: &Candidate) -> bool {
    let name = format!("{cut} {} {}", candidate.position, candidate.index);
    candidate.tally.rows > 0 && row_hash(name.as_bytes()).is_multiple_of(SAMPLE_OF as u64)
}

/// Reads a file that would be taken over. A difference would mean that the reasoning above is wrong.
fn compare(session: &mut Session, table: &Table, candidate: &Candidate, encoding: &str) -> Result<()> {
    let mut tally = Tally::default();
    let mut buffer = vec![0; 256 << 10];
    session.copy_out(&copy_statement(table, candidate.index, encoding))?;
    while session.copy_read(&mut buffer, &mut tally)? > 0 {}
    if tally == candidate.tally {
        return Ok(());
    }
    let label = format!("{}.{}", table.schema, table.name);
    Err(Error::internal(format!("rows of table `{label}` seem unchanged since the parent point and are not"))
        .context("file", layout::file_name(candidate.index)))
}

/// What a type's text depends on besides the value; `None` if that cannot be said.
struct Types {
    rows: BTreeMap<u32, Type>,
    labels: BTreeMap<u32, String>,
}

struct Type {
    kind: String,
    base: u32,
    element: u32,
    name: String,
    of_system: bool,
}

impl Types {
    fn read(session: &mut Session) -> Result<Self> {
        let mut rows = BTreeMap::new();
        session.each_row(
            "SELECT t.oid, t.typtype, t.typbasetype, CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE 0 END, t.typname, \
             t.oid < 16384 FROM pg_type t WHERE t.typtype <> 'c' AND (t.typelem = 0 OR t.oid IN \
             (SELECT atttypid FROM pg_attribute) OR t.oid < 16384)",
            &mut |row| {
                let one = Type {
                    kind: row.string(1)?,
                    base: row.number(2)?,
                    element: row.number(3)?,
                    name: row.string(4)?,
                    of_system: row.truth(5),
                };
                rows.insert(row.number(0)?, one);
                Ok(())
            },
        )?;
        let mut labels: BTreeMap<u32, String> = BTreeMap::new();
        session.each_row("SELECT enumtypid, oid, enumlabel FROM pg_enum ORDER BY 1, 2", &mut |row| {
            let label = format!("{} {};", row.text(1)?, row.text(2)?);
            labels.entry(row.number(0)?).or_default().push_str(&label);
            Ok(())
        })?;
        Ok(Self { rows, labels })
    }

    fn form(&self, oid: u32) -> Option<String> {
        let one = self.rows.get(&oid)?;
        match one.kind.as_str() {
            "d" => self.form(one.base),
            "e" => Some(format!("{oid}({})", self.labels.get(&oid).map_or("", String::as_str))),
            _ if one.element != 0 => Some(format!("{oid}[{}]", self.form(one.element)?)),
            _ if one.of_system && PLAIN_TYPES.contains(&one.name.as_str()) => Some(oid.to_string()),
            _ => None,
        }
    }
}

/// What must be equal for rows of a table to have equal text: server, database, table file, columns and
/// types. Tables of which that cannot be said have none: those with types of extensions, composite types
/// and names of objects (`regclass`), unlogged ones, and those that are no heaps.
pub(super) fn forms(session: &mut Session, view: &View, database: &Database) -> Result<BTreeMap<u32, String>> {
    let facts = &view.facts;
    if facts.standby || facts.system_identifier.is_empty() {
        return Ok(BTreeMap::new());
    }
    let types = Types::read(session)?;
    let head = format!(
        "{} {} {} {} {} {}",
        facts.system_identifier, facts.timeline, facts.started, facts.version_number, database.oid, database.encoding
    );
    let mut texts: BTreeMap<u32, Option<String>> = BTreeMap::new();
    session.each_row(
        "SELECT c.oid, c.relfilenode, a.attnum, a.atttypid, a.atttypmod, a.attname FROM pg_class c \
         JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am m ON m.oid = c.relam \
         JOIN pg_attribute a ON a.attrelid = c.oid WHERE c.relkind = 'r' AND c.relpersistence = 'p' \
         AND m.amname = 'heap' AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
         AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1, 3",
        &mut |row| {
            let entry =
                texts.entry(row.number(0)?).or_insert_with(|| Some(format!("{head} {}", row.text(1).unwrap_or(""))));
            let column = types.form(row.number(3)?);
            let (number, modifier, name) = (row.text(2)?, row.text(4)?, row.text(5)?);
            match (&mut *entry, column) {
                (Some(text), Some(form)) => text.push_str(&format!(" {number}:{form}:{modifier}:{name}")),
                _ => *entry = None,
            }
            Ok(())
        },
    )?;
    let digest = |text: String| hex::encode(&Sha256::digest(text.as_bytes())[..16]);
    Ok(texts.into_iter().filter_map(|(oid, text)| Some((oid, digest(format!("{oid} {}", text?))))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_and_types_are_read() {
        assert_eq!(borders("740:745:740,743"), Some((740, 745)));
        assert_eq!(borders("740"), None);
        let of_system = |name: &str| Type { kind: "b".into(), base: 0, element: 0, name: name.into(), of_system: true };
        let mut types = Types { rows: BTreeMap::new(), labels: BTreeMap::new() };
        types.rows.insert(25, of_system("text"));
        types.rows.insert(2205, of_system("regclass"));
        types.rows.insert(1009, Type { element: 25, ..of_system("_text") });
        types.rows.insert(20000, Type { kind: "d".into(), base: 25, of_system: false, ..of_system("d") });
        types.rows.insert(20001, Type { kind: "e".into(), of_system: false, ..of_system("mood") });
        types.rows.insert(20002, Type { of_system: false, ..of_system("vector") });
        types.labels.insert(20001, "20003 sad;".to_owned());
        assert_eq!(types.form(1009).as_deref(), Some("1009[25]"));
        assert_eq!(types.form(20000).as_deref(), Some("25"));
        assert_eq!(types.form(20001).as_deref(), Some("20001(20003 sad;)"));
        assert_eq!((types.form(2205), types.form(20002), types.form(7)), (None, None, None));
    }
}
