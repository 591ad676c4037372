//! Roles, memberships and tablespaces: what `globals.sql` says, done at a server that may have some of it.
//!
//! A server's roles belong to all of its databases, so what is there is never changed: a role that
//! exists keeps its attributes, password and settings, and every difference is named as a loss. What the
//! restoring role may not do is left out and named too. Statements come from the point; only the kinds
//! that `pg_dumpall --globals-only` writes are run.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_core::driver::Loss;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::session::Session;
use super::super::wire::{identifier, literal};
use super::statements::{Word, statements, words};

/// What became of the roles.
#[derive(Debug, Default)]
pub(super) struct Globals {
    /// Roles that were not there before, in the order of their creation.
    pub(super) made: Vec<String>,
    /// What could not be done, or is different here.
    pub(super) losses: Vec<Loss>,
    /// Tablespaces of the point that this server lacks.
    pub(super) tablespaces_missing: BTreeSet<String>,
}

/// The attributes of a role that `ALTER ROLE … WITH` lists, as columns of `pg_roles`.
const ATTRIBUTES: &[(&str, &str)] = &[
    ("SUPERUSER", "rolsuper"),
    ("INHERIT", "rolinherit"),
    ("CREATEROLE", "rolcreaterole"),
    ("CREATEDB", "rolcreatedb"),
    ("LOGIN", "rolcanlogin"),
    ("REPLICATION", "rolreplication"),
    ("BYPASSRLS", "rolbypassrls"),
];

