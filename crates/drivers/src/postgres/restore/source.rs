//! What a point holds of a server, read and checked before anything is written.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use stillpoint_core::driver::Context;
use stillpoint_core::error::{Error, IoContext, Kind, Result};
use stillpoint_core::tree::{Tree, TreePath, read_small};

use super::super::layout::{self, Database, LargeObject, Server, Table, TableKind, Total};

/// Descriptions and scripts above this are not ours.
const TEXT_BYTES_MAX: u64 = 1 << 30;

/// The point's databases and what it says of their server.
#[derive(Debug)]
pub(in super::super) struct Stored {
    pub(in super::super) server: Server,
    pub(in super::super) databases: Vec<StoredDatabase>,
}

/// One database of the point.
#[derive(Debug)]
pub(in super::super) struct StoredDatabase {
    pub(in super::super) about: Database,
    pub(in super::super) tables: Vec<Table>,
    /// What was copied, by schema and table.
    pub(in super::super) totals: BTreeMap<(String, String), Total>,
    pub(in super::super) folder: TreePath,
}

impl Stored {
    /// Reads the descriptions; `only` names the one database that is wanted.
    pub(in super::super) fn read(tree: &dyn Tree, only: Option<&str>) -> Result<Self> {
        let server = Server::parse(&text(tree, &TreePath::root().join(layout::SERVER.as_bytes())?)?)?;
        let totals = text(tree, &TreePath::root().join(layout::TOTALS.as_bytes())?)?;
        let totals: Vec<Total> = layout::parse_lines(layout::TOTALS, &totals)?;
        let mut databases = Vec::new();
        for name in server.databases.iter().filter(|name| only.is_none_or(|only| only == name.as_str())) {
            let folder = TreePath::root().join(layout::DATABASES.as_bytes())?;
            let folder = folder.join(layout::database_folder(name).as_bytes())?;
            let about: Database =
                layout::parse(layout::DATABASE, &text(tree, &folder.join(layout::DATABASE.as_bytes())?)?)?;
            let tables = layout::parse_lines(layout::TABLES, &text(tree, &folder.join(layout::TABLES.as_bytes())?)?)?;
            let of_this = totals.iter().filter(|total| total.database == *name);
            let totals = of_this.map(|total| ((total.schema.clone(), total.table.clone()), total.clone())).collect();
            databases.push(StoredDatabase { about, tables, totals, folder });
        }
        match (databases.is_empty(), only) {
            (true, Some(only)) => Err(Error::new(Kind::NotFound, format!("the point holds no database `{only}`"))
                .context("databases", server.databases.join(", "))),
            _ => Ok(Self { server, databases }),
        }
    }
}

impl StoredDatabase {
    /// A file of this database.
    pub(in super::super) fn file(&self, name: &str) -> Result<TreePath> {
        self.folder.join(name.as_bytes())
    }

    /// One file of a table's rows.
    pub(in super::super) fn rows(&self, table: &Table, index: u64) -> Result<TreePath> {
        self.file(layout::DATA)?.join(table.folder.as_bytes())?.join(layout::file_name(index).as_bytes())
    }

    /// The tables whose rows are in the point.
    pub(in super::super) fn tables_with_rows(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter().filter(|table| table.kind == TableKind::Table && table.rows_kept)
    }

    /// What was copied of a table.
    pub(in super::super) fn total(&self, table: &Table) -> Result<&Total> {
        self.totals.get(&(table.schema.clone(), table.name.clone())).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("`{}` lacks the table {}.{}", layout::TOTALS, table.schema, table.name))
        })
    }

    /// The large objects, if their content is in the point.
    pub(in super::super) fn large_objects(&self, tree: &dyn Tree) -> Result<Vec<LargeObject>> {
        if self.about.large_objects == 0 {
            return Ok(Vec::new());
        }
        let index = self.file(layout::LARGE_OBJECTS)?.join(layout::INDEX.as_bytes())?;
        layout::parse_lines(layout::INDEX, &text(tree, &index)?)
    }

    /// The files of the large objects' content, in order.
    pub(in super::super) fn large_object_files(&self, tree: &dyn Tree) -> Result<Vec<TreePath>> {
        let folder = self.file(layout::LARGE_OBJECTS)?;
        let mut files = Vec::new();
        if tree.get(&folder)?.is_some() {
            tree.list(&folder, &mut |node| {
                if node.name.ends_with(b".copy") {
                    files.push(folder.join(&node.name)?);
                }
                Ok(true)
            })?;
        }
        Ok(files)
    }

    /// Rows and bytes of everything in it.
    pub(in super::super) fn size(&self) -> (u64, u64) {
        self.totals.values().fold((0, 0), |(rows, bytes), total| (rows + total.rows, bytes + total.bytes))
    }
}

/// Reads a description or a script whole.
pub(in super::super) fn text(tree: &dyn Tree, path: &TreePath) -> Result<Vec<u8>> {
    read_small(tree, path, TEXT_BYTES_MAX)
}

/// The same, as text; `None` if the point has no such file.
pub(in super::super) fn script(tree: &dyn Tree, path: &TreePath) -> Result<Option<String>> {
    if tree.get(path)?.is_none() {
        return Ok(None);
    }
    String::from_utf8(text(tree, path)?)
        .map(Some)
        .map_err(|error| Error::new(Kind::Unsupported, format!("`{path}` is no UTF-8")).source(error))
}

/// Copies a file of the point into the scratch folder, for programs that read files only.
pub(in super::super) fn to_scratch(
    tree: &dyn Tree,
    path: &TreePath,
    folder: &Path,
    context: &Context,
) -> Result<PathBuf> {
    let to = folder.join(format!("archive-{}.dump", path.names().get(1).map_or(0, |name| fnv(name))));
    let what = || format!("cannot write {}", to.display());
    std::fs::create_dir_all(folder).or_io(what)?;
    let mut reader = tree.open(path)?;
    let mut file = std::fs::File::create(&to).or_io(what)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        context.check()?;
        let count = reader.read(&mut buffer).or_io(|| format!("cannot read `{path}`"))?;
        if count == 0 {
            return Ok(to);
        }
        std::io::Write::write_all(&mut file, &buffer[..count]).or_io(what)?;
    }
}

/// A short number for a name, so that two archives have two files.
fn fnv(name: &[u8]) -> u64 {
    name.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
