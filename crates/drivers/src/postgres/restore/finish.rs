//! What comes after rows and indexes: materialized views, the planner's statistics, and a look whether
//! everything is sound.

use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::layout::{self, Table, TableKind};
use super::super::session::Session;
use super::super::wire::{identifier, literal, qualified};
use super::load::{BEGIN, sqlstate};
use super::source::{self, StoredDatabase};
use super::statements::statements;
use super::{Way, pool};

/// Statements of the statistics script that go to the server at once.
const STATISTICS_PER_CALL: usize = 100;

/// Fills the materialized views that were filled at the source. A view may read others, through views
/// and functions that no catalog tells of: one that meets an empty one is tried again after the rest.
pub(super) fn materialized_views(way: &Way<'_>, session: &mut Session, tables: &[&Table]) -> Result<()> {
    let mut waiting: Vec<&Table> =
        tables.iter().copied().filter(|table| table.kind == TableKind::MaterializedView && table.populated).collect();
    // By age: what was made first is most often what the others read.
    waiting.sort_by_key(|table| table.oid);
    while !waiting.is_empty() {
        let (before, mut last) = (waiting.len(), None);
        let mut left = Vec::new();
        for view in waiting {
            way.context.check()?;
            let refresh = format!("REFRESH MATERIALIZED VIEW {}", qualified(&view.schema, &view.name));
            // Within a transaction a failure would take everything back.
            let guarded = session.in_transaction();
            if guarded {
                session.execute("SAVEPOINT view")?;
            }
            match session.execute(&refresh) {
                Ok(()) if guarded => session.execute("RELEASE SAVEPOINT view")?,
                Ok(()) => {}
                // "has not been populated".
                Err(error) if sqlstate(&error) == Some("55000") => {
                    if guarded {
                        session.execute("ROLLBACK TO SAVEPOINT view")?;
                    }
                    last = Some(error.context("view", format!("{}.{}", view.schema, view.name)));
                    left.push(view);
                }
                Err(error) => return Err(error.context("view", format!("{}.{}", view.schema, view.name))),
            }
        }
        if let (true, Some(error)) = (left.len() == before, last) {
            return Err(error);
        }
        waiting = left;
    }
    Ok(())
}

/// Gives the planner its statistics: the source's, where the point has them and the server takes them,
/// else by looking at the tables.
pub(super) fn statistics(way: &Way<'_>, database: &str, stored: &StoredDatabase, major: u32) -> Result<()> {
    let script = match major >= 18 {
        true => source::script(way.source, &stored.file(layout::STATISTICS)?)?,
        false => None,
    };
    let Some(script) = script else { return analyze(way, database, ALL_TABLES) };
    let mut session = way.connect(database)?;
    session.execute(BEGIN)?;
    // The script is the tool's and names what it sets; anything else in it is not carried out.
    let all: Vec<&str> = statements(&script)
        .into_iter()
        .filter(|text| text.starts_with("SELECT * FROM pg_catalog.pg_restore_"))
        .collect();
    for part in all.chunks(STATISTICS_PER_CALL) {
        way.context.check()?;
        session.execute(&part.join(";\n"))?;
    }
    session.close();
    // What the script cannot set: statistics across columns.
    analyze(way, database, "EXISTS (SELECT FROM pg_catalog.pg_statistic_ext s WHERE s.stxrelid = c.oid)")
}

/// Every table by itself, and partitioned ones from their top, which looks at all partitions; unless one
/// of these is elsewhere, and may not be reached.
const ALL_TABLES: &str = "true";

fn analyze(way: &Way<'_>, database: &str, which: &str) -> Result<()> {
    let mut session = way.connect(database)?;
    let rows = session.query(&format!(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM pg_catalog.pg_partition_tree(pg_catalog.pg_partition_root(c.oid)) t \
           JOIN pg_catalog.pg_class f ON f.oid = t.relid WHERE f.relkind = 'f') AS is_elsewhere) e \
         WHERE CASE c.relkind WHEN 'r' THEN NOT c.relispartition OR is_elsewhere WHEN 'm' THEN true \
           WHEN 'p' THEN NOT c.relispartition AND NOT is_elsewhere ELSE false END \
         AND c.oid >= 16384 AND c.relpersistence <> 't' AND {which} \
         ORDER BY pg_catalog.pg_relation_size(c.oid) DESC"
    ))?;
    session.close();
    let names: Vec<String> =
        rows.iter().map(|row| Ok(qualified(&row.string(0)?, &row.string(1)?))).collect::<Result<_>>()?;
    pool::run(way, (database, BEGIN), names, &|session, name| session.execute(&format!("ANALYZE {name}")))
}

