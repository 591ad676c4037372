//! Privileges that no archive of `pg_dump` carries for us: those of databases, of large objects and of the
//! schema that every database is born with.

use stillpoint_core::error::Result;

use super::super::session::Session;
use super::super::wire::{identifier, literal};

/// The statements that give `what`, e.g. `DATABASE "app"`, exactly the privileges of `grants`, texts such
/// as `app=CTc/owner`. The server itself takes them apart: it knows the letters of its version.
pub(super) fn statements(session: &mut Session, what: &str, owner: &str, grants: &[String]) -> Result<Vec<String>> {
    let mut all =
        vec![format!("REVOKE ALL ON {what} FROM PUBLIC"), format!("REVOKE ALL ON {what} FROM {}", identifier(owner))];
    let items: Vec<String> = grants.iter().map(|item| format!("{}::pg_catalog.aclitem", literal(item))).collect();
    if items.is_empty() {
        return Ok(all);
    }
    let rows = session.query(&format!(
        "SELECT pg_catalog.format('GRANT %s ON %s TO %s%s', a.privilege_type, {}, \
         CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END, \
         CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END) \
         FROM pg_catalog.aclexplode(ARRAY[{}]) a",
        literal(what),
        items.join(", ")
    ))?;
    for row in &rows {
        all.push(row.string(0)?);
    }
    Ok(all)
}