/// Carries out what `script` says. `globals` is filled as it goes, so that the caller can take back what
/// was made when this fails.
pub(super) fn restore(session: &mut Session, script: &str, globals: &mut Globals) -> Result<()> {
    let existing = existing(session)?;
    let tablespaces: BTreeSet<String> = session
        .query("SELECT spcname FROM pg_catalog.pg_tablespace")?
        .iter()
        .map(|row| row.string(0))
        .collect::<Result<_>>()?;
    // In two passes: a membership may name a role that the script makes later.
    let all: Vec<(&str, Vec<Word>)> = statements(script).into_iter().map(|text| (text, words(text))).collect();
    for (text, words) in &all {
        match Global::of(words) {
            Global::CreateRole(name) if !existing.contains_key(name) => {
                let is_made = attempt(session, text, &format!("role {name}"), globals)?;
                globals.made.extend(is_made.then(|| name.to_owned()));
            }
            Global::CreateTablespace(name) if !tablespaces.contains(name) => {
                globals.tablespaces_missing.insert(name.to_owned());
            }
            _ => {}
        }
    }
    for (text, words) in &all {
        let is_made = |name: &str| globals.made.iter().any(|made| made == name);
        match Global::of(words) {
            Global::AlterRole(name) if is_made(name) => set_attributes(session, name, text, words, globals)?,
            Global::AlterRole(name) => compare(name, words, existing.get(name), globals),
            Global::OfRole(name) if is_made(name) => {
                attempt(session, text, &format!("role {name}"), globals)?;
            }
            Global::Membership { role, member } => {
                let both_new = is_made(role) || is_made(member);
                membership(session, text, (role, member), both_new, globals)?;
            }
            Global::Parameter => {
                attempt(session, text, "privileges on parameters", globals)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// What one statement is about.
enum Global<'a> {
    CreateRole(&'a str),
    AlterRole(&'a str),
    /// A setting, comment or label of a role.
    OfRole(&'a str),
    Membership {
        role: &'a str,
        member: &'a str,
    },
    Parameter,
    CreateTablespace(&'a str),
    /// Settings of the script itself, further statements about tablespaces: nothing to do.
    Other,
}

impl<'a> Global<'a> {
    fn of(words: &'a [Word]) -> Self {
        let starts = |keywords: &[&str]| {
            words.len() > keywords.len() && keywords.iter().zip(words).all(|(keyword, word)| word.is(keyword))
        };
        let name = |at: usize| words.get(at).map_or("", |word| word.text.as_str());
        if starts(&["CREATE", "ROLE"]) {
            Self::CreateRole(name(2))
        } else if starts(&["ALTER", "ROLE"]) && words.get(3).is_some_and(|word| word.is("WITH")) {
            Self::AlterRole(name(2))
        } else if starts(&["ALTER", "ROLE"]) && words.get(3).is_some_and(|word| word.is("SET")) {
            Self::OfRole(name(2))
        } else if starts(&["COMMENT", "ON", "ROLE"]) {
            Self::OfRole(name(3))
        } else if starts(&["CREATE", "TABLESPACE"]) {
            Self::CreateTablespace(name(2))
        } else if starts(&["GRANT"]) && words.get(2).is_some_and(|word| word.is("TO")) {
            Self::Membership { role: name(1), member: name(3) }
        } else if starts(&["GRANT"]) && words.iter().take(12).any(|word| word.is("PARAMETER")) {
            Self::Parameter
        } else {
            Self::Other
        }
    }
}

/// The roles there are, with their attributes as `ALTER ROLE` writes them.
fn existing(session: &mut Session) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let columns: Vec<&str> = ATTRIBUTES.iter().map(|(_, column)| *column).collect();
    let rows = session.query(&format!("SELECT rolname, {} FROM pg_catalog.pg_roles", columns.join(", ")))?;
    let attributes = |row: &super::super::wire::Row| {
        ATTRIBUTES
            .iter()
            .enumerate()
            .map(|(at, (name, _))| if row.truth(at + 1) { (*name).to_owned() } else { format!("NO{name}") })
            .collect()
    };
    rows.iter().map(|row| Ok((row.string(0)?, attributes(row)))).collect()
}

/// Runs one statement. What this role may not do becomes a loss; `false` then.
fn attempt(session: &mut Session, statement: &str, what: &str, globals: &mut Globals) -> Result<bool> {
    match session.execute(statement) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), Kind::PermissionDenied) => {
            globals.losses.push(Loss { what: what.to_owned(), why: format!("not restored: {}", cause(&error)) });
            Ok(false)
        }
        // The statement may hold a password: it is named by what it is about, never by its text.
        Err(error) => Err(Error::new(error.kind(), format!("cannot restore {what}")).context("because", cause(&error))),
    }
}

/// The server's own words.
fn cause(error: &Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.message().to_owned(), ToString::to_string)
}

/// Gives a new role its attributes; those that need a superuser one by one where there is none.
fn set_attributes(session: &mut Session, name: &str, text: &str, words: &[Word], globals: &mut Globals) -> Result<()> {
    let mut refused = Globals::default();
    if attempt(session, text, &format!("role {name}"), &mut refused)? {
        return Ok(());
    }
    let what = format!("role {name}");
    for word in words.iter().skip(4).take_while(|word| !word.is("PASSWORD") && !word.is("VALID")) {
        let bare = word.text.strip_prefix("NO").unwrap_or(&word.text);
        // A new role has none of them, except that it inherits.
        if ATTRIBUTES.iter().any(|(name, _)| *name == bare) && (word.text == bare || bare == "INHERIT") {
            let statement = format!("ALTER ROLE {} WITH {}", identifier(name), word.text);
            attempt(session, &statement, &format!("attribute {} of {what}", word.text), globals)?;
        }
    }
    for keyword in ["LIMIT", "PASSWORD", "UNTIL"] {
        if let Some(at) = words.iter().position(|word| word.is(keyword))
            && let Some(value) = words.get(at + 1)
        {
            let clause = match keyword {
                "LIMIT" => format!("CONNECTION LIMIT {}", value.text.parse::<i32>().unwrap_or(-1)),
                "UNTIL" => format!("VALID UNTIL {}", literal(&value.text)),
                _ => format!("PASSWORD {}", literal(&value.text)),
            };
            let statement = format!("ALTER ROLE {} WITH {clause}", identifier(name));
            attempt(session, &statement, &format!("{} of {what}", keyword.to_lowercase()), globals)?;
        }
    }
    Ok(())
}

/// Names how a role that is there differs from the point's.
fn compare(name: &str, words: &[Word], here: Option<&BTreeSet<String>>, globals: &mut Globals) {
    let Some(here) = here else { return };
    let known = |text: &str| ATTRIBUTES.iter().any(|(name, _)| text.strip_prefix("NO").unwrap_or(text) == *name);
    let different: Vec<&str> = words
        .iter()
        .skip(4)
        .take_while(|word| !word.is("PASSWORD"))
        .map(|word| word.text.as_str())
        .filter(|text| known(text) && !here.contains(*text))
        .collect();
    if !different.is_empty() {
        globals.losses.push(Loss {
            what: format!("role {name}"),
            why: format!("it exists here and was left as it is; in the point it is {}", different.join(" ")),
        });
    }
}

/// Makes a role a member of another, unless both were there before: then a difference is named.
fn membership(
    session: &mut Session,
    text: &str,
    (role, member): (&str, &str),
    is_new: bool,
    globals: &mut Globals,
) -> Result<()> {
    let there = session.query(&format!(
        "SELECT 1 FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r ON r.oid = m.roleid \
         JOIN pg_catalog.pg_roles p ON p.oid = m.member WHERE r.rolname = {} AND p.rolname = {}",
        literal(role),
        literal(member)
    ))?;
    let what = format!("membership of {member} in {role}");
    if !is_new {
        if there.is_empty() {
            let why = "both roles exist here and were left as they are".to_owned();
            globals.losses.push(Loss { what, why });
        }
        return Ok(());
    }
    let Err(error) = session.execute(text) else { return Ok(()) };
    // Who granted it may be absent here, or may not grant it by the rules of a newer version.
    let plain = match text.rfind(" GRANTED BY ") {
        Some(at) => &text[..at],
        None => text,
    };
    match session.execute(plain) {
        Ok(()) => Ok(()),
        Err(_) => {
            globals.losses.push(Loss { what, why: format!("not restored: {}", cause(&error)) });
            Ok(())
        }
    }
}

/// Takes back the roles that a failed restore made. Returns what could not be removed.
pub(super) fn take_back(session: &mut Session, made: &[String]) -> Vec<String> {
    let mut left = Vec::new();
    for name in made.iter().rev() {
        if let Err(error) = session.execute(&format!("DROP ROLE IF EXISTS {}", identifier(name))) {
            left.push(format!("role {name} ({})", cause(&error)));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_told_apart() {
        let kind = |text: &str| match Global::of(&words(text)) {
            Global::CreateRole(name) => format!("create {name}"),
            Global::AlterRole(name) => format!("alter {name}"),
            Global::OfRole(name) => format!("of {name}"),
            Global::Membership { role, member } => format!("{member} in {role}"),
            Global::Parameter => "parameter".to_owned(),
            Global::CreateTablespace(name) => format!("tablespace {name}"),
            Global::Other => "other".to_owned(),
        };
        for (text, expected) in [
            ("CREATE ROLE \"A b\"", "create A b"),
            ("ALTER ROLE x WITH SUPERUSER INHERIT PASSWORD 'SCRAM'", "alter x"),
            ("ALTER ROLE x SET search_path TO 'a', 'b'", "of x"),
            ("COMMENT ON ROLE x IS 'y'", "of x"),
            ("GRANT a TO \"B\" WITH ADMIN OPTION GRANTED BY postgres", "B in a"),
            ("GRANT SET ON PARAMETER work_mem TO x", "parameter"),
            ("GRANT ALL ON TABLESPACE fast TO x", "other"),
            ("CREATE TABLESPACE fast OWNER x LOCATION '/y'", "tablespace fast"),
            ("SET client_encoding = 'UTF8'", "other"),
            ("DROP ROLE x", "other"),
            ("CREATE FUNCTION f() RETURNS int AS 'x'", "other"),
        ] {
            assert_eq!(kind(text), expected);
        }
    }

    #[test]
    fn differences_of_roles_that_exist_are_named() {
        let here = ["NOSUPERUSER", "INHERIT", "LOGIN"].map(str::to_owned).into();
        let mut globals = Globals::default();
        compare(
            "x",
            &words("ALTER ROLE x WITH SUPERUSER INHERIT LOGIN PASSWORD 'SUPERUSER'"),
            Some(&here),
            &mut globals,
        );
        assert_eq!(globals.losses.len(), 1);
        assert!(globals.losses[0].why.ends_with("it is SUPERUSER"), "{:?}", globals.losses);
    }
}