/// What must not be after a restore: indexes that nobody may use, extensions that are missing. Other
/// versions of extensions are losses.
pub(super) fn inspect(way: &Way<'_>, database: &str, stored: &StoredDatabase) -> Result<Vec<Loss>> {
    let mut session = way.connect(database)?;
    let invalid = session.query(
        "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_index i \
         JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = 'i' AND NOT (i.indisvalid AND i.indisready)",
    )?;
    if let Some(row) = invalid.first() {
        return Err(Error::new(Kind::Unproven, format!("the index {} is not valid after the restore", row.text(0)?)));
    }
    let here = session.query("SELECT extname, extversion FROM pg_catalog.pg_extension")?;
    session.close();
    let mut losses = Vec::new();
    for (name, _, version) in &stored.about.extensions {
        let found = here.iter().find(|row| row.text(0).is_ok_and(|here| here == name));
        match found.map(|row| row.string(1)).transpose()? {
            Some(here) if here == *version => {}
            Some(here) => losses.push(Loss {
                what: format!("extension {name} of {}", stored.about.name),
                why: format!("version {version} at the source, {here} here"),
            }),
            None => losses.push(Loss {
                what: format!("extension {name} of {}", stored.about.name),
                why: "not restored".to_owned(),
            }),
        }
    }
    Ok(losses)
}

/// Settings of the database, as the statements that make them; `name` is the database's.
pub(super) fn settings(stored: &StoredDatabase, name: &str) -> Vec<(String, String)> {
    let database = identifier(name);
    stored
        .about
        .settings
        .iter()
        .filter_map(|(role, setting)| {
            let (variable, value) = setting.split_once('=')?;
            let value = if is_list(variable) { list(value) } else { literal(value) };
            let variable: Vec<String> = variable.split('.').map(identifier).collect();
            let target = match role.as_str() {
                "" => format!("ALTER DATABASE {database}"),
                role => format!("ALTER ROLE {} IN DATABASE {database}", identifier(role)),
            };
            let what = match role.as_str() {
                "" => format!("setting {setting} of {name}"),
                role => format!("setting {setting} of role {role} in {name}"),
            };
            Some((format!("{target} SET {} TO {value}", variable.join(".")), what))
        })
        .collect()
}

/// Variables whose value is a list of names, which must not be quoted as one. The list is pg_dump's
/// (variable_is_guc_list_quote).
fn is_list(variable: &str) -> bool {
    const LISTS: &[&str] = &[
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "shared_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
        "createrole_self_grant",
        "restrict_nonsystem_relation_kind",
    ];
    LISTS.iter().any(|known| variable.eq_ignore_ascii_case(known))
}

/// Takes `"$user", app` apart and quotes each name for itself.
fn list(value: &str) -> String {
    let mut names = Vec::new();
    let (mut name, mut within, mut characters) = (String::new(), false, value.chars().peekable());
    while let Some(character) = characters.next() {
        match character {
            '"' if within && characters.peek() == Some(&'"') => {
                characters.next();
                name.push('"');
            }
            '"' => within = !within,
            ',' if !within => names.push(std::mem::take(&mut name)),
            ' ' if !within => {}
            other => name.push(other),
        }
    }
    names.push(name);
    names.iter().map(|name| literal(name)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_are_quoted_one_by_one() {
        assert_eq!(list("\"$user\", app,  \"Odd, \"\"Name\"\"\""), "'$user', 'app', 'Odd, \"Name\"'");
        assert_eq!(list(""), "''");
        assert!(is_list("search_path") && !is_list("work_mem"));
    }
}
